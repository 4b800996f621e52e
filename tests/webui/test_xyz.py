"""Axes of the X/Y/Z plot, on a plot that does with them what the hosts' does."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from .conftest import close, equal


class AxisOption:
    """As the hosts' own, with the same order of arguments."""

    def __init__(self, label, type, apply, format_value=None, confirm=None, cost=0.0, choices=None, prepare=None):
        self.label, self.type, self.apply, self.confirm, self.choices = label, type, apply, confirm, choices


@pytest.fixture
def web(web_of):
    web = web_of("forge")
    grid = SimpleNamespace(AxisOption=AxisOption, axis_options=[], format_value=None, format_value_add_label=None)
    web.modules.scripts.scripts_data.append(SimpleNamespace(path="/webui/scripts/xyz_grid.py", module=grid))
    web.start()
    web.axes = {option.label: option for option in grid.axis_options}
    web.grid = grid
    return web


def _drawn(web, prompt, *cell, hr_prompt=None):
    """A cell of the plot: axes applied in order to a picture of its own."""
    p = web.modules.processing.Processing(web, prompt)
    p.prompt, p.hr_prompt = prompt, hr_prompt or ""
    for label, value in cell:
        web.axes[f"[OFT] {label}"].apply(p, value, [value])
    p.all_prompts = [p.prompt]
    return web.modules.processing.process_images(p)[0], p


def test_registered_once(web):
    web.start()
    assert [option.label for option in web.grid.axis_options] == ["[OFT] File", "[OFT] Strength", "[OFT] Mode"]


def test_strength_and_mode_change_the_first_tag(web):
    path = web.oft("koala")
    assert close(_drawn(web, "<oft:koala:1>", ("Strength", 0.5))[0], web.merged((path, 0.5)))
    found, p = _drawn(web, "<oft:koala:te=1:unet=0>", ("Mode", "linear"), ("Strength", 0.5), hr_prompt="<oft:koala:1> x")
    assert close(found, web.merged((path, 0.5, "linear")))
    assert p.hr_prompt == "<oft:koala:0.5:mode=linear> x"


def test_files_in_any_order_of_axes(web):
    one, two = web.oft("one", seed=1), web.oft("two", seed=2)
    base = web.drawn("a photo")
    for prompt in ("a photo", "a photo <oft:one:1>"):
        assert close(_drawn(web, prompt, ("File", "two"), ("Strength", 0.5))[0], web.merged((two, 0.5)))
        found, p = _drawn(web, prompt, ("Strength", 0.5), ("File", "two"))
        assert close(found, web.merged((two, 0.5))) and not p.comments
        for cell in ([("File", "None"), ("Strength", 0.5)], [("Strength", 0.5), ("File", "None")]):
            found, p = _drawn(web, prompt, *cell)
            assert equal(found, base) and not p.comments
    assert close(_drawn(web, "a photo", ("File", "one"))[0], web.merged((one,)))


def test_an_axis_without_a_tag_says_so(web):
    web.oft("koala")
    _, p = _drawn(web, "a photo", ("Strength", 0.5))
    assert any("changed nothing" in text for text in p.comments)


def test_values_are_checked_before_anything_is_drawn(web):
    web.oft("koala")
    axes = web.axes
    axes["[OFT] File"].confirm(None, ["koala", "None"])
    assert axes["[OFT] File"].choices() == ["None", "koala"]
    with pytest.raises(RuntimeError, match="similar names: koala"):
        axes["[OFT] File"].confirm(None, ["koala", "koalla"])
    with pytest.raises(RuntimeError, match="geodesic"):
        axes["[OFT] Mode"].confirm(None, ["twist"])
