"""Every golden case: what each training tool itself computes from its own file, against ours, through the command line.

The command is run in this process, which is what takes a fraction of a second instead of several; one case of every format also
goes through a real `python -m oft_core`.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from oft_core import cli
from oft_core.adapter import Strength, load_adapter
from oft_core.formats import ReadOptions
from oft_core.names import NameIndex

REPO = Path(__file__).resolve().parents[2]
_spec = importlib.util.spec_from_file_location("golden_check", REPO / "tests" / "golden" / "check.py")
golden = importlib.util.module_from_spec(_spec)
sys.modules["golden_check"] = golden
_spec.loader.exec_module(golden)

TEMPLATE = "merge {adapter} {base} -o {out} --strength {m} --mode {mode} --allow-pickle"
JOBS = list(golden.jobs())
# A row factor (DoRA) is not scaled by that tool's multiplier; our rotation mode takes it to the power of the strength.
ROW_FACTOR = [job for job in JOBS if job.mode == "rotation" and job.case == "F13_musubi_dora_oft"]
PLAIN = [job for job in JOBS if job not in ROW_FACTOR]


def test_nothing_was_lost():
    """The cases that are here, so that an incomplete copy cannot pass."""
    formats = {golden.case_info(p.name)["format"] for p in golden.CASES.iterdir()}
    assert formats == {f"F{n}" for n in range(1, 14)} | {"F3a", "F15"}
    assert len(list(golden.CASES.iterdir())) == 40
    assert len(JOBS) == 87


@pytest.mark.parametrize("job", PLAIN, ids=lambda job: job.name)
def test_command_line(job, tmp_path, capsys):
    out = tmp_path / "out.safetensors"
    code = cli.main(golden.command(TEMPLATE, job, out))
    assert code == 0, capsys.readouterr().err
    assert golden.check(job, out) == []


@pytest.mark.parametrize("job", ROW_FACTOR, ids=lambda job: job.name)
def test_generator_strength_with_row_factor(job, tmp_path):
    """The tool's rule leaves the row factor f at full size for every m, ours takes f to the power m: rows differ by f^(m-1)."""
    out = tmp_path / "out.safetensors"
    assert cli.main(golden.command(TEMPLATE, job, out)) == 0
    want, base = load_file(job.folder / job.expected), load_file(job.folder / "base.safetensors")
    stored, scaled = load_file(job.folder / job.adapter), 0
    for module in {key.rsplit(".", 1)[0] for key in stored if key.endswith(".dora_scale")}:
        factor = stored[f"{module}.dora_scale"].float().flatten() / stored[f"{module}.initial_norm"].float().flatten()
        key = next(k for k in base if module.endswith(k.removesuffix(".weight").replace(".", "_")))
        want[key] = want[key] * (factor ** (job.multiplier - 1)).view(-1, *[1] * (want[key].ndim - 1))
        scaled += 1
    assert scaled
    assert golden.faults(load_file(out), want, base, golden.case_info(job.case)["tolerance"]) == []


@pytest.mark.parametrize("fmt", sorted({golden.case_info(job.case)["format"] for job in JOBS}))
def test_real_process(fmt, tmp_path):
    job = next(job for job in JOBS if golden.case_info(job.case)["format"] == fmt)
    out = tmp_path / "out.safetensors"
    command = [sys.executable, "-m", "oft_core", *golden.command(TEMPLATE, job, out)]
    run = subprocess.run(command, cwd=REPO, capture_output=True, text=True, timeout=120, check=False)
    assert run.returncode == 0, run.stderr
    assert golden.check(job, out) == []


def test_bias_that_sd_scripts_of_2023_rotated():
    """Its training forward computed R^T (W x + b), its own merge left the bias alone: `rotate_bias` chooses."""
    folder = golden.CASES / "F1_kohya_2023_sd15"
    base = load_file(folder / "base.safetensors")
    for option, expected in (("on", "merged_2023_forward.safetensors"), ("off", "merged.safetensors")):
        got = {key: value.clone() for key, value in base.items()}
        adapter = load_adapter(folder / "adapter.safetensors", ReadOptions(rotate_bias=option))
        for patch in adapter.bind(NameIndex({k: tuple(v.shape) for k, v in base.items()})).patches:
            patch.apply_(got[patch.key], Strength(1.0, "linear"))
        tolerance = golden.case_info(folder.name)["tolerance"]
        assert golden.faults(got, load_file(folder / expected), base, tolerance) == []


def test_lycoris_strength_rules_are_not_ours(tmp_path):
    """LyCORIS applies `rescale` in full and every butterfly factor by itself at m != 1; our linear mode must not look like it."""
    seen = 0
    for folder in sorted(golden.CASES.iterdir()):
        info = golden.case_info(folder.name)
        for expected, entry in info["strengths"].items():
            if entry["semantics"] not in golden.MODE:
                job = golden.Job(folder.name, info["adapters"][0], expected, entry["multiplier"], "linear")
                out = tmp_path / f"{seen}.safetensors"
                assert cli.main(golden.command(TEMPLATE, job, out)) == 0
                assert golden.check(job, out) != []
                seen += 1
    assert seen == 6


def test_pickle_is_refused_unless_allowed(tmp_path, capsys):
    job = next(job for job in JOBS if job.adapter.endswith(".bin"))
    out = tmp_path / "out.safetensors"
    argv = [a for a in golden.command(TEMPLATE, job, out) if a != "--allow-pickle"]
    assert cli.main(argv) == 1
    assert "pickle" in capsys.readouterr().err
    assert not out.exists()


# ---- the cases can fail --------------------------------------------------------------------------------------------


def spoil(folder: Path, target: Path) -> Path:
    """A copy of a case's adapter in which every generator or finished matrix has the opposite direction."""
    info = golden.case_info(folder.name)
    source = folder / info["adapters"][0]
    tensors = load_file(source)
    for key, value in tensors.items():
        if key.endswith(("oft_R.weight", "oft_embedding_R.weight")):
            tensors[key] = -value
        elif ".oft_blocks" in key or key.endswith((".oft_diag", ".oft_r", ".boft_R", "_oft.R")):
            tensors[key] = value.transpose(-1, -2).contiguous()
    with open(source, "rb") as f:
        header = json.loads(f.read(int.from_bytes(f.read(8), "little")))
    save_file(tensors, str(target / source.name), header.get("__metadata__"))
    config = folder / "adapter_config.json"
    if config.is_file():
        (target / config.name).write_bytes(config.read_bytes())
    return target / source.name


@pytest.mark.parametrize("case", sorted(p.name for p in golden.CASES.iterdir()))
def test_opposite_direction_fails(case, tmp_path):
    """A reader with the wrong sign would fail in every single case."""
    folder = golden.CASES / case
    file = spoil(folder, tmp_path)
    base = load_file(folder / "base.safetensors")
    got = {key: value.clone() for key, value in base.items()}
    for patch in load_adapter(file).bind(NameIndex({k: tuple(v.shape) for k, v in base.items()})).patches:
        patch.apply_(got[patch.key], Strength(1.0, "linear"))
    assert golden.faults(got, load_file(folder / "merged.safetensors"), base, golden.case_info(case)["tolerance"])
