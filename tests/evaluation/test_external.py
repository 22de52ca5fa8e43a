"""The contract with programs in other environments, on real child processes, and every way in which one can break it."""

from __future__ import annotations

import os
import shlex
import signal
import sys
import time
from pathlib import Path

import pytest
import torch

from fastgen.errors import UserError
from fastgen.evaluation import external
from fastgen.evaluation.external import Answer, External, ask, externals
from fastgen.evaluation.weights import Unavailable


def program(code: str, timeout: float = 30.0) -> External:
    return External((sys.executable, "-S", "-c", code), timeout)


def refusal(code: str, folder: Path, count: int = 3, timeout: float = 30.0) -> str:
    with pytest.raises(Unavailable) as caught:
        ask(program(code, timeout), folder, count, folder / "log")
    message = str(caught.value)
    assert message.startswith(repr(sys.executable)) and "\n" not in message
    return message.removeprefix(repr(sys.executable)).strip()


def test_it_is_given_the_folder_and_its_last_line_is_the_answer(tmp_path: Path) -> None:
    (tmp_path / "prompts.jsonl").write_text('{"id": 4, "prompt": "a"}\n{"id": 5, "prompt": "bbb"}\n')
    code = """if True:
        import json, pathlib, sys
        rows = [json.loads(line) for line in (pathlib.Path(sys.argv[-1]) / "prompts.jsonl").open()]
        print("loading a checkpoint ...", rows)
        print("half way", file=sys.stderr)
        print(json.dumps({"scores": [len(row["prompt"]) for row in rows], "model": "any"}), end="\\n\\n")
    """
    answer = ask(program(code), tmp_path, 2, tmp_path / "logs" / "log")
    assert answer[:2] == (2.0, 2)
    assert answer.scores is not None and torch.equal(answer.scores, torch.tensor([1.0, 3.0], dtype=torch.float64))
    assert (tmp_path / "logs" / "log").read_text() == "half way\n"


def test_one_value_is_an_answer_too(tmp_path: Path) -> None:
    assert ask(program('print(\'{"value": 7, "n": 2}\')'), tmp_path, 3, tmp_path / "log") == Answer(7.0, 2)


@pytest.mark.parametrize(
    ("code", "wanted"),
    [
        ("import sys; sys.exit(3)", "ended with exit status 3"),
        ("import os; os.abort()", "was killed by SIGABRT"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "was killed by SIGKILL"),
        ("", 'printed nothing; its last line must be {"scores": [a number for each picture]} or {"value": x, "n": pictures}'),
        ("print('\\n ')", "printed nothing"),
        ("print('done')", "and is 'done': not valid JSON (Expecting value: line 1 column 1 (char 0))"),
        ("print([1, 2, 3])", "and is '[1, 2, 3]': must be a JSON object, not [1, 2, 3]"),
        ("print('{}')", "and is '{}': it has not one of the keys scores and value"),
        ('print(\'{"scores": [1, 2, 3], "value": 2, "n": 3}\')', "it has not one of the keys scores and value"),
        ("print('{\"scores\": [1, 2]}')", "gave 2 scores for 3 pictures"),
        ("print('{\"scores\": [1, 2, NaN]}')", "key scores.2: must be a finite number, not NaN"),
        ("print('{\"scores\": [1, Infinity, 3]}')", "key scores.1: must be a finite number, not Infinity"),
        ("print('{\"scores\": [1, null, 3]}')", "key scores.1: must be a number, not null"),
        ('print(\'{"scores": [1, "2", 3]}\')', 'key scores.1: must be a number, not "2"'),
        ("print('{\"scores\": [1, true, 3]}')", "key scores.1: must be a number, not true"),
        ("print('{\"value\": 1}')", "key n: missing"),
        ('print(\'{"value": 1, "n": 0}\')', "key n: must be greater than or equal to 1, not 0"),
        ('print(\'{"value": 1, "n": 4}\')', "says that it measured 4 pictures, of 3"),
        ("print('{\"value\": ' + '9' * 400 + ', \"n\": 1}')", "key value: a number too large to count with"),
        ("print('[' * 10 ** 5)", "nested more than 64 deep"),
        ("import sys; sys.stdout.buffer.write(bytes([34, 200, 34]))", "not UTF-8 text"),
    ],
)
def test_every_other_end_is_one_clear_line(code: str, wanted: str, tmp_path: Path) -> None:
    assert wanted in refusal(code, tmp_path)


def test_the_logs_last_line_is_quoted_on_one_line_that_a_terminal_takes(tmp_path: Path) -> None:
    code = "import sys; sys.stderr.write('Traceback ...\\n 10%|\\r 99%|\\rImportError: no\\x1b[31m timm\\n\\n'); sys.exit(1)"
    wanted = f"ended with exit status 1; it wrote last 'ImportError: no\\\\x1b[31m timm', and the rest is in {str(tmp_path / 'log')!r}"
    assert refusal(code, tmp_path) == wanted


def gone(pid: int) -> bool:
    """Whether a process has ended; one whose parent is gone may stay a zombie for a while."""
    for _ in range(100):
        try:
            os.kill(pid, 0)
            if Path(f"/proc/{pid}/stat").exists() and Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except ProcessLookupError:
            return True
        time.sleep(0.02)
    return False


CHILD = "import subprocess, sys, time; child = subprocess.Popen([sys.executable, '-S', '-c', 'import time; time.sleep(60)']); "


