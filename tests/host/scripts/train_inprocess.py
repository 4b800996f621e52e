"""Checks of the training inside a real ComfyUI process, without a server.

Usage and output: see checks.py.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import math
import os
import re
import sys
import time
from pathlib import Path
from types import SimpleNamespace

from checks import REPO, check, run_checks, start_host

if __name__ == "__main__":
    work, wanted = start_host()

if "comfyui_oft" in sys.modules:
    import comfy.model_management
    import comfy.model_sampling
    import comfy.sd
    import comfy.supported_models
    import comfy.utils
    import families
    import folder_paths
    import torch
    from comfyui_oft.nodes import dataset, save, train
    from comfyui_oft.nodes.binding import apply as host
    from comfyui_oft.nodes.binding import files, folders
    from comfyui_oft.nodes.binding import names as host_names
    from comfyui_oft.nodes.training import blocks as train_blocks
    from comfyui_oft.nodes.training import host as train_host
    from comfyui_oft.nodes.training import identity as train_identity
    from comfyui_oft.nodes.training import mode as train_mode
    from comfyui_oft.nodes.training import plan as train_plan
    from comfyui_oft.nodes.training import run as train_run
    from comfyui_oft.nodes.training import store as train_store
    from comfyui_oft.oft_core import AdapterError, Diff, Strength
    from comfyui_oft.oft_core.errors import FileError, FormatError
    from comfyui_oft.oft_core.training import (
        ConfigError,
        OFTConfig,
        StateError,
        Trainer,
        TrainingError,
    )
    from PIL import Image
    from safetensors.torch import load_file, save_file

    folders.register()


# --- helpers ------------------------------------------------------------------------------------------------


_parts = {}


def parts(family):
    """(model, clip, vae) of a family, made once, under inference mode as in a node."""
    if family not in _parts:
        with torch.inference_mode():
            _parts[family] = (
                families.make_model(family),
                families.make_clip(family),
                families.make_vae(family),
            )
    return _parts[family]


def pictures(count=2, size=(64, 64), seed=0):
    g = torch.Generator().manual_seed(seed)
    rough = torch.rand(count, 3, 4, 4, generator=g)
    smooth = torch.nn.functional.interpolate(rough, size=size, mode="bilinear")
    return smooth.permute(0, 2, 3, 1)


def a_set(**options):
    options = {"instance_prompt": "a photo of [trigger]", "trigger": "ohwx", "resolution": 64, **options}
    if "folder" not in options:
        options.setdefault("pictures", [pictures()])
    with torch.inference_mode():
        return dataset.build(**options)


KNOBS = {
    "preset": "subject",
    "steps": 6,
    "learning_rate": 0.02,
    "block_size": 8,
    "coft": "off",
    "coft_degrees": 15.0,
    "coft_eps": 1.0,
    "seed": 3,
    "sample_prompts": "",
    "sample_every": 0,
    "save_every": 0,
    "low_vram": "off",
    "resume": True,
    "name": "training/test",
}


def a_run(family="sd15", of=None, of_parts=None, config=None, **knobs):
    """A Run as the node makes it."""
    of = of or a_set()
    config = train_plan.make_config(**{"sample_steps": 2, "sample_cfg": 1.0, **(config or {})})
    with train_mode.training_mode():
        plan = train_plan.make_plan(dataset=of, config=config, **{**KNOBS, **knobs})
        return train_run.Run(plan, of, *(of_parts or parts(family)), None)


def go(run):
    with torch.inference_mode(), train_mode.training_mode():
        return run()


_users = 0


def fresh_user():
    """An empty user folder: nothing that was trained before is known."""
    global _users
    _users += 1
    path = Path(work) / "users" / str(_users)
    path.mkdir(parents=True)
    folder_paths.set_user_directory(str(path))


@contextlib.contextmanager
def replaced(owner, name, value):
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield before
    finally:
        setattr(owner, name, before)


def fixed_loss(run, values, weight_seed=77):
    """Mean error over a fixed batch: same pictures, noise and levels, rotations `values`."""
    with train_mode.training_mode(), torch.no_grad(), run.bank.installed(), run.bank.evaluation(values):
        total = 0.0
        for k in range(8):
            record = list(run.dataset.records)[k % len(run.dataset.records)]
            loaded = run.host.load_batch([record])
            noised = run.objective.noised(loaded.latents, weight_seed, k, [0])
            noised.drop[:] = [False]
            error = run.host.predict(noised, [record]) - run.objective.target(noised)
            total += float(error.square().mean())
        return total / 8


def zeros(bank):
    """Values with which the model is the untrained one: no rotation, own weights in modules trained whole."""
    out = {n: torch.zeros_like(p) for n, p in bank.parameters.items()}
    for name, value in out.items():
        part, _, rest = name.partition("/saved/")
        if rest:
            value.copy_(bank.parts[part][0].get_parameter(rest).detach())
    return out


def state(patcher):
    return {k: v.detach().clone() for k, v in patcher.model.state_dict().items()}


def untouched(module):
    """Nothing of a training is left on the modules."""
    for name, m in module.named_modules():
        assert "forward" not in m.__dict__, f"{name} still has a forward of its own"
        assert not m._forward_pre_hooks and not m._forward_hooks, f"{name} still has hooks"
    assert not any(p.requires_grad for p in module.parameters())


def same(a, b):
    assert a.keys() == b.keys()
    for key in a:
        assert torch.equal(a[key], b[key]), f"{key} differs"


def raises(kind, call, *words):
    try:
        call()
    except kind as error:
        text = str(error)
        assert "Traceback" not in text and len(text) > 25, text
        for word in words:
            assert word.lower() in text.lower(), f"{word!r} is not in: {text}"
        return text
    raise AssertionError(f"no {kind.__name__}")


def learnt(outcome):
    return load_file(outcome.adapter.path)


# --- every family -------------------------------------------------------------------------------------------


def family_trains(family, config=None, of_parts=None, prediction=None, learning_rate=0.03):
    fresh_user()
    model = (of_parts or parts(family))[0]
    before = state(model)
    run = a_run(family, of_parts=of_parts, steps=20, config=config, learning_rate=learning_rate)
    outcome = go(run)
    same(before, state(model))
    untouched(model.model)
    assert run.objective.prediction == prediction, run.objective.prediction
    was, now = fixed_loss(run, zeros(run.bank)), fixed_loss(run, None)
    assert now < was - 0.02 * was, f"loss on a fixed batch: {was:.4f}, then {now:.4f}"
    # The file gives the trained pictures in the ordinary way: weights merged, core's sampler.
    with torch.inference_mode(), train_mode.training_mode(), torch.no_grad():
        adapter = folders.read(outcome.name)
        applied = host.apply(adapter, model, None, Strength(1.0), Strength(1.0)).model
        other = train_host.HostModel(applied, *(of_parts or parts(family))[1:])
        plan = run.plan.samples
        latent = other.sample_latent(plan.prompts[0], plan, (64, 64), plan.seed)
        picture = other.vae.decode(latent)[0]
        plain = train_host.HostModel(*(of_parts or parts(family)))
        unlike = plain.vae.decode(plain.sample_latent(plan.prompts[0], plan, (64, 64), plan.seed))[0]
    off, moved = (picture - outcome.samples[-1]).abs().max(), (picture - unlike).abs().max()
    assert off < 0.0045, f"picture differs by {off:.4f}"  # one step of 8 bits
    assert moved > 0.02, f"the picture hardly changed: {moved:.4f}"
    return f"{was:.4f} -> {now:.4f}; picture {off:.4f}, moved {moved:.3f}"


@check
def sd15_trains():
    return family_trains("sd15", prediction="eps")


@check
def sd2_with_v_prediction_trains():
    model, clip, vae = parts("sd2")
    with torch.inference_mode():

        class Sampling(comfy.model_sampling.ModelSamplingDiscrete, comfy.model_sampling.V_PREDICTION):
            pass

        model = model.clone()
        model.add_object_patch("model_sampling", Sampling(model.model.model_config))
    return family_trains("sd2", of_parts=(model, clip, vae), prediction="v")


@check
def sdxl_trains():
    return family_trains("sdxl", prediction="eps")


@check
def sd3_trains():
    return family_trains("sd3", prediction="flow")


@check
def sd35_trains():
    return family_trains("sd35", prediction="flow")


@check
def flux_trains():
    return family_trains("flux", prediction="flow")


def merged(patcher):
    """All weights of a model with its patches merged by ComfyUI."""
    with torch.inference_mode():
        comfy.model_management.load_models_gpu([patcher], force_patch_weights=True)
        out = {k: v.detach().clone() for k, v in patcher.model_state_dict().items() if v.is_floating_point()}
        comfy.model_management.unload_all_models()  # takes the patches out again
        return out


def merged_weights(model, adapter):
    with torch.inference_mode():
        return merged(host.apply(adapter, model, None, Strength(1.0), Strength(1.0)).model)


@check
def biases_and_whole_modules_train():
    """What is trained beside the rotations is in the file: it draws the trained pictures, other tools get it."""
    for family, config, part, prediction in (
        ("sd15", {"bias": "all", "modules_to_save": "out"}, "out.2.weight", "eps"),
        ("flux", {"bias": "oft_only", "modules_to_save": "final_layer"}, "final_layer.linear.weight", "flow"),
    ):
        said = family_trains(family, config=config, prediction=prediction, learning_rate=0.02)
        name = max(n for n in folders.names() if n.startswith("training/test"))
        adapter, model = folders.read(name), parts(family)[0]
        changed = {p.key for p in adapter.bind(host_names.index_of(model, None)).patches if isinstance(p.op, Diff)}
        assert f"diffusion_model.{part}" in changed and sum(k.endswith(".bias") for k in changed) > 3, changed
        plain, whole = state(model), merged_weights(model, adapter)
        assert all(not torch.equal(plain[k], whole[k]) for k in changed), "a difference has no effect"
        others = [k for k in plain if k not in changed and k.endswith(".bias")]
        assert all(torch.equal(plain[k], whole[k]) for k in others)
    # The last one is Flux, whose rows diffusers keeps in another order.
    fresh_user()
    model = parts("sd15")[0]
    outcome = go(a_run(steps=2, config={"bias": "all", "modules_to_save": "out"}))
    with torch.inference_mode():
        options = {"name": "saved/beside", "precision": "fp32", "folder": "oft", "model": model}
        made = save.OFTSave.execute(adapter=outcome.adapter, dialect="peft", **options).args[0]
        raises(
            FormatError,
            lambda: save.OFTSave.execute(adapter=outcome.adapter, dialect="oft_v2", **options),
            "bias",
        )
    one, other = (merged_weights(model, a) for a in (outcome.adapter, folders.read(made)))
    worst = max(float((one[k] - other[k]).abs().max()) for k in one)
    assert worst < 1e-5, worst
    # Text encoders: their biases too, their modules not.
    fresh_user()
    run = a_run(steps=2, config={"bias": "oft_only", "modules_to_save": "out", "text_encoder_lr": 0.01})
    outcome = go(run)
    keys = {p.key for p in outcome.adapter.bind(run.host.index).patches if isinstance(p.op, Diff)}
    assert any("self_attn" in k for k in keys) and any(k.startswith("diffusion_model.out.") for k in keys)
    return said


@check
def a_weight_of_two_names_is_in_the_file_once():
    """SDXL's `label_emb` has two names in diffusers' layout. What the file does is what was trained."""
    whole = {"target_modules": "all-linear", "bias": "all", "modules_to_save": "out"}
    said = family_trains("sdxl", config=whole, prediction="eps", learning_rate=0.01)
    model = parts("sdxl")[0]

    def saved(outcome, dialect):
        options = {"name": f"label/{dialect}", "precision": "fp32", "folder": "oft", "model": model}
        with torch.inference_mode():
            return folders.read(save.OFTSave.execute(adapter=outcome.adapter, dialect=dialect, **options).args[0])

    for side, dialects in (("input", ("peft", "oft_v2")), ("output", ("comfy", "lycoris"))):
        fresh_user()
        config = {"target_modules": "label_emb.0.0, label_emb.0.2, to_q", "side": side}
        run = a_run("sdxl", steps=2, block_size=4, config=config)
        outcome = go(run)
        turned = [p.key for p in outcome.adapter.bind(run.host.index).patches]
        assert len(turned) == len(set(turned)) == len(run.bank.parts["unet"][1].layers) == len(outcome.adapter.entries)
        want = merged_weights(model, outcome.adapter)
        for dialect in dialects:
            other = saved(outcome, dialect)
            assert sum("label_emb" in n or "embedding" in n for n in other.entries) == 2, list(other.entries)
            got = merged_weights(model, other)
            assert max(float((got[k] - want[k]).abs().max()) for k in want) < 1e-5, dialect
    # A file of which more is read than was trained is not put out.
    bind = type(outcome.adapter).bind

    def twice(self, index, **options):
        binding = bind(self, index, **options)
        binding.patches = binding.patches * 2
        return binding

    with replaced(type(outcome.adapter), "bind", twice):
        raises(FormatError, lambda: run.host.write(run.bank, None, str(run.path), {}), "2 rotations", "to_q")
    return said


@check
def fp8_base_trains():
    """fp8 weights, computed in float32: only the activation side is touched, so nothing is quantised again."""
    fresh_user()
    with torch.inference_mode():
        model = families.make_model("sd15")
        for name, p in model.model.diffusion_model.named_parameters():
            if p.ndim == 2:
                p.data = p.data.to(torch.float8_e4m3fn)
                owner = model.model.diffusion_model.get_submodule(name.rpartition(".")[0])
                owner.comfy_cast_weights = True
    run = a_run(of_parts=(model, *parts("sd15")[1:]), steps=20, learning_rate=0.03)
    before = {k: v.float() for k, v in state(model).items()}
    go(run)
    same(before, {k: v.float() for k, v in state(model).items()})
    was, now = fixed_loss(run, zeros(run.bank)), fixed_loss(run, None)
    assert now < was - 0.02 * was, f"{was:.4f}, then {now:.4f}"


@check
def packed_base_trains():
    """Layers as GGUF has them: packed numbers that only their own forward understands, a stand-in in the state."""

    class Packed(torch.nn.Module):
        def __init__(self, linear, turn):
            super().__init__()
            self.in_features, self.out_features = linear.in_features, linear.out_features
            self.scale = float(linear.weight.abs().max()) / 127
            packed = (linear.weight / self.scale).round().add(128).to(torch.uint8)
            self.weight = torch.nn.Parameter(packed.roll(turn, 0), requires_grad=False)
            self.bias = linear.bias
            self.register_state_dict_post_hook(
                lambda m, state, prefix, _: state.update(
                    {prefix + "weight": torch.empty(3, 1, device="meta")}
                )
            )

        def forward(self, x):
            weight = (self.weight.to(x.dtype) - 128) * self.scale
            return torch.nn.functional.linear(x, weight, self.bias)

    def packed(turn=0):
        with torch.inference_mode():
            model = families.make_model("sd15")
            net = model.model.diffusion_model
            for name, module in list(net.named_modules()):
                if isinstance(module, torch.nn.Linear) and ".attn" in name:
                    owner, _, leaf = name.rpartition(".")
                    setattr(net.get_submodule(owner), leaf, Packed(module, turn))
        return (model, *parts("sd15")[1:])

    fresh_user()
    run = a_run(of_parts=packed(), steps=20, learning_rate=0.03)
    assert len(go(run).adapter.entries) == 56
    was, now = fixed_loss(run, zeros(run.bank)), fixed_loss(run, None)
    assert now < was - 0.02 * was, f"{was:.4f}, then {now:.4f}"
    assert a_run(of_parts=packed(), steps=20, learning_rate=0.03).key == run.key
    assert a_run(of_parts=packed(1), steps=20, learning_rate=0.03).key != run.key


@check
def half_precision_bases_train():
    """Models loaded as fp16 and bf16, computing in that type: loss falls, the file draws the pictures."""
    for family, dtype in (("sd15", torch.float16), ("sdxl", torch.bfloat16), ("flux", torch.bfloat16)):
        with torch.inference_mode():
            model = families.make_model(family, dtype=dtype)
        assert model.model.get_dtype() == dtype
        seen = set()
        hook = model.model.diffusion_model.register_forward_pre_hook(lambda m, a, s=seen: s.add(a[0].dtype))
        fresh_user()
        run = a_run(family, of_parts=(model, *parts(family)[1:]), steps=30, learning_rate=0.03)
        before = state(model)
        outcome = go(run)
        hook.remove()
        assert seen == {dtype}, seen
        same(before, state(model))
        untouched(model.model)
        assert {p.dtype for p in run.bank.parameters.values()} == {torch.float32}
        assert run.trainer.settings.loss_scale == (4096.0 if dtype == torch.float16 else 1.0)
        assert not any("overflow" in note for note in run.trainer.notes), run.trainer.notes
        was, now = fixed_loss(run, zeros(run.bank)), fixed_loss(run, None)
        assert now < was - 0.02 * was, f"{family} {dtype}: {was:.4f}, then {now:.4f}"
        # Near what the same training does in float32: half precision costs digits, not the direction.
        fresh_user()
        full = a_run(family, steps=30, learning_rate=0.03)
        for a, b in zip(outcome.losses, go(full).losses, strict=True):
            assert abs(a - b) < 0.1 * b, (family, dtype, outcome.losses, full.trainer.losses)
        with torch.inference_mode(), train_mode.training_mode(), torch.no_grad():
            applied = host.apply(outcome.adapter, model, None, Strength(1.0), Strength(1.0)).model
            plan = run.plan.samples
            sampled = [
                other.vae.decode(other.sample_latent(plan.prompts[0], plan, (64, 64), plan.seed))[0]
                for other in (train_host.HostModel(m, *parts(family)[1:]) for m in (applied, model))
            ]
        # Merged weights are rounded to half precision, rotated activations are not.
        off = (sampled[0] - outcome.samples[-1]).abs().mean()
        moved = (sampled[1] - outcome.samples[-1]).abs().mean()
        assert off < 0.15 * moved, f"{family} {dtype}: picture differs by {off:.4f}, moved {moved:.4f}"


@check
def gguf_base_trains():
    """Real Q8_0 and Q4_K tensors behind layers as the community's GGUF loader makes them."""
    import gguf_layers

    for family in ("flux", "sd15"):
        fresh_user()
        with torch.inference_mode():
            model, types = gguf_layers.make_model(families, family)
        kinds = {kind.name for kind in types.values()}
        assert kinds == {"Q4_K", "Q8_0", "F32"}, kinds
        net = model.model.diffusion_model
        given = {n: (p, p.as_subclass(torch.Tensor).numpy().copy()) for n, p in net.named_parameters()}
        of_parts = (model, *parts(family)[1:])
        # Packed weights are near the plain ones, or the tests of this stand-in would prove nothing.
        for name, kind in types.items():
            if kind.name != "F32":
                plain = parts(family)[0].model.diffusion_model.get_parameter(name)
                off = (gguf_layers.unpacked(given[name][0], torch.float32) - plain).norm() / plain.norm()
                assert off < (0.12 if kind.name == "Q4_K" else 0.01), (name, kind, off)
        config = {"target_modules": "all-linear", "exclude_modules": "time_in.in_layer"}
        run = a_run(family, of_parts=of_parts, steps=20, config=config, learning_rate=0.03)
        outcome = go(run)
        trained = {c.name for c in run.bank.parts["unet"][1].layers}
        assert {types[f"{n}.weight"].name for n in trained} >= {"Q4_K", "Q8_0"}
        moved = {n: float(p.detach().abs().max()) for n, p in run.bank.parameters.items()}
        assert all(m > 0 for m in moved.values()), moved
        was, now = fixed_loss(run, zeros(run.bank)), fixed_loss(run, None)
        assert now < was - 0.02 * was, f"{family}: {was:.4f}, then {now:.4f}"
        untouched(model.model)
        for name, (p, before) in given.items():
            now_there = net.get_parameter(name)
            assert type(now_there) is type(p), name
            assert (now_there.as_subclass(torch.Tensor).numpy() == before).all(), f"{name} has changed"
        # The file on the same packed model gives the trained pictures.
        with torch.inference_mode(), train_mode.training_mode(), torch.no_grad():
            applied = host.apply(outcome.adapter, model, None, Strength(1.0), Strength(1.0)).model
            other = train_host.HostModel(applied, *of_parts[1:])
            plan = run.plan.samples
            picture = other.vae.decode(other.sample_latent(plan.prompts[0], plan, (64, 64), plan.seed))[0]
        assert (picture - outcome.samples[-1]).abs().max() < 0.0045
        with torch.inference_mode():
            twin = gguf_layers.make_model(families, family)[0]
            unlike = gguf_layers.make_model(families, family, seed=1)[0]
        keys = [a_run(family, of_parts=(m, *parts(family)[1:])).key for m in (model, twin, unlike)]
        assert keys[0] == keys[1] != keys[2]
    # Biases, row magnitudes and a module that GGUF files keep unpacked; packed ones cannot be trained whole.
    model = gguf_layers.make_model(families, "flux")[0]
    of_parts = (model, *parts("flux")[1:])
    config = {"rescale": True, "bias": "oft_only", "modules_to_save": "final_layer"}
    run = a_run("flux", of_parts=of_parts, steps=3, config=config)
    before = {n: p.as_subclass(torch.Tensor).clone() for n, p in model.model.named_parameters()}
    outcome = go(run)
    same(before, {n: p.as_subclass(torch.Tensor).clone() for n, p in model.model.named_parameters()})
    assert sum(isinstance(p.op, Diff) for p in outcome.adapter.bind(run.host.index).patches) > 8
    raises(
        ConfigError,
        lambda: go(a_run("flux", of_parts=of_parts, config={"modules_to_save": "img_in"})),
        "quantised",
        "img_in",
    )


