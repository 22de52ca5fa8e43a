"""JSON that anybody may have written, read within limits: what is too large, too deep or of another shape than its schema is one line.

`json.loads` alone takes numbers beyond float, halves of surrogate pairs that nothing can print, and nestings at which the next recursion
ends in a RecursionError. Numbers that are not finite are JSON to Python and to other libraries, so a schema decides about them.
"""

from __future__ import annotations

import json
import re
import sys
from functools import lru_cache
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from fastgen.files import reading

LARGEST = 2**26  # bytes of a file; the largest that are known, the indices of large models' weights, have a few hundred kilobytes
DEEPEST = 64


class Schema(BaseModel):
    """What is needed of a record; it may hold more. Types are JSON's own: no text passes for a number, and no number for a truth value."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)


def parse(text: str | bytes, schema: Any = Any) -> Any:
    """The content of JSON text; ValueError, of one line that names the key, where it is none within the limits or is not as `schema`,
    a Schema or another annotation, says."""
    try:
        content = json.loads(text)
    except RecursionError as error:
        raise ValueError(f"nested more than {DEEPEST} deep") from error
    except UnicodeDecodeError as error:
        raise ValueError("not UTF-8 text") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"not valid JSON ({error})") from error
    _check_limits(content)
    return content if schema is Any else checked(content, schema)


def checked(content: Any, schema: Any) -> Any:
    """The content itself, where it is as `schema` says; ValueError naming the key where it is not."""
    try:
        _adapter(schema).validate_python(content)
    except ValidationError as error:
        raise ValueError(explained(error)) from error
    return content


def explained(error: ValidationError) -> str:
    """The first mistake: its key, what is needed there and what was given."""
    first = error.errors(include_url=False)[0]
    key = ".".join(map(str, first["loc"]))
    if first["type"] == "missing":
        return f"key {key}: missing"
    what = first["msg"].removeprefix("Value error, ")
    for theirs, ours in _WORDS.items():
        what = re.sub(f"^Input should be (a |an )?(valid )?{theirs}\\b.*", f"must be {ours}", what)
    what = what.replace("Input should be", "must be")
    given = "" if first["type"] == "value_error" else f", not {shown(first['input'])}"
    return f"{key and f'key {key}: '}{what}{given}"


_WORDS = {
    "(dictionary|mapping|object)": "a JSON object",
    "string": "a text",
    "(list|array|tuple)": "a list",
    "integer": "a whole number",
    "number": "a number",
    "boolean": "true or false",
}


def read(path: Path, schema: Any = dict[str, Any]) -> Any:
    """`parse` of a file; UserError where that cannot be done."""
    with reading(path):
        with path.open("rb") as file:
            data = file.read(LARGEST + 1)
        if len(data) > LARGEST:
            raise ValueError(f"larger than {LARGEST // 2**20} MiB, which no such file is")
        return parse(data, schema)


def shown(value: Any) -> str:
    """A value as it stands in a message."""
    text = json.dumps(value, default=repr)
    return text if len(text) <= 60 else f"{text[:60]}…"


@lru_cache
def _adapter(schema: Any) -> TypeAdapter[Any]:
    return TypeAdapter(schema, config=None if isinstance(schema, type) and issubclass(schema, BaseModel) else ConfigDict(strict=True))


def _check_limits(content: Any) -> None:
    """ValueError for what is nested too deep, an integer beyond float, and text that is none."""
    level: list[tuple[str, Any]] = [("", content)]
    for _ in range(DEEPEST + 1):
        below: list[tuple[str, Any]] = []
        for key, node in level:
            if isinstance(node, dict):
                for name in node:
                    _check_text(key, name)
                below += [(f"{key}.{name}" if key else name, item) for name, item in node.items()]
            elif isinstance(node, list):
                below += [(f"{key}.{index}", item) for index, item in enumerate(node)]
            elif isinstance(node, str):
                _check_text(key, node)
            elif isinstance(node, int) and abs(node) > sys.float_info.max:
                raise ValueError(f"key {key}: a number too large to count with")
        if not below:
            return
        level = below
    raise ValueError(f"nested more than {DEEPEST} deep")


def _check_text(key: str, text: str) -> None:
    if not text.isascii() and any("\ud800" <= letter <= "\udfff" for letter in text):
        raise ValueError(f"key {key}: half of a surrogate pair, which is no text")
