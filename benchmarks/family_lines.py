"""How many lines of its own a family takes: README's table.

    python benchmarks/family_lines.py

Lines with code on them: no blank lines, comments or docstrings. What several families share stands in rooms of the base.
"""

from __future__ import annotations

import ast
import io
import statistics
import tokenize
from pathlib import Path

from fastgen import families
from fastgen.families.pipelined import Pipelined

FOLDER = Path(families.__file__).parent
# The rooms that pipelines are built on; `base` is the interface, the rest reads foreign folders with care.
ROOMS = {
    "pipelined": "what every pipeline has in common",
    "codec": "pixels to latents and back",
    "source": "where components come from",
    "packing": "latents packed into tokens",
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
    """Markdown: families by size, then the rooms of the base."""
    own = {name: code_lines(path) for name, path in family_files().items()}
    rows = [
        f"| {', '.join(families.family_class(name).pipeline_classes)} | `{name}.py` | {own[name]} |"
        for name in sorted(own, key=lambda name: own[name])
    ]
    base = [f"| *base: {ROOMS[name]}* | `{name}.py` | {count} |" for name, count in rooms().items()]
    median = f"| **median of {len(own)} families** | | **{statistics.median(own.values()):g}** |"
    return "\n".join(["| pipeline | file | code lines |", "| --- | --- | ---: |", *rows, median, *base])


if __name__ == "__main__":
    print(table())
