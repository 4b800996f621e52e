"""Loading: patched weights against the formula, beside other patches, in every way of loading."""

from __future__ import annotations

from pathlib import Path

import comfy.hooks
import comfy.lora
import comfy.model_management as management
import comfy.model_patcher
import comfy.ops
import comfy.sd
import comfy.utils
import folder_paths
import pytest
import torch
from comfyui_oft.nodes.binding import apply as host
from comfyui_oft.nodes.binding import layers
from comfyui_oft.nodes.binding import names as host_names
from comfyui_oft.nodes.binding import patch as host_patch
from comfyui_oft.oft_core import (
    Strength,
    read_tensors,
)
from patching import (
    MIXED,
    adapter_for,
    applied,
    close,
    diag_oft,
    generator,
    input_oft,
    loaded,
    rotated_out,
    same,
    sd15,
    shapes_of,
    state,
    weight_names,
    weights_in_forward,
)


def test_full_load_is_the_formula():
    model = sd15()
    base, tensors = state(model), diag_oft(shapes_of(model, MIXED))
    adapter = read_tensors(tensors, {}, name="test")
    for s in (1.0, 0.37, -1.0, 3.0):
        got = loaded(applied(adapter, model, s).model)
        for key in base:
            blocks = tensors.get("lora_unet_" + key[16:-7].replace(".", "_") + ".oft_blocks")
            if blocks is None:
                assert torch.equal(got[key], base[key]), key
            else:
                close(got[key], rotated_out(base[key], blocks, s), 2e-6)
    same(state(model), base, "base after unpatch")


def test_partial_load_is_bit_identical():
    for make in (diag_oft, input_oft):
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            model = sd15()
            model.model.diffusion_model.to(dtype)
            adapter = adapter_for(model, make=make)
            patched = applied(adapter, model, 0.8).model
            full = loaded(patched)
            partly = weights_in_forward(patched, dtype)
            touched = [k for k in partly if k in patched.patches]
            assert len(touched) == len(patched.patches) > 20
            for key in partly:
                assert torch.equal(full[key], partly[key]), f"{make.__name__} {dtype} {key}"


def test_partial_load_draws_the_same():
    for dtype in (torch.float32, torch.bfloat16):
        model = sd15()
        model.model.diffusion_model.to(dtype)
        patched = applied(adapter_for(model), model, 0.8).model
        x, t = torch.randn(1, 4, 8, 8, generator=generator(3)).to(dtype), torch.tensor([500.0])
        c = torch.randn(1, 77, 768, generator=generator(4)).to(dtype)
        pictures = []
        for budget in (0, 1):
            patched.patch_model(torch.device("cpu"), lowvram_model_memory=budget)
            with torch.no_grad():
                pictures.append(patched.model.diffusion_model(x, t, context=c))
            patched.unpatch_model(torch.device("cpu"))
        with torch.no_grad():
            plain = model.model.diffusion_model(x, t, context=c)
        assert torch.equal(*pictures)
        assert not torch.equal(pictures[0], plain)


def test_fp8_weights():
    model = sd15()
    exact = loaded(applied(adapter_for(model), model).model)
    for module in model.model.diffusion_model.modules():
        if hasattr(module, "comfy_cast_weights") and module.weight is not None and module.weight.ndim > 1:
            module.weight = torch.nn.Parameter(module.weight.to(torch.float8_e4m3fn), requires_grad=False)
    base = state(model)
    patched = host.apply(adapter_for(model), model, None, Strength(), Strength(), "weights").model
    first, second = loaded(patched), loaded(patched)
    assert len(patched.patches) > 20
    partly = weights_in_forward(patched, torch.float32)
    for key in patched.patches:
        assert first[key].dtype == torch.float8_e4m3fn
        assert torch.equal(first[key].view(torch.uint8), second[key].view(torch.uint8)), key
        scale = float(exact[key].abs().max())
        close(first[key].float(), exact[key], 0.13 * scale)
        close(partly[key].float(), exact[key], 0.13 * scale)
    for key, before in base.items():
        assert torch.equal(before.float(), model.model.state_dict()[key].float()), key