def merged_by_core(model, clip, file):
    """(weights as ComfyUI's own LoRA loader makes them from the file, names that it did not read)."""
    missed = []

    class Listener(logging.Handler):
        def emit(self, record):
            if "not loaded" in record.getMessage():
                missed.append(record.getMessage())

    listener = Listener()
    logging.getLogger().addHandler(listener)
    try:
        with torch.inference_mode():
            patched = comfy.sd.load_lora_for_models(model, clip, load_file(file), 1.0, 1.0)
            return merged(patched[0]) | merged(patched[1].patcher), missed
    finally:
        logging.getLogger().removeHandler(listener)


@check
def core_reads_what_is_written_for_it():
    """ComfyUI's own loader makes the same weights of our files at strength 1, biases and whole layers included."""
    for family, extra in (
        ("sd15", {"modules_to_save": "out"}),
        ("sd2", {"conv_modules": "all-conv"}),
        ("sdxl", {}),
        ("sd35", {"modules_to_save": "final_layer"}),
        ("flux", {"modules_to_save": "final_layer"}),
    ):
        model, clip = parts(family)[:2]
        for dialect, more in (("comfy", {"bias": "all", **extra}), ("lycoris", {}), ("kohya", {"blocks": 4})):
            if dialect == "kohya" and (family in ("sd35", "flux") or "conv_modules" in extra):
                continue
            encoder = {"text_encoder_lr": 0.02} if dialect != "kohya" else {}
            if encoder and family == "flux":
                encoder["t5_lr"] = 0.02
            fresh_user()
            # LyCORIS knows only blocks that are at most as large as they are many.
            config = {"side": "output", **encoder, **more}
            run = a_run(family, steps=2, block_size=4, config=config)
            outcome = go(run)
            with torch.inference_mode():
                written = save.OFTSave.execute(
                    adapter=outcome.adapter, model=model, clip=clip, name="core/x", dialect=dialect,
                    precision="fp32", folder="oft",
                ).args[0]  # fmt: skip
                ours = host.apply(folders.read(written), model, clip, Strength(1.0), Strength(1.0))
                want = merged(ours.model) | merged(ours.clip.patcher)
                plain = merged(model) | merged(clip.patcher)
            got, missed = merged_by_core(model, clip, folders.find(written))
            turned = [k for k in plain if not torch.equal(want[k], plain[k])]
            assert len(turned) > 10 and bool(encoder) == any("text_model" in k for k in turned)
            assert ("t5_lr" in encoder) == any("SelfAttention" in k for k in turned)
            if dialect == "kohya":
                # Their prefix is not one of core's, so it reads nothing of them (ours does).
                assert len(missed) == len(load_file(folders.find(written)))
                same(got, plain)
                continue
            assert not missed, f"{family} {dialect}: {missed[:3]}"
            for key in plain:
                # Half-precision encoders: numbers in the middle between two are rounded to either side.
                limit = 2e-6 if plain[key].dtype == torch.float32 else 1e-4
                off = (got[key].double() - want[key].double()).norm() / plain[key].double().norm()
                assert off < limit, f"{family} {dialect} {key}: {off}"


