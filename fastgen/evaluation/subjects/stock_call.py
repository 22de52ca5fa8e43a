"""What a stock pipeline's call is passed, from its signature alone: whatever it does not take is refused before any weight is read."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from fastgen.errors import UserError, nearest, shown

# Arguments of calls that are passed by other means.
_OPTIONS = {"num_inference_steps": "--steps", "height": "--size", "width": "--size", "max_sequence_length": "--max-sequence-length"}
_OURS = {"prompt", "class_labels", "generator", "latents", "output_type", "return_dict", "batch_size", "num_images_per_prompt"}
_INPUTS = {"prompt", "class_labels"}
_VIDEO = ("num_frames", "video_length", "frames")
_REST = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
_GRIDS = ("timesteps", "sigmas")  # explicit times, of which there are as many as steps


@dataclass(frozen=True)
class CallSettings:
    """What a user wants of a call; None: the pipeline's own default. size: (height, width). more: other arguments of the call, JSON data."""

    steps: int | None = None
    guidance: float | None = None
    size: tuple[int, int] | None = None
    max_sequence_length: int | None = None
    more: Mapping[str, Any] = field(default_factory=dict)


class StockCall:
    """The arguments of one pipeline class's call. UserError for what it does not take, and for a class that draws no pictures of prompts,
    classes or nothing."""

    def __init__(self, pipeline_class: type, asked: CallSettings) -> None:
        self.name, self.asked = pipeline_class.__name__, asked
        self.parameters = inspect.signature(pipeline_class.__call__).parameters
        self._check_kind()
        self._check_more()
        self._check_steps()
        self.arguments = self._arguments()

    def _check_kind(self) -> None:
        if any(name in self.parameters for name in _VIDEO):
            raise UserError(f"{self.name} draws videos, and only pictures are measured")
        needs = [name for name, each in self.parameters.items() if name != "self" and each.default is each.empty and each.kind not in _REST]
        if more := [name for name in needs if name not in _INPUTS]:
            raise UserError(f"the call of {self.name} needs {' and '.join(more)}, so it does not draw pictures of prompts alone")
        if "generator" not in self.parameters:
            raise UserError(f"the call of {self.name} takes no generator, so its pictures have no seeds")
        if not {*_INPUTS, "batch_size"} & self.parameters.keys():
            raise UserError(f"the call of {self.name} takes neither prompts nor classes nor a number of pictures")

    def _check_more(self) -> None:
        for name in self.asked.more:
            if name in _OURS:
                raise UserError(f"--call {name}: the evaluation itself passes it")
            if name in _OPTIONS:
                raise UserError(f"--call {name}: use {_OPTIONS[name]}")
            self._require(name, f"--call {name}")

    def _check_steps(self) -> None:
        for name in _GRIDS:
            grid = self.asked.more.get(name)
            if grid is not None and not (isinstance(grid, list) and grid):
                raise UserError(f"--call {name}: {shown(grid)} is no list of times")
            if grid is not None and self.asked.steps not in (None, len(grid)):
                raise UserError(f"--steps: {self.asked.steps}, but --call {name} has {len(grid)} times")

    def _require(self, name: str, option: str) -> None:
        if name not in self.parameters:
            takes = sorted(self.parameters.keys() - _OURS - {"self", "args", "kwargs"})
            raise UserError(f"{option}: the call of {self.name} takes no {name}; {nearest(name, takes)}")

    def _arguments(self) -> dict[str, Any]:
        asked, given = self.asked, dict(self.asked.more)
        steps = asked.steps or next((len(given[name]) for name in _GRIDS if given.get(name) is not None), None)
        if steps is not None and (asked.steps is not None or "num_inference_steps" in self.parameters):
            self._require("num_inference_steps", "--steps")
            given["num_inference_steps"] = steps
        if asked.guidance is not None:
            given[self._asked_guidance()] = asked.guidance
            # A pipeline with `true_cfg_scale` guides beside a negative prompt alone.
            if self.guidance_argument == "true_cfg_scale" and asked.guidance > 1:
                given.setdefault("negative_prompt", "")
        if asked.size is not None:
            for name, value in zip(("height", "width"), asked.size, strict=True):
                self._require(name, "--size")
                given[name] = value
        if asked.max_sequence_length is not None:
            self._require("max_sequence_length", "--max-sequence-length")
            given["max_sequence_length"] = asked.max_sequence_length
        if "intermediate_timesteps" in self.parameters and given.get("num_inference_steps", 2) != 2:
            given.setdefault("intermediate_timesteps", None)  # of SANA-Sprint, whose own default is for two steps and refuses others
        return given

    @cached_property
    def guidance_argument(self) -> str | None:
        """The argument of classifier-free guidance: `true_cfg_scale` where there is one, and `guidance_scale` is then an input of the network."""
        return next((name for name in ("true_cfg_scale", "guidance_scale") if name in self.parameters), None)

    def _asked_guidance(self) -> str:
        name = self.guidance_argument
        if name is None:
            raise UserError(f"--guidance: the call of {self.name} takes neither guidance_scale nor true_cfg_scale")
        if name in self.asked.more:
            raise UserError(f"--guidance: --call {name} says it already; remove one of them")
        if name == "true_cfg_scale" and self._default("guidance_scale") is not None:
            what = "guidance_scale, an input of its network, and true_cfg_scale, classifier-free guidance beside a negative prompt"
            raise UserError(f"--guidance: {self.name} has two, {what}; say which: --call guidance_scale={self.asked.guidance:g}")
        return name

    def _default(self, name: str) -> Any:
        parameter = self.parameters.get(name)
        return None if parameter is None or parameter.default is parameter.empty else parameter.default

    @property
    def steps(self) -> int | None:
        return self.arguments.get("num_inference_steps", self._default("num_inference_steps"))

    @property
    def guidance(self) -> float | None:
        """Classifier-free guidance as the call names its strength; 1 where a negative prompt is lacking that it needs."""
        name = self.guidance_argument
        if name is None:
            return None
        if name == "true_cfg_scale" and self.arguments.get("negative_prompt") is None:
            return 1.0
        scale = self.arguments.get(name, self._default(name))
        return None if scale is None else float(scale)

    @property
    def record(self) -> dict[str, Any]:
        """All numbers, texts and switches of the call, its own defaults of this version of diffusers included."""
        own = {name: self._default(name) for name in self.parameters.keys() - _OURS}
        return {name: value for name, value in sorted(own.items()) if isinstance(value, int | float | str)} | dict(sorted(self.arguments.items()))

    def told(self, count: int) -> dict[str, Any]:
        """The arguments for `count` pictures: some calls take no single negative prompt beside a list of prompts."""
        return {
            name: [value] * count if name.startswith("negative_prompt") and isinstance(value, str) else value
            for name, value in self.arguments.items()
        }


def class_number(prompt: str, count: int, names: Mapping[str, int]) -> int | None:
    """The class that a prompt is the number or one of the names of; None where there is none. count: of classes; names: each of one class."""
    prompt = prompt.strip()
    if prompt.isdecimal():
        return int(prompt) if int(prompt) < count else None
    found = {names.get(name.strip()) for name in prompt.split(",")}
    return found.pop() if len(found) == 1 else None


def class_numbers(prompts: Sequence[str], count: int, names: Mapping[str, int], where: str) -> list[int]:
    """Of several; UserError for the first that is no class."""
    numbers = [class_number(prompt, count, names) for prompt in prompts]
    for prompt, number in zip(prompts, numbers, strict=True):
        if number is None:
            close = nearest(prompt, names).partition("allowed:")[0].strip()
            raise UserError(f"{where}{shown(prompt)} is neither a class 0 to {count - 1} nor one's name" + (f"; {close}" if close else ""))
    return [number for number in numbers if number is not None]
