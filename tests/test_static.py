"""A reward is read, not run, until a run is built: what surely fails is refused before, everything else waits for the import."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from fastgen import cli
from fastgen.errors import UserError
from fastgen.rewards import check_reward, content, load_reward

KEY = r"^recipe key distiller\.reward\.name: "
TWO = "def f(pixels, prompts):\n    return pixels.mean((1, 2, 3))\n"


def own(folder: Path, code: str) -> str:
    (folder / "own.py").write_text(code)
    return f"{folder / 'own.py'}:f"


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("def f(:", r"cannot import .*own\.py' \(SyntaxError: "),
        ("f\0", r"cannot import .*own\.py' \(SyntaxError: "),
        ("def g(pixels, prompts): ...", r"own\.py has no 'f'; .*allowed: g"),
        ("class A:\n    def f(self, pixels): ...", "has no 'f'"),
        ("def f(pixels): ...", "too many positional arguments"),
        ("def f(pixels, prompts, scale): ...", "missing a required argument: 'scale'"),
        ("def f(pixels, prompts, *, scale): ...", "missing a required argument: 'scale'"),
        ("async def f(pixels, prompts): ...", "is an async function"),
        ("f = 3", "is a int"),
    ],
)
def test_what_surely_fails_is_refused_unread(code: str, reason: str, tmp_path: Path) -> None:
    name = own(tmp_path, code)
    with pytest.raises(UserError, match=KEY + ".*" + reason):
        check_reward(name)
    if not code.startswith("async"):  # whose coroutine is refused when it is called
        with pytest.raises(UserError):
            load_reward(name)


@pytest.mark.parametrize(
    "code",
    [
        TWO,
        "def f(*both): ...",
        "def f(pixels, prompts, scale=1.0, *, more=2): ...",
        "def _g(pixels, prompts): ...\nf = _g",
        "f = lambda pixels, prompts: pixels",
        "from math import dist as f",
        "try:\n    from nowhere import f\nexcept ImportError:\n    def f(pixels, prompts): ...",
        "globals()['f'] = lambda pixels, prompts: pixels",
        "def make():\n    global f\n    def f(pixels, prompts): ...\nmake()",
        "def __getattr__(name):\n    return lambda pixels, prompts: pixels",
        "from collections import *\ndef swap(g):\n    return lambda pixels, prompts: g(pixels)\n@swap\ndef f(pixels): ...",
    ],
)
def test_nothing_that_works_is_refused(code: str, tmp_path: Path) -> None:
    name = own(tmp_path, code)
    check_reward(name)
    assert load_reward(name) is not None


@pytest.mark.parametrize("name", ["os.path:join", "math:dist", "collections.abc:Sequence", "builtins:max"])
def test_modules_that_an_import_would_find(name: str) -> None:
    check_reward(name)


def test_a_module_is_found_without_importing_it_or_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "judges_of_ours"
    package.mkdir()
    for name in ("__init__", "red"):
        (package / f"{name}.py").write_text(f"raise RuntimeError('imported')\n{TWO}")
    monkeypatch.syspath_prepend(tmp_path)
    check_reward("judges_of_ours.red:f")
    before = content("judges_of_ours.red:f")
    with pytest.raises(UserError, match=KEY + r".*judges_of_ours\.red has no 'g'"):
        check_reward("judges_of_ours.red:g")
    for missing in ("judges_of_ours.blue", "judges_of_theirs", "judges_of_ours.red.deep"):
        with pytest.raises(UserError, match=KEY + rf".*cannot import '{missing}' \(ModuleNotFoundError: "):
            check_reward(f"{missing}:f")
    (package / "red.py").write_text(TWO)
    assert content("judges_of_ours.red:f") != before
    assert not any(name.startswith("judges") for name in sys.modules)


def test_a_dry_run_runs_no_code_of_the_users_and_a_run_does(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    marker = tmp_path / "ran"
    reward = own(tmp_path, f"open({str(marker)!r}, 'a').write('once ')\n{TWO}")
    keys = [f"distiller.reward={{name: '{reward}'}}", "train.steps=1", "train.batch_size=2", "train.sample_every=0", "train.device=cpu"]
    arguments = ["train", "digits_dmd2_1step", *keys, "--output", str(tmp_path / "run"), "--only", "train"]
    assert cli.main([*arguments, "--dry-run"]) == 0
    assert not marker.exists()
    assert cli.main(arguments) == 0
    assert marker.read_text() == "once "
    assert cli.main([*arguments, "--resume", "--dry-run"]) == 0
    assert marker.read_text() == "once "
    capfd.readouterr()
