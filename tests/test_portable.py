"""What leaves this machine names no folder of it, and a student's teacher is found again."""

from __future__ import annotations

import getpass
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from pipelines import PROMPTS, edit_json, tiny_protocol, verifying_here
from pipelines import sd3_folder as sd3_folder

from fastgen import cli, evaluate, load_student, load_teacher_of
from fastgen.errors import UserError
from fastgen.export import verify
from fastgen.families import source_hash
from fastgen.generator import read_manifest
from fastgen.portable import is_local, portable, portable_text, source_name

USER, HOME = "someuser_7f3a", Path.home()


@pytest.mark.parametrize(
    ("source", "name", "local"),
    [
        ("owner/teacher", "owner/teacher", False),
        ("fastgen:digits", "fastgen:digits", False),
        ("toy:ring", "toy:ring", False),
        ("/home/someone/models/sd35/", "sd35", True),
        ("~/models/sd35", "sd35", True),
        ("./sd35", "sd35", True),
        ("../..", Path.cwd().parent.parent.name, True),
    ],
)
def test_a_folder_is_called_by_its_own_name(source: str, name: str, local: bool) -> None:
    assert (source_name(source), is_local(source_name(source))) == (name, local)


def test_paths_of_a_record_keep_their_last_part() -> None:
    record = {
        "data": {"prompts": "/home/a/prompts.txt", "images": None, "pairs": 5},
        "distiller": {"reward": {"name": "/home/a/rewards.py:mine"}, "files": ["~/b/c", "./d"]},
        "teacher": {"pretrained": "owner/name", "negative_prompt": "/imagine a/b"},
    }
    assert portable(record) == {
        "data": {"prompts": "prompts.txt", "images": None, "pairs": 5},
        "distiller": {"reward": {"name": "rewards.py:mine"}, "files": ["c", "d"]},
        "teacher": {"pretrained": "owner/name", "negative_prompt": "/imagine a/b"},
    }


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("needs X, which is not in '/home/me/weights': get it from https://example.org/a/b", "needs X, which is not in 'weights': get it from https://example.org/a/b"),
        ('\'/home/me/my p.yaml\' and "/home/o\'brien/b"', "'my p.yaml' and \"b\""),
        ("'~/weights/a b', '../b/c.npz' and './d'", "'a b', 'c.npz' and 'd'"),
        ("it wrote last 'FileNotFoundError: /home/me/x.pt: gone', PATH=/usr/bin/x", "it wrote last 'FileNotFoundError: x.pt: gone', PATH=x"),
        ("(/home/me/a/) or ~/b/c.", "(a) or c."),
        ("width / height, 1/2, and/or, fastgen:digits/open, '/', 'a/b', /one", "width / height, 1/2, and/or, fastgen:digits/open, '/', 'a/b', /one"),
    ],
)  # fmt: skip
def test_paths_of_a_message_keep_their_last_part(text: str, wanted: str) -> None:
    assert portable_text(text) == wanted


@pytest.fixture(autouse=True)
def _home(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path_factory.mktemp("home")))  # where features are kept


DMD2 = {"name": "dmd2", "critic_updates": 1}
PHASED = {"name": "phased_dmd", "critic_updates": 1, "phases": [{"start": 1.0, "end": 0.5}, {"start": 0.5, "end": 0.0}]}
FORMS: dict[str, tuple[dict[str, Any], Any]] = {
    "full": (DMD2, "full"),
    "lora": (DMD2, {"lora": {"rank": 2}}),
    "experts": (PHASED, {"lora": {"rank": 2}}),
}


