"""What fastgen.json must hold: the record of an exported student, or of the teacher that comes with fastgen, which is one.

It says what a student is in our own words: `steps`, `guidance` (classifier-free guidance n + w (c - n)), `explicit_grid` (path times),
`sampler` and `options` (those of its family). `inputs` (for `prompts`) and `call` are what its pipeline's own call must be
passed, in that pipeline's argument names, and are never read back: the same name means another thing in the next pipeline. Formats 1 and 2
said some of it there alone; `upgraded` reads it.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from fastgen.records import Schema

FORMAT = 3  # 2 is sealed, 1 has hashes of weights alone
MOST_SIZES = 64  # of one student
Steps = Annotated[int, Field(ge=1, le=1000)]  # as student.steps of a recipe
Pixels = Annotated[int, Field(ge=1, le=2**16)]
Tokens = Annotated[int, Field(ge=1, le=2**20)]
Time = Annotated[float, Field(ge=0, le=1e6)]
Shift = Annotated[float, Field(gt=0, le=1e6)]
Guidance = Annotated[float, Field(ge=-1e4, le=1e4)]
Hash = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
Sampler = Literal["euler", "stochastic"]  # that stock pipelines have
OwnSampler = Literal["fixed_noise", "linear_windows"]  # that only we have, at the times of `euler`


class Options(Schema):
    """Family.options."""

    max_sequence_length: Tokens | None = None
    size: Annotated[list[Pixels], Field(min_length=2, max_length=2)] | None = None
    frames: Annotated[int, Field(ge=1, le=2**12)] | None = None
    embedded_guidance: Guidance | None = None
    shift: Shift | None = None


class _Arguments(Schema):
    max_sequence_length: Tokens | None = None
    height: Pixels | None = None
    width: Pixels | None = None
    negative_prompt: str = ""
    sigmas: list[Time] | None = None


class FormerCall(_Arguments):
    """`call` of formats 1 and 2; any of it may be missing where that is no student's."""

    num_inference_steps: Steps = 28
    guidance_scale: Guidance = 1.0


class _FormerStudentCall(_Arguments):
    num_inference_steps: Steps
    guidance_scale: Guidance


class Adapter(Schema):
    """That a teacher is tuned with. name: without the folders above it, or of the hub; file: where it lies in a student's folder."""

    name: str
    weight: Guidance
    sha256: Hash
    file: str | None = None


class Teacher(Schema):
    """shift: of formats 1 and 2, where the recipe stated one. license: as its own card states it, by the hub's keys. sha256: of the teacher as
    it taught, so with its adapters where it has some."""

    pretrained: str
    guidance: Guidance
    negative_prompt: str
    shift: Shift | None = None
    revision: str | None = None
    sha256: str | None = None
    license: dict[str, str] = Field(default_factory=dict)
    lora: list[Adapter] = Field(default_factory=list, max_length=64)


class Expert(Schema):
    end: Time
    steps: list[Annotated[int, Field(ge=0, le=1000)]]
    where: str


class Sized(Schema):
    """Of a student that draws several sizes, one of them: its own grid, and what a call of it must be passed."""

    size: Annotated[list[Pixels], Field(min_length=2, max_length=2)]
    grid: list[Time] = Field(min_length=1, max_length=1000)
    call: dict[str, Any]


_Number = Annotated[int, Field(ge=0)]


class Smaller(Schema):
    """Of a student of fewer blocks than its teacher: the places of those that it has, by the names of their lists, and how many there were."""

    init: Literal["pruned", "random"]
    kept: dict[str, list[_Number]]
    of: dict[str, _Number]
    parameters: _Number
    teacher_parameters: _Number


class Beside(Schema):
    """A sampler of ours that a student was made for; its pipeline has the stock one. edges: path times at which windows begin, and 0."""

    name: OwnSampler
    edges: list[Time] = Field(default_factory=list, max_length=1001)


class Comfy(Schema):
    """The same adapters for other programs: in whose keys, and in which files, one for each expert."""

    keys: Literal["kohya", "diffusers"]
    files: list[str] = Field(min_length=1, max_length=1000)