# --- what a step does ---------------------------------------------------------------------------------------


@check
def checkpointing_changes_nothing():
    """Blocks of several families add to their input in place: computed twice they must start from the same."""
    for family in ("sd15", "sd3", "flux"):
        losses = []
        for low_vram in ("off", "checkpointing"):
            fresh_user()
            run = a_run(family, low_vram=low_vram, config={"prior": "none"})
            outcome = go(run)
            losses.append((outcome.losses, learnt(outcome)))
        blocks = train_blocks.blocks_of(run.host.net)
        assert len(blocks) >= 2, [type(b).__name__ for b in blocks]
        # Gradients of values that are used twice are added in another order.
        for one, other in zip(losses[0][0], losses[1][0], strict=True):
            assert abs(one - other) < 2e-6 * one, f"{family}: {losses[0][0]} {losses[1][0]}"
        for key, one in losses[0][1].items():
            assert torch.allclose(one.float(), losses[1][1][key].float(), atol=2e-4), f"{family} {key}"


@check
def partly_loaded_models_train():
    """Weights that are copied when they are used, patches of earlier nodes included, give the same as merged ones."""
    fresh_user()
    first = go(a_run(config={"conv_modules": "all-conv"}))
    outcomes = []
    for low_vram in ("off", "offload"):
        fresh_user()
        with torch.inference_mode():
            model = families.make_model("sd15")
            patched = host.apply(first.adapter, model, None, Strength(1.0), Strength(1.0)).model
        run = a_run(
            of_parts=(patched, *parts("sd15")[1:]), low_vram=low_vram, config={"conv_modules": "all-conv"}
        )
        base = run.host.base

        def partly(models, *args, base=base, **options):
            ours = [m for m in models if m.model is base]
            if len(ours) < len(models):
                whole([m for m in models if m not in ours], *args, **options)
            for m in ours:
                if not base.model_lowvram:
                    m.patch_model(torch.device("cpu"), lowvram_model_memory=1)

        if low_vram == "offload":
            with replaced(comfy.model_management, "load_models_gpu", partly) as whole:
                outcomes.append(go(run))
                assert base.model_lowvram
        else:
            outcomes.append(go(run))
    for a, b in zip(outcomes[0].losses, outcomes[1].losses, strict=True):
        assert abs(a - b) < 1e-5, f"{outcomes[0].losses} {outcomes[1].losses}"
    unpatched = go(a_run(config={"conv_modules": "all-conv"}))
    assert abs(unpatched.losses[0] - outcomes[0].losses[0]) > 1e-4


@check
def captions_of_a_batch_are_not_combined():
    of = a_set(captions=["a red cat", "a long story of a blue dog " * 20])
    for family in ("sd15", "sdxl", "flux"):
        run = a_run(family, of)
        with torch.inference_mode(), train_mode.training_mode(), torch.no_grad():
            run.host.encode_pictures(of)
            run.host.encode_texts([*(r.caption for r in of.records), ""])
            run.host.load()
            records = list(of.records)
            loaded = run.host.load_batch(records)
            noised = run.objective.noised(loaded.latents, 0, 0, [0, 1])
            together = run.host.predict(noised, records)
            for i, record in enumerate(records):
                alone = run.objective.noised(loaded.latents[i : i + 1], 0, 0, [i])
                one = run.host.predict(alone, [record])
                assert torch.allclose(one[0], together[i], atol=2e-5), f"{family} {i}"
            swapped = run.host.predict(noised, records[::-1])
        assert not torch.allclose(swapped, together, atol=1e-3), "the captions have no effect"


@check
def targets_are_the_hosts_own():
    """A model that answers with the exact target is turned back into the clean latent by the host's sampling."""
    for family in ("sd15", "sd3", "flux"):
        run = a_run(family)
        x0 = torch.randn(2, 4, 8, 8)
        noised = run.objective.noised(x0, 1, 1, [0, 1])
        x = run.host.sampling.noise_scaling(noised.sigma, noised.noise.clone(), noised.x0)
        target = run.objective.target(noised)
        back = run.host.sampling.calculate_denoised(noised.sigma, target, x)
        assert torch.allclose(back, x0, atol=1e-4), family
        # sigmas lie on the model's own schedule
        assert float(noised.sigma.max()) <= float(run.host.sampling.sigma_max) * 1.001
    assert [a_run(f, config={"sample_cfg": 0.0}).plan.samples.cfg for f in ("sd15", "flux")] == [5.0, 1.0]
    shift = a_run("flux").objective.shift
    assert abs(shift - 2.718281828**1.15) < 0.02, shift


@check
def the_network_sees_the_noised_latent():
    """In every family the network's own input is signal * picture + spread * noise."""
    for family in ("sd15", "sd3", "flux"):
        run = a_run(family)
        seen = []
        with torch.inference_mode(), train_mode.training_mode(), torch.no_grad():
            run.host.encode_pictures(run.dataset)
            run.host.encode_texts([r.caption for r in run.dataset.records])
            run.host.load()
            records = list(run.dataset.records)
            noised = run.objective.noised(run.host.load_batch(records).latents, 5, 0, [0, 1])
            hook = run.host.net.register_forward_pre_hook(lambda m, args, seen=seen: seen.append(args[:2]))
            try:
                run.host.predict(noised, records)
            finally:
                hook.remove()
        assert torch.allclose(seen[0][0], noised.x_t, atol=1e-4), family
        count = 1 if family == "flux" else 1000
        assert torch.allclose(seen[0][1].float(), noised.timestep.float() * count / 1000, atol=1.0), family


@check
def latents_pass_process_latent_in():
    run = a_run("flux")
    with torch.inference_mode(), train_mode.training_mode(), torch.no_grad():
        run.host.encode_pictures(run.dataset)
        image, _ = run.dataset.load(run.dataset.records[0])
        raw = run.host.vae.encode(image.unsqueeze(0))
        mine = next(iter(run.host.latents.values()))
        expected = run.host.base.process_latent_in(raw.clone())
    assert torch.allclose(mine, expected, atol=1e-5) and not torch.allclose(mine, raw, atol=1e-2)


@check
def random_latents_are_the_same_again():
    """Some VAEs draw their latents at random, from torch's common generator."""
    vae = parts("sd15")[2]
    with replaced(vae, "encode", vae.encode) as encode:
        vae.encode = lambda image: (x := encode(image)) + torch.randn_like(x)
        runs = []
        for seed in (1, 2):
            torch.manual_seed(seed)
            fresh_user()
            runs.append(a_run())
            with torch.inference_mode(), train_mode.training_mode():
                runs[-1].host.encode_pictures(runs[-1].dataset)
    same(*(dict(enumerate(r.host.latents.values())) for r in runs))


@check
def buckets_and_batches():
    fresh_user()
    of = a_set(
        pictures=[pictures(2, (64, 128)), pictures(2, (128, 64)), pictures(1, (128, 128))],
        resolution=128,
        flips=True,
    )
    assert {r.bucket for r in of.records} == {(128, 64), (64, 128), (128, 128)} and len(of.records) == 10
    run = a_run(of=of, steps=4, config={"batch_size": 2, "accumulation": 2})
    outcome = go(run)
    assert {tuple(t.shape[-2:]) for t in run.host.latents.values()} == {(8, 16), (16, 8), (16, 16)}
    assert outcome.samples.shape[1:3] in ((64, 128), (128, 64))
    sheet = dataset.contact_sheet(of)
    assert sheet.shape[0] == 1 and sheet.shape[2] == 5 * dataset.TILE and "128 x 64: 2" in dataset.summary(of)


@check
def masked_parts_do_not_count():
    """Two sets that differ only where the mask is black learn the same; without masks they do not."""
    base = pictures(1)
    other = base.clone()
    other[:, :, 32:] = 1 - other[:, :, 32:]
    mask = torch.zeros(1, 64, 64)
    mask[:, :, :16] = 1
    run = a_run(of=a_set(pictures=[base], masks=[mask]))
    with torch.inference_mode(), train_mode.training_mode():
        run.host.encode_pictures(run.dataset)
    loaded = run.host.load_batch([run.dataset.records[0]])
    assert (
        loaded.mask.shape == (1, 1, 8, 8)
        and loaded.mask[..., :2].min() == 1
        and loaded.mask[..., 2:].max() == 0
    )
    fresh_user()
    masked = go(a_run(of=a_set(pictures=[base], masks=[mask]))).losses
    plain = go(a_run(of=a_set(pictures=[base]))).losses
    assert masked != plain
    # Transparency is a mask as well.
    rgba = torch.cat([base, mask.unsqueeze(-1)], -1)
    assert go(a_run(of=a_set(pictures=[rgba]))).losses == masked
    assert not a_set(pictures=[torch.cat([base, torch.ones(1, 64, 64, 1)], -1)]).records[0].has_mask


@check
def pictures_of_which_nothing_counts_are_refused():
    import nodes

    root = Path(folder_paths.get_input_directory())
    Image.new("RGB", (64, 64), "red").save(root / "opaque.png")
    whole = pictures(2)
    with torch.inference_mode():
        image, mask = nodes.LoadImage().load_image("opaque.png")
    said = raises(ConfigError, lambda: a_set(pictures=[image], masks=[mask]), "picture 1", "invert that mask")
    assert "black everywhere" in said
    assert a_set(pictures=[image], masks=[1 - mask]).records[0].has_mask
    masks = torch.ones(2, 64, 64)
    masks[1] = 0
    raises(ConfigError, lambda: a_set(pictures=[whole], masks=[masks]), "picture 2", "black everywhere")
    raises(ConfigError, lambda: a_set(pictures=[whole], masks=[masks[1:]]), "picture 1", "black everywhere")
    # White only where the picture is cut off.
    edge = torch.zeros(1, 64, 136)
    edge[..., :8] = 1
    wide = {"pictures": [pictures(1, (64, 136))], "masks": [edge]}
    raises(ConfigError, lambda: a_set(**wide, buckets=False), "picture 1", "64 x 64", "in the middle")
    assert a_set(**wide, resolution=128).records[0].has_mask
    # Transparency, over a link and in a folder.
    clear = torch.cat([whole, masks.unsqueeze(-1)], -1)
    said = raises(ConfigError, lambda: a_set(pictures=[clear]), "picture 2", "transparent everywhere")
    assert "Load Image" not in said
    (root / "clear").mkdir()
    Image.new("RGBA", (64, 64), (255, 0, 0, 0)).save(root / "clear" / "a.png")
    raises(ConfigError, lambda: a_set(folder="clear"), "a.png", "transparent everywhere")
    assert a_set(folder="clear", masks=[masks[:1]]).records[0].has_mask, "a connected mask goes before it"


