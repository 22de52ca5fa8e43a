"""The words that go with an exported student: the plain diffusers code that draws with it, and its model card, from its fastgen.json.

`verify` runs the same code, built by `loading` and `calling`. It is code, and a fastgen.json may come from anywhere: what is not
quoted here must be an identifier.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

from fastgen.errors import UserError
from fastgen.families import is_hub_id
from fastgen.generator import ADAPTER_FILE
from fastgen.printing import printable
from fastgen.surgery.moe.conversion import in_words as moe_in_words
from fastgen.surgery.shrink import in_words

# What a LoRA student's scheduler is where its fastgen.json does not name another.
SCHEDULER = "FlowMapEulerDiscreteScheduler"


TEACHER_LORA = "teacher_lora"  # where in an adapter's folder those of its teacher lie
_TRUST = (
    "No class of diffusers has them, so the folder brings one, in plain PyTorch, which `trust_remote_code=True` lets diffusers run; read it before."
)

TEACHER_DIR = "TEACHER_DIR"  # stands for the folder of a teacher that is not on the hub


def call_snippet(manifest: dict[str, Any], folder: str = "STUDENT_DIR") -> str:
    """Python that draws a picture with plain diffusers."""
    drawn = calling(manifest, _inputs(chosen(manifest["inputs"], [0])), generator="torch.Generator().manual_seed(0)")
    made = "video = {}.frames[0]" if manifest["options"].get("frames") else "image = {}.images[0]"
    return f"{loading(manifest, folder)}{made.format(drawn)}\n"


def chosen(inputs: dict[str, Any], rows: Sequence[int]) -> dict[str, Any]:
    """The inputs of some of the prompts; a number says for how many."""
    return {key: [value[i] for i in rows] if isinstance(value, list) else len(rows) for key, value in inputs.items()}


def _inputs(inputs: dict[str, Any]) -> str:
    """The arguments that say what to draw; a single text stands by itself."""
    alone = {key: value[0] if isinstance(value, list) and len(value) == 1 and isinstance(value[0], str) else value for key, value in inputs.items()}
    return ", ".join(f"{_identifier(key)}={value!r}" for key, value in alone.items())


def loading(manifest: dict[str, Any], folder: str, teacher: str = "", *, comfy: bool = False) -> str:
    """Python that loads the student as `pipe`; teacher: the folder of an adapter's teacher, else its hub id, else TEACHER_DIR; comfy: by the
    files that are for other programs. Where callers
    change experts themselves it also defines `switch`, which does so between steps, and starts with the first; UserError for names that are
    no identifiers."""
    told = "".join(f", {_identifier(key)}={value!r}" for key, value in manifest.get("loading", {}).items())
    if manifest["weights"] == "lora":
        loaded = _load_adapters(manifest, folder, teacher, told, comfy=comfy)
    else:
        loaded = f"import torch\nfrom diffusers import DiffusionPipeline\n\npipe = DiffusionPipeline.from_pretrained({_quoted(folder)}{told})\n"
    return loaded + (_switching(manifest, folder) if switched_by_caller(manifest) else "")


def calling(manifest: dict[str, Any], inputs: str, **arguments: str) -> str:
    """The call of `pipe` with the student's own arguments. inputs: Python arguments that say what to draw; arguments: expressions."""
    own = {_identifier(key): repr(value) for key, value in manifest["call"].items()}
    if switched_by_caller(manifest):
        own["callback_on_step_end"] = "switch"
    lines = "".join(f"    {key}={value},\n" for key, value in {**own, **arguments}.items())
    return "pipe(\n" + (f"    {inputs},\n" if inputs else "") + f"{lines})"


def switched_by_caller(manifest: dict[str, Any]) -> bool:
    """Whether a plain call must be told to change experts: pipelines with a boundary of their own do it by themselves."""
    return "experts" in manifest and "boundary_ratio" not in manifest


