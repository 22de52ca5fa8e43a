"""Report and gallery in a real browser: no error, every picture decodes, nothing sticks out of a narrow or a wide window, and votes are kept."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from chromium import PROGRAM, browse
from test_report_quality import REAL, rows, write_run

from fastgen import gallery
from fastgen.evaluation.subjects.base import Subject
from fastgen.gallery import Rows, _Model, write_gallery
from fastgen.pictures import picture_grid, save_png
from fastgen.report import write_comparison, write_report
from fastgen.votes import count_votes

pytestmark = [pytest.mark.browser, pytest.mark.skipif(PROGRAM is None, reason="needs Chromium")]
WIDTHS = (360, 1600)
PROMPTS = ["a red fox in deep snow", "Donaudampfschifffahrtsgesellschaftskapitänsmützenständer" * 3, "<b>'\"&", ""]


class Flat(Subject):
    """Pictures of one colour each, which the seed decides."""

    name = "student"
    steps = 4

    def __init__(self, size: tuple[int, int]) -> None:
        self.size = size

    @property
    def record(self) -> dict[str, Any]:
        return {}

    @property
    def content(self) -> str:
        return "ab" * 32

    def draw(self, prompts: list[str], seeds: list[int], ids: Sequence[int]) -> torch.Tensor:
        return torch.stack([torch.full((3, *self.size), (seed % 7) / 7) for seed in seeds])


def make_gallery(folder: Path, monkeypatch: pytest.MonkeyPatch, *, blind: bool, names: Sequence[str], size: tuple[int, int] = (8, 8)) -> Path:
    columns = [_Model(name, name, lambda: Flat(size), size) for name in names]
    monkeypatch.setattr(gallery, "_columns", lambda *args: columns)
    return write_gallery(list(names), Rows(PROMPTS, 2), folder / "page.html", blind=blind)[0]


def check(found: dict[str, Any], width: int, pictures: int) -> None:
    assert found["width"] == width and found["errors"] == [] and found["requests"] == []
    assert found["images"] == [True] * pictures
    assert found["overflow"] <= 0 and found["outside"] == []


@pytest.mark.parametrize("width", WIDTHS)
def test_a_report_opens(tmp_path: Path, width: int) -> None:
    measured = [*rows({1: 8.0, 2: 6.0, 4: 4.0}), *rows({4: 5.0, 8: 2.0}, "teacher"), *REAL]
    run = write_run(tmp_path / "run", measured, teacher="e" * 64)
    recipe = (run / "recipe.yaml").read_text()
    (run / "recipe.yaml").write_text(recipe.replace("prompts: 'fastgen:digits'", "images: 'fastgen:digits'"))
    grid = picture_grid([("student, 2 steps", torch.rand(16, 3, 8, 8))], ["a very long prompt of many words"] * 16)
    for step in (1, 2):
        save_png(grid, run / f"samples/step_{step:06d}.png")
    check(browse(write_report(run), tmp_path, width), width, 2 + 2 * 16)


@pytest.mark.parametrize("width", WIDTHS)
def test_a_comparison_opens(tmp_path: Path, width: int) -> None:
    runs = [write_run(tmp_path / name, [*rows({1: 8.0, 2: 6.0}), *rows({25: 2.0}, "teacher"), *REAL]) for name in ("a", "b" * 120)]
    check(browse(write_comparison(runs, tmp_path / "both.html"), tmp_path, width), width, 0)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize(("names", "size"), [(["teacher", "a/student"], (8, 8)), (["n" * 90, *"abcdefgh"], (8, 24)), (["a", "b"], (300, 200))])
def test_a_gallery_opens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, width: int, names: list[str], size: tuple[int, int]) -> None:
    for blind in (False, True):
        (folder := tmp_path / str(blind)).mkdir()
        page = make_gallery(folder, monkeypatch, blind=blind, names=names, size=size)
        check(browse(page, folder, width), width, 2 * len(PROMPTS) * len(names))


_VOTE = """
const rows = [...document.querySelectorAll(".row")], press = key => document.dispatchEvent(new KeyboardEvent("keydown", { key, bubbles: true }));
const progress = () => document.getElementById("progress").textContent, chosen = () => document.querySelectorAll("input:checked").length;
const press_download = async () => {
  let blob;
  URL.createObjectURL = given => { blob = given; return "data:,"; };
  let name;
  HTMLAnchorElement.prototype.click = function () { name = this.download; };
  document.getElementById("download").click();
  return { name, text: await blob.text() };
};
"""


@pytest.mark.parametrize("width", WIDTHS)
def test_votes_by_click_and_by_key_are_counted_kept_and_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, width: int) -> None:
    page = make_gallery(tmp_path, monkeypatch, blind=True, names=["x", "y", "z"])
    script = (
        _VOTE
        + """
