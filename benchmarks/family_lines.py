"""What works with which family, and how many lines of its own a family takes: README's table.

    python benchmarks/family_lines.py            # print it
    python benchmarks/family_lines.py --write    # put it into README.md

Lines with code on them: no blank lines, comments or docstrings. What several families share stands in rooms of the base. Every cell of a method is
a test (tests/families/test_matrix.py), with full weights and with adapters.
"""

from __future__ import annotations

import argparse
import ast
import io
import statistics
import tokenize
from pathlib import Path

from benchmarks.table import between
from fastgen import families
from fastgen.families.pipelined import Pipelined

README = Path(__file__).parents[1] / "README.md"
METHODS = ("dmd2", "scm", "lcm", "tbcm")
REFUSED = {("wan", "lcm"): "it trains on pictures or videos, and fastgen reads no videos yet"}
FOLDER = Path(families.__file__).parent
# The rooms that pipelines are built on; `base` is the interface, the rest reads foreign folders with care.
ROOMS = {
    "pipelined": "what every pipeline has in common",
    "sizing": "which sizes it draws",
    "codec": "pixels to latents and back",
    "source": "where components come from",
    "packing": "latents packed into tokens",
    "one_stream": "text and picture in one stream of tokens",
    "discrete": "paths of discrete steps",
    "unet": "UNets",
}
_NO_CODE = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER, tokenize.ENCODING}


def code_lines(path: Path) -> int:
    """Lines of a Python file on which a token of code stands, docstrings left out."""
    source = path.read_text(encoding="utf-8")
    docstrings: set[int] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)) and ast.get_docstring(node, clean=False) is not None:
            first = node.body[0]
            docstrings |= set(range(first.lineno, (first.end_lineno or first.lineno) + 1))
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in _NO_CODE:
            lines |= set(range(token.start[0], token.end[0] + 1))
    return len(lines - docstrings)


def family_files() -> dict[str, Path]:
    """Families on the shared base, by name."""
    names = [name for name in families.family_names() if issubclass(families.family_class(name), Pipelined)]
    return {name: FOLDER / f"{name}.py" for name in names}


def rooms() -> dict[str, int]:
    return {name: code_lines(FOLDER / f"{name}.py") for name in ROOMS if (FOLDER / f"{name}.py").is_file()}


def table() -> str:
    """Markdown: a line a family, the smallest first."""
    own = {name: code_lines(path) for name, path in family_files().items()}
    titles = ["pipeline", "file", "code lines", *METHODS, "LoRA file", "explicit times", "samplers"]
    rows = [titles, ["---", "---", "---:", *["---"] * (len(titles) - 3)]]
    for name in sorted(own, key=lambda name: own[name]):
        family = families.family_class(name)
        assert issubclass(family, Pipelined)
        methods = ["–" if (name, method) in REFUSED else "yes" for method in METHODS]
        times = "–" if family.grid_argument is None else f"`{family.grid_argument}`"
        features = ["yes" if family.loads_lora else "–", times, ", ".join(family.samplers)]
        rows.append([", ".join(family.pipeline_classes), f"`{name}.py`", str(own[name]), *methods, *features])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def summary() -> str:
    """The median family, the rooms of the base, and why cells are empty."""
    own = [code_lines(path) for path in family_files().values()]
    base = ", ".join(f"`{name}.py` {count} ({ROOMS[name]})" for name, count in rooms().items())
    why = "; ".join(f"{method} on `{name}.py`: {reason}" for (name, method), reason in REFUSED.items())
    return f"Median of {len(own)} families: {statistics.median(own):g} lines of code. Beneath them: {base}. Refused: {why}."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="put it into README.md")
    chosen = parser.parse_args()
    text = f"{table()}\n\n{summary()}"
    print(text)
    if chosen.write:
        README.write_text(between(README.read_text(encoding="utf-8"), "families", text), encoding="utf-8")


if __name__ == "__main__":
    main()
