"""Checks of turned activations (runtime = activations) inside a real ComfyUI process, without a server.

Usage and output: see checks.py.
"""

from __future__ import annotations

import gc
import json
import math
import sys
from dataclasses import replace
from pathlib import Path

from checks import check, run_checks, start_host

if __name__ == "__main__":
    work, wanted = start_host()

if "comfyui_oft" in sys.modules:
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
    import gguf_layers
    import torch
    from comfy_extras import nodes_hooks
    from comfyui_oft.nodes import schedule
    from comfyui_oft.nodes.binding import apply as host
    from comfyui_oft.nodes.binding import everywhere, folders, layers, plan, runtime
    from comfyui_oft.nodes.binding import names as host_names
    from comfyui_oft.oft_core import AdapterError, ReadOptions, Schedule, Strength, read_tensors

    CPU = torch.device("cpu")


# --- helpers ------------------------------------------------------------------------------------------------


def numbers(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def named(key):
    return "lora_unet_" + key.removeprefix("diffusion_model.").removesuffix(".weight").replace(".", "_")


def tensors_for(shapes, side="out", seed=0, block=8, std=0.1, rows=False):
    """LyCORIS (out) or OneTrainer (in) tensors for {key: shape}; rows: with row scales of their dialect."""
    out = {}
    for i, (key, shape) in enumerate(shapes.items()):
        length = shape[0] if side == "out" else math.prod(shape[1:])
        if length % block:
            continue
        name, n = named(key), length // block
        if side == "out":
            out[f"{name}.oft_blocks"] = numbers(n, block, block, seed=seed + i) * std
            out[f"{name}.alpha"] = torch.tensor(0.0)
            if rows:
                out[f"{name}.rescale"] = 1 + 0.2 * numbers(shape[0], *[1] * (len(shape) - 1), seed=i).tanh()
        else:
            out[f"{name}.oft_R.weight"] = numbers(n, block * (block - 1) // 2, seed=seed + i) * std / 4
            if rows:
                out[f"{name}.dora_scale"] = 2 + 0.5 * numbers(shape[0], 1, seed=i).tanh()
    assert out
    return out


WANT = (
    "attn1.to_",
    "attn2.to_",
    "ff.net",
    "proj_in",
    "proj_out",
    "in_layers.2",
    "emb_layers.1",
    ".op.",
    "qkv",
    "linear",
    "mlp",
)


def shapes_of(patcher, want=WANT):
    return {
        k: shape
        for k, shape in host_names.shapes_of(patcher).items()
        if k.startswith("diffusion_model.")
        and k.endswith(".weight")
        and len(shape) in (2, 4)
        and any(w in k for w in want)
    }


def adapter_for(patcher, side="out", seed=0, want=WANT, **more):
    return read_tensors(
        tensors_for(shapes_of(patcher, want), side, seed, **more), {}, name="test.safetensors"
    )


def applied(adapter, model, how, s=1.0, mode="rotation", clip=None):
    at = Strength(s, mode)
    return host.apply(adapter, model, clip, at, at, how)


def turned(patcher):
    return len(runtime.live_entries(patcher))


class loaded:
    """The model as it is in use for a patcher, loaded directly or, with a budget, partly."""

    def __init__(self, patcher, budget=0):
        self.patcher, self.budget = patcher, budget

    def __enter__(self):
        self.patcher.patch_model(CPU, lowvram_model_memory=self.budget)
        return self.patcher.model

    def __exit__(self, *_):
        self.patcher.detach()


def outputs(patcher, keys, budget=0, dtype=torch.float32):
    """What every layer answers to the same random input, {key: tensor}."""
    out = {}
    with loaded(patcher, budget) as model, torch.no_grad():
        for i, key in enumerate(keys):
            module = model.get_submodule(key.removesuffix(".weight"))
            if isinstance(module, torch.nn.modules.conv._ConvNd):
                x = numbers(2, module.in_channels, 6, 5, seed=i)
            else:
                x = numbers(2, 7, module.in_features, seed=i)
            out[key] = module(x.to(dtype)).clone()
    return out


def apart(a, b):
    """Relative distance of two tensors."""
    return float((a.double() - b.double()).norm() / b.double().norm())


def nearly(got, expected, base=None, limit=1e-5):
    assert got.keys() == expected.keys()
    for key in got:
        assert apart(got[key], expected[key]) < limit, (key, apart(got[key], expected[key]))
        assert base is None or apart(got[key], base[key]) > 1e-3, (key, "nothing was turned")


def same(a, b, what=""):
    for key in a:
        assert torch.equal(a[key], b[key]), f"{what} {key}"


def inputs_of(family, seed=3):
    """Arguments of a diffusion model's forward."""
    channels = families.LATENT_CHANNELS[family]
    widths = {
        "sd15": (77, 768, None),
        "sdxl": (77, 2048, 2816),
        "sd3": (77, 4096, 2048),
        "flux": (16, 4096, 768),
    }
    tokens, width, pooled = widths[family]
    args = {"context": numbers(2, tokens, width, seed=seed + 1)}
    if pooled:
        args["y"] = numbers(2, pooled, seed=seed + 2)
    if family == "flux":
        args["guidance"] = torch.tensor([3.5, 3.5])
    return numbers(2, channels, 8, 8, seed=seed), torch.tensor([0.5, 0.7]), args


def forward(patcher, family="sd15", budget=0):
    x, t, args = inputs_of(family)
    with loaded(patcher, budget) as model, torch.no_grad():
        return model.diffusion_model(x, t, **args)


def raises(kind, call):
    try:
        call()
    except kind as error:
        return str(error)
    raise AssertionError(f"no {kind.__name__}")


def lora(keys, model, seed=5, rank=4):
    """A LoRA on these parameters, as ComfyUI's loader makes it."""
    tensors = {}
    for i, key in enumerate(keys):
        shape = model.model.state_dict()[key].shape
        tensors[f"{named(key)}.lora_up.weight"] = numbers(shape[0], rank, seed=seed + i) * 0.2
        tensors[f"{named(key)}.lora_down.weight"] = numbers(rank, shape[1], seed=seed + i + 50) * 0.2
    return comfy.lora.load_lora(tensors, comfy.lora.model_lora_keys_unet(model.model, {}))


def add_lora(patcher, patches, s=1.0):
    clone = patcher.clone()
    assert clone.add_patches(patches, s)
    return clone


# --- the same as weight patches -----------------------------------------------------------------------------


@check
def layers_equal_weight_patches():
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


@check
def models_draw_the_same():
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


def special(model):
    """Contents of single layers that are more than one rotation: {what: (tensors, key)}."""
    key = next(k for k in shapes_of(model) if "attn1.to_q" in k)
    conv = next(k for k in shapes_of(model) if "in_layers.2" in k)
    out = {}
    for what, at in (("linear", key), ("convolution", conv)):
        shape, name = tuple(model.model.state_dict()[at].shape), named(at)
        n = math.prod(shape[1:])
        weight = model.model.state_dict()[at]
        left = {f"{name}.oft_R.weight": numbers(n // 8, 28) * 0.02}
        out[f"DoRA on the base's norms, {what}"] = (
            {**left, f"{name}.dora_scale": 1.5 * weight.flatten(1).norm(dim=1, keepdim=True)},
            at,
        )
        out[f"DoRA on the arriving norms, {what}"] = (
            {**left, f"{name}.lora_magnitude_vector.weight": 1.5 * weight.flatten(1).norm(dim=1)},
            at,
        )
        out[f"column factors, {what}"] = (
            {**left, f"{name}.dora_log_multiplier_col": 0.2 * numbers(n, seed=2)},
            at,
        )
        out[f"difference beside it, {what}"] = (
            {
                f"{name}.oft_blocks": numbers(shape[0] // 8, 8, 8) * 0.02,
                f"{name}.alpha": torch.tensor(1.0),
                f"{name}.diff_b": numbers(shape[0], seed=3),
            },
            at,
        )
        out[f"BOFT, {what}"] = (
            {
                f"{name}.oft_blocks": numbers(3, shape[0] // 8, 8, 8) * 0.05,
                f"{name}.alpha": torch.tensor(0.0),
            },
            at,
        )
        out[f"PEFT BOFT, {what}"] = (
            {
                f"base_model.model.{at.removeprefix('diffusion_model.').removesuffix('.weight')}.boft_R": numbers(
                    3, n // 4, 4, 4
                )
                * 0.05,
                f"base_model.model.{at.removeprefix('diffusion_model.').removesuffix('.weight')}.boft_s": torch.ones(
                    shape[0], 1
                ),
            },
            at,
        )
    name, shape = named(key), tuple(model.model.state_dict()[key].shape)
    out["DoKr-OFT"] = (
        {
            f"{name}.oft_R.weight": numbers(shape[1] // 8, 28) * 0.02,
            f"{name}.lokr_w1": numbers(4, 4, seed=4) * 0.1,
            f"{name}.lokr_w2": numbers(shape[0] // 4, shape[1] // 4, seed=5) * 0.1,
        },
        key,
    )
    return out


@check
def special_contents():
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
    assert seen == 39, seen


@check
def dora_after_a_lora():
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


@check
def fused_slices_and_swapped_halves():
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


def encoders(family):
    """Text encoders in float32: rounding patched weights to float16 would hide what is compared."""
    clip = families.make_clip(family)
    management.unload_all_models()  # ComfyUI loads new text encoders at once
    clip.cond_stage_model.to(torch.float32)
    return clip


@check
def embeddings():
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


@check
def text_encoders():
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


# --- stacks and order ---------------------------------------------------------------------------------------


@check
def any_number_in_any_order():
    """Applications, weight patches and LoRAs: as if all were weight patches, in the order of the nodes."""
    model = families.make_model("sd15")
    keys = [k for k in shapes_of(model) if "attn1.to_" in k][:2]
    files = [
        adapter_for(model, side, seed=i, want=("attn1.to_",), rows=i == 1)
        for i, side in enumerate(("out", "in", "out", "in"))
    ]
    patches = lora(keys, model)
    steps = {
        "a": lambda m, how: applied(files[0], m, how, 0.7).model,
        "b": lambda m, how: applied(files[1], m, how, -0.5).model,
        "c": lambda m, how: applied(files[2], m, how, 1.2, "linear").model,
        "d": lambda m, how: applied(files[3], m, how, 0.9).model,
        "w": lambda m, how: applied(files[0], m, "weights", 0.4).model,
        "l": lambda m, how: add_lora(m, patches, 0.8),
    }
    for chain in ("abc", "cba", "lab", "alb", "abl", "awb", "abw", "alblc", "lwalcb", "aabb", "bd", "dlbda"):
        live = merged = model
        for step in chain:
            live, merged = steps[step](live, "activations"), steps[step](merged, "weights")
        for budget in (0, 1):
            nearly(outputs(live, keys, budget), outputs(merged, keys), outputs(model, keys))
        last = chain[max(chain.rfind("l"), chain.rfind("w")) + 1 :]
        assert len(runtime.live_entries(live).get(keys[0], ())) == len(last), chain
    undone = applied(files[0], applied(files[0], model, "activations", 1.0).model, "activations", -1.0).model
    nearly(outputs(undone, keys), outputs(model, keys))


@check
def branches_of_a_graph():
    """A LoRA on one branch does not change another branch from the same node."""
    model = families.make_model("sd15")
    keys = [k for k in shapes_of(model) if "attn1.to_q" in k]
    node = applied(adapter_for(model, want=("attn1.to_q",)), model, "activations").model
    before = outputs(node, keys)
    other = add_lora(node, lora(keys, model))
    assert other.patches and not node.patches and turned(node) == len(keys) and not turned(other)
    same(outputs(node, keys), before, "first branch")
    assert turned(node.clone()) == len(keys)
    same(outputs(node.clone(), keys), before, "clone")


@check
def order_that_cannot_be_kept_is_told():
    """Another pack has put a plain dictionary in the place of the ordered one."""
    import logging

    model = families.make_model("sd15")
    keys = [k for k in shapes_of(model) if "attn1.to_q" in k]
    node = applied(adapter_for(model, want=("attn1.to_q",)), model, "activations").model.clone()
    node.patches = dict(node.patches)
    node.add_patches(lora(keys, model))
    said = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    logging.getLogger("oft").addHandler(handler)
    try:
        outputs(node, keys)
    finally:
        logging.getLogger("oft").removeHandler(handler)
    assert any("before the OFT file's turned activations" in text for text in said), said


# --- nothing is left behind ---------------------------------------------------------------------------------


def sampled(patcher, seed=1):
    conds = [[numbers(1, 77, 768, seed=5), {"pooled_output": None}]]
    noise = comfy.sample.prepare_noise(torch.zeros(1, 4, 8, 8), seed)
    return comfy.sample.sample(
        patcher, noise, 2, 3.0, "euler", "normal", conds, conds, torch.zeros(1, 4, 8, 8), seed=seed
    )


@check
def base_is_bit_identical_afterwards():
    model = families.make_model("sd15")
    plain = sampled(model)
    node = applied(adapter_for(model, "in"), model, "activations").model
    first = sampled(node)
    assert not torch.equal(first, plain)
    assert torch.equal(sampled(model), plain), "the model that came in"
    assert torch.equal(sampled(node), first), "again with the file"
    assert torch.equal(sampled(model.clone()), plain), "a clone without the file"
    sampled(node)
    management.unload_all_models()
    assert not any("forward" in m.__dict__ for m in model.model.modules()), "unloaded"
    assert torch.equal(sampled(model), plain)
    sampled(node)
    del node
    gc.collect()
    assert torch.equal(sampled(model), plain), "the patcher is gone"
    management.unload_all_models()


@check
def exception_in_the_middle_of_sampling():
    model = families.make_model("sd15")
    plain = sampled(model)
    node = applied(adapter_for(model), model, "activations").model
    first = sampled(node)
    calls = []

    class Stop(Exception):
        pass

    def broken(apply, args):
        calls.append(1)
        if len(calls) > 1:
            raise Stop
        return apply(args["input"], args["timestep"], **args["c"])

    failing = node.clone()
    failing.set_model_unet_function_wrapper(broken)
    raises(Stop, lambda: sampled(failing))
    assert len(calls) == 2
    assert torch.equal(sampled(model), plain), "base"
    assert torch.equal(sampled(node), first), "the same file afterwards"
    # Inside a layer, and while it is loaded.
    key = next(iter(runtime.live_entries(node)))
    layer = dict(model.model.named_modules())[key.removesuffix(".weight")]
    original = type(layer).forward

    def raising(self, x):
        if self is layer:
            raise Stop
        return original(self, x)

    type(layer).forward = raising
    try:
        raises(Stop, lambda: sampled(node))
    finally:
        type(layer).forward = original
    assert torch.equal(sampled(model), plain), "base after a layer's own exception"

    def not_loading(*_):
        raise Stop

    stuck = node.clone()
    stuck.add_callback(comfy.patcher_extension.CallbacksMP.ON_LOAD, not_loading)
    stuck.patches_uuid = None
    management.unload_all_models()
    raises(Stop, lambda: sampled(stuck))
    assert torch.equal(sampled(model), plain), "base after a failed load"
    assert torch.equal(sampled(node), first)
    management.unload_all_models()


@check
def dropped_clones_take_nothing_along():
    """A clone of a loaded patcher is made and dropped, as by the executor, also while its parent samples."""
    model = families.make_model("sd15")
    node = applied(adapter_for(model), model, "activations").model
    first = sampled(node)
    for change in (lambda c: None, lambda c: c.model_state_dict(), lambda c: c.add_patches({})):
        clone = node.clone()
        change(clone)
        del clone
        gc.collect()
        assert torch.equal(sampled(node), first)

    def meanwhile(apply, args):
        clone = busy.clone()
        clone.model_state_dict()
        del clone
        gc.collect()
        return apply(args["input"], args["timestep"], **args["c"])

    busy = node.clone()
    busy.set_model_unet_function_wrapper(meanwhile)
    assert torch.equal(sampled(busy), first)
    plain = sampled(model)
    other = applied(adapter_for(model, seed=7), node, "activations").model  # while the base is loaded
    other.add_patches({})
    assert torch.equal(sampled(model), plain)
    management.unload_all_models()


@check
def memory_is_given_back():
    from comfyui_oft.oft_core import cache

    model = families.make_model("sd15")
    gc.collect()
    before = len(runtime._lives), len(runtime._current)
    node = applied(adapter_for(model), model, "activations").model
    sampled(node)
    assert len(runtime._lives) == before[0] + 1
    management.unload_all_models()
    assert (len(runtime._lives), len(runtime._current)) == before
    tokens = {e.as_weight.weights[2][1] for es in runtime.live_entries(node).values() for e in es}
    del node
    gc.collect()
    assert not tokens & set(cache._batches)


@check
def hooks_of_others():
    """A LoRA hook changes weights while sampling; the activations stay turned, and are built once."""
    model = families.make_model("sd15")
    keys = [k for k in shapes_of(model) if "attn1.to_q" in k]
    node = applied(adapter_for(model, want=("attn1.to_",)), model, "activations").model
    hook = comfy.hooks.WeightHook(strength_model=1.0, strength_clip=1.0)
    hook.weights, hook.need_weight_init = lora(keys, model), False
    group = comfy.hooks.HookGroup()
    group.add(hook)
    node.register_all_hook_patches(group, comfy.hooks.create_target_dict(comfy.hooks.EnumWeightTarget.Model))
    x = numbers(2, 5, 32)
    layer = dict(model.model.named_modules())[keys[0].removesuffix(".weight")]
    weight = layer.weight.detach().clone()
    with loaded(node), torch.no_grad():
        plain = layer(x)
        lives = dict(runtime._lives)
        node.apply_hooks(group, force_apply=True)
        hooked = layer(x)
        assert lives == dict(runtime._lives) and apart(hooked, plain) > 1e-2
        node.unpatch_hooks()
        assert torch.equal(layer(x), plain)
    assert torch.equal(layer.weight, weight)


@check
def arriving_norms_follow_what_changes_the_weight():
    """DoRA on the norms that it finds, over a LoRA hook and over a scheduled file with row scales."""
    model = families.make_model("sd15")
    key = next(k for k in shapes_of(model) if "attn1.to_q" in k)
    layer = dict(model.model.named_modules())[key.removesuffix(".weight")]
    tensors, _ = special(model)["DoRA on the arriving norms, linear"]
    dora = read_tensors(tensors, {}, name="dora")
    x = numbers(2, 5, 32)

    def expected():
        weight = layer.weight.detach().clone()
        (patch,) = dora.bind(host_names.index_of(model, None)).patches
        patch.apply_(weight, Strength())
        return torch.nn.functional.linear(x, weight, layer.bias)

    live = applied(dora, model, "activations").model
    hook = comfy.hooks.WeightHook(strength_model=1.0, strength_clip=1.0)
    hook.weights, hook.need_weight_init = lora([key], model), False
    frames = comfy.hooks.HookKeyframeGroup()
    frames.add(comfy.hooks.HookKeyframe(strength=0.0))
    frames.add(comfy.hooks.HookKeyframe(strength=4.0, start_percent=0.5))
    group = comfy.hooks.HookGroup()
    group.add(hook)
    group.set_keyframes_on_hooks(frames)
    group.hooks[0].hook_keyframe.initialize_timesteps(model.model)
    live.register_all_hook_patches(group, comfy.hooks.create_target_dict(comfy.hooks.EnumWeightTarget.Model))
    answers = []
    with loaded(live), torch.no_grad():
        for sigma in (14.0, 0.1):
            options = {"sample_sigmas": torch.tensor([14.0, 0.1])}
            live.prepare_hook_patches_current_keyframe(torch.tensor([sigma]), group, {"transformer_options": options})
            live.apply_hooks(group, force_apply=True)
            answers.append(layer(x))
            nearly({key: answers[-1]}, {key: expected()}, None, 1e-4)
        live.unpatch_hooks()
        nearly({key: layer(x)}, {key: expected()}, None, 1e-4)
    assert apart(*answers) > 1e-2

    below = read_tensors(tensors_for({key: (32, 32)}, "out", rows=True), {}, name="below")
    below = replace(below, schedule=Schedule.parse("0:0, 1:1"))
    live = applied(dora, applied(below, model, "weights").model, "activations").model
    track = live.get_wrappers(comfy.patcher_extension.WrappersMP.OUTER_SAMPLE, "oft_schedule")[0].__self__
    answers = []
    with loaded(live), torch.no_grad():
        for progress in (0.0, 0.5, 1.0):
            track._move(live, lambda t, p=progress: t.seek(p))
            answers.append(layer(x))
            nearly({key: answers[-1]}, {key: expected()}, None, 1e-4)
    assert apart(answers[0], answers[2]) > 1e-2


@check
def training_on_top():
    """What a training run depends on, and the kernels that it computes with itself."""
    from comfyui_oft.nodes.training.identity import identity

    model = families.make_model("sd15")
    nodes = [
        applied(adapter_for(model, seed=i), model, "activations", s).model
        for i, s in ((0, 1.0), (0, 1.0), (0, 0.5), (4, 1.0))
    ]
    known = [identity(p) for p in (model, *nodes)]
    assert known[1] == known[2] and len(set(known)) == 4, known
    for side in ("in", "out"):
        adapter = adapter_for(model, side, want=("in_layers.2",))
        live, merged = (applied(adapter, model, how, 0.7).model for how in ("activations", "weights"))
        key = next(iter(merged.patches))
        module = model.model.get_submodule(key.removesuffix(".weight"))
        with loaded(merged):
            expected = module.weight.detach().clone()
        with loaded(live):
            got = runtime.as_turned((model.model,), module, module.weight)
            assert got is not module.weight and apart(module.weight, expected) > 1e-2
        assert apart(got, expected) < 1e-6
        assert runtime.as_turned((model.model,), module, module.weight) is module.weight


# --- quantised weights --------------------------------------------------------------------------------------


class Net(torch.nn.Module if "comfyui_oft" in sys.modules else object):
    def __init__(self, linear):
        super().__init__()
        self.linear = linear


def later_formats():
    """Core's formats of quantised layers that this host knows, beside fp8; each also with quantised inputs."""
    known = [f for f in getattr(comfy.quant_ops, "QUANT_ALGOS", {}) if not f.startswith("float8")]
    return [f"{of} {how}" for of in known for how in ("emulated", "native")]


def later_layer(kind, true, bias, dtype):
    """A layer in one of `later_formats`, from its state dict: (layer, weight that it stands for)."""
    of, how = kind.split()
    rows, columns = true.shape
    layout = comfy.quant_ops.QUANT_ALGOS[of]["comfy_tensor_layout"]

    def empty():
        ops = comfy.ops.mixed_precision_ops({}, dtype, disabled={of} if how == "emulated" else set())
        return ops.Linear(columns, rows, device="cpu", dtype=dtype)

    made = empty()
    stored = comfy.quant_ops.QuantizedTensor.from_float(true.to(dtype), layout)
    made.weight = torch.nn.Parameter(stored, requires_grad=False)
    made.quant_format, made.layout_type = of, layout
    made.bias.data.copy_(bias)
    layer = empty()
    layer.load_state_dict(made.state_dict())
    return layer, layer.weight.dequantize().float()


def quantised(kind, rows=96, columns=256, dtype=None):
    """A model of one quantised layer: (patcher, weight that it stands for, original weight, bias)."""
    dtype = dtype or torch.float32
    true, bias = numbers(rows, columns, seed=11) * 0.05, numbers(rows, seed=12)
    patcher_class = comfy.model_patcher.ModelPatcher
    if kind.startswith("GGUF"):
        layer = gguf_layers.Operations.Linear(columns, rows)
        stored = gguf_layers.packed(true, getattr(gguf_layers.Type, kind.split()[1]))
        layer.weight = torch.nn.Parameter(stored, requires_grad=False)
        layer.bias = torch.nn.Parameter(gguf_layers.packed(bias, gguf_layers.Type.F32), requires_grad=False)
        means, patcher_class = gguf_layers.unpacked(stored, torch.float32), gguf_layers.Patcher
    elif kind in LATER:
        layer, means = later_layer(kind, true, bias, dtype)
    elif kind == "bitsandbytes":
        import bitsandbytes as bnb

        layer = bnb.nn.Linear4bit(columns, rows, quant_type="nf4", compute_dtype=dtype)
        layer.load_state_dict({"weight": true, "bias": bias})
        layer = layer.to("cpu")
        layer(torch.zeros(1, columns))
        means = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state).float()
        means = means.reshape(rows, columns)
    elif kind == "mixed precision" or (kind == "scaled fp8" and not hasattr(comfy.ops, "scaled_fp8_ops")):
        ops = comfy.ops.mixed_precision_ops(
            {"linear": {"format": "float8_e4m3fn"}}, compute_dtype=dtype, full_precision_mm=True
        )
        layer = ops.Linear(columns, rows, device="cpu", dtype=dtype)
        scale = true.abs().max() / 448
        net = Net(layer)
        state = {
            "weight": (true / scale).to(torch.float8_e4m3fn),
            "weight_scale": scale,
            "bias": bias.to(dtype),
        }
        means = state["weight"].float() * scale
        if not hasattr(comfy.ops, "scaled_fp8_ops"):  # later hosts read the format from the file
            conf = json.dumps({"format": "float8_e4m3fn"}).encode()
            state["comfy_quant"] = torch.tensor(list(conf), dtype=torch.uint8)
        net.load_state_dict({f"linear.{k}": v for k, v in state.items()})
    else:
        scaled = kind == "scaled fp8"
        ops = comfy.ops.scaled_fp8_ops(fp8_matrix_mult=False) if scaled else comfy.ops.manual_cast
        layer = ops.Linear(columns, rows, device="cpu", dtype=torch.float8_e4m3fn)
        scale = true.abs().max() / 448 if scaled else torch.tensor(1.0)
        layer.weight = torch.nn.Parameter((true / scale).to(torch.float8_e4m3fn), requires_grad=False)
        layer.bias = torch.nn.Parameter(bias.clone(), requires_grad=False)
        if scaled:
            layer.scale_weight = torch.nn.Parameter(scale, requires_grad=False)
            layer.scale_input = None
        means = layer.weight.float() * scale
    return patcher_class(Net(layer).eval(), CPU, CPU), means, true, bias


def on_net(patcher, tensors, how, s=1.0, shape=(96, 256)):
    """A clone with a file for the layer `linear` applied."""
    shapes = host_names.shapes_of(patcher)
    assert shapes["linear.weight"] == shape, shapes
    index = host_names.HostIndex(shapes, {"linear": host_names.Target("linear.weight")})
    side = host_names.Side("model", "Model", patcher, patcher, shapes, {})
    adapter = read_tensors(tensors, {}, name="test.safetensors")
    placed = [(patch, Strength(s)) for patch in adapter.bind(index).patches]
    ways = plan.plan(side, placed, how)
    return host.patched(side, ways), ways.notes


NET_FILES = {
    "out": {"linear.oft_blocks": None, "linear.alpha": None},
    "in": {"linear.oft_R.weight": None},
    "in, DoRA": {"linear.oft_R.weight": None, "linear.dora_scale": None},
}


def net_tensors(which):
    out = {}
    for name in NET_FILES[which]:
        out[name] = {
            "oft_blocks": lambda: numbers(12, 8, 8) * 0.1,
            "alpha": lambda: torch.tensor(0.0),
            "oft_R.weight": lambda: numbers(32, 28) * 0.03,
            "dora_scale": lambda: 2 + 0.3 * numbers(96, 1, seed=6).tanh(),
        }[name.removeprefix("linear.")]()
    return out


def truth(which, weight, s=1.0):
    """The file applied to a float64 weight."""
    adapter = read_tensors(net_tensors(which), {}, name="t")
    index = host_names.HostIndex({"linear.weight": tuple(weight.shape)}, {"linear": host_names.Target("linear.weight")})
    out = weight.double()
    for patch in adapter.bind(index).patches:
        norm = weight.double().norm(dim=1).float() if patch.op.needs_base_norm else None
        patch.op.apply_(out, Strength(s), base_row_norm=norm)
    return out


def answer(patcher, x):
    with loaded(patcher) as model, torch.no_grad():
        return model.linear(x).clone()


QUANTISED = ("fp8", "scaled fp8", "mixed precision", "GGUF Q8_0", "GGUF Q4_K", "bitsandbytes")
LATER = tuple(later_formats()) if "comfyui_oft" in sys.modules else ()


@check
def quantised_layers_lose_nothing():
    """Errors against the file applied exactly to the weight that the layer stands for, and to the original."""
    said = []
    for kind in QUANTISED:
        for dtype in (torch.float32, torch.bfloat16):
            patcher, means, true, bias = quantised(kind, dtype=dtype)
            x = numbers(3, 40, 256, seed=13).to(dtype)
            bias = bias.to(dtype).double()

            def beside_bias(patcher, x=x, bias=bias):
                return answer(patcher, x).double() - bias

            exact = x.double() @ means.double().t()
            own = apart(beside_bias(patcher), exact)
            lost = apart(beside_bias(patcher), x.double() @ true.double().t())
            for which in NET_FILES:
                clone, notes = on_net(patcher, net_tensors(which), "auto")
                assert turned(clone) == 1 and "turned" in notes[0], notes
                got = beside_bias(clone)
                exact = x.double() @ truth(which, means).t()
                wanted = x.double() @ truth(which, true).t()
                error, all_lost = apart(got, exact), apart(got, wanted)
                # Beside what the layer itself makes: float32 arithmetic, and one rounding to bfloat16.
                unit = 2e-7 if dtype == torch.float32 else 2.0**-9
                # bitsandbytes' CPU kernel rounds the bias too, which is then not turned with the rest.
                slack = 1.05 if kind == "bitsandbytes" else 1.0
                assert error <= slack * own + unit, (kind, dtype, which, error, own)
                assert all_lost <= 1.05 * lost + unit, (kind, dtype, which, all_lost, lost)
                if which != "in, DoRA" and dtype == torch.float32 and kind in QUANTISED[:3]:
                    patched, _ = on_net(patcher, net_tensors(which), "weights")
                    again = apart(beside_bias(patched), exact)
                    assert again > 1e-2 > 1e4 * error, (kind, which, again, error)
                    said.append(
                        f"{kind}, {which}: {error:.1e}, as a weight patch {again:.1e}, layer alone {own:.1e}"
                    )
            assert apart(beside_bias(patcher), exact) > 1e-2, "the base is as before"
    return "\n".join(said)


@check
def later_quantised_layers_lose_nothing():
    """Core's formats beyond fp8, where the host has them; native ones also round what goes into the layer."""
    said = [f"formats: {', '.join(LATER) or 'none on this host'}"]
    for kind in LATER:
        for dtype in (torch.float32, torch.bfloat16):
            patcher, means, _, bias = quantised(kind, dtype=dtype)
            x, bias = numbers(3, 40, 256, seed=13).to(dtype), bias.to(dtype).double()

            def beside_bias(patcher, x=x, bias=bias):
                return answer(patcher, x).double() - bias

            try:
                base = beside_bias(patcher)
            except (ValueError, RuntimeError) as error:  # no kernel for this processor
                said.append(f"{kind}, {dtype}: the layer alone does not run here: {error}")
                continue
            own = apart(base, x.double() @ means.double().t())
            for which in NET_FILES:
                clone, notes = on_net(patcher, net_tensors(which), "auto")
                assert turned(clone) == 1 and "quantised, " in notes[0], notes
                error = apart(beside_bias(clone), x.double() @ truth(which, means).t())
                unit = 4e-7 if dtype == torch.float32 else 2.0**-8
                # Turned inputs have other largest values, by which native layers scale them.
                assert error <= 1.1 * own + unit, (kind, dtype, which, error, own)
                patched, notes = on_net(patcher, net_tensors(which), "weights")
                again = apart(beside_bias(patched), x.double() @ truth(which, means).t())
                said.append(f"{kind}, {dtype}, {which}: {error:.1e}, weights {again:.1e}, alone {own:.1e}")
            assert torch.equal(beside_bias(patcher), base), "the base is as before"
        on_net(quantised(kind, 72)[0], net_tensors("in"), "auto", shape=(72, 256))  # its blocks are padded
    return "\n".join(said)


@check
def stored_bytes_stay():
    for kind in (*QUANTISED, *(kind for kind in LATER if kind.endswith("emulated"))):
        patcher, *_ = quantised(kind)
        weight = patcher.model.linear.weight
        clone, _ = on_net(patcher, net_tensors("in"), "auto")
        answer(clone, numbers(2, 256))
        now = patcher.model.linear.weight
        if now is not weight:  # later hosts wrap the same quantised data anew when they load
            assert torch.equal(now._qdata.view(torch.uint8), weight._qdata.view(torch.uint8)), kind
        assert not clone.patches and not patcher.backup, kind


@check
def bias_patches_of_dynamic_vram():
    """Dynamic VRAM of later hosts keeps the patch of a bias beside the other functions of the layer."""
    patcher, means, _, bias = quantised("fp8")
    layer, x = patcher.model.linear, numbers(2, 256, seed=13)

    def with_patch(x):
        return torch.nn.functional.linear(x, layer.weight.float(), layer.bias_lowvram_function(layer.bias))

    layer.comfy_cast_weights = True
    layer.bias_lowvram_function, layer.forward_comfy_cast_weights = (lambda b: b + 1), with_patch
    clone, _ = on_net(patcher, net_tensors("out"), "activations")
    expected = x.double() @ truth("out", means).t() + bias.double() + 1
    assert apart(answer(clone, x), expected) < 1e-6
    assert apart(answer(patcher, x), expected) > 1e-2


@check
def lent_kernels_are_given_back():
    """Kernels that ComfyUI casts for one forward are handed back after it, also after an error."""
    model = families.make_model("sd15")
    live = applied(adapter_for(model, "in", want=("in_layers.2",)), model, "activations").model
    key = next(iter(runtime.live_entries(live)))
    lend, give_back, lent, calls = comfy.ops.cast_bias_weight, comfy.ops.uncast_bias_weight, [], []

    def lending(module, *args, **more):
        lent.append(module)
        calls.append(more)
        return lend(module, *args, **more)

    def giving_back(module, *args):
        lent.remove(module)
        return give_back(module, *args)

    with loaded(live) as net:
        module = net.get_submodule(key.removesuffix(".weight"))
        x = numbers(1, module.in_channels, 6, 5)
        comfy.ops.cast_bias_weight, comfy.ops.uncast_bias_weight = lending, giving_back
        try:
            module(x)
            assert len(calls) == 1 and not lent
            module._conv_forward = lambda *_: 1 / 0
            try:
                module(x)
            except ZeroDivisionError:
                assert not lent
            else:
                raise AssertionError("the convolution was not called")
        finally:
            comfy.ops.cast_bias_weight, comfy.ops.uncast_bias_weight = lend, give_back
            module.__dict__.pop("_conv_forward", None)


@check
def weights_that_no_patch_reaches():
    patcher, *_ = quantised("bitsandbytes")
    text = raises(AdapterError, lambda: on_net(patcher, net_tensors("in"), "weights"))
    assert "runtime" in text and "Params4bit" in text, text


@check
def packs_that_patch_by_name_are_refused_what_no_patch_reaches():
    """Through `comfy.lora.load_lora`, where nothing but weight patches can be given back."""
    import bitsandbytes as bnb

    model = families.make_model("sd15")
    key = next(k for k in shapes_of(model) if isinstance(model.model.get_submodule(k[:-7]), torch.nn.Linear))
    tensors = tensors_for({key: shapes_of(model)[key]}, "in")
    folders.register()
    everywhere.turn(True)
    try:
        table = comfy.lora.model_lora_keys_unet(model.model, {})
        assert set(comfy.lora.load_lora(tensors, table)) == {key}
        parent, _, leaf = key[:-7].rpartition(".")
        plain = getattr(model.model.get_submodule(parent), leaf)
        packed = bnb.nn.Linear4bit(plain.in_features, plain.out_features, plain.bias is not None, quant_type="nf4")
        packed.load_state_dict(plain.state_dict())
        packed = packed.to("cpu")
        packed(torch.zeros(1, plain.in_features))
        setattr(model.model.get_submodule(parent), leaf, packed)
        table = comfy.lora.model_lora_keys_unet(model.model, {})
        text = raises(AdapterError, lambda: comfy.lora.load_lora(tensors, table))
    finally:
        everywhere.turn(False)
    assert all(words in text for words in ("cannot be patched", "Params4bit", "Use Load OFT")), text


@check
def packed_models_choose_by_layer():
    """A GGUF model: activations of packed layers, weights of the others, and a LoRA after it in its place."""
    model, types = gguf_layers.make_model(families, "sd15")
    keys = [
        k
        for k in shapes_of(model)
        if isinstance(model.model.get_submodule(k.removesuffix(".weight")), torch.nn.Linear)
    ]
    done = applied(adapter_for(model, "in"), model, "auto")
    packed = {f"diffusion_model.{n}" for n, t in types.items() if t not in gguf_layers.UNPACKED}
    live = set(runtime.live_entries(done.model))
    assert live and live <= packed and not set(done.model.patches) & packed and len(done.model.patches) > 3
    assert "GGUF Q8_0" in done.report and "weights of" in done.report, done.report
    keys = [k for k in keys if k in live]
    merged = applied(adapter_for(model, "in"), model, "weights")
    assert "unpacked and patched" in merged.report
    nearly(outputs(done.model, keys), outputs(merged.model, keys), outputs(model, keys))
    chosen = keys[:2]
    patches = {k: ("diff", (numbers(*host_names.shapes_of(model)[k], seed=3) * 0.05,)) for k in chosen}
    late, late_merged = add_lora(done.model, patches), add_lora(merged.model, patches)
    nearly(outputs(late, keys), outputs(late_merged, keys), outputs(model, keys))
    assert live - set(runtime.live_entries(late)) == set(chosen)


# --- hooks on what weights cannot be patched of -------------------------------------------------------------


FOR_MODEL = {"target": comfy.hooks.EnumWeightTarget.Model} if "comfyui_oft" in sys.modules else {}


def hook_of(adapter, s=1.0, frames=()):
    """Create Hook OFT's hook as a group. frames: (strength, start) of its keyframes."""
    group = schedule.OFTCreateHook.execute(adapter, s, s).args[0]
    if frames:
        keyframes = comfy.hooks.HookKeyframeGroup()
        for strength, start in frames:
            keyframes.add(comfy.hooks.HookKeyframe(strength=strength, start_percent=start))
        group.set_keyframes_on_hooks(keyframes)
    return group


def sampled_with(patcher, positive=None, negative=None, steps=3):
    """A picture whose conditionings have these hooks."""
    conds = []
    for seed, hooks in ((5, positive), (6, negative)):
        options = {"pooled_output": None} | ({} if hooks is None else {"hooks": hooks})
        conds.append([[numbers(1, 77, 768, seed=seed), options]])
    latent = torch.zeros(1, 4, 8, 8)
    noise = comfy.sample.prepare_noise(latent, 1)
    return comfy.sample.sample(patcher, noise, steps, 3.0, "euler", "normal", *conds, latent, seed=1)


def clean(patcher):
    """Nothing of a hook is left on a patcher and its model."""
    assert runtime.applications(patcher) == runtime.lasting(patcher) and not patcher.hook_patches
    assert "restore_hook_patches" not in vars(patcher)
    installed = [m for m in patcher.model.modules() if "forward" in m.__dict__]
    assert len(installed) in (0, turned(patcher)), len(installed)


@check
def hooks_on_quantised_layers_lose_nothing():
    """Against the file applied exactly to the weight that the layer stands for; off, the layer is its own again."""
    side, said = host_names.model_side, []
    for kind in (*QUANTISED, *(kind for kind in LATER if kind.endswith("emulated"))):
        patcher, means, _, bias = quantised(kind)
        shapes = host_names.shapes_of(patcher)
        host_names.model_side = lambda p, s=shapes: host_names.Side(
            "model", "Model", p, p, s, {"linear": host_names.Target("linear.weight")}
        )
        x = numbers(3, 40, 256, seed=13)
        group = hook_of(read_tensors(net_tensors("in"), {}, name="test"), 0.8)
        try:
            for _ in range(2):  # registered again, as for the next picture
                patcher.register_all_hook_patches(group, FOR_MODEL)
        finally:
            host_names.model_side = side
        with loaded(patcher) as model, torch.no_grad():
            plain = model.linear(x)
            patcher.apply_hooks(group)
            got = model.linear(x)
            patcher.apply_hooks(None)
            off = model.linear(x)
            # bitsandbytes packs its weights anew, not quite the same, when a state dict is taken, as ComfyUI's hooks do.
            assert torch.equal(off, plain) or (kind == "bitsandbytes" and apart(off, plain) < 2e-3), kind
            own = apart(plain, x.double() @ means.double().t() + bias.double())
            error = apart(got, x.double() @ truth("in", means, 0.8).t() + bias.double())
            assert error <= 1.2 * own + 1e-6 and apart(got, plain) > 1e-2, (kind, error, own)
            patcher.restore_hook_patches()
            patcher.apply_hooks(group)
            assert apart(model.linear(x), off) < 2e-3, kind
        clean(patcher)
        said.append(f"{kind}: {error:.1e}, layer alone {own:.1e}")
    return "\n".join(said)


@check
def hooks_draw_the_same_either_way():
    """ComfyUI's patches of weights and turned activations, for every place of hooks among the conditionings."""
    model = families.make_model("sd15")
    one, two = adapter_for(model), adapter_for(model, "in", seed=7)
    late = ((0.3, 0.0), (-0.8, 0.4), (1.0, 0.7))
    places = {
        "both": lambda: [hook_of(one, 0.8)] * 2,
        "positive": lambda: [hook_of(one, 0.8), None],
        "negative": lambda: [None, hook_of(one, 0.8)],
        "keyframes": lambda: [hook_of(one, 0.8, late), None],
        "two hooks": lambda: [hook_of(one, 0.8), hook_of(two, -0.6, late)],
        "two at once": lambda: [hook_of(one, 0.8).clone_and_combine(hook_of(two, 0.5)), hook_of(two, 0.5)],
    }
    out_of_reach, seen = plan.weights_out_of_reach, [sampled_with(model)]
    for where, make in places.items():
        expected = sampled_with(model, *make())
        plan.weights_out_of_reach = lambda patcher: "a test"
        try:
            hooks = make()
            got = sampled_with(model, *hooks)
            assert torch.equal(sampled_with(model, *hooks), got), "the same hooks again"
        finally:
            plan.weights_out_of_reach = out_of_reach
        assert apart(got, expected) < 1e-4, (where, apart(got, expected))
        assert min(apart(got, other) for other in seen) > 1e-3, where
        seen.append(got)
        clean(model)
    assert torch.equal(sampled_with(model), seen[0]), "the base afterwards"
    management.unload_all_models()


@check
def hooks_on_gguf_models():
    """Whose state has names that no layer has, so that ComfyUI's own patches for hooks fail in the first step."""
    model, _ = gguf_layers.make_model(families, "sd15")
    one, two = adapter_for(model, "in"), adapter_for(model, "in", seed=7)
    plain = sampled_with(model)
    below = applied(two, model, "auto", 0.7).model
    for under in (model, below):
        base = sampled_with(under)
        expected = sampled_with(applied(one, under, "activations", 0.8).model)
        got = sampled_with(under, *[hook_of(one, 0.8)] * 2)
        assert apart(got, expected) < 1e-4 and apart(got, base) > 1e-2, apart(got, expected)
        part = sampled_with(under, hook_of(one, 0.8))
        assert min(apart(part, base), apart(part, got)) > 1e-3
        clean(under)
        assert torch.equal(sampled_with(under), base)

    class Stop(Exception):
        pass

    def broken(apply, args):
        assert runtime.applications(failing) and failing.current_hooks is not None
        assert not runtime.live_entries(failing), "no part of the model"
        raise Stop

    failing = model.clone()
    failing.set_model_unet_function_wrapper(broken)
    raises(Stop, lambda: sampled_with(failing, *[hook_of(one)] * 2))
    clean(failing)
    assert torch.equal(sampled_with(model), plain)
    management.unload_all_models()


@check
def hooks_that_a_model_cannot_have_are_refused_before_sampling():
    model, _ = gguf_layers.make_model(families, "sd15")
    steps = []
    model.set_model_unet_function_wrapper(lambda apply, args: steps.append(1))
    norm = next(k for k in model.model.state_dict() if k.endswith("transformer_blocks.0.norm1.weight"))
    size = model.model.state_dict()[norm].shape[0]
    tensors = tensors_for(shapes_of(model), "in") | {f"{named(norm)}.diff": numbers(size) * 0.1}
    adapter = read_tensors(tensors, {}, name="test")
    text = raises(AdapterError, lambda: sampled_with(model, hook_of(adapter)))
    for words in ("hook cannot", named(norm), "GGUF", "Load OFT", "OFT Schedule"):
        assert words in text, text
    clean(model)
    assert not steps
    # A quantised layer among plain ones, and a change that its activations cannot have.
    patcher, *_ = quantised("mixed precision")
    assert layers.nameless(patcher.model, ["linear.weight", "linear.no_such"]) == "linear.no_such"
    assert layers.nameless(patcher.model, ["linear.weight", "linear.bias"]) is None
    shapes = host_names.shapes_of(patcher)
    side = host_names.Side("model", "Model", patcher, patcher, shapes, {})
    boft = {"linear.boft_R": numbers(1, 32, 8, 8), "linear.boft_s": torch.ones(96, 1)}
    index = host_names.HostIndex(shapes, {"linear": host_names.Target("linear.weight")})
    patches = read_tensors(boft, {}, name="test").bind(index).patches
    before = plan._obstacle
    plan._obstacle = lambda kind, ops: "a test"
    try:
        hook = hook_of(adapter).hooks[0]
        text = raises(AdapterError, lambda: host.patch_for_hook(hook, side, [(p, Strength()) for p in patches]))
    finally:
        plan._obstacle = before
    assert "hook cannot" in text and "quantised" in text and "Load OFT" in text, text
    management.unload_all_models()


@check
def hooks_on_quantised_text_encoders():
    """They stay on the clone that they were set on, once for each hook, and are no part of the model."""
    clip = encoders("sd15")
    clip.cond_stage_model.clip_l.transformer.to(torch.float8_e4m3fn)
    clip.patcher.model.clip_l.transformer.text_model.embeddings.to(torch.float32)
    tensors = {}
    for i in range(2):
        name = f"lora_te_text_model_encoder_layers_{i}_self_attn_q_proj"
        tensors |= {f"{name}.oft_blocks": numbers(96, 8, 8, seed=i) * 0.1, f"{name}.alpha": torch.tensor(0.0)}
    adapter = read_tensors(tensors, {}, name="test")

    def said(one):
        return one.encode_from_tokens(one.tokenize("a red cat on a table"))

    def with_hooks(one, hooks):
        return nodes_hooks.SetClipHooks().apply_hooks(one, False, True, hooks)[0]

    plain = said(clip)
    expected = said(applied(adapter, None, "activations", 0.7, clip=clip).clip)
    assert apart(expected, plain) > 1e-3
    hooks = hook_of(adapter, 0.7)
    hooked = with_hooks(clip, hooks)
    for one in (hooked, hooked.clone(), with_hooks(hooked, hooks)):
        assert torch.equal(said(one), expected), apart(said(one), expected)
        assert len(runtime.applications(one.patcher)) == 1 and not runtime.live_entries(one.patcher)
        assert torch.equal(said(clip), plain)
    assert torch.equal(said(with_hooks(hooked, comfy.hooks.HookGroup())), plain), "other hooks take their place"
    # A file applied after them, and a patch after that: the hook moves into no weight.
    both = applied(adapter, None, "activations", 0.7, clip=hooked).clip
    key = next(iter(runtime.live_entries(both.patcher)))
    both.add_patches({key: ("diff", (torch.zeros(768, 768),))}, 1.0)
    assert len(both.patcher.patches[key]) == 2, "the file and the difference"
    management.unload_all_models()


@check
def hooks_of_other_loaders_on_gguf_models():
    """Create Hook LoRA with an OFT file, while other loaders read OFT."""
    model, _ = gguf_layers.make_model(families, "sd15")
    tensors = tensors_for(shapes_of(model), "in")
    adapter = read_tensors(tensors, {}, name="test")
    key = next(iter(runtime.live_entries(applied(adapter, model, "auto").model)))
    other = {f"{named(key)}.lora_up.weight": numbers(4, 2), f"{named(key)}.lora_down.weight": numbers(2, 4)}
    folders.register()
    everywhere.turn(True)
    try:
        hooks = comfy.hooks.create_hook_lora(lora=tensors, strength_model=0.8, strength_clip=0.0)
        got = sampled_with(model, hooks, hooks)
        mixed = comfy.hooks.create_hook_lora(lora=tensors | other, strength_model=0.8, strength_clip=0.0)
        text = raises(AdapterError, lambda: sampled_with(model, mixed))
    finally:
        everywhere.turn(False)
    assert apart(got, sampled_with(model, *[hook_of(adapter, 0.8)] * 2)) < 1e-6
    assert "other tensors" in text and "GGUF" in text, text
    clean(model)
    management.unload_all_models()


@check
def unquantised_models_keep_weight_patches():
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        model = families.make_model("sd15")
        model.model.diffusion_model.to(dtype)
        done = applied(adapter_for(model), model, "auto")
        assert not turned(done.model) and done.model.patches and "ctivations" not in done.report

    class Marked(torch.nn.Parameter):
        """A parameter that only carries something more."""

    layer = torch.nn.Linear(4, 4)
    assert layers.stored_as(layer) is None
    layer.weight = Marked(layer.weight.detach())
    assert type(layer.weight) is Marked and layers.stored_as(layer) is None
    assert layers.stored_as(quantised("mixed precision")[0].model.linear) is not None
    assert layers.kind_of(layer, "weight") == layers.LINEAR
    layer.weight = torch.nn.Parameter(torch.zeros(3, 4, 4))
    assert layers.kind_of(layer, "weight") is None, "a bank of experts is no one matrix"


# --- saving -------------------------------------------------------------------------------------------------


@check
def saving_is_refused_with_the_way_out():
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


@check
def saving_in_later_hosts():
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


# --- compiling ----------------------------------------------------------------------------------------------


@check
def compiled_models():
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


@check
def ways_of_calling():
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


if __name__ == "__main__":
    sys.exit(run_checks(wanted))
