"""Mixture of Blocks (Dense2MoE, arXiv:2510.09094): of each group of consecutive blocks a sample passes through some, in order, and skips the others.

A group's router sees, for each sample, pooled image and text tokens x, c and the modulation's vector y before the group's first block; its scores
are alpha W_x [x, c] + (1 - alpha) W_y y. The paper leaves alpha, pooling and gates open: here alpha is 0.5, pooling the mean, and a kept block
weighs 1 in values and tangents, while its gradient is that of h + P (B(h) - h), P its softmax probability (straight-through).

Blocks keep their class's code, names and attributes: a grouped block is of a subclass that decides whether that code runs.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastgen import across
from fastgen.errors import UserError
from fastgen.surgery.moe.layer import Router
from fastgen.surgery.moe.routing import Routing
from fastgen.surgery.moe.streams import KEY, Streams, is_last_of_text, seen, streams_of, widths

if TYPE_CHECKING:
    from fastgen.surgery.moe.held import Held


@dataclass(frozen=True)
class Groups:
    """size: consecutive blocks in a group; kept: how many of them a sample passes through; alpha: the weight of tokens in the router's scores."""

    size: int
    kept: int
    alpha: float = 0.5


class Choice(NamedTuple):
    """keep: (B, m) bool; is_kept: the same, by block, where Python can see it; gates: (B, m), 0 in value, with the gradient of kept blocks'
    probabilities; None where nothing has one; runs: whether any sample of the whole batch, of which other processes may hold parts, keeps a block."""

    keep: Tensor
    is_kept: list[list[bool]]
    gates: Tensor | None
    runs: list[bool]


class BlockRouter(nn.Module):
    """Chooses a group's blocks; a submodule of the first of them. With weights of zero, as at first, every sample keeps the first blocks.

    kept: changed at run time by `set_kept`; records: where choices are left, or None; choice: of the pass that is in the group now; held: choices of
    another pass that are made again (held.py), or None.
    """

    records: list[Routing] | None
    choice: Choice | None

    def __init__(self, name: str, width: tuple[int, int], groups: Groups, like: Tensor) -> None:
        super().__init__()
        self.name, self.size, self.kept, self.alpha = name, groups.size, groups.kept, groups.alpha
        self.tokens, self.modulation = (Router(each, groups.size, like) for each in width)
        self.records = self.choice = None
        self.held: Held | None = None

    def forward(self, tokens: Tensor, vector: Tensor) -> Tensor:
        """Probabilities (B, m) of tokens (B, C), and vectors (B, C')."""
        return (self.alpha * self.tokens(tokens) + (1 - self.alpha) * self.modulation(vector)).softmax(-1)

    def choose(self, tokens: Tensor, vector: Tensor) -> None:
        """Waits for the device, once: whether a block runs at all is decided here."""
        probabilities = self(tokens, vector)
        best = probabilities.detach().argsort(dim=-1, descending=True, stable=True)[:, : self.kept]
        best = best if self.held is None else self.held.choice(self, best)
        keep = torch.zeros(probabilities.shape, dtype=torch.bool, device=best.device).scatter(1, best, True)
        runs_all = keep.is_meta or self.kept == self.size
        is_kept = [[True] * len(keep)] * self.size if runs_all else keep.T.tolist()
        # Inside torch.func a tensor does not say whether the weights outside want a gradient.
        has_gradient = torch.is_grad_enabled() and (probabilities.requires_grad or self.tokens.weight.requires_grad)
        gates: Any = _Opened.apply(probabilities) * keep if has_gradient else None  # type: ignore[operator]
        runs = [True] * self.size if runs_all else (across.batch_total(keep.any(0).float()) > 0).tolist()
        self.choice = Choice(keep, is_kept, gates, runs)
        if self.records is not None:
            counts = keep.sum(0).float()
            self.records.append(Routing(self.name, probabilities, counts, counts.new_zeros(())))

    def extra_repr(self) -> str:
        return f"{self.kept} of {self.size} blocks"


class _Opened(torch.autograd.Function):
    """0 with the gradient of p: what straight-through adds to a weight of 1. Its tangent is 0, as that of any constant."""

    @staticmethod
    def forward(p: Tensor) -> Tensor:
        return torch.zeros_like(p)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0]

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        return torch.zeros_like(tangents[0])


class Membership(NamedTuple):
    """A block's place in a group; in a tuple the router does not become a submodule of every block."""

    router: BlockRouter
    index: int
    streams: Streams