def test_scaled_fp8_weights():
    if not hasattr(comfy.ops, "scaled_fp8_ops"):
        pytest.skip("later hosts load such files into their quantised layers: test_quantised.py")
    ops = comfy.ops.scaled_fp8_ops(fp8_matrix_mult=False)

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = ops.Linear(32, 64, bias=False, device="cpu", dtype=torch.float8_e4m3fn)

    net = Net()
    true = torch.randn(64, 32, generator=generator(0)) * 0.3
    net.linear.weight = torch.nn.Parameter((true / 0.004).to(torch.float8_e4m3fn), requires_grad=False)
    net.linear.scale_weight = torch.nn.Parameter(torch.tensor(0.004), requires_grad=False)
    patcher = comfy.model_patcher.ModelPatcher(net, torch.device("cpu"), torch.device("cpu"))
    blocks = torch.randn(8, 8, 8, generator=generator(1)) * 0.1
    adapter = read_tensors({"linear.oft_blocks": blocks, "linear.alpha": torch.tensor(0.0)}, {}, name="test")
    index = host_names.HostIndex({"linear.weight": (64, 32)}, {"linear": host_names.Target("linear.weight")})
    side = host_names.Side("model", "Model", patcher, patcher, {"linear.weight": (64, 32)}, {})
    dictionaries, keeper = host_patch.make_patches(side, adapter.bind(index).patches, "rotation", "file")
    clone = patcher.clone()
    clone.add_patches(dictionaries[0], 1.0)
    expected = rotated_out(net.linear.weight.float() * 0.004, blocks)
    clone.patch_model(torch.device("cpu"))
    close(net.linear.weight.float() * net.linear.scale_weight, expected, 0.13 * float(expected.abs().max()))
    # What is written as a difference to the model's own values needs these, neither codes nor patched ones.
    sides, host_names.sides_of = host_names.sides_of, lambda model, clip: [side]
    try:
        own = host_names.own_weights(clone, None)("linear.weight")
    finally:
        host_names.sides_of = sides
    close(own, true, 0.07 * float(true.abs().max()))
    clone.unpatch_model(torch.device("cpu"))
    assert keeper.batches


def test_own_weights_are_those_below_patches_and_hooks():
    net = torch.nn.Module()
    net.linear = torch.nn.Linear(8, 8, bias=False)
    base = net.linear.weight.detach().clone()
    patcher = comfy.model_patcher.ModelPatcher(net, torch.device("cpu"), torch.device("cpu"))
    patcher.add_patches({"linear.weight": (torch.ones(8, 8),)})
    patcher.patch_weight_to_device("linear.weight")
    close(layers.plain_weight(patcher, "linear.weight"), base, 0)
    hook = comfy.hooks.WeightHook()
    hook.hook_ref = comfy.hooks._HookRef()
    patcher.add_hook_patches(hook, {"linear.weight": (torch.full((8, 8), 5.0),)})
    group = comfy.hooks.HookGroup()
    group.add(hook)
    patcher.patch_hooks(group)
    close(net.linear.weight, base + 6, 1e-5)
    close(layers.plain_weight(patcher, "linear.weight"), base, 0)


def test_meeting_a_lora():
    model = sd15()
    key = weight_names(model, ("attn1.to_q",))[0]
    base, delta = state(model)[key], torch.randn(*state(model)[key].shape, generator=generator(5)) * 0.1
    tensors = diag_oft({key: tuple(base.shape)})
    adapter, blocks = read_tensors(tensors, {}, name="test"), next(t for t in tensors.values() if t.ndim == 3)
    before = model.clone()
    before.add_patches({key: ("diff", (delta,))}, 0.5)
    after_lora = loaded(applied(adapter, before).model)[key]
    close(after_lora, rotated_out(base + 0.5 * delta, blocks), 2e-6)
    after = applied(adapter, model).model
    after.add_patches({key: ("diff", (delta,))}, 0.5)
    close(loaded(after)[key], rotated_out(base, blocks) + 0.5 * delta, 2e-6)
    for patched in (after, applied(adapter, before).model):
        assert torch.equal(loaded(patched)[key], weights_in_forward(patched, torch.float32)[key])


def test_two_adapters():
    model = sd15()
    key = weight_names(model, ("attn1.to_q",))[0]
    base = state(model)[key]
    files = [diag_oft({key: tuple(base.shape)}, seed) for seed in (1, 2)]
    one, two = (read_tensors(t, {}, name="test") for t in files)
    blocks = [next(t for t in f.values() if t.ndim == 3) for f in files]
    both = applied(two, applied(one, model, 0.6).model, -1.5).model
    close(loaded(both)[key], rotated_out(rotated_out(base, blocks[0], 0.6), blocks[1], -1.5), 2e-6)
    undone = applied(one, applied(one, model, 1.0).model, -1.0).model
    close(loaded(undone)[key], base, 2e-6)