class Ends(Schema):
    noise: Annotated[float, Field(ge=0)]
    data: Annotated[float, Field(ge=0)]


class Sparse(Schema):
    """Of a student of experts: how many layers were split and how, and its parameters. capacity: experts a token at either end of the noise range,
    where these differ. all_experts, split_experts: of all layers, where experts were added or removed, now and at the split; removed_experts: rows
    that routers still have for those that are gone."""

    layers: _Number
    experts: _Number
    active: Annotated[float, Field(ge=0)]
    choice: Literal["token", "expert"]
    parameters: _Number
    active_parameters: _Number
    dense_parameters: _Number
    flops: _Number
    dense_flops: _Number
    capacity: Ends | None = None
    all_experts: _Number | None = None
    split_experts: _Number | None = None
    removed_experts: _Number | None = None


class Surgery(Schema):
    """What makes a student another network than its teacher: fewer blocks, or experts."""

    shrink: Smaller | None = None
    moe: Sparse | None = None


class _Record(Schema):
    weights: Literal["full", "lora"]
    steps: Steps
    grid: list[Time] = Field(min_length=1, max_length=1000)
    prompts: list[str] = Field(min_length=1)
    own_steps_only: bool = False
    experts: list[Expert] = Field(default_factory=list, max_length=1000)
    sizes: list[Sized] = Field(default_factory=list, max_length=MOST_SIZES)  # those of several, `options`, `grid` and `call` being the first's
    sha256: dict[str, Hash] = Field(default_factory=dict)
    method: str = ""
    dtype: Literal["fp32", "fp16", "bf16"] = "fp32"
    pipeline: str = ""
    base: str = ""
    scheduler: str = ""
    loading: dict[str, str | bool | None] = Field(
        default_factory=dict
    )  # what from_pretrained must be passed, of an adapter's teacher or of the student
    unfinished: dict[str, dict[str, int]] = Field(default_factory=dict)
    own_sampler: Beside | None = None
    comfyui: Comfy | None = None
    surgery: Surgery = Field(default_factory=lambda: Surgery())
    recipe: dict[str, Any] = Field(default_factory=dict)
    versions: dict[str, str] = Field(default_factory=dict)


class Exported(_Record):
    """All that describing a student takes, and calling it."""

    guidance: Guidance
    explicit_grid: list[Time] | None
    sampler: Sampler
    options: Options
    inputs: dict[str, list[Any] | int]
    call: dict[str, Any]


class Student(Exported):
    """And loading it."""

    teacher: Teacher


class FormerStudent(_Record):
    """Of formats 1 and 2."""

    call: _FormerStudentCall
    teacher: Teacher


class Pipeline(Schema):
    """Of a folder that need not be a student's."""

    format: int = 1
    steps: Steps = 1
    guidance: Guidance = 1.0
    options: Options = Options()
    own_steps_only: bool = False


class FormerPipeline(Schema):
    call: FormerCall = FormerCall()
    teacher: dict[str, Any] = Field(default_factory=dict)
    own_steps_only: bool = False


def upgraded(record: dict[str, Any]) -> dict[str, Any]:
    """A record of any format in the words of the newest, as far as it says them; `format` stays."""
    if record.get("format", 1) >= FORMAT:
        return record
    call = record.get("call", {})
    size = [call["height"], call.get("width") or call["height"]] if call.get("height") else None
    shift = record.get("teacher", {}).get("shift")
    options = {"max_sequence_length": call.get("max_sequence_length"), "size": size, "shift": shift}
    told = {"steps": call.get("num_inference_steps"), "guidance": call.get("guidance_scale")}
    return {
        **record,
        **{key: value for key, value in told.items() if value is not None},
        "options": {key: value for key, value in options.items() if value is not None},
        "explicit_grid": call.get("sigmas"),
        "sampler": "euler",
        "inputs": {"prompt": record.get("prompts", [])},
    }
