"""Writing dialects: read back by ourselves and by the tools' own packages, and refused where a dialect cannot hold the adapter."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from oft_core import Constraint, FormatError, LayerRotation, NameIndex, Strength, load_adapter
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


def rotations(shapes: dict, side: str, block: int = 4, *, kind: str = "cayley", rows: bool = False, share: bool = False) -> dict:
    """A random rotation for every layer but the first convolution."""
    out = {}
    for i, (key, shape) in enumerate(shapes.items()):
        if key.endswith("input_blocks.0.0.weight"):
            continue
        g = torch.Generator().manual_seed(i)
        length = shape[0] if side == "out" else torch.Size(shape[1:]).numel()
        n = length // block
        v = torch.randn(1, 1 if share else n, block * (block - 1) // 2, generator=g) * 0.1
        scale = torch.exp(torch.randn(shape[0], generator=g) * 0.2) if rows else None
        out[key] = LayerRotation(side, block, n, kind, generator=v, row_scale=scale)
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
    with pytest.raises(OSError, match="disk full"):
        write_adapter(rotations(LDM, "in"), NameIndex(LDM), target, "oft_v2")
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"] and target.read_bytes() == b"old"


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


def test_every_writer_was_covered() -> None:
    assert {dialect for dialect, _, _ in CASES.values()} == set(WRITERS)