class GroupedBlock(nn.Module):
    """Mixed into a subclass of a block's class. A sample that skips the block has its streams as they were, to the bit; a block that none of a
    batch's samples keeps, on any process, does not run, unless processes train shards of it; otherwise it runs for all of them, and its outputs
    count for those that keep it."""

    membership: Membership

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        router, index, streams = self.membership
        given = inspect.signature(super().forward).bind(*args, **kwargs).arguments
        if index == 0:
            router.choose(*seen(self, streams, given))
        choice = router.choice
        assert choice is not None, f"{router.name}: its first block, which chooses, has not run"
        if index == router.size - 1:
            router.choice = None
        out: list[Tensor] = [given[name] for name in streams.outputs]
        if choice.runs[index] or _others_may_train(self):
            after = super().forward(*args, **kwargs)
            assert isinstance(after, tuple) == (len(out) > 1), f"{type(self).__name__} gives other streams than `streams` says"
            pairs = zip(out, after if isinstance(after, tuple) else (after,), strict=True)
            out = [_mixed(old, new, choice, index) for old, new in pairs]
        return tuple(out) if len(out) > 1 else out[0]


def _others_may_train(block: nn.Module) -> bool:
    """Whether another process may run this block for a gradient: without one from here too, sharded weights wait for it forever, also where
    `train.micro_batch` makes each process's samples a batch of their own."""
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return False
    from torch.distributed.fsdp import FSDPModule

    return isinstance(block, FSDPModule) and torch.is_grad_enabled() and any(p.requires_grad for p in block.parameters())


def _mixed(old: Tensor, new: Tensor, choice: Choice, index: int) -> Tensor:
    assert old.shape == new.shape, f"a block's output is {tuple(new.shape)}, what it replaces {tuple(old.shape)}"
    old, of_samples = old.to(new.dtype), (-1, *[1] * (new.ndim - 1))
    out = new if all(choice.is_kept[index]) else torch.where(choice.keep[:, index].view(of_samples), new, old)
    return out if choice.gates is None else out + choice.gates[:, index].view(of_samples).to(new.dtype) * (new - old)


@cache
def _grouped(kind: type[nn.Module]) -> type[nn.Module]:
    """Of the same name, by which blocks are recognised."""
    return type(kind.__name__, (GroupedBlock, kind), {"__module__": kind.__module__, "__doc__": kind.__doc__})


def mix_blocks(network: nn.Module, blocks: Iterable[nn.Module], groups: Groups, leave: Sequence[str] = ()) -> list[BlockRouter]:
    """Group some of a network's blocks, for good, and return the groups' routers. With all blocks kept it is the dense network, to the bit.

    Groups lie in one list of blocks each; what is left at its end, blocks whose names `leave` says, and a last block that gives no text on (SD3)
    always run. UserError, which names the block, for one of a class that is not known, and where there is no group or one is in a group already.
    """
    if not 1 <= groups.kept <= groups.size or not 0 <= groups.alpha <= 1:
        raise UserError(f"{KEY}: {groups.kept} of {groups.size} blocks, alpha {groups.alpha}; allowed: 1 to {groups.size}, 0 to 1")
    members = [run[i : i + groups.size] for run in _runs(network, list(blocks), leave) for i in range(0, len(run) - groups.size + 1, groups.size)]
    if not members:
        raise UserError(f"{KEY}: {type(network).__name__} has no {groups.size} consecutive blocks in one list that may be left out")
    return [join([(name, block) for name, block, _ in each], groups) for each in members]


Named = tuple[str, nn.Module, Streams]


def _runs(network: nn.Module, blocks: list[nn.Module], leave: Sequence[str]) -> list[list[Named]]:
    """Consecutive blocks that may be grouped, by name and how they are called."""
    names = {id(module): name for name, module in network.named_modules()}
    inside = {id(block) for block in blocks}
    lists = [module for module in network.modules() if isinstance(module, nn.ModuleList)]
    runs: list[list[Named]] = []
    for each in lists:
        run: list[Named] = []
        for block in each:
            name = names[id(block)]
            if id(block) not in inside or is_last_of_text(block) or any(f".{name}".endswith(f".{end}") for end in leave):
                runs, run = [*runs, run], []
                continue
            if isinstance(block, GroupedBlock):
                raise UserError(f"{KEY}: {name} of {type(network).__name__} is in a group already; group the network once")
            run.append((name, block, streams_of(block, name)))
        runs.append(run)
    return runs


