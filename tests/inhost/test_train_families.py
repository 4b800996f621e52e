"""Training: every family, storage and kind of adapter."""

from __future__ import annotations

import logging

import comfy.model_management
import comfy.model_sampling
import comfy.sd
import comfy.supported_models
import comfy.utils
import families
import torch
from comfyui_oft.nodes import save
from comfyui_oft.nodes.binding import apply as host
from comfyui_oft.nodes.binding import folders
from comfyui_oft.nodes.binding import names as host_names
from comfyui_oft.nodes.training import host as train_host
from comfyui_oft.nodes.training import mode as train_mode
from comfyui_oft.oft_core import Diff, Strength
from comfyui_oft.oft_core.errors import FormatError
from comfyui_oft.oft_core.training import (
    ConfigError,
)
from learning import (
    a_run,
    fixed_loss,
    fresh_user,
    go,
    merged,
    parts,
    raises,
    replaced,
    same,
    state,
    untouched,
    zeros,
)
from safetensors.torch import load_file


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
    print(f"{was:.4f} -> {now:.4f}; picture {off:.4f}, moved {moved:.3f}")


def test_sd15_trains():
    family_trains("sd15", prediction="eps")


def test_sd2_with_v_prediction_trains():
    model, clip, vae = parts("sd2")
    with torch.inference_mode():

        class Sampling(comfy.model_sampling.ModelSamplingDiscrete, comfy.model_sampling.V_PREDICTION):
            pass

        model = model.clone()
        model.add_object_patch("model_sampling", Sampling(model.model.model_config))
    family_trains("sd2", of_parts=(model, clip, vae), prediction="v")


def test_sdxl_trains():
    family_trains("sdxl", prediction="eps")


def test_sd3_trains():
    family_trains("sd3", prediction="flow")


def test_sd35_trains():
    family_trains("sd35", prediction="flow")


def test_flux_trains():
    family_trains("flux", prediction="flow")


def merged_weights(model, adapter):
    with torch.inference_mode():
        return merged(host.apply(adapter, model, None, Strength(1.0), Strength(1.0)).model)


def test_biases_and_whole_modules_train():
    """What is trained beside the rotations is in the file: it draws the trained pictures, other tools get it."""
    for family, config, part, prediction in (
        ("sd15", {"bias": "all", "modules_to_save": "out"}, "out.2.weight", "eps"),
        ("flux", {"bias": "oft_only", "modules_to_save": "final_layer"}, "final_layer.linear.weight", "flow"),
    ):
        family_trains(family, config=config, prediction=prediction, learning_rate=0.02)
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


def test_a_weight_of_two_names_is_in_the_file_once():
    """SDXL's `label_emb` has two names in diffusers' layout. What the file does is what was trained."""
    whole = {"target_modules": "all-linear", "bias": "all", "modules_to_save": "out"}
    family_trains("sdxl", config=whole, prediction="eps", learning_rate=0.01)
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


def test_fp8_base_trains():
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


def test_packed_base_trains():
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


def test_half_precision_bases_train():
    """Models loaded as fp16 and bf16, computing in that type: loss falls, the file draws the pictures."""
    for family, dtype in (("sd15", torch.float16), ("flux", torch.bfloat16)):
        with torch.inference_mode():
            model = families.make_model(family, dtype=dtype)
        assert model.model.get_dtype() == dtype
        seen = set()
        hook = model.model.diffusion_model.register_forward_pre_hook(lambda m, a, s=seen: s.add(a[0].dtype))
        fresh_user()
        run = a_run(family, of_parts=(model, *parts(family)[1:]), steps=15, learning_rate=0.03)
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
        full = a_run(family, steps=15, learning_rate=0.03)
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


def test_gguf_base_trains():
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


def test_core_reads_what_is_written_for_it():
    """ComfyUI's own loader makes the same weights of our files at strength 1, biases and whole layers included."""
    for family, extra in (
        ("sd15", {"modules_to_save": "out"}),
        ("sdxl", {"conv_modules": "all-conv"}),
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
