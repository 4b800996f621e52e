"""PEFT as the judge of its other orthogonal methods: RoAd, HRA and PSOFT, saved and merged by PEFT, read and merged by us."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from oft_core import cli
from oft_core.adapter import Patch, Strength, load_adapter, read_tensors
from oft_core.errors import AdapterError, FormatError, ShapeError, StackError, StrengthError
from oft_core.formats.write import write_adapter
from oft_core.layer import LayerRotation
from oft_core.names import NameIndex
from oft_core.report import describe
from oft_core.stack import Share, blend

peft = pytest.importorskip("peft")
if not all(hasattr(peft, f"{name}Config") for name in ("Road", "HRA", "Psoft")):
    pytest.skip("this PEFT lacks one of the methods", allow_module_level=True)

LIMIT = 1e-5
LINEAR = ["to_q", "to_k", "to_v"]


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        block = nn.Module()
        block.to_q = nn.Linear(48, 64, bias=False)
        block.to_k = nn.Linear(32, 64)
        block.to_v = nn.Linear(64, 64)
        self.transformer_blocks = nn.ModuleList([block])
        self.conv_in = nn.Conv2d(16, 20, 3, padding=1)


def saved(folder: Path, config) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """Base weights, PEFT's merged ones, and the state of the live model, of an adapter with random numbers that lies in ``folder``."""
    torch.manual_seed(0)
    model = Model()
    base = {key: value.clone() for key, value in model.state_dict().items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = peft.get_peft_model(model, config)
        with torch.no_grad():
            for name, p in wrapped.named_parameters():
                if "road_alpha" in name or "vector_" in name:
                    p.copy_(1 + 0.2 * torch.randn_like(p))
                elif "hra_u" in name:
                    p.add_(0.2 * p.std() * torch.randn_like(p))
                elif "road_theta" in name or "psoft_R" in name:
                    p.copy_(0.2 * torch.randn_like(p))
        wrapped.save_pretrained(str(folder))
        live = {k: v.detach().clone() for k, v in wrapped.state_dict().items()}
        merged = {k: v.clone() for k, v in wrapped.merge_and_unload().state_dict().items()}
    return base, merged, live


def ours(adapter, base: dict[str, Tensor], strength: Strength | None = None) -> dict[str, Tensor]:
    out = {key: value.clone() for key, value in base.items()}
    binding = adapter.bind(NameIndex({key: value.shape for key, value in base.items()}))
    assert not binding.unmatched
    for patch in binding.patches:
        patch.apply_(out[patch.key], strength or Strength(), measured=patch.measure(base[patch.key]))
    return out


def error(got: dict[str, Tensor], want: dict[str, Tensor], base: dict[str, Tensor]) -> float:
    """The largest error of a change, relative to it; what PEFT leaves alone must be untouched bit for bit."""
    worst, changed = 0.0, 0
    for key, there in want.items():
        size = float((there.double() - base[key].double()).norm())
        if size == 0:
            assert torch.equal(got[key], base[key]), key
            continue
        assert size > 0.02 * float(base[key].norm()), f"{key}: the case tests nothing"
        worst, changed = max(worst, float((got[key].double() - there.double()).norm()) / size), changed + 1
    assert changed >= 3
    return worst


def road(**more):
    return peft.RoadConfig(group_size=16, target_modules=LINEAR, **more)


def hra(**more):
    return peft.HRAConfig(target_modules=[*LINEAR, "conv_in"], **more)


def psoft(**more):
    return peft.PsoftConfig(r=8, psoft_alpha=16, target_modules=LINEAR, **more)


BARE = {"psoft_mag_a": False, "psoft_mag_b": False}
CASES = {
    "RoAd 1": lambda: road(variant="road_1"),
    "RoAd 2": lambda: road(variant="road_2"),
    "RoAd 4": lambda: road(variant="road_4"),
    "HRA 4": lambda: hra(r=4),
    "HRA 3": lambda: hra(r=3),
    "HRA Gram-Schmidt": lambda: hra(r=4, apply_GS=True, init_weights=False),
    "PSOFT": lambda: psoft(),
    "PSOFT a": lambda: psoft(psoft_mag_b=False),
    "PSOFT bare": lambda: psoft(**BARE),
    "PSOFT series": lambda: psoft(use_cayley_neumann=True, **BARE),
    "PSOFT series limited": lambda: psoft(use_cayley_neumann=True, num_cayley_neumann_terms=7, cayley_neumann_eps=0.3, **BARE),
    "PSOFT free": lambda: psoft(psoft_orth=False),
}


@pytest.mark.parametrize("name", CASES)
def test_merged_as_peft_merges(tmp_path: Path, name: str) -> None:
    base, merged, live = saved(tmp_path, CASES[name]())
    adapter = load_adapter(tmp_path)
    assert adapter.title.startswith(f"PEFT {name.split()[0]}") and not adapter.unknown
    assert error(ours(adapter, base), merged, base) < LIMIT
    # The state of the live model, which has the adapter's name in it and the base model beside it.
    config = dict(peft.PeftConfig.from_pretrained(str(tmp_path)).to_dict())
    of_live = read_tensors(live, {}, config=config)
    assert error(ours(of_live, base), merged, base) < LIMIT


@pytest.mark.parametrize("name", ["RoAd 1", "HRA 4", "PSOFT bare"])
def test_a_wrong_reading_is_seen(tmp_path: Path, name: str) -> None:
    base, merged, _ = saved(tmp_path, CASES[name]())
    for at in (Strength(-1.0), Strength(0.5)):
        assert error(ours(load_adapter(tmp_path), base, at), merged, base) > 0.1


@pytest.mark.parametrize("name", ["RoAd 1", "HRA 4", "PSOFT bare"])
@pytest.mark.parametrize("mode", ["rotation", "geodesic"])
def test_the_strength_turns(tmp_path: Path, name: str, mode: str) -> None:
    """Lengths stay between 0 and 1, twice a half is the whole for what is a power, and -1 takes back what 1 did."""
    base, _, _ = saved(tmp_path, CASES[name]())
    adapter = load_adapter(tmp_path)
    whole, half = ours(adapter, base, Strength(1.0, mode)), ours(adapter, base, Strength(0.5, mode))
    binding = adapter.bind(NameIndex({key: value.shape for key, value in base.items()}))
    for patch in binding.patches:
        key, measured = patch.key, patch.measure(base[patch.key])
        if name != "RoAd 1":
            assert torch.allclose(half[key].flatten(1).norm(dim=1), base[key].flatten(1).norm(dim=1), rtol=1e-5)
        if mode == "geodesic" or name != "PSOFT bare":
            twice = half[key].clone()
            patch.apply_(twice, Strength(0.5, mode), measured=measured)
            assert torch.allclose(twice, whole[key], atol=1e-5)
        back = whole[key].clone()
        patch.apply_(back, Strength(-1.0, mode), measured=measured)
        assert torch.allclose(back, base[key], atol=1e-5)


def test_reflections_have_no_half(tmp_path: Path) -> None:
    saved(tmp_path, CASES["HRA 3"]())
    adapter = load_adapter(tmp_path)
    with pytest.raises(StrengthError, match="reflects"):
        adapter.bind(NameIndex({k: v.shape for k, v in Model().state_dict().items()})).check(Strength(0.5))
    assert not any("diverged" in w for w in describe(adapter).warnings)


def test_the_report_speaks_of_subspaces(tmp_path: Path) -> None:
    saved(tmp_path, CASES["HRA 4"]())
    text = describe(load_adapter(tmp_path)).to_text()
    assert "Turns a subspace of each layer's inputs; dimensions (layers): 4 (4)" in text


def test_a_weight_in_rows_of_a_fused_one(tmp_path: Path) -> None:
    """One matrix in the model, several in the file: each has its own subspace, which is that of its rows."""
    for name in ("HRA 4", "PSOFT"):
        base, _, _ = saved(tmp_path / name, CASES[name]())
        adapter = load_adapter(tmp_path / name)
        piece = next(pieces[0] for module, pieces in adapter.operations().items() if module.endswith("to_q"))
        tall = torch.cat([torch.randn(16, 48, generator=torch.Generator().manual_seed(5)), base["transformer_blocks.0.to_q.weight"]])
        alone = base["transformer_blocks.0.to_q.weight"].clone()
        op = piece.op
        op.apply_(alone, Strength(), measured=op.measure(alone) if op.needs_base else None)
        rows = tall[16:]
        op.apply_(rows, Strength(), measured=op.measure(rows.clone()) if op.needs_base else None)
        assert torch.allclose(tall[16:], alone, atol=1e-6)
        if name == "PSOFT":
            with pytest.raises(ShapeError, match="whole weight"):
                op.rows_slice(0, 8)
        else:
            assert op.rows_slice(0, 8).basis is op.basis


def test_what_cannot_be_said_otherwise_is_refused(tmp_path: Path) -> None:
    base, _, _ = saved(tmp_path, CASES["HRA 4"]())
    adapter, index = load_adapter(tmp_path), NameIndex({k: v.shape for k, v in base.items()})
    binding = adapter.bind(index)
    with pytest.raises(FormatError, match="subspace"):
        write_adapter({patch.key: patch.op for patch in binding.patches}, index, tmp_path / "x.safetensors", "peft")
    with pytest.raises(StackError, match="subspace"):
        blend([Share(patch, Strength(), "x") for patch in binding.patches], 2, index.shapes)


def test_it_survives_as_plain_numbers(tmp_path: Path) -> None:
    for name in ("RoAd 1", "HRA 4", "PSOFT bare"):
        base, _, _ = saved(tmp_path / name, CASES[name]())
        key = "transformer_blocks.0.to_q.weight"
        for patch in load_adapter(tmp_path / name).bind(NameIndex({k: v.shape for k, v in base.items()})).patches:
            if patch.key == key:
                again, one, two = LayerRotation.from_state(*patch.op.to_state()), base[key].clone(), base[key].clone()
                patch.op.apply_(one, Strength(0.7), measured=patch.measure(base[key]))
                again.apply_(two, Strength(0.7), measured=patch.measure(base[key]))
                assert torch.equal(one, two)


def test_a_randomised_subspace_says_so(tmp_path: Path) -> None:
    base, merged, _ = saved(tmp_path, psoft(psoft_svd="lowrank", random_seed=3, **BARE))
    adapter = load_adapter(tmp_path)
    assert any("randomised" in note for note in adapter.notes)
    assert error(ours(adapter, base), merged, base) < 0.1
    state = torch.random.get_rng_state()
    ours(adapter, base)
    assert torch.equal(state, torch.random.get_rng_state())


def test_a_start_from_pissa_is_refused(tmp_path: Path) -> None:
    saved(tmp_path, psoft(ab_svd_init="pissa_init"))
    with pytest.raises(FormatError, match="PiSSA"):
        load_adapter(tmp_path)


@pytest.mark.parametrize(("name", "change"), [
    ("RoAd 1", lambda t: {k: v for k, v in t.items() if "alpha" not in k}),
    ("RoAd 1", lambda t: {k: v[:-3] if "theta" in k else v for k, v in t.items()}),
    ("RoAd 1", lambda t: {k: v[:10] for k, v in t.items()}),
    ("HRA 4", lambda t: {k: torch.zeros_like(v) for k, v in t.items()}),
    ("HRA 4", lambda t: {k: v.t().contiguous() for k, v in t.items()}),
    ("PSOFT", lambda t: {k: v[:-1] for k, v in t.items()}),
])
def test_broken_files_end_well(tmp_path: Path, name: str, change) -> None:
    saved(tmp_path, CASES[name]())
    file = tmp_path / "adapter_model.safetensors"
    save_file(change(load_file(file)), file)
    with pytest.raises(AdapterError) as caught:
        load_adapter(tmp_path)
    assert str(file) in str(caught.value) and "module: base_model.model." in str(caught.value)


def test_another_layer_width_is_refused(tmp_path: Path) -> None:
    for name in ("RoAd 1", "HRA 4", "PSOFT"):
        saved(tmp_path / name, CASES[name]())
        adapter = load_adapter(tmp_path / name)
        wrong = {f"transformer_blocks.0.{n}.weight": (6, 5) for n in LINEAR} | {"conv_in.weight": (20, 3, 3, 3)}
        with pytest.raises(ShapeError):
            adapter.bind(NameIndex(wrong))


def test_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    base, merged, _ = saved(tmp_path, CASES["PSOFT"]())
    model, out = tmp_path / "model.safetensors", tmp_path / "out.safetensors"
    save_file(base, model)
    assert cli.main(["merge", str(tmp_path), str(model), "-o", str(out)]) == 0
    assert error(load_file(out), merged, base) < LIMIT
    assert cli.main(["inspect", str(tmp_path), "--layers"]) == 0
    assert "PEFT PSOFT (F18" in capsys.readouterr().out


def test_directions_are_those_of_the_files_order_of_rows(tmp_path: Path) -> None:
    """Where a model keeps the halves of a layer's rows exchanged: the signs of singular vectors depend on the order."""
    saved(tmp_path, CASES["PSOFT bare"]())
    op = next(pieces[0].op for module, pieces in load_adapter(tmp_path).operations().items() if module.endswith("to_q"))
    for seed in range(8):
        mine = torch.randn(64, 48, generator=torch.Generator().manual_seed(seed))
        theirs = torch.cat(mine.chunk(2)[::-1])
        patch, got = Patch("m", "w", op, swap_halves=True), theirs.clone()
        patch.apply_(got, Strength(), measured=patch.measure(theirs))
        op.apply_(mine, Strength(), measured=op.measure(mine.clone()))
        assert torch.allclose(torch.cat(got.chunk(2)[::-1]), mine, atol=1e-5), seed
