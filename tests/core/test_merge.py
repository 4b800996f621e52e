"""Merging into model files through the command line."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from oft_core import Strength, describe, load_adapter, merge_file
from oft_core.cli import main
from oft_core.merge import read_header

REPO = Path(__file__).resolve().parents[2]
BLOCK = "down_blocks.0.attentions.0.transformer_blocks.0"


def rand(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path, Path]:
    """(adapter for to_q, to_out and a text encoder, base without that and with more layers and other dtypes, output path)."""
    name = BLOCK.replace(".", "_")
    save_file(
        {
            f"lora_unet_{name}_attn1_to_q.oft_blocks": rand(4, 6, 6) * 0.1,
            f"lora_unet_{name}_attn1_to_out_0.oft_blocks": rand(4, 6, 6, seed=1) * 0.1,
            "lora_te_text_model_encoder_layers_9_mlp_fc1.oft_blocks": rand(4, 6, 6, seed=2) * 0.1,
        },
        tmp_path / "adapter.safetensors",
    )
    save_file(
        {
            f"{BLOCK}.attn1.to_q.weight": rand(24, 16),
            f"{BLOCK}.attn1.to_out.0.weight": rand(24, 24, seed=3).half(),
            f"{BLOCK}.attn1.to_out.0.bias": rand(24, seed=4).bfloat16(),
            f"{BLOCK}.ff.net.2.weight": rand(24, 24, seed=5).to(torch.float8_e4m3fn),
            "position_ids": torch.arange(7),
            "scalar": torch.tensor(2.5),
            "nothing": torch.zeros(0, 4),
        },
        tmp_path / "base.safetensors",
        {"format": "pt", "modelspec.title": "näme"},
    )
    return tmp_path / "adapter.safetensors", tmp_path / "base.safetensors", tmp_path / "out.safetensors"


def raw(path: Path) -> dict[str, bytes]:
    data = path.read_bytes()
    return {k: data[s.begin : s.end] for k, s in read_header(path)[0].items()}


def test_touches_only_what_it_should(files: tuple[Path, Path, Path], capsys: pytest.CaptureFixture) -> None:
    adapter, base, out = files
    assert main(["merge", str(adapter), str(base), "-o", str(out), "--strength", "0.5"]) == 0
    before, after = raw(base), raw(out)
    assert before.keys() == after.keys()
    changed = {k for k in before if before[k] != after[k]}
    assert changed == {f"{BLOCK}.attn1.to_q.weight", f"{BLOCK}.attn1.to_out.0.weight"}
    with safe_open(out, "pt") as f:
        metadata = f.metadata()
        assert {k: v.dtype for k, v in load_file(out).items()} == {k: v.dtype for k, v in load_file(base).items()}
    assert metadata["modelspec.title"] == "näme"
    record = json.loads(metadata["oft_merge"])
    assert record == [
        {"adapter": "adapter.safetensors", "dialect": "F3", "strength": 0.5, "mode": "rotation", "coft": "file", "layers": 2,
         "layers_not_found": 1}
    ]
    captured = capsys.readouterr()
    assert "2 of 3 layers" in captured.out and "layers_9_mlp_fc1" in captured.err


def test_equals_the_layers_own_application(files: tuple[Path, Path, Path]) -> None:
    adapter, base, out = files
    strength = Strength(-0.7, "geodesic")
    binding = merge_file(load_adapter(adapter), base, out, strength)
    want = load_file(base)
    for patch in binding.patches:
        patch.apply_(want[patch.key], strength)
    got = load_file(out)
    assert all(torch.equal(got[k].float(), want[k].float()) for k in want)


@pytest.mark.parametrize("scale", ["scale_weight", "weight_scale", "comfy_quant"])
def test_a_base_of_scaled_codes_is_refused(files: tuple[Path, Path, Path], capsys: pytest.CaptureFixture, scale: str) -> None:
    adapter, base, out = files
    tensors = load_file(base)
    key = f"{BLOCK}.attn1.to_q"
    tensors[f"{key}.weight"] = tensors[f"{key}.weight"].to(torch.float8_e4m3fn)
    tensors[f"{key}.{scale}"] = torch.tensor(1e-3)
    save_file(tensors, base)
    assert main(["merge", str(adapter), str(base), "-o", str(out)]) == 1
    said = capsys.readouterr().err
    assert key in said and scale in said and "unquantised" in said and not out.exists()


def test_strength_zero_copies_the_base(files: tuple[Path, Path, Path], capsys: pytest.CaptureFixture) -> None:
    adapter, base, out = files
    assert main(["merge", str(adapter), str(base), "-o", str(out), "--strength", "0"]) == 0
    assert raw(base) == raw(out)
    captured = capsys.readouterr()
    assert "0 of 3 layers" in captured.out and "copy of the base" in captured.err
    with safe_open(out, "pt") as f:
        assert json.loads(f.metadata()["oft_merge"])[0]["layers"] == 0


def test_only_what_changed_is_counted(files: tuple[Path, Path, Path], capsys: pytest.CaptureFixture) -> None:
    """Blocks that select the attention of another place leave every layer as it is; half of them, half."""
    adapter, base, out = files
    assert main(["merge", str(adapter), str(base), "-o", str(out), "--blocks", "all=0"]) == 0
    assert "0 of 3 layers" in capsys.readouterr().out and raw(base) == raw(out)
    assert main(["merge", str(adapter), str(base), "-o", str(out), "--blocks", "attention=0, all=1"]) == 0
    assert "2 of 3 layers" in capsys.readouterr().out


def missing_layer(adapter: Path) -> None:
    tensors = load_file(adapter)
    save_file({**tensors, f"lora_unet_{BLOCK.replace('.', '_')}_attn9_to_q.oft_blocks": rand(4, 6, 6)}, adapter)


def other_family(adapter: Path) -> None:
    save_file(load_file(adapter), adapter, {"ss_base_model_version": "sd_v2_v"})


@pytest.mark.parametrize(("spoil", "words"), [(missing_layer, "attn9"), (other_family, "made for sd2")])
def test_what_fits_in_part_needs_to_be_allowed(
    files: tuple[Path, Path, Path], capsys: pytest.CaptureFixture, spoil: Callable[[Path], None], words: str
) -> None:
    adapter, base, out = files
    tensors = load_file(base)  # SD1: the text that its cross-attention reads is 768 wide
    save_file({**tensors, f"{BLOCK}.attn2.to_k.weight": rand(24, 768)}, base)
    spoil(adapter)
    command = ["merge", str(adapter), str(base), "-o", str(out)]
    assert main(command) == 1
    said = capsys.readouterr().err
    assert words in said and "--allow-partial" in said and not out.exists()
    assert main([*command, "--allow-partial"]) == 0
    captured = capsys.readouterr()
    assert "2 of " in captured.out and words in captured.err
    report = describe(load_adapter(adapter), load_adapter(adapter).bind(_index(base)))
    assert any("sd2" in w or "no place" in w for w in report.warnings)


def test_mostly_for_another_model_is_said(files: tuple[Path, Path, Path]) -> None:
    tensors = {f"lora_unet_input_blocks_4_1_transformer_blocks_{i}_attn1_to_q.oft_blocks": rand(4, 6, 6) for i in range(1, 6)}
    save_file({**load_file(files[0]), **tensors}, files[0])
    adapter = load_adapter(files[0])
    warnings = describe(adapter, adapter.bind(_index(files[1]))).warnings
    assert any("Only 2 of 7 layers fit" in w and "sdxl" in w for w in warnings)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("shards", "2 safetensors files"), ("model.safetensors.index.json", "sharded"),
        ("model.gguf", "GGUF"), ("model.ckpt", "pickle"), ("none.safetensors", "no such file"),
    ],
)
def test_other_bases_are_called_what_they_are(
    files: tuple[Path, Path, Path], capsys: pytest.CaptureFixture, name: str, words: str
) -> None:
    adapter, base, out = files
    path = base.with_name(name)
    if "." not in name:
        path.mkdir()
        for i in range(2):
            (path / f"model-{i}.safetensors").write_bytes(base.read_bytes())
    elif not name.startswith("none"):
        path.write_bytes(b"{}")
    assert main(["merge", str(adapter), str(path), "-o", str(out)]) == 1
    said = capsys.readouterr().err
    assert words in said and name in said and not out.exists()


@pytest.mark.parametrize("beside", ["weight.quant_state.bitsandbytes__nf4", "SCB"])
def test_a_base_of_bitsandbytes_is_called_that(files: tuple[Path, Path, Path], capsys: pytest.CaptureFixture, beside: str) -> None:
    adapter, base, out = files
    key = f"{BLOCK}.attn1.to_q"
    save_file({**load_file(base), f"{key}.weight": torch.zeros(192, 1, dtype=torch.uint8), f"{key}.{beside}": torch.zeros(4)}, base)
    assert main(["merge", str(adapter), str(base), "-o", str(out)]) == 1
    said = capsys.readouterr().err
    assert "bitsandbytes" in said and key in said and "unquantised" in said and not out.exists()


@pytest.mark.parametrize("name", ["fp32", "fp16", "bf16"])
def test_dtype_converts_every_float_once(files: tuple[Path, Path, Path], name: str) -> None:
    adapter, base, out = files
    assert main(["merge", str(adapter), str(base), "-o", str(out), "--dtype", name]) == 0
    dtype = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[name]
    source, got = load_file(base), load_file(out)
    assert got["position_ids"].dtype == torch.int64 and torch.equal(got["position_ids"], source["position_ids"])
    assert all(t.dtype == dtype for k, t in got.items() if k != "position_ids")
    key = f"{BLOCK}.attn1.to_q.weight"
    want = source[key].clone()
    for patch in load_adapter(adapter).bind(_index(base)).patches:
        if patch.key == key:
            patch.apply_(want, Strength())
    assert (got[key].float() - want).abs().max() <= 2 * torch.finfo(dtype).eps * want.abs().max()
    assert torch.equal(got["scalar"], source["scalar"].to(dtype)) and got["nothing"].shape == (0, 4)


def _index(base: Path):
    from oft_core import NameIndex

    return NameIndex({k: s.shape for k, s in read_header(base)[0].items()})


def test_merging_twice_keeps_the_history_and_undoes(files: tuple[Path, Path, Path]) -> None:
    adapter, base, out = files
    again = out.with_name("again.safetensors")
    assert main(["merge", str(adapter), str(base), "-o", str(out), "--dtype", "fp32"]) == 0
    assert main(["merge", str(adapter), str(out), "-o", str(again), "--strength", "-1"]) == 0
    with safe_open(again, "pt") as f:
        assert [r["strength"] for r in json.loads(f.metadata()["oft_merge"])] == [1.0, -1.0]
    source, got = load_file(base), load_file(again)
    key = f"{BLOCK}.attn1.to_q.weight"
    assert (got[key] - source[key]).norm() / source[key].norm() < 1e-6


def failing(*args: object, **kw: object) -> None:
    raise RuntimeError("interrupted")

def test_a_terminal_sees_how_far_a_merge_is(files: tuple[Path, Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    adapter, base, out = files
    shown = {}
    for terminal in (True, False):
        stream = io.StringIO()
        monkeypatch.setattr(stream, "isatty", lambda terminal=terminal: terminal, raising=False)
        monkeypatch.setattr(sys, "stderr", stream)
        assert main(["merge", str(adapter), str(base), "-o", str(out), "--allow-partial"]) == 0
        shown[terminal] = stream.getvalue()
    assert "100%" in shown[True] and "100%" not in shown[False]


def test_an_interrupted_merge_leaves_nothing_behind(files: tuple[Path, Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    adapter, base, out = files
    out.write_bytes(b"precious")
    monkeypatch.setattr("oft_core.merge.Patch.apply_", failing)
    with pytest.raises(RuntimeError, match="interrupted"):
        merge_file(load_adapter(adapter), base, out, Strength())
    assert out.read_bytes() == b"precious"
    assert sorted(p.name for p in out.parent.iterdir()) == ["adapter.safetensors", "base.safetensors", "out.safetensors"]


@pytest.mark.parametrize("victim", [0, 1])
def test_inputs_are_never_overwritten(files: tuple[Path, Path, Path], victim: int, capsys: pytest.CaptureFixture) -> None:
    adapter, base, _ = files
    before = files[victim].read_bytes()
    assert main(["merge", str(adapter), str(base), "-o", str(files[victim])]) == 1
    assert "overwrite" in capsys.readouterr().err and files[victim].read_bytes() == before


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-9])


def scramble(path: Path) -> None:
    path.write_bytes(b"\x10\x00\x00\x00\x00\x00\x00\x00" + b"{'not': json}!!!" + b"\0" * 64)


@pytest.mark.parametrize("damage", [cut, scramble])
def test_damaged_base(files: tuple[Path, Path, Path], damage, capsys: pytest.CaptureFixture) -> None:
    adapter, base, out = files
    damage(base)
    assert main(["merge", str(adapter), str(base), "-o", str(out)]) == 1
    error = capsys.readouterr().err
    assert "damaged" in error
    assert str(base) in error and not out.exists()


def test_quantised_layers_are_refused(files: tuple[Path, Path, Path], capsys: pytest.CaptureFixture) -> None:
    adapter, base, out = files
    tensors = load_file(base)
    tensors[f"{BLOCK}.attn1.to_q.weight"] = torch.zeros(24, 16, dtype=torch.uint8)
    save_file(tensors, base)
    assert main(["merge", str(adapter), str(base), "-o", str(out)]) == 1
    assert "cannot be rotated" in capsys.readouterr().err and not out.exists()


def test_nothing_matched_is_an_error(files: tuple[Path, Path, Path], capsys: pytest.CaptureFixture) -> None:
    adapter, base, out = files
    save_file({"conv_in.weight": rand(4, 4, 3, 3)}, base)
    assert main(["merge", str(adapter), str(base), "-o", str(out)]) == 1
    assert "Nothing in this file belongs to the model" in capsys.readouterr().err and not out.exists()


def test_inspect(files: tuple[Path, Path, Path], capsys: pytest.CaptureFixture) -> None:
    assert main(["inspect", str(files[0])]) == 0
    assert "LyCORIS Diag-OFT (F3" in capsys.readouterr().out
    assert main(["inspect", str(files[0]), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["components"]["unet"]["layers"] == 2
    assert main(["inspect", str(files[1])]) == 1
    assert "not an OFT file" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["--mode", "wild"], ["--dtype", "int8"], ["--strength", "much"], []])
def test_wrong_usage_exits_with_2(files: tuple[Path, Path, Path], arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as leave:
        main(["merge", str(files[0]), *([str(files[1]), "-o", str(files[2])] if arguments else []), *arguments])
    assert leave.value.code == 2


@pytest.mark.parametrize("arguments", [["--coft", "loose"], ["--strength", "nan"], ["--mode", "core", "--coft", "400"]])
def test_undefined_strengths_exit_with_1(files: tuple[Path, Path, Path], arguments: list[str]) -> None:
    assert main(["merge", str(files[0]), str(files[1]), "-o", str(files[2]), *arguments]) == 1
    assert not files[2].exists()


MEMORY = """
import resource, sys, torch
from oft_core import Strength, describe, load_adapter, merge_file
torch.set_num_threads(1)
adapter = load_adapter(sys.argv[1])
merge_file(adapter, sys.argv[2], sys.argv[3] + ".warm", Strength(0.5), allow_partial=True)   # allocator and library start-up are not counted
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
merge_file(adapter, sys.argv[4], sys.argv[3], Strength(0.5))
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


