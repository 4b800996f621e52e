"""Saving and compiling models with turned activations."""

from __future__ import annotations

from pathlib import Path

import comfy.hooks
import comfy.lora
import comfy.model_management as management
import comfy.model_patcher
import comfy.ops
import comfy.patcher_extension
import comfy.quant_ops
import comfy.sample
import comfy.sd
import comfy.supported_models
import families
import folder_paths
import torch
from comfyui_oft.nodes.binding import runtime
from comfyui_oft.oft_core import AdapterError
from turning import adapter_for, add_lora, apart, applied, loaded, lora, numbers, raises, sampled, shapes_of


def test_saving_is_refused_with_the_way_out():
    model = families.make_model("sd15")
    adapter = adapter_for(model)
    path = str(Path(folder_paths.models_dir) / "runtime_saved.safetensors")
    Path(path).unlink(missing_ok=True)
    done = applied(adapter, model, "activations")
    assert "saved checkpoint" in done.report and "'weights'" in done.report
    plain = sampled(model)
    text = raises(AdapterError, lambda: comfy.sd.save_checkpoint(path, done.model))
    assert "runtime" in text and "'weights'" in text and not Path(path).exists(), text
    assert torch.equal(sampled(model), plain), "base after the refusal"
    merged = applied(adapter, model, "weights").model
    comfy.sd.save_checkpoint(path, merged)
    from safetensors.torch import load_file

    saved = load_file(path)
    with loaded(merged) as inside:
        for key in merged.patches:
            expected = inside.state_dict()[key]
            assert apart(saved["model." + key], expected) < 1e-3, key
    management.unload_all_models()
    # A later LoRA on every turned layer moves the file into the weights: nothing is missing then.
    keys = [k for k in shapes_of(model) if "attn1.to_q" in k]
    late = add_lora(
        applied(adapter_for(model, want=("attn1.to_q",)), model, "activations").model, lora(keys, model)
    )
    comfy.sd.save_checkpoint(path, late)
    management.unload_all_models()
    Path(path).unlink()


def test_saving_in_later_hosts():
    """Those save nodes take the state dict from the patcher, and force nothing."""

    class Later(comfy.model_patcher.ModelPatcher):
        def model_state_dict_for_saving(self, prefix=""):
            return {prefix + key: value for key, value in self.model.state_dict().items()}

    old = families.make_model("sd15")
    model = Later(old.model, old.load_device, old.offload_device)
    adapter = adapter_for(model)
    live, merged = (applied(adapter, model, how).model for how in ("activations", "weights"))
    for patcher in (live, live.clone()):
        assert "'weights'" in raises(AdapterError, patcher.model_state_dict_for_saving)
    for patcher in (model, merged, model.clone()):
        assert all(k.startswith("x.") for k in patcher.model_state_dict_for_saving("x."))
    keys = [k for k in shapes_of(model) if "attn1.to_q" in k]
    late = add_lora(
        applied(adapter_for(model, want=("attn1.to_q",)), model, "activations").model, lora(keys, model)
    )
    assert late.model_state_dict_for_saving("x.")


def test_compiled_models():
    model = families.make_model("sd15")
    adapter = adapter_for(model, "in", want=("attn1.to_",))
    node = applied(adapter, model, "activations", 0.7).model
    key = next(iter(runtime.live_entries(node)))
    layer = dict(model.model.named_modules())[key.removesuffix(".weight")]
    x = numbers(2, 5, layer.in_features)
    with loaded(node), torch.no_grad():
        expected = layer(x)
        compiled = torch.compile(layer, backend="eager")(x)
    assert apart(compiled, expected) < 1e-6 and apart(layer(x), expected) > 1e-3


def test_ways_of_calling():
    """By keyword, one vector, one picture without a batch, in half precision, under autocast."""
    model = families.make_model("sd15")
    node = applied(adapter_for(model, "in"), model, "activations").model
    modules = dict(model.model.named_modules())
    found = {}
    for key in runtime.live_entries(node):
        module = modules[key.removesuffix(".weight")]
        found.setdefault((type(module).__name__, getattr(module, "kernel_size", None)), module)
    assert {("Linear", None), ("Conv2d", (1, 1)), ("Conv2d", (3, 3))} <= found.keys(), found.keys()
    with loaded(node), torch.no_grad():
        for (kind, _), module in found.items():
            x = numbers(3, module.in_features) if kind == "Linear" else numbers(3, module.in_channels, 5, 6)
            y = module(x)
            assert torch.equal(module(input=x), y)
            assert apart(module(x[0]), y[0]) < 1e-6
            assert torch.equal(module.forward(x), y)
            with torch.autocast("cpu", torch.bfloat16):
                low = module(x)
            assert low.dtype == torch.bfloat16 and apart(low, y) < 1e-2, (kind, low.dtype, apart(low, y))
            assert apart(type(module).forward(module, x), y) > 1e-2
            assert module(x[:0]).shape == y[:0].shape
