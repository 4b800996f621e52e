"""Converting with a strength, nearly, and to a LoRA; extracting rotations from what has changed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from oft_core import Diff, LayerRotation, NameIndex, Strength, load_adapter
from oft_core.cli import main
from oft_core.extract import fit
from oft_core.formats.write import write_adapter
from oft_core.merge import merge_file

Q = "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_q.weight"
SHAPES = {
    Q: (64, 48),
    Q.replace("to_q", "to_k"): (64, 48),
    "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_out.0.weight": (64, 64),
    "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_out.0.bias": (64,),
    "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.norm1.weight": (64,),
    "model.diffusion_model.input_blocks.1.0.in_layers.2.weight": (32, 16, 3, 3),
    "model.diffusion_model.middle_block.1.transformer_blocks.0.attn2.to_k.weight": (64, 768),
    "cond_stage_model.transformer.text_model.encoder.layers.0.self_attn.q_proj.weight": (48, 48),
}
MATRICES = [k for k, s in SHAPES.items() if len(s) > 1]


@pytest.fixture
def base(tmp_path: Path) -> Path:
    tensors = {k: torch.randn(s, generator=torch.Generator().manual_seed(i)) for i, (k, s) in enumerate(SHAPES.items())}
    save_file(tensors, tmp_path / "base.safetensors")
    return tmp_path / "base.safetensors"


def random_layers(side: str, kind: str = "cayley", block: int = 8, rows: bool = False, size: float = 0.1) -> dict[str, LayerRotation]:
    out = {}
    for i, key in enumerate(MATRICES):
        shape, g = SHAPES[key], torch.Generator().manual_seed(100 + i)
        n = (shape[0] if side == "out" else torch.Size(shape[1:]).numel()) // block
        v = size * torch.randn(1, n, block * (block - 1) // 2, generator=g)
        out[key] = LayerRotation(side, block, n, kind, generator=v, row_scale=torch.exp(0.2 * torch.randn(shape[0], generator=g)) if rows else None)
    return out


def written(folder: Path, layers: dict, dialect: str, beside: dict | None = None) -> Path:
    folder.mkdir(exist_ok=True)
    return write_adapter(layers, NameIndex(SHAPES), folder / f"{dialect}.safetensors", dialect, beside=beside)


def merged(file: Path, base: Path, strength: Strength | None = None) -> dict[str, Tensor]:
    out = base.with_name("merged.safetensors")
    merge_file(load_adapter(file), base, out, strength or Strength(), dtype="fp32")
    return load_file(out)


def error(got: dict[str, Tensor], want: dict[str, Tensor], base: Path) -> float:
    """Error of the whole change, relative to it."""
    start = load_file(base)
    size = sum(float((want[k].double() - start[k].double()).square().sum()) for k in start)
    assert size > 1
    return (sum(float((got[k].double() - want[k].double()).square().sum()) for k in start) / size) ** 0.5


# --- strength ---


@pytest.mark.parametrize(("side", "dialect", "kind"), [
    ("in", "oft_v2", "cayley"), ("in", "oft_v2", "expm"), ("in", "oft_v2_plus", "cayley"), ("out", "comfy", "cayley"),
    ("out", "kohya", "cayley"), ("out", "lycoris", "cayley"),
])
@pytest.mark.parametrize(("s", "mode", "coft"), [
    (0.6, "rotation", "file"), (1.7, "geodesic", "file"), (-0.5, "rotation", "file"), (1.0, "rotation", 5.0), (2.0, "rotation", "hold"),
])
def test_a_strength_is_baked_in(tmp_path: Path, base: Path, side: str, dialect: str, kind: str, s: float, mode: str, coft) -> None:
    layers = random_layers(side, kind, block=4)
    if dialect == "kohya":  # one number of blocks, and no text encoder
        layers = {k: v for k, v in layers.items() if k.startswith("model.") and v.count == 16}
    source = written(tmp_path, layers, dialect)
    out = tmp_path / "out.safetensors"
    arguments = ["convert", str(source), str(out), "--to", dialect, "--model", str(base), "--strength", str(s), "--mode", mode, "--coft", str(coft)]
    assert main(arguments) == 0
    assert error(merged(out, base), merged(source, base, Strength(s, mode, coft)), base) < 2e-6


def test_strengths_by_block_are_baked_in(tmp_path: Path, base: Path, capsys: pytest.CaptureFixture) -> None:
    source, out, direct = written(tmp_path, random_layers("in"), "oft_v2"), tmp_path / "out.safetensors", tmp_path / "direct.safetensors"
    blocks = "all=0.5, middle=0"
    assert main(["convert", str(source), str(out), "--to", "oft_v2", "--model", str(base), "--blocks", blocks]) == 0
    assert main(["merge", str(source), str(base), "-o", str(direct), "--blocks", blocks]) == 0
    assert error(merged(out, base), load_file(direct), base) < 2e-6
    assert len(load_adapter(out).entries) == len(MATRICES) - 1
    assert "exactly" in capsys.readouterr().out


def test_row_factors_and_differences_take_the_strength(tmp_path: Path, base: Path) -> None:
    beside = {k: Diff(torch.randn(s, generator=torch.Generator().manual_seed(7))) for k, s in SHAPES.items() if len(s) == 1}
    source, out = written(tmp_path, random_layers("in", rows=True), "oft_v2_plus", beside), tmp_path / "out.safetensors"
    assert main(["convert", str(source), str(out), "--to", "oft_v2_plus", "--model", str(base), "--strength", "0.4"]) == 0
    assert error(merged(out, base), merged(source, base, Strength(0.4)), base) < 2e-6


def test_what_is_no_rotation_is_refused_with_the_way_out(tmp_path: Path, base: Path, capsys: pytest.CaptureFixture) -> None:
    source, out = written(tmp_path, random_layers("in", "neumann"), "oft_v2"), tmp_path / "out.safetensors"
    for arguments in (["--strength", "0.5"], ["--mode", "linear", "--strength", "0.5"]):
        assert main(["convert", str(source), str(out), "--to", "oft_v2", "--model", str(base), *arguments]) == 1
        assert "--approximate" in capsys.readouterr().err and not out.exists()


# --- nearly ---


def test_an_exact_transform_serves_where_another_was_trained(tmp_path: Path, base: Path) -> None:
    """OneTrainer's exponential is the same rotation as some Cayley transform, which PEFT has too."""
    source = written(tmp_path, random_layers("in", "expm"), "oft_v2")
    unet = {k: v for k, v in load_file(source).items() if k.startswith("lora_unet")}
    save_file(unet, source)
    assert main(["convert", str(source), str(tmp_path / "peft"), "--to", "peft", "--model", str(base)]) == 0
    assert not json.loads((tmp_path / "peft" / "adapter_config.json").read_text())["use_cayley_neumann"]
    assert error(merged(tmp_path / "peft", base), merged(source, base), base) < 2e-6


