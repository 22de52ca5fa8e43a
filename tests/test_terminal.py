"""What stands in the terminal, and in a log where there is none."""

from __future__ import annotations

import io
import os
import sys
from pathlib import Path

import pytest
from rich.console import Console

from fastgen import cli, terminal
from fastgen.terminal import Bars, Lines

HOSTILE = "runs/[bold]x[/] :bomb: [/nothing] $\\frac \x1b[31m"
SHOWN = "runs/[bold]x[/] :bomb: [/nothing] $\\frac \\x1b[31m"


def bars_on(screen: io.StringIO, width: int = 40) -> Bars:
    bars = Bars()
    bars.console = Console(file=screen, force_terminal=True, width=width, color_system=None)
    return bars


def test_a_warning_stands_whole_above_the_bar() -> None:
    screen = io.StringIO()
    bars = bars_on(screen)
    warning = "warning at step 7: critic lag: [bold]loss/critic[/bold] is 4; raise distiller.critic_updates or optimizer.fake_score.lr"
    bars.start("training", 10)
    bars.update(7, {})
    bars.warn(warning)
    bars.finish()
    lines = screen.getvalue().split("\n")
    assert sum(warning in line for line in lines) == 1
    assert "7/10" in lines[-2] or "7/10" in lines[-1]  # the bar ends below


def test_a_warning_without_a_bar() -> None:
    bars, screen = Bars(), io.StringIO()
    bars.console = Console(file=screen, width=20)
    bars.warn("a warning that is longer than a line")
    assert screen.getvalue() == "a warning that is longer than a line\n"


def test_a_path_is_never_read_as_markup() -> None:
    screen = io.StringIO()
    bars = bars_on(screen, width=200)
    bars.stage(HOSTILE)
    bars.warn(HOSTILE)
    bars.start(HOSTILE, 3)
    bars.update(3, {"loss/[red]x[/green]": 1.0})
    bars.finish()
    stage, warning, *rest = screen.getvalue().split("\n")
    assert SHOWN in stage and SHOWN in warning
    assert "[bold]x[/] :bomb: [/nothing]" in "\n".join(rest) and "[red]x[/green] 1" in "\n".join(rest)


def test_a_terminal_that_knows_ascii_alone_has_bars() -> None:
    held = io.BytesIO()

    class Terminal(io.TextIOWrapper):
        def isatty(self) -> bool:
            return True

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stderr", Terminal(held, "ascii"))
        bars = Bars()
        bars.stage("caf\udce9 –")
        bars.start("training", 2)
        bars.update(2, {"loss/match": 0.5})
        bars.finish()
        assert b"caf\\udce9 \\u2013" in held.getvalue() and b"match 0.5" in held.getvalue()


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_without_a_terminal_lines_come_ever_more_rarely() -> None:
    """One piece of work a second, of 3,600; the first five were done before."""
    log, clock = io.StringIO(), Clock()
    lines = Lines(log, clock)
    lines.stage(HOSTILE)
    lines.start("training", 3605, 5)
    said_at = []
    for done in range(6, 206):
        clock.now += 1
        before = len(log.getvalue())
        lines.update(done, {"loss/match": 1 / done, "grad_norm/student": 2.0, "lr/student": 3.0, "eval/fd_digits": 4.0})
        said_at += [clock.now] * (len(log.getvalue()) > before)
    assert said_at == [5, 15, 35, 75, 135, 195]
    lines.finish()
    lines.finish()
    said = log.getvalue().splitlines()
    assert said[:3] == [SHOWN, "training: 5 of 3605", "training: 10 of 3605, 1.0/s, 59:55 min left, match 0.1  grad_norm/student 2  eval/fd_digits 4"]
    assert said[-1] == "training: 205 of 3605, after 3:20 min, match 0.00488  grad_norm/student 2  eval/fd_digits 4"
    assert len(said) == 2 + len(said_at) + 1


def test_slow_work_says_how_long_a_piece_takes() -> None:
    log, clock = io.StringIO(), Clock()
    lines = Lines(log, clock)
    lines.start("training", 1000)
    clock.now = 25.0
    lines.update(2, {})
    lines.finish()
    assert log.getvalue().splitlines()[1:] == ["training: 2 of 1000, 12.5 s each, 3:27:55 h left", "training: 2 of 1000, after 25 s"]


