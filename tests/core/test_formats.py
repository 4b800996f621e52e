"""Detection of every dialect, the variants that the golden vectors do not cover, and readable errors for bad files."""

from __future__ import annotations

import json
import math
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from oft_core import (
    AdapterError,
    FileError,
    FormatError,
    ModelMismatch,
    NameIndex,
    ReadOptions,
    ShapeError,
    Strength,
    StrengthError,
    ValueFault,
    describe,
    load_adapter,
    read_tensors,
)

Q = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
U = Q.replace(".", "_")
OUT, IN = 24, 16


def rand(*shape: int, seed: int = 0, size: float = 0.1) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * size


def merged(tensors: dict, base: torch.Tensor, *, key: str = f"{Q}.weight", s: float = 1.0, mode: str = "linear", **kw) -> torch.Tensor:
    """The weight after reading ``tensors`` and applying them to one layer."""
    adapter = read_tensors(tensors, **kw)
    binding = adapter.bind(NameIndex({key: base.shape}))
    out = base.clone()
    for patch in binding.patches:
        norm = base.float().flatten(1).norm(dim=1) if patch.op.needs_base else None
        patch.apply_(out, Strength(s, mode), measured=norm)
    return out


def cay(q: torch.Tensor) -> torch.Tensor:
    eye = torch.eye(q.shape[-1], dtype=torch.float64)
    return torch.stack([(eye + m) @ torch.linalg.inv(eye - m) for m in q.double()])


def skew(v: torch.Tensor, b: int) -> torch.Tensor:
    q = torch.zeros(v.shape[0], b, b, dtype=torch.float64)
    i, j = torch.triu_indices(b, b, 1)
    q[:, i, j] = v.double()
    return q - q.transpose(1, 2)


def n5(q: torch.Tensor) -> torch.Tensor:
    eye = torch.eye(q.shape[-1], dtype=torch.float64)
    return eye + 2 * q + 2 * q @ q + 2 * q @ q @ q + q @ q @ q @ q


def close(got: torch.Tensor, want: torch.Tensor) -> None:
    assert (got.double() - want).norm() / want.norm() < 1e-6


W = rand(OUT, IN, seed=11, size=1.0)
BLOCKS = rand(4, 6, 6)
PACKED = rand(4, 6)  # four blocks of 4 on 16 inputs

SAMPLES: dict[str, tuple[dict, dict]] = {
    "F1": ({f"oft_unet_{U}.oft_blocks": BLOCKS, f"oft_unet_{U}.alpha": torch.tensor(1.0)}, {}),
    "F2": ({f"oft_unet_{U}.oft_blocks.0": rand(2, 6, 6), f"oft_unet_{U}.oft_blocks.1": rand(2, 6, 6)}, {}),
    "F3": ({f"lora_unet_{U}.oft_blocks": BLOCKS, f"lora_unet_{U}.alpha": torch.tensor(0.0)}, {}),
    "F3a": ({f"lora_unet_{U}.oft_diag": cay(rand(4, 6, 6) - rand(4, 6, 6).transpose(1, 2)).float()}, {}),
    "F3b": ({f"lora_unet_{U}.oft_diag": rand(4, 6, 6, size=0.05)}, {}),
    "F4": ({f"lora_unet_{U}.oft_blocks": rand(3, 4, 6, 6)}, {}),
    "F4a": ({f"lora_unet_{U}.oft_diag": rand(3, 4, 6, 6)}, {}),
    "F5": ({f"diffusion_model.{Q}.oft_blocks": BLOCKS, f"diffusion_model.{Q}.alpha": torch.tensor(1.0)}, {}),
    "F6": ({f"base_model.model.{Q}.oft_r": BLOCKS}, {}),
    "F7": ({f"base_model.model.{Q}.oft_r": rand(4, 4, 4), f"base_model.model.{Q}.oft_s": torch.ones(OUT, 1)}, {}),
    "F8": ({f"base_model.model.{Q}.oft_R.weight": PACKED}, {"config": {"peft_type": "OFT"}}),
    "F9": ({f"base_model.model.{Q}.oft_R.weight": PACKED}, {"config": {"peft_type": "OFT", "peft_version": "0.18.1"}}),
    "F10": ({f"base_model.model.{Q}.boft_R": rand(2, 4, 4, 4), f"base_model.model.{Q}.boft_s": torch.ones(OUT, 1)}, {}),
    "F11": ({f"lora_unet_{U}.oft_R.weight": PACKED}, {}),
    "F12": ({f"lora_unet_{U}.oft_R.weight": PACKED, f"lora_unet_{U}_dora_log_multiplier": torch.zeros(OUT)}, {}),
    "F13": ({f"lora_unet_{U}.oft_R.weight": PACKED, f"lora_unet_{U}.scaled_oft_metadata": torch.tensor(0.0)}, {}),
    "F14": ({f"oftv2_unet_{U}.oft_rotation.weight": PACKED}, {}),
    "F15": ({f"{Q.rsplit('.', 1)[0]}.processor.to_q_oft.R": rand(4, 4, 4)}, {}),
}


