"""LyCORIS itself as the judge: random Diag-OFT and BOFT networks, LyCORIS's own saver, its own merge against ours.

The error of a layer is ||ours - theirs|| / ||theirs - base||, the relative error of the change, at most 1e-5 in float32.

At a multiplier other than 1 LyCORIS is linear in the weight for Diag-OFT without `rescale`, and only there is it compared.
With `rescale` it interpolates the rotation but always applies the full rescale, and BOFT interpolates every butterfly
factor by itself; both are rules of that tool alone, none of ours, so they are compared at multiplier 1.
"""

from __future__ import annotations

import itertools
import logging
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from oft_core.adapter import Strength, load_adapter
from oft_core.names import NameIndex

wrapper = pytest.importorskip("lycoris.wrapper")

LIMIT = 1e-5


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        block = nn.Module()
        block.to_q = nn.Linear(48, 64, bias=False)
        block.to_k = nn.Linear(32, 48)
        block.to_out = nn.ModuleList([nn.Linear(24, 96)])
        self.transformer_blocks = nn.ModuleList([block])
        self.conv_temporal = nn.Conv1d(6, 32, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(16, 48, 1)
        self.conv_in = nn.Conv2d(8, 32, 3, padding=1)
        self.conv_3d = nn.Conv3d(4, 24, (3, 1, 1))


LAYERS = 7


@dataclass
class Saved:
    base: dict[str, torch.Tensor]
    file: Path
    options: dict


def restored(saved: Saved) -> tuple[Model, wrapper.LycorisNetwork]:
    """The base model and a fresh network that LyCORIS reads from the file, as at inference."""
    model = Model()
    model.load_state_dict(saved.base)
    network, _ = wrapper.create_lycoris_from_weights(1.0, str(saved.file), model)
    assert len(network.loras) == LAYERS
    return model, network


def save(folder: Path, algo: str, *, dtype=None, std: float = 0.1, dim: int = 8, seed: int = 0, **options) -> Saved:
    torch.manual_seed(seed)
    logging.getLogger("LyCORIS").setLevel(logging.ERROR)
    model = Model()
    base = {key: value.clone() for key, value in model.state_dict().items()}
    names = {"target_module": ["Linear", "Conv1d", "Conv2d", "Conv3d"], "target_name": []}
    wrapper.LycorisNetwork.apply_preset(names)
    network = wrapper.create_lycoris(model, 1.0, linear_dim=dim, linear_alpha=1.0, algo=algo, preset="full", **options)
    network.apply_to()
    for name, parameter in network.named_parameters():
        nn.init.normal_(parameter, mean=1.0 if name.endswith("rescale") else 0.0, std=std)
    file = folder / "adapter.safetensors"
    network.save_weights(str(file), dtype, {})
    return Saved(base, file, options)


def theirs(saved: Saved, multiplier: float = 1.0) -> dict[str, torch.Tensor]:
    model, network = restored(saved)
    with torch.no_grad():
        network.merge_to(multiplier)
    return {key: value.clone() for key, value in model.state_dict().items()}


def ours(saved: Saved, multiplier: float = 1.0) -> dict[str, torch.Tensor]:
    weights = {key: value.clone() for key, value in saved.base.items()}
    binding = load_adapter(saved.file).bind(NameIndex({key: tuple(w.shape) for key, w in weights.items()}))
    assert not binding.unmatched
    assert len({patch.key for patch in binding.patches}) == LAYERS
    for patch in binding.patches:
        patch.apply_(weights[patch.key], Strength(multiplier, "linear"))
    return weights


def errors(saved: Saved, got: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> dict[str, float]:
    found = {}
    for key, target in want.items():
        change = (target.double() - saved.base[key].double()).norm().item()
        if change == 0:
            assert torch.equal(got[key], saved.base[key]), f"{key} must not change"
            continue
        size = change / saved.base[key].double().norm().item()
        assert size > 0.02, f"{key}: the tool's change is only {size:.1e} of the weight; the case tests nothing"
        found[key] = (got[key].double() - target.double()).norm().item() / change
    assert len(found) == LAYERS
    return found


def check(saved: Saved, multiplier: float = 1.0) -> None:
    found = errors(saved, ours(saved, multiplier), theirs(saved, multiplier))
    worst = max(found, key=found.get)
    assert found[worst] <= LIMIT, f"{worst}: relative error {found[worst]:.2e}"


def constraint_binds(saved: Saved) -> bool:
    """True if LyCORIS's clamp acts in every layer: ||Q|| above alpha * rows."""
    tensors = load_file(saved.file)
    binding = []
    for key, blocks in tensors.items():
        if key.endswith(".oft_blocks"):
            rows = blocks.shape[-3] * blocks.shape[-1]
            alpha = float(tensors[key.replace("oft_blocks", "alpha")])
            binding.append((blocks - blocks.transpose(-1, -2)).float().norm() > alpha * rows)
    return all(binding)


# 0.01 x (16 to 96 rows) is 0.16 to 0.96 of radius; the random generators have norms of 1 and more.
CONSTRAINT = {"free": 0.0, "loose": 50.0, "active": 0.01}
DTYPE = {"fp32": None, "fp16": torch.float16, "bf16": torch.bfloat16}


@pytest.mark.parametrize(
    ("algo", "constraint", "rescaled", "dtype"),
    list(itertools.product(["diag-oft", "boft"], CONSTRAINT, [False, True], DTYPE)),
)
def test_every_option(tmp_path, algo, constraint, rescaled, dtype):
    saved = save(tmp_path, algo, constraint=CONSTRAINT[constraint], rescaled=rescaled, dtype=DTYPE[dtype])
    assert constraint_binds(saved) == (constraint != "loose")  # at 0 the clamp is off, and any norm is above 0
    check(saved)


@pytest.mark.parametrize(
    ("algo", "dim"), [("diag-oft", d) for d in (2, 4, 16, 1000)] + [("boft", d) for d in (6, 16, 1000)]
)
def test_block_sizes(tmp_path, algo, dim):
    check(save(tmp_path, algo, dim=dim, std=0.3 if dim < 8 else 0.1, seed=dim))


@pytest.mark.parametrize("rescaled", [False, True])
def test_blocks_of_one_row(tmp_path, rescaled):
    """LyCORIS cuts a layer of `dim` rows into blocks of 1 x 1 (SD's conv_out has 4 rows): only the rescale can act."""
    saved = save(tmp_path, "diag-oft", dim=24, rescaled=rescaled)
    assert load_file(saved.file)["lycoris_conv_3d.oft_blocks"].shape == (24, 1, 1)
    got, want = ours(saved), theirs(saved)
    for key, target in want.items():
        change = (target.double() - saved.base[key].double()).norm()
        assert (got[key].double() - target.double()).norm() <= LIMIT * change, key


@pytest.mark.parametrize("std", [0.02, 0.5, 1.5])
@pytest.mark.parametrize("algo", ["diag-oft", "boft"])
def test_small_and_large_angles(tmp_path, algo, std):
    check(save(tmp_path, algo, std=std, rescaled=std > 0.1))


@pytest.mark.parametrize("multiplier", [0.5, -1.0, 2.0, 0.0])
@pytest.mark.parametrize("constraint", [0.0, 0.01])
def test_multiplier_of_diag_oft_is_linear(tmp_path, multiplier, constraint):
    saved = save(tmp_path, "diag-oft", constraint=constraint)
    if multiplier == 0:
        got, want = ours(saved, 0.0), theirs(saved, 0.0)
        for key, base in saved.base.items():
            assert torch.equal(got[key], base)
            assert torch.allclose(want[key], base, atol=1e-6)
        return
    check(saved, multiplier)


# ---- the oracle can fail -------------------------------------------------------------------------------------------


def spoiled(saved: Saved, change) -> dict[str, torch.Tensor]:
    """Ours, from a file in which `change` replaced every tensor of one kind."""
    tensors = {key: change(key.rsplit(".", 1)[1], value) for key, value in load_file(saved.file).items()}
    file = saved.file.with_name("spoiled.safetensors")
    save_file({key: value.contiguous() for key, value in tensors.items() if value is not None}, str(file))
    return ours(Saved(saved.base, file, saved.options))


BREAKS = {
    "sign": lambda kind, t: t.transpose(-1, -2) if kind == "oft_blocks" else t,
    "half_skew": lambda kind, t: t / 2 if kind == "oft_blocks" else t,
    "constraint_ignored": lambda kind, t: torch.zeros_like(t) if kind == "alpha" else t,
    "constraint_not_scaled_by_rows": lambda kind, t: t / 16 if kind == "alpha" else t,
    "rescale_ignored": lambda kind, t: None if kind == "rescale" else t,
}


@pytest.mark.parametrize("name", BREAKS)
@pytest.mark.parametrize("algo", ["diag-oft", "boft"])
def test_a_wrong_reading_is_seen(tmp_path, algo, name):
    # Half the generator is invisible where the clamp acts: it has the same direction and is cut to the same length.
    constraint = 0.01 if name.startswith("constraint") else 0.0
    saved = save(tmp_path, algo, constraint=constraint, rescaled=name == "rescale_ignored")
    want = theirs(saved)
    assert max(errors(saved, ours(saved), want).values()) <= LIMIT
    assert min(errors(saved, spoiled(saved, BREAKS[name]), want).values()) > 100 * LIMIT


def test_a_wrong_side_is_seen(tmp_path):
    saved = save(tmp_path, "diag-oft")
    got = ours(saved)
    key = "transformer_blocks.0.to_q.weight"
    got[key] = saved.base[key] @ (got[key].T @ saved.base[key].T.pinverse()).T[:48, :48]
    assert errors(saved, got, theirs(saved))[key] > 0.1
