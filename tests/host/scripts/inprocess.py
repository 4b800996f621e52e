"""Checks of the patching inside a real ComfyUI process, without a server.

Usage and output: see checks.py.
"""

from __future__ import annotations

import json
import math
import ntpath
import re
import sys
from pathlib import Path
from types import SimpleNamespace

from checks import REPO, check, run_checks, start_host

if __name__ == "__main__":
    work, wanted = start_host()

if "comfyui_oft" in sys.modules:
    import asyncio

    import comfy.hooks
    import comfy.lora
    import comfy.model_management as management
    import comfy.model_patcher
    import comfy.ops
    import comfy.sd
    import comfy.utils
    import families
    import folder_paths
    import torch
    from comfyui_oft.nodes import compat, dataset, load, save, schedule, stack, train
    from comfyui_oft.nodes.binding import apply as host
    from comfyui_oft.nodes.binding import everywhere, files, folders, layers, track
    from comfyui_oft.nodes.binding import names as host_names
    from comfyui_oft.nodes.binding import patch as host_patch
    from comfyui_oft.oft_core import (
        AdapterError,
        FileError,
        ModelMismatch,
        ReadOptions,
        Schedule,
        Strength,
        StrengthError,
        cache,
        read_tensors,
    )
    from comfyui_oft.oft_core.schedule import Cursor, progress_of
    from comfyui_oft.oft_core.training import ConfigError
    from safetensors.torch import save_file


# --- helpers ------------------------------------------------------------------------------------------------


def generator(seed):
    return torch.Generator().manual_seed(seed)


def weight_names(patcher, want):
    """Two- and four-dimensional weights of the diffusion model whose name holds one of `want`."""
    sd = patcher.model.state_dict()
    return [
        k
        for k, v in sd.items()
        if k.startswith("diffusion_model.")
        and k.endswith(".weight")
        and v.ndim in (2, 4)
        and any(w in k for w in want)
    ]


