"""Pictures from prompts and seeds, with our own sampler: validation grids, evaluation and export parity all draw here.

A sample's noise is `torch.randn((1, *shape), generator=Generator().manual_seed(seed))`, which is also what a diffusers pipeline
draws when it is given one such generator per prompt. So seed by seed the pictures are the same.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastgen import conditioning, records, timesteps
from fastgen.conditioning import Conditioning
from fastgen.denoiser import Denoiser, Predictor, guided
from fastgen.errors import NotFinite, UserError
from fastgen.families import find_family, resolve_source
from fastgen.families.base import Family
from fastgen.families.source import load_network
from fastgen.files import expanded, loading
from fastgen.fingerprints import SEAL, check_files, file_names, unsealed
from fastgen.manifest import FORMAT, FormerStudent, OwnSampler, Sampler, Student, upgraded
from fastgen.provenance import teacher_lora, teacher_source
from fastgen.sampling import Experts, Predict, Renoise, few_step, walk
from fastgen.second_round import cannot_teach, check_guidance
from fastgen.windows import begin_at, through_windows


class SeededDraws:
    """One CPU generator a sample, each of which goes on drawing from call to call, as in a stock pipeline that hands them to its scheduler."""

    def __init__(self, seeds: Sequence[int], device: torch.device | str = "cpu") -> None:
        self.generators, self.device = [torch.Generator().manual_seed(seed) for seed in seeds], device

    def normal(self, name: str, shape: Sequence[int]) -> Tensor:
        """The next unit noise (B, *shape) fp32; the name does not count."""
        return torch.cat([torch.randn((1, *shape), generator=generator) for generator in self.generators]).to(self.device)


def noise_from_seeds(seeds: Sequence[int], shape: Sequence[int]) -> Tensor:
    """Unit noise (B, *shape) fp32, one CPU generator a sample."""
    return SeededDraws(seeds).normal("noise", shape)


class FirstStep(NamedTuple):
    """Who takes a student's first step, and in how many steps of its own."""

    teacher: ImageGenerator
    steps: int


