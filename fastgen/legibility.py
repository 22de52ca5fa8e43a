"""What a pipeline reads of prompts. Text of which a tokenizer knows nothing conditions on nothing, and no loss tells."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, NamedTuple

import numpy as np

from fastgen.errors import UserError

_BATCH = 10_000  # prompts tokenized at once
_LONGEST = 80  # characters of a prompt that a message shows
_KNOWN, _UNKNOWN, _EMPTY = 0, 1, 2


class Reader(NamedTuple):
    """A tokenizer of transformers that a pipeline reads prompts with. name: the pipeline's for it; length: tokens it keeps, with special ones."""

    name: str
    tokenizer: Any
    length: int


@dataclass(frozen=True)
class Legibility:
    """Of `total` prompts those that are not read whole, each with why: lost, of which nothing is read; partial, in which something
    is unknown; cut, whose end is left out."""

    total: int
    lost: Mapping[str, str] = field(default_factory=dict)
    partial: Mapping[str, str] = field(default_factory=dict)
    cut: Mapping[str, str] = field(default_factory=dict)

    def check(self, key: str) -> list[str]:
        """A line each about what is partial and what is cut, with an example. UserError that begins with `key` where something is lost."""
        if self.lost:
            more = f"; the same holds for {len(self.lost) - 1} more of {self.total} prompts" if len(self.lost) > 1 else ""
            raise UserError(f"{key}: {_example(self.lost)}, so it conditions on nothing{more}")
        found = {"words are unknown in": self.partial, "the end is cut off": self.cut}
        return [f"{key}: {what} {len(some)} of {self.total} prompts, such as {_example(some)}" for what, some in found.items() if some]


def read(prompts: Sequence[str], readers: Sequence[Reader]) -> Legibility:
    """What these tokenizers make of different prompts. Lost is what any one of them cannot read at all: each conditions the network in its own way.
    Blank prompts ask for nothing, and lose nothing."""
    distinct = list(dict.fromkeys(prompts))
    lost = {prompt: "is no valid text" for prompt in distinct if not _is_text(prompt)}
    found = Legibility(len(distinct), lost, {}, {})
    texts = [prompt for prompt in distinct if prompt.strip() and prompt not in lost]
    for reader in readers:
        kinds: dict[int, int] = {}
        for start in range(0, len(texts), _BATCH):
            _read_batch(reader, texts[start : start + _BATCH], kinds, found)
    return found


def _read_batch(reader: Reader, texts: list[str], kinds: dict[int, int], found: Any) -> None:
    """Add to what has been found. kinds: of the tokens seen so far."""
    keep = reader.length - reader.tokenizer.num_special_tokens_to_add()
    ids = reader.tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
    known, unknown = _count(reader.tokenizer, [tokens[:keep] for tokens in ids], kinds)
    lengths = np.array([len(tokens) for tokens in ids])
    for i in np.flatnonzero((known == 0) | (unknown > 0) | (lengths > keep)).tolist():
        if known[i] == 0:
            why = "knows none of its tokens" if unknown[i] else "reads nothing in it"
            found.lost.setdefault(texts[i], f"{reader.name} {why}")
        elif unknown[i]:
            found.partial.setdefault(texts[i], f"{reader.name} knows {known[i]} of its {known[i] + unknown[i]} tokens")
        if lengths[i] > keep:
            found.cut.setdefault(texts[i], f"{reader.name} keeps {keep} of its {lengths[i]} tokens")


def _count(tokenizer: Any, ids: list[list[int]], kinds: dict[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Known and unknown tokens in each list; special ones and white space are neither."""
    flat = np.fromiter(chain.from_iterable(ids), dtype=np.int64)
    owner = np.repeat(np.arange(len(ids)), [len(tokens) for tokens in ids])
    distinct, place = np.unique(flat, return_inverse=True)
    for token in distinct.tolist():
        if token not in kinds:
            kinds[token] = _kind(tokenizer, token)
    kind = np.array([kinds[token] for token in distinct.tolist()], dtype=np.int64)[place]
    known, unknown = (np.bincount(owner[kind == which], minlength=len(ids)) for which in (_KNOWN, _UNKNOWN))
    return known, unknown


def _kind(tokenizer: Any, token: int) -> int:
    if token == tokenizer.unk_token_id:  # first: CLIP has its end token stand for it
        return _UNKNOWN
    return _EMPTY if token in tokenizer.all_special_ids or not tokenizer.decode([token]).strip() else _KNOWN


def _is_text(prompt: str) -> bool:
    try:
        prompt.encode()
    except UnicodeEncodeError:  # half of a surrogate pair, which JSON can carry
        return False
    return True


def _example(prompts: Mapping[str, str]) -> str:
    prompt, why = next(iter(prompts.items()))
    shown = prompt if len(prompt) <= _LONGEST else prompt[:_LONGEST] + "…"
    return f"{shown!r} ({why})"