@pytest.mark.parametrize("dialect", SAMPLES)
def test_detection_and_use(dialect: str) -> None:
    tensors, kw = SAMPLES[dialect]
    adapter = read_tensors(tensors, **kw)
    assert adapter.dialect == dialect
    assert adapter.reason and adapter.title
    assert (merged(tensors, W, **kw) - W).norm() > 1e-3
    report = describe(adapter, adapter.bind(NameIndex({f"{Q}.weight": W.shape})), Strength())
    assert report.dialect == dialect and report.components["unet"].matched == 1
    assert dialect in report.to_text() and json.loads(report.to_json())["layers"] == 1


@pytest.mark.parametrize("dialect", SAMPLES)
def test_wrong_width_is_refused(dialect: str) -> None:
    tensors, kw = SAMPLES[dialect]
    for shape in ((OUT + 6, IN + 4), (OUT * 2, IN * 2)):
        with pytest.raises(ShapeError) as error:
            merged(tensors, torch.zeros(shape), **kw)
        assert "to_q" in str(error.value) and "expected" in str(error.value)


@pytest.mark.parametrize("dialect", SAMPLES)
def test_nan_is_refused(dialect: str) -> None:
    tensors, kw = SAMPLES[dialect]
    key = next(iter(tensors))
    broken = tensors | {key: tensors[key].clone()}
    broken[key].view(-1)[3] = math.nan
    with pytest.raises(ValueFault, match="not finite"):
        read_tensors(broken, **kw)


# ------------------------------------------------------------------ variants without golden vectors


def test_additive_preview_files() -> None:
    d = SAMPLES["F3b"][0][f"lora_unet_{U}.oft_diag"]
    m = torch.block_diag(*(torch.eye(6, dtype=torch.float64) + d.double())).T
    close(merged(SAMPLES["F3b"][0], W), m @ W.double())
    as_rotation = merged(SAMPLES["F3b"][0], W, options=ReadOptions(oft_diag="rotation"))
    close(as_rotation, torch.block_diag(*d.double()).T @ W.double())


def test_finished_butterfly() -> None:
    d = SAMPLES["F4a"][0][f"lora_unet_{U}.oft_diag"].double()
    x = W.double()
    for i in range(3):
        k = 2**i * 3
        y = x.view(-1, 2, k, IN).transpose(1, 2).reshape(4, 6, IN)
        y = torch.einsum("bij,bjc->bic", d[i], y)
        x = y.reshape(-1, k, 2, IN).transpose(1, 2).reshape(OUT, IN)
    close(merged(SAMPLES["F4a"][0], W), x)


def test_flat_rescale_of_lycoris_2_1_acts_along_the_last_axis() -> None:
    square = rand(OUT, OUT, seed=5, size=1.0)
    scale = torch.exp(rand(OUT, seed=6))
    tensors = {f"lora_unet_{U}.oft_blocks": BLOCKS, f"lora_unet_{U}.rescale": scale}
    m = torch.block_diag(*cay(BLOCKS - BLOCKS.transpose(1, 2))).T
    close(merged(tensors, square), (m @ square.double()) * scale.double())
    close(merged(tensors | {f"lora_unet_{U}.rescale": scale.view(-1, 1)}, square), (m @ square.double()) * scale.double()[:, None])


@pytest.mark.parametrize("conv", [False, True])
def test_oft_v2_direction_depends_on_the_layer(conv: bool) -> None:
    base = W.view(OUT, 4, 2, 2) if conv else W
    r = torch.block_diag(*n5(skew(PACKED, 4)))
    want = W.double() @ (r if conv else r.T)
    close(merged(SAMPLES["F11"][0], base).reshape(OUT, IN), want)
    close(merged(SAMPLES["F9"][0], base, **SAMPLES["F9"][1]).reshape(OUT, IN), W.double() @ r.T)  # PEFT: always the same


