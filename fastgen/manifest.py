"""What fastgen.json must hold: the record of an exported student, or of the teacher that comes with fastgen, which is one."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from fastgen.records import Schema

Steps = Annotated[int, Field(ge=1, le=1000)]  # as student.steps of a recipe
Pixels = Annotated[int, Field(ge=1, le=2**15)]
Time = Annotated[float, Field(ge=0, le=1e6)]
Guidance = Annotated[float, Field(ge=-1e4, le=1e4)]
Hash = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class _Arguments(Schema):
    max_sequence_length: Annotated[int, Field(ge=1, le=2**20)] | None = None
    height: Pixels | None = None
    width: Pixels | None = None
    negative_prompt: str = ""
    sigmas: list[Time] | None = None


class Call(_Arguments):
    """What a pipeline is to be called with; any of it may be missing where that is no student's."""

    num_inference_steps: Steps = 28
    guidance_scale: Guidance = 1.0


class StudentCall(_Arguments):
    num_inference_steps: Steps
    guidance_scale: Guidance


class Teacher(Schema):
    pretrained: str
    guidance: Guidance
    negative_prompt: str
    shift: Annotated[float, Field(gt=0, le=1e6)] | None = None
    revision: str | None = None
    sha256: str | None = None


class Expert(Schema):
    end: Time
    steps: list[Annotated[int, Field(ge=0, le=1000)]]
    where: str


class Exported(Schema):
    """All that describing a student takes, and calling it."""

    weights: Literal["full", "lora"]
    steps: Steps
    grid: list[Time] = Field(min_length=1, max_length=1000)
    call: StudentCall
    prompts: list[str] = Field(min_length=1)
    own_steps_only: bool = False
    experts: list[Expert] = Field(default_factory=list, max_length=1000)
    sha256: dict[str, Hash] = Field(default_factory=dict)
    method: str = ""
    dtype: Literal["fp32", "fp16", "bf16"] = "fp32"
    pipeline: str = ""
    base: str = ""
    scheduler: str = ""
    unfinished: dict[str, dict[str, int]] = Field(default_factory=dict)
    recipe: dict[str, Any] = Field(default_factory=dict)
    versions: dict[str, str] = Field(default_factory=dict)


class Student(Exported):
    """And loading it."""

    teacher: Teacher


class Pipeline(Schema):
    """Of a folder that need not be a student's."""

    call: Call = Call()
    own_steps_only: bool = False
