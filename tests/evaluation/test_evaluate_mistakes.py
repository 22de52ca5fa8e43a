"""A mistake on the command line of `fastgen evaluate`: exit status 2, one line that says what was wrong, and nothing written or drawn."""

from __future__ import annotations

import os
from pathlib import Path

import huggingface_hub.constants
import pytest
import yaml
from PIL import Image

from fastgen import cli

PROTOCOL = {
    "name": "few",
    "size": [8, 8],
    "sets": {"main": {"prompts": "prompts.txt", "count": 8, "cycle": True}},
    "metrics": {"vendi": {"extractor": "digits_classifier"}},
}
DIGITS, FEW = "fastgen:digits", ("--protocol", "few.yaml")
NEEDED = "needed is an exported student, a diffusers folder, a folder of pictures, or a hub id 'owner/name'"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working folder with protocols, right and wrong, and what is no model."""
    root = tmp_path_factory.mktemp("place")
    (root / "prompts.txt").write_text("a handwritten seven\nan even digit\n")
    sets, metrics = PROTOCOL["sets"], PROTOCOL["metrics"]
    protocols = {
        "few": {},
        "longer": {"sets": {"main": {"prompts": "prompts.txt", "count": 8}}},
        "elsewhere": {"sets": {"main": {"prompts": "lost.txt"}}},
        "metric": {"metrics": {"fidd": None}},
        "option": {"metrics": {"fid": {"resiz": "clean"}}},
        "set": {"metrics": {"fid": {"set": "mian"}}},
        "weights": {"metrics": {"fid": None, "kid": None, "clip_score": {"preset": "sana-mjhq"}}},
        "compared": {"metrics": {"teacher_error": None}},
        "other": {"size": [16, 16]},
        "both": {"reference": {"file": "a.npz", "images": "b"}},
    }
    for name, change in protocols.items():
        (root / f"{name}.yaml").write_text(yaml.safe_dump({**PROTOCOL, "sets": sets, "metrics": metrics, **change}))
    (root / "broken.yaml").write_text("name: few\n sets: [")
    (root / "file").write_text("x")
    for name in ("empty", "drawn", "a_run/student", "locked"):
        (root / name).mkdir(parents=True)
    (root / "a_run/recipe.yaml").touch()
    for index in range(3):
        Image.new("RGB", (8, 8)).save(root / f"drawn/{index}.png")
    return root


CASES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    # MODEL
    "nothing": ((), ("MODEL: missing", "--compare")),
    "what is not there": (("nowhere", *FEW), ("MODEL: no folder 'nowhere'", NEEDED)),
    "a file": (("file", *FEW), ("MODEL: 'file' is a file", NEEDED)),
    "an empty folder": (("empty", *FEW), ("MODEL: 'empty'", "it is empty")),
    "a run": (("a_run", *FEW), ("MODEL: 'a_run' is a run; its student is 'a_run/student'",)),
    "a hub id that is not here": (("some/model", *FEW), ("'some/model'", "hub")),
    "an unknown bundled teacher": (("fastgen:letters", *FEW), ("MODEL: no bundled teacher 'letters'; allowed: digits",)),
    "fewer pictures than ids": (("drawn", *FEW), ("'drawn' holds 3 pictures, and the protocol measures 8", "--stop-after")),
    # protocols
    "an unknown protocol": ((DIGITS, "--protocol", "digit"), ("'digit'", "--protocol", "did you mean 'digits'?")),
    "no protocol file": ((DIGITS, "--protocol", "lost.yaml"), ("'lost.yaml'",)),
    "broken YAML": ((DIGITS, "--protocol", "broken.yaml"), ("'broken.yaml' is not valid YAML: line 2",)),
    "a prompt file shorter than its count": ((DIGITS, "--protocol", "longer.yaml"), ("sets.main.count: 8 pictures need 8 prompts", "holds 2")),
    "a lost prompt file": ((DIGITS, "--protocol", "elsewhere.yaml"), ("sets.main.prompts", "lost.txt")),
    "an unknown metric": ((DIGITS, "--protocol", "metric.yaml"), ("metrics.fidd", "did you mean 'fid'?")),
    "an unknown option": ((DIGITS, "--protocol", "option.yaml"), ("metrics.fid.resiz", "did you mean 'resize'?")),
    "an unknown set": ((DIGITS, "--protocol", "set.yaml"), ("metrics.fid.set: 'mian'; did you mean 'main'?",)),
    "two references": ((DIGITS, "--protocol", "both.yaml"), ("reference", "give either file or images")),
    "nothing that can be measured": ((DIGITS, "--protocol", "weights.yaml"), ("nothing can be measured: clip_score: needs ", "; fid, kid: needs ")),
    "pictures of another size": ((DIGITS, "--protocol", "other.yaml"), ("(3, 16, 16)", "the model makes (3, 8, 8)")),
    "a comparison without a teacher": ((DIGITS, "--protocol", "compared.yaml"), ("teacher_error: needs the teacher's pictures",)),
    "both": ((DIGITS, *FEW, "--prompts", "prompts.txt"), ("--prompts", "--protocol few.yaml")),
    "lost prompts of one's own": ((DIGITS, "--prompts", "lost.txt"), ("--prompts", "lost.txt")),
    "a count of a protocol": ((DIGITS, *FEW, "--count", "3"), ("--count: needs --prompts or --images",)),
    # places
    "no data folder": ((DIGITS, *FEW, "--data-dir", "nowhere"), ("--data-dir: no folder 'nowhere'",)),
    "a data folder that is a file": ((DIGITS, *FEW, "--data-dir", "file"), ("--data-dir: 'file' is a file",)),
    "no weights folder": ((DIGITS, *FEW, "--weights-dir", "nowhere"), ("--weights-dir: no folder 'nowhere'",)),
    "a store that is a file": ((DIGITS, *FEW, "--store", "file"), ("--store: cannot write 'file'", "not a directory")),
    "a store below a file": ((DIGITS, *FEW, "--store", "file/below"), ("--store: cannot write 'file/below'", "'file' is a file")),
    "a dump that is a file": ((DIGITS, *FEW, "--dump", "file"), ("--dump: cannot write 'file'", "not a directory")),
    "a dump of another form": ((DIGITS, *FEW, "--dump", "new", "--dump-form", "jpg"), ("--dump-form: 'jpg'", "allowed: parquet, png")),
    "no output folder": ((DIGITS, *FEW, "--output", "nowhere/r.json"), ("--output: no folder 'nowhere'",)),
    "an output that is a folder": ((DIGITS, *FEW, "--output", "empty"), ("--output: 'empty' is a folder",)),
    # numbers
    "the third half": ((DIGITS, *FEW, "--part", "3/2"), ("--part: '3/2' is not i/n",)),
    "part nothing": ((DIGITS, *FEW, "--part", "0/0"), ("--part: '0/0' is not i/n",)),
    "a look at nothing": ((DIGITS, *FEW, "--stop-after", "0"), ("--stop-after",)),
    "no steps": ((DIGITS, *FEW, "--steps", ""), ("--steps: ''",)),
    "steps twice": ((DIGITS, *FEW, "--steps", "2,4,2"), ("--steps: 2 is given twice",)),
    "guidance that is no number": ((DIGITS, *FEW, "--guidance", "nan"), ("--guidance: nan",)),
    "guidance below 1": ((DIGITS, *FEW, "--guidance", "-3"), ("guidance: -3",)),
    "a size in one number": ((DIGITS, *FEW, "--size", "512"), ("--size: '512' is not HEIGHTxWIDTH",)),
    "a size of a bundled teacher": ((DIGITS, *FEW, "--size", "16x16"), ("--size: does not apply to a bundled teacher",)),
    "steps of pictures": (("drawn", *FEW, "--steps", "2"), ("--steps", "takes no steps")),
    "a device that is not here": ((DIGITS, *FEW, "--device", "tpu"), ("--device: 'tpu'", "cpu")),
    "a dtype that is none": ((DIGITS, *FEW, "--dtype", "fp64"), ("--dtype: 'fp64'", "fp16")),
    "an argument without value": ((DIGITS, *FEW, "--call", "x"), ("--call: 'x' is not NAME=VALUE",)),
    # teachers
    "no teacher": ((DIGITS, *FEW, "--teacher", "nowhere"), ("--teacher", "'nowhere'")),
    "a teacher that is no pipeline": ((DIGITS, *FEW, "--teacher", "empty"), ("--teacher", "'empty'")),
    "steps of no teacher": ((DIGITS, *FEW, "--teacher-steps", "2"), ("--teacher-steps: there is no teacher",)),
    # programs
    "a program without a name": ((DIGITS, *FEW, "--external", "x"), ("--external: 'x' is not NAME=COMMAND",)),
    "no program": ((DIGITS, *FEW, "--external", "mine=lost_program"), ("--external mine: no program 'lost_program'",)),
    "a program for what is ours": ((DIGITS, *FEW, "--external", "fid=cat"), ("--external fid: fastgen measures that itself",)),
    "no time for programs": ((DIGITS, *FEW, "--external-timeout", "0"), ("--external-timeout", "above 0")),
    # comparisons
    "a comparison of a model": ((DIGITS, "--compare", "a.json", "b.json"), ("--compare takes two results files and no model",)),
    "a comparison of nothing": (("--compare", "a.json", "b.json"), ("'a.json'",)),
    "a comparison of no results": (("--compare", "file", "file"), ("'file'",)),
}  # fmt: skip


LATE = ("fewer pictures than ids", "pictures of another size")  # found once the model is loaded


@pytest.fixture(autouse=True)
def _home(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(place))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(place)


def there(root: Path) -> set[str]:
    return {path.relative_to(root).as_posix() for path in root.rglob("*") if ".cache/fastgen/hashes" not in path.as_posix()}


def assert_refused(arguments: tuple[str, ...], words: tuple[str, ...], place: Path, capfd: pytest.CaptureFixture[str], *, late: bool = False) -> None:
    before = there(place)
    capfd.readouterr()
    status = cli.main(["evaluate", *arguments])
    out, err = capfd.readouterr()
    lines = err.splitlines()
    assert (status, out) == (2, ""), err
    assert lines.pop().startswith("error: "), err
    assert [line for line in lines if not (late and line.startswith("measuring "))] == [], err
    assert [word for word in words if word not in err] == [], err
    assert there(place) == before


@pytest.mark.parametrize("name", CASES)
def test_a_mistake_of_an_evaluation_is_one_line(name: str, place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert_refused(*CASES[name], place, capfd, late=name in LATE)


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_a_store_that_cannot_be_written(place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (place / "locked").chmod(0o500)
    assert_refused((DIGITS, *FEW, "--store", "locked"), ("--store", "'locked'", "permission denied"), place, capfd)
