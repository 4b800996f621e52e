"""Strength over the steps of sampling."""

from __future__ import annotations

import comfy.hooks
import comfy.lora
import comfy.model_management as management
import comfy.model_patcher
import comfy.ops
import comfy.sd
import comfy.utils
import pytest
import torch
from comfyui_oft.nodes import schedule
from comfyui_oft.nodes.binding import apply as host
from comfyui_oft.nodes.binding import track
from comfyui_oft.oft_core import (
    Schedule,
    Strength,
    cache,
)
from comfyui_oft.oft_core.schedule import Cursor, progress_of
from patching import (
    ATTENTION,
    adapter_for,
    applied,
    close,
    generator,
    loaded,
    same,
    scheduled,
    sd15,
    state,
    weight_names,
)


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


RISING = "0.1:0, 0.5:1, 1:-0.5"


def test_merged_weights_follow_a_schedule():
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


def test_partly_loaded_models_follow_a_schedule():
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


def test_weights_kept_by_dynamic_vram_follow_a_schedule():
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


def test_turned_activations_follow_a_schedule():
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


def test_two_schedules_in_one_model():
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


def test_errors_while_sampling_leave_nothing_behind():
    model = sd15()
    base, adapter = state(model), adapter_for(model)
    patched = applied(scheduled(adapter, "linear"), model, 0.8).model
    full = loaded(applied(adapter, model, 0.8).model)
    management.load_models_gpu([patched])

    def stop(i, progress):
        if i == 2:
            raise RuntimeError("stopped")

    with pytest.raises(RuntimeError):
        Sampling(patched).run(stop)
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
    with pytest.raises(MemoryError):
        Sampling(patched).run(lambda i, p: None)
    del patched.patch_weight_to_device
    management.load_models_gpu([patched])
    same(state(patched), full, "after a failed merge")
    management.unload_all_models()
    same(state(model), base, "base")



def test_work_per_step_is_bounded():
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


def test_keyframes_are_followed_as_the_host_does():
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


def test_schedules_are_handed_on_as_keyframes():
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
