"""Whatever decides a number makes the features another store's, or the protocol's hash another; what decides none does neither."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from PIL import Image
from pipelines import tiny_sd3
from safetensors.torch import load_file, save_file
from synthetic import Colours, Painter, install
from torch import Tensor

from fastgen.evaluation import versions
from fastgen.evaluation.extractors.base import Resources
from fastgen.evaluation.protocol import Protocol, protocol_from
from fastgen.evaluation.results import Row
from fastgen.evaluation.runner import Evaluation
from fastgen.evaluation.settings import Settings
from fastgen.evaluation.subjects import Subject
from fastgen.evaluation.subjects.stock import StockPipeline
from fastgen.evaluation.subjects.stock_call import CallSettings
from fastgen.fingerprints import file_hash

CALL = CallSettings(2, 3.0, (16, 16), 12)
FLOOR = [Row(name="level", model="real", value=127.5, n=1)]


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Prompts, and real pictures in two places."""
    install(monkeypatch)
    monkeypatch.setattr(Path, "home", lambda: tmp_path / "home")
    (tmp_path / "texts.txt").write_text("a red cat\ntwo boats\n")
    (tmp_path / "other.txt").write_text("a red dog\ntwo boats\n")
    (tmp_path / "real").mkdir()
    for index in range(3):
        Image.new("RGB", (8, 8), (80 * index,) * 3).save(tmp_path / f"real/{index}.png")
    shutil.copytree(tmp_path / "real", tmp_path / "elsewhere")
    return tmp_path


def protocol(place: Path, *, block: dict[str, Any] | None = None, **more: Any) -> Protocol:
    """Of four pictures, measured by themselves and against real ones. block: keys of its set."""
    content: dict[str, Any] = {
        "name": "mine",
        "sets": {"a": {"prompts": "texts.txt", "count": 4, "cycle": True, "seed": 1, **(block or {})}},
        "prepare": {"resize": 4},
        "reference": {"images": "real"},
        "metrics": {"level": None, "to_real": None},
    }
    return protocol_from(content | more, data_dir=place)


class Made(NamedTuple):
    """What an evaluation had to make, for it was not there."""

    pictures: bool
    real: bool  # features of the reference
    floors: bool


def made(of: Protocol, place: Path, subject: Subject, *, device: str = "cpu", **settings: Any) -> Made:
    computed: list[str] = []
    resources = Resources(device=torch.device(device), data_dir=place)
    Colours.calls.clear()
    measured = Evaluation(of, resources, Settings(place / "stores", **settings))
    real = bool(Colours.calls)
    drawing, draw = [], subject.draw

    def watched(prompts: list[str], seeds: list[int], ids: Sequence[int]) -> Tensor | list[Tensor]:
        drawing.append(ids)
        return draw(prompts, seeds, ids)

    subject.draw = watched
    assert measured.draw(subject)
    for name, metric in measured.metrics.items():
        metric.floors = lambda name=name: computed.append(name) or FLOOR
    measured.floors()
    return Made(bool(drawing), real, bool(computed))


NOTHING = Made(pictures=False, real=False, floors=False)
ALL = Made(pictures=True, real=True, floors=True)

# changes of a protocol, and whether pictures are drawn and real ones read again
DECIDING: dict[str, tuple[dict[str, Any], bool, bool]] = {
    "prompts": ({"block": {"prompts": "other.txt"}}, True, False),
    "seed": ({"block": {"seed": 2}}, True, False),
    "seeds that count up": ({"block": {"first_seed": 1}}, True, False),
    "pictures a prompt": ({"block": {"per_prompt": 2}}, True, False),
    "count": ({"block": {"count": 3}}, True, False),
    "quantisation": ({"quantisation": "truncate"}, True, False),
    "crop": ({"prepare": {"resize": 4, "crop": "centre"}}, True, True),
    "size after resizing": ({"prepare": {"resize": 5}}, True, True),
    "resize filter": ({"prepare": {"resize": 4, "filter": "box"}}, True, True),
    "chunk": ({"chunk": 2}, True, True),
    "an extractor's option": ({"metrics": {"level": {"scale": 2.0}, "to_real": {"scale": 2.0}}}, True, True),
    "size of pictures": ({"size": [8, 8]}, False, False),  # what is drawn decides about features
    "a metric's option": ({"metrics": {"level": {"least": 2}, "to_real": None}}, False, False),
    "seed of subsets": ({"seed": 1}, False, False),
}


@pytest.mark.parametrize("name", DECIDING)
def test_what_a_protocol_decides(place: Path, name: str) -> None:
    change, pictures, real = DECIDING[name]
    assert made(protocol(place), place, Painter()) == ALL
    changed = protocol(place, **change)
    assert made(changed, place, Painter()) == Made(pictures=pictures, real=real, floors=True)
    assert changed.hash() != protocol(place).hash()


SAID: dict[str, dict[str, Any]] = {
    "description": {"description": "words"},
    "batch size": {"batch_size": 3},
    "order of metrics": {"metrics": {"to_real": None, "level": None}},
    "an option that is so anyway": {"metrics": {"level": {"scale": 1.0, "set": "a"}, "to_real": {}}},
    "where the reference lies": {"reference": {"images": "elsewhere"}},
    "where the reference is to be had": {"reference": {"images": "real", "source": "https://example.org"}},
    "where prompts are to be had": {"block": {"source": "https://example.org"}},
}


@pytest.mark.parametrize("name", SAID)
def test_what_a_protocol_only_says(place: Path, name: str) -> None:
    made(protocol(place), place, Painter())
    assert made(protocol(place, **SAID[name]), place, Painter()) == NOTHING
    assert protocol(place, **SAID[name]).hash() == protocol(place).hash()


