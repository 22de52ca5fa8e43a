"""Votes of a blind gallery are counted by its key."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from scipy.stats import binomtest

from fastgen import cli
from fastgen.errors import UserError
from fastgen.fingerprints import sealed
from fastgen.votes import count_votes, tally_table, wilson

ORDERS = [[2, 0, 1], [0, 1, 2], [1, 2, 0], [0, 2, 1]]


def write_key(folder: Path, **changed: Any) -> Path:
    rows = [{"prompt": f"prompt {i}", "seed": i, "order": order} for i, order in enumerate(ORDERS)]
    key = {"format": 1, "page": "p1", "secret": "s", "models": [{"name": name, "steps": 1} for name in ("teacher", "one", "two")], "rows": rows}
    path = folder / "page.key.json"
    path.write_text(json.dumps(sealed(key | changed)))
    return path


def write_votes(path: Path, choices: dict[int, str], **changed: Any) -> Path:
    votes = [{"row": i, "prompt": f"prompt {i}", "seed": i, "choice": each, "time": "2026-11-26T21:00:00.000Z"} for i, each in choices.items()]
    path.write_text(json.dumps({"format": 1, "page": "p1", "ballot": path.stem, "votes": votes} | changed))
    return path


def test_each_vote_goes_to_the_model_that_stood_there(tmp_path: Path) -> None:
    files = [
        write_votes(tmp_path / "a.json", {0: "A", 1: "C", 2: "B", 3: "none"}),  # all for model 2
        write_votes(tmp_path / "b.json", {0: "B", 3: "A", 1: "B"}),  # models 0, 0, 1
    ]
    tally = count_votes(files, write_key(tmp_path))
    assert [(model["name"], model["wins"], model["of"]) for model in tally["models"]] == [("teacher", 2, 6), ("one", 1, 6), ("two", 3, 6)]
    assert tally["undecided"] == 1 and tally["ballots"] == 2
    assert [(pair["a"], pair["b"], pair["wins"], pair["of"]) for pair in tally["pairs"]] == [
        ("teacher", "one", 2, 3),
        ("teacher", "two", 2, 5),
        ("one", "two", 1, 4),
    ]
    for each in (*tally["models"], *tally["pairs"]):
        expected = binomtest(each["wins"], each["of"]).proportion_ci(0.95, "wilson")
        assert each["interval"] == pytest.approx([expected.low, expected.high], abs=1e-12)


@pytest.mark.parametrize(("wins", "count"), [(0, 1), (1, 1), (7, 10), (0, 40), (40, 40), (513, 1000)])
def test_intervals_are_wilsons(wins: int, count: int) -> None:
    expected = binomtest(wins, count).proportion_ci(0.95, "wilson")
    assert wilson(wins, count) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_no_decided_vote_has_no_interval(tmp_path: Path) -> None:
    tally = count_votes([write_votes(tmp_path / "a.json", {0: "none"})], write_key(tmp_path))
    assert all("interval" not in each for each in (*tally["models"], *tally["pairs"])) and "0 votes" not in tally_table(tally)


def test_the_command_prints_the_best_first_and_writes_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    votes, output = write_votes(tmp_path / "a.json", {0: "A", 1: "C", 2: "C"}), tmp_path / "counts.json"
    assert cli.main(["gallery", "--count", str(votes), "--key", str(write_key(tmp_path)), "--output", str(output)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "3 votes on 1 ballot, 0 of them for no difference"
    assert lines[3].split() == ["two", "1", "steps", "2", "67%", "[21%,", "94%]"]
    assert json.loads(output.read_text())["models"][2]["wins"] == 2


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"page": "p2"}, "holds votes on page 'p2', and .* is the key of page 'p1'"),
        ({"format": 2}, "key format"),
        ({"votes": [{"row": 0}]}, "key votes.0.prompt: missing"),
        ({"votes": "many"}, "key votes: must be a list"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, changed: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        count_votes([write_votes(tmp_path / "a.json", {0: "A"}, **changed)], write_key(tmp_path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("vote", "message"),
    [
        ({"row": 4}, "row 4 is none of the page's 4"),
        ({"row": -1}, "row -1 is none"),
        ({"prompt": "another"}, "row 0 is of another prompt or seed"),
        ({"seed": 9}, "row 0 is of another prompt or seed"),
        ({"choice": "D"}, 'row 0: the choice "D" is none of A, B, C, none'),
        ({"choice": ""}, "row 0: the choice"),
        ({"choice": "AB"}, "row 0: the choice"),
    ],
)
def test_votes_that_no_page_can_hold_are_refused(tmp_path: Path, vote: dict[str, Any], message: str) -> None:
    good = {"row": 0, "prompt": "prompt 0", "seed": 0, "choice": "A", "time": ""}
    with pytest.raises(UserError, match=message):
        count_votes([write_votes(tmp_path / "a.json", {}, votes=[good | vote])], write_key(tmp_path))


def test_nobody_is_counted_twice(tmp_path: Path) -> None:
    files = [write_votes(tmp_path / f"{name}.json", {0: "A"}, ballot="mine") for name in "ab"]
    with pytest.raises(UserError, match=r"a\.json' and .*b\.json' are of the same ballot"):
        count_votes(files, write_key(tmp_path))
    twice = [{"row": 0, "prompt": "prompt 0", "seed": 0, "choice": each, "time": ""} for each in "AB"]
    with pytest.raises(UserError, match="row 0 has two votes"):
        count_votes([write_votes(tmp_path / "a.json", {}, votes=twice)], write_key(tmp_path))


def test_damaged_files_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    votes, key = write_votes(tmp_path / "a.json", {0: "A"}), write_key(tmp_path)
    edited = tmp_path / "edited.json"
    edited.write_text(key.read_text().replace("[2, 0, 1]", "[0, 2, 1]"))
    odd = tmp_path / "odd"
    odd.mkdir()
    write_key(odd, rows=[{"prompt": "", "seed": 0, "order": [0, 0, 1]}])
    (tmp_path / "cut.json").write_text(votes.read_text()[:-9])
    cases = [
        (votes, edited, "--key: .*seal"),
        (votes, odd / "page.key.json", "order is none of its models"),
        (tmp_path / "cut.json", key, "not valid JSON"),
    ]
    for given, by, message in [*cases, (votes, tmp_path / "absent", "absent"), (tmp_path / "absent", key, "absent"), (key, key, "key ballot")]:
        assert cli.main(["gallery", "--count", str(given), "--key", str(by)]) == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert line.startswith("error: ") and re.search(message, line), line
