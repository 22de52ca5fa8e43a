"""Whether two results files measure the same thing in the same way: only then does a difference say anything about the models."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from fastgen.errors import shown

_MOST = 6  # differences on one line
_HASH = 8  # characters of a hash that tell it from another
_OF_NO_PICTURE = dict.fromkeys(("source", "revision", "stores", "device"))  # of a model's record: what it is called, and where it was drawn


def unlike(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
    """What two files' measurements differ in, each as `what: of a / of b`: protocol, prompts, conventions, extractors, reference, a quick look.

    What one of them does not record, as files of before there were protocol files do not, is not compared, but for the protocol's hash. Teachers
    are another matter (`other_teachers`): most rows do not depend on them.
    """
    first, second = a["provenance"], b["provenance"]
    found = [("protocol", a["protocol"], b["protocol"]), ("protocol hash", _hash(first), _hash(second))]
    found.append(("pictures of each set", _looked_at(a), _looked_at(b)))
    for key, name in (("conventions", ""), ("prompt_sets", "prompts "), ("extractors", "extractor ")):
        found += [(f"{name}{path}", *values) for path, values in _common(first.get(key), second.get(key))]
    references = dict(_common(first.get("reference"), second.get("reference")))
    found += [("reference", *references["sha256"])] if "sha256" in references else []
    found += _both("classifier", first.get("classifier_hash"), second.get("classifier_hash"))
    return _differing(found)


def other_counts(a: Mapping[str, Mapping[str, Any]], b: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Rows by name that are of other numbers of pictures, as `unlike` tells it."""
    counts = {name: (a[name]["n"], b[name]["n"]) for name in a if name in b and "n" in a[name] and "n" in b[name]}
    return [f"pictures of {name}: {one:,} / {other:,}" for name, (one, other) in counts.items() if one != other]


def other_teachers(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
    """In what two teachers' records in `provenance.models` differ: content, steps, guidance and all else that their pictures depend on, but for
    the device."""
    return _differing((f"teacher's {path}", *values) for path, values in _common(*({**each, **_OF_NO_PICTURE} for each in (a, b))))


def other_circumstances(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
    """Versions, devices and batch sizes in which two files differ, which change rounding, and seconds and bytes most of all."""
    first, second = a["provenance"], b["provenance"]
    versions = [(name, *values) for name, values in _common(first.get("versions"), second.get("versions"))]
    others = [_both(name.replace("_", " "), first.get(name), second.get(name)) for name in ("device", "batch_size")]
    return _differing([*versions, *(each for both in others for each in both)])


def joined(differences: list[str]) -> str:
    """On one line that somebody reads."""
    more = len(differences) - _MOST
    return "; ".join(differences[:_MOST]) + (f"; and {more} more" if more > 0 else "")


def _differing(found: Iterable[tuple[str, Any, Any]]) -> list[str]:
    return [f"{what}: {_told(one)} / {_told(other)}" for what, one, other in found if one != other]


def _hash(provenance: Mapping[str, Any]) -> str:
    value = provenance.get("protocol_hash")
    return value if isinstance(value, str) else "not recorded"


def _both(what: str, one: Any, other: Any) -> list[tuple[str, Any, Any]]:
    return [] if one is None or other is None else [(what, one, other)]


def _looked_at(results: Mapping[str, Any]) -> str:
    partial = results.get("partial")
    return f"the first {partial['stop_after']:,}" if partial else "all"


def _common(a: Any, b: Any) -> Iterator[tuple[str, tuple[Any, Any]]]:
    """Dotted keys that both records have, with both values; none where one is no record."""
    if isinstance(a, dict) and isinstance(b, dict):
        for key in a:
            if key in b:
                below = list(_common(a[key], b[key])) if isinstance(a[key], dict) and isinstance(b[key], dict) else [("", (a[key], b[key]))]
                yield from ((f"{key}.{path}" if path else str(key), values) for path, values in below)


def _told(value: Any) -> str:
    if isinstance(value, str):
        is_hash = len(value) == 64 and all(letter in "0123456789abcdef" for letter in value)
        return value[:_HASH] if is_hash else value if len(value) <= 40 else f"{value[:39]}…"
    return "none" if value is None else shown(value, 40)