def test_recorded_hashes_of_files(place: Path) -> None:
    before = protocol(place)
    made(before, place, Painter())
    reference = Evaluation(before, Resources(data_dir=place), Settings(place / "stores")).reference
    assert reference is not None
    recorded = {"images": "real", "sha256": reference.record["sha256"]}
    after = protocol(place, reference=recorded, block={"sha256": file_hash(place / "texts.txt")})
    assert made(after, place, Painter()) == NOTHING and after.hash() == before.hash()


@pytest.mark.parametrize("settings", [{"batch_size": 1}, {"batch_size": 4}, {"stop_after": 100}, {"allow_pickle": True}])
def test_settings_that_decide_nothing(place: Path, settings: dict[str, Any]) -> None:
    made(protocol(place), place, Painter())
    assert made(protocol(place), place, Painter(), **settings) == NOTHING


def test_a_quick_look_is_another_set(place: Path) -> None:
    made(protocol(place), place, Painter())
    assert made(protocol(place), place, Painter(), stop_after=2) == NOTHING._replace(pictures=True)


def test_the_weights_of_an_extractor(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made(protocol(place), place, Painter())

    class Other(Colours):
        @property
        def hash(self) -> str:
            return "1" * 64

    install(monkeypatch, Other)
    assert made(protocol(place), place, Painter()) == ALL


def with_version(package: str, version: str | None) -> Any:
    """In place of `importlib.metadata`: another version of a package, or none."""

    def found(name: str) -> str:
        if name == package and version is None:
            raise metadata.PackageNotFoundError(name)
        return str(version) if name == package else metadata.version(name)

    return SimpleNamespace(version=found, PackageNotFoundError=metadata.PackageNotFoundError)


PACKAGES = ["fastgen-distill", "torch", "diffusers", "transformers", "numpy", "pillow", "torch-fidelity", "open_clip_torch", "lpips"]


@pytest.mark.parametrize("package", PACKAGES)
@pytest.mark.parametrize("version", ["0.0.1", None])
def test_the_version_of_each_package(place: Path, monkeypatch: pytest.MonkeyPatch, package: str, version: str | None) -> None:
    made(protocol(place), place, Painter())
    with monkeypatch.context() as patch:
        patch.setattr(versions, "metadata", with_version(package, version))
        assert made(protocol(place), place, Painter()) == ALL
    assert made(protocol(place), place, Painter()) == NOTHING


def test_a_package_that_decides_nothing(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made(protocol(place), place, Painter())
    monkeypatch.setattr(versions, "metadata", with_version("typer", "0.0.1"))
    assert made(protocol(place), place, Painter()) == NOTHING


def test_the_kind_of_device_and_not_which(place: Path) -> None:
    made(protocol(place), place, Painter())
    assert made(protocol(place), place, Painter(), device="cuda:0") == ALL
    assert made(protocol(place), place, Painter(), device="cuda:1") == NOTHING
    assert made(protocol(place), place, Painter(), device="mps") == ALL


def test_our_own_format(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made(protocol(place), place, Painter())
    monkeypatch.setattr(versions, "FORMAT", versions.FORMAT + 1)
    assert made(protocol(place), place, Painter()) == ALL


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny") / "sd3"
    tiny_sd3().save_pretrained(path)
    return path


class Like(Painter):
    """Paints, and is known as a pipeline is: only what its features are kept under matters here."""

    def __init__(self, stock: StockPipeline) -> None:
        super().__init__("pipeline", steps=stock.steps)
        self._record, self._content = stock.record, stock.content

    @property
    def record(self) -> dict[str, Any]:
        return self._record

    @property
    def content(self) -> str:
        return self._content


def edited(name: str, **change: Any) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        content = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(content | change))

    return edit


def other_weight(folder: Path) -> None:
    (path,) = (folder / "transformer").glob("*.safetensors")
    weights = load_file(path)
    next(iter(weights.values())).flatten()[0] += 1e-3
    save_file(weights, path, {"format": "pt"})


@pytest.mark.parametrize(
    ("asked", "dtype", "edit", "drawn"),
    [
        (CALL, "fp32", None, False),  # somewhere else
        (CallSettings(3, 3.0, (16, 16), 12), "fp32", None, True),
        (CallSettings(2, 4.0, (16, 16), 12), "fp32", None, True),
        (CallSettings(2, 3.0, (16, 24), 12), "fp32", None, True),
        (CallSettings(2, 3.0, (16, 16), 13), "fp32", None, True),
        (CallSettings(2, 3.0, (16, 16), 12, {"negative_prompt": "fog"}), "fp32", None, True),
        (CALL, "bf16", None, True),
        (CALL, "fp32", edited("scheduler/scheduler_config.json", shift=2.0), True),
        (CALL, "fp32", other_weight, True),
    ],
    ids=["place", "steps", "guidance", "size", "tokens", "negative prompt", "dtype", "scheduler", "weights"],
)
def test_a_pipeline_and_its_call(
    folder: Path, place: Path, asked: CallSettings, dtype: str, edit: Callable[[Path], None] | None, drawn: bool
) -> None:
    made(protocol(place), place, Like(StockPipeline(str(folder), CALL)))
    copy = Path(shutil.copytree(folder, place / "copy"))
    if edit is not None:
        edit(copy)
    assert made(protocol(place), place, Like(StockPipeline(str(copy), asked, dtype=dtype))) == NOTHING._replace(pictures=drawn)