def test_what_hangs_is_stopped_with_its_children(tmp_path: Path) -> None:
    code = CHILD + "print(child.pid, file=sys.stderr, flush=True); time.sleep(60)"
    began = time.monotonic()
    message = refusal(code, tmp_path, timeout=3.0)  # in which a busy machine starts two interpreters
    assert message.startswith("was stopped after 3 seconds; --external-timeout gives it more")
    assert 3 <= time.monotonic() - began < 50
    assert gone(int((tmp_path / "log").read_text()))


def test_what_hangs_without_a_pipe_is_stopped_too(tmp_path: Path) -> None:
    code = "import os, time; os.close(1); os.close(2); time.sleep(60)"
    assert "was stopped after 0.5 seconds" in refusal(code, tmp_path, timeout=0.5)


def test_a_child_that_is_left_behind_neither_holds_the_answer_up_nor_stays(tmp_path: Path) -> None:
    code = CHILD + 'print(child.pid, file=sys.stderr, flush=True); print(\'{"value": 1, "n": 1}\')'
    began = time.monotonic()
    assert ask(program(code), tmp_path, 1, tmp_path / "log").value == 1
    assert time.monotonic() - began < 50
    assert gone(int((tmp_path / "log").read_text()))


def test_an_interruption_stops_it(tmp_path: Path) -> None:
    said = "print(os.getpid(), file=sys.stderr, flush=True); time.sleep(0.5)"  # until the log has it
    code = f"import os, signal, sys, time; {said}; os.kill({os.getpid()}, signal.SIGINT); time.sleep(60)"
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs, such as a whole test run, ignore it
    try:
        with pytest.raises(KeyboardInterrupt):
            ask(program(code), tmp_path, 1, tmp_path / "log")
    finally:
        signal.signal(signal.SIGINT, before)
    assert gone(int((tmp_path / "log").read_text()))


def test_endless_output_is_stopped_and_an_endless_log_is_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(external, "_LARGEST", 2**20)
    assert "was stopped because it printed more than 1 MiB" in refusal("while True: print('x' * 1000)", tmp_path)
    code = "import sys; sys.stderr.write('y' * 2 ** 22); print('{\"value\": 1, \"n\": 1}')"
    assert ask(program(code), tmp_path, 1, tmp_path / "log").value == 1
    assert 2**20 <= (tmp_path / "log").stat().st_size < 2**21


def test_many_scores_are_read_exactly(tmp_path: Path) -> None:
    scores = torch.rand(100_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    (tmp_path / "answer.json").write_text(str({"scores": scores.tolist()}).replace("'", '"'))
    code = "import pathlib, sys; print((pathlib.Path(sys.argv[-1]) / 'answer.json').read_text())"
    answer = ask(program(code), tmp_path, len(scores), tmp_path / "log")
    assert answer.scores is not None and torch.equal(answer.scores, scores)
    assert answer.value == pytest.approx(float(scores.mean()), rel=1e-15)


def test_a_program_that_is_not_there_or_is_none(tmp_path: Path) -> None:
    with pytest.raises(Unavailable, match=r"'/no/such' cannot be started: no such file or directory$"):
        ask(External(("/no/such",)), tmp_path, 1, tmp_path / "log")
    (tmp_path / "text").write_text("no program")
    with pytest.raises(Unavailable, match=r"text' cannot be started: permission denied$"):
        ask(External((str(tmp_path / "text"),)), tmp_path, 1, tmp_path / "log")
    (tmp_path / "text").chmod(0o755)
    with pytest.raises(Unavailable, match=r"text' cannot be started: exec format error$"):
        ask(External((str(tmp_path / "text"),)), tmp_path, 1, tmp_path / "log")


def test_a_log_that_cannot_be_written_costs_this_metric_alone(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(Unavailable, match=r"cannot write .*is a file; choose another place"):
        ask(program("print(1)"), tmp_path, 1, tmp_path / "file" / "log")


def test_commands_of_the_command_line() -> None:
    python = shlex.quote(sys.executable)
    found = externals([f"image_reward={python} 'my score.py' --model=a=b", f"mine={python}"], 5.0)
    assert found["image_reward"] == External((sys.executable, "my score.py", "--model=a=b"), 5.0)
    assert found["mine"] == External((sys.executable,), 5.0)
    assert externals(["mine=sh"])["mine"].command == ("sh",)
    assert externals([]) == {}


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        (["image_reward"], "'image_reward' is not NAME=COMMAND, such as image_reward="),
        (["=sh"], ".* is not NAME=COMMAND"),
        (["mine= "], ".* is not NAME=COMMAND"),
        (["My Metric=sh"], ".* is not NAME=COMMAND"),
        (["a=sh", "a=sh"], "a is given twice"),
        (["a=sh 'x"], 'a: "sh \'x" is no command \\(no closing quotation\\)'),
        (["a=/no/such x"], "a: no program '/no/such'; give its whole path"),
        (["a=''"], "a: no program ''"),
    ],
)
def test_commands_that_are_none(given: list[str], wanted: str) -> None:
    with pytest.raises(UserError, match=f"^--external:? {wanted}"):
        externals(given)


@pytest.mark.parametrize("timeout", [0.0, -1.0, float("inf"), float("nan")])
def test_timeouts_that_are_none(timeout: float) -> None:
    with pytest.raises(UserError, match=r"^--external-timeout: a number of seconds above 0 is needed"):
        externals([], timeout)


def test_its_own_signals_have_names() -> None:
    assert external._signal(signal.SIGSEGV) == "SIGSEGV"
    assert external._signal(99) == "signal 99"
