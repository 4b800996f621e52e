"""Turned activations give what weight patches give."""

from __future__ import annotations

import comfy.model_management as management
import families
import torch
from comfyui_oft.oft_core import ReadOptions, read_tensors
from turning import (
    adapter_for,
    add_lora,
    apart,
    applied,
    encoders,
    forward,
    lora,
    nearly,
    numbers,
    outputs,
    shapes_of,
    special,
    turned,
)


def test_layers_equal_weight_patches():
    """Linear layers and convolutions of every shape, both sides, row scales, every mode."""
    for family in ("sd15", "sd3", "flux"):
        model = families.make_model(family)
        for side, rows, mode, s in (
            ("out", True, "rotation", 0.7),
            ("in", True, "rotation", 1.0),
            ("in", False, "linear", 0.5),
            ("out", False, "geodesic", -1.0),
            ("in", False, "geodesic", 0.3),
            ("out", True, "linear", 1.5),
            ("out", False, "core", 0.5),
        ):
            adapter = adapter_for(model, side, rows=rows)
            live = applied(adapter, model, "activations", s, mode).model
            merged = applied(adapter, model, "weights", s, mode).model
            keys = list(merged.patches)
            assert turned(live) == len(keys) > 8 and not live.patches
            base, budgets = outputs(model, keys), (0, 1)
            expected = outputs(merged, keys)
            for budget in budgets:
                nearly(outputs(live, keys, budget), expected, base)


def test_models_draw_the_same():
    for family in ("sd15", "sdxl", "sd3", "flux"):
        model = families.make_model(family)
        for side in ("out", "in"):
            adapter = adapter_for(model, side)
            live, merged = (applied(adapter, model, how, 0.8).model for how in ("activations", "weights"))
            plain, expected = forward(model, family), forward(merged, family)
            assert apart(plain, expected) > 1e-3, (family, side)
            for budget in (0, 1):
                assert apart(forward(live, family, budget), expected) < 1e-5, (family, side)
            assert torch.equal(forward(model, family), plain)


def test_special_contents():
    model = families.make_model("sd15")
    seen = 0
    for what, (tensors, key) in special(model).items():
        adapter = read_tensors(tensors, {}, name="test", options=ReadOptions())
        for mode, s in (("rotation", 0.6), ("linear", 0.4), ("rotation", -1.0)):
            live, merged = (applied(adapter, model, how, s, mode).model for how in ("activations", "weights"))
            assert turned(live) == 1, what
            assert all(k.endswith("bias") for k in live.patches), (what, list(live.patches))
            nearly(outputs(live, [key]), outputs(merged, [key]), outputs(model, [key]))
            seen += 1
    assert seen == 51, seen


def test_dora_after_a_lora():
    """Norms of the rows as they arrive are those of the LoRA's result, not of the base."""
    model = families.make_model("sd15")
    key = next(k for k in shapes_of(model) if "attn1.to_q" in k)
    tensors, _ = special(model)["DoRA on the arriving norms, linear"]
    first = adapter_for(model, "in", want=("attn1.to_q",), rows=True)
    before = add_lora(model, lora([key], model))
    for base in (before, applied(first, before, "activations", 0.5).model):
        whole = base if base is before else applied(first, before, "weights", 0.5).model
        live = applied(read_tensors(tensors, {}, name="t"), base, "activations").model
        merged = applied(read_tensors(tensors, {}, name="t"), whole, "weights").model
        nearly(outputs(live, [key]), outputs(merged, [key]), outputs(whole, [key]))


def test_fused_slices_and_swapped_halves():
    model = families.make_model("flux")
    qkv, ada = (
        "diffusion_model.double_blocks.0.img_attn.qkv.weight",
        "diffusion_model.final_layer.adaLN_modulation.1.weight",
    )
    for side in ("out", "in"):
        tensors = {}
        for i, part in enumerate(
            ("transformer_blocks_0_attn_to_q", "transformer_blocks_0_attn_to_v", "norm_out_linear")
        ):
            rows = 128 if part.startswith("norm") else 64
            if side == "out":
                tensors[f"lycoris_{part}.oft_blocks"] = numbers(rows // 8, 8, 8, seed=i) * 0.1
                tensors[f"lycoris_{part}.alpha"] = torch.tensor(0.0)
                tensors[f"lycoris_{part}.rescale"] = 1 + 0.2 * numbers(rows, 1, seed=i).tanh()
            else:
                tensors[f"lora_{part}.oft_R.weight".replace("lora_", "lora_transformer_")] = (
                    numbers(8, 28, seed=i) * 0.02
                )
                tensors[f"lora_{part}.dora_scale".replace("lora_", "lora_transformer_")] = (
                    2 + 0.5 * numbers(rows, 1, seed=i).tanh()
                )
        adapter = read_tensors(tensors, {}, name="test")
        for s in (1.0, -0.6):
            live, merged = (applied(adapter, model, how, s).model for how in ("activations", "weights"))
            assert turned(live) == 2 and set(merged.patches) == {qkv, ada}, list(merged.patches)
            keys = [qkv, ada]
            nearly(outputs(live, keys), outputs(merged, keys), outputs(model, keys))


def test_embeddings():
    clip = encoders("sd15")
    key = "clip_l.transformer.text_model.embeddings.token_embedding.weight"
    tensors = {
        "base_model.model.text_model.embeddings.token_embedding.oft_embedding_R.weight": numbers(96, 28)
        * 0.05
    }
    adapter = read_tensors(tensors, {}, name="test", config={"peft_type": "OFT", "oft_block_size": 8})
    live, merged = (applied(adapter, None, how, 0.7, clip=clip).clip for how in ("activations", "weights"))
    assert set(merged.patcher.patches) == {key} and turned(live.patcher) == 1
    said = []
    for one in (live, merged, clip):
        tokens = one.tokenize("a red cat")
        said.append(one.encode_from_tokens(tokens))
        management.unload_all_models()
    assert apart(said[0], said[1]) < 1e-5
    assert apart(said[2], said[1]) > 1e-3


def test_text_encoders():
    for family in ("sd15", "flux"):
        clip = encoders(family)
        stem = "lora_te1" if family == "flux" else "lora_te"
        tensors = {}
        for layer in range(2):
            for i, p in enumerate(("self_attn_q_proj", "mlp_fc1")):
                name = f"{stem}_text_model_encoder_layers_{layer}_{p}"
                n = 768 if i == 0 else 256
                tensors |= {
                    f"{name}.oft_blocks": numbers(n // 8, 8, 8, seed=i) * 0.1,
                    f"{name}.alpha": torch.tensor(0.0),
                }
        adapter = read_tensors(tensors, {}, name="test")

        def said(one):
            return one.encode_from_tokens(one.tokenize("a red cat on a table"), return_pooled=True)

        plain = said(clip)
        live, merged = (
            applied(adapter, None, how, 0.7, clip=clip).clip for how in ("activations", "weights")
        )
        assert turned(live.patcher) == 4 and not live.patcher.patches
        got, expected = said(live), said(merged)
        for one, other in zip(got, expected, strict=True):
            assert apart(one, other) < 1e-5, apart(one, other)
        assert max(map(apart, got, plain)) > 1e-3
        for got, base in zip(said(clip), plain, strict=True):
            assert torch.equal(got, base)
        management.unload_all_models()
