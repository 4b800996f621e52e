"""OFT Schedule and Create Hook OFT in a running ComfyUI, against samplers that stop after every step."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import save_file

from dev.client import Client, Graph, PromptFailed, PromptRejected
from dev.oft_files import write_random_oft
from dev.workflows import Parts, stock_parts

STEPS = 4
# ComfyUI's "normal" scheduler on a U-Net: four steps at these shares of the noise schedule.
PROGRESS = (0.0, 1 / 3, 2 / 3, 1.0)
FILE, OTHER, SD3 = "schedule/one.safetensors", "schedule/two.safetensors", "schedule/sd3.safetensors"
TEXT, TEXT_2, NEGATIVE = "a red cat on a table", "a blue dog in the snow", "blurry"
Adapt = Callable[[Graph, Parts], Parts]


@pytest.fixture(scope="module")
def files(models: Path, oft_dir: Path) -> None:
    base = models / "checkpoints" / "tiny_sd15.safetensors"
    write_random_oft(base, oft_dir / FILE, degrees=40, text_encoder=False)
    write_random_oft(base, oft_dir / OTHER, degrees=40, block_size=16, text_encoder=False, seed=3)
    write_random_oft(models / "diffusion_models" / "tiny_sd3.safetensors", oft_dir / SD3, degrees=40)


def sample(g: Graph, model, conds, latent=None, start: int = 0, end: int = 10000):
    """KSampler (Advanced) from one step to another; without a latent it begins with noise."""
    first = latent is None
    latent = latent or g.EmptyLatentImage(width=64, height=64, batch_size=1)[0]
    return g.KSamplerAdvanced(
        model=model,
        positive=conds[0],
        negative=conds[1],
        latent_image=latent,
        noise_seed=42,
        steps=STEPS,
        cfg=3.0,
        sampler_name="euler",
        scheduler="normal",
        add_noise="enable" if first else "disable",
        start_at_step=start,
        end_at_step=end,
        return_with_leftover_noise="enable" if end < STEPS else "disable",
    )[0]


def encode(g: Graph, parts: Parts) -> tuple:
    return (
        g.CLIPTextEncode(clip=parts.clip, text=TEXT)[0],
        g.CLIPTextEncode(clip=parts.clip, text=NEGATIVE)[0],
    )


def drawn(client: Client, g: Graph, parts: Parts, latent) -> np.ndarray:
    preview = g.PreviewImage(images=g.VAEDecode(samples=latent, vae=parts.vae))
    return client.run(g).image(preview).astype(int)


_kept: dict[float | None, np.ndarray] = {}


def plain(client: Client, s: float | None = None) -> np.ndarray:
    """The base picture, or the one with the file at a strength that stays; each drawn once."""
    if s not in _kept:
        _kept[s] = picture(client, None if s is None else loaded(s))
    return _kept[s]


def picture(client: Client, adapt: Adapt | None = None) -> np.ndarray:
    g = Graph()
    parts = stock_parts(g, "sd15")
    parts = adapt(g, parts) if adapt else parts
    return drawn(client, g, parts, sample(g, parts.model, encode(g, parts)))


def by_hand(
    client: Client, strengths: list[float], name: str = FILE, then: Adapt | None = None
) -> np.ndarray:
    """The picture of a sampler that is stopped after every step and goes on with the file at another
    strength.
    """
    g = Graph()
    parts = stock_parts(g, "sd15")
    conds = encode(g, parts)
    latent = None
    for i, s in enumerate(strengths):
        one = loaded(s, name)(g, parts)
        one = then(g, one) if then else one
        latent = sample(g, one.model, conds, latent, i, i + 1)
    return drawn(client, g, parts, latent)


def loaded(s: float, name: str = FILE) -> Adapt:
    def add(g: Graph, parts: Parts) -> Parts:
        return parts._replace(
            model=g.OFT_LoadModelOnly(model=parts.model, oft_name=name, strength_model=s)[0]
        )

    return add


def scheduled(
    curve: str, s: float = 1.0, start: float = 0.0, end: float = 1.0, name: str = FILE, keyframes=None, **more
) -> Adapt:
    def add(g: Graph, parts: Parts) -> Parts:
        inputs = {"hook_kf": keyframes(g)} if keyframes else {}
        adapter = g.OFT_Schedule(
            adapter=g.OFT_LoadAdapter(oft_name=name)[0],
            start_percent=start,
            end_percent=end,
            curve=curve,
            **inputs,
        )
        node = g.OFT_Apply(adapter=adapter[0], model=parts.model, strength_model=s, strength_clip=s, **more)
        return parts._replace(model=node[0])

    return add


def near(a: np.ndarray, b: np.ndarray) -> bool:
    return bool(np.abs(a - b).max() <= 1)


# --- on its own ---------------------------------------------------------------------------------------------


def test_a_constant_is_the_static_strength(client: Client, files: None) -> None:
    base = plain(client)
    for curve, s in (("constant", 0.8), ("0:0.5, 1:0.5", 0.4), ("step 0:1", 0.8)):
        got = picture(client, scheduled(curve, 0.8))
        assert (got == picture(client, loaded(s))).all()
        assert not near(got, base)
    assert (picture(client, scheduled("0:0")) == base).all()


CURVES = {
    ("step 0:0, 0.5:1", 0.0, 1.0): [0, 0, 1, 1],
    ("0:1, 1:-0.5", 0.0, 1.0): [1, 0.5, 0, -0.5],
    ("constant", 0.3, 0.7): [0, 1, 1, 0],
    ("0:0, 0.3:1, 1:0.5", 0.0, 0.9): [0, 1 - 0.5 * (1 / 3 - 0.3) / 0.7, 1 - 0.5 * (2 / 3 - 0.3) / 0.7, 0],
}


@pytest.mark.parametrize("curve", CURVES, ids=lambda c: f"{c[0]} {c[1]}-{c[2]}")
def test_a_curve_is_the_sampler_stopped_after_each_step(client: Client, files: None, curve: tuple) -> None:
    text, start, end = curve
    got = picture(client, scheduled(text, 0.9, start, end))
    expected = by_hand(client, [0.9 * f for f in CURVES[curve]])
    assert near(got, expected)
    assert not near(got, plain(client, 0.9)) and not near(got, plain(client))


def test_activations_follow_too(client: Client, files: None) -> None:
    got = picture(client, scheduled("0:1, 1:-0.5", 0.9, runtime="activations"))
    assert near(got, picture(client, scheduled("0:1, 1:-0.5", 0.9)))
    assert not near(got, plain(client, 0.9))


def test_another_family(client: Client, files: None) -> None:
    """A flow model: the two ways of applying agree, and the schedule shows."""
    ways = [picture_sd3(client, scheduled("linear", name=SD3, runtime=r)) for r in ("weights", "activations")]
    assert near(*ways)
    assert not near(ways[0], picture_sd3(client, loaded(1.0, SD3))) and not near(ways[0], picture_sd3(client))
    assert near(picture_sd3(client, scheduled("0:0.5", name=SD3)), picture_sd3(client, loaded(0.5, SD3)))


def picture_sd3(client: Client, adapt: Adapt | None = None) -> np.ndarray:
    g = Graph()
    parts = stock_parts(g, "sd3")
    parts = adapt(g, parts) if adapt else parts
    latent = g.EmptySD3LatentImage(width=64, height=64, batch_size=1)
    samples = g.KSampler(
        model=parts.model,
        positive=encode(g, parts)[0],
        negative=encode(g, parts)[1],
        latent_image=latent,
        seed=42,
        steps=STEPS,
        cfg=3.0,
        sampler_name="euler",
        scheduler="normal",
        denoise=1.0,
    )
    return drawn(client, g, parts, samples)


def test_several_schedules_and_neighbours(client: Client, files: None) -> None:
    def both(g: Graph, parts: Parts) -> Parts:
        return scheduled("step 0:1, 0.5:0", 0.7, name=OTHER)(g, scheduled("linear", 0.9)(g, parts))

    g = Graph()
    parts = stock_parts(g, "sd15")
    conds, latent = encode(g, parts), None
    for i, p in enumerate(PROGRESS):
        one = loaded(0.7 if i < 2 else 0.0, OTHER)(g, loaded(0.9 * p)(g, parts))
        latent = sample(g, one.model, conds, latent, i, i + 1)
    assert near(picture(client, both), drawn(client, g, parts, latent))

    def with_static(g: Graph, parts: Parts) -> Parts:
        return loaded(0.6, OTHER)(g, scheduled("linear", 0.9)(g, parts))

    assert near(
        picture(client, with_static), by_hand(client, [0.9 * p for p in PROGRESS], then=loaded(0.6, OTHER))
    )


def test_nothing_stays_behind(client: Client, files: None) -> None:
    base, static = plain(client), plain(client, 0.9)
    first = picture(client, scheduled("0:1, 1:-0.5", 0.9))
    assert (picture(client) == base).all()
    assert (picture(client, loaded(0.9)) == static).all()
    client.free()
    assert (picture(client, scheduled("0:1, 1:-0.5", 0.9)) == first).all()


def test_in_a_stack(client: Client, files: None) -> None:
    def stacked(how: str) -> Adapt:
        def add(g: Graph, parts: Parts) -> Parts:
            adapter = g.OFT_Schedule(
                adapter=g.OFT_LoadAdapter(oft_name=FILE)[0],
                start_percent=0.0,
                end_percent=1.0,
                curve="linear",
            )
            stack = g.OFT_Stack(
                mode="rotation",
                coft="file",
                adapter_1=adapter[0],
                strength_model_1=0.9,
                oft_name_2=OTHER,
                strength_model_2=0.6,
            )
            return parts._replace(model=g.OFT_ApplyStack(stack=stack[0], model=parts.model, how=how)[0])

        return add

    expected = by_hand(client, [0.9 * p for p in PROGRESS], then=loaded(0.6, OTHER))
    assert near(picture(client, stacked("compose")), expected)
    with pytest.raises(PromptFailed, match="schedule cannot be blended"):
        picture(client, stacked("blend"))


# --- with ComfyUI's keyframes and hooks ---------------------------------------------------------------------


def frames(*steps: tuple[float, float]):
    def make(g: Graph):
        group = None
        for percent, strength in steps:
            more = {"prev_hook_kf": group} if group else {}
            group = g.CreateHookKeyframe(strength_mult=strength, start_percent=percent, **more)[0]
        return group

    return make


def hooked(
    client: Client,
    s: float = 1.0,
    keyframes=None,
    curve: str | None = None,
    on: str = "both",
    model: Adapt | None = None,
    name: str = FILE,
) -> np.ndarray:
    """A picture with the file as a hook on the conditionings."""
    g = Graph()
    parts = stock_parts(g, "sd15")
    adapter = g.OFT_LoadAdapter(oft_name=name)[0]
    if curve is not None:
        adapter = g.OFT_Schedule(adapter=adapter, start_percent=0.0, end_percent=1.0, curve=curve)[0]
    hooks = g.OFT_Hook(adapter=adapter, strength_model=s, strength_clip=s, mode="rotation", coft="file")[0]
    if keyframes is not None:
        hooks = g.SetHookKeyframes(hooks=hooks, hook_kf=keyframes(g))[0]
    positive, negative = encode(g, parts)
    set_hooks = {"strength": 1.0, "set_cond_area": "default", "hooks": hooks}
    if on in ("both", "positive"):
        positive = g.ConditioningSetProperties(cond_NEW=positive, **set_hooks)[0]
    if on in ("both", "negative"):
        negative = g.ConditioningSetProperties(cond_NEW=negative, **set_hooks)[0]
    parts = model(g, parts) if model else parts
    return drawn(client, g, parts, sample(g, parts.model, (positive, negative)))


def test_keyframes_of_the_host_make_a_schedule(client: Client, files: None) -> None:
    kf = frames((0.0, 0.2), (0.3, 1.0), (0.9, -0.5))
    expected = by_hand(client, [0.9 * f for f in (0.2, 1.0, 1.0, -0.5)])
    assert near(picture(client, scheduled("constant", 0.9, keyframes=kf)), expected)
    assert near(hooked(client, 0.9, kf), expected)


def test_a_hook_without_keyframes_is_the_static_strength(client: Client, files: None) -> None:
    assert near(hooked(client, 0.8), picture(client, loaded(0.8)))
    assert near(hooked(client, 0.8, name=OTHER, model=loaded(0.5)), picture(client, two_loaded(0.5, 0.8)))


def two_loaded(one: float, two: float) -> Adapt:
    return lambda g, parts: loaded(two, OTHER)(g, loaded(one)(g, parts))


def test_a_hook_follows_the_adapters_own_schedule(client: Client, files: None) -> None:
    got = hooked(client, 0.9, curve="step 0:0, 0.5:1")
    assert near(got, by_hand(client, [0, 0, 0.9, 0.9]))
    rising = hooked(client, 0.9, curve="linear")
    expected = by_hand(client, [0.9 * p for p in PROGRESS])
    assert np.abs(rising - expected).mean() < 0.1 * np.abs(plain(client, 0.9) - expected).mean()


def test_hooks_act_on_their_conditioning_alone(client: Client, files: None) -> None:
    both, positive, negative = (hooked(client, 0.9, on=on) for on in ("both", "positive", "negative"))
    base = plain(client)
    for i, one in enumerate((both, positive, negative, base)):
        for other in (both, positive, negative, base)[:i]:
            assert not near(one, other)


def test_a_schedule_under_hooks_and_several_conditionings(client: Client, files: None) -> None:
    """A scheduled file in the model, another as a hook: on both sides it is the second file on top; on one
    side
    only, the sampler stopped by hand with the same hook agrees.
    """
    factors = [0.9 * p for p in PROGRESS]
    got = hooked(client, 0.6, model=scheduled("linear", 0.9), name=OTHER)
    assert near(got, by_hand(client, factors, then=loaded(0.6, OTHER)))

    def with_hook(adapt: Adapt | None, strengths: list[float] | None) -> np.ndarray:
        g = Graph()
        parts = stock_parts(g, "sd15")
        hooks = g.OFT_Hook(
            adapter=g.OFT_LoadAdapter(oft_name=OTHER)[0],
            strength_model=0.6,
            strength_clip=0.6,
            mode="rotation",
            coft="file",
        )[0]
        positive, negative = encode(g, parts)
        second = g.CLIPTextEncode(clip=parts.clip, text=TEXT_2)[0]
        second = g.ConditioningSetProperties(
            cond_NEW=second, strength=0.7, set_cond_area="default", hooks=hooks
        )[0]
        conds = (g.ConditioningCombine(conditioning_1=positive, conditioning_2=second)[0], negative)
        if strengths is None:
            latent = sample(g, adapt(g, parts).model, conds)
        else:
            latent = None
            for i, s in enumerate(strengths):
                latent = sample(g, loaded(s)(g, parts).model, conds, latent, i, i + 1)
        return drawn(client, g, parts, latent)

    mixed = with_hook(scheduled("linear", 0.9), None)
    assert near(mixed, with_hook(None, factors))
    assert not near(mixed, got) and not near(mixed, picture(client, scheduled("linear", 0.9)))


def test_text_encoder_hooks(client: Client, models: Path, oft_dir: Path, files: None) -> None:
    """A file with layers of the text encoder alone, as a hook on CLIP, gives what loading it gives."""
    from safetensors.torch import load_file

    write_random_oft(
        models / "checkpoints" / "tiny_sd15.safetensors", oft_dir / "schedule" / "all.safetensors"
    )
    tensors = load_file(oft_dir / "schedule" / "all.safetensors")
    save_file(
        {k: v for k, v in tensors.items() if k.startswith("lora_te")}, oft_dir / "schedule" / "te.safetensors"
    )

    def draw(hook: bool) -> np.ndarray:
        g = Graph()
        parts = stock_parts(g, "sd15")
        adapter = g.OFT_LoadAdapter(oft_name="schedule/te.safetensors")[0]
        if hook:
            hooks = g.OFT_Hook(
                adapter=adapter, strength_model=1.0, strength_clip=0.7, mode="rotation", coft="file"
            )[0]
            clip = g.SetClipHooks(clip=parts.clip, hooks=hooks, apply_to_conds=True, schedule_clip=False)[0]
        else:
            clip = g.OFT_Apply(adapter=adapter, clip=parts.clip, strength_model=1.0, strength_clip=0.7)[1]
        parts = parts._replace(clip=clip)
        return drawn(client, g, parts, sample(g, parts.model, encode(g, parts)))

    got = draw(True)
    assert near(got, draw(False)) and not near(got, plain(client))


# --- what people read ---------------------------------------------------------------------------------------


def test_reports(client: Client, files: None) -> None:
    g = Graph()
    parts = stock_parts(g, "sd15")
    node = g.OFT_Schedule(
        adapter=g.OFT_LoadAdapter(oft_name=FILE)[0], start_percent=0.2, end_percent=0.9, curve="0.2:0, 0.6:1"
    )
    applied = g.OFT_Apply(adapter=node[0], model=parts.model, strength_model=1.0, strength_clip=1.0)
    g.PreviewAny(source=applied[2])
    result = client.run(g)
    assert "From 0.2 to 0.9" in result.text(node) and "0.25 -> 0.125" in result.text(node)
    assert "Strength follows a schedule from 0.2 to 0.9: 0.2:0, 0.6:1." in result.text(applied)


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        ({"curve": "cubic"}, "linear, cosine"),
        ({"curve": "0:0, 2:1"}, "2:1"),
        ({"start_percent": 0.8, "end_percent": 0.3}, "0.8 to 0.3"),
    ],
)
def test_bad_schedules_are_rejected_before_the_run(
    client: Client, files: None, inputs: dict, words: str
) -> None:
    g = Graph()
    parts = scheduled("constant")(g, stock_parts(g, "sd15"))
    next(n for n in g.nodes.values() if n.class_type == "OFT_Schedule").set(**inputs)
    g.PreviewImage(images=g.VAEDecode(samples=sample(g, parts.model, encode(g, parts)), vae=parts.vae))
    with pytest.raises(PromptRejected) as rejected:
        client.run(g)
    assert words in str(rejected.value)


def test_a_hook_for_another_model_is_explained(client: Client, files: None) -> None:
    with pytest.raises(PromptFailed, match="Stable Diffusion"):
        hooked(client, name=SD3)