def _load_adapters(manifest: dict[str, Any], folder: str, teacher: str, told: str, *, comfy: bool) -> str:
    pipeline, scheduler, place = _identifier(manifest["pipeline"]), _identifier(manifest.get("scheduler", SCHEDULER)), _quoted(folder)
    adapters = [*_teachers(manifest, place), *_students(manifest, place, comfy=comfy)]
    revision = None if teacher else manifest["teacher"].get("revision")
    base = teacher or (manifest["base"] if is_hub_id(manifest["base"]) else TEACHER_DIR)
    commit = "" if revision is None else f"revision={_quoted(revision)}, "
    # A shift is stated for teachers whose scheduler may not even load.
    without = "scheduler=None, " if manifest["options"].get("shift") is not None else ""
    return (
        f"import torch\nfrom diffusers import {pipeline}, {scheduler}\n\n"
        f"pipe = {pipeline}.from_pretrained({_quoted(base)}, {commit}{without}torch_dtype=torch.float32{told})\n"
        + "".join(f"pipe.load_lora_weights({arguments})\n" for arguments in adapters)
        + ("" if "experts" in manifest or len(adapters) == 1 else f"pipe.set_adapters({_together(manifest, _quoted(_STUDENT))})\n")
        + f'pipe.scheduler = {scheduler}.from_pretrained({place}, subfolder="scheduler")\n'
    )


_STUDENT = "student"


def teacher_adapter(place: int) -> str:
    """What one of a teacher's adapters is called on the pipeline."""
    return f"teacher_{place + 1}"


def _teachers(manifest: dict[str, Any], folder: str) -> list[str]:
    """The arguments that load the teacher's own adapters; folder: the student's, as Python."""
    loads = []
    for place, adapter in enumerate(manifest["teacher"].get("lora", ())):
        subfolder, _, file = str(adapter.get("file")).rpartition("/")
        named = f"adapter_name={_quoted(teacher_adapter(place))}"
        loads.append(f"{folder}, subfolder={_quoted(subfolder)}, weight_name={_quoted(file)}, {named}")
    return loads


def _students(manifest: dict[str, Any], folder: str, *, comfy: bool) -> list[str]:
    """The arguments that load the student's own adapters, by name where there are others."""
    names = [_quoted(expert["where"]) for expert in manifest["experts"]] if "experts" in manifest else []
    if comfy:
        places = [file.rpartition("/") for file in manifest["comfyui"]["files"]]
        loads = [f"{folder}, subfolder={_quoted(place)}, weight_name={_quoted(file)}" for place, _, file in places]
    else:
        loads = [f'{folder}, subfolder={name}, weight_name="{ADAPTER_FILE}"' for name in names] or [folder]
    if not names and manifest["teacher"].get("lora"):
        names, loads = [_quoted(_STUDENT)], loads if comfy else [f'{folder}, weight_name="{ADAPTER_FILE}"']
    return [f"{load}, adapter_name={name}" for load, name in zip(loads, names, strict=True)] if names else loads


def _together(manifest: dict[str, Any], own: str) -> str:
    """The arguments of `set_adapters` for the teacher's and one of the student's, the Python expression `own`."""
    lora = manifest["teacher"].get("lora", ())
    if not lora:
        return own
    names = ", ".join([*(_quoted(teacher_adapter(place)) for place in range(len(lora))), own])
    return f"[{names}], [{', '.join([*(repr(float(adapter['weight'])) for adapter in lora), '1.0'])}]"


# A pipeline reads its network anew at each step, and calls back after it: the next step is `step + 1`.
_SWITCHING = """
experts = {{
{experts}}}  # by the first step of each


def switch(pipe, step, timestep, kwargs):
    if step + 1 in experts:
        {after}
    return kwargs


{before}  # before each call
"""


def _switching(manifest: dict[str, Any], folder: str) -> str:
    first, *others = manifest["experts"]
    if manifest["weights"] == "lora":
        experts = [_quoted(expert["where"]) for expert in manifest["experts"]]
    else:
        network = f"pipe.{_identifier(first['where'])}"
        load = f"type({network}).from_pretrained({_quoted(folder)}, subfolder={{}})"
        experts = [network, *(load.format(_quoted(expert["where"])) for expert in others)]
    starts = [int(expert["steps"][0]) for expert in manifest["experts"]]
    lines = "".join(f"    {start}: {expert},\n" for start, expert in zip(starts, experts, strict=True))
    return _SWITCHING.format(experts=lines, after=_use(manifest, "experts[step + 1]"), before=starting(manifest))


