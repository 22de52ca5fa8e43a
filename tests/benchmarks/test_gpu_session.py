"""`make gpu` measures on when a slice fails, dies, hangs or cannot run, says so, and goes on where it stopped."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks import gpu
from benchmarks.measuring import rows
from benchmarks.measuring.case import Row
from benchmarks.measuring.session import GRACE, Session
from benchmarks.slices import SLICES, Slice

HERE = Path(__file__).parent
ENVIRONMENT: Row = {
    "slice": "environment", "case": "environment", "run": "here", "status": "measured", "rehearsal": True, "gpu": "G", "torch": "2", "triton": "3",
    "source": "s", "date": "2026-11-26T10:00:00", "copy_gb_per_s": 1.0, "bf16_tflop_per_s": 1.0,
}  # fmt: skip


@pytest.fixture
def session(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Session:
    """Begun in a machine's rehearsal, with the stand-ins importable."""
    monkeypatch.setenv("COUNTER", str(tmp_path))
    path = tmp_path / "gpu.jsonl"
    rows.append(path, [ENVIRONMENT])
    return Session(path, (tmp_path / "gpu.log").open("w"), time.time() + 300, rehearsal=True, packages=[HERE], run="here")


def again(session: Session, run: str, **changed: str) -> Session:
    """Another start of the command on the same file."""
    rows.append(session.path, [ENVIRONMENT | {"run": run} | changed])
    return Session(session.path, session.log, time.time() + 300, rehearsal=True, packages=[HERE], run=run)


def statuses(session: Session) -> dict[str, str]:
    return {row["case"]: row["status"] + ": " + row.get("reason", "") for row in rows.read(session.path) if row["run"] == session.run}


def test_the_rest_goes_on_and_only_what_is_missing_is_measured_again(session: Session, tmp_path: Path) -> None:
    part = Slice("stand_ins", "gpu_stand_ins", 200)
    session.measure(part)
    assert statuses(session) == {
        "environment": "measured: ",
        "first": "measured: ",
        "fails": "failed: ValueError: this one always fails",
        "small": "left out: needs 80 GiB, 1 is free",
        "memory": "left out: out of memory: CUDA out of memory. Tried to allocate 5 GiB",
        "broken": "failed: AcceleratorError: CUDA error: an illegal memory access was encountered",
        "dies": "failed: its process ended with status 11",
        "contenders": "left out: not installed",
        "last": "measured: ",
    }
    assert session.unfinished == {
        "stand_ins": "3 failed: broken, dies, fails; 2 left out, whole or in part: memory, small",
    }
    session.log.flush()
    assert "ValueError: this one always fails\nand says more" in (tmp_path / "gpu.log").read_text()
    more = again(session, "later")
    more.measure(part)
    counted = {name: (tmp_path / name).read_text() for name in ("first", "last", "broken_device")}
    assert counted == {"first": "x", "last": "x", "broken_device": "xx"}
    assert set(statuses(more)) == {"environment", "fails", "small", "memory", "broken", "dies"}


