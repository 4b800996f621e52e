"""Batched LU on CPU: with two threads and blocks of 150 or more, torch.linalg.inv and solve raise, hang or return wrong numbers
(pytorch issues 141358 and 142815). Our rotations are built without them; a process with a time limit shows it, and so does the source.
"""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]
LIMIT_S = 180

CHILD = """
import sys
import torch
from oft_core.adapter import Strength, read_tensors

torch.set_num_threads(2)
size, count = int(sys.argv[1]), 4
generator = torch.Generator().manual_seed(size)
stored = torch.randn(count, size, size, generator=generator) * (0.5 / size**0.5)
packed = torch.randn(count, size * (size - 1) // 2, generator=generator) * (0.5 / size**0.5)
row, col = torch.triu_indices(size, size, 1)


def skew(vectors):
    q = torch.zeros(count, size, size, dtype=torch.float64)
    q[:, row, col] = vectors.double()
    return q - q.transpose(1, 2)


def reference(q, factor):
    # (I - Q)^-1 (I + Q) one block at a time, by one thread, in float64
    torch.set_num_threads(1)
    eye = torch.eye(size, dtype=torch.float64)
    out = torch.stack([torch.linalg.solve(eye - factor * block, eye + factor * block) for block in q])
    torch.set_num_threads(2)
    return out


def largest(t):
    return t.abs().max().item()


weight = torch.randn(count * size, 8, generator=generator)
kohya = {"oft_unet_a_to_q.oft_blocks": stored, "oft_unet_a_to_q.alpha": torch.tensor(100.0)}
peft = {"base_model.model.a.to_q.oft_R.weight": packed}
exact = {"peft_type": "OFT", "use_cayley_neumann": False, "peft_version": "0.18.1"}
full = stored.double() - stored.double().transpose(1, 2)
limited = {"oft_unet_a_to_q.oft_blocks": stored, "oft_unet_a_to_q.alpha": torch.tensor(1e-2)}
shrink = 1e-2 * count * size / full.norm().item()
assert shrink < 1
# kohya's rows turn by cay(Q)^T = cay(-Q); PEFT's exact columns W cay(Q), which as a matrix on vectors is cay(-Q) too
cases = [
    ("kohya", kohya, None, full, -1.0), ("kohya limited", limited, None, full, -shrink), ("peft exact", peft, exact, skew(packed), 1.0)
]
for name, tensors, config, q, factor in cases:
    adapter = read_tensors(tensors, {}, config=config)
    op = next(iter(adapter.operations().values()))[0].op
    modes = [("rotation", 1.0), ("rotation", -0.37)]
    if name == "kohya":
        modes += [("geodesic", 1.0), ("geodesic", 0.5)]
    for mode, s in modes:
        built = op.build(Strength(s, mode), "cpu").matrices[0]
        assert built.shape == (count, size, size) and built.dtype == torch.float32
        wide = built.double()
        error = largest(wide.transpose(1, 2) @ wide - torch.eye(size, dtype=torch.float64))
        assert error <= 3e-6, f"{name} {mode} {s}: orthogonality {error:.1e}"
        if mode == "rotation" or s == 1.0:
            want = reference(q, factor * s)
            error = min(largest(wide - want), largest(wide - want.transpose(1, 2))) if name == "peft exact" else largest(wide - want)
            assert error <= 3e-6, f"{name} {mode} {s}: {error:.1e} from float64"
            if name == "kohya":
                got = weight.clone()
                op.apply_(got, Strength(s, mode))
                rows = (want @ weight.double().view(count, size, -1)).view_as(weight)
                assert largest(got - rows) <= 2e-5, f"{name} {mode} {s}: weight"
        else:
            assert largest(wide @ wide - op.build(Strength(1.0, mode), "cpu").matrices[0].double()) <= 1e-5
print("done")
"""


@pytest.mark.parametrize("size", [150, 160, 192, 320])
def test_two_threads_large_blocks(size):
    try:
        environment = {**os.environ, "OMP_NUM_THREADS": "2", "MKL_NUM_THREADS": "2"}
        run = subprocess.run(
            [sys.executable, "-c", CHILD, str(size)],
            cwd=REPO, env=environment, capture_output=True, text=True, timeout=LIMIT_S, check=False,
        )
    except subprocess.TimeoutExpired:
        pytest.fail(f"building rotations of {size} with two threads did not end within {LIMIT_S} s")
    assert run.returncode == 0, run.stderr[-2000:]
    assert run.stdout.strip() == "done"


# Everything in torch that factors a batch by LU, under every name it can be called by.
LU = {"inv", "inv_ex", "inverse", "solve", "solve_ex", "lu", "lu_factor", "lu_factor_ex", "lu_solve", "det", "slogdet", "tensorinv"}


def lu_calls(source: str) -> list[str]:
    """Calls in Python ``source`` of anything in LU, as attribute or by a name imported from torch.linalg."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if name in LU:
                found.append(f"line {node.lineno}: {ast.unparse(node.func)}")
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("torch"):
            found += [f"line {node.lineno}: import {a.name}" for a in node.names if a.name in LU]
    return found


def test_no_lu_in_the_source():
    files = sorted(f for folder in ("oft_core", "nodes") for f in (REPO / folder).rglob("*.py"))
    assert len(files) > 10
    found = {str(f.relative_to(REPO)): calls for f in files if (calls := lu_calls(f.read_text("utf-8")))}
    assert found == {}


def test_the_source_check_sees_them():
    source = "from torch.linalg import inv_ex as f\ntorch.linalg.solve(a, b)\n(I - q).float().inverse()\ntorch.cholesky_solve(a, b)\n"
    assert len(lu_calls(source)) == 3
