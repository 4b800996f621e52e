"""Names of files on the models of every family."""

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
from comfyui_oft.nodes.binding import names as host_names
from comfyui_oft.nodes.binding import patch as host_patch
from comfyui_oft.oft_core import (
    read_tensors,
)
from patching import (
    applied,
    close,
    diag_oft,
    generator,
    loaded,
    rotated_out,
    sd15,
    state,
    weight_names,
    weights_in_forward,
)


def test_fused_slices():
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


def test_swapped_halves():
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


def test_function_of_the_host_is_honoured():
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


def test_text_encoders_of_every_family():
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


def test_packed_weights_show_their_real_shape():
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
