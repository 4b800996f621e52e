"""Measure what the smoke test tests/host/test_subject.py may expect, and write it beside that test.

    python benchmarks/subject_bounds.py HOST_DIR WORK [--runs 6] [--random 4]      (with the host's Python)

For several seeds: one training as in the test, and files that turn every block by the same angles in random planes.
Fidelity is how much more like the subject's unseen views the pictures are than the base model's; drift is how far
pictures of other captions move. The bounds are: fidelity half way between the worst training and the best random
file; drift a quarter above the largest of the trainings.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPO))

from dev.server import ComfyServer
from dev.subjects import (
    SMOKE,
    drawn,
    drift,
    likeness,
    other_prompts,
    provide_checkpoint,
    random_like,
    subject,
    subject_prompts,
    train,
)

SUBJECT = "koala"  # the test's: what random rotations reach differs much between subjects
TARGET = REPO / "tests" / "host" / "subject_bounds.json"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("host_dir", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("--runs", type=int, default=4)
    parser.add_argument("--random", type=int, default=4)
    options = parser.parse_args()
    found: dict[str, list] = {"trained": [], "random": []}
    with ComfyServer(options.host_dir, options.work) as server:
        client = server.client()
        provide_checkpoint(server.models)
        others = drawn(client, other_prompts())
        for i in range(options.runs):
            concept = subject(SUBJECT)
            base = likeness(drawn(client, subject_prompts(concept)), concept)
            begun = time.monotonic()
            file = train(server, client, concept, seed=i, name=f"bounds/seed{i}", **SMOKE)
            took = time.monotonic() - begun
            files = {"trained": [file], "random": []}
            for k in range(options.random):
                files["random"].append(
                    random_like(file, server.models / "oft" / "bounds" / f"random{i}_{k}.safetensors", i * options.random + k)
                )
            for kind, paths in files.items():
                for path in paths:
                    name = path.relative_to(server.models / "oft").as_posix()
                    fidelity = likeness(drawn(client, subject_prompts(concept), name), concept) - base
                    moved = drift(drawn(client, other_prompts(), name), others)
                    found[kind].append([i, round(fidelity, 4), round(moved, 4)])
                    print(
                        f"{concept.name}, {kind}: fidelity {fidelity:+.4f}, drift {moved:.4f} ({took:.0f} s)",
                        flush=True,
                    )
    best_random = max(fidelity for _, fidelity, _ in found["random"])
    worst = min(fidelity for _, fidelity, _ in found["trained"])
    result = {
        "settings": SMOKE,
        "fidelity_at_least": round((best_random + worst) / 2, 4),
        "drift_at_most": round(1.25 * max(moved for _, _, moved in found["trained"]), 4),
        "subject": SUBJECT,
        "columns": ["seed", "fidelity", "drift"],
        **found,
    }
    TARGET.with_suffix(".part").write_text(json.dumps(result, indent=1) + "\n", "utf-8")
    os.replace(TARGET.with_suffix(".part"), TARGET)
    print(f"{platform.processor() or platform.machine()}: wrote {TARGET}")


if __name__ == "__main__":
    main()
