"""PEFT itself as the judge: random adapters, PEFT's own saver, PEFT's own merge against ours.

Every case builds a small model, lets PEFT put an adapter with random non-zero parameters on it, saves the adapter with
`save_pretrained`, merges it with `merge_and_unload`, and merges the same file with `oft_core`. The error of a layer is
||ours - PEFT's|| / ||PEFT's - base||, the relative error of the change, and must stay within 1e-5 in float32.

The second half proves that these comparisons can fail: a file that is wrong in sign, side, constraint or series is far
away from PEFT's result.
"""

from __future__ import annotations

import itertools
import json
import math
import warnings
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from oft_core.adapter import Strength, load_adapter
from oft_core.names import NameIndex

peft = pytest.importorskip("peft")

LIMIT = 1e-5


class Model(nn.Module):
    """Linear layers of several shapes, a 1x1 and a 3x3 convolution, an embedding, under diffusers-like names."""

    def __init__(self) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(11, 24)
        block = nn.Module()
        block.to_q = nn.Linear(48, 36, bias=False)
        block.to_k = nn.Linear(32, 48)
        block.to_out = nn.ModuleList([nn.Linear(64, 64)])
        self.transformer_blocks = nn.ModuleList([block])
        self.conv_shortcut = nn.Conv2d(16, 12, 1)
        self.conv_in = nn.Conv2d(16, 20, 3, padding=1)


LINEAR = ["to_q", "to_k", "to_out.0"]
CONV = ["conv_shortcut", "conv_in"]


@dataclass
class Saved:
    """One adapter as PEFT saved it: the base weights, PEFT's merged weights, the file."""

    base: dict[str, torch.Tensor]
    merged: dict[str, torch.Tensor]
    file: Path
    layers: int


