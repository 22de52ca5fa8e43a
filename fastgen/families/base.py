"""What fastgen asks of a diffusers pipeline family. Every oddity of a family stays inside its one file."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fastgen import conditioning
from fastgen.conditioning import Conditioning
from fastgen.errors import UserError, shown
from fastgen.families.adapters import KEY
from fastgen.families.weights import WeightFiles
from fastgen.guidance import linear
from fastgen.legibility import Legibility
from fastgen.manifest import Sampler
from fastgen.path import Kind, Path

# What a family may be told beside its source, by the key of the recipe's teacher block: text tokens; (height, width) in pixels; frames of
# a video; the network's own guidance input, which is not classifier-free guidance; shift of the teacher's times.
OPTIONS = ("max_sequence_length", "size", "frames", "embedded_guidance", "shift")


@dataclass(frozen=True)
class LatentSpec:
    """Shape of one sample that the network sees: channels, then (H, W) or (T, H, W), or nothing for vectors."""

    channels: int
    size: tuple[int, ...] = ()

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.channels, *self.size)


class Family(ABC):
    """A teacher's or student's pipeline: where its weights are, how its network is called, how prompts and latents are coded.

    `path` and `kind` are the network's own. Construction reads configurations only; networks load on request.
    """

    pipeline_classes: ClassVar[tuple[str, ...]] = ()
    component: ClassVar[str] = "transformer"  # the pipeline's attribute that is distilled
    # The attribute of a second network, to which the pipeline itself gives the times below its `boundary_ratio`, a share of the path's range.
    second_component: ClassVar[str | None] = None
    optional: ClassVar[tuple[str, ...]] = ()  # components that the pipeline may go without, though diffusers asks for them
    lora_targets: ClassVar[tuple[str, ...]] = ()
    loads_lora: ClassVar[bool] = True  # whether the pipeline saves and loads LoRA files
    takes_negative: ClassVar[bool] = True  # whether its call takes a negative prompt
    takes_guidance: ClassVar[bool] = True  # whether its call has classifier-free guidance
    guides_singly: ClassVar[bool] = False  # whether its call, with guidance, draws no more than one prompt
    pixels_per_latent: int = 1  # spatial stride of the VAE
    frame_rate: ClassVar[float] = 16  # of videos, a second
    # Those that the stock pipeline reproduces: the stochastic one where its call hands its generators to the scheduler's steps.
    samplers: ClassVar[tuple[Sampler, ...]] = ("euler",)
    warnings: Sequence[str] = ()  # of how its source is taken
    encoding: tuple[torch.device, torch.dtype] = (torch.device("cpu"), torch.float32)  # see encode_with
    exportable: ClassVar[bool] = True  # False: closed-form teachers without a diffusers pipeline
    time_projection: ClassVar[str | None] = None  # name of the time embedding's last nn.Linear, where scalar inputs are added; None: no place

    guidance_kind: ClassVar[Kind | None] = None  # the prediction that `guidance_rule` acts on; None: any, for the rule commutes with conversions

    path: Path
    kind: Kind
    latent: LatentSpec

    several_sizes: bool = False  # whether it is one of those that `at_sizes` has made

    @abstractmethod
    def __init__(self, source: Any, **options: Any) -> None:
        """options: those of OPTIONS that the family has, and `resolution` for a square `size`; None: the pipeline's own. UserError for others."""

    @property
    @abstractmethod
    def options(self) -> dict[str, Any]:
        """The options, as JSON has them, with which this family is made again from the same source; `shift` only where it was stated."""

    @property
    def picture_shape(self) -> tuple[int, ...]:
        """(3, H, W) or (3, T, H, W) of what `decode` makes of one sample; of vectors, which are no pictures, their own."""
        *frames, height, width = self.latent.size or (0, 0)
        return (3, *frames, height * self.pixels_per_latent, width * self.pixels_per_latent) if self.latent.size else self.latent.shape

    @property
    def takes_times(self) -> bool:
        """Whether the pipeline's call takes explicit times."""
        return True

    @property
    @abstractmethod
    def shift(self) -> float:
        """Time shift of the teacher's own schedule (1 = none), for training-time distributions; UserError where its scheduler cannot be followed."""

    @property
    @abstractmethod
    def own_call(self) -> dict[str, Any]:
        """`num_inference_steps` and `guidance_scale` the pipeline is meant to be called with: its fastgen.json, else its signature."""

    def at_sizes(self, sizes: Sequence[Sequence[int]]) -> list[Family]:
        """The same pipeline at each of several sizes, (height, width) in pixels; all of it but the sizes is shared, and one exported scheduler
        serves them all. UserError, by the recipe key student.sizes, for a size that the pipeline cannot draw, and where no scheduler serves all."""
        raise UserError(f"recipe key student.sizes: {type(self).__name__} has no sizes to choose from")

    @property
    def size_unit(self) -> int:
        """Of which both sides of its pictures, in pixels, are multiples."""
        return self.pixels_per_latent

    def has(self, component: str) -> bool:
        """Whether the pipeline has a component, rather than going without it; what is no pipeline has none."""
        return False

    def tune_with(self, lora: Sequence[Mapping[str, Any]]) -> list[str]:
        """Have LoRA adapters (`{path, weight}` each) fused into whatever is loaded from now on; warnings. UserError, before anything is loaded,
        for what is no adapter of this pipeline."""
        raise UserError(f"recipe key {KEY}: does not apply to a closed-form teacher")

    @abstractmethod
    def load_backbone(self, *, meta: bool = False) -> nn.Module:
        """The network alone, fp32, in eval mode, on the CPU; with `meta` its shapes only, without reading weights."""

    def load_outline(self) -> tuple[nn.Module, WeightFiles] | None:
        """The network with its buffers, but without its parameters, which are on the meta device, and where these are read; None where they are
        not simply those of files."""
        return None

    @abstractmethod
    def call(self, backbone: nn.Module, x: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        """The network's prediction, of `kind`, at x (B, *latent.shape), t (B,) path time, fp32 or wider."""

    def time_features(self, backbone: nn.Module, t: Tensor) -> Tensor:
        """What goes into `time_projection`, (N, F), at path times t (N,), for families that name one; it must depend on the time alone."""
        raise AssertionError(f"{type(self).__name__} has no place for scalar inputs")

    @abstractmethod
    def blocks(self, backbone: nn.Module) -> list[nn.Module]:
        """The repeated blocks in order: for sharding, checkpointing, feature taps and surgery."""

    def block_feature(self, output: Any) -> Tensor:
        """The image stream in a block's output: tokens (B, N, C), or vectors (B, C)."""
        return output[-1] if isinstance(output, tuple) else output

    def block_streams(self, output: Any) -> tuple[Tensor, ...]:
        """All streams in a block's output, text before picture: tensors (B, N, C), or vectors (B, C)."""
        return tuple(part for part in output if isinstance(part, Tensor)) if isinstance(output, tuple) else (output,)

    @abstractmethod
    def feature_widths(self, backbone: nn.Module) -> list[int]:
        """Channels C of each block's `block_feature`, in the order of `blocks`; from shapes alone, so that a meta network will do."""

    def encode_with(self, device: torch.device, dtype: torch.dtype) -> None:
        """Where, and in which precision, text encoders that load from now on compute; otherwise on the CPU in fp32. A live pipeline's do as their
        owner has placed them."""
        self.encoding = (device, dtype)

    def encode_prompts(self, prompts: Sequence[str], batch: int = 64) -> Conditioning:
        """Conditioning (P, ...) of prompts, `batch` at a time, on the CPU, without gradients. Encoders load on first use: see `free_encoders`.

        UserError where a number of it is not finite, as from weights in which a bit has flipped."""
        cond = conditioning.cat([self.encode_texts(prompts[i : i + batch]) for i in range(0, len(prompts), batch)])
        for name, values in cond.items():
            finite = values.isfinite()
            if not finite.all():
                prompt = prompts[int(finite.flatten(1).all(1).int().argmin())]
                raise UserError(
                    f"recipe key teacher.pretrained: its text encoder gives {name} that are not finite for {prompt[:60]!r}; "
                    "its weights are damaged: get them again"
                )
        return cond

    def encode_negative(self, text: str | None) -> Conditioning:
        """Conditioning (1, ...) of a negative prompt; None: what the pipeline takes where its call is given none. UserError where that takes none."""
        self.check_negative(text)
        return self.encode_prompts([text or ""])

    def check_negative(self, text: str | None) -> None:
        """UserError for a negative prompt where the pipeline's call takes none."""
        if text and not self.takes_negative:
            raise UserError(f"recipe key teacher.negative_prompt: {shown(text)}, but the call of {self.pipeline_classes[0]} takes none")

    def guidance_rule(self, cond: Tensor, negative: Tensor, scale: float | Tensor) -> Tensor:
        """The pipeline's classifier-free guidance of two predictions (B, *latent.shape); scale: one number, or one a sample (B,), 1 is none."""
        return linear(cond, negative, scale)

    @abstractmethod
    def encode_texts(self, prompts: Sequence[str]) -> Conditioning:
        """`encode_prompts` of one batch, as the encoders have it."""

    @abstractmethod
    def meta_conditioning(self, count: int) -> Conditioning:
        """The shapes and dtypes of `encode_prompts` for `count` prompts, on the meta device, from configurations alone."""

    def legibility(self, prompts: Sequence[str]) -> Legibility:
        """What the pipeline reads of prompts, without its text encoders, which are slow to load; where a family cannot tell, all."""
        return Legibility(len(prompts))

    @abstractmethod
    def free_encoders(self) -> None:
        """Drop text encoders and VAE from memory; a later call loads them again."""

    @abstractmethod
    def encode_latents(self, pixels: Tensor) -> Tensor:
        """Normalised latents (B, *latent.shape) of pixels (B, 3, H, W) in [-1, 1]; the posterior's mode, no sampling."""

    @abstractmethod
    def decode(self, latents: Tensor) -> Tensor:
        """Pixels (B, 3, H, W) fp32 of latents (B, *latent.shape), black at 0 and white at 1 but not clamped, so that gradients reach
        latents which over- or undershoot. The decoder itself gets no gradients; it loads on first use and stays until `free_encoders`."""

    @torch.no_grad()
    def decode_latents(self, latents: Tensor) -> Tensor:
        """Pixels (B, 3, H, W) in [0, 1], as the pipeline itself decodes."""
        return self.decode(latents).clamp(0, 1)

    def sampling_scheduler(self, steps: int, grid: Sequence[float] | None = None, sampler: Sampler = "euler") -> Any:
        """The diffusers scheduler with which a stock pipeline reproduces one of `samplers`."""
        return self.export_scheduler(grid) if sampler == "euler" else self.stochastic_scheduler(steps, grid)

    def sampling_times(self, steps: int, grid: Sequence[float] | None = None, sampler: Sampler = "euler") -> Tensor:
        """Path times (N,) fp64 that it steps on when the stock pipeline is called with `call_arguments`."""
        return self.grid(steps, grid) if sampler == "euler" else self.stochastic_grid(steps, grid)

    def stochastic_scheduler(self, steps: int, grid: Sequence[float] | None = None) -> Any:
        """`export_scheduler` of the stochastic sampler, for families that have it among their `samplers`."""
        raise AssertionError(f"{type(self).__name__} has no stochastic sampler")

    def stochastic_grid(self, steps: int, grid: Sequence[float] | None = None) -> Tensor:
        """`grid` of the stochastic sampler."""
        return self.grid(steps, grid)

    @abstractmethod
    def export_scheduler(self, grid: Sequence[float] | None = None) -> Any:
        """The diffusers scheduler with which a stock pipeline reproduces our Euler sampler; grid: explicit times, or None."""

    @abstractmethod
    def grid(self, steps: int, grid: Sequence[float] | None = None) -> Tensor:
        """Path times (N,) fp64 that `export_scheduler` steps on when the stock pipeline is called with `call_arguments`."""

    def path_times(self, timesteps: Tensor, sigmas: Tensor) -> Tensor:
        """Path times (N,) fp64 of a stock scheduler's own record of the steps it has taken: its `timesteps` (N,), of some classes with the end, and
        `sigmas`, those of Flow with the end, or (0,) where it keeps none."""
        return sigmas[:-1].double()

    def call_inputs(self, prompts: Sequence[str]) -> dict[str, Any]:
        """What a stock call is given of prompts, JSON-serialisable: texts, labels or nothing, by the names of its arguments."""
        return {"prompt": list(prompts)}

    def amplification(self, t: float) -> float:
        """How much larger than its own a rounding error of the network's prediction at path time t is in x0: 1/alpha of an eps prediction."""
        alpha, _ = self.path.coeffs(torch.tensor([t], dtype=torch.float64))
        return 1 / alpha.item() if self.kind == "eps" else 1.0

    @abstractmethod
    def call_arguments(self, steps: int, guidance: float, grid: Sequence[float] | None = None) -> dict[str, Any]:
        """What a stock pipeline call must be passed, JSON-serialisable. guidance: classifier-free, 1 is none; grid: explicit path times."""

    def negative_arguments(self, text: str | None, guidance: float) -> dict[str, Any]:
        """And of the negative prompt; None: the pipeline's own."""
        return {"negative_prompt": text} if text and guidance > 1 else {}

    @property
    def loading_arguments(self) -> dict[str, Any]:
        """What the pipeline's `from_pretrained` must be passed for this source: a `variant`, and None for components that it goes without."""
        return {}

    @abstractmethod
    def load_pipeline(self, backbone: nn.Module | None, scheduler: Any) -> Any:
        """The whole diffusers pipeline around `backbone` (None: its own) and `scheduler`, for export."""
