"""Numbers and pictures of what a file does, layer by layer and block by block, against dense matrices."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from oft_core import NameIndex, load_adapter
from oft_core.cli import main
from oft_core.pictures import PAPER, SCALE, WIDTH, adapter_picture, comparison_picture
from oft_core.profile import between, energy, kept, place, profile, table

UNET = "lora_unet_{}_transformer_blocks_0_attn1_to_q"
LAYERS = {
    "input_blocks_1_1": (24, 6),
    "input_blocks_10_1": (32, 8),
    "input_blocks_2_1": (24, 6),
    "middle_block_1": (32, 4),
    "output_blocks_3_1": (24, 6),
}


def skew(count: int, block: int, seed: int, size: float = 0.3) -> torch.Tensor:
    q = torch.randn(count, block, block, generator=torch.Generator().manual_seed(seed)) * size
    return (q - q.transpose(1, 2)) / 2


def cayley(q: torch.Tensor) -> torch.Tensor:
    eye = torch.eye(q.shape[-1], dtype=q.dtype)
    return torch.linalg.solve(eye - q, eye + q)


def angles(m: torch.Tensor) -> torch.Tensor:
    """Degrees by which the planes of (n, b, b) are turned, from eigenvalues."""
    return torch.rad2deg(torch.linalg.eigvals(m.double()).angle().abs())


def write(path: Path, seed: int = 0, layers: dict = LAYERS, size: float = 0.3) -> dict[str, torch.Tensor]:
    """A kohya file; name -> rotations (count, block, block), in float64, as its blocks say (Q = B - B^T)."""
    tensors, rotations = {}, {}
    for i, (name, (rows, block)) in enumerate(layers.items()):
        q = skew(rows // block, block, 10 * seed + i, size)
        key = UNET.format(name)
        tensors[f"{key}.oft_blocks"], tensors[f"{key}.alpha"] = q / 2, torch.tensor(0.0)
        rotations[key] = cayley(q.double())
    save_file(tensors, path)
    return rotations


def test_angles_are_those_of_the_matrices_in_the_order_of_the_model(tmp_path: Path) -> None:
    rotations = write(tmp_path / "a.safetensors")
    found = profile(load_adapter(tmp_path / "a.safetensors"))
    assert [(p.group, p.number) for p in found] == [
        ("input_blocks", 1), ("input_blocks", 2), ("input_blocks", 10), ("middle_block", 1), ("output_blocks", 3),
    ]  # fmt: skip
    for p in found:
        want = angles(rotations[p.name])
        torch.testing.assert_close(p.largest, want.amax(1), rtol=1e-5, atol=1e-4)
        torch.testing.assert_close(p.planes, want.flatten().sort().values, rtol=1e-5, atol=1e-4)
        assert p.learnt and abs(p.mean - float(want.mean())) < 1e-3
    lines = table(found).splitlines()
    assert len(lines) == 6 and "4 x 6" in lines[1] and f"{found[0].top:.3f}" in lines[1]


@pytest.mark.parametrize(
    ("name", "where"),
    [
        ("lora_unet_down_blocks_2_attentions_0_proj_in", ("down_blocks", 2)),
        ("lora_unet_double_blocks_13_img_attn_qkv", ("double_blocks", 13)),
        ("diffusion_model.layers.7.attention.qkv", ("layers", 7)),
        ("transformer.transformer_blocks.0.attn.to_q", ("transformer_blocks", 0)),
        ("lora_te1_text_model_encoder_layers_11_mlp_fc1", ("layers", 11)),
        ("base_model.model.joint_blocks.3.x_block.attn.qkv", ("joint_blocks", 3)),
        ("lora_unet_time_embed", ("other", None)),
    ],
)
def test_places_are_read_off_names(name: str, where: tuple) -> None:
    assert place(name) == where


def test_the_angle_from_one_file_to_another_is_that_of_the_product(tmp_path: Path) -> None:
    a, b = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    mine = write(a)
    # Blocks of another size are compared where both fit into a common one.
    theirs = write(b, 1, LAYERS | {"input_blocks_2_1": (24, 4), "input_blocks_10_1": (32, 16)})
    found = {x.name: x for x in between(load_adapter(a), load_adapter(b))}
    assert list(found) == [UNET.format(n) for n in ("input_blocks_1_1", "input_blocks_2_1", "input_blocks_10_1", "middle_block_1", "output_blocks_3_1")]
    for name, x in found.items():
        turn = torch.block_diag(*mine[name]).T @ torch.block_diag(*theirs[name])
        assert abs(float(x.angle.max()) - float(angles(turn[None]).max())) < 1e-3
        assert -1 <= x.likeness <= 1
    same = between(load_adapter(a), load_adapter(a))
    assert max(float(x.angle.max()) for x in same) < 1e-2 and min(x.likeness for x in same) > 0.9999
    wide = tmp_path / "wide.safetensors"
    write(wide, 2, {"input_blocks_1_1": (36, 6)})
    (other,) = between(load_adapter(a), load_adapter(wide))
    assert other.angle is None and "24" in other.reason and "36" in other.reason


def test_energy_is_the_mean_over_pairs_and_its_error_is_stated() -> None:
    w = torch.randn(40, 12, generator=torch.Generator().manual_seed(0))
    unit = w.double() / w.double().norm(dim=1, keepdim=True)
    pairs = [1 / float((unit[i] - unit[j]).norm()) for i in range(40) for j in range(i)]
    whole = energy(w)
    assert abs(whole.value - np.mean(pairs)) < 1e-9 and whole.error == 0
    sampled = [energy(w, rows=20, seed=s) for s in range(30)]
    off = np.array([abs(s.value - whole.value) / s.error for s in sampled])
    assert all(s.error > 0 for s in sampled) and np.median(off) < 2 and off.max() < 6


@pytest.mark.parametrize("side", ["in", "out"])
def test_what_a_rotation_keeps_of_a_weight(tmp_path: Path, side: str) -> None:
    """On the input side the neurons turn together: their energy and norms stay. On the output side they are mixed."""
    key = "diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_q"
    w = torch.randn(24, 24, generator=torch.Generator().manual_seed(3))
    packed = torch.randn(4, 15, generator=torch.Generator().manual_seed(4)) * 0.02  # small: a series
    if side == "in":
        save_file({f"{key.replace('diffusion_model', 'lora_unet').replace('.', '_')}.oft_R.weight": packed}, tmp_path / "a.safetensors")
    else:
        write(tmp_path / "a.safetensors", layers={"input_blocks_1_1": (24, 6)})
    adapter = load_adapter(tmp_path / "a.safetensors")
    (found,) = kept(adapter.bind(NameIndex({f"{key}.weight": (24, 24)})), lambda _: w)
    before, after = (e.value for e in found.energy)
    assert abs(before - energy(w).value) < 1e-9 and found.moved > 0.02
    if side == "in":
        assert abs(before - after) < 1e-6 and found.norms < 1e-4
    else:
        assert abs(before - after) > 1e-5 and found.norms > 0.01


# --- pictures -----------------------------------------------------------------------------------------------


def dark(image: Image.Image) -> np.ndarray:
    """Where a picture has the colour of the largest angle."""
    return (np.asarray(image).astype(int) == SCALE[-1]).all(-1)


def test_the_darkest_place_of_the_map_is_the_block_that_turns_most(tmp_path: Path) -> None:
    path = tmp_path / "one.safetensors"
    tensors = {}
    for i, (name, (rows, block)) in enumerate(LAYERS.items()):
        q = skew(rows // block, block, i, 0.01)
        if name == "middle_block_1":
            q[5] *= 40
        tensors[f"{UNET.format(name)}.oft_blocks"], tensors[f"{UNET.format(name)}.alpha"] = q / 2, torch.tensor(0.0)
    save_file(tensors, path)
    adapter = load_adapter(path)
    image = adapter_picture(adapter)
    assert image.width == WIDTH and image.getpixel((2, 2)) == PAPER
    found = dark(image)
    found[found.sum(1) < 20] = False  # the end of the scale
    ys, xs = np.nonzero(found)
    # Block 5 of 8 in the fourth of five rows of the map, which is 560 pixels wide.
    left = 24 + 190
    assert left + 560 * 5 / 8 - 1 <= xs.min() and xs.max() <= left + 560 * 6 / 8 + 1
    assert 10 <= ys.max() - ys.min() + 1 <= 14
    both = comparison_picture(adapter, adapter)
    assert dark(both).sum() > 100


def test_odd_files_are_drawn_too(tmp_path: Path) -> None:
    many = {f"input_blocks_{i}_1": (4, 2) for i in range(3000)}
    write(tmp_path / "many.safetensors", layers=many)
    image = adapter_picture(load_adapter(tmp_path / "many.safetensors"))
    assert image.height < 3000
    # As many lists of blocks as layers, one of them with a strange name.
    strange = {f"{'abcdefghij'[i % 10]}{'klmnopqrst'[i // 10]}_blocks_1_1": (4, 2) for i in range(100)}
    write(tmp_path / "strange.safetensors", layers=strange)
    assert adapter_picture(load_adapter(tmp_path / "strange.safetensors")).height < 3000
    name = tmp_path / ("\u732b\u8033 <b>" + "x" * 150 + ".safetensors")
    write(name)
    assert adapter_picture(load_adapter(name)).width == WIDTH
    write(tmp_path / "zero.safetensors", size=0.0)
    assert adapter_picture(load_adapter(tmp_path / "zero.safetensors")).width == WIDTH


# --- command line -------------------------------------------------------------------------------------------


def test_inspect_by_layer_against_another_file_and_on_a_model(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    a, b, base, out = (tmp_path / n for n in ("a.safetensors", "b.safetensors", "base.safetensors", "out.png"))
    write(a), write(b, 1)
    key = "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_q.weight"
    save_file({key: torch.randn(24, 16, generator=torch.Generator().manual_seed(0)).half()}, base)
    assert main(["inspect", str(a), "--layers", "--plot", str(out)]) == 0
    text = capsys.readouterr().out
    assert "Largest angle" in text and text.count("lora_unet_") == 5
    assert Image.open(out).size[0] == WIDTH
    assert main(["inspect", str(a), "--json", "--layers", "--against", str(b), "--base", str(base)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert len(found["layers"]) == 5 == len(found["against"]) and [k["name"] for k in found["base"]] == [key]
    assert math.isclose(max(found["layers"][0]["angles"]), found["layers"][0]["largest"], abs_tol=1e-3)
    assert main(["inspect", str(a), "--against", str(b), "--plot", str(out)]) == 0
    assert "likeness" in capsys.readouterr().out
    assert main(["inspect", str(a), "--base", str(a.with_name("none.safetensors"))]) == 1
    assert "none.safetensors" in capsys.readouterr().err