def test_the_nearest_rotation_of_a_series(tmp_path: Path, base: Path, capsys: pytest.CaptureFixture) -> None:
    """A truncated series is nearly a rotation: refused as one, written with its small error when asked."""
    layers = {k: v for k, v in random_layers("in", "neumann").items() if k.startswith("model.")}
    source, out = written(tmp_path, layers, "oft_v2"), tmp_path / "out.safetensors"
    command = ["convert", str(source), str(out), "--to", "oft_v2", "--model", str(base), "--strength", "0.5", "--approximate"]
    assert main(command) == 0
    text = capsys.readouterr().out
    assert "nearly" in text and "is left out in all" in text
    assert error(merged(out, base), merged(source, base, Strength(0.5)), base) < 0.02


def test_the_other_side_nearly(tmp_path: Path, base: Path, capsys: pytest.CaptureFixture) -> None:
    """Input rotations are not output rotations; what of them can be told is, and the error is what merging shows."""
    layers = {k: v for k, v in random_layers("in").items() if k.startswith("model.")}
    source, out = written(tmp_path, layers, "oft_v2"), tmp_path / "out.safetensors"
    command = ["convert", str(source), str(out), "--to", "lycoris", "--model", str(base)]
    assert main(command) == 1 and "--approximate" in capsys.readouterr().err
    assert main([*command, "--approximate", "--layers"]) == 0
    text = capsys.readouterr().out
    said = float(text.split("Of the change ")[1].split(" %")[0])
    found = 100 * error(merged(out, base), merged(source, base), base)
    assert abs(said - found) < 0.2 and 50 < found < 100
    assert all(k in text for k in layers)


# --- LoRA ---


def by_hand(lora: dict[str, Tensor], base: Path) -> dict[str, Tensor]:
    """The weights with a LoRA of kohya's names, by its definition."""
    index, out = NameIndex(SHAPES), load_file(base)
    for key, value in lora.items():
        module, _, suffix = key.partition(".")
        (target,) = index.resolve(module)
        weight = out[target.key]
        if suffix == "lora_up.weight":
            down = lora[f"{module}.lora_down.weight"]
            assert float(lora[f"{module}.alpha"]) == len(down) == value.shape[1]
            weight += (value.flatten(1) @ down.flatten(1)).view(weight.shape)
        elif suffix == "diff":
            weight += value
        elif suffix == "diff_b":
            out[target.key.replace("weight", "bias")] += value
    return out


