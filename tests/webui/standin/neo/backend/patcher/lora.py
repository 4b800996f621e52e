"""There as in Forge, but nobody is asked for `extra_weight_calculators`."""

from patch_lists import calculate_weight as merge_lora_to_weight  # noqa: F401

extra_weight_calculators: dict = {}