@check
def class_is_kept():
    fresh_user()
    of = a_set(class_prompt="a photo of a dog")
    run = a_run(of=of, config={"prior": "pictures", "class_pictures": 2}, steps=3)
    with_pictures = go(run)
    shapes = [tuple(t.shape) for p in run.store.folder.iterdir() for t in load_file(p).values()]
    assert shapes.count((2, 4, 8, 8)) == 1, shapes
    drawn = []
    sample = train_host.HostModel.sample_latent
    with replaced(train_host.HostModel, "sample_latent", lambda *a: drawn.append(a[1]) or sample(*a)):
        go(a_run(of=of, config={"prior": "pictures", "class_pictures": 2}, steps=4))
    assert "a photo of a dog" not in drawn, "class pictures were drawn again"
    match = go(a_run(of=of, steps=3))
    none = go(a_run(of=of, config={"prior": "none"}, steps=3))
    assert with_pictures.losses != match.losses != none.losses
    # At the first step the model is unchanged, so its own prediction is matched exactly.
    assert match.losses[0] == none.losses[0] and with_pictures.losses[0] > none.losses[0]


@check
def the_largest_seed_draws_class_pictures():
    fresh_user()
    of = a_set(class_prompt="a photo of a dog")
    seeds = []
    sample = train_host.HostModel.sample_latent
    with replaced(train_host.HostModel, "sample_latent", lambda *a: seeds.append(a[4]) or sample(*a)):
        go(a_run(of=of, steps=1, seed=2**64 - 1, config={"prior": "pictures", "class_pictures": 2, "sample_seed": 5}))
    assert seeds[:2] == [2**64 - 1, 0], seeds


def other_sampling(family):
    """A family's model, and a clone that a node makes sample in another way."""
    from comfy_extras.nodes_model_advanced import ModelSamplingDiscrete, ModelSamplingSD3

    with torch.inference_mode():
        model = families.make_model(family)
        if family == "sd3":
            return model, ModelSamplingSD3().patch(model, 5.0)[0]
        return model, ModelSamplingDiscrete().patch(model, "v_prediction", True)[0]


@check
def what_is_loaded_does_not_change_which_run_it_is():
    """ComfyUI swaps the way of sampling on the shared model while a clone with another one is loaded."""
    for family in ("sd15", "sd3"):
        of, (model, patched) = a_set(), other_sampling(family)

        def keys(family=family, of=of, models=(model, patched)):
            return [a_run(family, of, (m, *parts(family)[1:])).key for m in models]

        first = keys()
        assert first[0] != first[1], "another way of sampling is taken for the same run"
        for loaded in (patched, model):
            with torch.inference_mode():
                comfy.model_management.load_models_gpu([loaded])
            assert keys() == first, family
        comfy.model_management.unload_all_models()
        assert keys() == first, family


@check
def class_pictures_are_of_the_models_way_of_sampling():
    """Drawn anew where it changes; not where only what is trained changes."""
    fresh_user()
    of, (model, patched) = a_set(class_prompt="a photo of a dog"), other_sampling("sd3")
    drawn = []
    sample = train_host.HostModel.sample_latent
    options = {"prior": "pictures", "class_pictures": 1}
    with replaced(train_host.HostModel, "sample_latent", lambda *a: drawn.append(a[1]) or sample(*a)):
        for expected, one, more in ((1, model, {}), (2, patched, {}), (2, patched, {"caption_dropout": 0.5})):
            of_parts = (one, *parts("sd3")[1:])
            go(a_run("sd3", of, of_parts, config={**options, **more}, steps=1))
            assert drawn.count("a photo of a dog") == expected, (drawn, more)
    # A run that goes on must not meet other class pictures than it began with.
    for prior, several in (("pictures", 2), ("match", 1)):
        steps = [{"prior": prior, "sample_steps": n} for n in (2, 3)]
        assert len({a_run("sd3", of, parts("sd3"), config=one).key for one in steps}) == several, prior


@check
def captions_beside_pictures_hold_the_trigger():
    root = Path(folder_paths.get_input_directory()) / "captioned"
    root.mkdir()
    for name, text in (("a", "a [trigger] dog in snow"), ("b", "two desks"), ("c", "")):
        Image.new("RGB", (64, 64), "red").save(root / f"{name}.png")
        (root / f"{name}.txt").write_text(text, "utf-8")
    said = [r.caption for r in a_set(folder="captioned", trigger="sks", instance_prompt="my [trigger] toy").records]
    assert said == ["a sks dog in snow", "sks, two desks", "my sks toy"], said


@check
def the_trigger_stands_in_sample_prompts_too():
    options = {"sample_prompts": "[trigger] in a boat\na cat", "config": {"sample_negative": "not [trigger]"}}
    plan = a_run(of=a_set(trigger="sks"), **options).plan.samples
    assert plan.prompts == ("sks in a boat", "a cat") and plan.negative == "not sks", plan
    of = a_set(trigger="")
    plan = a_run(of=of, **options).plan.samples
    assert plan.prompts == ("in a boat", "a cat") and plan.negative == "not", plan
    # Without a word it is taken out of captions as well, which is said.
    assert of.records[0].caption == "a photo of"
    assert "[trigger] was taken out of 2 captions" in dataset.summary(of), dataset.summary(of)
    plain = a_set(trigger="", instance_prompt="a photo")
    assert "[trigger]" not in dataset.summary(plain) + dataset.summary(a_set())


@check
def files_that_are_not_learnt_from_are_named():
    root = Path(folder_paths.get_input_directory()) / "mixed"
    root.mkdir()
    for name in ("a.jpg", "b.gif", "c.jfif"):
        Image.new("RGB", (64, 64), "red").save(root / name, format="GIF" if name == "b.gif" else "JPEG")
    (root / "a.txt").write_text("a cat", "utf-8")
    for name in ("._a.jpg", ".DS_Store", "Thumbs.db"):
        (root / name).write_bytes(b"\x00\x05\x16\x07")
    of = a_set(folder="mixed")
    assert len(of.records) == 3 and "left out" not in dataset.summary(of), dataset.summary(of)
    (root / "d.heic").write_bytes(b"")
    assert "1 file was left out: d.heic" in dataset.summary(a_set(folder="mixed"))
    for i in range(6):
        (root / f"e{i}.json").write_bytes(b"")
        (root / f"f{i}.caption").write_bytes(b"")
    said = dataset.summary(a_set(folder="mixed"))
    assert "7 files were left out: d.heic, e0.json, e1.json, e2.json, e3.json, …" in said, said
    assert "6 caption files belong to no picture: f0.caption, f1.caption" in said, said
    assert "1 of 3 pictures have captions of their own; the others have the instance prompt." in said, said
    assert a_set(folder="mixed").digest == of.digest


@check
def a_folder_of_pictures_and_texts_stays_the_same_set():
    """Runs that were begun by earlier versions go on only with the digest that they had."""
    root = Path(folder_paths.get_input_directory()) / "plain"
    root.mkdir()
    Image.new("RGB", (96, 64), (200, 30, 60)).save(root / "a.png")
    Image.new("RGBA", (64, 96), (20, 130, 60, 128)).save(root / "b.png")
    Image.new("L", (64, 64), 90).save(root / "C 1.png")
    (root / "a.txt").write_text("a cat", "utf-8")
    options = {"folder": "plain", "resolution": 128, "bucket_step": 32}
    known = {"0a0df6019bf772f07348232d0e27a7146227ffbb053365a5f5c529037b214065": {}}
    known["da1fd10539dbd32285a0423d5484fd813f3cc5d27dab6131410fd30ca59e05b6"] = {
        "flips": True, "repeats": 3, "class_prompt": "a dog", "buckets": False,
    }  # fmt: skip
    for digest, more in known.items():
        assert a_set(**options, **more).digest == digest, more


@check
def masks_beside_pictures_are_no_pictures():
    root = Path(folder_paths.get_input_directory()) / "masked"
    root.mkdir()
    base = dataset.to_pillow(pictures(1)[0])
    base.save(root / "1.png")
    plain = a_set(folder="masked")
    mask = Image.new("L", (64, 64), 0)
    mask.paste(255, (0, 0, 16, 64))
    mask.save(root / "1-masklabel.png")
    base.save(root / "1-condlabel.png")
    of = a_set(folder="masked")
    said = dataset.summary(of)
    assert "1 pictures, 1 with a mask" in said and "1 control picture is not used: 1-condlabel.png" in said, said
    assert of.digest != plain.digest
    # The same as the mask over a link, which goes before a file.
    connected = dataset.from_pillow(mask)[..., 0]
    over_link = a_set(pictures=[dataset.from_pillow(base)], masks=[connected])
    assert over_link.digest == of.digest
    assert all(torch.equal(a, b) for a, b in zip(of.load(of.records[0]), over_link.load(over_link.records[0]), strict=True))
    other = a_set(folder="masked", masks=[1 - connected])
    assert "Masks are connected, so mask files are not used: 1-masklabel.png" in dataset.summary(other)
    assert other.records[0].mask is None and of.records[0].mask.endswith("1-masklabel.png")
    assert torch.equal(other.load(other.records[0])[1], 1 - of.load(of.records[0])[1]) and other.digest != of.digest
    run = a_run(of=of)
    with torch.inference_mode(), train_mode.training_mode():
        run.host.encode_pictures(of)
    inside = run.host.load_batch(list(of.records)).mask
    assert inside[..., :2].min() == 1 and inside[..., 2:].max() == 0
    assert dataset.contact_sheet(of)[0, 100, 150].max() < 0.3, "what does not count is not dimmed"


@check
def subfolders_with_repeats():
    """The summary as the node puts it out, and that the node runs again when something changes in a subfolder."""
    root = Path(folder_paths.get_input_directory()) / "kohya"
    for name in ("10_zwx dog/a.png", "10_zwx dog/b.png", "1_dog/a.png", "reg_dog/a.png"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (128, 64) if name.startswith("1_") else (64, 64), "red").save(root / name)
    (root / "10_zwx dog" / "A.TXT").write_text("asleep", "utf-8")
    node = dataset.OFTDatasetNode
    given = {"folder": ["kohya"], "trigger": ["zwx"], "resolution": [64], "instance_prompt": ["a photo of [trigger]"]}
    assert node.validate_inputs(folder=given["folder"]) is True
    of, said, sheet = node.execute(**given, captions=["\n\ntyped"]).args
    assert [r.caption for r in of.records] == ["zwx, asleep", "zwx dog", "zwx, typed"], of.records
    assert [r.repeats for r in of.records] == [10, 10, 1] and sheet.shape[2] == 3 * dataset.TILE
    for part in (
        "21 steps of one picture are one pass",
        "10_zwx dog (2 pictures, 10 times each), 1_dog (1 picture, 1 time each)",
        "1 subfolder was left out: reg_dog",
        "2 of 3 pictures have captions of their own; the others have the name of their subfolder.",
        "More than 20 % is cut off of 1 picture: 1_dog/a.png 50 %",
    ):
        assert part in said, said
    before = node.fingerprint_inputs(folder=["kohya"])
    for change in (
        lambda: (root / "1_dog" / "a.txt").write_text("!", "utf-8"),
        lambda: (root / "1_dog" / "a.txt").unlink(),
        lambda: (root / "10_zwx dog").rename(root / "9_zwx dog"),
        lambda: (root / "reg_dog").rename(root / "reg_cat"),
        lambda: Image.new("L", (64, 64), 255).save(root / "1_dog" / "a-masklabel.png"),
        lambda: Image.new("RGB", (64, 64)).save(root / "own.png"),
    ):
        change()
        after = node.fingerprint_inputs(folder=["kohya"])
        assert after != before, "a change is not seen"
        before = after
    said = dataset.summary(a_set(folder="kohya"))
    assert "1 pictures" in said and "subfolders were left out: 1_dog, 9_zwx dog, reg_cat" in said, said


