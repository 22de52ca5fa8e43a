"""A student as an ordinary diffusers folder (or LoRA folder), and the proof that plain diffusers draws what we draw.

The folder holds native classes only: the teacher's pipeline with the student's network and the scheduler whose grid the student
was trained on. What a stock call must be passed stands in fastgen.json["call"] and in the model card; in our own words it says the same beside that.

A student of several experts fills both networks of a pipeline that has two and changes between them by itself. On any other pipeline,
and for more experts than two, the pipeline holds the first and `expert_2/`, ... the others, and the call changes them between steps:
every pipeline reads its network anew at each step, so this form needs no exception. Adapters are `expert_1/`, `expert_2/`, ...
"""

from __future__ import annotations

import copy
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

import fastgen
from fastgen import adapter_files, card, comfy
from fastgen.denoiser import Denoiser
from fastgen.errors import UserError
from fastgen.families import draws_singly, resolve_source
from fastgen.families.base import Family
from fastgen.files import PARTIAL, publish, recover, share, write_atomically, writing
from fastgen.fingerprints import file_hashes, file_names, sealed
from fastgen.generator import ImageGenerator, check_student, open_student, read_manifest
from fastgen.manifest import FORMAT, Sampler
from fastgen.portable import forget_origins, portable, source_name
from fastgen.provenance import teacher_source
from fastgen.roles import Role, RoleSpec
from fastgen.sampling import Experts
from fastgen.surgery import lora
from fastgen.surgery.held import is_held, release
from fastgen.surgery.moe import expert_layers, stored

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
TOLERANCE = 1e-5  # of fp32
# Of half precision, in which two programs agree no better than a layer's rounding: fp16 keeps eleven bits, bf16 eight.
_TOLERANCES = {"fp32": TOLERANCE, "fp16": 2e-2, "bf16": 1e-1}


@dataclass(frozen=True)
class StudentInfo:
    """What an export records beside the weights."""

    method: str
    steps: int
    grid: Sequence[float] | None  # explicit times; None for the scheduler's own
    guidance: float  # of the student's own sampling; 1 is none
    teacher: dict[str, Any]  # pretrained, guidance, negative_prompt, and where they are known revision, sha256 and license
    prompts: Sequence[str]  # examples, for the card and for verification
    recipe: dict[str, Any]
    sampler: Sampler = "euler"
    own_steps_only: bool = False  # the network is right at the times of its own grid alone; `export_student` finds out
    unfinished: dict[str, dict[str, int]] = field(default_factory=dict)  # {role: {step, of}} where training was not over
    own_sampler: dict[str, Any] | None = None  # that it is made for beside, and no pipeline has (`manifest.Beside`)
    families: Sequence[Family] = ()  # of a student of several sizes, the family at each; the one that is exported is the first
    smaller: dict[str, Any] | None = None  # what it has of its teacher, where that is not all (`shrink.summary`)
    sparse: dict[str, Any] | None = None  # what it has of experts, where it has any (`moe.conversion.summary`)


class Expert(NamedTuple):
    """A network of a student, and the path time that its share of sampling ends at: 0 for the last."""

    role: Role
    end: float = 0.0