@pytest.mark.parametrize(
    ("date", "choice", "divisor"),
    [
        ("2026-08-01", "auto", 2 * math.sqrt(3)), ("2026-02-01", "auto", math.sqrt(6)), ("", "auto", 2 * math.sqrt(3)),
        ("2026-02-01", "new", 2 * math.sqrt(3)), ("2026-08-01", "old", math.sqrt(6)),
    ],
)
def test_scaled_divisor_by_date(date: str, choice: str, divisor: float) -> None:
    tensors = SAMPLES["F11"][0] | {f"lora_unet_{U}.oft_R.scaled_oft": torch.tensor(True)}
    got = merged(tensors, W, metadata={"modelspec.date": date} if date else {}, options=ReadOptions(scaled_divisor=choice))
    close(got, W.double() @ torch.block_diag(*n5(skew(PACKED, 4) / divisor)).T)


@pytest.mark.parametrize(("date", "old"), [("2025-11-14", True), ("2025-11-15T10:00:00", True), ("2025-11-16", False), ("", False)])
def test_series_of_the_first_days_of_onetrainer(date: str, old: bool) -> None:
    q = skew(PACKED, 4)
    r = n5(q) + (q @ q @ q @ q if old else 0)
    got = merged(SAMPLES["F11"][0], W, metadata={"ot_branch": "master"} | ({"modelspec.date": date} if date else {}))
    close(got, W.double() @ torch.block_diag(*r).T)


@pytest.mark.parametrize("conv", [False, True])
@pytest.mark.parametrize("source", ["onetrainer", "musubi"])
def test_coft_of_oft_v2_files(source: str, conv: bool) -> None:
    eps = 0.1
    tensors = dict(SAMPLES["F11"][0])
    metadata = {}
    if source == "onetrainer":
        metadata["ot_config"] = json.dumps({"oft_coft": True, "coft_eps": eps})
    else:
        tensors |= {f"lora_unet_{U}.oft_coft_metadata": torch.tensor(1.0), f"lora_unet_{U}.coft_eps_metadata": torch.tensor(eps)}
    q = skew(PACKED, 4)
    limited = q * (eps / 2 / q.flatten(1).norm(dim=1)).clamp_max(1)[:, None, None]  # sqrt of four blocks
    if source == "onetrainer" and conv:
        limited = q  # OneTrainer projected linear layers only
    r = torch.block_diag(*n5(limited))
    base = W.view(OUT, 4, 2, 2) if conv else W
    close(merged(tensors, base, metadata=metadata).reshape(OUT, IN), W.double() @ (r if conv else r.T))


def test_dora_without_initial_norm_uses_the_measureds() -> None:
    scale = torch.exp(rand(OUT, seed=3)) * 4
    tensors = SAMPLES["F11"][0] | {f"lora_unet_{U}.dora_scale": scale.view(-1, 1)}
    rotated = W.double() @ torch.block_diag(*n5(skew(PACKED, 4))).T
    want = rotated * (scale.double() / W.double().norm(dim=1))[:, None]
    close(merged(tensors, W), want)


def test_linear_dora_multiplier() -> None:
    factor = torch.exp(rand(OUT, seed=4))
    tensors = SAMPLES["F11"][0] | {f"lora_unet_{U}.dora_multiplier": factor}
    close(merged(tensors, W), (W.double() @ torch.block_diag(*n5(skew(PACKED, 4))).T) * factor.double()[:, None])


@pytest.mark.parametrize("s", [1.0, 0.5, -1.0])
def test_dokr_rotates_the_sum_and_sets_row_norms(s: float) -> None:
    w1, w2a, w2b = rand(4, 2, seed=1), rand(6, 3, seed=2), rand(3, 8, seed=3)
    magnitude = torch.exp(rand(OUT, seed=4)) * 4
    tensors = SAMPLES["F11"][0] | {
        f"lora_unet_{U}.lokr_w1": w1, f"lora_unet_{U}.lokr_w2_a": w2a, f"lora_unet_{U}.lokr_w2_b": w2b,
        f"lora_unet_{U}.alpha": torch.tensor(6.0), f"lora_unet_{U}.lora_magnitude_vector.weight": magnitude,
    }
    assert read_tensors(tensors).dialect == "F13"
    total = W.double() + 2 * torch.kron(w1.double(), (w2a @ w2b).double())  # alpha / rank = 2
    rotated = total @ torch.block_diag(*n5(skew(PACKED, 4) / (2 * math.sqrt(3)))).T  # always scaled
    want = rotated * (magnitude.double() / total.norm(dim=1))[:, None]
    close(merged(tensors, W, s=s), W.double() + s * (want - W.double()))