def test_work_within_work_is_said_too() -> None:
    """An evaluation within training."""
    log, clock = io.StringIO(), Clock()
    lines = Lines(log, clock)
    lines.start("training", 4)
    lines.update(1, {})
    lines.start("pictures", 10)
    clock.now = 20.0
    lines.update(5, {})
    lines.finish()
    lines.update(2, {"eval/level": 3.0})
    lines.finish()
    assert log.getvalue().splitlines() == [
        "training: 0 of 4",
        "pictures: 0 of 10",
        "pictures: 5 of 10, 4.0 s each, 20 s left",
        "pictures: 5 of 10, after 20 s",
        "training: 2 of 4, 10.0 s each, 20 s left, eval/level 3",
        "training: 2 of 4, after 20 s, eval/level 3",
    ]


def test_work_within_work_has_a_bar_of_its_own() -> None:
    screen = io.StringIO()
    bars = bars_on(screen, width=80)
    bars.start("training", 4)
    bars.update(1, {f"eval/{name}": 0.5 for name in ("fd_digits", "fd_digits_named", "prompt_accuracy", "parity_accuracy")})
    bars.start("pictures", 10)
    bars.update(5, {})
    assert bars.bar is not None
    bars.bar.refresh()
    assert "1/4" in screen.getvalue().split("\n")[-2] and "5/10" in screen.getvalue().split("\n")[-1]
    assert [(task.description, task.completed) for task in bars.bar.tasks] == [("training", 1), ("pictures", 5)]
    bars.finish()
    bars.update(2, {})
    assert [(task.description, task.completed) for task in bars.bar.tasks] == [("training", 2)]
    bars.finish()
    bars.finish()
    assert bars.bar is None and "2/4" in screen.getvalue()


class Stream(io.StringIO):
    def __init__(self, *, terminal: bool) -> None:
        super().__init__()
        self.terminal = terminal

    def isatty(self) -> bool:
        return self.terminal


@pytest.mark.parametrize(
    ("out", "err", "log_is_out", "bars", "lines"),
    [
        (True, True, True, "err", None),
        (False, True, True, "err", "out"),  # make demo > log
        (False, False, True, None, "out"),  # make demo > log 2>&1, SLURM, CI
        (True, False, True, None, "out"),
        (False, True, False, "err", None),  # evaluate > table
        (False, False, False, None, "err"),
        (True, False, False, None, "err"),
    ],
)
def test_progress_goes_where_it_is_read(
    out: bool, err: bool, log_is_out: bool, bars: str | None, lines: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("FORCE_COLOR", "1")  # as continuous integration does, without a terminal
    streams = {"out": Stream(terminal=out), "err": Stream(terminal=err)}
    monkeypatch.setattr(sys, "stdout", streams["out"])
    monkeypatch.setattr(sys, "stderr", streams["err"])
    shown = terminal.progress(**({"log": sys.stdout} if log_is_out else {}))
    shown.start("training", 2)
    shown.update(2, {"loss/match": 0.5})
    shown.warn("warning: once")
    shown.finish()
    said = {name: stream.getvalue() for name, stream in streams.items()}
    assert [name for name in said if "2/2" in said[name]] == ([bars] if bars else [])
    assert [name for name in said if "training: 2 of 2" in said[name]] == ([lines] if lines else [])
    assert (said["out"].count("warning: once"), said["err"].count("warning: once")) == (0, 1)


def test_a_dumb_terminal_gets_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    monkeypatch.setattr(sys, "stderr", Stream(terminal=True))
    assert [type(part) for part in terminal.progress().parts] == [Lines]


def test_a_training_log_shows_progress_and_ends_with_the_products(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Nothing is a terminal here, and the folder's name is hostile."""
    (tmp_path / "prompts.txt").write_text("0\n")
    output = tmp_path / "[bold]run[/] café\x1b"
    command = ["train", "digits_dmd2_1step", "teacher.pretrained=toy:gaussian", "teacher.guidance=1", f"data.prompts={tmp_path / 'prompts.txt'}"]
    command += ["train.steps=2", "train.batch_size=2", "evaluate.protocol=null", "--only", "train", "--output", str(output)]
    capfd.readouterr()
    assert cli.main(command) == 0
    said, errors = capfd.readouterr()
    lines = said.splitlines()
    assert errors == ""
    assert "training: 0 of 2" in lines
    assert [line for line in lines if line.startswith("training: 2 of 2, after ") and " critic " in line]
    assert lines[-1] == f"run:     {tmp_path}/[bold]run[/] café\\x1b"


def test_a_folder_whose_name_is_no_text_is_refused(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """TensorBoard ends in a traceback there."""
    command = ["train", "digits_dmd2_1step", "--output", str(tmp_path / os.fsdecode(b"caf\xe9"))]
    capfd.readouterr()
    assert cli.main(command) == 2
    out, err = capfd.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert "--output" in err and "caf\\udce9' is a path that is not UTF-8" in err
