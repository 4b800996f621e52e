"""Save OFT: strengths baked in, the nearest rotations, and LoRAs that ComfyUI's own loader reads."""

from __future__ import annotations

import comfy.sd
import families
import torch
from comfyui_oft.nodes import save, stack
from comfyui_oft.nodes.binding import apply as host
from comfyui_oft.nodes.binding import folders
from comfyui_oft.oft_core import BlockWeights, FormatError, Strength
from comfyui_oft.oft_core.training import ConfigError
from learning import fresh_user, merged
from safetensors.torch import load_file
from turning import adapter_for, raises


def saved(adapter, model, dialect, **more):
    """(file, what the node shows)."""
    with torch.inference_mode():
        out = save.OFTSave.execute(
            adapter=adapter, model=model, name="as/x", dialect=dialect, precision="fp32", folder="oft", **more
        )
    return out.args[0], out.ui.as_dict()["text"][0]


def weights(adapter, model, s=1.0):
    with torch.inference_mode():
        return merged(host.apply(adapter, model, None, Strength(s), Strength(s)).model)


def apart(got, want, start):
    size = sum(float((want[k].double() - start[k].double()).square().sum()) for k in start)
    assert size > 0
    return (sum(float((got[k].double() - want[k].double()).square().sum()) for k in start) / size) ** 0.5


def test_core_reads_the_lora():
    for family in ("sd15", "sdxl", "flux"):
        fresh_user()
        model = families.make_model(family)
        adapter = adapter_for(model, "in")
        name, text = saved(adapter, model, "lora", rank=4096, strength=0.7)
        assert "LoRA" in text and "0.0 % is left out" in text
        with torch.inference_mode():
            start = merged(model)
            patched, _ = comfy.sd.load_lora_for_models(model, None, load_file(folders.find(name)), 1.0, 0.0)
            got = merged(patched)
        assert len(patched.patches) == len(adapter.entries), family
        assert apart(got, weights(adapter, model, 0.7), start) < 1e-4, family
        assert "0.0 % is left out" not in saved(adapter, model, "lora", rank=2)[1]


def test_strengths_and_near_rotations():
    fresh_user()
    model = families.make_model("sd15")
    with torch.inference_mode():
        start = merged(model)
    adapter = adapter_for(model, "out")
    adapter.blocks = BlockWeights.parse("all=1, middle=0")
    name, text = saved(adapter, model, "comfy", strength=0.5)
    assert text.splitlines() == [f"Saved: {name}"]
    assert apart(weights(folders.read(name), model), weights(adapter, model, 0.5), start) < 1e-5
    adapter.blocks = None
    assert "input side" in raises(FormatError, lambda: saved(adapter, model, "oft_v2"))
    name, text = saved(adapter, model, "oft_v2", approximate=True)
    left = float(text.split("Of the change ")[1].split(" %")[0]) / 100
    assert abs(apart(weights(folders.read(name), model), weights(adapter, model), start) - left) < 0.01 and 0 < left < 1
    for wrong in ({"strength": 0.5}, {}):
        adapter.blocks = None if wrong else BlockWeights.parse("all=0.5")
        assert "no place for strengths" in raises(ConfigError, lambda more=wrong: saved(adapter, model, save.AS_IS, **more))


def test_a_stack_with_kept_angles_turns_further():
    fresh_user()
    model = families.make_model("sd15")
    rows = [stack.Row(f"{i}", True, Strength(), Strength(), adapter_for(model, "in", seed=200 * i)) for i in range(2)]
    with torch.inference_mode():
        start = merged(model)
        made = {
            how: stack.OFTApplyStack.execute(stack=tuple(rows), how=how, model=model, runtime="weights")
            for how in (stack.BLEND, stack.BLEND_KEPT)
        }
        got = {how: merged(out.args[0]) for how, out in made.items()}
    size = {how: sum(float((w[k].double() - start[k].double()).square().sum()) for k in start) ** 0.5 for how, w in got.items()}
    assert 1.3 < size[stack.BLEND_KEPT] / size[stack.BLEND] < 1.5, "two of one size, in different directions"
    assert "angles kept" in made[stack.BLEND_KEPT].args[2] and "angles kept" not in made[stack.BLEND].args[2]