def export_student(student: Role | Sequence[Expert], family: Family, info: StudentInfo, output: Path, *, dtype: str = "fp32") -> Path:
    """Write the student's whole pipeline to `output`, which appears only when complete; student: one role, or experts from noise to data.

    Scalar inputs are folded into the time embedding for good. So is a single adapter merged; several share one network, and each is
    merged into a copy. Where the network holds its weights narrow, adapters are merged into the teacher's own, loaded anew, or, where it is not the
    teacher's, into what was held.
    """
    experts = _experts(student)
    info = replace(info, own_steps_only=any("second_time" in expert.role.spec.inputs for expert in experts))
    times = family.sampling_times(info.steps, info.grid, info.sampler)
    shares, places = _shares(experts, times), _places(family, len(experts))
    boundary = _boundary(times, shares) / family.path.t_max if family.second_component in places else None

    def network(k: int) -> nn.Module:
        denoiser = experts[k].role.denoiser
        if denoiser.adapter is not None and is_held(denoiser.backbone):
            denoiser = _released(denoiser) if experts[k].role.own_base else _in_full(denoiser)
        elif denoiser.adapter is not None and len(experts) > 1:
            denoiser = _copied(denoiser)
        return _plain_network(denoiser, times[shares[k]])

    def write(folder: Path) -> None:
        pipeline = family.load_pipeline(network(0), family.sampling_scheduler(info.steps, info.grid, info.sampler))
        if family.second_component is not None:
            pipeline.register_modules(**{family.second_component: None if boundary is None else network(1)})
            pipeline.register_to_config(boundary_ratio=boundary)
        _converted(pipeline, DTYPES[dtype]).save_pretrained(folder, safe_serialization=True)
        for k, place in enumerate(places):
            part: Any = getattr(pipeline, place, None)
            if place not in (family.component, family.second_component):
                part = _in_dtype(network(k), DTYPES[dtype])
                part.save_pretrained(folder / place, safe_serialization=True)
            if expert_layers(part):
                stored.write_beside(folder / place, part, index=folder / "model_index.json" if hasattr(pipeline, place) else None)
        _load_encoders_as_fp32(folder)
        forget_origins(folder)

    ends = [expert.end for expert in experts] if boundary is None else [boundary * family.path.t_max, 0.0]
    division = _division(ends, shares, places) | ({} if boundary is None else {"boundary_ratio": boundary})
    return _publish(output, write, lambda folder: _manifest(folder, info, family, "full", dtype, division))


def _experts(student: Role | Sequence[Expert]) -> list[Expert]:
    return [Expert(student)] if isinstance(student, Role) else list(student)


def _shares(experts: Sequence[Expert], times: Tensor) -> list[list[int]]:
    """Indices of the times (N,) at which each expert is evaluated, as our sampler decides it."""
    divided = Experts([expert.role.predictor for expert in experts], [expert.end for expert in experts])
    shares = [[i for i, t in enumerate(times.tolist()) if divided.at(t) is own] for own in divided.predictors]
    assert all(shares), "every expert serves a step of the grid"
    return shares


def _places(family: Family, count: int) -> list[str]:
    """Where each of `count` whole experts lies below the export's folder."""
    if count == 2 and family.second_component is not None:
        return [family.component, family.second_component]
    return [family.component, *(f"expert_{k}" for k in range(2, count + 1))]


def _boundary(times: Tensor, shares: Sequence[Sequence[int]]) -> float:
    """A path time halfway between the last of the first expert's times and the first of the second's, so that neither rounding nor
    whether the boundary itself is high or low (pipelines say high, our sampler low) can matter."""
    return (times[shares[0][-1]].item() + times[shares[1][0]].item()) / 2


def _division(ends: Sequence[float], shares: Sequence[Sequence[int]], places: Sequence[str]) -> dict[str, Any]:
    """What fastgen.json says of several experts; nothing of one. end: the path time down to which each serves; steps: of the student's
    own grid, from 0; where: its folder."""
    rows = [{"end": end, "steps": list(share), "where": place} for end, share, place in zip(ends, shares, places, strict=True)]
    return {"experts": rows} if len(rows) > 1 else {}


def _copied(denoiser: Denoiser) -> Denoiser:
    return Denoiser(copy.deepcopy(denoiser.backbone), denoiser.family, adapter=denoiser.adapter, inputs=denoiser.inputs)


def _released(denoiser: Denoiser) -> Denoiser:
    """The same student in layers that weights can be merged into: those of a base that is in no folder, as they were read in training."""
    copied = _copied(denoiser).to("cpu")
    release(copied.backbone)
    return copied


def _in_full(denoiser: Denoiser) -> Denoiser:
    """The same student on the teacher's own weights, its adapter merged; on the CPU, where networks are loaded."""
    assert denoiser.adapter is not None
    network = denoiser.family.load_backbone()
    lora.merge_into(network, denoiser.backbone, denoiser.adapter)
    return Denoiser(network, denoiser.family, inputs=copy.deepcopy(denoiser.inputs)).to("cpu")


def _plain_network(denoiser: Denoiser, times: Tensor) -> nn.Module:
    """The denoiser's network, turned into the plain architecture for good; times: (N,) path times at which it has to be right."""
    if denoiser.adapter is not None:
        lora.merge(denoiser.backbone, denoiser.adapter)
    denoiser.fold_inputs(times)
    return denoiser.backbone


