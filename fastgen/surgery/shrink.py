"""A student of fewer blocks than its teacher, as SlimFlow trains them (Zhu et al. 2024, arXiv:2407.12718): the same diffusers class with a
configuration of its own, which plain diffusers builds and loads.

A transformer's lists of blocks are found by the option of its configuration that counts them, so what it has besides (Z-Image's refiners, say)
stays. Blocks of a list map the same stream to itself, and leaving one out is as if it passed on what it got. The exceptions: SD3's last block
drops the text, so no other can be the last; DiT's output reads the time embedding of the first block, so no other can be the first; and SD3.5
says which of its blocks have a second attention by their places, which are counted anew.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fastgen.errors import UserError, nearest
from fastgen.rng import seeded
from fastgen.surgery import block_importance

Rule = Literal["even", "first", "ends", "importance"]
Init = Literal["pruned", "random"]

# Options that count the blocks of a list, each with what classes call that list.
_COUNTED = {
    "num_layers": ("transformer_blocks", "blocks", "layers"),
    "num_single_layers": ("single_transformer_blocks",),
    "num_mmdit_layers": ("joint_transformer_blocks",),
    "num_single_dit_layers": ("single_transformer_blocks",),
    "n_layers": ("layers",),
    "depth": ("blocks", "transformer_blocks", "layers"),
}
# Options that hold places in a list, by the option that counts it.
_PLACES = {"dual_attention_layers": "num_layers"}
# Classes that read their first block apart from calling it.
_FIRST_STAYS = ("DiTTransformer2DModel",)


@dataclass(frozen=True)
class Shrink:
    """What a student has of its teacher. depth: a share of each list in (0, 1], or a number of blocks of the only one; None where `keep` says
    it. keep: a rule, or ascending places from 0, those of the only list or by the lists' names (of which those that are left out stay whole).
    `importance` has to be measured (`most_important`), and until then stands for as many blocks, `even` ones. init: `pruned` for the teacher's
    weights, `random` for those that the class itself begins with, from `seed`."""

    depth: float | None = None
    keep: Rule | Sequence[int] | Mapping[str, Sequence[int]] = "even"
    init: Init = "pruned"
    seed: int = 0


def shrunk(teacher: nn.Module, shrink: Shrink) -> nn.Module:
    """A smaller network beside `teacher`, which stays as it is; in eval mode, in its dtype and on its device, which may be meta. Buffers outside
    the blocks, such as tables of positions, are the teacher's in any case. UserError where the class cannot be shrunk so."""
    kept = kept_blocks(teacher, shrink)
    changes = _own_options(teacher, kept)
    _check_tables(teacher, changes)
    if shrink.init == "random":
        return _configured(_begun(teacher, changes, shrink.seed), changes)
    student = _configured(_pruned(teacher, kept), changes)
    if _shapes(student) != _shapes(_built(student, {}, "meta")):
        what = f"{type(teacher).__name__} of these blocks is another than its configuration would build"
        raise UserError(f"recipe key student.shrink.keep: {what}")
    return student


def _check_tables(teacher: nn.Module, changes: Mapping[str, Any]) -> None:
    """UserError where a table outside the blocks goes by their number: the teacher's is not the one that a folder's configuration makes."""
    inside = tuple(f"{name}." for name in _block_lists(teacher))
    tables = {name: table.shape for name, table in _built(teacher, changes, "meta").named_buffers()}
    for name, table in teacher.named_buffers():
        if not name.startswith(inside) and tables.get(name, table.shape) != table.shape:
            what = f"{name} of {type(teacher).__name__} has rows for each of its blocks by their places, which fewer would have to learn anew"
            raise UserError(f"recipe key student.shrink: {what}; remove it")


def kept_blocks(teacher: nn.Module, shrink: Shrink) -> dict[str, list[int]]:
    """The places of the teacher's blocks that a student keeps, by the list's name. UserError naming the recipe key where there are none such."""
    lists = {name: list(teacher.get_submodule(name).children()) for name in _block_lists(teacher)}
    if not lists:
        raise UserError(f"recipe key student.shrink: {type(teacher).__name__} has no list of alike blocks to leave some out of; remove it")
    several = f"{type(teacher).__name__} has {' and '.join(f'{len(blocks)} {name}' for name, blocks in lists.items())}"
    if isinstance(shrink.keep, str):
        if isinstance(shrink.depth, int) and len(lists) > 1:
            raise UserError(f"recipe key student.shrink.depth: {shrink.depth} blocks, but {several}; give a share, or keep of each by its name")
        counts = {name: _count(shrink.depth, name, len(blocks)) for name, blocks in lists.items()}
        return {name: _by_rule(shrink.keep, counts[name], blocks) for name, blocks in lists.items()}
    given = shrink.keep if isinstance(shrink.keep, Mapping) else dict.fromkeys(lists, shrink.keep)
    if given is not shrink.keep and len(lists) > 1:
        raise UserError(f"recipe key student.shrink.keep: one list of places, but {several}; give those of each by its name")
    for name in given.keys() - lists.keys():
        raise UserError(f"recipe key student.shrink.keep.{name}: no list of {type(teacher).__name__}; {nearest(name, lists)}")
    kept = {name: list(given.get(name, range(len(blocks)))) for name, blocks in lists.items()}
    for name, blocks in lists.items():
        _check_places(kept[name], shrink.depth, name, blocks, first_stays=type(teacher).__name__ in _FIRST_STAYS)
    return kept