@pytest.fixture(scope="module", params=FORMS)
def made(request: pytest.FixtureRequest, sd3_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder whose name is a user's, with a teacher, prompts and a whole run; where it trained adapters, the student is of adapters."""
    root = tmp_path_factory.mktemp(request.param) / USER
    shutil.copytree(sd3_folder, root / "teacher")
    edit_json(root / "teacher/vae/config.json", _name_or_path=f"/home/{USER}/before")
    (root / "prompts.txt").write_text("\n".join(PROMPTS))
    distiller, tune = FORMS[request.param]
    recipe = {
        "teacher": {"pretrained": str(root / "teacher"), "guidance": 2.0, "max_sequence_length": 16},
        "student": {"steps": 4, "tune": tune},
        "distiller": distiller,
        "data": {"prompts": str(root / "prompts.txt")},
        "optimizer": {"student": {"lr": 0.01}, "fake_score": {"lr": 0.01}},
        "train": {"steps": 2, "batch_size": 2, "ema": 0.0, "checkpoint_every": 0, "sample_every": 2},
        "evaluate": {"protocol": tiny_protocol(root)},
    }
    (root / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    with verifying_here(), pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(tmp_path_factory.mktemp("home")))
        assert cli.main(["train", str(root / "recipe.yaml"), "--output", str(root / "run")]) == 0
        if tune != "full":
            assert cli.main(["export", str(root / "run"), "--output", str(root / "run/adapters"), "--lora"]) == 0
            assert cli.main(["evaluate", str(root / "run/adapters"), "--protocol", tiny_protocol(root)]) == 0
    return root


def test_no_product_holds_a_path_or_a_users_name(made: Path) -> None:
    run_dir = made / "run"
    products = [run_dir / name for name in ("report.html", "results.json", "metrics.jsonl")]
    products += [path for name in ("student", "adapters", "samples") for path in (run_dir / name).rglob("*") if path.is_file()]
    assert {"fastgen.json", "README.md", "model_index.json", "report.html"} <= {path.name for path in products}
    hidden = [USER.encode(), str(made).encode(), f"/{getpass.getuser()}/".encode(), f"{HOME}/".encode()]
    assert [(path.name, secret) for path in products for secret in hidden if secret in path.read_bytes()] == []
    assert USER in (run_dir / "recipe.yaml").read_text()  # which stays here
    student = "adapters" if (run_dir / "adapters").is_dir() else "student"
    manifest = read_manifest(run_dir / student)
    assert manifest["teacher"]["pretrained"] == manifest.get("base", "teacher") == "teacher"
    assert manifest["teacher"]["sha256"] == source_hash(str(made / "teacher"))
    assert manifest["recipe"]["data"]["prompts"] == "prompts.txt"


def one_line(arguments: list[str], capfd: pytest.CaptureFixture[str]) -> str:
    capfd.readouterr()
    assert cli.main(arguments) == 2
    out, err = capfd.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    return err


def test_a_teacher_is_found_through_the_run_or_where_it_is_said_to_be(
    made: Path, sd3_folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Moved and renamed, run and teacher both."""
    folder = "adapters" if (made / "run/adapters").is_dir() else "student"
    before, picture = load_student(made / "run" / folder)(PROMPTS[:1], [0]), str(tmp_path / "a.png")
    shutil.copytree(made / "run", tmp_path / "other", ignore=shutil.ignore_patterns("checkpoints", "samples", "tensorboard"))
    made.rename(away := made.with_name("away"))
    try:
        student, teacher = tmp_path / "other" / folder, str(away / "teacher")
        needing = [["evaluate", str(student), "--protocol", tiny_protocol(tmp_path)]]
        needing += [["sample", str(student), "--prompt", "a red cat", "--output", picture, "--first-step-from-teacher", "2"]]
        needing += [["verify", str(student)], ["sample", str(student), "--prompt", "a red cat", "--output", picture]] * (folder == "adapters")
        with verifying_here():
            for arguments in needing:
                assert re.search(rf"no folder '.*{USER}/teacher'.*; give the folder of .*: --teacher DIR", one_line(arguments, capfd))
                assert "--teacher: no folder './nowhere'" in one_line([*arguments, "--teacher", "./nowhere"], capfd)
                assert f"--teacher: '{sd3_folder}' is not the teacher 'teacher'" in one_line([*arguments, "--teacher", str(sd3_folder)], capfd)
                assert cli.main([*arguments, "--teacher", teacher]) == 0, capfd.readouterr().err
            assert verify(student, teacher_dir=teacher).passed
        assert (load_student(student, teacher_dir=teacher)(PROMPTS[:1], [0]) - before).abs().max() <= 1e-5
        assert load_teacher_of(student, teacher_dir=teacher).steps == 28
        results = evaluate(student, protocol=tiny_protocol(tmp_path), teacher_dir=teacher)
        assert [row["model"] for row in results["metrics"] if row["name"] == "seconds_per_1000_images"] == ["student", "teacher"]
        # The run's own recipe, as somebody mends it who moves the teacher for good, is enough.
        recipe = yaml.safe_load((tmp_path / "other/recipe.yaml").read_text())
        recipe["teacher"]["pretrained"] = teacher
        (tmp_path / "other/recipe.yaml").write_text(yaml.safe_dump(recipe))
        load_teacher_of(student)
        (tmp_path / "other/recipe.yaml").unlink()
        with pytest.raises(UserError, match=r"its teacher 'teacher' was a local folder, and no run around the student says where; .* --teacher DIR"):
            load_teacher_of(student)
    finally:
        away.rename(made)


def test_a_student_that_recorded_a_whole_path_still_loads(made: Path, tmp_path: Path) -> None:
    """As fastgen wrote it before it recorded names."""
    folder = "adapters" if (made / "run/adapters").is_dir() else "student"
    old = Path(shutil.copytree(made / "run" / folder, tmp_path / "old"))
    manifest = json.loads((old / "fastgen.json").read_text())
    more = {"base": str(made / "teacher")} if "base" in manifest else {}
    edit_json(old / "fastgen.json", teacher=manifest["teacher"] | {"pretrained": str(made / "teacher")}, **more)
    assert (load_student(old)(PROMPTS[:1], [0]) - load_student(made / "run" / folder)(PROMPTS[:1], [0])).abs().max() <= 1e-5
    load_teacher_of(old)
    with verifying_here():
        assert verify(old).passed