class ImageGenerator:
    """A model with its sampler settings. steps: default number of evaluations; grid: explicit times for exactly `steps`.

    sampler: how a sample moves from step to step, as in a stock pipeline; `with_own_sampler` for what else a student is made for (own:
    `manifest.Beside`). own_steps_only: the network serves that grid alone, and other numbers of steps are a
    UserError. name: what messages call it.
    """

    def __init__(
        self,
        family: Family,
        predict: Predict,
        *,
        steps: int,
        guidance: float = 1.0,
        negative_prompt: str = "",
        grid: Sequence[float] | None = None,
        device: torch.device | str = "cpu",
        own_steps_only: bool = False,
        sampler: Sampler = "euler",
        name: str = "the model",
    ) -> None:
        self.family, self.steps, self.guidance, self.explicit_grid = family, steps, guidance, grid
        self.own_steps_only, self.name = own_steps_only, name
        self.sampler: Sampler = sampler
        self.device = torch.device(device)
        self.predict = predict
        if guidance != 1:
            negative = conditioning.to(family.encode_negative(negative_prompt or None), self.device)
            self.predict = guided(predict, guidance, negative, family.guidance_rule, family.guidance_kind)
        self._encoded: dict[str, Conditioning] = {}
        self.families: Sequence[Family] = ()  # of several sizes, at each
        self._first: FirstStep | None = None
        self.own: dict[str, Any] | None = None
        self.moves: Sampler | OwnSampler = sampler

    @property
    def sizes(self) -> list[list[int]]:
        """[height, width] in pixels of what it draws."""
        return [list(family.picture_shape[-2:]) for family in self.families or (self.family,)]

    def at_size(self, size: Sequence[int] | None) -> ImageGenerator:
        """The same model, whose weights and encoded prompts are shared, at another of its sizes (height, width); None: as it is. UserError for one
        that is not among them."""
        if size is None or list(size) == list(self.family.picture_shape[-2:]):
            return self
        if list(size) not in self.sizes:
            made = ", ".join(f"{height}x{width}" for height, width in self.sizes)
            raise UserError(f"--size: {size[0]}x{size[1]}, but {self.name} was made for {made} (height x width)")
        other = copy.copy(self)
        other.family = (self.families or (self.family,))[self.sizes.index(list(size))]
        return other

    def with_own_sampler(self) -> ImageGenerator:
        """The same student, drawn as it is made for where no stock pipeline does: `fixed_noise` goes back to the first noise between the steps
        (Lee et al. 2024, arXiv:2405.20320, section 4.3), `linear_windows` is PeRFlow's (windows.py). Itself where it is made for a stock sampler."""
        if self.own is None:
            return self
        drawn = copy.copy(self)
        drawn.moves = self.own["name"]
        return drawn

    def why_not_own(self, steps: int) -> str | None:
        """What its own sampler lacks at so many steps; None where it can be had."""
        if self.own is not None and self.own["name"] == "fixed_noise" and steps == 1:
            return "a student of one step does not come back to its noise"
        edges = [] if self.own is None else self.own.get("edges", [])
        if edges and not begin_at(self.times(steps), edges):
            return f"{steps} step{'s' * (steps != 1)} do not stop at the ends of its windows, {[round(edge, 4) for edge in edges]}"
        return None

    def with_first_step(self, teacher: ImageGenerator, steps: int) -> ImageGenerator:
        """The same student with its first evaluation replaced by its teacher (Gandikota & Bau 2025, arXiv:2503.10637): no training.

        Few-step students settle structure, and lose diversity, in that step. From the same noise the teacher, with its own generator's
        guidance (the paper finds little or none best), takes `steps` steps of its probability-flow ODE down to the student's second
        time (`timesteps.down_to`), and the student goes on from there. They are the steps that every teacher takes here: Euler, which on
        VP and TrigFlow means DDIM. The paper hands over at the teacher's node nearest to the student's second time; here at that time.
        UserError for less than one step and for a teacher whose latents or path are not the student's, and, when drawing, for a student
        of one step, which would have nothing left to do.
        """
        if steps < 1:
            raise UserError(f"--first-step-from-teacher: the teacher takes 1 step or more, got {steps}")
        if self.moves == "linear_windows":
            raise UserError("--first-step-from-teacher: hands over between the lines of linear_windows; draw with --native")
        theirs, ours = ((family.path, family.latent.shape) for family in (teacher.family, self.family))
        if theirs != ours:
            raise UserError(f"--first-step-from-teacher: the teacher has latents {theirs[1]} on {theirs[0]}, the student {ours[1]} on {ours[0]}")
        combined = copy.copy(self)
        combined._first = FirstStep(teacher, steps)
        return combined

    def times(self, steps: int | None = None) -> Tensor:
        """The grid (N,), fp64 path times; an explicit grid serves its own number of steps only."""
        steps = steps or self.steps
        if self.own_steps_only and steps != self.steps:
            raise UserError(f"--steps: {steps}, but this student was made for {self.steps}: its second time is part of its weights; train another")
        return self.family.sampling_times(steps, self.explicit_grid if steps == self.steps else None, self.sampler)

    def times_after_first(self, steps: int | None = None) -> Tensor:
        """The grid without its first time, (N - 1,): what `with_first_step` leaves to the student. UserError where that is nothing."""
        times = self.times(steps)
        if len(times) < 2:
            raise UserError("--first-step-from-teacher: a student that takes 1 step has none left after the teacher's; it needs --steps 2 or more")
        return times[1:]

    @torch.no_grad()
    def latents(self, prompts: Sequence[str], seeds: Sequence[int], steps: int | None = None) -> Tensor:
        """Latents (B, *shape) of one sample a (prompt, seed) pair."""
        if self.moves != self.sampler and (why_not := self.why_not_own(steps or self.steps)):
            raise UserError(f"--steps: {self.moves}, but {why_not}; draw with --native, or other steps")
        draws = SeededDraws(seeds, self.device)
        noise = draws.normal("noise", self.family.latent.shape)
        if self._first is None:
            times, start = self.times(steps), None
        else:
            teacher, count = self._first
            times = self.times_after_first(steps)
            way = timesteps.down_to(times[0].item(), count, t_max=teacher.family.path.t_max, shift=teacher.family.shift)
            start = teacher._partly_denoised(noise, prompts, way).to(self.device)
        times, cond = times.to(self.device), self.conditioning(prompts)
        if self.moves != "linear_windows":
            renoise: Renoise = "fixed" if self.moves == "fixed_noise" else self.moves
            return few_step(self.predict, noise, times, cond, draws, renoise=renoise, start=start)
        assert self.own is not None and start is None, "a handed-over sample is on the path, and not on a window's line"
        return through_windows(self.predict, noise, times, self.own["edges"], cond, kind=self.family.kind)

    def _partly_denoised(self, noise: Tensor, prompts: Sequence[str], times: Tensor) -> Tensor:
        """Samples (B, *shape) at times[-1] after evaluations at the times before it."""
        return walk(self.predict, noise.to(self.device), times.to(self.device), self.conditioning(prompts), renoise="euler")

    def __call__(self, prompts: Sequence[str], seeds: Sequence[int], steps: int | None = None) -> Tensor:
        """Pixels (B, 3, H, W) fp32 in [0, 1], on the CPU. NotFinite where a picture is none."""
        latents = self.latents(prompts, seeds, steps)
        pixels = self.family.decode_latents(latents).cpu()
        self._require_finite(latents.cpu(), pixels)
        return pixels

    def _require_finite(self, latents: Tensor, pixels: Tensor) -> None:
        """latents (B, *shape) and pixels (B, 3, H, W) of the same pictures; a decoder's clamp may hide what the latents show."""
        from_network, broken = (~each.isfinite().flatten(1).all(1) for each in (latents, pixels))
        if bool(from_network.any()):
            raise NotFinite(
                f"{int(from_network.sum())} of {len(latents)} pictures of {self.name} are not finite: its network is damaged or overflows"
            )
        if bool(broken.any()):
            what = "its network's latents are finite, so its decoder (VAE) is damaged or overflows"
            raise NotFinite(f"{int(broken.sum())} of {len(pixels)} pictures of {self.name} are not finite; {what}")

    def conditioning(self, prompts: Sequence[str]) -> Conditioning:
        """Conditioning (B, ...); each distinct prompt is encoded once in this object's life."""
        missing = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._encoded]
        if missing:
            rows = self._encode(missing)
            self._encoded |= {prompt: conditioning.select(rows, torch.tensor([i])) for i, prompt in enumerate(missing)}
        return conditioning.cat([self._encoded[prompt] for prompt in prompts])

    def _encode(self, prompts: list[str]) -> Conditioning:
        return conditioning.to(self.family.encode_prompts(prompts), self.device)