def test_what_hangs_is_killed_and_named(session: Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    allowed = list[float]()

    class Impatient(subprocess.Popen[str]):
        """Its time is over soon after the case that hangs has begun, however long a busy machine takes to get there."""

        def wait(self, timeout: float | None = None) -> int:
            if timeout is not None:
                allowed.append(timeout)
                while self.poll() is None and not (tmp_path / "hanging").exists():
                    time.sleep(0.05)
            return super().wait(timeout and 1.0)

    monkeypatch.setattr(subprocess, "Popen", Impatient)
    session.measure(Slice("hanging", "gpu_stand_ins:hanging", 90))
    assert statuses(session) == {"environment": "measured: ", "begun": "measured: ", "hangs": "failed: ran over the slice's 90 s"}
    assert session.unfinished == {"hanging": "1 failed: hangs"}
    assert not (tmp_path / "never").exists()
    later = again(session, "later")  # what hung comes last, so that it keeps the others waiting no more
    (tmp_path / "hanging").unlink()
    later.measure(Slice("hanging", "gpu_stand_ins:hanging", 80))
    assert statuses(later) == {"environment": "measured: ", "never": "measured: ", "hangs": "failed: ran over the slice's 80 s"}
    assert 60 < allowed[0] <= 90 + GRACE and 50 < allowed[1] <= 80 + GRACE and len(allowed) == 2


def test_a_case_for_which_there_is_no_time_waits_for_the_next_start(session: Session, tmp_path: Path) -> None:
    part = Slice("slow", "gpu_stand_ins:slow", 200)
    session.measure(part)
    assert session.unfinished == {"slow": "its time was over: the same command again goes on there"}
    assert (set(statuses(session)), (tmp_path / "long").exists()) == ({"environment", "quick"}, False)
    over = again(session, "over")
    over.until = time.time() - 1
    over.measure(part)
    assert over.unfinished == {"slow": "no time was left for it: the same command again goes on there"}


def test_changed_code_is_measured_again(session: Session, tmp_path: Path) -> None:
    part = Slice("slow", "gpu_stand_ins:slow", 200)
    session.measure(part)
    again(session, "same").measure(part)
    assert (tmp_path / "quick").read_text() == "x"
    again(session, "changed", source="another").measure(part)
    assert (tmp_path / "quick").read_text() == "xx"


def test_a_module_that_cannot_be_imported_is_left_behind(session: Session) -> None:
    session.measure(Slice("broken", "gpu_stand_ins:unimportable", 60))
    assert statuses(session)["*"] == "failed: its process ended with status 1"
    assert session.unfinished == {"broken": "1 failed: *"}


def test_obstacles_are_named_before_anything_starts(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    assert session.obstacle(Slice("x", "x", 9, ("json", "no_such_package"))) == "needs package 'no_such_package'"
    assert session.obstacle(Slice("x", "x", 9, capability=(8, 0))) is None  # a rehearsal asks for no GPU
    old = again(session, "old", capability="7.5")
    old.rehearsal = False
    assert old.obstacle(Slice("x", "x", 9, capability=(8, 0))) == "needs a GPU of compute capability 8.0, this one has 7.5"
    monkeypatch.setattr("benchmarks.measuring.session.importlib.util.find_spec", lambda name: None if name == "diffusers" else object())
    assert str(session.obstacle(Slice("x", "x", 9, ("json", "diffusers")))).startswith("needs package 'diffusers' (carry the wheel of diffusers==")


def test_nothing_is_measured_behind_red_tests(session: Session) -> None:
    speed = Slice("speed", "gpu_stand_ins:slow", 60, after="red")
    assert session.obstacle(speed) is None  # tests that were not run say nothing
    session.measure(Slice("red", "gpu_stand_ins:red", 60))
    session.measure(speed)
    reason = "slice 'red' is red, and the speed of what is wrong is none: 1 of 4 tests failed: test_x"
    assert session.unfinished == {"red": "1 failed: tests", "speed": reason}
    slow_tests = again(session, "mended", source="another")
    assert slow_tests.obstacle(speed) is None
    rows.append(session.path, [{"slice": "red", "case": "tests", "run": "mended", "status": "failed", "reason": "ran over the slice's 300 s"}])
    assert slow_tests.obstacle(speed) is None  # tests that took too long are not red


def test_an_interrupt_ends_the_slice_too_and_keeps_what_there_is(tmp_path: Path) -> None:
    """SIGTERM to the command: its worker dies with it, the lines that it had stay."""
    code = (
        "import sys; from benchmarks import gpu, slices; from benchmarks.measuring import session\n"
        "part = slices.Slice('hanging', 'gpu_stand_ins:hanging', 500)\n"
        "gpu.SLICES = (part,); sys.exit(gpu.main(['--rehearse', '--output', sys.argv[1]]))"
    )
    root = HERE.parents[1]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (root, root / "kernels", HERE))), "COUNTER": str(tmp_path)}
    path = tmp_path / "lines" / "gpu.jsonl"
    command = subprocess.Popen([sys.executable, "-c", code, str(path)], env=environment, cwd=root, stdout=subprocess.PIPE, text=True)
    assert command.stdout is not None
    for line in command.stdout:
        if line.startswith("case: hangs"):
            break
    command.send_signal(signal.SIGTERM)
    said = command.stdout.read()
    assert "interrupted: the same command again goes on there" in said, said
    assert command.wait(60) == 1
    assert [row["case"] for row in rows.read(path)] == ["environment", "begun"]
    assert not _running(str(path))


def test_a_rehearsal_has_time_on_a_busy_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A slice's share of eight minutes says nothing about a CPU that others use too."""
    given: list[float] = []
    monkeypatch.setattr(gpu, "BEGAN", time.time())  # not when these tests were collected
    monkeypatch.setattr(Session, "begin", lambda self: True)
    monkeypatch.setattr(Session, "measure", lambda self, part: given.append(min(part.seconds, self.until - time.time())))
    assert gpu.main(["--rehearse", "--output", str(tmp_path / "lines.jsonl")]) == 0
    assert len(given) == len(SLICES) and min(given) > 1000
    assert gpu.main(["--rehearse", "--budget", "90s", "--only", "sampling", "--output", str(tmp_path / "lines.jsonl")]) == 0
    assert len(given) == len(SLICES) + 1 and given[-1] < 90


def _running(what: str) -> list[str]:
    commands = [path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline") if path.is_file()]
    return [command.decode() for command in commands if what.encode() in command and b"measuring.worker" in command]


def test_a_new_file_begins_with_the_lines_that_are_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = tmp_path / "kept.jsonl"
    rows.append(kept, [ENVIRONMENT])
    monkeypatch.setattr(gpu.table, "RESULTS", kept)
    assert rows.read(gpu.output(tmp_path / "new" / "gpu.jsonl", None)) == [ENVIRONMENT]
    assert gpu.output(None, None) == kept
    monkeypatch.chdir(tmp_path)
    assert gpu.output(Path("here/gpu.jsonl"), None) == tmp_path / "here" / "gpu.jsonl"  # whatever folder the slices run in
    assert rows.read(gpu.output(tmp_path / "other.jsonl", tmp_path)) == []  # a rehearsal begins with nothing
    (tmp_path / "mine.jsonl").write_text(json.dumps(ENVIRONMENT | {"run": "mine"}) + "\n")
    assert rows.read(gpu.output(tmp_path / "mine.jsonl", None))[0]["run"] == "mine"


@pytest.mark.parametrize(("text", "expected"), [("8m", 480), ("90s", 90), ("480", 480), ("1.5m", 90), ("1h", 3600)])
def test_budgets(text: str, expected: float) -> None:
    assert gpu.seconds(text) == expected


@pytest.mark.parametrize("text", ["", "8 minutes", "0", "-3m", "nan", "8d", "20s"])
def test_what_is_no_budget_is_refused(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        gpu.main(["--budget", text])
    assert "such as 8m" in capsys.readouterr().err or text.startswith("-")


def test_a_place_that_cannot_be_written_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file" / "gpu.jsonl", tmp_path):
        assert gpu.main(["--rehearse", "--output", str(place)]) == 2
        assert capsys.readouterr().err.startswith("error: --output: ")


def test_every_slice_is_named_once() -> None:
    names = [part.name for part in SLICES]
    assert len(set(names)) == len(names)
    assert {part.after for part in SLICES} <= {None, *names}