def test_a_lora_of_full_rank_is_the_change(tmp_path: Path, base: Path) -> None:
    beside = {k: Diff(torch.randn(s, generator=torch.Generator().manual_seed(7))) for k, s in SHAPES.items() if len(s) == 1}
    source, out = written(tmp_path, random_layers("in", rows=True), "oft_v2_plus", beside), tmp_path / "lora.safetensors"
    assert main(["convert", str(source), str(out), "--to", "lora", "--model", str(base), "--rank", "768", "--strength", "0.7"]) == 0
    assert error(by_hand(load_file(out), base), merged(source, base, Strength(0.7)), base) < 1e-6


def test_what_a_small_rank_leaves_is_said(tmp_path: Path, base: Path, capsys: pytest.CaptureFixture) -> None:
    source, out = written(tmp_path, random_layers("out"), "comfy"), tmp_path / "lora.safetensors"
    whole = merged(source, base)
    assert main(["convert", str(source), str(out), "--to", "lora", "--model", str(base), "--rank", "1"]) == 0
    assert "most of the change is left out" in capsys.readouterr().err
    assert main(["convert", str(source), str(out), "--to", "lora", "--model", str(base), "--rank", "24", "--layers"]) == 0
    text, err = capsys.readouterr()
    assert "WARNING" not in err
    said = float(text.split("of the change ")[1].split(" %")[0])
    assert abs(said - 100 * error(by_hand(load_file(out), base), whole, base)) < 0.1 and said > 20
    assert main(["convert", str(source), str(out), "--to", "lora", "--model", str(base), "--error", "0.1", "--layers"]) == 0
    text = capsys.readouterr().out
    left = [float(line.split(", ")[-1].split(" %")[0]) for line in text.splitlines() if ": rank " in line]
    assert len(left) == len(MATRICES) and 5 < max(left) <= 10
    assert 0.05 < error(by_hand(load_file(out), base), whole, base) <= 0.1


def test_numbers_out_of_range(tmp_path: Path, base: Path, capsys: pytest.CaptureFixture) -> None:
    source = written(tmp_path, random_layers("out"), "comfy")
    for wrong in (["--rank", "0"], ["--error", "1"], ["--error", "-1"], ["--error", "nan"]):
        assert main(["convert", str(source), str(tmp_path / "x"), "--to", "lora", "--model", str(base), *wrong]) == 1
        assert "out of range" in capsys.readouterr().err
    assert main(["convert", str(source), str(base), "--to", "lora", "--model", str(base)]) == 1
    assert "overwrite" in capsys.readouterr().err
    assert main(["convert", str(source), str(tmp_path / "x"), "--to", "lora", "--model", str(source)]) == 1
    assert main(["extract", str(base), str(tmp_path / "none"), "-o", str(tmp_path / "x")]) == 1
    assert not (tmp_path / "x").exists()


# --- extract ---


@pytest.mark.parametrize(("side", "rows"), [("in", False), ("in", True), ("out", False), ("out", True)])
def test_a_known_rotation_is_found(tmp_path: Path, base: Path, capsys: pytest.CaptureFixture, side: str, rows: bool) -> None:
    layers = random_layers(side, rows=rows, size=0.2)
    dialect = "oft_v2_plus" if side == "in" else "lycoris" if rows else "comfy"
    if dialect == "lycoris":
        layers = {k: v for k, v in layers.items() if v.count >= v.block}
    tuned = merged(written(tmp_path, layers, dialect), base)
    tuned["model.diffusion_model.input_blocks.1.1.transformer_blocks.0.norm1.weight"] += 0.5
    save_file(tuned, tmp_path / "tuned.safetensors")
    out, arguments = tmp_path / "found.safetensors", ["--rescale"] if rows else []
    if dialect == "lycoris":
        (tmp_path / "tuned.safetensors").unlink()
        tuned["model.diffusion_model.input_blocks.1.1.transformer_blocks.0.norm1.weight"] -= 0.5
        save_file(tuned, tmp_path / "tuned.safetensors")
    assert main(["extract", str(tmp_path / "tuned.safetensors"), str(base), "-o", str(out), "--block", "8", "--layers", *arguments]) == 0
    text = capsys.readouterr().out
    assert f"rotated on the {side}put side" in text and "tell 100.0 % of the change" in text
    assert error(merged(out, base), tuned, base) < 1e-5
    found = {p.key: p.op for p in load_adapter(out).bind(NameIndex(SHAPES)).patches if isinstance(p.op, LayerRotation)}
    assert found.keys() == layers.keys()
    for key, op in found.items():
        assert torch.allclose(op.build(Strength()).matrices, layers[key].build(Strength()).matrices, atol=1e-5)