ADAPTER_FILE = "pytorch_lora_weights.safetensors"  # unless told this name, diffusers looks for a pickle


def generate_pictures(generator: ImageGenerator, prompts: Sequence[str], seeds: Sequence[int], steps: int | None = None, batch: int = 256) -> Tensor:
    """Pictures (N, 3, H, W) in batches of `batch`."""
    parts = [generator(prompts[i : i + batch], seeds[i : i + batch], steps) for i in range(0, len(prompts), batch)]
    return torch.cat(parts)


def read_manifest(folder: Path) -> dict[str, Any]:
    """`fastgen.json` of an exported student; UserError when the folder is not one, or when what sampling needs is not in it."""
    path = folder / "fastgen.json"
    if not folder.is_dir():
        raise UserError(f"no folder {str(folder)!r}")
    if not path.is_file():
        raise UserError(f"{str(folder)!r} holds no fastgen.json, so it is not an exported student")
    manifest = records.read(path)
    version = manifest.get("format")
    if version not in range(1, FORMAT + 1) or isinstance(version, bool):
        raise UserError(f"{str(path)!r} has format {records.shown(version)}, this fastgen reads 1 to {FORMAT}")
    if version > 1:
        manifest = _as_exported(manifest, path)
    try:
        if version < FORMAT:
            records.checked(manifest, FormerStudent)
        return records.checked(upgraded(manifest), Student)
    except ValueError as error:
        raise UserError(f"{str(path)!r}: {error}; export the student again") from error