def test_memory_stays_flat(tmp_path: Path) -> None:
    """A base of 12 layers of 32 MiB needs at most about three of them at once."""
    base = {f"{BLOCK}.attn1.to_q.weight": rand(24, 16)}
    save_file(base, tmp_path / "small.safetensors")
    layer = 32 * 2**20
    large = {f"transformer_blocks.{i}.attn.to_q.weight": torch.ones(2048, 4096) for i in range(12)}
    save_file(large | base, tmp_path / "large.safetensors")
    tensors = {f"lora_unet_transformer_blocks_{i}_attn_to_q.oft_blocks": rand(64, 32, 32, seed=i) * 0.01 for i in range(12)}
    tensors[f"lora_unet_{BLOCK.replace('.', '_')}_attn1_to_q.oft_blocks"] = rand(4, 6, 6) * 0.1
    save_file(tensors, tmp_path / "adapter.safetensors")
    paths = [str(tmp_path / n) for n in ("adapter.safetensors", "small.safetensors", "out.safetensors", "large.safetensors")]
    result = subprocess.run([sys.executable, "-c", MEMORY, *paths], cwd=REPO, capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) < 3 * layer


def test_the_module_runs_as_a_command(files: tuple[Path, Path, Path]) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "oft_core", "inspect", str(files[0])], cwd=REPO, capture_output=True, text=True, timeout=120, check=False
    )
    assert result.returncode == 0 and "Diag-OFT" in result.stdout


def test_redirected_output_is_utf_8_whatever_the_system_speaks(tmp_path: Path, files: tuple[Path, Path, Path]) -> None:
    path = tmp_path / "猫.safetensors"
    save_file(load_file(files[0]), path, {"modelspec.trigger_phrase": "小猫"})
    run = subprocess.run(
        [sys.executable, "-m", "oft_core", "inspect", str(path), "--json"], cwd=REPO, capture_output=True, timeout=120, check=False,
        env={**os.environ, "PYTHONIOENCODING": "cp1252"},
    )
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout)["trigger_words"] == ["小猫"]