def test_a_lora_is_mostly_no_rotation(tmp_path: Path, base: Path, capsys: pytest.CaptureFixture) -> None:
    g = torch.Generator().manual_seed(5)
    lora = {}
    for name, rows, columns in (("attn1_to_q", 64, 48), ("attn1_to_k", 64, 48), ("attn1_to_out_0", 64, 64)):
        module = f"lora_unet_input_blocks_1_1_transformer_blocks_0_{name}"
        lora |= {f"{module}.lora_up.weight": torch.randn(rows, 4, generator=g), f"{module}.lora_down.weight": torch.randn(4, columns, generator=g)}
        lora[f"{module}.alpha"] = torch.tensor(2.0)
    save_file(lora, tmp_path / "lora.safetensors")
    out = tmp_path / "found.safetensors"
    assert main(["extract", str(tmp_path / "lora.safetensors"), str(base), "-o", str(out), "--block", "8"]) == 0
    told = capsys.readouterr()
    assert "wrong tool" in told.err and "3 layers" in told.out
    said = float(told.out.split("tell ")[1].split(" %")[0])
    start, want = load_file(base), load_file(base)
    for key in list(want):
        module = next((m for m in (k.partition(".")[0] for k in lora) if NameIndex(SHAPES).resolve(m)[0].key == key), None)
        if module is not None:
            want[key] += 0.5 * lora[f"{module}.lora_up.weight"] @ lora[f"{module}.lora_down.weight"]
    assert sum(not torch.equal(want[k], start[k]) for k in want) == 3
    assert abs(said - 100 * (1 - error(merged(out, base), want, base) ** 2)) < 0.1 and 0 < said < 50


def test_what_cannot_be_extracted_is_named(tmp_path: Path, base: Path, capsys: pytest.CaptureFixture) -> None:
    out, other = tmp_path / "found.safetensors", tmp_path / "other.safetensors"
    cases = (
        (load_file(base), "No weight has changed"),
        ({"a.weight": torch.zeros(2, 2)}, "no parameter in common"),
        ({k: v[:4].contiguous() for k, v in load_file(base).items()}, "differ in shape"),
        ({"lora_unet_x.lora_up.weight": torch.zeros(2, 2), "lora_unet_x.lora_down.weight": torch.zeros(2, 2)}, "have a place in the model"),
        ({"lora_unet_x.lora_up.weight": torch.zeros(2, 2), "lora_unet_x.hada_w1_a": torch.zeros(2, 2)}, "not a plain LoRA"),
    )
    for tensors, message in cases:
        save_file(tensors, other)
        assert main(["extract", str(other), str(base), "-o", str(out)]) == 1
        assert message in capsys.readouterr().err and not out.exists()
    assert main(["extract", str(other), str(base), "-o", str(base)]) == 1
    assert "overwrite" in capsys.readouterr().err


# --- blend ---


@pytest.mark.parametrize("keep", [False, True])
def test_a_blend_is_the_average_of_logarithms(tmp_path: Path, base: Path, capsys: pytest.CaptureFixture, keep: bool) -> None:
    linalg = pytest.importorskip("scipy.linalg")
    one, two = random_layers("in", "neumann", size=0.05), random_layers("in")
    for layer in two.values():
        layer.generator = layer.generator.flip(1)
    a, b = written(tmp_path / "a", one, "oft_v2"), written(tmp_path / "b", two, "oft_v2")
    out = tmp_path / "out.safetensors"
    more = ["--keep-angles"] if keep else []
    assert main(["blend", str(a), str(b), "--model", str(base), "-o", str(out), "--strengths", "1,0.5", *more]) == 0
    assert "Average of 2 adapters" in capsys.readouterr().out
    found = {p.key: p.op for p in load_adapter(out).bind(NameIndex(SHAPES)).patches}
    assert found.keys() == one.keys()
    for key, op in found.items():
        got = op.build(Strength()).matrices[0]
        first, second = one[key].build(Strength()).matrices[0], two[key].build(Strength(0.5)).matrices[0]
        for m, x, y in zip(got.double(), first.double(), second.double(), strict=True):
            logs = [torch.from_numpy(linalg.logm(r.numpy()).real) for r in (x, y)]
            # A series is not quite a rotation: what it stretches stays in the average's matrix, not in a generator.
            logs = [(log - log.T) / 2 for log in logs]
            mean = sum(logs) / 2
            if keep:
                mean = mean * sum(log.norm() for log in logs) / 2 / mean.norm()
            assert torch.allclose(m, torch.linalg.matrix_exp(mean), atol=2e-4)