@check
def choices_that_match_no_layer_are_said():
    fresh_user()
    chosen = {"target_modules": "to_q, to_k, to_zz", "exclude_modules": "to_k, to_x", "text_encoder_lr": 0.01}
    report = go(a_run(steps=1, config={**chosen, "rank_pattern": '{"to_q": 2, "q_proj": 2, "zz": 2}'})).report
    said = [line for line in report.splitlines() if "matched no layer" in line]
    expected = [("target_modules", "to_zz"), ("exclude_modules", "to_x"), ("rank_pattern", "zz")]
    assert said == [f"Option '{o}': '{p}' matched no layer, so it has no effect." for o, p in expected], said
    # A preset can be left out by name.
    fresh_user()
    run = a_run(steps=1, config={"exclude_modules": "text-attention"})
    assert "matched no layer" not in go(run).report
    names = [c.name for c in run.bank.parts["unet"][1].layers]
    assert names and not any("attn2.to_k" in n for n in names) and any("attn1.to_k" in n for n in names)


@check
def block_numbers_count_in_named_lists():
    config = {"target_modules": "qkv", "layers_to_transform": "0"}
    raises(ConfigError, lambda: go(a_run("sd3", config=config)), "layers_to_transform", "layers_pattern", "joint_blocks")
    fresh_user()
    run = a_run("sd3", steps=1, config={**config, "layers_pattern": "input_blocks, joint_blocks"})
    report = go(run).report
    assert {c.name.split(".")[1] for c in run.bank.parts["unet"][1].layers} == {"0"}
    assert "'layers_pattern': 'input_blocks' matched no layer" in report, report


@check
def what_is_left_to_the_model():
    """A loss scale of 1 that was typed in is no default, and a distilled model is sampled without CFG."""
    of = a_set()
    for given, usual in (({}, True), ({"loss_scale": 0.0}, True), ({"loss_scale": 1.0}, False)):
        assert a_run(of=of, config=given).plan.usual_loss_scale is usual, given

    def usual_cfg(kind, embed):
        base = SimpleNamespace(model_config=kind({}))
        net = SimpleNamespace(params=SimpleNamespace(guidance_embed=embed))
        return train_host.HostModel.usual_cfg.fget(SimpleNamespace(base=base, net=net))

    flux = comfy.supported_models
    assert [usual_cfg(flux.FluxSchnell, False), usual_cfg(flux.Flux, True), usual_cfg(flux.SD3, False)] == [1, 1, 5]


@check
def text_encoders_train():
    for family, low_vram in (("sd15", "checkpointing"), ("sdxl", "off")):
        fresh_user()
        clip = parts(family)[1]
        before = state(clip.patcher)
        run = a_run(family, steps=3, config={"text_encoder_lr": 0.02}, low_vram=low_vram)
        outcome = go(run)
        same(before, state(clip.patcher))
        untouched(clip.cond_stage_model)
        moved = [float(p.detach().abs().max()) for p in run.bank.groups()["te"]]
        assert moved and min(moved) > 0, moved
        assert {"te1", "unet"} <= set(outcome.adapter.components), outcome.adapter.components
        with torch.inference_mode():
            applied = host.apply(outcome.adapter, *parts(family)[:2], Strength(1.0), Strength(1.0))
        assert "te1" in applied.report.lower() or "text" in applied.report.lower()
        # Samples are drawn with the encoders as they are trained, not with embeddings of before.
        plan, vae = run.plan.samples, parts(family)[2]
        with torch.inference_mode(), train_mode.training_mode(), torch.no_grad():
            drawn = [
                vae.decode(one.sample_latent(plan.prompts[0], plan, (64, 64), plan.seed))[0]
                for one in (
                    train_host.HostModel(applied.model, applied.clip, vae),
                    train_host.HostModel(applied.model, clip, vae),
                )
            ]
        off, other = ((picture - outcome.samples[-1]).abs().mean() for picture in drawn)
        assert off < 0.2 * other, f"{family}: {off:.5f}, with untrained encoders {other:.5f}"


@check
def models_in_dynamic_vram_train_another_way():
    """Weights that ComfyUI lends to one forward at a time are not trained through; unchanged where none are."""
    model, clip, vae = parts("sd15")

    def dynamic(patcher, init):
        out = patcher.clone()
        out.is_dynamic, out.cached_patcher_init = (lambda: True), init
        out.clone = lambda disable_dynamic=False: patcher if disable_dynamic else out
        return out

    clip_of_later_hosts = clip.clone()
    for init in (None, (object, ())):
        late = dynamic(model, init)
        clip_of_later_hosts.patcher = dynamic(clip.patcher, init)
        clip_of_later_hosts.clone = lambda: clip_of_later_hosts
        if init is None:
            raises(ConfigError, lambda late=late: train_host.HostModel(late, clip, vae), "dynamic VRAM", "loader")
            encoders = (model, clip_of_later_hosts, vae)
            raises(ConfigError, lambda of=encoders: train_host.HostModel(*of, train_encoders=True), "dynamic VRAM")
        else:
            made = train_host.HostModel(late, clip_of_later_hosts, vae, train_encoders=True)
            assert made.patcher is model and made.clip.patcher is clip.patcher
            assert made.encoders is clip.patcher.model
            clip_of_later_hosts.patcher = late_clip = dynamic(clip.patcher, init)
            assert train_host.HostModel(late, clip_of_later_hosts, vae).clip.patcher is late_clip


@check
def t5_trains():
    """T5 with its own learning rate, alone and beside CLIP; its layers are in the file and act."""
    for family, config in (("sd3", {"t5_lr": 0.03}), ("flux", {"t5_lr": 0.03, "text_encoder_lr": 0.01})):
        fresh_user()
        clip = parts(family)[1]
        before = state(clip.patcher)
        # The diffusion model as good as stands still: whatever falls is the encoders' work.
        run = a_run(family, steps=12, learning_rate=1e-7, config=config, low_vram="checkpointing")
        outcome = go(run)
        same(before, state(clip.patcher))
        untouched(clip.cond_stage_model)
        groups = run.bank.groups()
        assert set(groups) == {"unet", "t5"} | ({"te"} if "text_encoder_lr" in config else set())
        assert min(float(p.detach().abs().max()) for p in groups["t5"]) > 0.01
        was, now = fixed_loss(run, zeros(run.bank)), fixed_loss(run, None)
        assert now < was - 0.002 * was, f"{family}: {was:.5f}, then {now:.5f}"
        assert "te3" in outcome.adapter.components and ("te1" in outcome.adapter.components) == ("te" in groups)
        with torch.inference_mode():
            turned = merged(
                host.apply(outcome.adapter, *parts(family)[:2], Strength(1.0), Strength(1.0)).clip.patcher
            )
        moved = [k for k in before if k in turned and not torch.equal(turned[k], before[k])]
        assert sum("SelfAttention" in k for k in moved) == 12, moved
    raises(ConfigError, lambda: go(a_run("sd15", config={"t5_lr": 0.01})), "T5", "t5_lr")


# --- stop, resume, errors -----------------------------------------------------------------------------------


def stop_before(step):
    """In place of a trainer's step: the interrupt button, pressed as the step after `step` begins."""
    one_step = Trainer._one_step

    def instead(self, started):
        if self.step == step:
            raise train_mode.Stopped
        one_step(self, started)

    return instead


@contextlib.contextmanager
def stopped_at(step):
    """The interrupt button, pressed while step `step` ends."""

    def hook(value, total, preview, node_id=None):
        if value == step:
            raise train_mode.Stopped

    with replaced(comfy.utils, "PROGRESS_BAR_HOOK", hook):
        yield


@check
def stop_keeps_the_work_and_resume_is_exact():
    options = {"steps": 8, "config": {"ema": 0.9, "schedule": "cosine", "module_dropout": 0.2}}
    fresh_user()
    whole = go(a_run(**options))
    fresh_user()
    model = parts("sd15")[0]
    before = state(model)
    with stopped_at(3):
        run = a_run(**options)
        try:
            go(run)
            raise AssertionError("not stopped")
        except train_mode.Stopped:
            pass
    same(before, state(model))
    untouched(model.model)
    assert run.trainer.step == 3 and run.path.is_file(), "the work of a stopped run is lost"
    kept = run.path
    assert set(folders.read(files.listed(kept)).entries), "the kept file cannot be read"
    rest = a_run(**options)
    outcome = go(rest)
    assert rest.resumed == 3 and rest.path == kept
    assert outcome.losses == whole.losses, f"{outcome.losses} {whole.losses}"
    same(learnt(outcome), learnt(whole))
    assert torch.equal(outcome.samples[-1], whole.samples[-1])


@check
def stop_in_the_middle_of_a_step():
    fresh_user()
    whole = go(a_run(steps=5))
    fresh_user()
    attention = train_blocks.comfy.ldm.modules.attention
    count = 0

    def sometimes(*args, **kwargs):
        nonlocal count
        count += 1
        if count == 35:
            raise train_mode.Stopped
        return before(*args, **kwargs)

    run = a_run(steps=5)
    with replaced(attention, "attention_pytorch", sometimes) as before:
        try:
            go(run)
            raise AssertionError("not stopped")
        except train_mode.Stopped:
            pass
    assert 0 < run.trainer.step < 5
    untouched(run.host.base)
    rest = a_run(steps=5)
    outcome = go(rest)
    assert rest.resumed == run.trainer.step and outcome.losses == whole.losses
    same(learnt(outcome), learnt(whole))


@check
def more_steps_go_on():
    fresh_user()
    whole = go(a_run(steps=7))
    fresh_user()
    go(a_run(steps=4))
    more = a_run(steps=7)
    outcome = go(more)
    assert more.resumed == 4 and outcome.losses == whole.losses
    same(learnt(outcome), learnt(whole))
    anew = a_run(steps=9, resume=False)
    go(anew)
    assert anew.resumed == 0
    fewer = a_run(steps=5)
    assert go(fewer).losses == whole.losses[:5] and fewer.trainer.step == 5
    assert go(a_run(steps=11)).losses[:7] == whole.losses, "a shorter run has spoilt the longer one's state"


@check
def a_runs_file_is_known_again():
    """A number is given again once its file is gone: the file of another run is neither put out nor written over."""
    fresh_user()
    wanted = {"steps": 2, "name": "training/own"}
    first = go(a_run(**wanted))
    path, values = Path(first.adapter.path), learnt(first)

    def taken_by(**options):
        """Another run gets the number of the file, which is deleted."""
        path.unlink()
        assert Path(go(a_run(**{**wanted, **options})).adapter.path) == path
        return path.read_bytes()

    for options in ({"seed": 8}, {"steps": 3}):
        theirs = taken_by(**options)
        again = go(a_run(**wanted))
        assert "nothing was trained again" in again.report and again.name in again.report
        same(learnt(again), values)
        assert Path(again.adapter.path) != path and path.read_bytes() == theirs
        assert go(a_run(**wanted)).name == again.name, "the new place is not remembered"
        path = Path(again.adapter.path)
    # Deleted, and the place is free.
    path.unlink()
    same(learnt(go(a_run(**wanted))), values)
    assert path.is_file()
    # What a user saved in its place, from this very adapter.
    with torch.inference_mode():
        kept = {"name": "training/copy", "dialect": save.AS_IS, "precision": "fp16", "folder": "oft"}
        copied = save.OFTSave.execute(adapter=again.adapter, **kept).args[0]
    os.replace(folders.find(copied), path)
    same(learnt(go(a_run(**wanted))), values)
    assert any(t.dtype == torch.float16 for t in load_file(path).values()), "the copy was written over"


