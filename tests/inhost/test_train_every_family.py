"""Every family that ComfyUI lists learns from still pictures, or is refused by name with the reason."""

from __future__ import annotations

import every_family
import family_training
import pytest
from comfyui_oft.nodes.training.prediction import UNSUITED
from comfyui_oft.oft_core.training import ConfigError

FAMILIES = every_family.available()
REFUSED = {n for n, f in FAMILIES.items() if f.host in UNSUITED or f.kind in ("audio", "shape")}


@pytest.mark.parametrize("name", sorted(set(FAMILIES) - REFUSED))
def test_it_learns_and_its_file_draws_what_was_seen(name):
    """20 steps: the error on a fixed batch falls, the file draws the sample, a stopped run goes on exactly."""
    seen = family_training.learnt(FAMILIES[name])
    assert seen.layers >= 4, seen
    assert seen.after < 0.999 * seen.before, seen
    # A gradient that a second computation changed would show from the second loss on.
    assert seen.without < 1e-5, seen
    # Samples are PNG files: half a step of 1/255, and rounding of merged weights.
    assert seen.picture < 0.0045 < seen.moved, seen
    assert seen.resumed and seen.read_back and seen.unchanged, seen


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_it_is_refused_with_the_reason(name):
    family = FAMILIES[name]
    with pytest.raises(ConfigError, match="cannot be trained with pictures and captions: it ") as caught:
        family_training.learnt(family)
    assert family.host in str(caught.value)
