"""A run's rows, read back with TensorBoard's own reader, over interruptions of every kind."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fastgen.runlog import RunLog

ROOT = Path(__file__).parent.parent


def row(step: int, scale: float = 1.0) -> dict[str, Any]:
    return {"step": step, "loss/match": scale / step, "grad_norm/student": 1e-7 * scale * step}


def read_events(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """(step, value) of each scalar in the event files of a folder, as TensorBoard shows them."""
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    return {name: [(event.step, event.value) for event in events.Scalars(name)] for name in events.Tags()["scalars"]}


def assert_same(log: RunLog) -> None:
    """The events are the scalars of metrics.jsonl, in fp32, each step once."""
    rows = log.rows()
    shown = read_events(log.events)
    assert shown.keys() == {name for row in rows for name in row} - {"step", "warnings"}
    for name, events in shown.items():
        assert events == [(row["step"], pytest.approx(row[name], rel=1e-6)) for row in rows if name in row]


def test_rows_are_lines_and_events(tmp_path: Path) -> None:
    rows = [row(1), row(2) | {"drift/std": 0.9, "warnings": ["saturation: so much", "mode loss: so little"]}, row(3)]
    with RunLog(tmp_path) as log:
        for number, written in enumerate(rows, 1):
            log.write(written)
            assert log.rows() == rows[:number]  # while the run goes on
    assert_same(log)
    events = EventAccumulator(str(log.events))
    events.Reload()
    ((tag, text),) = [(tag, event) for tag in events.Tags()["tensors"] for event in events.Tensors(tag)]
    assert (tag, text.step) == ("warnings/text_summary", 2)
    assert text.tensor_proto.string_val[0].decode().split() == " ".join(rows[1]["warnings"]).split()


@pytest.mark.parametrize("kept", [4, 6, 0], ids=["from the last checkpoint", "stopped by a signal", "before the first checkpoint"])
def test_a_resumed_run_shows_every_step_once(kept: int, tmp_path: Path) -> None:
    killed = RunLog(tmp_path).__enter__()
    for step in range(1, 7):
        killed.write(row(step))
        if step == 4:
            killed.flush()
    if kept == 6:
        killed.__exit__()
    with RunLog(tmp_path) as log:
        log.truncate(kept)
    with RunLog(tmp_path) as log:
        for step in range(kept + 1, 9):
            log.write(row(step, scale=2.0))
    assert [(line["step"], line["loss/match"] * line["step"]) for line in log.rows()] == [(i, 1.0 if i <= kept else 2.0) for i in range(1, 9)]
    assert_same(log)


def test_events_are_on_disk_once_flushed(tmp_path: Path) -> None:
    with RunLog(tmp_path) as log:
        log.write(row(1))
        log.write(row(2))
        log.flush()
        assert_same(log)  # a kill after this loses nothing


def test_a_line_cut_short_is_no_row(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "warnings": ["{x}"]}\n{"step": 2}\n{"step": 3, "warnings": ["{x}')
    log = RunLog(tmp_path)
    assert [line["step"] for line in log.rows()] == [1, 2]
    log.truncate(1)
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1, "warnings": ["{x}"]}\n'


def test_a_log_that_writes_nothing_leaves_no_events(tmp_path: Path) -> None:
    with RunLog(tmp_path) as log:
        assert (tmp_path / "metrics.jsonl").read_text() == "" and log.rows() == []
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]
    assert RunLog(tmp_path / "nowhere").rows() == []


def test_tensorboard_is_imported_late_and_tensorflow_never(tmp_path: Path) -> None:
    """A stand-in for TensorFlow talks, as the real one does."""
    (tmp_path / "tensorflow.py").write_text("print('cuDNN factory registered twice')")
    code = (
        "import sys, pathlib, fastgen.cli\nfrom fastgen.runlog import RunLog\n"
        "assert fastgen.cli.main(['--help']) == 0 and not {'tensorboard', 'torch'} & sys.modules.keys()\n"
        f"with RunLog(pathlib.Path({str(tmp_path)!r})) as log: log.write({{'step': 1, 'loss/match': 0.5}})\n"
        "assert 'tensorboard' in sys.modules and 'tensorflow' not in sys.modules"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (tmp_path, ROOT, ROOT / "kernels")))}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "cuDNN" not in done.stdout
    assert read_events(tmp_path / "tensorboard") == {"loss/match": [(1, 0.5)]}
