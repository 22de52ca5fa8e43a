"""Any diffusers pipeline, run as it is: its own network, scheduler and call, with one generator a picture."""

from __future__ import annotations

import copy
import inspect
import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from fastgen.errors import NotFinite, UserError, nearest
from fastgen.evaluation.protocol import SampleSet
from fastgen.evaluation.subjects.base import Subject
from fastgen.evaluation.subjects.stock_call import CallSettings, StockCall, class_numbers
from fastgen.export import DTYPES
from fastgen.families import draws_singly, pinned_revision, resolve_source, source_hash
from fastgen.families.complete import check_complete, variants
from fastgen.families.components import check_sizes, read_component, read_index
from fastgen.files import loading
from fastgen.portable import source_name
from fastgen.rng import derive_seed

# Components that look at finished pictures, and blacken or mark them.
_AFTER = ("safety_checker", "watermarker")
_SWITCHES = {"requires_safety_checker": False, "add_watermarker": False}  # of the pipelines that have them


class StockPipeline(Subject):
    """A diffusers folder, a hub id at a revision, or `fastgen:NAME`. No code and no pickle of it is run. Checkers and watermarks, which change
    finished pictures or depend on what else is installed, are left out.

    Initial noise is drawn on the CPU, so it is the same on every device. Where a scheduler draws noise that its pipeline hands no generators to,
    pictures are drawn one at a time, and where the call takes one prompt alone: see `drawn_alone`.
    """

    def __init__(
        self,
        source: str,
        asked: CallSettings = CallSettings(),  # noqa: B008
        *,
        revision: str | None = None,
        dtype: str = "fp32",
        device: torch.device | str = "cpu",
        name: Literal["pipeline", "teacher"] = "pipeline",
    ) -> None:
        self.name = name
        self.source, self.device, self.dtype = source, torch.device(device), dtype
        self.folder = _opened(source, revision)
        self.revision = pinned_revision(source, revision)
        self._of_class = _pipeline_class(self.folder)
        self._call(asked)
        # Whether pictures are drawn one at a time: where the call takes no more, and where it draws from torch's global generator, each then at
        # a seed of its own, which is found out when one is drawn.
        self.drawn_alone = draws_singly(self._of_class.__name__, self.guidance)
        self.pipeline = self._loaded()
        self.takes: Literal["prompts", "classes", "nothing"] = self._takes()

    def _call(self, asked: CallSettings) -> None:
        self.call = StockCall(self._of_class, asked)
        self.steps, self.guidance = self.call.steps, self.call.guidance

    def _loaded(self) -> Any:
        variant = next(iter(variants(self.folder).values()), None)
        without = dict.fromkeys([*_absent(self.folder), *self._without])
        with loading(self.folder):
            pipeline = self._of_class.from_pretrained(
                self.folder, torch_dtype=DTYPES[self.dtype], use_safetensors=True, variant=variant, **without, **self._switches
            ).to(self.device)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    @property
    def _without(self) -> list[str]:
        """Components that are left out, of those that the pipeline's class has."""
        return [name for name in _AFTER if name in self._of_class._optional_components]

    @property
    def _switches(self) -> dict[str, bool]:
        parameters = inspect.signature(self._of_class.__init__).parameters
        return {name: value for name, value in _SWITCHES.items() if name in parameters}

    def _takes(self) -> Literal["prompts", "classes", "nothing"]:
        if "prompt" in self.call.parameters:
            return "prompts"
        return "classes" if "class_labels" in self.call.parameters and self._classes else "nothing"

    @property
    def _classes(self) -> int:
        """How many classes the network knows."""
        found = [getattr(part, "config", {}).get(key) for part in self._networks() for key in ("num_embeds_ada_norm", "num_class_embeds")]
        return next((count for count in found if count), 0)

    def _networks(self) -> list[Any]:
        return [part for name in ("transformer", "unet") if (part := getattr(self.pipeline, name, None)) is not None]

    @cached_property
    def content(self) -> str:
        return source_hash(self.source, self.revision)

    @property
    def record(self) -> dict[str, Any]:
        return {
            "source": source_name(self.source),
            **({} if self.revision is None else {"revision": self.revision}),
            "pipeline": self._of_class.__name__,
            **{name: _described(part) for name, part in self.pipeline.components.items() if name.endswith("scheduler")},
            "call": _plain(self.call.record),
            "dtype": self.dtype,
            "device": self.device.type,
            "without": self._without,
            **self._switches,
        }

    def at(self, steps: int) -> StockPipeline:
        other = copy.copy(self)
        vars(other).pop("identity", None)
        asked = self.call.asked
        other._call(CallSettings(steps, asked.guidance, asked.size, asked.max_sequence_length, asked.more))
        return other

    def check(self, sets: Mapping[str, SampleSet], *, whole: bool) -> list[str]:
        for name, samples in sets.items():
            distinct = list(dict.fromkeys(samples.prompts))
            if self.takes == "nothing" and distinct != [""]:
                raise UserError(f"set {name} has prompts, and {self._of_class.__name__} takes none: it draws without conditions")
            if self.takes == "classes":
                self._labels(distinct, f"set {name}: ")
        return []

    def _labels(self, prompts: Sequence[str], where: str = "") -> list[int]:
        return class_numbers(prompts, self._classes, getattr(self.pipeline, "labels", {}), where)

    def _inputs(self, prompts: list[str]) -> dict[str, Any]:
        more = {"batch_size": len(prompts)} if "batch_size" in self.call.parameters else {}
        if self.takes == "prompts":
            return {"prompt": prompts, **more}
        return {"class_labels": self._labels(prompts), **more} if self.takes == "classes" else more

    def draw(self, prompts: list[str], seeds: list[int], ids: Sequence[int]) -> Tensor:
        if not self.drawn_alone:
            pictures, drew = self._drawn(prompts, seeds)
            if not drew or len(prompts) == 1:
                return pictures
            self.drawn_alone = True
        return torch.cat([self._drawn([prompt], [seed])[0] for prompt, seed in zip(prompts, seeds, strict=True)])

    @torch.no_grad()
    def _drawn(self, prompts: list[str], seeds: list[int]) -> tuple[Tensor, bool]:
        """Pictures (B, 3, H, W) fp32 in [0, 1], and whether torch's global generators were drawn from."""
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
            # Not the picture's own seed, or the scheduler's noise would be the initial noise once more.
            torch.manual_seed(derive_seed("scheduler", seeds[0]))
            before = self._global_states()
            made = self._called({**self._inputs(prompts), **self.call.told(len(prompts)), "generator": generators, "output_type": "np"})
            drew = not all(map(torch.equal, before, self._global_states()))
        return self._pictures(made, len(prompts)), drew

    def _global_states(self) -> list[Tensor]:
        return [torch.get_rng_state(), *([torch.cuda.get_rng_state(self.device)] if self.device.type == "cuda" else [])]

    def _called(self, arguments: dict[str, Any]) -> Any:
        try:
            return self.pipeline(**arguments)[0]
        except Exception as error:  # all of it is diffusers' code on a user's files and arguments, and raises whatever it meets
            said = " ".join(str(error).split())[:300]
            raise UserError(f"pipeline {source_name(self.source)!r}: its call fails: {type(error).__name__}: {said}") from error

    def _pictures(self, made: Any, count: int) -> Tensor:
        pixels = torch.as_tensor(np.asarray(made))
        if pixels.ndim != 4 or len(pixels) != count or pixels.shape[-1] not in (1, 3):
            raise UserError(f"{self._of_class.__name__} draws no pictures (H, W, 3): of {count} it makes an array of shape {tuple(pixels.shape)}")
        pixels = pixels.movedim(-1, 1).float().expand(-1, 3, -1, -1)
        if broken := int((~pixels.isfinite().flatten(1).all(1)).sum()):
            hint = "" if self.dtype == "fp32" else "; try --dtype fp32"
            raise NotFinite(f"{broken} of {count} pictures of pipeline {source_name(self.source)!r} in {self.dtype} are not finite{hint}")
        return pixels


