"""Training of rotations, host-free: a host hands in the model's prediction, pictures and callbacks as plain functions."""

from .config import PRESETS, LayerChoice, OFTConfig, Selection
from .errors import ConfigError, StateError, TrainingError
from .layers import RotationBank

__all__ = ["PRESETS", "ConfigError", "LayerChoice", "OFTConfig", "RotationBank", "Selection", "StateError", "TrainingError"]
