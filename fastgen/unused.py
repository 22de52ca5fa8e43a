"""Keys of a block that have no effect under another key's value.

A block says which in `used_with`: {key: (other key, the values of it with which the key counts, or what tells them)}. Such a key is refused where it
differs from its default, and not where it has it: a resolved recipe states every default.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from pydantic import BaseModel

UsedWith = Mapping[str, tuple[str, tuple[Any, ...] | Callable[[Any], bool]]]


class InKey(ValueError):
    """A mistake in a key below the block whose validator finds it."""

    def __init__(self, keys: tuple[str, ...], message: str, given: Any) -> None:
        super().__init__(message)
        self.keys, self.given = keys, given


def positive(value: float) -> bool:
    return value > 0


def check(block: BaseModel, like: BaseModel | None = None, above: tuple[str, ...] = ()) -> None:
    """InKey for the first unused key of a block, or of one below it. like: what the block is where nothing is stated, None: its class's defaults."""
    fields = type(block).model_fields
    defaults = {name: getattr(like, name) if like is not None else each.get_default(call_default_factory=True) for name, each in fields.items()}
    used_with: UsedWith = getattr(type(block), "used_with", {})
    for key, (other, values) in used_with.items():
        given, ruled = getattr(block, key), getattr(block, other)
        counts = values(ruled) if callable(values) else ruled in values
        if not counts and given != defaults[key]:
            said = given.model_dump(mode="json", exclude_unset=True) if isinstance(given, BaseModel) else given
            raise InKey((*above, key), f"not used with {'.'.join((*above, other))}: {ruled}; remove it", said)
    for name, each in ((name, getattr(block, name)) for name in fields):
        if isinstance(each, BaseModel):
            default = defaults[name]
            check(each, default if type(default) is type(each) else None, (*above, name))
