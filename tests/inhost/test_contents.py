"""Files with special contents, and what hosts may do with patches."""

from __future__ import annotations

import comfy.hooks
import comfy.lora
import comfy.model_management as management
import comfy.model_patcher
import comfy.ops
import comfy.sd
import comfy.utils
import families
import torch
from comfyui_oft.oft_core import (
    read_tensors,
)
from patching import (
    ATTENTION,
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
    state,
    weight_names,
    weights_in_forward,
)


def test_strength_zero_is_the_base():
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


def test_row_norm_of_the_models_own_weight():
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


def test_additive_parts():
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


def test_rebuilt_patch_objects():
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


def test_hooks_may_pass_a_dict():
    model = sd15()
    patched = applied(adapter_for(model), model, 0.7).model
    full = loaded(patched)
    key = next(iter(patched.patches))
    weight = model.model.state_dict()[key].clone()
    got = comfy.lora.calculate_weight(
        patched.patches[key], weight, key, original_weights={key: [(weight, None)]}
    )
    assert torch.equal(got, full[key])


def test_no_graph_breaking_reads():
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