def most_important(teacher: nn.Module, shrink: Shrink, batches: Iterable[Callable[[], Tensor]]) -> dict[str, list[int]]:
    """The places that `keep: importance` comes to, as `kept_blocks` has them: those without which the loss rises most. batches: each runs
    `teacher` on one and returns its scalar loss. Blocks that have to stay are not measured, nor are lists that stay whole."""
    counts = {name: len(kept) for name, kept in kept_blocks(teacher, shrink).items()}
    lists = {name: list(teacher.get_submodule(name).children()) for name in counts}
    stay = {name: _have_to_stay(teacher, blocks) for name, blocks in lists.items()}
    free = {name: [i for i in range(len(blocks)) if i not in stay[name]] for name, blocks in lists.items() if counts[name] < len(blocks)}
    rises = block_importance.without_each(teacher, free, batches)
    kept = {name: list(range(len(blocks))) for name, blocks in lists.items()}
    for name, places in free.items():
        best = sorted(places, key=lambda place, name=name: (-rises[name][place], place))[: counts[name] - len(stay[name])]
        kept[name] = sorted([*stay[name], *best])
    return kept


def summary(teacher: nn.Module, shrink: Shrink) -> dict[str, Any]:
    """What becomes of a teacher, which may be a meta network, as JSON has it: `init`; by the lists' names the places that are `kept` and how many
    there were (`of`); `parameters` and `teacher_parameters`; `unmeasured` where importance will tell the places, whose blocks may have other
    numbers of parameters."""
    student, kept = shrunk(_on_meta(teacher), shrink), kept_blocks(teacher, shrink)
    of = {name: len(list(teacher.get_submodule(name).children())) for name in kept}
    found = {"init": shrink.init, "kept": kept, "of": of, "parameters": _num_parameters(student), "teacher_parameters": _num_parameters(teacher)}
    return found | ({"unmeasured": True} if shrink.keep == "importance" else {})


def in_words(found: Mapping[str, Any]) -> str:
    """A `summary` in one line."""
    parts = []
    for name, places in found["kept"].items():
        said = "by importance, measured when the run begins" if found.get("unmeasured") else ", ".join(map(str, places))
        which = f" ({said})" if found["init"] == "pruned" and len(places) < found["of"][name] else ""
        parts.append(f"{len(places)} of {found['of'][name]} {name}{which}")
    return f"{' and '.join(parts)}, {found['parameters']:,} of {found['teacher_parameters']:,} parameters"


def _block_lists(network: nn.Module) -> dict[str, str]:
    """Names of a network's lists of blocks, each with the option that counts it."""
    config: Mapping[str, Any] = getattr(network, "config", {})
    found = dict[str, str]()
    for option, names in _COUNTED.items():
        lists = [name for name in names if isinstance(blocks := getattr(network, name, None), nn.ModuleList) and len(blocks) == config.get(option)]
        found |= {name: option for name in lists[:1] if config[option] > 0}
    return found


def _count(depth: float | None, name: str, of: int) -> int:
    """How many of a list's blocks are kept, a share's half rounded up."""
    assert depth is not None, "the recipe's schema asks for a depth beside a rule"
    count = depth if isinstance(depth, int) else math.floor(depth * of + 0.5)
    if count > of:
        raise UserError(f"recipe key student.shrink.depth: {count} blocks, but the teacher has {of} {name}")
    if count < 1:
        raise UserError(f"recipe key student.shrink.depth: {depth} of the teacher's {of} {name} leaves none")
    return count


