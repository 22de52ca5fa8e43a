"""What people preferred in a blind gallery: their files of votes, counted with its key."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any, Literal

from fastgen import records
from fastgen.errors import UserError
from fastgen.evaluation.intervals import NORMAL
from fastgen.evaluation.table import aligned
from fastgen.fingerprints import unsealed
from fastgen.gallery import LETTERS

NEITHER = "none"  # the choice of whoever sees no difference


class _Vote(records.Schema):
    row: int
    prompt: str
    seed: int
    choice: str
    time: str


class Votes(records.Schema):
    """What a page's button saves. ballot: whose, a random name that a browser keeps for a page."""

    format: Literal[1]
    page: str
    ballot: str
    votes: list[_Vote]


class _Model(records.Schema):
    name: str


class _Row(records.Schema):
    prompt: str
    seed: int
    order: list[int]


class Key(records.Schema):
    format: Literal[1]
    page: str
    models: list[_Model]
    rows: list[_Row]


@dataclass(frozen=True)
class Share:
    """Of `count` choices `wins` were for it. interval: Wilson's, 95 %; None without any choice."""

    wins: int
    count: int

    @property
    def interval(self) -> tuple[float, float] | None:
        return wilson(self.wins, self.count) if self.count else None

    @property
    def record(self) -> dict[str, Any]:
        interval = self.interval
        return {"wins": self.wins, "of": self.count, **({} if interval is None else {"interval": list(interval)})}

    def text(self) -> str:
        interval = self.interval
        return "" if interval is None else f"{self.wins / self.count:.0%} [{interval[0]:.0%}, {interval[1]:.0%}]"


def wilson(wins: int, count: int) -> tuple[float, float]:
    """95 % interval of a share (Wilson 1927): (p + z²/2n ± z sqrt(p (1 - p)/n + z²/4n²)) / (1 + z²/n), of independent choices."""
    p, z = wins / count, NORMAL
    centre, half = p + z**2 / (2 * count), z * (p * (1 - p) / count + z**2 / (4 * count**2)) ** 0.5
    scale = 1 + z**2 / count
    return max(0.0, (centre - half) / scale), min(1.0, (centre + half) / scale)


def count_votes(files: Sequence[Path], key: Path) -> dict[str, Any]:
    """Plain JSON: `models`, each with its wins among all choices, `pairs` of them, in which whoever was chosen has beaten each other one of that
    row, `undecided` votes for no difference, `ballots`. Of several people, or of one prompt with several seeds, choices are not quite independent,
    and intervals somewhat too narrow.

    UserError for a file that cannot be read, is of another page or not of its rows, and where a person is counted twice.
    """
    known = _read_key(key)
    names, chosen = [model["name"] for model in known["models"]], Counter[int]()
    undecided, ballots = 0, dict[str, Path]()
    for file in files:
        votes = records.read(file, Votes)
        if votes["page"] != known["page"]:
            raise UserError(f"--count: {str(file)!r} holds votes on page {votes['page']!r}, and {str(key)!r} is the key of page {known['page']!r}")
        if (other := ballots.setdefault(votes["ballot"], file)) is not file:
            raise UserError(f"--count: {str(other)!r} and {str(file)!r} are of the same ballot; count its last file alone")
        found = _choices(file, votes["votes"], known["rows"])
        undecided += sum(index is None for index in found)
        chosen.update(index for index in found if index is not None)
    total = sum(chosen.values())
    return {
        "page": known["page"],
        "ballots": len(ballots),
        "undecided": undecided,
        "models": [{**model, **Share(chosen[i], total).record} for i, model in enumerate(known["models"])],
        "pairs": [{"a": names[i], "b": names[j], **Share(chosen[i], chosen[i] + chosen[j]).record} for i, j in combinations(range(len(names)), 2)],
    }


def _read_key(path: Path) -> dict[str, Any]:
    key = records.read(path, Key)
    count = len(key["models"])
    try:
        unsealed(key)
        if any(sorted(row["order"]) != list(range(count)) for row in key["rows"]):
            raise ValueError("a row's order is none of its models")
    except ValueError as error:
        raise UserError(f"--key: cannot read {str(path)!r}: {error}") from error
    return key


def _choices(file: Path, votes: Sequence[Mapping[str, Any]], rows: Sequence[Mapping[str, Any]]) -> list[int | None]:
    """Which model each vote is for, None for no difference."""
    found: dict[int, int | None] = {}
    for vote in votes:
        row = vote["row"]
        where = f"--count: {str(file)!r}: row {row}"
        if not 0 <= row < len(rows):
            raise UserError(f"{where} is none of the page's {len(rows)}")
        if row in found:
            raise UserError(f"{where} has two votes")
        if (vote["prompt"], vote["seed"]) != (rows[row]["prompt"], rows[row]["seed"]):
            raise UserError(f"{where} is of another prompt or seed than the page's")
        letters = LETTERS[: len(rows[row]["order"])]
        if vote["choice"] != NEITHER and (len(vote["choice"]) != 1 or vote["choice"] not in letters):
            raise UserError(f"{where}: the choice {records.shown(vote['choice'])} is none of {', '.join(letters)}, {NEITHER}")
        found[row] = None if vote["choice"] == NEITHER else rows[row]["order"][letters.index(vote["choice"])]
    return list(found.values())


def tally_table(tally: Mapping[str, Any]) -> str:
    """Lines for the terminal."""
    decided = sum(model["wins"] for model in tally["models"])
    ballots = tally["ballots"]
    head = f"{decided + tally['undecided']} votes on {ballots} ballot{'s' * (ballots != 1)}, {tally['undecided']} of them for no difference"
    ranked = sorted(tally["models"], key=lambda model: -model["wins"])
    detail = [" ".join(f"{model[key]} {key}" for key in ("steps",) if key in model) for model in ranked]
    lines = [["model", "", "best", "share, 95 %"]]
    lines += [[model["name"], told, str(model["wins"]), _share(model)] for model, told in zip(ranked, detail, strict=True)]
    pairs = [["a", "b", "a : b", "share of a, 95 %"]]
    pairs += [[pair["a"], pair["b"], f"{pair['wins']} : {pair['of'] - pair['wins']}", _share(pair)] for pair in tally["pairs"]]
    return "\n".join([head, "", *aligned(lines, left=(0, 1)), *(["", *aligned(pairs, left=(0, 1))] if len(tally["models"]) > 2 else [])])


def _share(record: Mapping[str, Any]) -> str:
    return Share(record["wins"], record["of"]).text()