def check_pipeline(source: str, asked: CallSettings, revision: str | None = None) -> None:
    """UserError, before any weight is read, for what is no pipeline that a StockPipeline runs, and for what its call does not take."""
    StockCall(_pipeline_class(_opened(source, revision)), asked)


def _opened(source: str, revision: str | None) -> Path:
    """A pipeline's folder that can be loaded and holds no code and no pickles that would be."""
    try:
        folder = resolve_source(source, revision)
        _pipeline_class(folder)
        check_complete(folder, _absent(folder))
        check_sizes(folder)
        _check_scheduler(folder)
    except UserError as error:  # of a teacher, as those messages have it
        said = str(error).removeprefix("recipe key teacher.pretrained: ").replace("recipe key teacher.revision", "--revision")
        raise UserError(f"pipeline {source!r}: {said}" if repr(source) not in said else said) from error
    return folder


def _absent(folder: Path) -> list[str]:
    """Components that a pipeline's index says it goes without."""
    return [name for name, entry in read_index(folder).items() if isinstance(entry, list) and entry[0] is None]


def _pipeline_class(folder: Path) -> Any:
    import diffusers

    name = read_index(folder).get("_class_name")
    if not isinstance(name, str):
        what = "has no key '_class_name'" if name is None else f"names {'.'.join(name)}, which is code of its own, and fastgen runs none"
        raise UserError(f"{str(folder / 'model_index.json')!r} {what}")
    found = getattr(diffusers, name, None)
    if not (isinstance(found, type) and issubclass(found, diffusers.DiffusionPipeline)):
        known = [each for each in dir(diffusers) if each.endswith("Pipeline")]
        close = nearest(name, known).partition("allowed:")[0].strip()
        raise UserError(f"{str(folder)!r} is a {name}, which diffusers {diffusers.__version__} has not" + (f"; {close}" if close else ""))
    return found


def _check_scheduler(folder: Path) -> None:
    """UserError for a scheduler that is not diffusers' own."""
    import diffusers

    entry = read_index(folder).get("scheduler")
    if entry is not None:
        read_component(folder, "scheduler")
        library, name = entry
        if library != "diffusers" or not hasattr(diffusers, str(name)):
            raise UserError(
                f"its scheduler is a {library}.{name}, which diffusers {diffusers.__version__} has not; fastgen runs no code of a pipeline's own"
            )


def _described(scheduler: Any) -> dict[str, Any]:
    return {"class": type(scheduler).__name__, **_plain({key: value for key, value in scheduler.config.items() if not key.startswith("_")})}


def _plain(content: Mapping[str, Any]) -> dict[str, Any]:
    """As JSON has it: arrays as lists, what is no data as its text."""
    return json.loads(json.dumps(dict(content), sort_keys=True, default=lambda value: value.tolist() if hasattr(value, "tolist") else str(value)))
