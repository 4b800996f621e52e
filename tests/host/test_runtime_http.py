"""Turned activations in a running ComfyUI, over HTTP: pictures against weight patches and baked models."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from dev.client import Client, Graph, PromptFailed, PromptRejected
from dev.server import ComfyServer
from dev.workflows import Parts, stock_parts, text_to_image, tiny_parts
from oft_core.cli import main

ATTENTION = r"attn\d?\.(to_|qkv|proj)|_attn\.(qkv|proj)|linear[12]|mlp|proj_in|in_layers\.2|ff\.net"
STOCK = {
    "sd15": ("checkpoints/tiny_sd15", "model.diffusion_model."),
    "sd2": ("diffusion_models/tiny_sd2", ""),
    "sdxl": ("diffusion_models/tiny_sdxl", ""),
    "sd3": ("diffusion_models/tiny_sd3", ""),
}
FAMILIES = (*STOCK, "flux")
SIDES = {"sd15": "out", "sd2": "in", "sdxl": "out", "sd3": "in", "flux": "in"}


# --- files --------------------------------------------------------------------------------------------------


def numbers(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def modules_of(shapes: dict[str, tuple[int, ...]], prefix: str) -> dict[str, tuple[int, ...]]:
    """kohya's names for linear layers and convolutions of a diffusion model with its own names."""
    return {
        "lora_unet_" + k.removeprefix(prefix).removesuffix(".weight").replace(".", "_"): s
        for k, s in shapes.items()
        if k.startswith(prefix) and k.endswith(".weight") and len(s) in (2, 4) and re.search(ATTENTION, k)
    }


