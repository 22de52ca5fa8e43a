"""The tests that need a GPU, as a slice: no speed is worth reading where these are red."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks.measuring.case import Case, Row, Target
from benchmarks.measuring.environment import ROOT

# A rehearsal runs one test under Triton's interpreter, to see that this file can.
REHEARSAL = ("-m", "not gpu", "-k", "test_tangents_do_not_change_the_primal and fp16 and none")


def cases(target: Target) -> Iterator[Case]:
    """One case: tests start processes of their own, which a GPU's machine has cores for."""
    selection = REHEARSAL if target.rehearsal else ("-m", "gpu")
    yield Case("kernels", lambda: [run_tests(["tests/kernels/test_jvp_attention.py" if target.rehearsal else "tests/kernels", *selection])], 200)


def run_tests(selection: Sequence[str], root: Path = ROOT) -> Row:
    """How many tests passed, failed and were skipped; `failures` names those that failed. RuntimeError where none ran."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", *selection, f"--junitxml={report}", "-p", "no:cacheprovider", "--tb=short", *_workers()]
        subprocess.run(command, cwd=root, check=False)
        if not report.is_file():
            raise RuntimeError("pytest ended without a report: see the log")
        return outcome(report)


def outcome(report: Path) -> Row:
    """What a JUnit report says; status `failed` where a test did, or where none ran."""
    suite = next(ElementTree.parse(report).getroot().iter("testsuite"))
    count = {name: int(suite.get(name, 0)) for name in ("tests", "failures", "errors", "skipped")}
    names = [
        f"{case.get('classname')}::{case.get('name')}" for case in suite.iter("testcase") if {found.tag for found in case} & {"failure", "error"}
    ]
    failed = count["failures"] + count["errors"]
    passed = count["tests"] - failed - count["skipped"]
    row: Row = {"passed": passed, "failed": failed, "skipped": count["skipped"], "seconds": float(suite.get("time", 0)), "failures": names[:20]}
    if failed or not passed:
        row |= {"status": "failed", "reason": f"{failed} of {passed + failed} tests failed: {', '.join(names[:3])}" if failed else "no test ran"}
    return row


def _workers() -> list[str]:
    """Several processes compile kernels side by side where there are cores for them."""
    cores = os.cpu_count() or 1
    return ["-n", str(min(14, cores - 2))] if cores >= 8 and importlib.util.find_spec("xdist") else []
