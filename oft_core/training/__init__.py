"""Training of rotations, host-free: a host hands in the model's prediction, pictures and callbacks as plain functions."""

from .config import OFTConfig
from .data import Order, Record
from .errors import ConfigError, StateError, TrainingError
from .layers import RotationBank
from .loop import Loaded, Progress, Result, Trainer, TrainSettings, checkpointing
from .objective import Noised, Objective
from .optim import OPTIMIZERS, SCHEDULES
from .selection import PRESETS, LayerChoice, Selection

__all__ = [
    "OPTIMIZERS", "PRESETS", "SCHEDULES", "ConfigError", "LayerChoice", "Loaded", "Noised", "OFTConfig", "Objective", "Order",
    "Progress", "Record", "Result", "RotationBank", "Selection", "StateError", "TrainSettings", "Trainer", "TrainingError",
    "checkpointing",
]
