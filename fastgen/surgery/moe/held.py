"""Choices of a network's routers held while its inputs move: what a derivative that takes them as constant is compared with."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from fastgen.surgery.moe.blocks import block_routers
from fastgen.surgery.moe.layer import expert_layers


class Held:
    """What each router chose in the first evaluation, however often it ran in it."""

    def __init__(self) -> None:
        self._kept: dict[int, list[Tensor]] = {}
        self._places: dict[int, int] = {}

    def restart(self) -> None:
        """Another evaluation begins."""
        self._places.clear()

    def choice(self, router: nn.Module, made: Tensor) -> Tensor:
        """`made` in the first evaluation, what was made in its place then in others."""
        place = self._places.get(id(router), 0)
        self._places[id(router)] = place + 1
        kept = self._kept.setdefault(id(router), [])
        if place == len(kept):
            kept.append(made)
        return kept[place]


@contextmanager
def holding(network: nn.Module) -> Iterator[Held]:
    """Inside, every evaluation, which begins with `restart`, goes to the experts and blocks that the first one went to."""
    held, routers = Held(), [*expert_layers(network), *block_routers(network)]
    before = [router.held for router in routers]
    _set(routers, [held] * len(routers))
    try:
        yield held
    finally:
        _set(routers, before)


def _set(routers: list[Any], each: list[Held | None]) -> None:
    for router, held in zip(routers, each, strict=True):
        router.held = held