def _as_exported(manifest: dict[str, Any], path: Path) -> dict[str, Any]:
    """The content of a sealed fastgen.json; a seal of null says that somebody has edited it on purpose."""
    try:
        return unsealed(manifest) if manifest.get(SEAL, "") is not None else {key: value for key, value in manifest.items() if key != SEAL}
    except ValueError as error:
        raise UserError(f"{str(path)!r}: {error}; export the student again, or set its key {SEAL!r} to null if you changed it") from error


def check_student(folder: Path, manifest: dict[str, Any]) -> None:
    """UserError unless the files of a student are those that were exported, read anew. The card and other files at its top may change."""
    recorded = manifest.get("sha256", {})
    check_files(folder, recorded, "exported")
    places = {name.partition("/")[0] for name in recorded if "/" in name}
    more = [name for name in file_names(folder) if name.partition("/")[0] in places and name not in recorded]
    strange = [name for name in more if manifest["format"] > 1 or name.endswith(".safetensors")]  # format 1 recorded weights only
    if strange:
        raise UserError(f"cannot read {str(folder / strange[0])!r}: it is not among the files that were exported")


def check_if_exported(folder: Path) -> None:
    """`check_student` where a pipeline folder is one."""
    file = folder / "fastgen.json"
    if file.is_file() and "format" in file.read_text(encoding="utf-8", errors="replace"):
        check_student(folder, read_manifest(folder))


def load_student(folder: str | Path, *, device: torch.device | str = "cpu", teacher_dir: str | Path | None = None) -> ImageGenerator:
    """An exported student (full weights or LoRA folder, one network or several experts) with the settings of its fastgen.json.

    teacher_dir: where an adapter's teacher is, unless `teacher_source` finds it. UserError unless every file is as it was exported, and
    an adapter's teacher as it was.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    check_student(folder, manifest)
    return open_student(folder, manifest, device=device, teacher_dir=teacher_dir)


def open_student(
    folder: Path,
    manifest: dict[str, Any],
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    teacher_dir: str | Path | None = None,
) -> ImageGenerator:
    """`load_student` for files that have been checked; dtype: of the networks."""
    family = student_family(folder, manifest, teacher_dir)
    families = family.at_sizes([each["size"] for each in manifest["sizes"]]) if manifest.get("sizes") else []
    family = families[0] if families else family
    experts = manifest.get("experts", [{"end": 0.0, "where": ""}])
    load = _load_adapters if manifest["weights"] == "lora" else _load_networks
    denoisers = load(family, folder, [expert["where"] for expert in experts])
    predictors = [Predictor(denoiser.to(dtype).to(device), family) for denoiser in denoisers]
    student = ImageGenerator(
        family,
        predictors[0] if len(predictors) == 1 else Experts(predictors, [expert["end"] for expert in experts]),
        steps=manifest["steps"],
        guidance=manifest["guidance"],
        negative_prompt=manifest["teacher"]["negative_prompt"],
        grid=manifest["explicit_grid"],
        device=device,
        own_steps_only=manifest.get("own_steps_only", False),
        sampler=manifest["sampler"],
        name=f"student {str(folder)!r}",
    )
    student.own = manifest.get("own_sampler")
    student.families = families
    return student


def student_family(folder: Path, manifest: dict[str, Any], teacher_dir: str | Path | None = None) -> Family:
    """A student's family as its pictures are drawn; no network is loaded."""
    options = manifest["options"]
    if manifest["weights"] == "lora":
        source, revision = teacher_source(folder, manifest["teacher"], teacher_dir)
        return find_family(source, revision=revision, lora=teacher_lora(folder, manifest["teacher"]), **options)
    # Its own scheduler says the shift, and for a student on explicit times there is none.
    return find_family(folder, **{key: value for key, value in options.items() if key != "shift"})


