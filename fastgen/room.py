"""How much memory a run needs, stage by stage, and the smallest changes of its recipe by which it fits into less."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fastgen.activations import step_bytes
from fastgen.config import Recipe, Tuning, apply_override, validate
from fastgen.errors import UserError, shown
from fastgen.families import resolve_source
from fastgen.families.components import read_index
from fastgen.memory import Held, data_bytes, gathered_bytes, held
from fastgen.parallel import processes_of
from fastgen.plan import Plan, plan
from fastgen.progress import Progress
from fastgen.roles import build_roles
from fastgen.surgery.moe.conversion import by_kind

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}


@dataclass(frozen=True)
class Need:
    """Bytes of a run. held: all along training; data: encoded prompts and images in memory; step: the most that comes and goes within a step,
    gradients among it; encoders: text encoders and VAE, while they encode and draw."""

    held: Held
    data: int
    step: int
    encoders: int

    @property
    def stages(self) -> dict[str, int]:
        """The peak of each stage, in the order in which they come. Encoders are there before the network is, and the VAE with pictures alone."""
        between = self.held.total - self.held.gradients + self.data
        return {
            "encoding": self.encoders + self.data,
            "training": between + max(self.step, self.held.gradients),
            "sampling": between + self.held.averages,
        }

    @property
    def peak(self) -> int:
        return max(self.stages.values())


@dataclass(frozen=True)
class Change:
    """A change of recipe that takes less memory. what: it is; keys: as overrides, of a recipe to which it applies, else nothing."""

    what: str
    keys: Callable[[Recipe], Sequence[str]]


def _smaller_micro_batch(recipe: Recipe) -> list[str]:
    size = recipe.train.at_once
    divisors = [each for each in range(1, size) if recipe.train.batch_size % each == 0]
    return [f"train.micro_batch={divisors[-1]}"] if divisors else []


def _given(recipe: Recipe) -> bool:
    """Whether some of the data lie in a folder already, in a dtype of their own."""
    pairs = recipe.data.pairs_asked
    return pairs is not None and pairs.folder is not None


# From the one that costs least to the one that changes what is trained.
CHANGES = (
    Change("blocks are computed again in the backward pass", lambda recipe: [] if recipe.train.checkpointing else ["train.checkpointing=true"]),
    Change("fewer samples at a time", _smaller_micro_batch),
    Change(
        "encoded data in half precision",
        lambda recipe: [] if recipe.data.dtype == "bf16" or _given(recipe) else ["data.dtype=bf16"],
    ),
    Change(
        "encoded data on disk", lambda recipe: [] if recipe.data.store or recipe.data.encode == "online" else ["data.store=store", "data.keep=disk"]
    ),
    Change(
        "averages on the CPU, and optimizer states between steps",
        lambda recipe: [] if recipe.train.offload_optimizers else ["train.ema_device=cpu", "train.offload_optimizers=true"],
    ),
    Change("mixed precision, and frozen weights in half", lambda recipe: [] if recipe.train.precision == "bf16" else ["train.precision=bf16"]),
    Change(
        "adapters in place of whole networks",
        lambda recipe: [] if isinstance(recipe.student.tune, Tuning) or recipe.student.shrink else ["student.tune={lora: {rank: 64}}"],
    ),
    Change(
        "the network under adapters in 8 bits",
        lambda recipe: ["teacher.quantise=int8"] if isinstance(recipe.student.tune, Tuning) and recipe.teacher.quantise is None else [],
    ),
)


def need(planned: Plan) -> Need:
    """What a plan comes to, from shapes alone."""
    asked: Any = planned.student | {"storage": planned.storage}
    roles = build_roles(planned.roles, planned.family, planned.family.load_backbone(meta=True), **asked)
    parts = held(planned, roles)
    step = step_bytes(planned, parts.step)
    if planned.cut is not None:  # whole for a moment, beside this process's own part of the gradients
        step += gathered_bytes(planned, roles) + parts.gradients
    return Need(parts, data_bytes(planned), step, _encoder_bytes(planned))


def answer(recipe: Recipe, limit: int | None = None, progress: Progress | None = None, *, processes: int | None = None) -> dict[str, Any]:
    """What `fastgen plan` says: bytes on one process by what they are and by stage, and with a limit whether the run fits, and if not the changes,
    of which each has its keys and the peak after it. processes: how many there will be, None for as many as there are."""
    planned, progress = plan(recipe, dry=True, processes=processes), progress or Progress()
    progress.stage("taking a training step on tensors without content")
    found = need(planned)
    held_bytes = {name: getattr(found.held, name) for name in ("frozen", "trained", "buffers", "gradients", "optimizers", "averages")}
    smaller, sparse = planned.smaller(), planned.sparse()
    said: dict[str, Any] = {
        "teacher": recipe.teacher.pretrained,
        "method": recipe.distiller.name,
        **({"processes": planned.processes, "parts": planned.parts} if planned.processes > 1 else {}),
        **({"student": smaller} if smaller else {}),
        **({"experts": sparse, "layers": by_kind(*planned.accounts())} if sparse else {}),
        "bytes": {**held_bytes, "data": found.data, "step": found.step, "encoders": found.encoders},
        "stages": found.stages,
        "peak": found.peak,
        "warnings": list(planned.warnings),
    }
    if limit is not None:
        said |= {"memory": limit, "fits": found.peak <= limit}
        if not said["fits"]:
            made, enough = changes_that_fit(recipe, found, limit, progress, processes=processes)
            said["changes"] = [{"what": change.what, "keys": keys, "peak": after.peak} for change, keys, after in made]
            said["fits_with_changes"] = enough
    return said


def changes_that_fit(
    recipe: Recipe, now: Need, limit: int, progress: Progress | None = None, *, processes: int | None = None
) -> tuple[list[tuple[Change, list[str], Need]], bool]:
    """The changes, one on top of the other, after which a recipe needs at most `limit` bytes, each with its keys and what the recipe needs then;
    and whether it fits. now: what it needs as it is. One that saves nothing is left out, and fewer samples at a time are tried down to one."""
    made, progress = list[tuple[Change, list[str], Need]](), progress or Progress()
    for change in CHANGES:
        while now.peak > limit and (keys := list(change.keys(_of_one(recipe, processes)))):
            progress.stage(f"the same with {' '.join(keys)}")
            changed = _changed(recipe, keys)
            try:
                after = need(plan(changed, dry=True, processes=processes))
            except UserError:  # a batch that processes cannot share so, say
                break
            if after.peak >= now.peak:
                break
            if made and made[-1][0] is change:
                made.pop()
            made.append((change, keys, after))
            recipe, now = changed, after
    return made, now.peak <= limit


def _of_one(recipe: Recipe, processes: int | None) -> Recipe:
    """A recipe with the share of the batch that one process has."""
    share = recipe.train.batch_size // processes_of(recipe.train, processes, dry=True)
    return recipe.model_copy(update={"train": recipe.train.model_copy(update={"batch_size": share})})


def _changed(recipe: Recipe, keys: Sequence[str]) -> Recipe:
    data = recipe.dump()
    for key in keys:
        apply_override(data, key)
    return validate(Recipe, data)


def _encoder_bytes(planned: Plan) -> int:
    """Text encoders, on a GPU one at a time, and the VAE in fp32."""
    if not planned.family.exportable:
        return 0
    teacher = planned.recipe.teacher
    folder = resolve_source(teacher.pretrained, teacher.revision)
    sizes = {"text": [0], "vae": [0]}
    for name, value in read_index(folder).items():
        if isinstance(value, list) and value[0] in ("transformers", "diffusers") and name.startswith(("text_encoder", "vae")):
            cls: Any = getattr(importlib.import_module(value[0]), value[1])
            with torch.device("meta"):
                network = (
                    cls(cls.config_class.from_pretrained(folder / name))
                    if value[0] == "transformers"
                    else cls.from_config(cls.load_config(folder, subfolder=name))
                )
            kind, width = ("vae", 4) if name.startswith("vae") else ("text", planned.frozen_dtype.itemsize)
            sizes[kind].append(width * sum(parameter.numel() for parameter in network.parameters()))
    text = max(sizes["text"]) if planned.recipe.train.device != "cpu" else sum(sizes["text"])
    return text + sum(sizes["vae"])


def bytes_of(text: str) -> int:
    """`24GB`, `24GiB` or a number of bytes; UserError for anything else."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]I?)?B?", text.strip().upper())
    if not found or not (size := int(float(found[1]) * _UNITS[found[2] or ""])):
        raise UserError(f"--memory: {shown(text, 40)} is no size such as 24GB or 80GiB")
    return size
