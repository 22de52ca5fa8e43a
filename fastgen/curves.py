"""Training curves as inline SVG that takes the page's own ink, in light and in dark."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Rows = Sequence[Mapping[str, Any]]  # lines of metrics.jsonl
Line = tuple[list[int], list[float]]  # steps, values

COLOURS = ("#3b82c4", "#d9742b", "#2f9e77", "#c2508f", "#8a6fd1", "#b5952a", "#4aa5b8", "#9a6a4f")
INK = "#7f7f7e"  # text and axes, replaced by the page's own colour
_NOT_CURVES = ("step", "seconds", "straightness/teacher", "straightness/student")  # which the last row alone has


class Panel(NamedTuple):
    """How a group of scalars is shown: `title` above its curves, `caption` below."""

    title: str
    caption: str = ""


# In the order of a run's page; other groups come before the speed, under their own names. The captions are of distribution matching, the
# one family that logs these groups.
PANELS = {
    "loss": Panel("losses"),
    "drift": Panel(
        "drift from the teacher: differences",
        "Pictures of the averaged student minus the teacher's of the same noise and prompts; 0 is perfect. mean: brightness. mean_error: what "
        "chance explains of it. "
        "saturation: share of black and white pixels.",
    ),
    "drift_ratio": Panel(
        "drift from the teacher: ratios",
        "The same pictures, student over teacher; 1 is perfect. std: contrast. spread: distance between pictures of one prompt; where it "
        "falls they become too alike.",
    ),
    "match": Panel(
        "distribution matching",
        "gradient: mean size of what the student follows, which falls as its distribution nears the teacher's; swings together with a rising "
        "critic loss mean that the critic lags. gap: distance of the real and the fake score's predictions. normaliser: what it is divided by.",
    ),
    "sample": Panel(
        "the student's samples while training",
        "Mean and standard deviation of all latent values; swings are those of brightness and contrast.",
    ),
    "critic": Panel(
        "critic loss by noise level",
        "The fake score's denoising loss in each quarter of the noise range. More varied samples are harder to denoise, so a slow rise is "
        "healthy; a jump without a new phase means that the critic does not follow the student.",
    ),
    "discriminate": Panel(
        "discriminator",
        "Mean logits of real data and of the student's samples. They should stay near each other; far apart, the student learns little from them.",
    ),
    "experts": Panel(
        "experts",
        "balance: the balance loss before its weight, 1 where even. entropy: of a token's probabilities over that of a router without opinion; "
        "near 0 tokens have made up their minds. idle: share of experts that no token of the batch chose. dropped: share of tokens without a "
        "routed expert. blocks_: the same of blocks in groups, which samples choose.",
    ),
    "expert_load": Panel(
        "busiest expert, by noise level",
        "The largest load of any expert over an even one, of all samples and of those in each quarter of the noise range; 1 is even.",
    ),
    "expert_entropy": Panel(
        "routers' entropy, by noise level",
        "Of a token's probabilities over that of a router without opinion, in each quarter of the noise range.",
    ),
    "grad_norm": Panel("gradient norms"),
    "lr": Panel("learning rates"),
}
_QUARTERS = ("nearest data", "second quarter", "third quarter", "nearest noise")
_LAST = "samples_per_second"
# Scalars that are shown in another group than the one they are logged in, or under another name, in the order of their legends.
_PLACES = {
    "drift/std": ("drift_ratio", "std"),
    "drift/spread": ("drift_ratio", "spread"),
    "match/gan": ("loss", "gan"),
    "match/sample_mean": ("sample", "mean"),
    "match/sample_std": ("sample", "std"),
    **{f"critic/loss_t{i}": ("critic", quarter) for i, quarter in enumerate(_QUARTERS)},
    "experts/student/busiest": ("expert_load", "all"),
    **{f"experts/student/busiest_t{i}": ("expert_load", quarter) for i, quarter in enumerate(_QUARTERS)},
    **{f"experts/student/entropy_t{i}": ("expert_entropy", quarter) for i, quarter in enumerate(_QUARTERS)},
    **{f"experts/student/dropped_t{i}": ("experts", f"dropped, {quarter}") for i, quarter in enumerate(_QUARTERS)},
}


def _lines(rows: Rows) -> dict[str, Line]:
    """Every logged scalar that is a curve over steps."""
    lines: dict[str, Line] = {}
    for row in rows:
        for name, value in row.items():
            if name not in _NOT_CURVES and isinstance(value, int | float) and not isinstance(value, bool):
                steps, values = lines.setdefault(name, ([], []))
                steps.append(row["step"])
                values.append(value)
    return lines


def by_group(rows: Rows) -> dict[str, dict[str, Line]]:
    """One panel for each group of scalars."""
    panels: dict[str, dict[str, Line]] = {}
    lines, listed = _lines(rows), list(_PLACES)
    for name in sorted(lines, key=lambda name: listed.index(name) if name in listed else -1):
        group, _, rest = name.partition("/")
        place, label = _PLACES.get(name, (group, rest or name))
        panels.setdefault(place, {})[label] = lines[name]
    return _ordered(panels)


def by_scalar(runs: Mapping[str, Rows]) -> dict[str, dict[str, Line]]:
    """One panel for each scalar, in it one line for each run that logged it."""
    panels: dict[str, dict[str, Line]] = {}
    for name, rows in runs.items():
        for scalar, line in _lines(rows).items():
            panels.setdefault(scalar, {})[name] = line
    return _ordered(panels)


def _ordered(panels: Mapping[str, dict[str, Line]]) -> dict[str, dict[str, Line]]:
    """In the order of PANELS, then what else there is, speed last."""
    known = list(PANELS)

    def place(name: str) -> tuple[bool, int]:
        group = name.partition("/")[0]
        return group == _LAST, known.index(group) if group in known else len(known)

    return {name: panels[name] for name in sorted(panels, key=place)}


def panels(groups: Mapping[str, Mapping[str, Line]], runs: Sequence[str] = ()) -> list[tuple[str, str]]:
    """Inline SVG and caption of each panel. runs: where lines are runs, all of them, so that each has its colour on the whole page."""
    colours = {run: COLOURS[i % len(COLOURS)] for i, run in enumerate(runs)}
    pictures = drawn({name: partial(_draw, name=name, lines=lines, colours=colours) for name, lines in groups.items()})
    return [(picture, PANELS[name].caption if name in PANELS else "") for name, picture in zip(groups, pictures, strict=True)]


def drawn(panels: Mapping[str, Callable[[Axes], None]]) -> list[str]:
    """Inline SVG of each panel, given by its name for whoever cannot see it and what draws into its axes."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    style: Any = {"svg.fonttype": "none", "svg.hashsalt": "fastgen", "text.parse_math": False, "font.size": 9}
    spines: Any = {"axes.spines.top": False, "axes.spines.right": False}
    fills: Any = dict.fromkeys(("figure.facecolor", "axes.facecolor"), "none")
    inks: Any = dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "axes.titlecolor", "xtick.color", "ytick.color"), INK)
    pictures = []
    with rc_context({**style, **spines, **fills, **inks}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # the browser draws the text, with fonts of its own
        for name, draw in panels.items():
            figure = Figure(figsize=(4.6, 2.9), layout="constrained")
            draw(figure.add_subplot())
            file = io.StringIO()
            FigureCanvasSVG(figure).print_svg(file, metadata={"Date": None})
            pictures.append(_inline(file.getvalue(), name))
    return pictures


def _draw(axes: Axes, name: str, lines: Mapping[str, Line], colours: Mapping[str, str]) -> None:
    """One panel: each line as logged (faint) and smoothed; learning rates and short runs are not smoothed."""
    for i, (name_of_line, (steps, values)) in enumerate(lines.items()):
        label = in_legend(name_of_line)
        colour = colours.get(name_of_line, COLOURS[i % len(COLOURS)])
        smooth = name.partition("/")[0] != "lr" and len(values) >= 30
        marker = "o" if len(values) == 1 else ""
        axes.plot(
            *_envelope(steps, values),
            color=colour,
            alpha=0.3 if smooth else 1.0,
            linewidth=0.7 if smooth else 1.4,
            marker=marker,
            label="" if smooth else label,
        )
        if smooth:
            axes.plot(*_thinned(steps, _smoothed(values)), color=colour, linewidth=1.5, label=label)
    if wide_range([value for _, values in lines.values() for value in values]):
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("")
    axes.set_title(PANELS[name].title if name in PANELS else name.replace("_", " "), loc="left", fontsize=10)
    axes.set_xlabel("step")
    axes.grid(alpha=0.15, color=INK)
    if list(lines) != [name]:
        axes.legend(frameon=False, fontsize=8, ncols=1 + len(lines) // 6)


def in_legend(name: str) -> str:
    """What leaves room for the curves; a legend leaves out what begins with an underscore."""
    short = name if len(name) <= 48 else f"{name[:38]}…{name[-8:]}"
    return f" {short}" if short.startswith("_") else short


def _smoothed(values: Sequence[float]) -> list[float]:
    """Exponential moving average over a 25th of the run, started without bias; values that are not finite are passed over."""
    decay, total, weight, averages = 1 - min(1.0, 25 / len(values)), 0.0, 0.0, []
    for value in values:
        if abs(value) < float("inf"):
            total, weight = decay * total + (1 - decay) * value, decay * weight + 1 - decay
        averages.append(total / weight if weight else float("nan"))
    return averages


def _envelope(steps: Sequence[int], values: Sequence[float], bins: int = 400) -> Line:
    """A long line as the smallest and largest value of each of `bins` stretches, so that no spike is lost; a short one as it is."""
    if len(values) <= 2 * bins:
        return list(steps), list(values)
    xs, ys = [], []
    for i in range(bins):
        start, stop = i * len(values) // bins, (i + 1) * len(values) // bins
        xs += [steps[start], steps[stop - 1]]
        ys += [min(values[start:stop]), max(values[start:stop])]
    return xs, ys


def _thinned(steps: Sequence[int], values: Sequence[float], most: int = 400) -> Line:
    stride = -(-len(values) // most)
    return list(steps[::stride]), list(values[::stride])


def wide_range(values: Sequence[float]) -> bool:
    """Whether values are better read on a logarithmic axis: all positive, the largest percentile 50 times the smallest."""
    finite = sorted(value for value in values if abs(value) < float("inf"))
    return bool(finite) and finite[0] > 0 and finite[len(finite) * 99 // 100] > 50 * finite[len(finite) // 100]


def _inline(svg: str, title: str) -> str:
    """An SVG document as an element of an HTML page: no prologue, no namespaces (HTML has its own), no ids that repeat, the page's ink."""
    body = svg[svg.index("<svg") :]
    body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
    body = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", body)
    body = re.sub(r'\sid="[\w.]+_\d+"', "", body)
    body = re.sub(r'(<svg[^>]*?)\swidth="[^"]*"', r"\1", body, count=1)
    body = re.sub(r'(<svg[^>]*?)\sheight="[^"]*"', r"\1", body, count=1)
    return body.replace("<svg", f'<svg role="img" aria-label="{_escaped(title)}"', 1).replace(INK, "currentColor")


def _escaped(text: str) -> str:
    from markupsafe import escape

    return str(escape(text))