if (parent !== top) return { kept: [progress(), document.getElementById("download").disabled, chosen()], saved: await press_download(),
  unkept: document.getElementById("unkept").hidden };
const before = [progress(), document.getElementById("download").disabled, chosen()];
rows[0].querySelectorAll("img")[1].click();
press("3"); press("0"); press("2"); press("4"); press("x");
rows[0].querySelectorAll("input")[0].click();
rows[5].querySelectorAll("input")[2].focus();
press("1");
const focused = document.activeElement.closest(".row").dataset.row;
const after = [progress(), document.getElementById("download").disabled, chosen()];
// The page opened again, in a frame of its own: a page that loads itself again may do so before its browser has kept what it was given.
const frame = document.createElement("iframe"), answer = new Promise(found => addEventListener("message", event => found(JSON.parse(event.data))));
frame.src = location.href;
document.body.append(frame);
const again = await answer;
found.errors.push(...again.errors);
return { before, after, focused, ...again.tried };
"""
    )
    found = browse(page, tmp_path, width, script)
    assert found["errors"] == []
    tried = found["tried"]
    assert tried["before"] == ["0 of 8", True, 0]
    assert tried["after"] == ["4 of 8", False, 4] and tried["kept"] == tried["after"] and tried["unkept"] is True
    assert tried["focused"] == "6"  # the next open row after the one that was voted on
    saved = tmp_path / tried["saved"]["name"]
    saved.write_text(tried["saved"]["text"], encoding="utf-8")
    votes = json.loads(saved.read_text(encoding="utf-8"))
    assert saved.name == "votes.json"
    assert [(vote["row"], vote["choice"]) for vote in votes["votes"]] == [(0, "A"), (1, "none"), (2, "B"), (5, "A")]
    assert [vote["prompt"] for vote in votes["votes"]] == [PROMPTS[0], PROMPTS[0], PROMPTS[1], PROMPTS[2]]
    key = json.loads((tmp_path / "page.key.json").read_text(encoding="utf-8"))
    wins = [0, 0, 0]
    for row, place in ((0, 0), (2, 1), (5, 0)):
        wins[key["rows"][row]["order"][place]] += 1
    tally = count_votes([saved], tmp_path / "page.key.json")
    assert [model["wins"] for model in tally["models"]] == wins and tally["undecided"] == 1


def test_votes_are_collected_where_a_browser_keeps_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = make_gallery(tmp_path, monkeypatch, blind=True, names=["x", "y"])
    refusing = "<head><script>Object.defineProperty(window, 'localStorage', { get() { throw new Error('refused'); } });</script>"
    page.write_text(page.read_text(encoding="utf-8").replace("<head>", refusing, 1), encoding="utf-8")
    script = _VOTE + "press('2'); return { progress: progress(), unkept: document.getElementById('unkept').hidden, saved: await press_download() };"
    found = browse(page, tmp_path, 1600, script)
    assert found["errors"] == [] and found["tried"]["progress"] == "1 of 8" and found["tried"]["unkept"] is False
    assert [vote["choice"] for vote in json.loads(found["tried"]["saved"]["text"])["votes"]] == ["B"]
