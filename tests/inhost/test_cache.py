"""Built rotations are kept only while needed."""

from __future__ import annotations

import comfy.hooks
import comfy.lora
import comfy.model_management as management
import comfy.model_patcher
import comfy.ops
import comfy.sd
import comfy.utils
import torch
from comfyui_oft.oft_core import (
    cache,
)
from patching import adapter_for, applied, loaded, sd15, state, weights_in_forward


def test_rotations_are_kept_only_while_needed():
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


def test_threads_share_the_cache():
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
