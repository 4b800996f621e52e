"""Hooks on what weights cannot be patched of."""

from __future__ import annotations

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
import gguf_layers
import torch
from comfy_extras import nodes_hooks
from comfyui_oft.nodes import schedule
from comfyui_oft.nodes.binding import apply as host
from comfyui_oft.nodes.binding import everywhere, folders, layers, plan, runtime
from comfyui_oft.nodes.binding import names as host_names
from comfyui_oft.oft_core import AdapterError, Strength, read_tensors
from turning import (
    LATER,
    QUANTISED,
    adapter_for,
    apart,
    applied,
    encoders,
    loaded,
    named,
    net_tensors,
    numbers,
    quantised,
    raises,
    shapes_of,
    tensors_for,
    truth,
    turned,
)

FOR_MODEL = {"target": comfy.hooks.EnumWeightTarget.Model}


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


def test_hooks_on_quantised_layers_lose_nothing():
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
    print("\n".join(said))


def test_hooks_draw_the_same_either_way():
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


def test_hooks_on_gguf_models():
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


def test_hooks_that_a_model_cannot_have_are_refused_before_sampling():
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


def test_hooks_on_quantised_text_encoders():
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


def test_hooks_of_other_loaders_on_gguf_models():
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


def test_unquantised_models_keep_weight_patches():
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
