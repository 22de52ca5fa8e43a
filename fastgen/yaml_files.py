"""YAML as far as recipes need it: text, numbers, booleans, null, lists and mappings with text for keys, of the size of a page.

YAML itself promises more than a reader can keep: aliases that multiply, tags that build objects, numbers of any length. What is larger
than a page, or no such thing, is a UserError with its line, before it takes time or memory.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import yaml
from yaml.composer import ComposerError
from yaml.constructor import ConstructorError
from yaml.reader import ReaderError

from fastgen.errors import UserError, shown

MOST_BYTES = 2**18
MOST_DEPTH = 24  # a recipe has 5
MOST_VALUES = 20_000  # keys and values, each as often as an alias repeats it
_MOST_BITS = 1024  # of a whole number: as a float
_TAGS = {f"tag:yaml.org,2002:{name}" for name in ("null", "bool", "int", "float", "str", "seq", "map")}
_STAMP = "tag:yaml.org,2002:timestamp"


class _Loader(yaml.SafeLoader):
    """SafeLoader that refuses a key given twice (YAML would silently take the last), keys and values of other kinds, and what is too large."""

    yaml_constructors: ClassVar[Any] = {tag: make for tag, make in yaml.SafeLoader.yaml_constructors.items() if tag is None or tag in _TAGS}
    # A date is read as its text.
    yaml_implicit_resolvers: ClassVar[Any] = {
        first: [(tag, pattern) for tag, pattern in found if tag != _STAMP] for first, found in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    depth = count = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        self.depth, self.count = self.depth + 1, self.count + 1
        if self.depth > MOST_DEPTH or self.count > MOST_VALUES:
            raise _too_large(self.peek_event().start_mark)  # type: ignore[reportOptionalMemberAccess]
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def get_single_node(self) -> Any:
        node = super().get_single_node()
        if node is not None:
            for number, (below, depth) in enumerate(_expanded(node)):
                if number >= MOST_VALUES or depth > MOST_DEPTH:
                    raise _too_large(below.start_mark)
        return node

    def construct_object(self, node: Any, deep: bool = False) -> Any:
        try:
            value = super().construct_object(node, deep)
        except yaml.YAMLError:
            raise
        except Exception as error:  # whatever PyYAML meets in `!!float x`, `!!bool x`, `!!int ""` or a number of 5000 digits
            raise ConstructorError(None, None, f"{shown(node.value)} is no {_kind(node)}", node.start_mark) from error
        if isinstance(value, int) and value.bit_length() > _MOST_BITS:
            raise ConstructorError(None, None, f"{shown(node.value)} is too large a number", node.start_mark)
        return value

    def construct_scalar(self, node: Any) -> Any:
        value = super().construct_scalar(node)
        if isinstance(value, str):
            try:
                value = value.encode("utf-16", "surrogatepass").decode("utf-16")  # JSON writes large characters as two escapes
            except UnicodeDecodeError as error:
                what = f"{shown(value)} holds half of a character (a lone surrogate)"
                raise ConstructorError(None, None, what, node.start_mark) from error
            if "\0" in value:
                raise ConstructorError(None, None, f"{shown(value)} holds a NUL character", node.start_mark)
        return value

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                raise ConstructorError(None, None, f"key {shown(key)} is not text; put it in quotes", key_node.start_mark)
            if key in seen:
                raise ConstructorError(None, None, f"key {shown(key)} is given twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


def _kind(node: yaml.Node) -> str:
    return node.tag.rsplit(":", 1)[-1]


def _too_large(mark: yaml.Mark) -> yaml.YAMLError:
    what = f"more than {MOST_VALUES} values, or more than {MOST_DEPTH} of them within each other, aliases counted as what they stand for"
    return ComposerError(None, None, what, mark)


def _expanded(node: yaml.Node, depth: int = 1) -> Iterator[tuple[yaml.Node, int]]:
    """A node and all below it with their depths, each as often as an alias repeats it; without end where an alias names what it is in."""
    yield node, depth
    if isinstance(node, yaml.SequenceNode):
        for below in node.value:
            yield from _expanded(below, depth + 1)
    elif isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            yield from _expanded(key, depth + 1)
            yield from _expanded(value, depth + 1)


def parse(text: str) -> Any:
    """The one value that a YAML text holds, no part of it shared with another. ValueError, in one line, where there is something else."""
    loader = None
    try:
        loader = _Loader(text)
        return _unshared(loader.get_single_data())
    except yaml.MarkedYAMLError as error:
        raise ValueError(_with_line(error)) from error
    except ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise ValueError(f"line {line} holds the control character {chr(int(error.character))!a}") from error  # type: ignore[reportArgumentType]
    except (ValueError, OverflowError) as error:  # PyYAML's scanner, of an escape beyond Unicode
        line = "" if loader is None else f"line {loader.line + 1}: "
        raise ValueError(line + " ".join(str(error).split())) from error
    finally:
        if loader is not None:
            loader.dispose()


def _with_line(error: yaml.MarkedYAMLError) -> str:
    mark = error.problem_mark or error.context_mark
    where = "" if mark is None else f"line {mark.line + 1}, column {mark.column + 1}: "
    return where + " ".join(f"{error.problem or ''} {error.context or ''}".split())


def _unshared(value: Any) -> Any:
    """A copy in which two aliases are two values, so that an override changes one of them."""
    if isinstance(value, dict):
        return {key: _unshared(below) for key, below in value.items()}
    return [_unshared(below) for below in value] if isinstance(value, list) else value


def read_yaml(path: Path, what: str = "recipe", blocks: str = "teacher and student") -> dict[str, Any]:
    """The mapping in a YAML file; UserError with the line of a mistake. what: what it should be, with blocks such as these."""
    try:
        data = parse(read_text(path, what))
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"{shown(str(path))} is not valid YAML: {error}") from error
    if not isinstance(data, dict):
        raise UserError(f"{shown(str(path))} is not a {what}: a mapping of blocks, such as {blocks}, is needed")
    return data


def read_text(path: Path, what: str = "recipe") -> str:
    """A recipe, or `what` else, as it was written, comments included, UTF-8 or, with a mark, UTF-16; UserError when it is not text, or no page."""
    named = shown(str(path))
    if not path.is_file():  # opening a FIFO would wait for whoever writes into it
        raise UserError(f"{named} is {'a folder' if path.is_dir() else 'a device or a pipe' if path.exists() else 'not there'}; a file is needed")
    with path.open("rb") as file:
        content = file.read(MOST_BYTES + 1)
    if len(content) > MOST_BYTES:
        raise UserError(f"{named} is not a {what}: it is larger than {MOST_BYTES // 1024} KiB")
    marked = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        text = content.decode("utf-16" if marked else "utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{named} is not valid YAML: it is not UTF-8 text, nor UTF-16 with a mark") from error
    return text.replace("\r\n", "\n")