def _load_adapters(family: Family, folder: Path, places: Sequence[str]) -> list[Denoiser]:
    """The adapters in `places` below `folder`, on one network."""
    backbone: Any = family.load_backbone()
    names = [place or "student" for place in places]
    for place, name in zip(places, names, strict=True):
        with loading(folder / place / ADAPTER_FILE), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Already found a `peft_config`")  # several on one network are meant
            backbone.load_lora_adapter(folder / place, prefix=family.component, weight_name=ADAPTER_FILE, adapter_name=name)
    return [Denoiser(backbone, family, adapter=name) for name in names]


def _load_networks(family: Family, folder: Path, places: Sequence[str]) -> list[Denoiser]:
    """The pipeline's own network, and those in the other `places` below `folder`."""
    first: Any = family.load_backbone()
    networks = [first]
    for place in places[1:]:
        with loading(folder / place):
            networks.append(load_network(type(first), folder, place))
    return [Denoiser(network, family) for network in networks]


def load_teacher_of(
    student: str | Path,
    *,
    guidance: float | None = None,
    size: Sequence[int] | None = None,
    device: torch.device | str = "cpu",
    teacher_dir: str | Path | None = None,
) -> ImageGenerator:
    """The teacher that an exported student's fastgen.json names (`teacher_source`, unless it is in `teacher_dir`), with the options
    that the student's was loaded with; guidance: by default its own there; size: one of the student's, by default its first."""
    manifest = read_manifest(Path(student))
    recorded = manifest["teacher"]
    source, revision = teacher_source(Path(student), recorded, teacher_dir)
    return load_teacher(
        source,
        guidance=recorded["guidance"] if guidance is None else guidance,
        negative_prompt=recorded["negative_prompt"],
        device=device,
        revision=revision,
        lora=teacher_lora(Path(student), recorded),
        **manifest["options"] | ({} if size is None else {"size": list(size)}),
    )


def in_two_parts(family: Family) -> str | None:
    """Why a pipeline is no teacher that gives the times of sampling to two networks, such as Wan 2.2: either would teach times it does not serve."""
    second = family.second_component
    return f"a pipeline of two networks, {family.component} and {second}" if second is not None and family.has(second) else None


def load_teacher(
    source: Any,
    *,
    family: str = "auto",
    steps: int | None = None,
    guidance: float | None = None,
    negative_prompt: str = "",
    device: torch.device | str = "cpu",
    **options: Any,
) -> ImageGenerator:
    """A teacher: `fastgen:digits` or `fastgen:scenes`, a hub id (at a `revision`), a diffusers folder or a live pipeline; steps and guidance
    default to its own. options: as in the recipe's teacher block."""
    found = teacher_family(source, family, guidance, **options)
    return ImageGenerator(
        found,
        Predictor(Denoiser(found.load_backbone().to(device), found), found),
        steps=steps or found.own_call["num_inference_steps"],
        guidance=found.own_call["guidance_scale"] if guidance is None else guidance,
        negative_prompt=negative_prompt,
        device=device,
        sampler=found.samplers[0],
        name=f"teacher {_named(source)}" if isinstance(source, (str, Path)) else _named(source),
    )


def teacher_family(source: Any, family: str = "auto", guidance: float | None = None, **options: Any) -> Family:
    """The family of a teacher as `load_teacher` takes it, with no network loaded; UserError for what cannot teach."""
    if isinstance(source, (str, Path)) and (reason := cannot_teach(expanded(source))):
        raise UserError(f"{str(source)!r} is {reason}, which cannot teach yet; load_student loads it")
    if guidance is not None and guidance < 1:
        raise UserError(f"guidance: {guidance:g}; allowed: 1 (none) and more, as in diffusers")
    found = find_family(source, family, **options)
    if reason := in_two_parts(found):
        raise UserError(f"{_named(source)} is {reason}, which cannot teach yet")
    if found.exportable and isinstance(source, (str, Path)):
        folder = resolve_source(source, options.get("revision"))
        check_if_exported(folder)
        if guidance is not None:
            check_guidance(str(source), folder, guidance, key="guidance")
    return found


def _named(source: Any) -> str:
    return repr(str(source)) if isinstance(source, (str, Path)) else f"the live {type(source).__name__}"