def test_blends_that_cannot_be(tmp_path: Path, base: Path, capsys: pytest.CaptureFixture) -> None:
    a, b = written(tmp_path / "a", random_layers("in"), "oft_v2"), written(tmp_path / "b", random_layers("out"), "comfy")
    out = tmp_path / "out.safetensors"
    for files, more, message in (
        ([a, b], [], "different sides"), ([a], [], "two or more"), ([a, a], ["--strengths", "1"], "a strength for each"),
        ([a, a], ["--strengths", "1,x"], "a strength for each"), ([a, a], ["--to", "comfy"], "input side"),
    ):
        assert main(["blend", *map(str, files), "--model", str(base), "-o", str(out), *more]) == 1
        assert message in capsys.readouterr().err and not out.exists()


def test_reflections_are_not_taken_for_rotations() -> None:
    """The best orthogonal matrix may reflect; what is found is the best rotation, as SciPy finds it in three dimensions."""
    from scipy.spatial.transform import Rotation

    g = torch.Generator().manual_seed(1)
    weight, noise = torch.randn(20, 3, generator=g), torch.randn(20, 3, generator=g)
    mirrored = weight * torch.tensor([-1.0, 1.0, 1.0]) + 0.3 * noise
    found = fit(weight, mirrored, "in", 3).build(Strength()).matrices[0, 0]
    best, _ = Rotation.align_vectors(mirrored.numpy(), weight.numpy())
    assert torch.allclose(found.double(), torch.from_numpy(best.as_matrix()), atol=1e-5)


# --- what users type wrongly, and what lies beside ---


def test_what_is_no_layer_of_the_model_is_named_and_left(tmp_path: Path, base: Path, capsys: pytest.CaptureFixture) -> None:
    """Fine-tunes often carry another VAE, also with biases."""
    vae = {"first_stage_model.encoder.conv_in.weight": torch.ones(4, 3, 3, 3), "first_stage_model.encoder.conv_in.bias": torch.ones(4)}
    save_file(load_file(base) | vae, base)
    tuned = merged(written(tmp_path, random_layers("in"), "oft_v2"), base)
    save_file({k: v + k.startswith("first_stage") for k, v in tuned.items()}, tmp_path / "tuned.safetensors")
    out = tmp_path / "found.safetensors"
    assert main(["extract", str(tmp_path / "tuned.safetensors"), str(base), "-o", str(out), "--block", "8"]) == 0
    assert "not told: 2 parameters" in capsys.readouterr().err
    assert error(merged(out, base), tuned, base) < 1e-5


def test_codes_of_a_quantised_model_are_not_taken_for_weights(tmp_path: Path, base: Path, capsys: pytest.CaptureFixture) -> None:
    source = written(tmp_path, random_layers("in"), "oft_v2")
    save_file(load_file(base) | {Q.replace("weight", "scale_weight"): torch.ones(())}, base)
    assert main(["convert", str(source), str(tmp_path / "x"), "--to", "lora", "--model", str(base)]) == 1
    assert "stored quantised" in capsys.readouterr().err and not (tmp_path / "x").exists()


def test_inputs_are_not_written_over_and_damaged_ones_are_named(tmp_path: Path, base: Path, capsys: pytest.CaptureFixture) -> None:
    unet = {k: v for k, v in random_layers("in").items() if k.startswith("model.")}
    folder = written(tmp_path, unet, "peft").parent.rename(tmp_path / "my.first")
    before = (folder / "adapter_model.safetensors").read_bytes()
    command = ["convert", str(folder / "adapter_model.safetensors"), str(folder), "--to", "peft", "--model", str(base), "--strength", "0.5"]
    assert main(command) == 1
    assert "overwrite" in capsys.readouterr().err and (folder / "adapter_model.safetensors").read_bytes() == before
    command[2] = str(tmp_path / "my.second")
    assert main(command) == 0 and (tmp_path / "my.second" / "adapter_config.json").is_file(), "a dot is no ending"
    (tmp_path / "broken.safetensors").write_bytes(before[:300])
    for broken in ("broken.safetensors", "my.second"):
        assert main(["extract", str(tmp_path / broken), str(base), "-o", str(tmp_path / "x")]) == 1
        assert broken in capsys.readouterr().err
