"""Is there something to distil? The undistilled scenes teacher at few steps, against a second sample of 28 steps.

    python benchmarks/scenes_gate.py                               # 28, 4, 2 and 1 steps with the teacher's guidance; writes the rows
    python benchmarks/scenes_gate.py --sweep 1 1.5 2 3             # first pictures of each set in 28 steps at other guidances; prints alone

fd_scenes_teacher compares with 5,000 pictures that the teacher drew in 28 steps from seeds of their own, so what it scores in 28 steps itself
is the floor. The gate: 4, 2 and 1 steps are at least 2, 5 and 15 times as far, and at 28 steps scene_accuracy is at least .85. Rows go to
benchmarks/results/scenes_gate.jsonl, with provenance: those of protocol `scenes`, then one of each condition, whose name begins with `gate`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from fastgen import families, fingerprints, generator
from fastgen.evaluation import results, unkept
from fastgen.evaluation.protocol import Protocol, load_protocol
from fastgen.evaluation.table import summary_table
from fastgen.terminal import progress

OUTPUT = Path(__file__).parent / "results" / "scenes_gate.jsonl"
TEACHER, STEPS = "fastgen:scenes", 28
FACTORS = {4: 2.0, 2: 5.0, 1: 15.0}  # by which fewer steps must be further from the teacher than a second sample is
ACCURACY = 0.85


def measured(protocol: Protocol, steps: Sequence[int], guidance: float | None = None) -> list[Any]:
    """The protocol's rows of the teacher at these steps."""
    teacher = generator.load_teacher(TEACHER, guidance=guidance)
    return unkept.run_protocol(protocol, teacher, model="teacher", steps=steps, guidance=teacher.guidance, progress=progress())


def gate(rows: Sequence[Any]) -> list[dict[str, Any]]:
    """Each condition: what is measured, what is needed, whether it holds."""
    values = {(row["name"], row.get("steps")): row["value"] for row in rows if row["model"] == "teacher"}
    floor = values["fd_scenes_teacher", STEPS]
    found = [(f"gate_fd_over_floor_{steps}", values["fd_scenes_teacher", steps] / floor, factor) for steps, factor in FACTORS.items()]
    found.append(("gate_scene_accuracy", values["scene_accuracy", STEPS], ACCURACY))
    return [{"name": name, "value": value, "needed": needed, "holds": value >= needed} for name, value, needed in found]


def sweep(guidances: Sequence[float], count: int) -> None:
    """Accuracy and distance from real scenes of the first pictures of each set, by guidance."""
    protocol = load_protocol("scenes")
    protocol.sets.update({name: each.head(count) for name, each in protocol.sets.items()})
    for guidance in guidances:
        rows = measured(protocol, [STEPS], guidance)
        print(f"w {guidance:g}:", ", ".join(f"{row['name']} {row['value']:.4g}" for row in rows), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sweep", nargs="+", type=float, help="guidances to compare; nothing is written")
    parser.add_argument("--count", type=int, default=500, help="pictures of each set in a sweep")
    parser.add_argument("--threads", type=int, default=2, help="of PyTorch; seconds and the last digits depend on it")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.sweep:
        return sweep(arguments.sweep, arguments.count)
    protocol = load_protocol("scenes")
    real = unkept.what_is_real(protocol)
    model_hash = fingerprints.folder_hash(families.resolve_source(TEACHER))
    origin = {"provenance": results.provenance(protocol, model_hash=model_hash, extractors=real.extractors)}
    rows = [*measured(protocol, (STEPS, *FACTORS)), *real.floors]
    conditions = gate(rows)
    OUTPUT.write_text("".join(json.dumps({**row, **origin}) + "\n" for row in [*rows, *conditions]), encoding="utf-8")
    print(summary_table(rows))
    for each in conditions:
        print(f"{each['name']}: {each['value']:.3g}, needed {each['needed']:g}: {'holds' if each['holds'] else 'DOES NOT HOLD'}")


if __name__ == "__main__":
    main()