@pytest.mark.parametrize("exact", [False, True])
def test_takenoko(exact: bool) -> None:
    name = f"oftv2_unet_{U}"
    tensors = {
        f"{name}.oft_rotation.weight": PACKED, f"{name}.oft_block_size_buffer": torch.tensor(4),
        f"{name}.oft_use_cayley_neumann_buffer": torch.tensor(not exact), f"{name}.oft_num_cayley_neumann_terms_buffer": torch.tensor(4),
        f"{name}.oft_coft_buffer": torch.tensor(False), f"{name}.oft_coft_eps_buffer": torch.tensor(6e-5),
    }
    q = skew(PACKED, 4)
    eye = torch.eye(4, dtype=torch.float64)
    r = cay(-q) if exact else eye + 2 * q + 2 * q @ q + q @ q @ q
    close(merged(tensors, W), W.double() @ torch.block_diag(*r).T)


@pytest.mark.parametrize("dialect", ["F8", "F9"])
def test_peft_series_option_overrides_the_config(dialect: str) -> None:
    tensors, kw = SAMPLES[dialect]
    q = skew(PACKED, 4)
    new, old = n5(q), n5(q) + q @ q @ q @ q
    close(merged(tensors, W, options=ReadOptions(peft_neumann="new"), **kw), W.double() @ torch.block_diag(*new).T)
    close(merged(tensors, W, options=ReadOptions(peft_neumann="old"), **kw), W.double() @ torch.block_diag(*old).T)


def test_alpha_rule_option() -> None:
    tensors = SAMPLES["F5"][0] | {f"diffusion_model.{Q}.alpha": torch.tensor(0.05)}
    q = (BLOCKS - BLOCKS.transpose(1, 2)).double()
    for choice, limit in (("auto", 0.05), ("raw", 0.05), ("scaled", 0.05 * OUT)):
        m = torch.block_diag(*cay(q * min(1, limit / float(q.norm())))).T
        close(merged(tensors, W, options=ReadOptions(alpha_rule=choice)), m @ W.double())


def test_constraint_lost_to_half_precision_comes_from_the_metadata() -> None:
    tensors = {f"oft_unet_{U}.oft_blocks": BLOCKS, f"oft_unet_{U}.alpha": torch.tensor(0.0, dtype=torch.float16)}
    adapter = read_tensors(tensors, {"ss_network_module": "networks.oft", "ss_network_alpha": "1e-8"})
    op = adapter.operations()[f"oft_unet_{U}"][0].op
    assert op.constraint.limit == pytest.approx(1e-8 * OUT) and "half precision" in adapter.notes[0]


def test_live_peft_names_and_mangled_names_meet() -> None:
    a = merged({f"base_model.model.{Q}.oft_R.default.weight": PACKED}, W)
    b = merged({f"base_model.model.{Q}.oft_R.weight": PACKED}, W)
    assert torch.equal(a, b)
    mixed = {f"lora_unet_{U}.oft_R.weight": PACKED, f"lora_unet.{Q}.oft_R.cans_oft": torch.tensor(True)}
    close(merged(mixed, W), W.double() @ torch.block_diag(*cay(skew(PACKED, 4))).T)


def test_rotated_bias_only_on_request() -> None:
    tensors = SAMPLES["F1"][0]
    index = NameIndex({f"{Q}.weight": (OUT, IN), f"{Q}.bias": (OUT,)})
    old = {"ss_training_started_at": "1699020000.5"}
    adapter = read_tensors(tensors, old)
    assert [p.key for p in adapter.bind(index).patches] == [f"{Q}.weight"]
    assert any("biases" in n for n in adapter.notes)
    patches = read_tensors(tensors, old, options=ReadOptions(rotate_bias="on")).bind(index).patches
    assert [p.key for p in patches] == [f"{Q}.weight", f"{Q}.bias"]
    bias = rand(OUT, seed=8)
    want = torch.block_diag(*cay(BLOCKS - BLOCKS.transpose(1, 2))).T @ bias.double()
    patches[1].apply_(bias, Strength())
    close(bias, want)