def _converted(pipeline: Any, dtype: torch.dtype) -> Any:
    """The pipeline in `dtype`. Modules that change are copies, because the role or a live teacher goes on using them."""
    modules = {name: module for name, module in pipeline.components.items() if isinstance(module, nn.Module)}
    changed = {name: converted for name, module in modules.items() if (converted := _in_dtype(module, dtype)) is not module}
    pipeline.register_modules(**changed)
    return pipeline


def _in_dtype(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The module itself where it is in `dtype` already, else a copy. What diffusers loads in fp32 in any case is fp32 here too."""
    kept = set(getattr(module, "_keep_in_fp32_modules", None) or ()) if type(module).__module__.startswith("diffusers.") else set()
    wanted = {name: torch.float32 if kept & set(name.split(".")) else dtype for name, _ in module.named_parameters()}
    if all(parameter.dtype == wanted[name] for name, parameter in module.named_parameters()):
        return module
    changed = copy.deepcopy(module)
    for name, tensor in [*changed.named_parameters(), *changed.named_buffers()]:
        if tensor.is_floating_point():
            tensor.data = tensor.data.to(torch.float32 if kept & set(name.split(".")) else dtype)
    return changed


def _load_encoders_as_fp32(folder: Path) -> None:
    """Without a dtype argument diffusers loads its own networks in fp32 but transformers' in the dtype of their config.json, and
    the two do not work together. So a plain `from_pretrained` of a half-precision student gets fp32 everywhere."""
    for path in folder.glob("*/config.json"):
        config = json.loads(path.read_text(encoding="utf-8"))
        if "dtype" in config:
            path.write_text(json.dumps(config | {"dtype": "float32"}, indent=2) + "\n", encoding="utf-8")


def export_lora(student: Role | Sequence[Expert], family: Family, info: StudentInfo, output: Path, *, for_comfy: bool = False) -> Path:
    """Write the student's adapter alone, or its experts' adapters, with the scheduler that goes with them; they load on the plain
    teacher pipeline. for_comfy: and the same for other programs. UserError where adapters cannot hold the student."""
    experts = _experts(student)
    tuned = all(expert.role.denoiser.adapter is not None for expert in experts)
    reshaped = "student.moe" if info.sparse else "student.shrink" if info.smaller else None
    check_lora([expert.role.spec for expert in experts], family, tuned=tuned, method=info.method, reshaped=reshaped)
    scheduler = family.sampling_scheduler(info.steps, info.grid, info.sampler)
    pipeline = family.load_pipeline(experts[0].role.denoiser.backbone, scheduler)
    places = [f"expert_{k}" for k in range(1, len(experts) + 1)] if len(experts) > 1 else [""]
    told = replace(info, teacher=adapter_files.with_files(info.teacher))
    division = _division([expert.end for expert in experts], _shares(experts, family.sampling_times(info.steps, info.grid, info.sampler)), places)

    def write(folder: Path) -> None:
        for expert, place in zip(experts, places, strict=True):
            adapter_files.save(type(pipeline), family, expert.role, folder / place)
        scheduler.save_pretrained(folder / "scheduler")
        adapter_files.save_teachers(family, folder)
        if for_comfy:
            stated = info.teacher.get("license", {})
            license = stated.get("license_name") or stated.get("license")
            more["comfyui"] = comfy.write(folder, places, family, method=info.method, steps=info.steps, guidance=info.guidance, license=license)

    more = division | _base(info, scheduler)
    return _publish(output, write, lambda folder: _manifest(folder, told, family, "lora", "fp32", more))


def check_lora(students: Iterable[RoleSpec], family: Family, *, tuned: bool, method: str, reshaped: str | None = None, key: str = "--lora") -> None:
    """UserError where adapters alone cannot hold a student of these roles. tuned: whether they have adapters; reshaped: the recipe key by which they
    belong to another network than the teacher's; key: what asks for them."""
    way_on = f"export it without {key}" if key.startswith("--") else "`export.weights: full` merges it"
    if not family.loads_lora:
        raise UserError(f"{key}: {family.pipeline_classes[0]} loads no LoRA files; {way_on}")
    if not tuned:
        raise UserError(f"{key}: a student trained with student.tune: full has no adapter; {way_on.replace('merges it', 'exports it whole')}")
    if reshaped is not None:
        raise UserError(f"{key}: the student's adapter belongs to a network that is not its teacher's ({reshaped}); {way_on}")
    for inputs in (spec.inputs for spec in students if spec.inputs):
        what = inputs[0].replace("_", " ")
        raise UserError(f"{key}: {method} gives the student a {what} input, which an adapter cannot hold; {way_on}")
    if family.second_component is not None and family.has(family.second_component):
        raise UserError(
            f"{key}: the teacher's {family.pipeline_classes[0]} divides sampling between two networks, and the student's adapters belong to one; "
            f"{way_on}"
        )


def _publish(output: Path, write: Callable[[Path], None], describe: Callable[[Path], dict[str, Any]]) -> Path:
    """Write into a sibling folder and rename it to `output`; a failure leaves what was there, and no half student."""
    target = Path(os.path.realpath(output))
    partial = target.with_name(PARTIAL + target.name)
    with writing(output, "--output"):
        recover(target)
        try:
            partial.mkdir(parents=True)
            write(partial)
            manifest = describe(partial)
            write_atomically(partial / "README.md", card.model_card(manifest))
            write_atomically(partial / "fastgen.json", json.dumps(sealed(manifest), indent=1) + "\n")
            share(partial)
            publish(partial, target)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return output


def _manifest(folder: Path, info: StudentInfo, family: Family, weights: str, dtype: str, more: dict[str, Any]) -> dict[str, Any]:
    """more: what only some students have."""
    negative = info.teacher["negative_prompt"] or None

    def call(family: Family) -> dict[str, Any]:
        return family.call_arguments(info.steps, info.guidance, info.grid) | family.negative_arguments(negative, info.guidance)

    def grid(family: Family) -> list[float]:
        return family.sampling_times(info.steps, info.grid, info.sampler).tolist()

    sized = [{"size": family.options["size"], "grid": grid(family), "call": call(family)} for family in info.families]
    loading = {key: value for key, value in family.loading_arguments.items() if weights == "lora" or key != "variant"}  # which is the teacher's
    if any(folder.glob("*/modeling_*.py")):
        loading["trust_remote_code"] = True
    return {
        "format": FORMAT,
        "weights": weights,
        "dtype": dtype,
        "method": info.method,
        "steps": info.steps,
        "grid": grid(family),
        "explicit_grid": None if info.grid is None else list(info.grid),
        "sampler": info.sampler,
        "guidance": info.guidance,
        "options": family.options,
        "inputs": family.call_inputs(list(info.prompts)[:8]),
        "own_steps_only": info.own_steps_only,
        "call": call(family),
        "pipeline": family.pipeline_classes[0],
        "teacher": info.teacher | {"pretrained": source_name(info.teacher["pretrained"])},
        **({"loading": loading} if loading else {}),
        **({"unfinished": info.unfinished} if info.unfinished else {}),
        **({"own_sampler": info.own_sampler} if info.own_sampler else {}),
        **({"sizes": sized} if sized else {}),
        **({"surgery": surgery} if (surgery := {key: of for key, of in {"shrink": info.smaller, "moe": info.sparse}.items() if of}) else {}),
        **more,
        "prompts": list(info.prompts)[:8],
        "versions": {"fastgen": fastgen.__version__, **{name: metadata.version(name) for name in ("diffusers", "torch")}},
        "sha256": file_hashes(folder, file_names(folder)),
        "recipe": portable(info.recipe),
    }


def _base(info: StudentInfo, scheduler: Any) -> dict[str, str]:
    """What plain diffusers loads an adapter's teacher from (a hub id, else the name of a folder), and the scheduler's class where it is
    another than most."""
    name = type(scheduler).__name__
    return {"base": source_name(info.teacher["pretrained"])} | ({} if name == card.SCHEDULER else {"scheduler": name})


@dataclass(frozen=True)
class Verification:
    """Largest absolute differences between plain diffusers and our sampler, and what pictures may differ by. trained_error: root mean square
    difference between pictures of the folder and of the networks that it was made of, at the worst size; None where these were not at hand."""

    grid_error: float
    picture_error: float
    pictures: int
    tolerance: float = TOLERANCE
    trained_error: float | None = None

    @property
    def passed(self) -> bool:
        return self.grid_error <= TOLERANCE and self.picture_error <= self.tolerance


# Runs in its own interpreter, in which importing fastgen fails: what users of plain diffusers get. The program is the model card's own.
_PLAIN_DIFFUSERS = """
import json, sys
sys.modules["fastgen"] = None
import numpy, torch
job = json.load(sys.stdin)
import diffusers
diffusers.utils.logging.set_verbosity_error()
batches = [(inputs, [torch.Generator().manual_seed(seed) for seed in seeds]) for inputs, seeds in job["batches"]]
exec(job["program"])
sigmas = getattr(pipe.scheduler, "sigmas", torch.zeros(0))
numpy.savez(job["output"], images=images, sigmas=sigmas.double().cpu().numpy(), timesteps=pipe.scheduler.timesteps.double().cpu().numpy())
"""

# What only changes finished pictures: a checker puts black in the place of some, and SDXL marks all where the package for it is installed.
_AS_DRAWN = """
pipe.set_progress_bar_config(disable=True)
for name in ("safety_checker", "watermark"):
    if hasattr(pipe, name):
        setattr(pipe, name, None)
"""


_Drawn = tuple[np.ndarray, np.ndarray, np.ndarray]  # pictures, timesteps, sigmas


def verify(
    folder: Path,
    *,
    seeds: Sequence[int] = (0, 1, 2, 3),
    teacher_dir: str | Path | None = None,
    device: torch.device | str = "cpu",
    dtype: str = "fp32",
    trained: Sequence[Tensor] = (),
) -> Verification:
    """Reload `folder` with plain diffusers, where importing fastgen fails, and compare its grid and pictures with ours, at every size.

    teacher_dir: as in `load_student`. device, dtype: where, and in which precision, both draw; a large network fits no other way, but half
    precision shows only gross mistakes. trained: what the student drew before it was exported, by size (`drawn_at_every_size`).
    """
    manifest = read_manifest(folder)
    check_student(folder, manifest)
    stored.check_code(folder)
    shown = [i % len(manifest["prompts"]) for i in range(len(seeds))]
    rows = [[i] for i in range(len(seeds))] if draws_singly(manifest["pipeline"], manifest["guidance"]) else [list(range(len(seeds)))]
    job = {"batches": [[card.chosen(manifest["inputs"], [shown[i] for i in some]), [seeds[i] for i in some]] for some in rows]}
    place = "" if (str(device), dtype) == ("cpu", "fp32") else f"pipe.to({str(device)!r}, {DTYPES[dtype]})\n"
    records, stock = sized(manifest), list[tuple[_Drawn, list[np.ndarray]]]()
    for each in records:
        drawn = _plain_diffusers(folder, each, job, place, teacher_dir)
        others = [_plain_diffusers(folder, each, job, place, teacher_dir, by_comfy=True)[0]] if manifest.get("comfyui") else []
        stock.append((drawn, others))
    student = open_student(folder, manifest, device=device, dtype=DTYPES[dtype], teacher_dir=teacher_dir)
    ours = drawn_at_every_size(student, manifest["prompts"], seeds)
    found = [
        _compared(folder, each, student.at_size(each["options"].get("size")), own, *drawn, dtype)
        for each, own, drawn in zip(records, ours, stock, strict=True)
    ]
    return Verification(
        max(each.grid_error for each in found),
        max(each.picture_error for each in found),
        sum(each.pictures for each in found),
        min(each.tolerance for each in found),
        worst_difference(ours, trained) if trained else None,
    )


def worst_difference(drawn: Sequence[Tensor], trained: Sequence[Tensor]) -> float:
    """The root mean square difference of pictures, by size, at the worst size (`Verification.trained_error`)."""
    return max((own - before).square().mean().sqrt().item() for own, before in zip(drawn, trained, strict=True))


def trained_error(folder: Path, trained: Sequence[Tensor], teacher_dir: str | Path | None = None) -> float:
    """What `verify` says of an exported folder and of what its networks drew before, without plain diffusers: for who exports and verifies apart."""
    manifest = read_manifest(folder)
    check_student(folder, manifest)
    return worst_difference(drawn_at_every_size(open_student(folder, manifest, teacher_dir=teacher_dir), manifest["prompts"]), trained)


def drawn_at_every_size(student: ImageGenerator, prompts: Sequence[str], seeds: Sequence[int] = (0, 1, 2, 3)) -> list[Tensor]:
    """Pictures (B, 3, H, W) of each of a student's sizes, as `verify` draws them. prompts: those of its manifest, one after the other."""
    chosen = [prompts[i % len(prompts)] for i in range(len(seeds))]
    return [student.at_size(size)(chosen, seeds) for size in student.sizes]


def sized(manifest: dict[str, Any]) -> list[dict[str, Any]]:
    """The record of a student as that of one for each of its sizes: itself where it has but one."""
    return [
        manifest | {"options": {**manifest["options"], "size": each["size"]}, "grid": each["grid"], "call": each["call"]}
        for each in manifest.get("sizes", ())
    ] or [manifest]


def _compared(
    folder: Path,
    manifest: dict[str, Any],
    student: ImageGenerator,
    pictures: Tensor,
    drawn: _Drawn,
    others: Sequence[np.ndarray],
    dtype: str,
) -> Verification:
    """What plain diffusers has drawn at one size, and with adapters for other programs, beside our pictures."""
    images, timesteps, sigmas = drawn
    family, ours = student.family, pictures.movedim(1, -1).numpy()
    stock = family.path_times(torch.from_numpy(timesteps), torch.from_numpy(sigmas)).numpy()
    if images.shape != ours.shape or len(stock) != manifest["steps"]:
        raise UserError(
            f"{str(folder)!r}: plain diffusers gives pictures {images.shape} on {len(stock)} steps, ours are {ours.shape} on {manifest['steps']}"
        )
    grid = np.array(manifest["grid"])
    grid_error = max(np.abs(stock - grid).max(), np.abs(student.times().numpy() - grid).max())
    # Pictures lie in [0, 1]: a tolerance of 1 would let anything pass.
    tolerance = min(_TOLERANCES[dtype] * family.amplification(manifest["grid"][0]), 0.3)
    return Verification(float(grid_error), float(max(np.abs(each - ours).max() for each in (images, *others))), len(ours), tolerance)


def _plain_diffusers(
    folder: Path, manifest: dict[str, Any], job: dict[str, Any], place: str, teacher_dir: str | Path | None, *, by_comfy: bool = False
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pictures, timesteps and sigmas of the stock pipeline. job: what its calls are given; place: code that moves it; by_comfy: with the adapters
    that are for other programs."""
    # One for each prompt: StableDiffusionPipeline takes no text beside a list.
    told = {key: f"[{value!r}] * len(generators)" for key, value in manifest["call"].items() if key.startswith("negative_prompt")}
    drawn = card.calling(manifest, "**inputs", generator="generators", output_type='"np"', **told)
    teacher = _teacher_folder(folder, manifest, teacher_dir) if manifest["weights"] == "lora" else ""
    start = "".join(f"    {line}\n" for line in card.starting(manifest).splitlines())
    draw = f"drawn = []\nfor inputs, generators in batches:\n{start}    drawn.append({drawn}[0])\nimages = numpy.concatenate(drawn)\n"
    program = f"{card.loading(manifest, str(folder.resolve()), teacher, comfy=by_comfy)}{place}{_AS_DRAWN}{draw}"
    with tempfile.TemporaryDirectory() as scratch:
        job = {**job, "program": program, "output": f"{scratch}/plain.npz"}
        # `-P` keeps the current folder off the path; the child needs nothing of ours.
        done = subprocess.run([sys.executable, "-P", "-c", _PLAIN_DIFFUSERS], input=json.dumps(job), capture_output=True, text=True, check=False)
        if done.returncode != 0:
            reason = (done.stderr.strip().splitlines() or ["no output"])[-1]
            raise UserError(f"{str(folder)!r} does not load and run in plain diffusers: {reason}")
        with np.load(job["output"]) as arrays:
            return arrays["images"], arrays["timesteps"], arrays["sigmas"]


def _teacher_folder(folder: Path, manifest: dict[str, Any], teacher_dir: str | Path | None) -> str:
    return str(resolve_source(*teacher_source(folder, manifest["teacher"], teacher_dir)).resolve())
