"""What can go wrong in training, as named errors that a person can act on."""

from __future__ import annotations

from ..errors import AdapterError


class ConfigError(AdapterError):
    """A setting has a value that is not allowed, contradicts another, or does not fit the model."""


class TrainingError(AdapterError):
    """Training cannot go on (out of memory, numbers that are not finite, a missing package). The last good state is kept."""


class StateError(AdapterError):
    """A saved training state is damaged or belongs to another configuration."""
