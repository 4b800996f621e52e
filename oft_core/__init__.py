"""Read, understand and apply Orthogonal Fine-Tuning adapters of every dialect. Needs torch, safetensors and numpy only."""

from .adapter import Adapter, Binding, Entry, Patch, load_adapter, read_tensors
from .block_weights import BlockWeights
from .constraint import COFT_CHOICES, MODES, Constraint, Strength
from .errors import (
    AdapterError,
    BlockError,
    FileError,
    FormatError,
    ModelMismatch,
    ScheduleError,
    ShapeError,
    StackError,
    StrengthError,
    ValueFault,
)
from .formats import ReadOptions
from .layer import Built, Diff, LayerRotation, build_all
from .merge import merge_file
from .model_folder import merge_folder
from .names import NameIndex, Target, component, guess_family
from .report import Report, describe
from .schedule import Schedule

__version__ = "0.1.0"
__all__ = [
    "COFT_CHOICES", "MODES", "Adapter", "AdapterError", "Binding", "BlockError", "BlockWeights", "Built", "Constraint",
    "Diff", "Entry", "FileError", "FormatError", "LayerRotation", "ModelMismatch", "NameIndex", "Patch", "ReadOptions",
    "Report", "Schedule", "ScheduleError", "ShapeError", "StackError", "Strength", "StrengthError", "Target", "ValueFault",
    "build_all", "component", "describe", "guess_family", "load_adapter", "merge_file", "merge_folder", "read_tensors",
]