@check
def a_stopped_run_does_not_write_over_another_runs_file():
    fresh_user()
    wanted = {"steps": 3, "name": "training/begun"}
    with stopped_at(1), contextlib.suppress(train_mode.Stopped):
        begun = a_run(**wanted)
        go(begun)
    begun.path.unlink()
    other = go(a_run(seed=8, **wanted))
    assert Path(other.adapter.path) == begun.path
    theirs = begun.path.read_bytes()
    rest = a_run(**wanted)
    outcome = go(rest)
    assert rest.resumed == 1 and rest.path != begun.path and begun.path.read_bytes() == theirs
    assert Path(outcome.adapter.path) == rest.path
    # Begun anew where it was completed, and stopped: its result is the whole one again.
    with stopped_at(1), contextlib.suppress(train_mode.Stopped):
        anew = a_run(**wanted, resume=False, config={"sample_steps": 1})
        go(anew)
    assert anew.path == rest.path and files.header(rest.path)["ss_steps"] == "1"
    same(learnt(go(a_run(**wanted))), learnt(outcome))
    assert files.header(rest.path)["ss_steps"] == "3"


@check
def out_of_memory_is_clear_and_keeps_the_state():
    fresh_user()
    model = parts("sd15")[0]
    before = state(model)
    run = a_run(steps=5)
    predict, count = run.host.predict, 0

    def hungry(*args):
        nonlocal count
        count += 1
        if count == 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
        return predict(*args)

    run.host.predict = hungry
    raises(TrainingError, lambda: go(run), "out of memory", "resolution", "2 steps is kept")
    same(before, state(model))
    untouched(model.model)
    again = a_run(steps=5)
    go(again)
    assert again.resumed == 2
    # While the pictures are encoded, too.
    fresh_user()
    run = a_run(steps=5)

    def no_room(*_):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    with replaced(parts("sd15")[2], "encode", no_room):
        raises(TrainingError, lambda: go(run), "out of memory", "low_vram")


@contextlib.contextmanager
def room(size):
    """Within, files may grow to `size` bytes, then writes fail as on a full disk."""
    import resource
    import signal

    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
        signal.signal(signal.SIGXFSZ, before)


@check
def a_full_disk_costs_no_file_and_no_work():
    """Caches do without; a state that cannot be written ends the run with a clear error and, where it fits, the file."""
    if sys.platform == "win32":
        return
    fresh_user()
    usual = a_run(steps=3, name="training/full_disk")
    whole = go(usual)
    (state_file,) = usual.folder.glob("state-*.safetensors")
    file_size, state_size = os.path.getsize(whole.adapter.path), state_file.stat().st_size
    assert file_size + 2000 < state_size, (file_size, state_size)
    learnt_then = learnt(whole)
    before = state(parts("sd15")[0])

    def rest(run):
        return [str(p) for place in (run.folder, run.store.folder, run.path.parent) for p in place.glob("**/.*")]

    fresh_user()
    run = a_run(steps=3, name="training/full_disk")
    with room((file_size + state_size) // 2):
        text = raises(StateError, lambda: go(run), "File too large", "disk space", "3 steps", "full_disk")
    assert not rest(run) and not list(run.folder.glob("state-*")), text
    same(learnt_then, load_file(run.path))
    same(before, state(parts("sd15")[0]))
    untouched(parts("sd15")[0].model)
    # Nothing fits: still an error of ours, nothing half anywhere; the caches did without.
    fresh_user()
    run = a_run(steps=3, name="training/full_disk")
    with room(300):
        raises(AdapterError, lambda: go(run), "File too large", ".safetensors")
    assert not rest(run) and not run.path.exists() and not list(run.store.folder.glob("*"))
    # With room again it is the run that it would have been, and keeps what it has once more.
    again = a_run(steps=3, name="training/full_disk")
    outcome = go(again)
    same(learnt_then, learnt(outcome))
    assert outcome.losses == whole.losses and list(again.store.folder.glob("*.safetensors"))
    # A run that goes on keeps its states, its file and the caches as they were.
    kept = {p: p.read_bytes() for p in (*again.folder.glob("state-*"), *again.store.folder.glob("*"), again.path)}
    more = a_run(steps=5, name="training/full_disk")
    with room(300):
        raises(AdapterError, lambda: go(more), "File too large")
    assert kept == {p: p.read_bytes() for p in kept} and not rest(more)
    last = go(a_run(steps=5, name="training/full_disk"))
    assert last.losses[:3] == whole.losses and len(last.losses) == 5


@check
def base_is_as_before_after_an_error():
    fresh_user()
    model = parts("sd15")[0]
    with torch.inference_mode():
        plain = train_host.HostModel(*parts("sd15"))
        plan = a_run().plan.samples
        picture = plain.sample_latent("a cat", plan, (64, 64), 5)
    run = a_run(learning_rate=0.02)
    run.host.predict = lambda *_: 1 / 0
    with contextlib.suppress(ZeroDivisionError):
        go(run)
    untouched(model.model)
    go(a_run())
    with torch.inference_mode():
        again = train_host.HostModel(*parts("sd15")).sample_latent("a cat", plan, (64, 64), 5)
    assert torch.equal(picture, again), "the base model draws another picture than before"


@check
def presets_decide_what_is_not_given():
    of = a_set(class_prompt="a photo of a cat")
    plan = a_run(of=of).plan
    assert (plan.oft.module_dropout, plan.settings.weight_decay, plan.settings.prior) == (0.2, 1.0, "match")
    style = a_run(of=of, preset="style").plan
    assert (style.oft.module_dropout, style.settings.weight_decay, style.settings.prior) == (0.0, 0.01, "none")
    # What the settings node shows before anything is typed in means: by preset.
    shown = {i.id: i.default for i in train.OFTTrainConfigNode.define_schema().inputs}
    assert shown["module_dropout"] == shown["weight_decay"] == -1
    left = a_run(of=of, config={k: shown[k] for k in ("module_dropout", "weight_decay", "caption_dropout", "prior")}).plan
    assert left == plan
    own = a_run(of=of, config={"module_dropout": 0.0, "weight_decay": 0.0}).plan
    assert (own.oft.module_dropout, own.settings.weight_decay) == (0.0, 0.0)


@check
def text_attention_is_where_the_text_goes():
    """Exactly those attention layers that get as many tokens as the text has, and nothing but them, in every family."""
    def tokens_of(run, layers):
        """Layer -> tokens that it gets in one forward; and the text's tokens."""
        seen, length = {}, []

        def note(name):
            return lambda module, args: seen.update({name: args[0].shape[-2]})

        def context(module, args, named):
            length.append((named["context"] if named.get("context") is not None else args[2]).shape[1])

        net = run.host.net
        hooks = [net.get_submodule(name).register_forward_pre_hook(note(name)) for name in layers]
        hooks.append(net.register_forward_pre_hook(context, with_kwargs=True))
        record = next(iter(run.dataset.records))
        with train_mode.training_mode(), torch.no_grad():
            run.host.predict(run.objective.noised(run.host.load_batch([record]).latents, 0, 0, [0]), [record])
        for hook in hooks:
            hook.remove()
        assert set(seen) == layers, layers - set(seen)
        return seen, length[0]

    for family in ("sd15", "sd2", "sdxl", "sd3", "sd35", "flux"):
        fresh_user()
        run = a_run(family, config={"target_modules": "text-attention"}, steps=1)
        go(run)
        chosen = {c.name for c in run.bank.parts[train_host.UNET][1].layers}
        whole = {c.name for c in OFTConfig().select(run.host.net).layers}
        seen, length = tokens_of(run, whole)
        assert chosen == {n for n, tokens in seen.items() if tokens == length}, (family, chosen, seen, length)
        assert chosen and chosen < whole


@check
def same_inputs_do_not_train_again():
    fresh_user()
    first = go(a_run(steps=4))
    trained = []
    run = Trainer.run
    with replaced(Trainer, "run", lambda self: trained.append(1) or run(self)):
        again = go(a_run(steps=4))
        assert not trained, "trained again"
        assert again.name == first.name and again.losses == first.losses
        assert torch.equal(again.samples, first.samples) and "again" in again.report
        Path(first.adapter.path).unlink()
        back = go(a_run(steps=4))
        assert not trained and Path(back.adapter.path).is_file(), "a deleted file does not come back"
        for changed in (
            {"of": a_set(trigger="sks")},
            {"of": a_set(pictures=[pictures(seed=1)])},
            {"learning_rate": 0.01},
            {"block_size": 4},
            {"seed": 4},
            {"config": {"caption_dropout": 0.5}},
            {"of_parts": (families.make_model("sd15", seed=1), *parts("sd15")[1:])},
            {"of_parts": (parts("sd15")[0], families.make_clip("sd15", seed=1), parts("sd15")[2])},
        ):
            count = len(trained)
            go(a_run(**{"steps": 4, **changed}))
            assert len(trained) == count + 1, f"not trained for {list(changed)}"
        with torch.inference_mode():
            patched = host.apply(first.adapter, parts("sd15")[0], None, Strength(1.0), Strength(1.0)).model
        keys = {a_run(of_parts=(m, *parts("sd15")[1:])).key for m in (parts("sd15")[0], patched)}
        assert len(keys) == 2, "a patched model counts as the unpatched one"
        with torch.inference_mode():
            twice = host.apply(first.adapter, parts("sd15")[0], None, Strength(1.0), Strength(1.0)).model
        assert a_run(of_parts=(twice, *parts("sd15")[1:])).key in keys


@contextlib.contextmanager
def counted(*places):
    """How often each of the functions (owner, name) is called."""
    counts = [0] * len(places)
    with contextlib.ExitStack() as stack:
        for i, (owner, name) in enumerate(places):
            function = getattr(owner, name)

            def call(*args, i=i, function=function, **options):
                counts[i] += 1
                return function(*args, **options)

            stack.enter_context(replaced(owner, name, call))
        yield counts


@check
def latents_and_embeddings_are_kept_for_later_runs():
    """By content: other pictures, captions, VAEs or text encoders are encoded anew; the same ones never again."""
    fresh_user()
    model, clip, vae = parts("sd15")
    encoder = clip.cond_stage_model
    with counted((vae, "encode"), (encoder, "encode_token_weights")) as counts:
        first = go(a_run(steps=3))
        assert counts == [2, 2], counts  # two pictures; one caption and the empty one
        second = a_run(steps=4)
        outcome = go(second)
        assert counts == [2, 2], "encoded again"
        assert second.store.found == 4 and "4 read from the cache" in outcome.report
        assert outcome.losses[:3] == first.losses, "what is kept is not what was made"
        some = torch.cat([pictures(1), pictures(1, seed=5)])
        go(a_run(of=a_set(pictures=[some]), steps=3))
        assert counts == [3, 2], counts
        go(a_run(of=a_set(pictures=[some], trigger="sks", flips=True), steps=3))
        assert counts == [5, 3], counts
        with torch.inference_mode():
            other = families.make_vae("sd15", seed=1)
            skipping = clip.clone()
            skipping.clip_layer(-2)
        go(a_run(of_parts=(model, clip, other), steps=3))
        assert counts[1] == 3
        go(a_run(of_parts=(model, skipping, vae), steps=3))
        assert counts == [5, 5], counts
        # Trained text encoders change, so nothing of them is kept.
        made = set(second.store.folder.iterdir())
        run = a_run(steps=3, config={"text_encoder_lr": 0.01}, sample_every=1)
        go(run)
        assert set(second.store.folder.iterdir()) == made and run.store.found == 2  # the pictures
        # A damaged file is made again.
        for path in made:
            path.write_bytes(path.read_bytes()[:40])
        count = counts[0]
        assert go(a_run(steps=5)).losses[:3] == first.losses and counts[0] == count + 2
    assert not list(second.store.folder.glob("*.partial"))


@check
def the_cache_stays_within_its_limit():
    fresh_user()
    folder = train_store.state_root() / "cache"
    store = train_store.Store(folder, limit=10**9)
    value = [[torch.randn(10, 100), {"pooled_output": None, "n": 3, "x": (torch.ones(2), "a")}]]
    for i in range(5):
        path = store.path("text", i)
        store.put(path, value)
        os.utime(path, (1e9 + i, 1e9 + i))
    again = train_store.Store(folder, limit=2 * path.stat().st_size)
    back = again.get(store.path("text", 1))  # now used last
    assert torch.equal(back[0][0], value[0][0]) and back[0][1]["n"] == 3 and back[0][1]["x"][1] == "a"
    (folder / "x.part").write_bytes(b"")
    assert again.prune() == 3 * path.stat().st_size
    assert {p for p in folder.glob("*.safetensors")} == {store.path("text", i) for i in (1, 4)}
    tight = train_store.Store(folder, limit=0)
    tight.get(store.path("text", 1))
    tight.prune()
    assert [p for p in folder.glob("*.safetensors")] == [store.path("text", 1)], "a run lost what it uses"
    raises(TypeError, lambda: train_store.fingerprint([object()]), "object")


@check
def the_base_models_file_is_found():
    """From the patcher, as later hosts note it, or through the graph; its hash is read once."""
    folder = Path(folder_paths.get_folder_paths("checkpoints")[0])
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "a.safetensors").write_bytes(b"weights")
    (Path(folder_paths.get_folder_paths("loras")[0]) / "l.safetensors").write_bytes(b"lora")
    model = parts("sd15")[0]
    graph = {
        "1": {"inputs": {"ckpt_name": "a.safetensors"}},
        "2": {"inputs": {"model": ["1", 0], "lora_name": "a.safetensors", "strength": 1.0}},
        "3": {"inputs": {"model": ["2", 0], "name": "x"}},
        "4": {"inputs": {"text": "a.safetensor"}},
        "5": {"inputs": {"model": ["4", 0]}},
        "6": {"inputs": {"model": ["6", 0]}},
    }
    find = train_identity.model_file
    assert find(model, graph, "3") == folder / "a.safetensors" == find(model, graph, 2)
    assert [find(model, graph, n) for n in ("5", "6", "7")] == [None] * 3 and find(model, None, "3") is None
    with torch.inference_mode():
        noted = model.clone()
    noted.cached_patcher_init = (len, (str(folder / "a.safetensors"), {}))
    assert find(noted, None, None) == folder / "a.safetensors"
    fresh_user()
    store = train_store.Store(train_store.state_root() / "cache")
    expected = hashlib.sha256(b"weights").hexdigest()
    with counted((hashlib, "sha256")) as counts:
        assert train_identity.file_hash(folder / "a.safetensors", store) == expected
        once = counts[0]
        assert train_identity.file_hash(folder / "a.safetensors", store) == expected
        assert counts[0] - once < once and store.found == 1
    (folder / "a.safetensors").write_bytes(b"other weights")
    assert train_identity.file_hash(folder / "a.safetensors", store) != expected


