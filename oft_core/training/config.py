"""What is trained: the options, and the layers of a model that they choose."""

from __future__ import annotations

from torch import nn

from .options import OFTOptions
from .selection import Selection, select


class OFTConfig(OFTOptions):
    """The options of a training; ``select`` finds their layers in a model. Raises ConfigError as ``OFTOptions``."""

    def select(self, model: nn.Module) -> Selection:
        """The layers of ``model`` that these settings rotate, each with its block size.

        Raises ConfigError if nothing matches, or if a chosen layer is of a kind that cannot be rotated.
        """
        return select(self, model)