def save_and_merge(folder: Path, config, *, seed: int = 0, std: float = 0.1) -> Saved:
    torch.manual_seed(seed)
    model = Model()
    base = {key: value.clone() for key, value in model.state_dict().items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT warns of block sizes it adjusts and of the CUDA kernel it has not
        wrapped = peft.get_peft_model(model, config)
        layers = 0
        for name, parameter in wrapped.named_parameters():
            if "oft_R" in name or "oft_embedding_R" in name or "boft_R" in name:
                nn.init.normal_(parameter, std=std)
                layers += 1
            elif "boft_s" in name:
                nn.init.normal_(parameter, mean=1.0, std=0.2)
        wrapped.save_pretrained(str(folder))
        merged = wrapped.merge_and_unload().state_dict()
    return Saved(base, {k: v.clone() for k, v in merged.items()}, folder / "adapter_model.safetensors", layers)


def ours(saved: Saved, strength: Strength | None = None) -> dict[str, torch.Tensor]:
    weights = {key: value.clone() for key, value in saved.base.items()}
    binding = load_adapter(saved.file).bind(NameIndex({key: tuple(w.shape) for key, w in weights.items()}))
    assert not binding.unmatched
    assert len({patch.key for patch in binding.patches}) == saved.layers
    for patch in binding.patches:
        patch.apply_(weights[patch.key], strength or Strength(1.0, "linear"))
    return weights


def errors(saved: Saved, got: dict[str, torch.Tensor]) -> dict[str, float]:
    """Relative error of the change for every parameter PEFT changed; the others must be untouched, bit for bit."""
    found = {}
    for key, want in saved.merged.items():
        change = (want.double() - saved.base[key].double()).norm().item()
        if change == 0:
            assert torch.equal(got[key], saved.base[key]), f"{key} must not change"
            continue
        size = change / saved.base[key].double().norm().item()
        assert size > 0.02, f"{key}: PEFT's change is only {size:.1e} of the weight; the case tests nothing"
        found[key] = (got[key].double() - want.double()).norm().item() / change
    assert len(found) == saved.layers
    return found


def check(saved: Saved, limit: float = LIMIT) -> None:
    found = errors(saved, ours(saved))
    worst = max(found, key=found.get)
    assert found[worst] <= limit, f"{worst}: relative error {found[worst]:.2e}"


def oft_config(targets: list[str], **options):
    options.setdefault("oft_block_size", 0 if options.get("r") else 8)
    return peft.OFTConfig(target_modules=targets, **options)


OFT = {
    "default": {"targets": LINEAR},
    "all_layers": {"targets": LINEAR + CONV},
    "block_size_adjusted": {"targets": LINEAR, "oft_block_size": 10},
    "block_size_2": {"targets": LINEAR, "oft_block_size": 2, "std": 0.3},
    "default_block_size_32": {"targets": ["to_k", "to_out.0"], "oft_block_size": 32, "std": 0.05},
    "one_block_a_layer": {"targets": LINEAR, "r": 1, "std": 0.05},
    "block_count": {"targets": LINEAR, "r": 4},
    "block_count_adjusted": {"targets": LINEAR, "r": 5},
    "conv": {"targets": CONV},
    "conv_block_count": {"targets": CONV, "r": 6},
    "embedding": {"targets": ["token_embedding", "to_q"]},
    "embedding_block_count": {"targets": ["token_embedding"], "r": 3},
    "dropout_is_training_only": {"targets": LINEAR, "module_dropout": 0.3},
}
SHARE = [False, True]
EXACT = [False, True]
COFT = [None, 0.9]


def build(folder: Path, options: dict, **more) -> Saved:
    options = {**options, **more}
    std, targets = options.pop("std", 0.1), options.pop("targets")
    return save_and_merge(folder, oft_config(targets, **options), std=std, seed=len(str(options)))


@pytest.mark.parametrize("case", OFT)
def test_oft_layers(tmp_path, case):
    check(build(tmp_path, OFT[case]))


@pytest.mark.parametrize(("share", "exact", "coft"), list(itertools.product(SHARE, EXACT, COFT)))
def test_oft_options_combined(tmp_path, share, exact, coft):
    options = {"block_share": share, "use_cayley_neumann": not exact}
    if coft is not None:
        # sqrt(2) * 0.1 * sqrt(28) = 0.75 is a usual norm of a block; the limit is eps / sqrt(stored blocks), so it binds.
        options |= {"coft": True, "eps": 0.4 if share else coft}
    saved = build(tmp_path, {"targets": LINEAR + CONV + ["token_embedding"]}, **options)
    if coft is not None:
        assert constraint_binds(saved, options["eps"])
    check(saved)


@pytest.mark.parametrize("terms", range(1, 9))
@pytest.mark.parametrize("share", SHARE)
def test_oft_number_of_neumann_terms(tmp_path, terms, share):
    if terms == 1:  # one term is the identity: PEFT changes nothing, and neither may we
        saved = build(tmp_path, {"targets": LINEAR, "num_cayley_neumann_terms": 1, "block_share": share})
        got = ours(saved)
        assert all(torch.equal(got[k], saved.base[k]) and torch.equal(w, saved.base[k]) for k, w in saved.merged.items())
        return
    check(build(tmp_path, {"targets": LINEAR + CONV, "num_cayley_neumann_terms": terms, "block_share": share}))


def test_oft_divergent_series_is_reproduced(tmp_path):
    """Generators with a norm above 1: the series is far from a rotation, and still has to be PEFT's own polynomial."""
    saved = build(tmp_path, {"targets": LINEAR, "std": 0.5})
    check(saved)


def test_oft_large_angles_exact(tmp_path):
    check(build(tmp_path, {"targets": LINEAR, "std": 1.5, "use_cayley_neumann": False}), limit=LIMIT)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_oft_half_precision_file(tmp_path, dtype):
    """A file stored in half precision is compared with what PEFT makes of that same file."""
    saved = build(tmp_path, {"targets": LINEAR + CONV})
    tensors = {key: value.to(dtype) for key, value in load_file(saved.file).items()}
    save_file(tensors, str(saved.file), {"format": "pt"})
    model = Model()
    model.load_state_dict(saved.base)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        saved.merged = peft.PeftModel.from_pretrained(model, str(tmp_path)).merge_and_unload().state_dict()
    check(saved)


BOFT = {
    "block_size": {"boft_block_size": 4},
    "block_size_odd_count": {"boft_block_size": 16},
    "block_count": {"boft_block_size": 0, "boft_block_num": 4},
    "dropout_is_training_only": {"boft_block_size": 4, "boft_dropout": 0.3},
}


@pytest.mark.parametrize("case", BOFT)
def test_boft_without_cuda(tmp_path, case):
    """What PEFT makes on any machine: its CUDA helper is absent, so it sets the number of butterfly factors to 1."""
    check(save_and_merge(tmp_path, peft.BOFTConfig(target_modules=LINEAR + CONV, **BOFT[case]), std=0.2))


@pytest.fixture
def block_diagonal_stand_in(monkeypatch):
    """PEFT builds butterfly factors with a CUDA kernel that only places blocks on a diagonal; torch.block_diag does the same."""
    layer = pytest.importorskip("peft.tuners.boft.layer")

    def forward(blocks: torch.Tensor) -> list[torch.Tensor]:
        return [torch.stack([torch.block_diag(*stage) for stage in blocks])]

    monkeypatch.setattr(layer, "get_fbd_cuda", lambda: SimpleNamespace(forward=forward))


@pytest.mark.parametrize("factors", [1, 2, 3])
@pytest.mark.parametrize("size", [{"boft_block_size": 4}, {"boft_block_size": 0, "boft_block_num": 8}])
def test_boft_butterfly_factors(tmp_path, block_diagonal_stand_in, factors, size):
    config = peft.BOFTConfig(target_modules=LINEAR + CONV, boft_n_butterfly_factor=factors, **size)
    saved = save_and_merge(tmp_path, config, std=0.2)
    assert all(t.shape[0] == factors for k, t in load_file(saved.file).items() if k.endswith("boft_R"))
    check(saved)


# ---- the oracle can fail -------------------------------------------------------------------------------------------


def constraint_binds(saved: Saved, eps: float) -> bool:
    """True if at least one stored block is longer than PEFT's radius, measured on the skew matrix."""
    for key, vector in load_file(saved.file).items():
        if key.endswith("R.weight") and (math.sqrt(2) * vector.norm(dim=1)).max() > eps / math.sqrt(len(vector)):
            return True
    return False


def rewrite_config(saved: Saved, **changes) -> None:
    path = saved.file.with_name("adapter_config.json")
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def negate(saved: Saved) -> None:
    tensors = {k: -t if k.split(".")[-2:] == ["oft_R", "weight"] or k.endswith("boft_R") else t
               for k, t in load_file(saved.file).items()}
    save_file(tensors, str(saved.file), {"format": "pt"})


BREAKS = {
    "sign": ({}, negate),
    "sign_exact": ({"use_cayley_neumann": False}, negate),
    "exact_read_as_series": ({"use_cayley_neumann": False}, lambda s: rewrite_config(s, use_cayley_neumann=True)),
    "series_read_as_exact": ({}, lambda s: rewrite_config(s, use_cayley_neumann=False)),
    "old_series": ({}, lambda s: rewrite_config(s, peft_version="0.17.1")),
    "terms": ({"num_cayley_neumann_terms": 7}, lambda s: rewrite_config(s, num_cayley_neumann_terms=5)),
    "constraint_ignored": ({"coft": True, "eps": 0.9}, lambda s: rewrite_config(s, coft=False)),
    "constraint_other_eps": ({"coft": True, "eps": 0.9}, lambda s: rewrite_config(s, eps=0.8)),
}


@pytest.mark.parametrize("name", BREAKS)
def test_a_wrong_reading_is_seen(tmp_path, name):
    options, spoil = BREAKS[name]
    saved = build(tmp_path, dict(targets=LINEAR + CONV, **options))
    check(saved)
    spoil(saved)
    found = errors(saved, ours(saved))
    assert min(found.values()) > 100 * LIMIT, {k: f"{v:.1e}" for k, v in found.items()}


def test_a_wrong_side_or_sign_of_butterfly_is_seen(tmp_path, block_diagonal_stand_in):
    config = peft.BOFTConfig(target_modules=LINEAR, boft_block_size=4, boft_n_butterfly_factor=2)
    saved = save_and_merge(tmp_path, config, std=0.2)
    negate(saved)
    assert min(errors(saved, ours(saved)).values()) > 100 * LIMIT


def test_a_wrong_side_is_seen(tmp_path):
    """On a square layer the blocks would also fit the rows: rotating them instead is far off."""
    saved = build(tmp_path, {"targets": ["to_out.0"]})
    key = "transformer_blocks.0.to_out.0.weight"
    got = ours(saved)
    turned = ours(Saved({**saved.base, key: saved.base[key].T.contiguous()}, saved.merged, saved.file, saved.layers))
    got[key] = turned[key].T.contiguous()
    assert errors(saved, got)[key] > 0.1