def join(members: Sequence[tuple[str, nn.Module]], groups: Groups) -> BlockRouter:
    """One group of these blocks, with their names in the network, in place; its router, with weights of zero. UserError for a class that is not
    known."""
    streams = [streams_of(block, name) for name, block in members]
    first: Any = members[0][1]
    like = next(first.parameters())
    router = BlockRouter(f"{members[0][0]} to {members[-1][0]}", widths(first, streams[0]), groups, like)
    router.requires_grad_(any(p.requires_grad for p in first.parameters())).train(first.training)
    for index, (_, block) in enumerate(members):
        block.__class__ = _grouped(type(block))
        block.membership = Membership(router, index, streams[index])  # type: ignore[assignment]
    first.block_router = router
    return router


def block_routers(network: nn.Module) -> list[BlockRouter]:
    return [module for module in network.modules() if isinstance(module, BlockRouter)]


def grouped_blocks(network: nn.Module) -> list[tuple[GroupedBlock, BlockRouter]]:
    return [(module, module.membership.router) for module in network.modules() if isinstance(module, GroupedBlock)]


def set_kept(network: nn.Module, kept: int) -> None:
    """How many blocks of each group a sample passes through from now on; ValueError for what a group does not have."""
    for router in block_routers(network):
        if not 1 <= kept <= router.size or kept != int(kept):
            raise ValueError(f"kept: {kept}; {router.name} are {router.size} blocks")
        router.kept = kept


@torch.no_grad()
def centre(network: nn.Module, passes: Iterable[Callable[[], Any]]) -> None:
    """Make routers of blocks blind to the mean of what they see, W <- W - (W m) m^T / |m|^2, so that samples choose by what tells them apart: of
    pooled tokens and of the modulation's vector the mean is several times as large as what differs, and random weights prefer one block for all.

    passes: each runs the network on a batch; every block runs in them. ValueError without any, where there are routers.
    """
    routers = block_routers(network)
    sums: dict[BlockRouter, list[Tensor]] = {}

    def see(router: Any, seen: Any, _probabilities: Any) -> None:
        means = [x.detach().mean(0, dtype=router.tokens.weight.dtype) for x in seen]
        sums[router] = [a + b for a, b in zip(sums[router], means, strict=True)] if router in sums else means

    handles = [router.register_forward_hook(see) for router in routers]
    try:
        with keeping_all(network):
            for run in passes:
                run()
    finally:
        for handle in handles:
            handle.remove()
    for router in routers:
        if router not in sums:
            raise ValueError(f"passes: none through {router.name}; routers are centred on at least one")
        for layer, mean in zip((router.tokens, router.modulation), sums[router], strict=True):
            layer.weight -= torch.outer(layer.weight @ mean, mean) / (mean @ mean).clamp(min=torch.finfo(mean.dtype).tiny)


@contextmanager
def keeping_all(network: nn.Module) -> Iterator[None]:
    """Inside, every block runs, whatever routers say."""
    routers = block_routers(network)
    before = [router.kept for router in routers]
    for router in routers:
        router.kept = router.size
    try:
        yield
    finally:
        for router, kept in zip(routers, before, strict=True):
            router.kept = kept


@contextmanager
def recording_blocks(network: nn.Module) -> Iterator[list[Routing]]:
    """Inside, each pass through a group appends what its samples kept, in the terms of experts' routings: for `balance_loss` and statistics; counts
    are of samples. Blocks that are computed again record nothing."""
    records: list[Routing] = []
    routers = block_routers(network)
    before = [router.records for router in routers]
    for router in routers:
        router.records = records
    try:
        yield records
    finally:
        for router, old in zip(routers, before, strict=True):
            router.records = old


def remembered(module: nn.Module) -> Callable[[], AbstractContextManager[None]]:
    """What opens a context in which, from the second time on, groups that blocks in `module` belong to have chosen as at this call, and record
    nothing, for then the module computes a pass again."""
    routers = list(dict.fromkeys(router for _, router in grouped_blocks(module)))
    then = [(router.choice, router.kept) for router in routers]
    is_again = False

    @contextmanager
    def again() -> Iterator[None]:
        nonlocal is_again
        if not is_again:
            is_again = True
            yield
            return
        now = [(router.choice, router.kept, router.records) for router in routers]
        for router, (choice, kept) in zip(routers, then, strict=True):
            router.choice, router.kept, router.records = choice, kept, None
        try:
            yield
        finally:
            for router, (choice, kept, records) in zip(routers, now, strict=True):
                router.choice, router.kept, router.records = choice, kept, records

    return again