def _by_rule(rule: Rule, count: int, blocks: Sequence[nn.Module]) -> list[int]:
    last = len(blocks) - 1
    if rule in ("even", "importance"):  # i last / (count - 1) rounded, halves up, in whole numbers
        kept = [(2 * i * last + count - 1) // (2 * (count - 1)) for i in range(count)] if count > 1 else [0]
    elif rule == "first":
        kept = list(range(count))
    else:
        kept = [*range(count - count // 2), *range(last + 1 - count // 2, last + 1)]
    return [*kept[:-1], last] if _last_is_of_its_own(blocks) else kept


def _check_places(kept: Sequence[int], depth: float | None, name: str, blocks: Sequence[nn.Module], *, first_stays: bool) -> None:
    last = len(blocks) - 1
    for place in kept:
        if not 0 <= place <= last:
            raise UserError(f"recipe key student.shrink.keep: no block {place}; the teacher's {name} are 0 to {last}")
    if depth is not None and len(kept) != (count := _count(depth, name, len(blocks))):
        raise UserError(f"recipe key student.shrink.keep: {len(kept)} places do not fit student.shrink.depth = {depth}, {count} of the {name}")
    if kept[0] != 0 and first_stays:
        what = f"begins with {kept[0]}, but the network's output reads the time embedding of the first of the teacher's {name}; begin with 0"
        raise UserError(f"recipe key student.shrink.keep: {what}")
    if kept[-1] != last and _last_is_of_its_own(blocks):
        what = f"ends with {kept[-1]}, but the last of the teacher's {name} is shaped like no other and has to stay the last"
        raise UserError(f"recipe key student.shrink.keep: {what}; end with {last}")


def _have_to_stay(network: nn.Module, blocks: Sequence[nn.Module]) -> list[int]:
    first = [0] if type(network).__name__ in _FIRST_STAYS else []
    return [*first, len(blocks) - 1] if _last_is_of_its_own(blocks) else first


def _last_is_of_its_own(blocks: Sequence[nn.Module]) -> bool:
    return len(blocks) > 1 and _shapes(blocks[-1]) not in [_shapes(block) for block in blocks[:-1]]


def _own_options(teacher: nn.Module, kept: Mapping[str, Sequence[int]]) -> dict[str, Any]:
    """The options in which the student's configuration differs from its teacher's."""
    config: Any = teacher.config
    names = {option: name for name, option in _block_lists(teacher).items()}
    changes: dict[str, Any] = {option: len(kept[name]) for option, name in names.items()}
    for option, counted in _PLACES.items():
        if config.get(option) and counted in names:
            changes[option] = tuple(j for j, i in enumerate(kept[names[counted]]) if i in config[option])
    return changes


def _pruned(teacher: nn.Module, kept: Mapping[str, Sequence[int]]) -> nn.Module:
    """A copy without the other blocks; these are not copied meanwhile, so that it takes no more memory than it will have."""
    memo: dict[int, Any] = {}
    for name, places in kept.items():
        blocks: Any = teacher.get_submodule(name)
        memo[id(blocks)] = nn.ModuleList([copy.deepcopy(blocks[i], memo) for i in places]).train(blocks.training)
    return copy.deepcopy(teacher, memo)


@torch.no_grad()
def _begun(teacher: nn.Module, changes: Mapping[str, Any], seed: int) -> nn.Module:
    like = next(teacher.parameters())
    with seeded("shrink", seed):
        student = _built(teacher, changes, "meta" if like.is_meta else "cpu")
    student.to(like.device)._apply(lambda tensor: tensor.to(like.dtype) if tensor.is_floating_point() else tensor)
    inside = tuple(f"{name}." for name in _block_lists(student))
    tables = dict(teacher.named_buffers())
    for name, table in student.named_buffers():
        if not name.startswith(inside):
            table.copy_(tables[name])
    return student


def _built(network: nn.Module, changes: Mapping[str, Any], device: str) -> nn.Module:
    """A new network as the configuration of another one says, but for changes, in eval mode."""
    cls: Any = type(network)
    config: Any = network.config
    # diffusers takes no notice of options that are on its list of those which had been left at their defaults.
    options = {key: value for key, value in config.items() if key != "_use_default_values"}
    with torch.device(device):
        return cls.from_config({**options, **changes}).eval()


def _configured(student: Any, changes: Mapping[str, Any]) -> nn.Module:
    """The network with these options in its configuration."""
    defaults = [name for name in student.config.get("_use_default_values", ()) if name not in changes]
    student.register_to_config(**changes, **({"_use_default_values": defaults} if "_use_default_values" in student.config else {}))
    return student.eval()


def _on_meta(network: nn.Module) -> nn.Module:
    return network if next(network.parameters()).is_meta else _built(network, {}, "meta")


def _shapes(network: nn.Module) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in network.state_dict().items()}


def _num_parameters(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())