@check
def old_runs_are_removed_and_unfinished_ones_stay():
    fresh_user()
    root, day = train_store.state_root(), 86400
    now = time.time()

    def run(name, age, states=(), results=(), below=()):
        folder = root / name.ljust(24, "0")
        (folder / "9 steps").mkdir(parents=True)
        for step in states:
            (folder / f"state-{step:08d}.safetensors").write_bytes(b"x" * 1000)
        for step in below:
            (folder / "9 steps" / f"state-{step:08d}.safetensors").write_bytes(b"x")
        for step in results:
            train_run.write_json(folder / f"result-{step}.json", {"steps": step})
        for path in folder.rglob("*"):
            os.utime(path, (now - age * day,) * 2)
        return folder

    done = [run(f"a{i}", age=40 + i, states=(5, 10), results=(10,)) for i in range(4)]
    more = run("b0", age=10, states=(10, 15), results=(10,))  # stopped on the way to more steps
    shorter = run("b1", age=10, states=(20,), results=(20,), below=(4,))
    young, old = run("c0", age=29, states=(3,)), run("c1", age=31, states=(3,))
    current = run("d0", age=90, states=(3,))
    for name in ("class", "cache", "notes of mine"):
        (root / name).mkdir()
    said = train_store.prune_runs(root, current, keep=2, days=30)
    left = {p for p in root.iterdir() if len(p.name) == 24}
    assert left == {*done[:2], more, shorter, young, current}, sorted(p.name for p in left)
    assert old not in left and "3 earlier runs" in said, said
    assert {"class", "cache", "notes of mine"} < {p.name for p in root.iterdir()}
    # Runs of the node themselves count as finished or not in the same way, and the report says what went.
    fresh_user()
    with replaced(train_store.prune_runs, "__defaults__", (2, 30)):
        names = [go(a_run(steps=2, seed=seed)) for seed in range(3)]
        with stopped_at(1), contextlib.suppress(train_mode.Stopped):
            go(a_run(steps=2, seed=9))
        last = go(a_run(steps=2, seed=4))
    kinds = [run.finished for run in train_store.past_runs(train_store.state_root())]
    assert kinds.count(True) == 2 + 1 and kinds.count(False) == 1, kinds
    assert "earlier runs" in last.report and "Removed" not in names[0].report
    assert all(Path(one.adapter.path).is_file() for one in names), "an adapter was removed"


@check
def samples_and_saves_while_it_runs():
    fresh_user()
    seen = []

    def hook(value, total, preview, node_id=None):
        seen.append((value, total, preview))

    with replaced(comfy.utils, "PROGRESS_BAR_HOOK", hook):
        run = a_run(
            steps=6,
            sample_every=2,
            save_every=3,
            sample_prompts="ohwx in a boat\n\nohwx in snow\n",
            name="training/live",
        )
        outcome = go(run)
    assert outcome.samples.shape == (6, 64, 64, 3)  # after 2, 4, 6 steps, two prompts each
    assert torch.equal(outcome.samples[0], outcome.samples[0]) and not torch.equal(
        outcome.samples[0], outcome.samples[4]
    )
    shown = [p for _, _, p in seen if p is not None]
    assert len(shown) >= 6 and all(p[0] == "JPEG" and p[2] == 512 for p in shown)
    assert max(v for v, *_ in seen) == 6
    beside = sorted(p.name for p in run.path.parent.glob("live*"))
    assert beside == ["live_00001_.safetensors", "live_00001_step000003.safetensors"], beside
    # Looking at samples does not change what is learnt.
    fresh_user()
    same(learnt(go(a_run(steps=6))), learnt(outcome))
    curve = train_run.loss_curve(outcome.losses)
    assert curve.shape == (1, 320, 640, 3) and curve.min() < 0.9
    assert train_run.loss_curve([1.0]).shape == train_run.loss_curve([0.5] * 9).shape


@check
def an_interrupted_sample_is_drawn_when_the_run_goes_on():
    fresh_user()
    options = {"steps": 6, "sample_every": 2, "sample_prompts": "ohwx in a boat\nohwx in snow"}
    whole = a_run(**options)
    outcome = go(whole)
    expected = {name: (whole.folder / name).read_bytes() for name in whole.sample_files}
    for finished in (0, 1):
        fresh_user()
        first = a_run(**options)
        draw = first.host.draw

        def stop(*args, run=first, finished=finished, draw=draw):
            images = draw(*args)
            if run.trainer.step == 4:
                for name, image in list(zip(run._sample_names(4), images, strict=True))[:finished]:
                    dataset.to_pillow(image).save(run.folder / name)
                raise train_mode.Stopped
            return images

        first.host.draw = stop
        with contextlib.suppress(train_mode.Stopped):
            go(first)
        assert first.trainer.step == 4
        rest = a_run(**options)
        done = go(rest)
        assert rest.resumed == 4 and len(expected) == 6
        for name, content in expected.items():
            assert (rest.folder / name).read_bytes() == content, f"{name} differs"
        same(learnt(done), learnt(outcome))
        assert done.losses == outcome.losses and torch.equal(done.samples, outcome.samples[2:])
    # Stopped after the samples were drawn: they are not drawn again.
    fresh_user()
    first = a_run(**options)
    with contextlib.suppress(train_mode.Stopped), replaced(Trainer, "_one_step", stop_before(4)):
        go(first)
    assert first.trainer.step == 4 and len(list((first.folder / "samples").iterdir())) == 4
    rest = a_run(**options)
    with counted((rest.host, "draw")) as counts:
        go(rest)
    assert rest.resumed == 4 and counts == [1], counts


@check
def samples_of_other_settings_have_files_of_their_own():
    """The run is the same, so its folder is: what was drawn for the first settings is put out for these again."""
    fresh_user()
    for options in ({"sample_prompts": "ohwx in snow"}, {"config": {"sample_steps": 3}}, {"sample_every": 1}):
        first = go(a_run(steps=2))
        other = a_run(steps=2, **options)
        drawn = go(other)
        assert other.resumed == 2, "trained again"
        again = go(a_run(steps=2, **options))
        assert "nothing was trained again" in again.report and torch.equal(again.samples, drawn.samples)
        assert torch.equal(go(a_run(steps=2)).samples, first.samples), f"drawn over by {options}"


# --- files and bad inputs -----------------------------------------------------------------------------------


@check
def saves_in_other_dialects():
    fresh_user()
    model = parts("sd15")[0]
    outcome = go(a_run())
    write = save.OFTSave.execute

    def saved(**options):
        with torch.inference_mode():
            given = {
                "name": "saved/x",
                "dialect": save.AS_IS,
                "precision": "fp32",
                "folder": "oft",
                **options,
            }
            return write(adapter=outcome.adapter, **given).args[0]

    name = saved()
    assert name in folders.names(), "not in the loader's list at once"
    same(load_file(folders.find(name)), learnt(outcome))
    assert saved() != name
    half = load_file(folders.find(saved(precision="fp16")))
    assert any(t.dtype == torch.float16 for t in half.values())
    converted = folders.read(saved(dialect="peft", model=model))
    assert converted.dialect != outcome.adapter.dialect
    with torch.inference_mode():
        a, b = (
            host.apply(x, model, None, Strength(1.0), Strength(1.0)).model
            for x in (converted, outcome.adapter)
        )
        for one in (a, b):
            comfy.model_management.load_models_gpu([one], force_patch_weights=True)
            one.weights = state(one)
    worst = max(float((a.weights[k] - b.weights[k]).abs().max()) for k in a.weights)
    assert worst < 1e-5, worst
    raises(ConfigError, lambda: saved(dialect="peft"), "model")
    raises(FormatError, lambda: saved(dialect="kohya", model=model), "kohya", "side")
    raises(ConfigError, lambda: saved(name="../../outside"), "name")
    inside = saved(folder="output")
    assert (Path(folder_paths.get_output_directory()) / inside).is_file()


