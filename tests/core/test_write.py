"""Writing dialects: read back by ourselves and by the tools' own packages, and refused where a dialect cannot hold the adapter."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from oft_core import (
    Constraint,
    Diff,
    FileError,
    FormatError,
    LayerRotation,
    NameIndex,
    Strength,
    load_adapter,
)
from oft_core.formats.write import WRITERS, write_adapter

BLOCK = "transformer_blocks.0"
LDM = {
    f"diffusion_model.input_blocks.1.1.{BLOCK}.attn1.to_q.weight": (32, 24),
    f"diffusion_model.input_blocks.1.1.{BLOCK}.attn1.to_out.0.weight": (32, 32),
    "diffusion_model.input_blocks.1.0.in_layers.2.weight": (32, 8, 3, 3),
    "diffusion_model.input_blocks.0.0.weight": (32, 4, 3, 3),
}
FLUX = {
    "diffusion_model.double_blocks.0.img_attn.qkv.weight": (96, 32),
    "diffusion_model.single_blocks.0.linear1.weight": (224, 32),
    "diffusion_model.single_blocks.0.linear2.weight": (32, 160),
}
TEXT = {"clip_l.transformer.text_model.encoder.layers.0.self_attn.q_proj.weight": (24, 24)}
SHAPES = {"ldm": LDM, "flux": FLUX, "with text": LDM | TEXT}


def rotations(
    shapes: dict, side: str, block: int = 4, *, kind: str = "cayley", rows: bool = False, share: bool = False, terms: int = 5
) -> dict:
    """A random rotation for every layer but the first convolution."""
    out = {}
    for i, (key, shape) in enumerate(shapes.items()):
        if key.endswith(("input_blocks.0.0.weight", ".bias", "norm1.weight")):
            continue
        g = torch.Generator().manual_seed(i)
        length = shape[0] if side == "out" else torch.Size(shape[1:]).numel()
        n = length // block
        v = torch.randn(1, 1 if share else n, block * (block - 1) // 2, generator=g) * 0.1
        scale = torch.exp(torch.randn(shape[0], generator=g) * 0.2) if rows else None
        out[key] = LayerRotation(side, block, n, kind, terms, generator=v, row_scale=scale)
    return out


def base(shapes: dict) -> dict[str, torch.Tensor]:
    return {k: torch.randn(s, generator=torch.Generator().manual_seed(50 + i)) for i, (k, s) in enumerate(shapes.items())}


def applied(layers: dict, shapes: dict) -> dict[str, torch.Tensor]:
    out = base(shapes)
    for key, layer in layers.items():
        layer.apply_(out[key], Strength())
    return out


def reread(path: Path, shapes: dict) -> dict[str, torch.Tensor]:
    out = base(shapes)
    binding = load_adapter(path).bind(NameIndex(shapes))
    assert not binding.unmatched
    for patch in binding.patches:
        patch.apply_(out[patch.key], Strength())
    return out


def assert_same(got: dict, want: dict) -> None:
    for key, value in want.items():
        assert (got[key] - value).norm() / value.norm() < 1e-6, key


CASES = {
    "oft_v2 exact": ("oft_v2", "ldm", {"side": "in"}),
    "oft_v2 series": ("oft_v2", "ldm", {"side": "in", "kind": "neumann"}),
    "oft_v2 exponential": ("oft_v2", "ldm", {"side": "in", "kind": "expm"}),
    "oft_v2 shared rows": ("oft_v2", "ldm", {"side": "in", "share": True, "rows": True}),
    "oft_v2 flux": ("oft_v2", "flux", {"side": "in"}),
    "oft_v2 text": ("oft_v2", "with text", {"side": "in"}),
    "own": ("oft_v2_plus", "ldm", {"side": "in"}),
    "own long series": ("oft_v2_plus", "flux", {"side": "in", "kind": "neumann", "terms": 7}),
    "peft long series": ("peft", "ldm", {"side": "in", "kind": "neumann", "terms": 7}),
    "peft exact": ("peft", "ldm", {"side": "in"}),
    "peft series": ("peft", "ldm", {"side": "in", "kind": "neumann"}),
    "peft shared": ("peft", "ldm", {"side": "in", "share": True}),
    "peft flux": ("peft", "flux", {"side": "in"}),
    "lycoris": ("lycoris", "ldm", {"side": "out"}),
    "lycoris rescaled": ("lycoris", "ldm", {"side": "out", "rows": True}),
    "lycoris flux": ("lycoris", "flux", {"side": "out"}),
    "lycoris text": ("lycoris", "with text", {"side": "out"}),
    "kohya": ("kohya", "ldm", {"side": "out"}),
    "comfy": ("comfy", "with text", {"side": "out"}),
    "comfy flux": ("comfy", "flux", {"side": "out"}),
}


@pytest.mark.parametrize("case", CASES)
def test_read_back(tmp_path: Path, case: str) -> None:
    dialect, model, how = CASES[case]
    shapes = SHAPES[model]
    layers = rotations(shapes, **how)
    path = tmp_path / ("folder" if dialect == "peft" else "file.safetensors")
    written = write_adapter(layers, NameIndex(shapes), path, dialect, metadata={"trigger": "sks"})
    assert_same(reread(written, shapes), applied(layers, shapes))
    assert load_adapter(path).metadata["trigger"] == "sks"
    assert not list(tmp_path.rglob("*.partial"))


EMBEDDING = "diffusion_model.label_emb.0"


@pytest.mark.parametrize(
    ("width", "block"),
    [(2048, "add_embedding"), (1280, "add_embedding"), (64, "add_embedding"), (1024, "class_embedding")],
    ids=["SDXL", "its refiner", "a small one", "SD 2.x with class labels"],
)
@pytest.mark.parametrize(
    ("dialect", "side"), [("oft_v2", "in"), ("oft_v2_plus", "in"), ("peft", "in"), ("lycoris", "out"), ("comfy", "out")]
)
def test_a_weight_of_two_names_is_written_once(tmp_path: Path, dialect: str, side: str, width: int, block: str) -> None:
    shapes = {
        f"{EMBEDDING}.0.weight": (32, 32), f"{EMBEDDING}.0.bias": (32,), f"{EMBEDDING}.2.weight": (32, 32),
        "diffusion_model.input_blocks.4.1.transformer_blocks.0.attn2.to_k.weight": (32, width),
    }
    layers, index = rotations(shapes, side), NameIndex(shapes)
    beside = {f"{EMBEDDING}.0.bias": Diff(torch.randn(32))} if dialect in ("oft_v2_plus", "peft", "comfy") else {}
    target = tmp_path / ("folder" if dialect == "peft" else "a.safetensors")
    path = write_adapter(layers, index, target, dialect, beside=beside, base=base(shapes).get)
    # Rotations by module: what follows the module's name is the dialect's.
    modules = [k for k in load_file(path) if k.rpartition(".")[2] in ("weight", "oft_blocks") and "oft_" in k and "embedding" in k]
    if dialect in ("oft_v2", "oft_v2_plus", "peft"):
        assert len(modules) == 2 and all(f"{block}.linear" in k or f"{block}_linear" in k for k in modules), modules
    patches = load_adapter(path).bind(index).patches
    assert sorted(p.key for p in patches) == sorted([*layers, *beside])
    want = applied(layers, shapes)
    for key, diff in beside.items():
        want[key] += diff.delta
    assert_same(reread(path, shapes), want)


def test_limits_are_settled_in_the_file(tmp_path: Path) -> None:
    layers = {}
    for key, layer in rotations(LDM, "out").items():
        norm = layer.generator.double().norm() * 2**0.5
        layers[key] = replace(layer, constraint=Constraint("test", float(norm) / 3, norm.float()), _cache={})
    for dialect in ("lycoris", "kohya", "comfy"):
        path = write_adapter(layers, NameIndex(LDM), tmp_path / f"{dialect}.safetensors", dialect)
        assert_same(reread(path, LDM), applied(layers, LDM))


def test_half_precision(tmp_path: Path) -> None:
    layers = rotations(LDM, "in")
    path = write_adapter(layers, NameIndex(LDM), tmp_path / "a.safetensors", "oft_v2", dtype=torch.bfloat16)
    stored = load_file(path)
    assert {t.dtype for k, t in stored.items() if k.endswith("weight")} == {torch.bfloat16}
    got, want, before = reread(path, LDM), applied(layers, LDM), base(LDM)
    key = next(iter(layers))
    assert (got[key] - want[key]).norm() / (want[key] - before[key]).norm() < 1e-2


REFUSALS = {
    "input side": ("lycoris", rotations(LDM, "in"), LDM, "input side"),
    "output side": ("oft_v2", rotations(LDM, "out"), LDM, "output side"),
    "long series in OFT v2": ("oft_v2", rotations(LDM, "in", kind="neumann", terms=7), LDM, "7 terms"),
    "series in lycoris": ("lycoris", rotations(LDM, "out", kind="neumann"), LDM, "neumann"),
    "large blocks in lycoris": ("lycoris", rotations(LDM, "out", 16), LDM, "at least as many"),
    "rows in core": ("comfy", rotations(LDM, "out", rows=True), LDM, "row scales"),
    "rows in peft": ("peft", rotations(LDM, "in", rows=True), LDM, "row scales"),
    "text in kohya": ("kohya", rotations(LDM | TEXT, "out"), LDM | TEXT, "number of blocks|text encoder"),
    "flux in kohya": ("kohya", rotations(FLUX, "out"), FLUX, "does not know flux"),
    "two models in peft": ("peft", rotations(LDM | TEXT, "in"), LDM | TEXT, "several models"),
    "shared in lycoris": ("lycoris", rotations(LDM, "out", share=True), LDM, "shared"),
    "nothing": ("lycoris", {}, LDM, "no layers"),
    "unknown": ("excel", rotations(LDM, "in"), LDM, "cannot be written"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_what_a_dialect_cannot_hold_is_refused(tmp_path: Path, case: str) -> None:
    dialect, layers, shapes, words = REFUSALS[case]
    with pytest.raises(FormatError, match=words):
        write_adapter(layers, NameIndex(shapes), tmp_path / "out", dialect)
    assert not list(tmp_path.rglob("*"))


def test_a_failed_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **kw: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("oft_core.formats.write.save_file", fail)
    target = tmp_path / "a.safetensors"
    target.write_bytes(b"old")
    with pytest.raises(FileError, match=f"{target}.*disk full"):
        write_adapter(rotations(LDM, "in"), NameIndex(LDM), target, "oft_v2")
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"] and target.read_bytes() == b"old"


# ------------------------------------------------------------------ beside the rotations: biases, norms, whole layers

INNER = f"diffusion_model.input_blocks.1.1.{BLOCK}"
ROTATED_BIAS, NORM = f"{INNER}.attn1.to_out.0.bias", f"{INNER}.norm1"
FIRST = "diffusion_model.input_blocks.0.0"
FULL = LDM | {ROTATED_BIAS: (32,), f"{NORM}.weight": (24,), f"{NORM}.bias": (24,), f"{FIRST}.bias": (32,)}
WHOLE = (f"{NORM}.weight", f"{NORM}.bias", f"{FIRST}.weight", f"{FIRST}.bias")


def differences(*keys: str) -> dict[str, Diff]:
    return {k: Diff(torch.randn(FULL[k], generator=torch.Generator().manual_seed(90 + i))) for i, k in enumerate(keys)}


def changed(layers: dict, beside: dict[str, Diff]) -> dict[str, torch.Tensor]:
    out = applied(layers, FULL)
    for key, diff in beside.items():
        out[key] += diff.delta
    return out


@pytest.mark.parametrize(
    ("dialect", "side", "keys"),
    [
        ("oft_v2_plus", "in", (ROTATED_BIAS, *WHOLE)),
        ("comfy", "out", (ROTATED_BIAS, *WHOLE)),
        ("lycoris", "out", WHOLE),
        ("lycoris", "out", (f"{NORM}.bias",)),
        ("peft", "in", (ROTATED_BIAS, *WHOLE)),
        ("peft", "in", (ROTATED_BIAS, f"{NORM}.bias", f"{FIRST}.weight")),
    ],
)
def test_what_was_trained_beside_the_rotations_is_read_back(tmp_path: Path, dialect: str, side: str, keys: tuple[str, ...]) -> None:
    layers, beside, own = rotations(FULL, side), differences(*keys), base(FULL)
    path = write_adapter(layers, NameIndex(FULL), tmp_path / "a.safetensors", dialect, beside=beside, base=own.__getitem__)
    assert_same(reread(path, FULL), changed(layers, beside))
    ops = [p.op for p in load_adapter(path).bind(NameIndex(FULL)).patches if isinstance(p.op, Diff)]
    assert len(ops) >= len(keys) and {op.whole for op in ops} == {dialect == "peft"}
    if dialect == "peft":
        # Whole values become differences for tools that add, and the other way round above.
        patches = load_adapter(path).bind(NameIndex(FULL)).patches
        again = {p.key: p.op for p in patches if isinstance(p.op, Diff)}
        with pytest.raises(FormatError, match="own weights"):
            write_adapter(layers, NameIndex(FULL), tmp_path / "b.safetensors", "oft_v2_plus", beside=again)
        other = write_adapter(layers, NameIndex(FULL), tmp_path / "b.safetensors", "oft_v2_plus", beside=again, base=own.get)
        assert_same(reread(other, FULL), changed(layers, beside))


def test_whole_values_follow_the_strength() -> None:
    value, weight = torch.randn(4, 3), torch.randn(4, 3)
    op = Diff(value, whole=True)
    for s in (0.25, 1.0, -1.0):
        got = weight.clone()
        Diff.from_state(*op.to_state()).apply_(got, Strength(s))
        torch.testing.assert_close(got, weight + s * (value - weight))
    assert torch.equal(op.rows_slice(1, 2).delta, value[1:3]) and op.rows_slice(1, 2).whole


NO_PLACE = {
    "oft_v2": ("oft_v2", "in", (ROTATED_BIAS,), "OneTrainer"),
    "kohya": ("kohya", "out", (ROTATED_BIAS,), "rotations only"),
    "bias of a rotated layer": ("lycoris", "out", (ROTATED_BIAS,), "beside a rotation"),
    "bias alone": ("lycoris", "out", (f"{FIRST}.bias",), "bias alone"),
    "whole values without a base": ("peft", "in", (ROTATED_BIAS,), "own weights"),
    "rotated and changed": ("comfy", "out", (f"{INNER}.attn1.to_q.weight",), "both"),
}


@pytest.mark.parametrize("case", NO_PLACE)
def test_dialects_without_a_place_refuse_with_the_reason(tmp_path: Path, case: str) -> None:
    dialect, side, keys, words = NO_PLACE[case]
    layers = rotations(FULL, side)
    with pytest.raises(FormatError, match=words):
        write_adapter(layers, NameIndex(FULL), tmp_path / "a.safetensors", dialect, beside=differences(*keys))
    assert not list(tmp_path.rglob("*"))


# ------------------------------------------------------------------ the tools' own readers


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.to_q = nn.Linear(24, 32, bias=False)
        self.to_out = nn.ModuleList([nn.Linear(32, 32, bias=False)])


class Toy(nn.Module):
    """The layers of LDM under diffusers names."""

    def __init__(self) -> None:
        super().__init__()
        inner = nn.Module()
        inner.attn1 = Attention()
        attention, resnet, down = nn.Module(), nn.Module(), nn.Module()
        attention.transformer_blocks = nn.ModuleList([inner])
        resnet.conv1 = nn.Conv2d(8, 32, 3, bias=False)
        down.attentions, down.resnets = nn.ModuleList([attention]), nn.ModuleList([resnet])
        self.down_blocks = nn.ModuleList([down])
        weights = base(LDM)
        with torch.no_grad():
            for key, other in TOY_NAMES.items():
                self.get_parameter(other).copy_(weights[key])


TOY_NAMES = dict(zip(LDM, (
    f"down_blocks.0.attentions.0.{BLOCK}.attn1.to_q.weight", f"down_blocks.0.attentions.0.{BLOCK}.attn1.to_out.0.weight",
    "down_blocks.0.resnets.0.conv1.weight",
), strict=False))


@pytest.mark.parametrize("kind", ["cayley", "neumann"])
def test_peft_reads_it(tmp_path: Path, kind: str) -> None:
    from peft import PeftModel

    layers = rotations(LDM, "in", kind=kind)
    write_adapter(layers, NameIndex(LDM), tmp_path, "peft")
    assert json.loads((tmp_path / "adapter_config.json").read_text())["oft_block_size"] == 4
    model = PeftModel.from_pretrained(Toy(), tmp_path).merge_and_unload()
    want = applied(layers, LDM)
    for key, name in TOY_NAMES.items():
        got = model.get_parameter(name).detach()
        assert (got - want[key]).norm() / want[key].norm() < 1e-5, name


@pytest.mark.parametrize("kind", ["cayley", "neumann"])
def test_peft_reads_rotated_embeddings(tmp_path: Path, kind: str) -> None:
    """PEFT keeps them under another name and turns them the other way round; under ours it would leave them out with a warning."""
    from peft import PeftModel

    words, query = "text_model.embeddings.token_embedding.weight", "text_model.encoder.layers.0.self_attn.q_proj.weight"
    shapes = {f"clip_l.transformer.{words}": (40, 24), f"clip_l.transformer.{query}": (24, 24)}
    layers = rotations(shapes, "in", kind=kind)
    write_adapter(layers, NameIndex(shapes), tmp_path, "peft")
    model, parts = nn.Module(), {words: nn.Embedding(40, 24), query: nn.Linear(24, 24, bias=False)}
    for name, part in parts.items():
        at = model
        *path, leaf = name.removesuffix(".weight").split(".")
        for step in path:
            if not hasattr(at, step):
                at.add_module(step, nn.Module())
            at = getattr(at, step)
        at.add_module(leaf, part)
        part.weight.requires_grad_(False).copy_(base(shapes)[f"clip_l.transformer.{name}"])
    merged, want = PeftModel.from_pretrained(model, tmp_path).merge_and_unload(), applied(layers, shapes)
    for key, weight in want.items():
        got = merged.get_parameter(key.removeprefix("clip_l.transformer."))
        assert (got - weight).norm() / weight.norm() < 1e-5, key


@pytest.mark.parametrize("rows", [False, True])
def test_lycoris_reads_it(tmp_path: Path, rows: bool) -> None:
    from lycoris.wrapper import create_lycoris_from_weights

    layers = rotations(LDM, "out", rows=rows)
    index = NameIndex(LDM)
    index.family = "sd1"  # too few layers to tell; LyCORIS files of SD 1.x are in diffusers names
    path = write_adapter(layers, index, tmp_path / "a.safetensors", "lycoris")
    toy = Toy()
    stored = {k.replace("lora_unet_", "lycoris_"): v for k, v in load_file(path).items()}
    network, _ = create_lycoris_from_weights(1.0, None, toy, stored)
    assert len(network.loras) == 3
    network.merge_to(1.0)
    want = applied(layers, LDM)
    for key, name in TOY_NAMES.items():
        got = toy.get_parameter(name).detach()
        assert (got - want[key]).norm() / want[key].norm() < 1e-5, name


class FullToy(Toy):
    """The layers of FULL under diffusers names."""

    def __init__(self) -> None:
        super().__init__()
        block = self.down_blocks[0].attentions[0].transformer_blocks[0]
        block.attn1.to_out[0] = nn.Linear(32, 32)
        block.norm1 = nn.LayerNorm(24)
        self.conv_in = nn.Conv2d(4, 32, 3)
        weights = base(FULL)
        with torch.no_grad():
            for key, name in FULL_NAMES.items():
                self.get_parameter(name).copy_(weights[key])


TOY_BLOCK = f"down_blocks.0.attentions.0.{BLOCK}"
FULL_NAMES = TOY_NAMES | {
    ROTATED_BIAS: f"{TOY_BLOCK}.attn1.to_out.0.bias", f"{NORM}.weight": f"{TOY_BLOCK}.norm1.weight",
    f"{NORM}.bias": f"{TOY_BLOCK}.norm1.bias", f"{FIRST}.weight": "conv_in.weight", f"{FIRST}.bias": "conv_in.bias",
}


@pytest.mark.parametrize("keys", [(ROTATED_BIAS,), (ROTATED_BIAS, f"{NORM}.bias"), (ROTATED_BIAS, *WHOLE)], ids=len)
def test_peft_reads_biases_and_whole_modules(tmp_path: Path, keys: tuple[str, ...]) -> None:
    from peft import PeftModel

    layers, beside = rotations(FULL, "in", kind="neumann"), differences(*keys)
    index = NameIndex(FULL)
    index.family = "sd1"
    write_adapter(layers, index, tmp_path, "peft", beside=beside, base=base(FULL).__getitem__)
    model = PeftModel.from_pretrained(FullToy(), tmp_path).merge_and_unload()
    for key, value in changed(layers, beside).items():
        got = model.get_parameter(FULL_NAMES[key]).detach()
        assert (got - value).norm() / value.norm() < 1e-5, key


def test_what_peft_trained_beside_the_rotations_is_read(tmp_path: Path) -> None:
    """A folder that PEFT itself wrote, with every kind of key that it uses for biases and modules."""
    from peft import OFTConfig, get_peft_model

    targets = [name.removesuffix(".weight") for name in TOY_NAMES.values()]
    config = OFTConfig(oft_block_size=4, target_modules=targets, bias="all", modules_to_save=["conv_in"])
    model = get_peft_model(FullToy(), config)
    g = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn(p.shape, generator=g) * 0.1)
    model.save_pretrained(tmp_path)
    adapter = load_adapter(tmp_path)
    assert not adapter.unknown
    got = reread(tmp_path, FULL)
    want = model.merge_and_unload()
    moved = 0
    for key, name in FULL_NAMES.items():
        value = want.get_parameter(name).detach()
        moved += not torch.equal(value, base(FULL)[key])
        assert (got[key] - value).norm() / value.norm() < 1e-5, key
    assert moved == len(FULL_NAMES) - 1  # all but the norm's weight


def test_lycoris_reads_whole_layers_and_norms(tmp_path: Path) -> None:
    from lycoris.wrapper import create_lycoris_from_weights

    layers, beside = rotations(FULL, "out"), differences(*WHOLE)
    index = NameIndex(FULL)
    index.family = "sd1"
    path = write_adapter(layers, index, tmp_path / "a.safetensors", "lycoris", beside=beside)
    toy = FullToy()
    stored = {k.replace("lora_unet_", "lycoris_"): v for k, v in load_file(path).items()}
    network, _ = create_lycoris_from_weights(1.0, None, toy, stored)
    assert len(network.loras) == 5
    network.merge_to(1.0)
    for key, value in changed(layers, beside).items():
        got = toy.get_parameter(FULL_NAMES[key]).detach()
        assert (got - value).norm() / value.norm() < 1e-5, key


def test_every_writer_was_covered() -> None:
    assert {dialect for dialect, _, _ in CASES.values()} == set(WRITERS)
