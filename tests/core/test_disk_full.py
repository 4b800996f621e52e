"""Writing where the disk takes no more: a clear error, the old file whole, nothing half-written left behind.

A limit on the size of files stands for the full disk (the system then answers writes with an error in the same place).
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

pytest.importorskip("resource")
REPO = Path(__file__).resolve().parents[2]
NAME = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"

#: Runs the rest of the command line as code, with files of at most 64 KiB.
LIMITED = """
import resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, 1 << 16))
sys.argv = sys.argv[1:]
sys.path.insert(0, sys.argv.pop(0))
"""
STATE = """
import torch
from oft_core.training.checkpoint import save_state
from oft_core.errors import AdapterError
try:
    save_state(__import__("pathlib").Path(sys.argv[1]), 2, {"w": torch.zeros(200, 200)}, {})
except AdapterError as error:
    print(error, file=sys.stderr); sys.exit(1)
"""
ADAPTER = f"""
import torch
from pathlib import Path
from oft_core import AdapterError, LayerRotation, NameIndex
from oft_core.formats.write import write_adapter
NAME = {NAME!r}
layers = {{
    NAME.replace("to_q", "to_" + k) + ".weight": LayerRotation("in", 64, 4, generator=torch.randn(1, 4, 2016) * 1e-2, kind="neumann")
    for k in "qkv"
}}
index = NameIndex({{key: (256, 256) for key in layers}})
try:
    write_adapter(layers, index, Path(sys.argv[1]), sys.argv[2])
except AdapterError as error:
    print(error, file=sys.stderr); sys.exit(1)
"""
MERGE = """
from oft_core.cli import main
sys.exit(main(sys.argv[1:]))
"""


def run(code: str, *arguments: object) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", LIMITED + code, "x", str(REPO), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


def files(folder: Path) -> dict[str, str]:
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.rglob("*")) if p.is_file()}


def refused(result: subprocess.CompletedProcess, name: str) -> None:
    assert result.returncode == 1, result.stderr
    assert "Traceback" not in result.stderr and name in result.stderr and "File too large" in result.stderr, result.stderr


def test_a_training_state(tmp_path: Path) -> None:
    from oft_core.training.checkpoint import load_latest, save_state

    save_state(tmp_path, 1, {"w": torch.ones(200, 200)}, {})
    before = files(tmp_path)
    refused(run(STATE, tmp_path), "state-00000002")
    assert files(tmp_path) == before
    step, state = load_latest(tmp_path)
    assert step == 1 and bool((state["w"] == 1).all())


@pytest.mark.parametrize("dialect", ["oft_v2", "peft"])
def test_an_adapter(tmp_path: Path, dialect: str) -> None:
    target = tmp_path / ("a.safetensors" if dialect == "oft_v2" else "a")
    old = target if dialect == "oft_v2" else target / "adapter_model.safetensors"
    old.parent.mkdir(exist_ok=True)
    old.write_bytes(b"precious")
    before = files(tmp_path)
    refused(run(ADAPTER, target, dialect), old.name)
    after = files(tmp_path)
    after.pop("a/adapter_config.json", None)  # whole, and written before the large file
    assert after == before


def test_a_merge(tmp_path: Path) -> None:
    save_file({f"{NAME}.weight": torch.randn(256, 256)}, tmp_path / "base.safetensors")
    save_file({f"lora_unet_{NAME.replace('.', '_')}.oft_R.weight": torch.randn(32, 28) * 0.1}, tmp_path / "a.safetensors")
    (tmp_path / "out.safetensors").write_bytes(b"precious")
    before = files(tmp_path)
    refused(run(MERGE, "merge", tmp_path / "a.safetensors", tmp_path / "base.safetensors", "-o", tmp_path / "out.safetensors"), "out.safetensors")
    assert files(tmp_path) == before