def diag_oft(shapes, seed=0, block=8, std=0.1, name=lambda k: "lora_unet_" + k[16:-7].replace(".", "_")):
    """LyCORIS Diag-OFT tensors (output side) for parameters {key: shape}."""
    out, g = {}, generator(seed)
    for key, shape in shapes.items():
        if shape[0] % block == 0:
            out[name(key) + ".oft_blocks"] = torch.randn(shape[0] // block, block, block, generator=g) * std
            out[name(key) + ".alpha"] = torch.tensor(0.0)
    return out


def input_oft(shapes, seed=0, block=8, std=0.02, name=lambda k: "lora_unet_" + k[16:-7].replace(".", "_")):
    """OneTrainer OFT tensors (input side, Neumann) for parameters {key: shape}."""
    out, g = {}, generator(seed)
    for key, shape in shapes.items():
        n = math.prod(shape[1:])
        if n % block == 0:
            out[name(key) + ".oft_R.weight"] = (
                torch.randn(n // block, block * (block - 1) // 2, generator=g) * std
            )
    return out


def shapes_of(patcher, want):
    sd = patcher.model.state_dict()
    return {k: tuple(sd[k].shape) for k in weight_names(patcher, want)}


def cayley(q):
    eye = torch.eye(q.shape[-1], dtype=torch.float64)
    return torch.stack([(eye + one) @ torch.linalg.inv(eye - one) for one in q.double()])


def rotated_out(weight, blocks, s=1.0):
    """Independent formula of the rotation mode: rows of each block times cay(s (A - A^T))^T, in float64."""
    q = (blocks - blocks.transpose(-1, -2)).double()
    r = cayley(s * q).transpose(-1, -2)
    flat = weight.double().reshape(r.shape[0], r.shape[1], -1)
    return torch.bmm(r, flat).reshape(weight.shape)


def state(patcher):
    return {k: v.detach().clone() for k, v in patcher.model.state_dict().items()}


def loaded(patcher):
    """Weights after a full load; unpatched again before returning."""
    patcher.patch_model(torch.device("cpu"))
    out = state(patcher)
    patcher.unpatch_model(torch.device("cpu"))
    return out


def weights_in_forward(patcher, dtype):
    """What every layer multiplies with after a partial load with nothing resident, {key: tensor}."""
    patcher.patch_model(torch.device("cpu"), lowvram_model_memory=1)
    assert patcher.model.model_lowvram
    out, probe = {}, torch.zeros(1, dtype=dtype)
    for name, module in patcher.model.named_modules():
        if hasattr(module, "comfy_cast_weights") and getattr(module, "weight", None) is not None:
            weight, bias = comfy.ops.cast_bias_weight(module, probe)
            out[name + ".weight"] = weight.detach().clone()
            if bias is not None:
                out[name + ".bias"] = bias.detach().clone()
    patcher.unpatch_model(torch.device("cpu"))
    return out


def sd15(seed=0):
    return families.make_model("sd15", seed=seed)


ATTENTION = ("attn1.to_", "attn2.to_")
MIXED = (*ATTENTION, "in_layers.2", "ff.net", "proj_in")


def adapter_for(patcher, want=MIXED, seed=0, make=diag_oft, **options):
    return read_tensors(make(shapes_of(patcher, want), seed), {}, name="test.safetensors", **options)


def applied(adapter, model, s=1.0, mode="rotation", coft="file", clip=None, s_clip=None):
    at = Strength(s, mode, coft)
    return host.apply(adapter, model, clip, at, Strength(s if s_clip is None else s_clip, mode, coft))


def close(a, b, tolerance):
    worst = float((a.double() - b.double()).abs().max())
    assert worst <= tolerance, f"differs by {worst:.3g}, allowed {tolerance:.3g}"


def same(a, b, what=""):
    assert a.keys() == b.keys() or not what, f"{what}: {a.keys() ^ b.keys()}"
    for key in a:
        assert torch.equal(a[key], b[key]), f"{what} {key} differs"


def raises(kind, call):
    try:
        call()
    except kind as error:
        text = str(error)
        assert len(text) > 30 and "Traceback" not in text, text
        return text
    raise AssertionError(f"no {kind.__name__}")


def write(folder, name, tensors, metadata=None):
    path = Path(folder_paths.models_dir) / folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path, metadata)
    folder_paths.filename_list_cache.clear()
    return path


# --- loading ------------------------------------------------------------------------------------------------


@check
def full_load_is_the_formula():
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


@check
def partial_load_is_bit_identical():
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


@check
def partial_load_draws_the_same():
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


@check
def fp8_weights():
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


@check
def scaled_fp8_weights():
    if not hasattr(comfy.ops, "scaled_fp8_ops"):
        return "later hosts load such files into their quantised layers: runtime_inprocess.py"
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


@check
def own_weights_are_those_below_patches_and_hooks():
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


@check
def meeting_a_lora():
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


@check
def two_adapters():
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


@check
def hooks():
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


@check
def unload_and_reload():
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


@check
def partly_unloaded():
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


@check
def saved_checkpoint_has_the_rotation():
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


@check
def another_strength():
    model = sd15()
    adapter = adapter_for(model)
    fresh = {s: loaded(applied(adapter, sd15(), s).model) for s in (0.5, 1.0)}
    for s in (1.0, 0.5, 1.0):
        management.load_models_gpu([applied(adapter, model, s).model])
        same(state(model), fresh[s], f"strength {s}")
    management.unload_all_models()


@check
def same_file_on_two_models():
    one, two = sd15(0), sd15(1)
    adapter = adapter_for(one)
    a, b = applied(adapter, one).model, applied(adapter, two).model
    management.load_models_gpu([a, b])
    same(state(one), loaded(applied(adapter, sd15(0)).model), "first")
    same(state(two), loaded(applied(adapter, sd15(1)).model), "second")
    management.unload_all_models()


@check
def merged_models():
    """ModelMergeSimple keeps the second model's patches as a nested list."""
    one, two = sd15(0), sd15(1)
    adapter = adapter_for(two)
    merged, patched = one.clone(), applied(adapter, two).model
    for key, value in patched.get_key_patches("diffusion_model.").items():
        merged.add_patches({key: value}, 0.5, 0.5)
    turned, base, got = loaded(patched), state(one), loaded(merged)
    for key in patched.patches:
        close(got[key], 0.5 * base[key] + 0.5 * turned[key], 1e-6)


# --- names --------------------------------------------------------------------------------------------------


@check
def fused_slices():
    model = families.make_model("flux")
    base = state(model)
    hidden = 64
    names = ("to_q", "to_k", "to_v")
    tensors, expected = {}, base["diffusion_model.double_blocks.0.img_attn.qkv.weight"].double()
    for i, part in enumerate(names):
        blocks = torch.randn(8, 8, 8, generator=generator(i)) * 0.1
        tensors[f"lycoris_transformer_blocks_0_attn_{part}.oft_blocks"] = blocks
        tensors[f"lycoris_transformer_blocks_0_attn_{part}.alpha"] = torch.tensor(0.0)
        rows = slice(i * hidden, (i + 1) * hidden)
        expected[rows] = rotated_out(expected[rows], blocks)
    patched = applied(read_tensors(tensors, {}, name="test"), model).model
    key = "diffusion_model.double_blocks.0.img_attn.qkv.weight"
    assert len(patched.patches[key]) == 3
    full = loaded(patched)
    close(full[key], expected, 2e-6)
    assert torch.equal(full[key], weights_in_forward(patched, torch.float32)[key])


@check
def swapped_halves():
    model = families.make_model("flux")
    key = "diffusion_model.final_layer.adaLN_modulation.1.weight"
    base = state(model)[key]
    blocks = torch.randn(base.shape[0] // 8, 8, 8, generator=generator(0)) * 0.1
    swap = torch.cat(base.chunk(2)[::-1])
    expected = torch.cat(rotated_out(swap, blocks).chunk(2)[::-1])
    for name in ("lycoris_norm_out_linear", "transformer.norm_out.linear"):
        tensors = {f"{name}.oft_blocks": blocks, f"{name}.alpha": torch.tensor(0.0)}
        patched = applied(read_tensors(tensors, {}, name="test"), model).model
        full = loaded(patched)
        close(full[key], expected, 2e-6)
        assert torch.equal(full[key], weights_in_forward(patched, torch.float32)[key])


@check
def function_of_the_host_is_honoured():
    weight, blocks = (
        torch.randn(64, 16, generator=generator(0)),
        torch.randn(8, 8, 8, generator=generator(1)) * 0.1,
    )
    op = next(
        iter(
            read_tensors({"x.oft_blocks": blocks, "x.alpha": torch.tensor(0.0)}, {}, name="t")
            .bind(host_names.HostIndex({"x.weight": (64, 16)}, {"x": host_names.Target("x.weight")}))
            .patches
        )
    )
    patch = host_patch.RotationPatch(
        {"x"},
        ((op.op.to_state()[0], None), op.op.to_state()[1], (host_patch.ROTATION, 0, 0, "rotation", "file", False)),
    )
    got = comfy.lora.calculate_weight(
        [(1.0, patch, 1.0, None, comfy.utils.swap_scale_shift)], weight.clone(), "x"
    )
    swap = comfy.utils.swap_scale_shift
    close(got, swap(rotated_out(swap(weight), blocks)), 2e-6)
    plain = comfy.lora.calculate_weight([(1.0, patch, 1.0, None, None)], weight.clone(), "x")
    close(plain, rotated_out(weight, blocks), 2e-6)


@check
def text_encoders_of_every_family():
    families_of = {
        "sd15": {"lora_te": ("clip_l", "0.self_attn.q_proj")},
        "sd2": {"lora_te": ("clip_h", "0.mlp.fc1")},
        "sdxl": {
            "lora_te1": ("clip_l", "1.self_attn.k_proj"),
            "lora_te2": ("clip_g", "1.self_attn.out_proj"),
        },
        "sd3": {
            "lora_te1": ("clip_l", "0.mlp.fc2"),
            "lora_te2": ("clip_g", "0.mlp.fc2"),
            "lora_te3": ("t5xxl", "0.layer.0.SelfAttention.q"),
        },
        "flux": {
            "lora_te1": ("clip_l", "0.self_attn.v_proj"),
            "lora_te2": ("t5xxl", "0.layer.0.SelfAttention.o"),
        },
    }
    stems = {"clip": "text_model.encoder.layers.", "t5xx": "encoder.block."}
    for family, wanted in families_of.items():
        names = {}
        for prefix, (encoder, rest) in wanted.items():
            path = stems[encoder[:4]] + rest
            names[f"{prefix}_{path.replace('.', '_')}"] = f"{encoder}.transformer.{path}"
        model, clip = families.make_model(family), families.make_clip(family)
        management.unload_all_models()  # ComfyUI loads new text encoders at once
        base = {k: v.detach().clone() for k, v in clip.cond_stage_model.state_dict().items()}
        tensors, blocks = {}, {}
        for i, (name, key) in enumerate(names.items()):
            blocks[key] = torch.randn(base[key + ".weight"].shape[0] // 8, 8, 8, generator=generator(i)) * 0.1
            tensors |= {f"{name}.oft_blocks": blocks[key], f"{name}.alpha": torch.tensor(0.0)}
        adapter = read_tensors(tensors, {}, name="test")
        done = applied(adapter, model, clip=clip)
        assert not done.model.patches and done.clip.cond_stage_model is clip.cond_stage_model, family
        assert set(done.clip.patcher.patches) == {k + ".weight" for k in blocks}, (
            family,
            list(done.clip.patcher.patches),
        )
        patched = loaded(done.clip.patcher)
        for key, before in base.items():
            if key[:-7] in blocks:
                expected = rotated_out(before, blocks[key[:-7]])
                worst = float((patched[key].double() - expected).norm() / expected.norm())
                assert worst < 1e-3, (family, key, worst)
            else:
                assert torch.equal(patched[key], before), (family, key)


@check
def packed_weights_show_their_real_shape():
    """GGUF layers save a meta tensor of the packed bytes; the layer's own weight knows the real shape."""
    model = sd15()
    key = weight_names(model, ("attn1.to_q",))[0]
    layer = dict(model.model.named_modules())[key.removesuffix(".weight")]

    def save(module, state, prefix, metadata):
        state[prefix + "weight"] = torch.empty(3, 1, device="meta")

    layer.register_state_dict_post_hook(save)
    assert model.model.state_dict()[key].shape == (3, 1)
    patched = applied(read_tensors(diag_oft({key: tuple(layer.weight.shape)}), {}, name="test"), model).model
    assert list(patched.patches) == [key]


# --- special contents ---------------------------------------------------------------------------------------


@check
def strength_zero_is_the_base():
    model, clip = families.make_model("sd15"), families.make_clip("sd15")
    done = applied(adapter_for(model), model, 0.0, clip=clip)
    assert not done.model.patches and not done.clip.patcher.patches
    assert "strength 0" in done.report
    patch = next(iter(applied(adapter_for(model), model, 1.0).model.patches.values()))[0][1]
    weight = torch.randn(32, 32, generator=generator(0))
    kept = weight.clone()
    assert patch.calculate_weight(weight, "k", 0.0, 1.0, None, lambda a: a) is weight and torch.equal(
        weight, kept
    )


@check
def row_norm_of_the_models_own_weight():
    """dora_scale without initial_norm: each row ends up with the stored norm, whatever was patched before."""
    model = sd15()
    key = weight_names(model, ("attn1.to_q",))[0]
    base = state(model)[key]
    tensors = input_oft({key: tuple(base.shape)}, std=0.01)
    name = next(iter(tensors)).removesuffix(".oft_R.weight")
    tensors[f"{name}.dora_scale"] = 1.5 * base.norm(dim=1, keepdim=True)
    adapter = read_tensors(tensors, {}, name="test")
    done = applied(adapter, model).model
    close(loaded(done)[key].norm(dim=1), 1.5 * base.norm(dim=1), 2e-3)
    # Bound while the very same module is loaded with another patch: still the unpatched norm.
    other = applied(adapter_for(model, ("attn1.to_q",), 3), model, 1.0).model
    other.add_patches({key: ("diff", (torch.ones_like(base),))}, 1.0)
    management.load_models_gpu([other])
    again = applied(adapter, model).model
    management.unload_all_models()
    same(loaded(done), loaded(again), "bound while patched")


@check
def additive_parts():
    """.diff and .diff_b beside oft_blocks, as ComfyUI's trainer writes them."""
    model = sd15()
    sd = state(model)
    key = weight_names(model, ("ff.net.2",))[0]
    norm = next(k for k in sd if k.endswith("norm1.weight"))
    blocks = torch.randn(sd[key].shape[0] // 8, 8, 8, generator=generator(0)) * 0.01
    bias, diff = (
        torch.randn(sd[key].shape[0], generator=generator(1)),
        torch.randn(sd[norm].shape, generator=generator(2)),
    )
    stem = key[: -len(".weight")]
    tensors = {
        f"{stem}.oft_blocks": blocks,
        f"{stem}.alpha": torch.tensor(1.0),
        f"{stem}.diff_b": bias,
        f"{norm[: -len('.weight')]}.diff": diff,
    }
    for dtype, tolerance in ((torch.float32, 2e-6), (torch.bfloat16, 2e-2)):
        model = sd15()
        model.model.diffusion_model.to(dtype)
        patched = applied(read_tensors(tensors, {}, name="test"), model, 0.5).model
        full, partly = loaded(patched), weights_in_forward(patched, dtype)
        close(full[key], rotated_out(sd[key], blocks, 0.5), tolerance)
        close(full[stem + ".bias"], sd[stem + ".bias"] + 0.5 * bias, tolerance)
        close(full[norm], sd[norm] + 0.5 * diff, tolerance)
        for k in patched.patches:
            assert torch.equal(full[k], partly[k]), (dtype, k)


@check
def rebuilt_patch_objects():
    """Later hosts rebuild the object from (loaded_keys, moved weights); nothing else may matter."""

    def moved(x):
        if isinstance(x, torch.Tensor):
            return x.clone()
        return type(x)(map(moved, x)) if isinstance(x, (tuple, list)) else x

    def plain(x):
        if isinstance(x, (tuple, list)):
            return all(map(plain, x))
        return x is None or isinstance(x, (torch.Tensor, str, bool, int, float))

    model = sd15()
    for make in (diag_oft, input_oft):
        patched = applied(adapter_for(model, make=make), model, 0.7).model
        full = loaded(patched)
        for key, ((strength, patch, *_),) in patched.patches.items():
            assert plain(patch.weights), patch.weights
            again = type(patch)(patch.loaded_keys, moved(patch.weights))
            copy = model.model.state_dict()[key].clone()
            again.calculate_weight(copy, key, strength, 1.0, None, None)
            assert torch.equal(copy, full[key]), key
            (tensors, norm), meta, plan = again.weights
            orphan = type(patch)(patch.loaded_keys, ((tensors, norm), meta, (plan[0], -1, *plan[2:])))
            copy = model.model.state_dict()[key].clone()
            orphan.calculate_weight(copy, key, strength, 1.0, None, None, original_weight={})
            close(copy, full[key], 1e-6)


@check
def hooks_may_pass_a_dict():
    model = sd15()
    patched = applied(adapter_for(model), model, 0.7).model
    full = loaded(patched)
    key = next(iter(patched.patches))
    weight = model.model.state_dict()[key].clone()
    got = comfy.lora.calculate_weight(
        patched.patches[key], weight, key, original_weights={key: [(weight, None)]}
    )
    assert torch.equal(got, full[key])


@check
def no_graph_breaking_reads():
    """The patch works under torch.compile's eager backend while partly loaded."""
    model = sd15()
    patched = applied(adapter_for(model, ATTENTION), model, 0.7).model
    key = weight_names(model, ("attn1.to_q",))[0]
    full = loaded(patched)[key]
    patched.patch_model(torch.device("cpu"), lowvram_model_memory=1)
    layer = dict(model.model.named_modules())[key[:-7]]
    x = torch.randn(3, layer.weight.shape[1], generator=generator(0))
    compiled = torch.compile(layer, backend="eager")
    with torch.no_grad():
        close(compiled(x), x @ full.T, 1e-5)
    patched.unpatch_model(torch.device("cpu"))


# --- built rotations ----------------------------------------------------------------------------------------


@check
def rotations_are_kept_only_while_needed():
    import gc

    gc.collect()
    assert cache.total_bytes() == 0, "left over from patchers that are gone"
    model = sd15()
    patched = applied(adapter_for(model), model, 0.7).model
    management.load_models_gpu([patched])
    assert cache.total_bytes() == 0, "freed after the weights are merged"
    management.unload_all_models()
    calls, build = [], cache.build_all
    cache.build_all = lambda ops, *more: calls.append(len(ops)) or build(ops, *more)
    try:
        weights_in_forward(patched, torch.float32)
        first = list(calls)
        assert first and sum(first) == len(patched.patches) and len(first) < 5, first
        held = cache.total_bytes()
        assert held > 0
        weights_in_forward(patched, torch.float32)
        assert calls == first, "a second forward must not build again"
        limit, cache.LIMIT_BYTES = cache.LIMIT_BYTES, held
        try:
            other = applied(adapter_for(model), model, 0.3).model
            weights_in_forward(other, torch.float32)
            assert cache.total_bytes() <= held
        finally:
            cache.LIMIT_BYTES = limit
    finally:
        cache.build_all = build
    tokens = {p[0][1].weights[2][1] for p in patched.patches.values()}
    del patched, other
    gc.collect()
    assert not tokens & set(cache._batches), "batches go with their patchers"


@check
def threads_share_the_cache():
    from concurrent.futures import ThreadPoolExecutor

    model = sd15()
    patched = applied(adapter_for(model), model, 0.9).model
    full = loaded(patched)
    base = state(model)

    def one(key):
        return key, comfy.lora.calculate_weight(patched.patches[key], base[key].clone(), key)

    with ThreadPoolExecutor(4) as pool:
        for key, got in pool.map(one, list(patched.patches) * 2):
            assert torch.equal(got, full[key]), key
    cache.release({p[0][1].weights[2][1] for p in patched.patches.values()})


# --- schedules ----------------------------------------------------------------------------------------------


class Sampling:
    """Steps of a sampler around a patcher, as ComfyUI's guiders go through a patcher's wrappers."""

    def __init__(self, patcher, steps=5):
        self.model_patcher, self.model = patcher, patcher.model
        self.model.current_patcher = patcher
        self.sigmas = torch.linspace(14.0, 0.03, steps)
        kinds = comfy.patcher_extension.WrappersMP
        self.outer = patcher.get_all_wrappers(kinds.OUTER_SAMPLE)
        self.inner = patcher.get_all_wrappers(kinds.CALC_COND_BATCH)

    def run(self, look):
        """Call `look(i, progress)` in every step; returns what it gave."""
        new = comfy.patcher_extension.WrapperExecutor

        def steps():
            out = []
            for i, sigma in enumerate(self.sigmas):
                progress = progress_of(float(sigma), lambda p: float(self.model.model_sampling.percent_to_sigma(p)))

                def one(model, conds, x, timestep, options, i=i, progress=progress):
                    return look(i, progress)

                batch = sigma.expand(2)
                executor = new.new_executor(one, self.inner)
                out.append(executor.execute(self.model, [], None, batch, {}))
            return out

        return new.new_class_executor(steps, self, self.outer).execute()


def scheduled(adapter, curve, **window):
    from dataclasses import replace

    return replace(adapter, schedule=Schedule.parse(curve, **window))


RISING = "0.1:0, 0.5:1, 1:-0.5"


@check
def merged_weights_follow_a_schedule():
    """In every step the weights are, bit for bit, those of a model loaded at that step's strength."""
    model = sd15()
    base, adapter = state(model), adapter_for(model)
    key = weight_names(model, ("attn1.to_q",))[0]
    with_lora = model.clone()
    with_lora.add_patches({key: ("diff", (torch.full_like(base[key], 0.1),))}, 0.5)
    def with_neighbours(start, s=0.8, curve=None):
        mine = adapter if curve is None else scheduled(adapter, curve)
        patched = applied(mine, start, s).model.clone()
        patched.add_patches({key: ("diff", (torch.full_like(base[key], 0.2),))}, 0.5)
        return patched

    for start in (model, with_lora):
        patched = with_neighbours(start, curve=RISING)
        full = loaded(with_neighbours(start))
        management.load_models_gpu([patched])
        seen = Sampling(patched).run(lambda i, p: (p, state(model)))
        same(state(model), full, "full strength after sampling")
        management.unload_all_models()
        same(state(model), base, "base afterwards")
        factors = [Schedule.parse(RISING).at(progress) for progress, _ in seen]
        for factor, (progress, got) in zip(factors, seen, strict=True):
            same(got, loaded(with_neighbours(start, 0.8 * factor)), f"at {progress:.3f}")
        assert len(set(factors)) > 3 and 0 in factors, factors


@check
def partly_loaded_models_follow_a_schedule():
    model = sd15()
    adapter = adapter_for(model)
    probe = torch.zeros(1)

    def in_forward():
        out = {}
        for name, module in patched.model.named_modules():
            if hasattr(module, "comfy_cast_weights") and getattr(module, "weight", None) is not None:
                out[name + ".weight"] = comfy.ops.cast_bias_weight(module, probe)[0].detach().clone()
        return out

    for budget in (1, model.model_size() // 2):  # nothing resident; about a half
        patched = applied(scheduled(adapter, RISING), model, 0.8).model
        patched.patch_model(torch.device("cpu"), lowvram_model_memory=budget)
        merged = len(patched.backup)
        assert patched.model.model_lowvram and (merged > 0) == (budget > 1) and merged < len(patched.patches), (
            merged,
            len(patched.patches),
        )
        seen = Sampling(patched).run(lambda i, p: (p, in_forward()))
        after = in_forward()
        patched.unpatch_model(torch.device("cpu"))
        full = loaded(applied(adapter, model, 0.8).model)
        for key in after:
            assert torch.equal(after[key], full[key]), key
        for progress, got in seen:
            expected = loaded(applied(adapter, model, 0.8 * Schedule.parse(RISING).at(progress)).model)
            for key in got:
                assert torch.equal(got[key], expected[key]), (budget, progress, key)


@check
def weights_kept_by_dynamic_vram_follow_a_schedule():
    """Later hosts keep a weight as it was first patched, until its mark is taken away."""
    model = sd15()
    patched = applied(scheduled(adapter_for(model), RISING), model, 0.8).model
    patched.is_dynamic = lambda: True  # nothing is merged by the load then
    conductor = patched.get_wrappers(track.WrappersMP.OUTER_SAMPLE, track.KEY)[0].__self__
    layers = {k: model.model.get_submodule(k.rpartition(".")[0]) for k in patched.patches}
    other = model.model.get_submodule("diffusion_model.out.2")
    for factor, stale in ((0.5, True), (0.5, False), (1.0, True)):
        for layer in (*layers.values(), other):
            layer._v_signature = b"kept"
        conductor._move(patched, lambda one, factor=factor: setattr(one, "now", factor))
        assert all((layer._v_signature is None) == stale for layer in layers.values()), factor
        assert other._v_signature == b"kept"


@check
def turned_activations_follow_a_schedule():
    model = sd15()
    adapter = adapter_for(model)
    at = Strength(0.8, "rotation", "file")
    live = host.apply(scheduled(adapter, RISING), model, None, at, at, "activations").model
    x, t = torch.randn(1, 4, 8, 8, generator=generator(3)), torch.tensor([500.0])
    c = torch.randn(1, 77, 768, generator=generator(4))

    def draw():
        with torch.no_grad():
            return model.model.diffusion_model(x, t, context=c)

    plain = draw()
    management.load_models_gpu([live])
    seen = Sampling(live).run(lambda i, p: (p, draw()))
    management.unload_all_models()
    assert torch.equal(draw(), plain)
    for progress, got in seen:
        static = applied(adapter, model, 0.8 * Schedule.parse(RISING).at(progress)).model
        static.patch_model(torch.device("cpu"))
        close(got, draw(), 2e-4)
        static.unpatch_model(torch.device("cpu"))
    assert any(not torch.equal(got, plain) for _, got in seen)


@check
def two_schedules_in_one_model():
    model = sd15()
    one, two = adapter_for(model), adapter_for(model, ATTENTION, seed=5)
    curves = ("linear", "step 0:1, 0.5:0")
    patched = applied(scheduled(two, curves[1]), applied(scheduled(one, curves[0]), model, 0.8).model, 0.6).model
    management.load_models_gpu([patched])
    seen = Sampling(patched).run(lambda i, p: (p, state(patched)))
    management.unload_all_models()
    for progress, got in seen:
        a, b = (Schedule.parse(curve).at(progress) for curve in curves)
        same(got, loaded(applied(two, applied(one, model, 0.8 * a).model, 0.6 * b).model), f"at {progress:.3f}")


@check
def errors_while_sampling_leave_nothing_behind():
    model = sd15()
    base, adapter = state(model), adapter_for(model)
    patched = applied(scheduled(adapter, "linear"), model, 0.8).model
    full = loaded(applied(adapter, model, 0.8).model)
    management.load_models_gpu([patched])

    def stop(i, progress):
        if i == 2:
            raise RuntimeError("stopped")

    raises_plain(RuntimeError, lambda: Sampling(patched).run(stop))
    same(state(patched), full, "full strength after an error")
    clone = model.clone()
    management.load_models_gpu([clone])
    same(state(clone), base, "a clone without the adapter")
    management.load_models_gpu([patched])
    same(state(patched), full, "loaded again")

    # Even where merging itself fails half-way, the next load puts everything right.
    merge = patched.patch_weight_to_device
    calls = []

    def failing(*args, **more):
        calls.append(args)
        if len(calls) == 7:
            raise MemoryError("full")
        return merge(*args, **more)

    patched.patch_weight_to_device = failing
    raises_plain(MemoryError, lambda: Sampling(patched).run(lambda i, p: None))
    del patched.patch_weight_to_device
    management.load_models_gpu([patched])
    same(state(patched), full, "after a failed merge")
    management.unload_all_models()
    same(state(model), base, "base")


def raises_plain(kind, call):
    try:
        call()
    except kind:
        return
    raise AssertionError(f"no {kind.__name__}")


@check
def work_per_step_is_bounded():
    """Files are not read, planes are found once a layer, weights are merged only when the factor changes."""
    import gc

    from comfyui_oft.oft_core import spectra as planes

    gc.collect()
    held = cache.total_bytes()
    model = sd15()
    adapter = adapter_for(model)
    patched = applied(scheduled(adapter, "step 0:0.2, 0.3:0.7, 0.6:0.7, 0.8:1"), model, 0.8, "geodesic").model
    management.load_models_gpu([patched])
    spectra, batches, merged = [], [], []
    originals = planes.generator_spectrum, cache.build_all, track.merge_again
    planes.generator_spectrum = lambda q: spectra.append(q.shape) or originals[0](q)
    cache.build_all = lambda ops, *more: batches.append(len(ops)) or originals[1](ops, *more)
    track.merge_again = lambda p, keys: merged.append(len(set(keys))) or originals[2](p, keys)
    try:
        found = []
        for _ in range(2):
            Sampling(patched, 20).run(lambda i, p: None)
            found.append((len(spectra), len(batches), list(merged)))
    finally:
        planes.generator_spectrum, cache.build_all, track.merge_again = originals
    management.unload_all_models()
    count = len(patched.patches)
    # 0.2, 0.7, 1.0: three changes a run (full strength first), and none for the 20 steps in between.
    assert found[0][2] == [count] * 3 and found[1][2] == [count] * 6, found
    tokens = {p[0][1].weights[2][1] for p in patched.patches.values()}
    assert found[0][1] == 3 * len(tokens) and found[1][1] == 6 * len(tokens), (found, len(tokens))
    assert found[1][0] == found[0][0] <= 2 * count, "no plane is looked for twice"
    assert cache.total_bytes() == held, "nothing is kept for merged weights"


@check
def keyframes_are_followed_as_the_host_does():
    """Our cursor against ComfyUI's own keyframe group, over random keyframes and noise levels."""
    model = sd15().model
    g = generator(11)
    for trial in range(40):
        count = int(torch.randint(1, 6, (1,), generator=g))
        # Often several before a late first step, which ComfyUI then passes at once.
        starts = sorted((torch.rand(count, generator=g) * (0.98, 0.3)[trial % 2] + 0.01).tolist())
        if trial % 5 == 0:
            starts[0] = 0.0
        group = comfy.hooks.HookKeyframeGroup()
        for i, start in enumerate(starts):
            guarantee = int(torch.randint(0, 4, (1,), generator=g))
            group.add(comfy.hooks.HookKeyframe(i + 1.0, start_percent=start, guarantee_steps=guarantee))
        group.reset()
        group.initialize_timesteps(model)
        steps = int(torch.randint(3, 30, (1,), generator=g))
        first = 14.6 if trial % 3 else 5.0
        sigmas = torch.linspace(first, 0.02, steps)
        ours = schedule._from_host(group)

        def place(sigma):
            return progress_of(float(sigma), lambda p: float(model.model_sampling.percent_to_sigma(p)))

        cursor = Cursor(ours, place(sigmas[0]))
        for sigma in sigmas.repeat_interleave(2):  # two evaluations a step
            group.prepare_current_keyframe(sigma, {"sample_sigmas": sigmas})
            assert cursor.at(place(sigma)) == group.strength, (trial, starts, float(sigma))


@check
def schedules_are_handed_on_as_keyframes():
    curve = Schedule.parse("0:0, 0.3:1, 1:0.5", 0.1, 0.9)
    group = schedule.keyframes(curve)
    assert all(k.guarantee_steps == 0 for k in group.keyframes)
    model = sd15().model
    group.initialize_timesteps(model)
    sigmas = torch.linspace(14.6, 0.02, 37)
    for sigma in sigmas:
        group.prepare_current_keyframe(sigma, {"sample_sigmas": sigmas})
        progress = progress_of(float(sigma), lambda p: float(model.model_sampling.percent_to_sigma(p)))
        assert abs(group.strength - curve.at(progress)) < 0.06, (progress, group.strength, curve.at(progress))
    again = schedule._from_host(group)
    assert again.shape == "step" and abs(again.at(0.3) - 1) < 0.06


# --- nodes and errors ---------------------------------------------------------------------------------------


def run_node(node, **inputs):
    with torch.inference_mode():
        return (
            node.EXECUTE_NORMALIZED(**inputs)
            if hasattr(node, "EXECUTE_NORMALIZED")
            else node.execute(**inputs)
        )


@check
def entry_point_and_schemas():
    import comfyui_oft

    extension = asyncio.run(comfyui_oft.comfy_entrypoint())
    nodes = {n.GET_SCHEMA().node_id: n for n in asyncio.run(extension.get_node_list())}
    assert list(nodes) == [
        *("OFT_Load", "OFT_LoadModelOnly", "OFT_LoadAdapter", "OFT_Apply"),
        *("OFT_Stack", "OFT_ApplyStack", "OFT_Blocks", "OFT_Schedule", "OFT_Hook"),
        *("OFT_Dataset", "OFT_Train", "OFT_TrainConfig", "OFT_Save"),
    ]
    translations = {
        lang: json.loads((REPO / "locales" / lang / "nodeDefs.json").read_text("utf-8"))
        for lang in ("en", "zh")
    }
    for name, node in nodes.items():
        schema = node.GET_SCHEMA()
        node.GET_NODE_INFO_V1()
        assert schema.description and schema.category == "OFT"
        for lang, texts in translations.items():
            said = texts[name]
            assert set(said["inputs"]) == {i.id for i in schema.inputs}, (lang, name)
            assert len(said["outputs"]) == len(schema.outputs), (lang, name)
            for i in schema.inputs:
                assert i.tooltip and said["inputs"][i.id]["tooltip"], (lang, name, i.id)
                assert lang != "en" or said["inputs"][i.id]["tooltip"] == i.tooltip, (name, i.id)
            for n, o in enumerate(schema.outputs):
                assert o.tooltip and said["outputs"][str(n)]["tooltip"], (lang, name, n)
                assert lang != "en" or said["outputs"][str(n)]["tooltip"] == o.tooltip, (name, n)
            assert lang != "en" or (said["display_name"], said["description"]) == (
                schema.display_name,
                schema.description,
            )
        assert (REPO / "web" / "docs" / f"{name}.md").is_file() and (
            REPO / "web" / "docs" / name / "zh.md"
        ).is_file()
    mode = next(i for i in nodes["OFT_Load"].GET_SCHEMA().inputs if i.id == "mode")
    assert "core" in mode.options and "ComfyUI's own" in mode.tooltip


@check
def advice_on_steps_is_the_guides():
    """The tooltip and the help page, in both languages, name the guide's numbers, and its steps are the default."""

    def numbers(text):
        return [float(n) for n in re.findall(r"\d+(?:\.\d+)?", text)]

    guide = (REPO / "docs" / "training.md").read_text("utf-8")
    usual = re.search(r"`subject`, (\d+) steps, learning rate ([\d.]+\d)", guide)
    hurry = re.search(r"In a hurry: (\d+) steps at ([\d.]+\d)", guide)
    steps, rate = (i for i in train.OFTTrain.GET_SCHEMA().inputs if i.id in ("steps", "learning_rate"))
    assert [steps.default, rate.default] == numbers(usual[0]), usual[0]
    expected = [5.0, 20.0, steps.default, *numbers(hurry[0])]  # for 5 to 20 pictures
    said = {}
    for lang, page in (("en", "OFT_Train.md"), ("zh", "OFT_Train/zh.md")):
        texts = json.loads((REPO / "locales" / lang / "nodeDefs.json").read_text("utf-8"))
        said[f"tooltip {lang}"] = texts["OFT_Train"]["inputs"]["steps"]["tooltip"]
        rows = (REPO / "web" / "docs" / page).read_text("utf-8").splitlines()
        said[f"page {lang}"] = next(row for row in rows if row.startswith("| `steps`"))
    for where, text in said.items():
        assert sorted(numbers(text)) == sorted(expected), (where, text, expected)


@check
def newer_keywords_are_detected():
    class Old:
        def __init__(self, a):
            self.a = a

    class New:
        def __init__(self, a, advanced=False):
            self.a, self.advanced = a, advanced

    assert compat.entry(Old, a=1, advanced=True).a == 1
    assert compat.entry(New, a=1, advanced=True).advanced
    try:
        compat.entry(Old, a=1, advancde=True)
    except TypeError:
        return
    raise AssertionError("a misspelt keyword must raise")


@check
def folders_are_merged():
    extra = Path(folder_paths.models_dir).parent / "extra_oft"
    extra.mkdir(exist_ok=True)
    folder_paths.folder_names_and_paths["oft"] = ([str(extra)], set())
    folders.register()
    folders.register()
    paths, extensions = folder_paths.folder_names_and_paths["oft"]
    assert paths[0] == str(extra) and len(paths) == len(set(paths)) and extensions == {".safetensors", ".sft"}
    assert (
        str(Path(folder_paths.models_dir) / "oft") in paths
        and folder_paths.get_folder_paths("loras")[0] in paths
    )
    tensors = {"lora_unet_x.oft_blocks": torch.zeros(2, 4, 4), "lora_unet_x.alpha": torch.tensor(0.0)}
    write("loras", "in_loras.safetensors", tensors)
    write("oft/sub", "in_oft.safetensors", tensors)
    save_file(tensors, extra / "in_extra.safetensors")
    write("loras", "short.SFT", tensors)
    (Path(folder_paths.models_dir) / "loras" / "pickle.pt").write_bytes(b"x")
    folder_paths.filename_list_cache.clear()
    listed = folders.names()
    assert {"in_loras.safetensors", str(Path("sub") / "in_oft.safetensors"), "in_extra.safetensors", "short.SFT"} <= set(
        listed
    )
    assert folders.read("short.SFT").entries
    assert "pickle.pt" not in listed
    assert folders.find("../../outside.safetensors") is None
    check_file = load.OFTLoad.validate_inputs
    assert check_file("no_oft.safetensors") is not True and check_file("in_loras.safetensors") is True
    assert check_file(None) is True and check_file("in_loras.safetensors", "linear", "12.5") is True
    assert "mode" in check_file("in_loras.safetensors", "cubic") and "coft" in check_file(
        "in_loras.safetensors", "core", "many"
    )


def turns(seed=0):
    """The tensors of a small OFT file."""
    blocks = torch.randn(2, 4, 4, generator=generator(seed)) * 0.1
    return {"lora_unet_x.oft_blocks": blocks, "lora_unet_x.alpha": torch.tensor(0.0)}


@check
def names_of_other_systems_mean_the_file_that_fits():
    folders.register()
    names = ("names/Deep/One.safetensors", "names/zwei.sft", "names/M\u00fcller.safetensors", "names/v1.5.safetensors")
    for seed, name in enumerate(names):
        write("oft", name, turns(seed))
    one, two, accent, dotted = names
    means = {
        r"names\Deep\One.safetensors": one,
        "NAMES/deep/one.SafeTensors": one,
        r".\names\deep\ONE": one,
        "One.safetensors": one,
        "deep/one": one,
        r"zwei": two,
        r"NAMES\ZWEI.sft": two,
        "names/Mu\u0308ller.safetensors": accent,  # as macOS writes it
        "v1.5": dotted,
    }
    for given, listed in means.items():
        assert folders.meant(given) == [listed] and folders.locate(given) == listed, given
        assert load.OFTLoad.validate_inputs(given) is True, given
        assert folders.read(given) is folders.read(listed)
        assert folders.fingerprint(given) == folders.fingerprint(listed) != ""
        assert listed in folders.other_name(given), given
    assert all(folders.other_name(name) is None for name in names)
    text = run_node(load.OFTLoadAdapter, oft_name=r"names\deep\one").args[1]
    assert r"names\deep\one" in text.splitlines()[-1] and one in text.splitlines()[-1], text
    assert one not in run_node(load.OFTLoadAdapter, oft_name=one).args[1].splitlines()[-1]
    # The place named is the best fit, although a file of that name lies elsewhere too.
    write("oft", "names/other/Deep/One.safetensors", turns(9))
    assert folders.locate(r"names\deep\one.safetensors") == one


@check
def names_that_fit_no_file_or_several_are_explained():
    folders.register()
    for seed, name in enumerate(("two/a/koala_v1.safetensors", "two/b/koala_v1.safetensors", "two/b/Same.sft")):
        write("oft", name, turns(seed))
    write("oft", "two/b/Same.safetensors", turns(7))
    outside = Path(folder_paths.models_dir) / "outside_koala.safetensors"
    save_file(turns(), outside)
    several = {"koala_v1": ("two/a/koala_v1", "two/b/koala_v1"), "two/b/same": ("two/b/Same.sft", "two/b/Same.safe")}
    for given, words in several.items():
        for text in (raises(FileError, lambda g=given: folders.read(g)), load.OFTLoad.validate_inputs(given)):
            assert all(w in text for w in ("Several files", given, *words)), text
    # A folder that is named is meant: every PEFT file has the same name.
    for given in ("two/c/koala_v1.safetensors", "koala_v2.safetensors", r"D:\loras\koala_v1.safetensors"):
        for text in (raises(FileError, lambda g=given: folders.read(g)), load.OFTLoad.validate_inputs(given)):
            assert all(w in text for w in ("no file of this name", given, "similar", "two/a/koala_v1")), text
    for given in ("", "/", "..", "../", "qqqqqqqq", "x\0y", str(outside), "../outside_koala.safetensors", r"..\outside_koala", 5):
        assert isinstance(load.OFTLoad.validate_inputs(given), str), given
        assert folders.find(str(given)) is None and folders.meant(str(given)) == [], given
    assert "similar" not in load.OFTLoad.validate_inputs("qqqqqqqq")
    outside.unlink()


@check
def stacks_take_names_of_other_systems():
    folders.register()
    write("oft", "rows/One.safetensors", turns(1))
    write("oft", "rows/x/two.safetensors", turns(2))
    write("oft", "rows/y/two.safetensors", turns(3))
    write("loras", "plain.safetensors", {"a.lora_up.weight": torch.ones(1)})
    check_rows = stack.OFTStack.validate_inputs
    assert check_rows(oft_name_1=r"rows\one", oft_name_2="none", oft_name_3=None) is True
    assert "Several files" in check_rows(oft_name_1=r"rows\one", oft_name_4="two.safetensors")
    assert check_rows(oft_name_2="missing_in_rows.safetensors", on_2=False) is True
    assert "missing_in_rows" in check_rows(oft_name_2="missing_in_rows.safetensors", on_2=None)
    given = [(r"ROWS\One.safetensors", 1.0, 0.5), (r"sub\elsewhere.safetensors", 1.0, 1.0), ("Plain", 0.5, 0.5)]
    rows = {"oft_name_1": r"rows\X\two.safetensors", "oft_name_2": "gone", "on_2": False}
    made, written, others, text = run_node(stack.OFTStack, lora_stack=given, **rows).args
    assert [(row.name, row.on) for row in made] == [
        ("rows/One.safetensors", True), ("rows/x/two.safetensors", True), ("gone", False)
    ]
    assert others == given[1:] and [e[0] for e in written[2:]] == ["rows/One.safetensors", "rows/x/two.safetensors"]
    for words in (r"'ROWS\One.safetensors' is not listed here; read from rows/One.safetensors", r"'rows\X\two.safetensors'"):
        assert words in text, text
    assert r"Not in the folders here: sub\elsewhere.safetensors" in text and "folders here: Plain" not in text, text
    raises(FileError, lambda: run_node(stack.OFTStack, lora_stack=[("two.safetensors", 1.0, 1.0)]))


@check
def names_that_some_system_reads_as_paths_are_not_saved():
    folders.register()
    root = folder_paths.get_folder_paths(folders.FOLDER)[0]
    names = (r"..\evil", r"a\..\..\evil", "a/../b", "C:evil", r"C:\evil", "a<b", 'a"b', "a|b", "what?", "a*", "a\nb", "a\0b")
    names += ("CON", "nul", "sub/Aux.txt", "com1", "LPT\u00b9.x", "NUL .x", "dot.", "sub./x", "space ", "sub /x", "x" * 191)
    for name in names:
        text = raises(ConfigError, lambda n=name: files.new_file(n, root))
        assert "cannot be saved" in text and repr(name) in text, text
    before = sorted(Path(root).rglob("*"))
    for name in (r"..\evil", "nul"):
        options = {"dialect": "as it is", "precision": "fp32", "folder": "oft"}
        raises(ConfigError, lambda n=name, o=options: run_node(save.OFTSave, adapter=sound(), name=n, **o))
    assert sorted(Path(root).rglob("*")) == before
    for name, below in ((r"sub\name", "sub/name_00001_"), ("a.b c/d-e", "a.b c/d-e_00001_"), ("./console", "console_00001_")):
        path = files.new_file(name, root)
        assert path.relative_to(root).as_posix() == f"{below}.safetensors", path
        path.parent.mkdir(exist_ok=True)


def sound():
    """An adapter that was read from a file."""
    folders.register()
    write("oft", "sound.sft", turns())
    return folders.read("sound.sft")


@check
def files_of_either_ending_are_copied_and_found_for_other_loaders():
    written = run_node(
        save.OFTSave, adapter=sound(), name="copied", dialect="as it is", precision="fp32", folder="oft"
    ).args[0]
    assert written.endswith(".safetensors") and folders.read(written).entries
    own = turns(77)
    write("loras", "of_a_loader.sft", own)
    assert everywhere.file_of(own) == "of_a_loader.sft"


@check
def folders_may_be_on_other_drives():
    """Windows knows no way from one drive to another."""
    drives = [r"C:\ComfyUI\models\oft", r"C:\ComfyUI\models\loras", r"D:\loras"]
    windows = SimpleNamespace(path=ntpath, sep="\\", pardir="..")
    there = SimpleNamespace(isfile=lambda p: True, isdir=lambda p: True)
    kept = [(m, m.os) for m in (files, stack, dataset)]
    before = folder_paths.get_folder_paths, folders.find, folder_paths.get_input_directory
    try:
        files.os = windows
        stack.os = SimpleNamespace(path=there)
        dataset.os = SimpleNamespace(path=SimpleNamespace(**{**vars(ntpath), **vars(there)}))
        folder_paths.get_folder_paths = lambda name: drives
        folder_paths.get_input_directory = lambda: r"C:\ComfyUI\input"
        folders.find = lambda name: name
        for path, name in (
            (r"D:\loras\a\x.safetensors", r"a\x.safetensors"),
            (r"c:\comfyui\models\oft\..x.safetensors", "..x.safetensors"),
            (r"C:\ComfyUI\models\x.safetensors", None),
            (r"E:\x.safetensors", None),
        ):
            assert files.listed(path) == (name or path), path
            assert stack.listed_name(SimpleNamespace(path=path)) == name, path
        assert dataset.folder_path("cats")
        for elsewhere in ("D:cats", r"D:\cats", r"..\cats"):
            try:
                dataset.folder_path(elsewhere)
                raise AssertionError(elsewhere)
            except AdapterError as error:
                assert "input folder" in str(error)
    finally:
        for module, own in kept:
            module.os = own
        folder_paths.get_folder_paths, folders.find, folder_paths.get_input_directory = before


@check
def stacks_hand_on_what_is_no_oft_file():
    """Whatever its format: the LORA_STACK of another pack may list pickles, which are not opened."""
    folders.register()
    loras = Path(folder_paths.get_folder_paths("loras")[0])
    for name in ("old.pt", "old.CKPT", "old.bin"):
        torch.save({"a": torch.ones(1)}, loras / name)
    save_file({"a.lora_up.weight": torch.ones(1)}, loras / "new.safetensors")
    turns = {"lora_unet_x.oft_blocks": torch.zeros(2, 4, 4), "lora_unet_x.alpha": torch.tensor(0.0)}
    save_file(turns, loras / "turns.SAFETENSORS")
    given = [(n, 1.0, 0.5) for n in ("old.pt", "new.safetensors", "turns.SAFETENSORS", "old.CKPT", "old.bin")]
    rows, written, others, text = run_node(stack.OFTStack, lora_stack=given).args
    assert [row.name for row in rows] == ["turns.SAFETENSORS"]
    assert others == [e for e in given if e[0] != "turns.SAFETENSORS"] and written == [*others, given[2]]
    assert "old.pt, new.safetensors" in text
    (loras / "new.safetensors").write_bytes(b"half")
    try:
        run_node(stack.OFTStack, lora_stack=given)
        raise AssertionError("a damaged file is handed on")
    except AdapterError as error:
        assert "new.safetensors" in str(error)
    finally:
        (loras / "new.safetensors").unlink()


@check
def files_from_a_lora_stack_are_read_again_when_they_change():
    """The host does not say what is connected when it asks for changes, only that something is."""
    folders.register()
    model = sd15()
    path = write("loras", "from_stack.safetensors", diag_oft(shapes_of(model, ATTENTION)))
    ask = stack.OFTStack.fingerprint_inputs
    alone, before = ask(oft_name_1="none"), ask(lora_stack=None)
    given = [("from_stack.safetensors", 1.0, 1.0)]
    first = run_node(stack.OFTStack, lora_stack=given).args[0][0].adapter
    assert ask(lora_stack=None) == before, "nothing has changed"
    save_file(diag_oft(shapes_of(model, ATTENTION), seed=9), path)
    after = ask(lora_stack=None)
    assert after != before and ask(lora_stack=None) == after and ask(oft_name_1="none") == alone
    assert run_node(stack.OFTStack, lora_stack=given).args[0][0].adapter is not first
    assert ask(lora_stack=None) == after
    path.unlink()


@check
def files_are_read_once():
    folders.register()
    model = sd15()
    path = write("oft", "once.safetensors", diag_oft(shapes_of(model, ATTENTION)))
    mark = folders.fingerprint("once.safetensors")
    first = folders.read("once.safetensors")
    assert folders.read("once.safetensors") is first
    assert folders.read("once.safetensors", ReadOptions(alpha_rule="raw")) is not first
    save_file(diag_oft(shapes_of(model, ATTENTION), seed=9), path)
    assert folders.fingerprint("once.safetensors") != mark and folders.read("once.safetensors") is not first
    assert folders.fingerprint("missing.safetensors") == ""


@check
def nodes_run():
    folders.register()
    model, clip = families.make_model("sd15"), families.make_clip("sd15")
    te = {
        f"lora_te_text_model_encoder_layers_0_self_attn_{p}.oft_blocks": torch.randn(
            96, 8, 8, generator=generator(i)
        )
        * 0.1
        for i, p in enumerate(("q_proj", "k_proj"))
    }
    write("oft", "both.safetensors", {**diag_oft(shapes_of(model, ATTENTION)), **te})
    out = run_node(
        load.OFTLoad,
        model=model,
        clip=clip,
        oft_name="both.safetensors",
        strength_model=0.8,
        strength_clip=0.0,
    )
    assert (
        out.args[0].patches and not out.args[1].patcher.patches and out.ui.as_dict()["text"][0] == out.args[2]
    )
    assert not model.patches
    only = run_node(load.OFTLoadModelOnly, model=model, oft_name="both.safetensors", strength_model=0.8)
    same(loaded(only.args[0]), loaded(out.args[0]), "model only")
    read = run_node(load.OFTLoadAdapter, oft_name="both.safetensors", alpha_rule="scaled")
    again = run_node(load.OFTApply, adapter=read.args[0], model=model, strength_model=0.8, strength_clip=1.0)
    same(loaded(again.args[0]), loaded(out.args[0]), "apply")
    text = run_node(load.OFTApply, adapter=read.args[0], clip=clip, strength_model=0.8, strength_clip=1.0)
    assert text.args[0] is None and len(text.args[1].patcher.patches) == 2
    limited = run_node(
        load.OFTLoadModelOnly,
        model=model,
        oft_name="both.safetensors",
        strength_model=4.0,
        coft="limit",
        coft_degrees=1.0,
    )
    key = next(iter(limited.args[0].patches))
    base, got = state(model)[key], loaded(limited.args[0])[key]
    assert 0 < float((got - base).norm() / base.norm()) <= 2 * math.sin(math.radians(0.5)) + 1e-4
    for value in (float("nan"), float("inf")):
        raises(
            StrengthError,
            lambda value=value: run_node(
                load.OFTLoadModelOnly, model=model, oft_name="both.safetensors", strength_model=value
            ),
        )


@check
def bad_files():
    folders.register()
    model = sd15()
    good = diag_oft(shapes_of(model, ATTENTION))
    name = next(iter(good))
    path = write("oft", "cut.safetensors", good)
    path.write_bytes(path.read_bytes()[:-1000])
    write("oft", "nan.safetensors", {**good, name: torch.full_like(good[name], float("nan"))})
    stem = name.removesuffix(".oft_blocks")
    write(
        "oft",
        "lora.safetensors",
        {f"{stem}.lora_down.weight": torch.zeros(4, 32), f"{stem}.lora_up.weight": torch.zeros(32, 4)},
    )
    flux = {"lora_unet_double_blocks_0_img_attn_qkv.oft_blocks": torch.zeros(64, 144, 144)}
    write("oft", "flux.safetensors", flux)
    write("oft", "wide.safetensors", {name: torch.zeros(40, 8, 8), f"{stem}.alpha": torch.tensor(0.0)})
    (Path(folder_paths.models_dir) / "oft" / "empty.safetensors").write_bytes(b"")
    folder_paths.filename_list_cache.clear()
    said = {}
    for bad in ("cut", "nan", "lora", "flux", "wide", "empty"):

        def run(bad=bad):
            run_node(load.OFTLoadModelOnly, model=model, oft_name=f"{bad}.safetensors", strength_model=1.0)

        said[bad] = raises(AdapterError, run)
        assert f"{bad}.safetensors" in said[bad], said[bad]
    assert "lora" in said["lora"].lower() and "nan" in said["nan"].lower()
    assert "Flux" in said["flux"] and "Stable Diffusion 1" in said["flux"], said["flux"]
    assert not model.patches
    return said


@check
def only_a_part_matches():
    model, clip = families.make_model("sd15"), families.make_clip("sd15")
    tensors = diag_oft(shapes_of(model, ("attn1.to_q",)))
    count = len(tensors) // 2
    tensors["lora_unet_no_such_layer.oft_blocks"] = torch.randn(4, 8, 8, generator=generator(0))
    done = applied(read_tensors(tensors, {}, name="part"), model)
    assert len(done.model.patches) == count and done.warnings and "no_such_layer" in done.report, done.report
    te = {
        "lora_te_text_model_encoder_layers_0_self_attn_q_proj.oft_blocks": torch.randn(
            96, 8, 8, generator=generator(1)
        )
        * 0.1
    }
    both = applied(
        read_tensors({**diag_oft(shapes_of(model, ("attn1.to_q",))), **te}, {}, name="both"), model
    )
    assert not both.warnings and "text encoder" in both.report, both.report
    text_only = read_tensors(te, {}, name="text.safetensors")
    assert applied(text_only, model, clip=clip).clip.patcher.patches
    assert "CLIP" in raises(ModelMismatch, lambda: applied(text_only, model))


@check
def modes_that_are_not_defined():
    model = sd15()
    adapter = adapter_for(model, ATTENTION, make=input_oft)
    raises(StrengthError, lambda: applied(adapter, model, 0.5, "core"))
    strong = read_tensors(input_oft(shapes_of(model, ATTENTION), std=1.0), {}, name="strong")
    raises(StrengthError, lambda: applied(strong, model, 0.5))
    assert applied(strong, model, 1.0).model.patches and applied(strong, model, 0.5, "linear").model.patches


def reflecting(model):
    """A file of finished matrices that reflect, which have no power."""
    tensors = {}
    for key, (rows, _) in shapes_of(model, ("attn1.to_q",)).items():
        q = torch.linalg.qr(torch.randn(rows // 8, 8, 8, generator=generator(rows)))[0]
        q[:, :, 0] *= -torch.linalg.det(q).sign()[:, None]
        tensors["lora_unet_" + key[16:-7].replace(".", "_") + ".oft_diag"] = q
    return read_tensors(tensors, {}, name="reflects")


@check
def strengths_that_come_later_are_checked_too():
    """By a schedule, by a hook's keyframes, or by a pack that adds patches by itself."""
    model = sd15()
    adapter = reflecting(model)
    strong = read_tensors(input_oft(shapes_of(model, ATTENTION), std=1.0), {}, name="strong")
    for file in (adapter, strong):
        raises(StrengthError, lambda file=file: applied(file, model, 0.5))
        assert applied(scheduled(file, "step 0:0, 0.5:1"), model).model.patches
        raises(StrengthError, lambda file=file: applied(scheduled(file, "linear"), model))
        raises(StrengthError, lambda file=file: applied(scheduled(file, "step 0:1, 0.5:-1"), model))

    target = comfy.hooks.create_target_dict(comfy.hooks.EnumWeightTarget.Model)
    for strength in (1.0, 0.5):
        frames = comfy.hooks.HookKeyframeGroup()
        frames.add(comfy.hooks.HookKeyframe(strength=1.0))
        frames.add(comfy.hooks.HookKeyframe(strength=strength, start_percent=0.4))
        group = run_node(schedule.OFTCreateHook, adapter=adapter, strength_model=1.0, strength_clip=1.0).args[0]
        group.set_keyframes_on_hooks(frames)
        patcher = model.clone()
        if strength == 1:
            patcher.register_all_hook_patches(group, target)
            assert patcher.hook_patches
        else:
            raises(StrengthError, lambda p=patcher, g=group: p.register_all_hook_patches(g, target))

    side = host_names.model_side(model)
    patches = adapter.bind(host_names.HostIndex(side.shapes, side.aliases)).patches
    dictionaries, keeper = host_patch.make_patches(side, patches, "rotation", "file")
    later = model.clone()
    later.add_patches(dictionaries[0], 0.5)
    text = raises(StrengthError, lambda: loaded(later))
    assert any(p.module in text for p in patches) and keeper.batches


@check
def a_second_model_of_a_merge_brings_its_turned_activations():
    one, two = sd15(0), sd15(1)
    adapter = adapter_for(two, ATTENTION)
    turned, base, own = loaded(applied(adapter, two).model), state(one), state(two)
    at = Strength()
    live = host.apply(adapter, two, None, at, at, "activations").model
    key = weight_names(two, ("attn1.to_q",))[0]
    lora = live.clone()
    lora.add_patches({key: ("diff", (torch.full_like(own[key], 0.1),))}, 1.0)
    for second, change in ((live, 0.0), (live.clone().clone(), 0.0), (lora, 0.1)):
        merged = one.clone()
        for name, value in second.get_key_patches("diffusion_model.").items():
            merged.add_patches({name: value}, 0.5, 0.5)
        got = loaded(merged)
        for name in shapes_of(two, ATTENTION):
            more = change if name == key else 0.0
            close(got[name], 0.5 * base[name] + 0.5 * (turned[name] + more), 1e-6)
    assert all(len(found) == 1 for found in live.get_key_patches().values()), "what the patcher asks for itself"


@check
def a_merge_tells_what_it_cannot_take():
    """A schedule belongs to the model that it was set on."""
    import logging

    told = []
    handler = logging.Handler()
    handler.emit = lambda record: told.append(record.getMessage())
    logging.getLogger("oft").addHandler(handler)
    try:
        model = sd15()
        adapter, at = adapter_for(model, ATTENTION), Strength()
        for how in ("weights", "activations"):
            for file, expected in ((adapter, 0), (scheduled(adapter, "linear"), 1)):
                told.clear()
                patched = host.apply(file, model, None, at, at, how).model.clone()
                patched.get_key_patches("diffusion_model.")
                assert sum("schedule" in text for text in told) == expected, (how, expected, told)
    finally:
        logging.getLogger("oft").removeHandler(handler)


@check
def core_mode_repeats_the_hosts_loader():
    model = sd15()
    tensors = diag_oft(shapes_of(model, ATTENTION))
    adapter = read_tensors(tensors, {}, name="test")
    host_patches = comfy.lora.load_lora(dict(tensors), comfy.lora.model_lora_keys_unet(model.model, {}))
    for s in (0.5, -1.0, 2.0):
        theirs = model.clone()
        assert len(theirs.add_patches(host_patches, s)) == len(host_patches) > 20
        ours = loaded(applied(adapter, model, s, "core").model)
        expected = loaded(theirs)
        for key in expected:
            close(ours[key], expected[key], 5e-6)


if __name__ == "__main__":
    sys.exit(run_checks(wanted))