def test_split_layers_of_a_fused_file_and_the_reverse() -> None:
    fused = rand(3 * OUT, IN, seed=20, size=1.0)
    parts = {f"transformer_blocks.0.attn.{n}.weight": fused[i * OUT : (i + 1) * OUT] for i, n in enumerate(("to_q", "to_k", "to_v"))}
    shapes = {k: v.shape for k, v in parts.items()} | {
        "transformer_blocks.0.attn.add_q_proj.weight": (OUT, IN), "single_transformer_blocks.0.proj_mlp.weight": (OUT, IN),
    }
    name = "lora_unet_double_blocks_0_img_attn_qkv"
    for tensors in (
        {f"{name}.oft_R.weight": PACKED},
        {f"{name}.oft_blocks": rand(12, 6, 6), f"{name}.rescale": torch.exp(rand(3 * OUT, 1, seed=9))},
        {f"oft_unet_double_blocks_0_img_attn_qkv.oft_blocks.{i}": rand(4, 6, 6, seed=i) for i in range(3)},
    ):
        whole = merged(tensors, fused, key="double_blocks.0.img_attn.qkv.weight")
        patches = read_tensors(tensors).bind(NameIndex(shapes)).patches
        assert len(patches) == 3
        for patch in patches:
            got = parts[patch.key].clone()
            patch.apply_(got, Strength(1.0, "linear"))
            start = list(parts).index(patch.key) * OUT
            assert torch.allclose(got, whole[start : start + OUT], atol=1e-6)
    with pytest.raises(ShapeError, match="run across layers"):
        read_tensors({f"{name}.oft_blocks": rand(9, 8, 8)}).bind(NameIndex({k: (16 if len(v) else 0, IN) for k, v in shapes.items()} | {
            f"transformer_blocks.0.attn.{n}.weight": (24, IN) for n in ("to_q", "to_k", "to_v")} | {
            "transformer_blocks.0.attn.to_q.weight": (20, IN), "transformer_blocks.0.attn.to_k.weight": (28, IN)}))


# ------------------------------------------------------------------ bad files


def write(folder: Path, tensors: dict, name: str = "a.safetensors", metadata: dict | None = None) -> Path:
    save_file({k: v.contiguous() for k, v in tensors.items()}, folder / name, metadata)
    return folder / name


OTHER_KINDS: dict[str, dict] = {
    "a LoRA": {"lora_unet_x.lora_down.weight": torch.zeros(4, 8), "lora_unet_x.lora_up.weight": torch.zeros(8, 4)},
    "a LoHa": {"lora_unet_x.hada_w1_a": torch.zeros(4, 8)},
    "a LoKr": {"lora_unet_x.lokr_w1": torch.zeros(4, 8), "lora_unet_x.lokr_w2": torch.zeros(4, 8)},
    "a full checkpoint": {"model.diffusion_model.input_blocks.0.0.weight": torch.zeros(4)},
    "a textual inversion": {"string_to_param": torch.zeros(4)},
    "unknown": {"something": torch.zeros(4)},
}


@pytest.mark.parametrize("kind", OTHER_KINDS)
def test_other_files_are_named_for_what_they_are(tmp_path: Path, kind: str) -> None:
    path = write(tmp_path, OTHER_KINDS[kind])
    with pytest.raises(FormatError) as error:
        load_adapter(path)
    words = "not a file of a known kind" if kind == "unknown" else kind
    assert words in str(error.value) and str(path) in str(error.value)


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-20])


def no_header(path: Path) -> None:
    path.write_bytes(b"\xff" * 64)


def empty(path: Path) -> None:
    path.write_bytes(b"")


def a_pickle(path: Path) -> None:
    path.write_bytes(pickle.dumps({"a": 1}))


