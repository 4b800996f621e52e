"""A seeded round of mutated files over all dialects (see fuzz.py, which by hand does any number of them)."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

_spec = importlib.util.spec_from_file_location("oft_fuzz", Path(__file__).with_name("fuzz.py"))
fuzz = importlib.util.module_from_spec(_spec)
sys.modules["oft_fuzz"] = fuzz
_spec.loader.exec_module(fuzz)


def test_every_seed_is_right_as_it_is(tmp_path: Path) -> None:
    """Otherwise the mutations would only meet errors."""
    for file in fuzz.seeds():
        # The factors of the F4a sample are any matrices, and powers of a product that reflects are refused.
        expected = fuzz.ERROR if file.dialect == "F4a" else fuzz.OK
        assert fuzz.outcome(file, tmp_path) == (expected, ""), file.dialect


def test_mutated_files_end_well() -> None:
    counts, bad = fuzz.run(600, seed=1)
    assert not bad, "\n".join(bad)
    assert counts[fuzz.OK] > 120 and counts[fuzz.ERROR] > 120