def _use(manifest: dict[str, Any], expert: str) -> str:
    """Python that has `pipe` go on with an expert, which is a Python expression."""
    if manifest["weights"] == "lora":
        return f"pipe.set_adapters({_together(manifest, expert)})"
    return f"pipe.{_identifier(manifest['experts'][0]['where'])} = {expert}"


def starting(manifest: dict[str, Any]) -> str:
    """Python that comes before each call: where callers change experts themselves, the first is to begin."""
    return _use(manifest, "experts[0]") if switched_by_caller(manifest) else ""


def _quoted(text: str) -> str:
    """A Python string literal, on one line."""
    return printable(json.dumps(text, ensure_ascii=False))


def _code(text: str) -> str:
    """A Markdown span in which nothing is markup."""
    fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence} {printable(text)} {fence}" if "`" in text else f"`{printable(text)}`"


def _identifier(name: str) -> str:
    if not name.isidentifier():
        raise UserError(f"fastgen.json names {name!r}, which no exported student does; export the student again")
    return name


def _task(manifest: dict[str, Any]) -> str:
    """The hub's word for what it does; pictures of classes have none of their own."""
    if manifest["options"].get("frames"):
        return "text-to-video"
    return "text-to-image" if "prompt" in manifest["inputs"] else "unconditional-image-generation"


def model_card(manifest: dict[str, Any]) -> str:
    """README.md of an export: hub metadata, what it is, how it must be called."""
    teacher, guidance = manifest["teacher"], manifest["guidance"]
    relation = "adapter" if manifest["weights"] == "lora" else "finetune"
    on_hub = is_hub_id(teacher["pretrained"])  # local and bundled teachers have no page to link to
    header = [
        "---",
        "library_name: diffusers",
        f"pipeline_tag: {_task(manifest)}",
        *([f"base_model: {_quoted(teacher['pretrained'])}", f"base_model_relation: {relation}"] if on_hub else []),
        *(f"{_identifier(key)}: {_quoted(value)}" for key, value in teacher.get("license", {}).items()),
        "tags: [distillation, few-step, fastgen]" if guidance == 1 else "tags: [fastgen]",
        "---",
    ]
    guided = "without classifier-free guidance" if guidance == 1 else f"with guidance {guidance}"
    version, method = manifest["versions"]["fastgen"], manifest["method"]
    what = f"Made by fastgen {version} with {_code(method)} from {_code(teacher['pretrained'])} (guidance {teacher['guidance']})."
    if lora := teacher.get("lora"):
        what += f" {_lora_text(lora, manifest['weights'])}"
    surgery = manifest.get("surgery", {})
    if "shrink" in surgery:
        what += f" It is smaller than its teacher: {in_words(surgery['shrink'])}."
    if "moe" in surgery:
        what += f" Its feed-forward layers are mixtures of experts: {moe_in_words(surgery['moe'])}. {_TRUST}"
    if license := teacher.get("license"):
        what += f" Its licence is its teacher's: {_code(license.get('license_name') or license.get('license') or license['license_link'])}."
    how = (
        f"It samples in {manifest['steps']} network evaluation{'s' if manifest['steps'] > 1 else ''}, {guided}, at times "
        f"{[round(t, 4) for t in manifest['grid']]}. A stock pipeline call has its own defaults for steps, guidance and text length, "
        "so these arguments must be passed:"
    )
    if manifest.get("own_steps_only"):
        how = f"{how[:-1]}, and other numbers of steps give no sensible picture:"
    if own := manifest.get("own_sampler"):
        what += f" It is made for a sampler that no pipeline has, {_code(own['name'])}, which `fastgen sample` draws with; the call below is stock."
    experts = [_experts_text(manifest), ""] if "experts" in manifest else []
    unfinished = [unfinished_text(manifest), ""] if "unfinished" in manifest else []
    comfy = ["", _comfy_text(manifest)] if manifest.get("comfyui") else []
    sizes = ["", _sizes_text(manifest)] if manifest.get("sizes") else []
    base = [_base_text(teacher["pretrained"]), ""] if manifest["weights"] == "lora" and not on_hub else []
    snippet = f"```python\n{call_snippet(manifest)}```"
    return "\n".join(
        [*header, f"# {method}, {manifest['steps']}-step", "", what, "", *unfinished, *experts, *base, how, "", snippet, *sizes, *comfy, ""]
    )


def _lora_text(lora: Sequence[dict[str, Any]], weights: str) -> str:
    """The teacher's own adapters."""
    named = " and ".join(f"{_code(each['name'])} at weight {each['weight']:g} (SHA-256 {each['sha256'][:16]}…)" for each in lora)
    text = f"The teacher was tuned with the LoRA {named}"
    if weights == "full":
        return f"{text}, which is merged into these weights."
    both = "the student's adapter goes on top, so the code below loads both"
    return f"{text}; {both}. `{TEACHER_LORA}/` holds the teacher's, whose licence is its author's."


def _sizes_text(manifest: dict[str, Any]) -> str:
    """The other sizes, by what of the call differs."""
    first, lines = manifest["call"], []
    for each in manifest["sizes"]:
        told = ", ".join(
            f"{_identifier(key)}={value!r}" for key, value in each["call"].items() if key in ("height", "width") or first.get(key) != value
        )
        lines.append(f"- `{told}`, at times {[round(t, 4) for t in each['grid']]}")
    alike = all(each["grid"] == manifest["grid"] for each in manifest["sizes"])
    why = "" if alike else " Its scheduler shifts the times by the size, as the pipeline tells it, so nothing else need be passed."
    return "\n".join([f"It was trained at these sizes, and draws each with its own height and width in the same call.{why}", "", *lines])


def _comfy_text(manifest: dict[str, Any]) -> str:
    files = " and ".join(_code(file) for file in manifest["comfyui"]["files"])
    keys = "kohya's keys, by diffusers' converter" if manifest["comfyui"]["keys"] == "kohya" else "diffusers' keys"
    text = (
        f"For ComfyUI and other programs: {files} in {keys}, with `modelspec.*` metadata. diffusers reads the same pictures from it. "
        f"It belongs into `models/loras`, at strength 1, with {manifest['steps']} steps and CFG {manifest['guidance']:g}, and a sampler that "
        "steps on the times above. It was not tried in ComfyUI itself."
    )
    if manifest["teacher"].get("lora"):
        text += f" Load what lies in `{TEACHER_LORA}/` with it, at the weights above."
    return f"{text} Each expert is for its own steps alone." if "experts" in manifest else text


def _base_text(teacher: str) -> str:
    where = f" fastgen brings it, as `fastgen/assets/{teacher.removeprefix('fastgen:')}`." if teacher.startswith("fastgen:") else ""
    return f"The adapter needs its teacher: put the folder of {_code(teacher)} in place of `{TEACHER_DIR}`.{where}"


def unfinished_text(manifest: dict[str, Any]) -> str:
    """How far training had come of a student that was exported before its end."""
    parts = [f"{_code(role)} had trained {done['step']} of its {done['of']} steps" for role, done in manifest["unfinished"].items()]
    return f"Exported before the end of training: {', '.join(parts)}."


def _experts_text(manifest: dict[str, Any]) -> str:
    experts = manifest["experts"]
    shares = ", ".join(f"{_code(expert['where'])} takes {_steps_text(expert['steps'])}" for expert in experts)
    text = f"It has {len(experts)} experts, which divide the steps: {shares}. "
    if not switched_by_caller(manifest):
        return f"{text}The pipeline itself changes between them, at its `boundary_ratio` {manifest['boundary_ratio']:.4g}."
    text += (
        "The code below changes between them after these steps, so it holds for this number of steps; fastgen itself goes by time and takes any. "
        "Without it the pipeline draws every step with the same network."
    )
    return text if manifest["weights"] == "lora" else f"{text} `pipe.to` moves the first expert alone: move the others too."


def _steps_text(steps: list[int]) -> str:
    return f"step {steps[0] + 1}" if len(steps) == 1 else f"steps {steps[0] + 1} to {steps[-1] + 1}"