@pytest.mark.parametrize("damage", [truncated, no_header, empty, a_pickle])
def test_damaged_files(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    path = write(tmp_path, SAMPLES["F3"][0])
    damage(path)
    with pytest.raises(FileError, match="damaged or not a safetensors file"):
        load_adapter(path)


def test_missing_file_and_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(FileError, match="no such file"):
        load_adapter(tmp_path / "none.safetensors")
    with pytest.raises(FileError, match="holds no adapter"):
        load_adapter(tmp_path)


def test_pickles_only_on_request_and_never_code(tmp_path: Path) -> None:
    class Harm:
        def __reduce__(self) -> tuple:
            return (Path(tmp_path / "harm").touch, ())

    good, bad = tmp_path / "good.bin", tmp_path / "bad.bin"
    torch.save(SAMPLES["F15"][0], good)
    bad.write_bytes(pickle.dumps({"a": Harm()}, protocol=2))
    with pytest.raises(FileError, match="pickle"):
        load_adapter(good)
    assert load_adapter(good, ReadOptions(allow_pickle=True)).dialect == "F15"
    with pytest.raises(FileError, match="refused|damaged"):
        load_adapter(bad, ReadOptions(allow_pickle=True))
    assert not (tmp_path / "harm").exists()


def test_damaged_pickles_are_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "cut.bin"
    torch.save(SAMPLES["F15"][0], path, _use_new_zipfile_serialization=False)
    old = path.read_bytes()
    torch.save(SAMPLES["F15"][0], path)
    zipped = path.read_bytes()
    damaged = [b"", b"hello", b"\x80\x02", b"<html>", old[:300], old[:40] + b"\xff" + old[41:], zipped[: len(zipped) // 2]]
    damaged += [old[:n] + bytes([(old[n] + 1) % 256]) + old[n + 1 :] for n in range(0, 600, 7)]
    for content in damaged:
        path.write_bytes(content)
        try:
            load_adapter(path, ReadOptions(allow_pickle=True))
        except AdapterError as error:
            assert "cut.bin" in str(error)


def test_peft_folder_with_config(tmp_path: Path) -> None:
    write(tmp_path, SAMPLES["F9"][0], "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "OFT", "use_cayley_neumann": False, "peft_version": "0.19.0"}))
    adapter = load_adapter(tmp_path)
    assert adapter.dialect == "F9" and next(iter(adapter.operations().values()))[0].op.kind == "cayley"
    (tmp_path / "adapter_config.json").write_text("{")
    with pytest.raises(FileError, match="adapter_config"):
        load_adapter(tmp_path)


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({"lora_unet_x.oft_blocks": rand(4, 6, 5)}, "square blocks"),
        ({"lora_unet_x.oft_blocks": rand(4, 6)}, "square blocks"),
        ({"lora_unet_x.oft_blocks": rand(3, 4, 5, 5)}, "butterfly"),
        ({"lora_unet_x.oft_R.weight": rand(4, 7)}, "packed skew"),
        ({"lora_unet_x.oft_R.weight": rand(0, 6)}, "packed skew"),
        ({"lora_unet_x.oft_blocks": BLOCKS, "lora_unet_x.alpha": rand(3)}, "single number"),
        ({"oft_unet_x.oft_blocks.0": BLOCKS, "oft_unet_x.oft_blocks.2": BLOCKS}, "not complete"),
        ({"base_model.model.x.boft_R": rand(3, 3, 4, 4)}, "butterfly"),
        ({"lora_unet_x.oft_R.weight": PACKED, "lora_unet_x.lokr_w1": rand(2, 2)}, "LoKr"),
        ({"lora_unet_x.oft_R.weight": PACKED, "lora_unet_x.lokr_w1": rand(300, 300), "lora_unet_x.lokr_w2": rand(300, 300)}, "LoKr.*numbers"),
        (
            {
                "lora_unet_x.oft_R.weight": PACKED, "lora_unet_x.lokr_w1": rand(2, 2), "lora_unet_x.lokr_w2_a": rand(4, 3),
                "lora_unet_x.lokr_w2_b": rand(2, 4),
            },
            "lokr_w2_a.*do not fit together",
        ),
        ({"lora_unet_x.oft_R.weight": PACKED, "lora_unet_x.dora_scale": rand(9, 1), "lora_unet_x.initial_norm": rand(5)}, "different length"),
    ],
)
def test_impossible_tensors(tensors: dict, words: str) -> None:
    with pytest.raises(AdapterError, match=words) as error:
        read_tensors(tensors, name="file.safetensors")
    assert "file.safetensors" in str(error.value) and "x" in str(error.value)


@pytest.mark.parametrize("terms", [1e20, -3.0, float("nan")])
def test_an_impossible_number_of_terms(terms: float) -> None:
    tensors = {"lora_unet_x.oft_R.weight": PACKED, "lora_unet_x.oft_R.neumann_terms": torch.tensor(terms)}
    with pytest.raises(AdapterError, match="file.safetensors"):
        read_tensors(tensors, name="file.safetensors")


@pytest.mark.parametrize(
    ("config", "word"),
    [
        ({"num_cayley_neumann_terms": [5]}, "num_cayley_neumann_terms"), ({"num_cayley_neumann_terms": 10**9}, "1 to 1000"),
        ({"coft": True, "eps": "much"}, "eps"), ({"num_cayley_neumann_terms": None}, ""), ({"coft": True, "eps": None}, ""),
    ],
)  # fmt: skip
def test_numbers_of_a_peft_config(config: dict, word: str) -> None:
    """null is the default, as in PEFT's own reading; what is no number is named."""
    tensors, config = {"base_model.model.x.oft_R.weight": PACKED}, {"peft_type": "OFT", "peft_version": "0.19.0", **config}
    if word:
        with pytest.raises(AdapterError, match=word):
            read_tensors(tensors, config=config)
    else:
        ((piece,),) = read_tensors(tensors, config=config).operations().values()
        assert piece.op.terms == 5 and (piece.op.constraint is None) == ("coft" not in config)


def test_metadata_of_other_kinds_than_numbers() -> None:
    blocks = {"lora_unet_x.oft_blocks": rand(4, 6, 6), "lora_unet_x.alpha": torch.tensor(0.0)}
    for constraint in ("[1]", '"much"', "null", "{}"):
        adapter = read_tensors(blocks, {"ss_network_args": f'{{"constraint": {constraint}}}', "ss_network_module": "networks.oft"})
        assert adapter.operations()["lora_unet_x"][0].op.constraint is None
    with pytest.raises(AdapterError, match="coft_eps"):
        read_tensors({"lora_unet_x.oft_R.weight": PACKED}, {"ot_config": '{"oft_coft": true, "coft_eps": "much"}'})


def test_another_model_family() -> None:
    adapter = read_tensors({"oft_unet_double_blocks_0_img_attn_proj.oft_blocks.0": BLOCKS}, name="flux.safetensors")
    index = NameIndex({f"{Q}.weight": W.shape})
    with pytest.raises(ModelMismatch, match="flux") as error:
        adapter.bind(index)
    assert "Nothing in this file" in str(error.value)
    assert adapter.bind(index, strict=False).unmatched


def test_unknown_keys_and_unmatched_layers_are_reported() -> None:
    tensors = SAMPLES["F3"][0] | {
        "lora_unet_other.lora_down.weight": torch.zeros(2, 2), "lora_unet_elsewhere.oft_blocks": BLOCKS,
    }
    adapter = read_tensors(tensors)
    report = describe(adapter, adapter.bind(NameIndex({f"{Q}.weight": W.shape})), Strength())
    assert report.components["unet"].unmatched == ["lora_unet_elsewhere"]
    assert any("lora_down" in w for w in report.warnings) and any("no place" in w for w in report.warnings)


def test_diverging_series_is_reported_and_limited() -> None:
    tensors = {f"lora_unet_{U}.oft_R.weight": rand(4, 6, size=2.0)}
    adapter = read_tensors(tensors)
    assert any("diverges" in w for w in describe(adapter).warnings)
    binding = adapter.bind(NameIndex({f"{Q}.weight": W.shape}))
    binding.check(Strength(1.0))
    with pytest.raises(StrengthError):
        binding.check(Strength(0.5))


def test_report_counts_limits_and_angles() -> None:
    tensors = {f"oft_unet_{U}.oft_blocks": BLOCKS, f"oft_unet_{U}.alpha": torch.tensor(0.001)}
    metadata = {"ss_tag_frequency": json.dumps({"5_dog": {"sks dog": 20, "park": 3}}), "ss_base_model_version": "sd_v1"}
    report = describe(read_tensors(tensors, metadata))
    q = (BLOCKS - BLOCKS.transpose(1, 2)).double()
    assert report.radius_in_use == pytest.approx(float(q.norm()) / (0.001 * OUT), rel=1e-5)
    assert report.limits_active == 1 and "output size" in report.constraint
    top = 2 * math.degrees(math.atan(float(torch.linalg.matrix_norm(q, 2).max()) * 0.001 * OUT / float(q.norm())))
    assert report.max_angle == pytest.approx(top, rel=1e-4)
    assert report.orthogonality_error < 1e-6 and report.side == "output" and report.block_sizes == {6: 1}
    assert report.trigger_words[0] == "sks dog" and "sd_v1" in report.base_model


def test_hostile_names_and_metadata_are_shown_harmlessly() -> None:
    name = "lora_unet_" + "\x1b[31m" + "x" * 5000
    adapter = read_tensors({f"{name}.oft_blocks": BLOCKS}, {"modelspec.trigger_phrase": "a\x07\nb" + "y" * 9000})
    text = describe(adapter, adapter.bind(NameIndex({f"{Q}.weight": W.shape}), strict=False), Strength()).to_text()
    with pytest.raises(ModelMismatch) as error:
        adapter.bind(NameIndex({f"{Q}.weight": W.shape}))
    for shown in (text, str(error.value)):
        assert len(shown) < 4000 and all(c.isprintable() or c == "\n" for c in shown)


@pytest.mark.parametrize("dialect", ["F1", "F9", "F10"])
def test_estimated_measures_are_close(dialect: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors, kw = SAMPLES[dialect]
    exact = describe(read_tensors(tensors, **kw))
    monkeypatch.setattr("oft_core.measure.EXACT_WORK", 0)
    rough = describe(read_tensors(tensors, **kw))
    assert rough.angles_estimated and not exact.angles_estimated and "about" in rough.to_text()
    assert rough.max_angle == pytest.approx(exact.max_angle, rel=0.2)
    assert rough.mean_angle == pytest.approx(exact.mean_angle, rel=0.3)
    assert rough.orthogonality_error == pytest.approx(exact.orthogonality_error, rel=0.9, abs=1e-6)


def test_column_factors_of_the_analysis_tool() -> None:
    v = rand(IN, seed=7)
    tensors = SAMPLES["F11"][0] | {f"lora_unet_{U}.dora_log_multiplier_col": v}
    rotated = W.double() @ torch.block_diag(*n5(skew(PACKED, 4))).T
    close(merged(tensors, W), rotated * (v - v.mean()).double().exp())


@pytest.mark.parametrize("dialect", ["F1", "F3", "F5", "F11"])
def test_differences_beside_any_rotation_are_applied(dialect: str) -> None:
    tensors = dict(SAMPLES[dialect][0])
    name = next(iter(tensors)).rpartition(".oft_")[0]
    tensors |= {f"{name}.diff": rand(OUT, IN, seed=30), f"{name}.diff_b": rand(OUT, seed=31)}
    close(merged(tensors, W), merged(SAMPLES[dialect][0], W).double() + rand(OUT, IN, seed=30).double())
    shapes = {f"{Q}.weight": (OUT, IN), f"{Q}.bias": (OUT,)}
    assert [p.key for p in read_tensors(tensors).bind(NameIndex(shapes)).patches] == [f"{Q}.weight", f"{Q}.weight", f"{Q}.bias"]


def test_extras_without_a_meaning_are_named() -> None:
    tensors = SAMPLES["F3"][0] | {f"lora_unet_{U}.dora_scale": torch.ones(OUT, 1)}
    assert any("dora_scale" in n for n in read_tensors(tensors).notes)


@pytest.mark.parametrize(("r", "out"), [(7, 24), (5, 6), (9, 10), (7, 30), (3, 10), (4, 24)])
@pytest.mark.parametrize("coft", [False, True])
@pytest.mark.parametrize("share", [False, True])
def test_f6_blocks_over_the_edge(r: int, out: int, coft: bool, share: bool) -> None:
    """PEFT 0.7-0.13 has r blocks of ceil(out / r) and cuts their product at out, also where whole blocks hang over."""
    d, eps = -(-out // r), 0.05
    a = rand(1 if share else r, d, d, seed=r).double()
    if coft:
        limit = eps * d * d / math.sqrt(len(a))
        a = torch.stack([x * min(1.0, limit / float(x.norm())) for x in a])
    s = 0.5 * (a - a.transpose(-1, -2))
    eye = torch.eye(d, dtype=torch.float64)
    blocks = [(eye - x) @ torch.linalg.inv(eye + x) for x in s] * (r if share else 1)
    w = rand(out, 8, seed=1)
    want = torch.block_diag(*blocks)[:out, :out].T @ w.double()
    tensors = {f"base_model.model.{Q}.oft_r": rand(1 if share else r, d, d, seed=r)}
    config = {"peft_type": "OFT", "r": r, "coft": coft, "eps": eps, "block_share": share}
    got = merged(tensors, w, config=config)
    assert (got.double() - want).norm() <= 1e-5 * (want - w.double()).norm()


def test_f6_of_another_width_is_refused() -> None:
    with pytest.raises(ShapeError, match="do not fit"):
        merged({f"base_model.model.{Q}.oft_r": rand(4, 5, 5)}, rand(24, 8), config={"peft_type": "OFT", "r": 4})
