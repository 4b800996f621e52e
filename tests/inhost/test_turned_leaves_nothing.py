"""After sampling, errors and dropped models nothing is left behind."""

from __future__ import annotations

import gc
from dataclasses import replace

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
import torch
from comfyui_oft.nodes.binding import names as host_names
from comfyui_oft.nodes.binding import runtime
from comfyui_oft.oft_core import Schedule, Strength, read_tensors
from turning import (
    adapter_for,
    apart,
    applied,
    loaded,
    lora,
    nearly,
    numbers,
    raises,
    sampled,
    shapes_of,
    special,
    tensors_for,
)


def test_base_is_bit_identical_afterwards():
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


def test_exception_in_the_middle_of_sampling():
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


def test_dropped_clones_take_nothing_along():
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


def test_memory_is_given_back():
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


def test_hooks_of_others():
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


def test_arriving_norms_follow_what_changes_the_weight():
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


def test_training_on_top():
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
