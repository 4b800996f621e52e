"""A disk that takes no more, in the middle of a real write: every file is the old one or whole, nothing temporary stays, and the
error names the file and the system's reason."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

REPO = Path(__file__).resolve().parents[2]
pytest.importorskip("resource", reason="limits the size of files as POSIX systems can")

#: ``room(size)``: a file may grow to so many bytes, then writes fail as on a full disk. The rest of argv is the program's.
LIMITED = """
    import resource, runpy, signal, sys
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    def room(size=-1):
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
"""
REASON = "File too large"  # EFBIG, where a full disk has ENOSPC


def limited(program: str, *args: object) -> subprocess.CompletedProcess:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(LIMITED) + textwrap.dedent(program), *map(str, args)], cwd=REPO, env=environment,
        capture_output=True, text=True, timeout=300, check=False,
    )


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


# ------------------------------------------------------------------ merge

K = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
MERGE = """
    room(int(sys.argv.pop(1)))
    sys.argv[0] = "oft_core"
    runpy.run_module("oft_core", run_name="__main__", alter_sys=True)
"""


@pytest.mark.parametrize(("size", "old"), [(0, True), (100, False), (70_000, True), (120_000, False)])
def test_merge(tmp_path: Path, size: int, old: bool) -> None:
    """At once, in the header, in a tensor and at the end; over an old file and where there is none."""
    adapter, base, out = tmp_path / "a.safetensors", tmp_path / "base.safetensors", tmp_path / "to" / "out.safetensors"
    save_file({f"lora_unet_{K.replace('.', '_')}.oft_blocks": torch.full((4, 16, 16), 0.1)}, adapter)
    save_file({f"{K}.weight": torch.ones(64, 64), "other.weight": torch.ones(200, 130)}, base)
    if old:
        out.parent.mkdir()
        out.write_bytes(b"old")
    before = contents(tmp_path)
    done = limited(MERGE, size, "merge", adapter, base, "-o", out)
    assert done.returncode == 1 and not done.stdout
    assert done.stderr == f"error: The file cannot be written; file: {out}; found: {REASON}.\n"
    assert contents(tmp_path) == before


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
@pytest.mark.parametrize("more", [[], ["--json"]])
def test_a_report_that_finds_no_room(tmp_path: Path, more: list[str]) -> None:
    save_file({f"lora_unet_{K.replace('.', '_')}.oft_blocks": torch.full((4, 16, 16), 0.1)}, tmp_path / "a.safetensors")
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "oft_core", "inspect", tmp_path / "a.safetensors", *more], cwd=REPO, stdout=full,
            stderr=subprocess.PIPE, text=True, timeout=120, check=False,
        )
    assert (done.returncode, done.stderr) == (1, "error: No space left on device; file: standard output\n")


# ------------------------------------------------------------------ adapters

SAVE = """
    import json, torch
    from pathlib import Path
    from oft_core import FileError, LayerRotation, NameIndex
    from oft_core.formats.write import write_adapter

    def contents():
        return {str(p): p.read_bytes() for p in Path(sys.argv[1]).rglob("*") if p.is_file()}

    for dialect, sizes in {"oft_v2": (0, 100, 30_000), "kohya": (0, 30_000), "peft": (0, 1000, 30_000)}.items():
        layers, shapes = {}, {}
        for i in range(40):
            key = f"diffusion_model.input_blocks.1.1.transformer_blocks.{i}.attn1.to_q.weight"
            shapes[key] = (64, 64)
            layers[key] = LayerRotation("out" if dialect == "kohya" else "in", 8, 8, "cayley", 5, generator=torch.rand(1, 8, 28))
        path = Path(sys.argv[1]) / dialect / "file"
        for old in (False, True):
            before = contents()
            for size in sizes:
                room(size)
                try:
                    write_adapter(layers, NameIndex(shapes), path, dialect)
                    error = None
                except FileError as fault:
                    error = str(fault)
                room()
                print(json.dumps([dialect, old, size, error, contents() == before]))
            layers = dict(list(layers.items())[:30])
            write_adapter(layers, NameIndex(shapes), path, dialect)
    (Path(sys.argv[1]) / "a file").touch()
    try:
        write_adapter(layers, NameIndex(shapes), Path(sys.argv[1]) / "a file" / "a.safetensors", "peft")
    except FileError as error:
        print(json.dumps(str(error)))
