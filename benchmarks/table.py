"""The GPU tables of README and of the pages beside the code, from benchmarks/results/gpu.jsonl.

    python benchmarks/table.py            # print them
    python benchmarks/table.py --write    # put them between the markers of the pages, such as <!-- gpu:attention:begin -->

For each GPU the newest measurement of each case counts. Without lines a table reads "not yet measured".
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT)]

from benchmarks.measuring import rows  # noqa: E402
from benchmarks.measuring.case import Row  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "gpu.jsonl"
PAGES = (ROOT / "README.md", ROOT / "kernels" / "fastgen_kernels" / "jvp_attention" / "README.md", ROOT / "benchmarks" / "README.md")
NOTHING = "Not yet measured."


@dataclass(frozen=True)
class Column:
    """value: of a row and of the environment that it was measured in; None shows as a dash."""

    title: str
    value: Callable[[Row, Row], Any]
    format: str = ""

    def cell(self, row: Row, environment: Row) -> str:
        value = self.value(row, environment)
        return "–" if value is None else format(value, self.format)


def key(title: str, name: str, form: str = "", scale: float | None = None) -> Column:
    """A column of one key of the rows, times a scale."""
    return Column(title, lambda row, _: row.get(name) if scale is None or row.get(name) is None else scale * row[name], form)


@dataclass(frozen=True)
class Table:
    """One line a measured row. slices: whose rows; chosen: which of them."""

    slices: tuple[str, ...]
    columns: tuple[Column, ...]
    chosen: Callable[[Row], bool] = lambda row: True

    def concerns(self, row: Row) -> bool:
        """Whether a row of its slices belongs to it, also one that was not measured."""
        return row["status"] != "measured" or self.chosen(row)

    def lines(self, found: Sequence[Row], environment: Callable[[Row], Row]) -> list[str]:
        own = [row for row in found if row["status"] == "measured" and self.chosen(row)]
        return _lines([column.title for column in self.columns], [[column.cell(row, environment(row)) for column in self.columns] for row in own])


@dataclass(frozen=True)
class Pivot:
    """One line a `group`, one column each `contender`, one value in a cell."""

    slices: tuple[str, ...]
    group: Callable[[Row], str]
    contenders: tuple[tuple[str, str], ...]  # name in the rows, title
    value: Column
    chosen: Callable[[Row], bool] = lambda row: True

    def concerns(self, row: Row) -> bool:
        """Whether a row of its slices belongs to it; a whole case that was not measured does."""
        return "contender" not in row or (row["contender"] in dict(self.contenders) and self.chosen(row))

    def lines(self, found: Sequence[Row], environment: Callable[[Row], Row]) -> list[str]:
        own = [row for row in found if "contender" in row]
        cells = {(self.group(row), row["contender"]): self._cell(row, environment(row)) for row in own}
        groups = dict.fromkeys(self.group(row) for row in own if row["status"] == "measured")
        titles = [self.value.title, *(title for _, title in self.contenders)]
        return _lines(titles, [[group, *(cells.get((group, name), "–") for name, _ in self.contenders)] for group in groups])

    def _cell(self, row: Row, environment: Row) -> str:
        return {"measured": lambda: self.value.cell(row, environment), "failed": lambda: "wrong"}.get(row["status"], lambda: "–")()


def _lines(titles: Sequence[str], cells: Sequence[Sequence[str]]) -> list[str]:
    """A markdown table, numbers to the right; nothing where there are no cells."""
    if not cells:
        return []
    numeric = [all(re.fullmatch(r"[–−+\-×.,%e\d ]+|wrong", line[i]) for line in cells) for i in range(len(titles))]
    rule = ["---:" if right else "---" for right in numeric]
    return ["| " + " | ".join(line) + " |" for line in (titles, rule, *cells)]


def markdown(found: Sequence[Row]) -> str:
    """All tables, one below the other."""
    return "\n\n".join(f"**{name}**\n\n{render(name, found)}" for name in TABLES)


def render(name: str, found: Sequence[Row]) -> str:
    """One table, for each GPU that has rows of it, with what was left out and why."""
    table, known = TABLES[name], rows.environments(found)
    parts = []
    for gpu in dict.fromkeys(environment["gpu"] for environment in known.values()):
        latest = (row for row in rows.latest(found) if known[row["run"]]["gpu"] == gpu and row["slice"] in table.slices)
        own = [row for row in latest if table.concerns(row)]
        if lines := table.lines(own, lambda row: known[row["run"]]):
            runs = [known[run] for run in dict.fromkeys(row["run"] for row in own if row["status"] == "measured")]
            parts.append("\n".join([_where(runs), "", *lines, *_missing(own)]))
        elif own:
            parts.append("\n".join([f"*{gpu}*: {NOTHING.lower()}", *_missing(own)]))
    return "\n\n".join(parts) or NOTHING


def _where(environments: Sequence[Row]) -> str:
    """GPU, versions, ceilings and dates of the runs that a table is from."""
    first = environments[0]
    dates = sorted({environment["date"][:10] for environment in environments})
    versions = ", ".join(f"{what} {first[what]}" for what in ("driver", "torch", "triton", "diffusers") if first.get(what))
    copies, products = ([environment[name] for environment in environments] for name in ("copy_gb_per_s", "bf16_tflop_per_s"))
    ceilings = f"{_range(copies)} GB/s of copies and {_range(products)} TFLOP/s of bf16 products"
    rehearsal = " (rehearsal: says nothing about speed)" if first.get("rehearsal") else ""
    return f"*{first['gpu']}{rehearsal}; {versions}; ceilings {ceilings}; {' to '.join(dict.fromkeys((dates[0], dates[-1])))}*"


def _range(values: Sequence[float]) -> str:
    return " to ".join(dict.fromkeys(f"{value:.0f}" for value in (min(values), max(values))))


def _missing(own: Sequence[Row]) -> list[str]:
    """What was left out or failed, a line a reason."""
    reasons: dict[str, list[str]] = {}
    for row in own:
        if row["status"] != "measured":
            what = row.get("contender") or row["case"]
            reasons.setdefault(f"{row['status']}: {row['reason']}", []).append(what)
    said = [f"{', '.join(dict.fromkeys(names))} {reason}" for reason, names in reasons.items()]
    return ["", *(f"- {line.removeprefix('* ')}" for line in said)] if said else []


def _problem(row: Row) -> str:
    """Such as `4096 × 512, d 128, causal`."""
    problem = row["problem"]
    lengths = [problem["num_queries"], problem["num_keys"]]
    return f"{' × '.join(map(str, lengths))}, d {problem['head_size']}{', causal' * problem['causal']}"


def _headline(row: Row) -> bool:
    """Full attention and text attention of the common head sizes, up to 16k tokens."""
    problem = row["problem"]
    return problem["head_size"] in (64, 128) and not problem["causal"] and 4096 <= problem["num_queries"] <= 16384


FORWARD = (
    ("flash_forward", "flash"), ("cudnn_forward", "cuDNN"), ("fa3_forward", "FA3"), ("flex_forward", "flex"), ("fastgen_forward", "ours, forward"),
    ("fastgen_jvp", "**ours, tangent**"), ("jvp_flash_attention", "jvp-flash-attention"), ("jvp_flash_attention_fork", "its fork"),
    ("math_jvp", "math"),
)  # fmt: skip
BACKWARD = (
    ("flash_backward", "flash"), ("cudnn_backward", "cuDNN"), ("fa3_backward", "FA3"), ("fastgen_backward", "ours"),
    ("fastgen_jvp_backward", "ours with tangent"),
)  # fmt: skip
RATIO = tuple((name, title) for name, title in FORWARD if name != "flash_forward")
SPEED = key("TFLOP/s", "tflop_per_s", ".0f")
STEP = (
    Column("network, method", lambda row, _: f"{row['network']}, {row['method']}" if row["network"] != "digits" else row["recipe"]),
    key("tuned", "tuning"),
    key("batch", "batch_size"),
    key("ms", "median_ms", ".0f"),
    key("± ms", "iqr_ms", ".0f"),
    key("over its passes", "ratio", ".2f"),
    key("over passes, optimizers, averages", "ratio_all", ".2f"),
    Column("of the ceiling", lambda row, here: row["tflop_per_s"] / here["bf16_tflop_per_s"], ".0%"),
    Column("gaps", lambda row, _: None if row["busy_share"] is None else 1 - row["busy_share"], ".0%"),
    key("peak GB", "peak_bytes", ".1f", 1e-9),
)
DRAWING = (
    Column("network", lambda row, _: f"{row['network']}, {row['model']}"),
    key("steps", "steps"),
    key("guidance", "guidance", "g"),
    key("batch", "batch"),
    Column("compiled", lambda row, _: row["compiled"].partition(",")[0]),
    key("ms", "median_ms", ".1f"),
    key("± ms", "iqr_ms", ".1f"),
    key("images/s", "images_per_s", ".1f"),
    key("times faster", "speedup", ".1f"),
    key("peak GB", "peak_bytes", ".1f", 1e-9),
)
BESIDE_STOCK = (
    Column("network", lambda row, _: f"{row['network']}, {row['model']}"),
    key("steps", "steps"),
    key("ms", "median_ms", ".1f"),
    key("stock, ms", "stock_median_ms", ".1f"),
    key("ours over stock", "ratio", ".2f"),
    key("difference of the pictures", "difference", ".0e"),
)
TRAINING = (
    key("recipe", "recipe"),
    key("seconds", "seconds", ".0f"),
    Column("on two CPU cores", lambda row, _: f"{row['training_seconds_cpu_mean']:.0f}"),
    key("samples/s", "samples_per_s", ".0f"),
    key("FD-digits", "fd_digits", ".2f"),
    Column("on a CPU", lambda row, _: f"{row['fd_cpu_mean']:.2f} ± {row['fd_cpu_std']:.2f}"),
    key("prompt accuracy", "prompt_accuracy", ".3f"),
    key("verified to", "verify_picture_error", ".0e"),
)
AGAIN = (
    key("recipe", "recipe"),
    key("steps", "steps"),
    key("algorithms", "algorithms"),
    key("unequal tensors", "unequal_tensors"),
    key("of", "tensors"),
    key("largest difference", "largest_difference", ".0e"),
)
TABLES: dict[str, Table | Pivot] = {
    "attention": Pivot(("attention",), _problem, RATIO, key("time over flash forward", "ratio", ".2f"), _headline),
    "attention_speed": Pivot(("attention",), _problem, FORWARD, SPEED),
    "attention_backward": Pivot(("attention",), _problem, BACKWARD, SPEED),
    "attention_memory": Pivot(("attention",), _problem, FORWARD, key("MB beyond the inputs", "peak_bytes", ".0f", 1e-6)),
    "train_step": Table(("train_step",), STEP),
    "real_sizes": Table(("real_sizes",), STEP),
    "sampling": Table(("sampling",), DRAWING, lambda row: "speedup" in row),
    "sampling_stock": Table(("sampling",), BESIDE_STOCK, lambda row: "stock_median_ms" in row),
    "training": Table(("training",), TRAINING, lambda row: "seconds" in row),
    "same_again": Table(("training",), AGAIN, lambda row: "algorithms" in row),
    "tests": Table(("tests",), (key("tests", "case"), key("passed", "passed"), key("failed", "failed"), key("seconds", "seconds", ".0f"))),
}


def between(text: str, name: str, content: str) -> str:
    """A page with what stands between one pair of its markers replaced. SystemExit where it has no such pair."""
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(end) < text.index(begin):
        raise SystemExit(f"the page has no pair of markers {begin} … {end}")
    return f"{text.partition(begin)[0]}{begin}\n{content}\n{end}{text.partition(end)[2]}"


def filled(page: str, found: Sequence[Row]) -> str:
    """A page with every GPU table that it has markers for."""
    for name in re.findall(r"<!-- gpu:(\w+):begin -->", page):
        page = between(page, f"gpu:{name}", render(name, found))
    return page


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="put the tables into the pages")
    parser.add_argument("--lines", type=Path, default=RESULTS, help="the file of result lines")
    chosen = parser.parse_args()
    found = rows.read(chosen.lines)
    print(markdown(found))
    for page in PAGES if chosen.write else ():
        page.write_text(filled(page.read_text(encoding="utf-8"), found), encoding="utf-8")


if __name__ == "__main__":
    main()