def test_hooks():
    model = sd15()
    base = state(model)
    adapter = adapter_for(model)
    side = host_names.model_side(model)
    index = host_names.HostIndex(side.shapes, side.aliases)
    dictionaries, keeper = host_patch.make_patches(side, adapter.bind(index).patches, "rotation", "file")
    assert len(dictionaries) == 1 and keeper.batches
    for s, keyframe in ((1.0, None), (0.8, 0.25)):
        hook = comfy.hooks.WeightHook(strength_model=s, strength_clip=s)
        hook.weights, hook.need_weight_init = dictionaries[0], False
        group = comfy.hooks.HookGroup()
        group.add(hook)
        if keyframe is not None:
            frames = comfy.hooks.HookKeyframeGroup()
            frames.add(comfy.hooks.HookKeyframe(strength=keyframe))
            group.set_keyframes_on_hooks(frames)
        patcher = model.clone()
        patcher.register_all_hook_patches(
            group, comfy.hooks.create_target_dict(comfy.hooks.EnumWeightTarget.Model)
        )
        patcher.patch_model(torch.device("cpu"))
        if keyframe is not None:
            group.hooks[0].hook_keyframe.prepare_current_keyframe(
                10.0, {"sample_sigmas": torch.tensor([10.0, 0.0])}
            )
        patcher.apply_hooks(group, force_apply=True)
        got = state(patcher)
        patcher.unpatch_hooks()
        patcher.unpatch_model(torch.device("cpu"))
        same(got, loaded(applied(adapter, model, s * (keyframe or 1.0)).model), f"hook at {s} x {keyframe}")
        same(state(model), base, "base after hooks")


def test_unload_and_reload():
    model = sd15()
    base, patched = state(model), applied(adapter_for(model), model, 0.7).model
    first = loaded(patched)
    management.load_models_gpu([patched])
    same(state(patched), first, "managed load")
    management.unload_all_models()
    same(state(model), base, "unloaded")
    management.load_models_gpu([patched])
    same(state(patched), first, "loaded again")
    management.unload_all_models()
    same(state(model), base, "unloaded again")


def test_partly_unloaded():
    model = sd15()
    patched = applied(adapter_for(model), model, 0.7).model
    full = loaded(patched)
    patched.patch_model(torch.device("cpu"), lowvram_model_memory=10**9)
    patched.partially_unload(torch.device("cpu"), 10**5)
    seen = 0
    for name, module in patched.model.named_modules():
        if hasattr(module, "comfy_cast_weights") and getattr(module, "weight", None) is not None:
            weight, _ = comfy.ops.cast_bias_weight(module, torch.zeros(1))
            assert torch.equal(weight, full[name + ".weight"]), name
            seen += bool(module.weight_function)
    patched.unpatch_model(torch.device("cpu"))
    assert seen


def test_saved_checkpoint_has_the_rotation():
    model = sd15()
    patched = applied(adapter_for(model), model, 0.7).model
    full = loaded(patched)
    path = Path(folder_paths.models_dir) / "saved.safetensors"
    comfy.sd.save_checkpoint(str(path), patched)
    from safetensors.torch import load_file

    saved = load_file(path)
    for key in patched.patches:
        close(saved["model." + key].float(), full[key], 1e-3 * float(full[key].abs().max()) + 1e-6)
    management.unload_all_models()


def test_another_strength():
    model = sd15()
    adapter = adapter_for(model)
    fresh = {s: loaded(applied(adapter, sd15(), s).model) for s in (0.5, 1.0)}
    for s in (1.0, 0.5, 1.0):
        management.load_models_gpu([applied(adapter, model, s).model])
        same(state(model), fresh[s], f"strength {s}")
    management.unload_all_models()


def test_same_file_on_two_models():
    one, two = sd15(0), sd15(1)
    adapter = adapter_for(one)
    a, b = applied(adapter, one).model, applied(adapter, two).model
    management.load_models_gpu([a, b])
    same(state(one), loaded(applied(adapter, sd15(0)).model), "first")
    same(state(two), loaded(applied(adapter, sd15(1)).model), "second")
    management.unload_all_models()


def test_merged_models():
    """ModelMergeSimple keeps the second model's patches as a nested list."""
    one, two = sd15(0), sd15(1)
    adapter = adapter_for(two)
    merged, patched = one.clone(), applied(adapter, two).model
    for key, value in patched.get_key_patches("diffusion_model.").items():
        merged.add_patches({key: value}, 0.5, 0.5)
    turned, base, got = loaded(patched), state(one), loaded(merged)
    for key in patched.patches:
        close(got[key], 0.5 * base[key] + 0.5 * turned[key], 1e-6)
