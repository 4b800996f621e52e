"""A change as a weight adapter, for the hosts that have taken over ComfyUI's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..changes import Change


def payload(base: type) -> Callable[[Change], Any]:
    """What makes a weight adapter of a change. base: the host's ``WeightAdapterBase``."""

    class Turn(base):
        name = "oft_rotation"

        def __init__(self, change: Change):
            self.loaded_keys, self.weights = {change.patch.module}, ()
            self.oft_change = change

        def calculate_weight(
            self, weight: torch.Tensor, key, strength, strength_model, offset, function, intermediate_dtype=torch.float32, *_, **__
        ) -> torch.Tensor:
            """In place: with an offset the host hands over a view and drops what is returned."""
            return self.oft_change.apply_(weight)

    return Turn


def ours(value: Any) -> bool:
    return hasattr(value, "oft_change")
