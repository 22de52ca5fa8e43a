"""What `make gpu` measures, in order of value. A later benchmark adds one entry here, and its table to tables.py."""

from __future__ import annotations

from dataclasses import dataclass

# What fastgen's own packages import, beyond PyTorch and Triton.
PIPELINES = ("diffusers", "pydantic", "transformers", "peft", "safetensors", "yaml", "PIL", "typer", "rich")


@dataclass(frozen=True)
class Slice:
    """One benchmark. module: where its cases(target) is, or `module:function`; seconds: after which it makes room for the next, and goes on
    when it is run again; needs: packages that it imports; capability: the oldest GPU; after: a slice of tests that must not be red."""

    name: str
    module: str
    seconds: float
    needs: tuple[str, ...] = ()
    capability: tuple[int, int] = (0, 0)
    after: str | None = None


SLICES = (
    Slice("tests", "benchmarks.gpu_tests", 300, ("triton", "pytest", "hypothesis"), capability=(8, 0)),
    Slice("attention", "benchmarks.kernels.jvp_attention", 150, ("triton",), capability=(8, 0), after="tests"),
    Slice("train_step", "benchmarks.train_step", 120, PIPELINES),
    Slice("sampling", "benchmarks.sampling", 150, PIPELINES),
    Slice("training", "benchmarks.short_training", 200, (*PIPELINES, "lpips", "sklearn", "matplotlib", "jinja2", "tensorboard")),
    Slice("real_sizes", "benchmarks.train_step:real_sizes", 240, PIPELINES),
)