def make_oft(
    modules: dict[str, tuple[int, ...]], side: str, seed: int = 0, block: int = 8
) -> dict[str, torch.Tensor]:
    """Random LyCORIS (out) or OneTrainer (in) tensors, angles of some ten degrees."""
    out = {}
    for i, (name, shape) in enumerate(modules.items(), seed):
        length = shape[0] if side == "out" else int(np.prod(shape[1:]))
        if length % block:
            continue
        if side == "out":
            out[f"{name}.oft_blocks"] = numbers(length // block, block, block, seed=i) * 0.04
            out[f"{name}.alpha"] = torch.tensor(0.0)
        else:
            out[f"{name}.oft_R.weight"] = numbers(length // block, block * (block - 1) // 2, seed=i) * 0.08
    assert len(out) > 10
    return out


def shapes_in(path: Path) -> dict[str, tuple[int, ...]]:
    with safe_open(path, "pt") as f:
        return {k: tuple(f.get_slice(k).get_shape()) for k in f.keys()}  # noqa: SIM118 (a file handle, not a dict)


@pytest.fixture(scope="module")
def files(client: Client, host: ComfyServer, models: Path, oft_dir: Path) -> dict[str, str]:
    """Adapters by family; those with a 2 have the other side."""
    names = {}
    (oft_dir / "runtime").mkdir(exist_ok=True)
    for family in FAMILIES:
        if family == "flux":
            g = Graph()
            g.Tiny_SaveWeights(pattern=".", filename="flux_weights", model=tiny_parts(g, "flux").model)
            client.run(g)
            shapes, prefix = shapes_in(host.output / "flux_weights.safetensors"), "diffusion_model."
        else:
            base, prefix = STOCK[family]
            shapes = shapes_in(models / f"{base}.safetensors")
        modules = modules_of(shapes, prefix)
        for name, side in (
            (family, SIDES[family]),
            (f"{family}2", {"in": "out", "out": "in"}[SIDES[family]]),
        ):
            names[name] = f"runtime/{name}.safetensors"
            save_file(make_oft(modules, side, seed=len(name)), oft_dir / names[name])
        if family == "sd3":
            # Of one side, so that their order matters.
            names["again"] = "runtime/again.safetensors"
            save_file(make_oft(modules, SIDES[family], seed=50), oft_dir / names["again"])
    return names


# --- graphs -------------------------------------------------------------------------------------------------


def oft(name: str, strength: float = 1.0, runtime: str | None = None, **more: object):
    """An adapter step of `text_to_image`; without runtime the input is left out, as in older graphs."""

    def add(g: Graph, parts: Parts) -> Parts:
        inputs = {"strength_model": strength, "strength_clip": strength, **more}
        if runtime is not None:
            inputs["runtime"] = runtime
        node = g.OFT_Load(model=parts.model, clip=parts.clip, oft_name=name, **inputs)
        return Parts(node[0], node[1], parts.vae)

    return add


def lora(name: str, strength: float = 1.0):
    def add(g: Graph, parts: Parts) -> Parts:
        node = g.LoraLoader(
            model=parts.model,
            clip=parts.clip,
            lora_name=name,
            strength_model=strength,
            strength_clip=strength,
        )
        return Parts(node[0], node[1], parts.vae)

    return add


def chain(*steps):
    def add(g: Graph, parts: Parts) -> Parts:
        for step in steps:
            parts = step(g, parts)
        return parts

    return add


def parts_of(g: Graph, family: str) -> Parts:
    return tiny_parts(g, family) if family == "flux" else stock_parts(g, family)


def unet(name: str, dtype: str = "default"):
    """The family's parts with another diffusion model file, or its own in another dtype."""

    def build(g: Graph, family: str) -> Parts:
        rest = stock_parts(g, family)
        return Parts(g.UNETLoader(unet_name=name, weight_dtype=dtype)[0], rest.clip, rest.vae)

    return build


def packed(g: Graph, family: str) -> Parts:
    rest = tiny_parts(g, family)
    return Parts(g.Tiny_Packed(family=family)[0], rest.clip, rest.vae)


def picture(client: Client, family: str, adapter=None, parts=parts_of) -> np.ndarray:
    g = Graph()
    preview = text_to_image(g, parts(g, family), family, adapter=adapter)
    return client.run(g).image(preview).astype(int)


def report(client: Client, family: str, name: str, parts=parts_of, **more: object) -> str:
    g = Graph()
    made = parts(g, family)
    node = g.OFT_LoadModelOnly(model=made.model, oft_name=name, strength_model=1.0, **more)
    g.PreviewAny(source=node[1])
    return client.run(g).text(node)


def far(a: np.ndarray, b: np.ndarray) -> int:
    return int(np.abs(a.astype(int) - b).max())


# --- the same pictures --------------------------------------------------------------------------------------


@pytest.mark.parametrize("other_side", [False, True], ids=["", "other-side"])
@pytest.mark.parametrize("family", FAMILIES)
def test_picture_equals_that_of_weight_patches(
    client: Client, files: dict[str, str], family: str, other_side: bool
) -> None:
    name = files[f"{family}2" if other_side else family]
    plain = picture(client, family)
    merged = picture(client, family, oft(name, 0.8, "weights"))
    live = picture(client, family, oft(name, 0.8, "activations"))
    assert far(live, merged) <= 2
    assert far(live, plain) > 3, "the adapter must show, or this says nothing"
    assert (picture(client, family) == plain).all(), "the base afterwards"


def test_any_number_and_a_lora_between(client: Client, host: ComfyServer, files: dict[str, str]) -> None:
    name = "lora_unet_joint_blocks_{}_x_block_attn_qkv"
    tensors = {}
    for i in range(2):
        tensors[f"{name.format(i)}.lora_up.weight"] = numbers(384, 8, seed=i) * 0.4
        tensors[f"{name.format(i)}.lora_down.weight"] = numbers(8, 128, seed=i + 9) * 0.4
    save_file(tensors, host.models / "loras" / "runtime_lora.safetensors")
    between = lora("runtime_lora.safetensors")
    first, second = ((files["sd3"], 0.8), (files["again"], -0.9))

    def both(how: str, *order: str) -> np.ndarray:
        steps = {"1": oft(*first, how), "2": oft(*second, how), "l": between}
        return picture(client, "sd3", chain(*(steps[o] for o in order)))

    seen = []
    for order in ("12", "21", "1l2", "l12", "12l"):
        live, merged = both("activations", *order), both("weights", *order)
        assert far(live, merged) <= 2, order
        seen.append(merged)
    for i, one in enumerate(seen):
        assert all(far(one, other) > 4 for other in seen[:i]), "orders must differ, or this says nothing"


def test_text_encoders(client: Client, oft_dir: Path, files: dict[str, str]) -> None:
    stem = "lora_te_text_model_encoder_layers_{}_self_attn_{}_proj"
    modules = {stem.format(i, p): (768, 768) for i in range(4) for p in ("q", "k", "v", "out")}
    save_file(make_oft(modules, "out"), oft_dir / "runtime" / "text.safetensors")
    seen = [
        picture(client, "sd15", oft("runtime/text.safetensors", 1.0, how))
        for how in ("activations", "weights")
    ]
    assert far(*seen) <= 2 and far(seen[0], picture(client, "sd15")) > 2


# --- failures -----------------------------------------------------------------------------------------------


def scheduled(name: str):
    """The adapter rising to its strength, its activations turned."""

    def add(g: Graph, parts: Parts) -> Parts:
        adapter = g.OFT_Schedule(
            adapter=g.OFT_LoadAdapter(oft_name=name)[0], start_percent=0.0, end_percent=1.0, curve="linear"
        )
        given = {"strength_model": 1.0, "strength_clip": 1.0, "runtime": "activations"}
        node = g.OFT_Apply(adapter=adapter[0], model=parts.model, clip=parts.clip, **given)
        return Parts(node[0], node[1], parts.vae)

    return add


@pytest.mark.parametrize(
    ("family", "layer"),
    [
        ("sd15", "middle_block.1.transformer_blocks.0.attn1.to_q$"),
        ("sd3", "joint_blocks.1.x_block.attn.qkv$"),
    ],
)
def test_nothing_is_left_of_a_failure_in_mid_sampling(
    client: Client, files: dict[str, str], family: str, layer: str
) -> None:
    """Raised in the second of three steps, between turned layers: whatever is drawn next is what it always was."""

    def drawn(adapter=None) -> np.ndarray:
        g = Graph()
        preview = text_to_image(g, parts_of(g, family), family, adapter=adapter, steps=3)
        result = client.run(g)
        assert preview.id not in result.cached, "nothing was sampled"
        return result.image(preview)

    def failing(g: Graph, parts: Parts) -> Parts:
        return Parts(g.Tiny_Failure(model=parts.model, step=1, layer=layer)[0], parts.clip, parts.vae)

    name = files[family]
    kinds = {
        "base": None,
        "activations": oft(name, 0.8, "activations"),
        "weights": oft(name, 0.8, "weights"),
        "scheduled": scheduled(name),
    }
    before = {kind: drawn(adapter) for kind, adapter in kinds.items()}
    assert far(before["scheduled"], before["activations"]) > 2 < far(before["base"], before["scheduled"])
    for fails, afterwards in (("activations", kinds), ("scheduled", ("base", "scheduled"))):
        for kind in afterwards:
            adapter = kinds[kind]
            with pytest.raises(PromptFailed) as failed:
                drawn(chain(kinds[fails], failing))
            assert re.search("on purpose: step 1, behind .*" + layer, failed.value.text), failed.value.text
            assert (drawn(adapter) == before[kind]).all(), f"{kind} after {fails} failed"


# --- quantised models ---------------------------------------------------------------------------------------


def baked_from(
    host: ComfyServer, models: Path, adapter: str, state: dict[str, torch.Tensor], name: str
) -> str:
    """A float32 model file: the adapter merged into `state` by the command line."""
    folder = host.models / "diffusion_models"
    folder.mkdir(parents=True, exist_ok=True)
    base = folder / f"{name}_base.safetensors"
    save_file(state, base)
    out = folder / f"{name}.safetensors"
    assert (
        main(["merge", str(host.models / "oft" / adapter), str(base), "-o", str(out), "--dtype", "fp32"]) == 0
    )
    base.unlink()
    return out.name


@pytest.mark.parametrize("kind", ["fp8", "scaled"])
def test_fp8_models(
    client: Client, host: ComfyServer, models: Path, files: dict[str, str], kind: str
) -> None:
    """Nothing is rounded again: the picture of the file merged in float32 into what the fp8 model means."""
    state = load_file(models / "diffusion_models" / "tiny_sd3.safetensors")
    matrices = {k for k, v in state.items() if v.ndim == 2 and k.endswith(".weight")}
    fp8 = torch.float8_e4m3fn
    if kind == "fp8":
        # ComfyUI's loader rounds every parameter.
        means = {k: v.to(fp8).float() for k, v in state.items()}
        parts = unet("tiny_sd3.safetensors", "fp8_e4m3fn")
    else:
        stored, means = {"scaled_fp8": torch.zeros(0, dtype=fp8)}, {}
        for key, value in state.items():
            if key in matrices:
                scale = value.float().abs().max() / 448
                stored[key] = (value.float() / scale).to(fp8)
                stored[key.removesuffix("weight") + "scale_weight"] = scale
                means[key] = stored[key].float() * scale
            else:
                stored[key], means[key] = value, value.float()
        (host.models / "diffusion_models").mkdir(exist_ok=True)
        save_file(stored, host.models / "diffusion_models" / "scaled_sd3.safetensors")
        parts = unet("scaled_sd3.safetensors")
    baked = baked_from(host, models, files["sd3"], means, f"baked_{kind}")
    truth = picture(client, "sd3", parts=unet(baked))
    auto = picture(client, "sd3", oft(files["sd3"]), parts)
    merged = picture(client, "sd3", oft(files["sd3"], 1.0, "weights"), parts)
    assert far(auto, truth) <= 2 < far(merged, truth)
    assert far(auto, picture(client, "sd3", parts=parts)) > 3
    said = report(client, "sd3", files["sd3"], parts)
    # Later hosts name the layout, in capitals.
    assert "fp8" in said.lower() and "activations of" in said and "saved checkpoint" in said, said


def packed_file(client: Client, host: ComfyServer, oft_dir: Path, family: str) -> str:
    """An adapter for the family's packed model."""
    g = Graph()
    g.Tiny_SaveWeights(pattern=".", filename="packed_weights", model=tiny_parts(g, family).model)
    client.run(g)
    modules = modules_of(shapes_in(host.output / "packed_weights.safetensors"), "diffusion_model.")
    name = f"runtime/packed_{family}.safetensors"
    (oft_dir / "runtime").mkdir(exist_ok=True)
    save_file(make_oft(modules, SIDES[family]), oft_dir / name)
    return name


@pytest.mark.parametrize("family", ["sd15", "sd3", "flux"])
def test_gguf_models(client: Client, host: ComfyServer, oft_dir: Path, family: str) -> None:
    name = packed_file(client, host, oft_dir, family)
    plain = picture(client, family, parts=packed)
    auto, merged = (picture(client, family, oft(name, 1.0, how), packed) for how in (None, "weights"))
    assert far(auto, merged) <= 2 and far(auto, plain) > 3
    said = report(client, family, name, packed)
    assert re.search(r"activations of \d+ layers are turned \(\d+ GGUF Q\d", said), said
    assert "cannot save GGUF" in said and "set runtime" not in said, said
    assert "unpacked and patched in every step" in report(client, family, name, packed, runtime="weights")


def hooked(client: Client, family: str, name: str, parts, on: str = "both", strength: float = 0.9) -> np.ndarray:
    """A picture with the file as ComfyUI's hook on its conditionings."""
    g = Graph()
    made = parts(g, family)
    preview = text_to_image(g, made, family)
    adapter = g.OFT_LoadAdapter(oft_name=name)
    hooks = g.OFT_Hook(adapter=adapter, strength_model=strength, strength_clip=strength)[0]
    sampler = next(n for n in g.nodes.values() if n.class_type == "KSampler")
    for which in ("positive", "negative"):
        if on in ("both", which):
            more = {"strength": 1.0, "set_cond_area": "default", "hooks": hooks}
            node = g.ConditioningSetProperties(cond_NEW=sampler.inputs[which], **more)
            sampler.set(**{which: node[0]})
    return client.run(g).image(preview).astype(int)


@pytest.mark.parametrize("kind", ["GGUF", "fp8"])
def test_hooks_on_quantised_models(
    client: Client, host: ComfyServer, oft_dir: Path, files: dict[str, str], kind: str
) -> None:
    """On both conditionings a hook is the loaded file; it is not rounded, and nothing of it stays."""
    if kind == "fp8":
        name, parts = files["sd3"], unet("tiny_sd3.safetensors", "fp8_e4m3fn")
    else:
        name, parts = packed_file(client, host, oft_dir, "sd3"), packed
    plain = picture(client, "sd3", parts=parts)
    loaded = picture(client, "sd3", oft(name, 0.9, "activations"), parts)
    assert far(loaded, plain) > 3
    assert far(hooked(client, "sd3", name, parts), loaded) <= 1
    positive = hooked(client, "sd3", name, parts, "positive")
    assert min(far(positive, plain), far(positive, loaded)) > 1
    assert (picture(client, "sd3", parts=parts) == plain).all()


# --- saving -------------------------------------------------------------------------------------------------


def saver(g: Graph, model) -> None:
    g.ModelSave(model=model, filename_prefix="diffusion_models/runtime_saved")


def test_saving(client: Client, host: ComfyServer, files: dict[str, str]) -> None:
    """Refused with the way out while activations are turned; with weights the file is in what is written."""

    def graph(how: str) -> Graph:
        g = Graph()
        node = g.OFT_LoadModelOnly(
            model=stock_parts(g, "sd3").model, oft_name=files["sd3"], strength_model=1.0, runtime=how
        )
        saver(g, node[0])
        return g

    plain = picture(client, "sd3")
    with pytest.raises(PromptFailed) as failed:
        client.run(graph("activations"))
    assert failed.value.node_type == "ModelSave" and "'runtime' to 'weights'" in failed.value.text
    assert not list(host.output.glob("diffusion_models/runtime_saved*"))
    assert (picture(client, "sd3") == plain).all(), "the base after the refusal"
    client.run(graph("weights"))
    saved = next(host.output.glob("diffusion_models/runtime_saved*"))
    (host.models / "diffusion_models").mkdir(exist_ok=True)
    saved.rename(host.models / "diffusion_models" / "from_save.safetensors")
    again = picture(client, "sd3", parts=unet("from_save.safetensors"))
    # The saved weights are rounded to fp16, as the merged ones are.
    assert far(again, picture(client, "sd3", oft(files["sd3"], 1.0, "weights"))) <= 1
    assert far(again, plain) > 3


def test_saving_text_encoders(
    client: Client, host: ComfyServer, oft_dir: Path, files: dict[str, str]
) -> None:
    modules = {f"lora_te_text_model_encoder_layers_{i}_mlp_fc1": (3072, 768) for i in range(6)}
    save_file(make_oft(modules, "out"), oft_dir / "runtime" / "text_saved.safetensors")
    g = Graph()
    parts = oft("runtime/text_saved.safetensors", 1.0, "activations")(g, stock_parts(g, "sd15"))
    g.CLIPSave(clip=parts.clip, filename_prefix="clip/runtime_saved")
    with pytest.raises(PromptFailed, match="'runtime' to 'weights'"):
        client.run(g)


# --- the input ----------------------------------------------------------------------------------------------


def test_unknown_choice_is_rejected(client: Client, files: dict[str, str]) -> None:
    g = Graph()
    text_to_image(g, tiny_parts(g, "sd15"), "sd15", adapter=oft(files["sd15"], 1.0, "somewhere"))
    with pytest.raises(PromptRejected, match="somewhere"):
        client.run(g)


def test_old_graphs_and_plain_models_patch_weights(client: Client, files: dict[str, str]) -> None:
    said = report(client, "sd3", files["sd3"])
    assert "ctivations" not in said
    without, with_weights = (picture(client, "sd3", oft(files["sd3"], 0.7, how)) for how in (None, "weights"))
    assert (without == with_weights).all()
    said = report(client, "sd3", files["sd3"], runtime="activations")
    assert re.search(r"activations of \d+ layers are turned \(\d+ plain weights\)", said), said