"""


def test_adapters(tmp_path: Path) -> None:
    """PEFT's config and tensors belong together: neither is new without the other."""
    done = limited(SAVE, tmp_path)
    assert not done.returncode, done.stderr
    *lines, folder = map(json.loads, done.stdout.splitlines())
    assert len(lines) == 16
    for dialect, old, size, error, as_before in lines:
        assert as_before, (dialect, old, size)
        assert error is not None and f"file: {tmp_path / dialect / 'file'}" in error and REASON in error, (dialect, size, error)
        if dialect == "peft":
            assert ("adapter_model" if size == 30_000 else "adapter_config") in error, error
    assert "a.safetensors" in folder and "Not a directory" in folder


# ------------------------------------------------------------------ training

TRAIN = """
    import json, torch
    from pathlib import Path
    from oft_core.training import Loaded, Objective, OFTConfig, Record, RotationBank, StateError, Trainer, TrainSettings
    from oft_core.training.checkpoint import saved_states
    from safetensors.torch import load_file

    def train(folder, steps):
        torch.manual_seed(0)
        model = torch.nn.Sequential(*(torch.nn.Linear(64, 64) for _ in range(4)))
        config = OFTConfig(oft_block_size=8, target_modules="all-linear")
        bank = RotationBank({"unet": (model, config.select(model))}, seed=3)
        latents = torch.randn(1, 4, 4, 4)
        trainer = Trainer(
            bank, TrainSettings(steps=steps, lr=0.01, seed=7, save_every=2), Objective(), [Record("a", "", (32, 32))],
            load=lambda records: Loaded(latents), predict=lambda noised, records: model(noised.x_t.flatten(1)).view(1, 4, 4, 4),
            state_dir=folder,
        )
        trainer.resume()
        return trainer.run().losses

    def contents(folder):
        return {p.name: p.read_bytes() for p in folder.rglob("*") if p.is_file()}

    def tensors(folder):  # the order of a header's metadata is left to chance
        return [(p.name, {k: bytes(t.numpy().tobytes()) for k, t in load_file(p).items()}) for p in saved_states(folder)]

    root = Path(sys.argv[1])
    losses, whole = train(root / "whole", 8), tensors(root / "whole")
    for size in (0, 1000, 10_000):
        for first in (0, 4):
            folder = root / f"{size} {first}"
            if first:
                train(folder, first)
            before = contents(folder)
            room(size)
            try:
                train(folder, 8)
                error = None
            except StateError as fault:
                error = str(fault)
            room()
            kept = contents(folder) == before
            print(json.dumps([size, first, error, kept, train(folder, 8) == losses, tensors(folder) == whole]))
    (root / "file").touch()
    try:
        train(root / "file" / "run", 8)
    except StateError as error:
        print(json.dumps(str(error)))
"""


def test_training(tmp_path: Path) -> None:
    """The last good state stays and is gone on from once there is room, to the same end."""
    done = limited(TRAIN, tmp_path)
    assert not done.returncode, done.stderr
    *lines, folder = map(json.loads, done.stdout.splitlines())
    assert len(lines) == 6
    for size, first, error, kept, same_losses, same_files in lines:
        assert error is not None and REASON in error and "disk space" in error, (size, first, error)
        assert f"file: {tmp_path / f'{size} {first}' / f'state-{first + 2:08d}.safetensors'};" in error
        assert kept and same_losses and same_files, (size, first)
    assert "state-00000002" in folder and "Not a directory" in folder