@check
def a_copy_of_a_peft_folder_keeps_its_config():
    """Without it the same numbers are other rotations."""
    root = Path(folder_paths.get_folder_paths(folders.FOLDER)[0])
    layer = "base_model.model.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    g = torch.Generator().manual_seed(0)
    oft = {f"{layer}.oft_R.weight": torch.randn(4, 28, generator=g) * 0.3}
    boft = {f"{layer}.boft_R": torch.randn(1, 4, 8, 8, generator=g) * 0.1, f"{layer}.boft_s": torch.ones(32, 1)}
    other_tool = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
    kohya = {f"{other_tool}.oft_R.weight": oft[f"{layer}.oft_R.weight"]}
    exact = {"peft_type": "OFT", "peft_version": "0.18.0", "use_cayley_neumann": False, "coft": True, "eps": 0.05}

    def rotation(adapter):
        return next(iter(adapter.operations().values()))[0].op.build(Strength(), torch.device("cpu")).matrices

    def saved(adapter, **more):
        options = {"name": "copy/x", "dialect": save.AS_IS, "precision": "fp32", "folder": "oft", **more}
        with torch.inference_mode():
            return save.OFTSave.execute(adapter=adapter, **options).args[0]

    for name, tensors, config in (("oft", oft, exact), ("boft", boft, {"peft_type": "BOFT"})):
        folder = root / "peft" / name
        folder.mkdir(parents=True)
        save_file(tensors, folder / "adapter_model.safetensors")
        (folder / "adapter_config.json").write_text(json.dumps(config), "utf-8")
        first = folders.read(f"peft/{name}/adapter_model.safetensors")
        for other in (saved(first), saved(first)):
            assert other in folders.names() and other.endswith("_/adapter_model.safetensors"), other
            assert torch.equal(rotation(folders.read(other)), rotation(first)), name
            assert json.loads((root / other).with_name("adapter_config.json").read_text("utf-8")) == config
    inside = Path(folder_paths.get_output_directory()) / saved(first, folder="output")
    assert inside.is_file() and (inside.parent / "adapter_config.json").is_file()
    # A file of another tool in the same folder has no use for it.
    save_file(kohya, root / "peft" / "oft" / "other.safetensors")
    assert saved(folders.read("peft/oft/other.safetensors")).endswith("_.safetensors")
    # Files of PEFT that were moved out of their folders stay single files.
    save_file(oft, root / "alone.safetensors")
    assert saved(folders.read("alone.safetensors")).endswith("_.safetensors")
    (root / "peft" / "oft" / "adapter_config.json").write_bytes(b"{")
    first.path = str(root / "peft" / "oft" / "adapter_model.safetensors")
    raises(FileError, lambda: saved(first), "adapter_config.json")


@check
def every_way_of_training_gives_a_file():
    for options in (
        {"side": "output"},
        {"rescale": True},
        {"block_share": True},
        {"use_cayley_neumann": True},
        {"conv_modules": "all-conv"},
        {"target_modules": "to_q, to_v"},
        {"blocks": 4},
        {"use_cayley_neumann": True, "num_cayley_neumann_terms": 7},
        {"fan_in_fan_out": True, "alpha_pattern": '{"to_q": 8}'},
        {"init_weights": False},
    ):
        fresh_user()
        run = a_run(config=options, steps=3)
        outcome = go(run)
        assert len(outcome.adapter.entries) > 5, options
        terms = {op.terms for e in outcome.adapter.operations().values() for op in (e[0].op,)}
        assert terms == {options.get("num_cayley_neumann_terms", 5)}, terms
        for name in ("fan_in_fan_out", "alpha_pattern"):
            assert (f"{name} has no effect" in outcome.report) == (name in options), outcome.report
    fresh_user()
    outcome = go(a_run(coft="angle", coft_degrees=0.5, steps=6))
    angle = outcome.report.split("Largest angle ")[1].split("°")[0]
    assert abs(float(angle) - 0.5) < 0.01, angle
    go(a_run(coft="eps", coft_eps=0.01, steps=2))
    fresh_user()
    raises(FormatError, lambda: go(a_run(config={"side": "output", "block_share": True})), "hold")


@check
def folders_as_source():
    root = Path(folder_paths.get_input_directory()) / "my pictures"
    root.mkdir(parents=True, exist_ok=True)
    for i, size in enumerate([(64, 64), (96, 64), (64, 96)]):
        picture = Image.new("RGB", size, (40 * i, 90, 200 - 40 * i))
        exif = picture.getexif()
        exif[0x0112] = 6 if i == 1 else 1  # turned by a quarter
        picture.save(root / f"{i}.jpg", exif=exif)
    (root / "0.txt").write_text("a cat", "utf-8")
    of = a_set(folder="my pictures", pictures=None, captions=["", "", "third"])
    assert [r.caption for r in of.records] == ["ohwx, a cat", "a photo of ohwx", "ohwx, third"]
    assert of.load(of.records[1])[0].shape == (64, 64, 3) and "my pictures" in dataset.folder_choices()
    wide = a_set(folder="my pictures", pictures=None, resolution=128)
    assert wide.records[1].bucket[0] <= wide.records[1].bucket[1], "EXIF rotation is ignored"
    before = dataset.OFTDatasetNode.fingerprint_inputs(folder=["my pictures"])
    (root / "1.txt").write_text("a dog", "utf-8")
    assert dataset.OFTDatasetNode.fingerprint_inputs(folder=["my pictures"]) != before
    for bad in ("../outside", "/etc", "missing"):
        raises(ConfigError, lambda bad=bad: a_set(folder=bad, pictures=None), "input folder")
        assert dataset.OFTDatasetNode.validate_inputs(folder=[bad]) is not True
    (root / "9.png").write_bytes(b"not a picture")
    raises(ConfigError, lambda: a_set(folder="my pictures", pictures=None), "9.png")
    (root / "9.png").unlink()


@check
def bad_inputs_are_explained():
    raises(ConfigError, lambda: a_set(pictures=None), "pictures", "folder")
    raises(ConfigError, lambda: a_set(captions=["a", "b", "c"]), "captions", "2")
    raises(ConfigError, lambda: a_set(masks=[torch.ones(3, 8, 8)]), "masks")
    raises(ConfigError, lambda: a_run(config={"prior": "match"}), "class prompt")
    raises(ConfigError, lambda: a_run(config={"rank_pattern": "{"}), "rank_pattern")
    raises(ConfigError, lambda: a_run(config={"layers_to_transform": "one"}), "layers_to_transform")
    raises(ConfigError, lambda: a_run(config={"target_modules": "(("}), "regular expression")
    fresh_user()
    raises(AdapterError, lambda: go(a_run(config={"target_modules": "nothing"})), "target_modules")
    raises(ConfigError, lambda: go(a_run(of_parts=(*parts("sd15")[:2], parts("flux")[2]))), "VAE")
    raises(ConfigError, lambda: go(a_run(name="../../outside")), "name")
    for name in ("", " ", ".", "./"):
        raises(ConfigError, lambda name=name: go(a_run(name=name)), "name", "training/subject")
    for name in ("lr", "weight_decay", "params"):
        raises(ConfigError, lambda name=name: a_run(config={"optimizer_args": json.dumps({name: 1})}), "optimizer_args", name)
    sys.modules["lion_pytorch"] = None  # as if it were not installed
    raises(TrainingError, lambda: go(a_run(config={"optimizer": "lion"})), "lion-pytorch")
    strange = comfy.model_sampling.EDM()
    strange.sigma_data = 0.5
    raises(ConfigError, lambda: train_host._prediction_of(strange), "cannot be trained")


@check
def what_is_not_finite_first_is_named():
    """Latents and embeddings before any step, without advice on the learning rate, and nothing of them in the cache."""
    fresh_user()
    of = a_set(pictures=[pictures(3)], captions=["a", "b", "c"], class_prompt="a dog")
    vae = parts("sd15")[2]
    nan = float("nan")

    def refused(*words, run=None, advice=False):
        run = run or a_run(of=of)
        said = raises(TrainingError, lambda: go(run), "not finite", *words)
        assert ("learning rate" in said.lower()) == advice, said
        return run

    encode = vae.encode
    second = of.load(of.records[1])[0]
    with replaced(vae, "encode", lambda image: encode(image) * (nan if torch.equal(image[0], second) else 1)):
        run = refused("VAE's latent", "picture 2", "--fp32-vae")
        assert run.trainer is None
    embed = train_host.comfy.sd.CLIP.encode_from_tokens_scheduled

    def broken(self, tokens, **options):
        made = embed(self, tokens, **options)
        words = [w[0] for w in tokens["l"][0]]
        wanted = [w[0] for w in self.tokenize("ohwx, b")["l"][0]]
        return [[cond * (nan if words == wanted else 1), more] for cond, more in made]

    with replaced(train_host.comfy.sd.CLIP, "encode_from_tokens_scheduled", broken):
        refused("text embedding of 'ohwx, b'", "--fp32-text-enc")
    run = a_run(of=of)
    predict = run.host.predict
    run.host.predict = lambda *a: predict(*a) * nan
    refused("the model's output for picture", "step 1", "also without what was trained", run=run)
    run = a_run(of=of, config={"prior": "pictures", "class_pictures": 2})
    draw = run.host.sample_latent
    run.host.sample_latent = lambda *a: draw(*a) * nan
    refused("class picture 1", run=run)
    # Text encoders that are trained were finite before the first step.
    run = a_run(of=of, config={"text_encoder_lr": 0.01}, steps=3)
    tokens = run.host.encoders.encode_token_weights

    def later(*a):
        cond, *more = tokens(*a)
        return (cond * (nan if run.trainer and run.trainer.step == 1 else 1), *more)

    with replaced(run.host.encoders, "encode_token_weights", later):
        refused("text embedding", "text encoders", run=run, advice=True)
    del run.host.encoders.encode_token_weights
    # The cache holds none of it.
    fine = go(a_run(of=of))
    assert all(map(math.isfinite, fine.losses))
    for where, values in (("picture", pictures()), ("mask", torch.ones(1, 64, 64))):
        values[0, 3, 4] = nan
        given = {"pictures": [values]} if where == "picture" else {"masks": [values]}
        raises(ConfigError, lambda given=given: a_set(**given), "not finite", f"{where} 1")


# --- what is said about it ----------------------------------------------------------------------------------


def said_in(lang):
    return json.loads((REPO / "locales" / lang / "nodeDefs.json").read_text("utf-8"))


@check
def promises_about_going_on_are_kept():
    """How long runs are kept, and which schedule lets a run go on, in tooltips and help pages of both languages."""
    pages = {"en": "OFT_Train.md", "zh": "OFT_Train/zh.md"}
    kept = [str(train_store.KEPT_RUNS), str(train_store.KEPT_DAYS)]
    for lang, page in pages.items():
        tip = said_in(lang)["OFT_Train"]["inputs"]["resume"]["tooltip"]
        rows = (REPO / "web" / "docs" / page).read_text("utf-8").splitlines()
        row = next(row for row in rows if row.startswith("| `resume`"))
        for where, text in (("tooltip", tip), ("page", row)):
            assert all(n in re.findall(r"\d+", text) for n in kept) and "constant" in text, (lang, where, text)


@check
def options_of_the_diffusion_model_say_so():
    for lang, words in (("en", ("diffusion model", "text encoders")), ("zh", ("扩散模型", "文本编码器"))):
        inputs = said_in(lang)["OFT_TrainConfig"]["inputs"]
        for name in ("target_modules", "exclude_modules", "conv_modules", "layers_to_transform"):
            assert any(w in inputs[name]["tooltip"] for w in words), (lang, name)
        assert "joint_blocks" in inputs["layers_pattern"]["tooltip"], lang
    own = a_run(config={"target_modules": "to_q", "text_encoder_lr": 0.01}).plan.parts()
    assert own["te"].target_modules == "attention", "the tooltips are wrong"


@check
def help_pages_lead_to_what_their_readers_have():
    """The published pack leaves out what .comfyignore names: pages lead there by the repository's address."""
    left_out = [line.strip("/\n") for line in (REPO / ".comfyignore").read_text("utf-8").splitlines() if line.strip()]
    address = re.search(r'^Repository = "(.+)"', (REPO / "pyproject.toml").read_text("utf-8"), re.MULTILINE)[1]
    texts = [*(REPO / "web").rglob("*.md"), *(REPO / "locales").rglob("*.json")]
    found = 0
    for path in texts:
        text = path.read_text("utf-8")
        for match in re.finditer(rf"(?<![\w/])(?:{'|'.join(map(re.escape, left_out))})/[\w./]+", text):
            raise AssertionError(f"{path.relative_to(REPO)}: {match[0]}")
        for place in re.findall(re.escape(address) + r"/blob/main/([\w./-]+\w)", text):
            assert (REPO / place).is_file(), (path, place)
            found += 1
    assert found >= 4, found


if __name__ == "__main__":
    sys.exit(run_checks(wanted))
