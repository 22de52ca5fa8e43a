"""What a picture costs: the teacher at its own steps and guidance, the same network as a student of 1, 2 and 4 steps, and stock diffusers.

    python -m benchmarks.sampling                      # on the GPU
    python -m benchmarks.sampling --device cpu         # the bundled digits alone: larger networks take minutes a picture there

Pictures are drawn by `ImageGenerator`, as `fastgen sample` draws them: noise from seeds, few-step sampling, VAE, transfer to the CPU, and
the check that they are finite. A student here is the teacher's network without guidance on the grid of its export, which costs what a
trained one does. Prompts are encoded before the clock starts, on purpose: both models share that work, and each prompt needs it once.

SD3.5-medium has random weights, in bf16 (`load_teacher` itself gives fp32). Its blocks are compiled one by one, because compiling 24 equal
ones as a whole takes minutes; the digits network is compiled whole.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.measuring import alone
from benchmarks.measuring.case import Case, LeftOut, Row, Target
from benchmarks.measuring.clock import Call, elapsed, peak_bytes, spread
from benchmarks.random_sd3 import MEDIUM, TINY, Untexted, live_pipeline
from fastgen.conditioning import Conditioning
from fastgen.data.digits import WORDS
from fastgen.denoiser import Denoiser, Predictor
from fastgen.families import find_family
from fastgen.families.base import Family
from fastgen.generator import ImageGenerator

STUDENT_STEPS = (4, 2, 1)
STOCK_STEPS = 4
ENCODED = "prompts were encoded before, which both models share"


@dataclass(frozen=True)
class Network:
    """A network and all that drawing with it needs. own_steps: of the teacher. blocks_alone: compile its blocks, not the whole."""

    name: str
    family: Family
    backbone: nn.Module
    device: str
    own_steps: int
    blocks_alone: bool = False

    def teacher(self, steps: int | None = None) -> ImageGenerator:
        """With its own guidance, which doubles the batch."""
        return self._generator(steps or self.own_steps, self.family.own_call["guidance_scale"])

    def student(self, steps: int) -> ImageGenerator:
        return self._generator(steps, 1.0)

    def _generator(self, steps: int, guidance: float) -> ImageGenerator:
        predict = Predictor(Denoiser(self.backbone, self.family), self.family)
        return ImageGenerator(self.family, predict, steps=steps, guidance=guidance, device=self.device, name=self.name)

    def compile(self, target: Target) -> str:
        """Compile at the next call; what was compiled, for the row. Shapes stay fixed: a dynamic batch would be slower."""
        torch.compiler.reset()
        backend = "eager" if target.rehearsal else "inductor"
        for module in self.family.blocks(self.backbone) if self.blocks_alone else [self.backbone]:
            module.compile(backend=backend, dynamic=False)
        what = "blocks" if self.blocks_alone else "whole"
        return f"{what}, without generating code (rehearsal)" if target.rehearsal else what


Build = Callable[[Target, int], Network]  # where, and for which batch there has to be memory


def digits(target: Target, batch: int) -> Network:
    """The bundled teacher, fp32."""
    family = find_family("fastgen:digits")
    backbone = family.load_backbone().to(target.device)
    return Network("digits", family, backbone, target.device, own_steps=3 if target.rehearsal else family.own_call["num_inference_steps"])


def sd35_medium(target: Target, batch: int) -> Network:
    """Random weights; LeftOut where there is no room, and on a CPU."""
    if not target.is_gpu and not target.rehearsal:
        raise LeftOut("SD3.5-medium takes minutes a picture on a CPU")
    # Weights 4.7 GB; the VAE's last blocks and the attention in its middle hold a few tensors of .5 GB a picture.
    needed, free = 7e9 + 6e9 * batch, target.free_bytes()
    if free < needed:
        raise LeftOut(f"needs about {needed / 1e9:.0f} GB, {free / 1e9:.1f} GB are free")
    sizes = TINY if target.rehearsal else MEDIUM
    pipeline = live_pipeline(sizes, target.device, torch.bfloat16)
    family = Untexted(pipeline, max_sequence_length=sizes.text_tokens)
    own_steps = 3 if target.rehearsal else family.own_call["num_inference_steps"]
    return Network("sd35_medium", family, pipeline.transformer, target.device, own_steps, blocks_alone=True)


def cases(target: Target) -> Iterator[Case]:
    """Latency is that of batch 1, throughput that of the other."""

    def compared(build: Build, batch: int, seconds: float, *, compiled: bool = False) -> Case:
        name = f"{build.__name__} {'compiled' if compiled else 'eager'} batch {batch}"
        return Case(name, partial(against_teacher, build, batch, target, compiled=compiled), seconds)

    yield compared(digits, 1, 12)
    if not target.rehearsal:
        yield compared(digits, 256, 12)
    yield compared(sd35_medium, 1, 25)
    for build in (digits, sd35_medium):
        yield Case(f"{build.__name__} stock", partial(against_stock, build, target), 15)
    yield compared(sd35_medium, 1, 60, compiled=True)
    if target.rehearsal:  # of which compiling would be the half
        return
    yield compared(digits, 1, 30, compiled=True)
    yield compared(digits, 256, 30, compiled=True)
    yield compared(sd35_medium, 4, 45)
    yield compared(sd35_medium, 4, 75, compiled=True)


def against_teacher(build: Build, batch: int, target: Target, *, compiled: bool) -> list[Row]:
    """The teacher, then students."""
    network = build(target, batch)
    how = network.compile(target) if compiled else "no"
    decoded = decoding(network, batch, target)
    of_teacher = drawn(network.teacher(), batch, target)
    rows = [_row(network, "teacher", network.teacher(), batch, how) | of_teacher | decoded | {"speedup": 1.0}]
    for steps in STUDENT_STEPS:
        own = drawn(network.student(steps), batch, target)
        row = _row(network, "student", network.student(steps), batch, how)
        rows.append(row | own | decoded | {"speedup": of_teacher["median_ms"] / own["median_ms"]})
    return rows


def _row(network: Network, model: str, generator: ImageGenerator, batch: int, compiled: str) -> Row:
    """evaluations: of the network a picture, guidance's second one counted."""
    return {
        "network": network.name,
        "model": model,
        "steps": generator.steps,
        "guidance": generator.guidance,
        "evaluations": generator.steps * (1 if generator.guidance == 1 else 2),
        "batch": batch,
        "picture": list(network.family.picture_shape),
        "dtype": str(next(network.backbone.parameters()).dtype).removeprefix("torch."),
        "compiled": compiled,
        "text": ENCODED,
    }


def prompts_and_seeds(batch: int) -> tuple[list[str], list[int]]:
    return [f"a handwritten {WORDS[i % len(WORDS)]}" for i in range(batch)], list(range(batch))


def drawn(generator: ImageGenerator, batch: int, target: Target) -> Row:
    """From noise to pictures on the CPU. first_s: of a first picture in one step, with compiling and loading what is loaded once."""
    prompts, seeds = prompts_and_seeds(batch)
    generator.conditioning(prompts)
    first = elapsed(lambda: generator(prompts, seeds, 1), target)
    with peak_bytes(target) as peak:
        times = repeated(lambda: generator(prompts, seeds), target)
        peak_held = peak()
    return _throughput(times, batch) | {"first_s": first / 1e3, "peak_bytes": peak_held}


def _throughput(times: Row, batch: int) -> Row:
    return times | {"images_per_s": 1e3 * batch / times["median_ms"]}


def repeated(call: Call, target: Target, *, seconds: float = 1.5, most_seconds: float = 8.0) -> Row:
    """A warm call's times: over `seconds`, three of them at least, but two where those would take longer than `most_seconds`."""
    if target.rehearsal:
        seconds = 0.0
    times: list[float] = []
    while sum(times) < 1e3 * seconds or len(times) < (2 if target.rehearsal or sum(times) > 1e3 * most_seconds else 3):
        times.append(elapsed(call, target))
    return spread(times)


def decoding(network: Network, batch: int, target: Target) -> Row:
    """The VAE's part, and that of bringing pictures to the CPU, which every picture's time includes."""
    latents = torch.randn(batch, *network.family.latent.shape, generator=torch.Generator().manual_seed(0)).to(network.device)
    decode = lambda: network.family.decode_latents(latents).cpu()  # noqa: E731
    decode()
    times = repeated(decode, target, seconds=0.3)
    return {f"decode_{key}": value for key, value in times.items()}


def against_stock(build: Build, target: Target, steps: int = STOCK_STEPS) -> list[Row]:
    """Our sampler beside the pipeline's own call on the same network from the same noise, one picture at a time, in turn."""
    network = build(target, 1)
    rows = []
    for model, generator in (("teacher", network.teacher(steps)), ("student", network.student(steps))):
        (prompts, seeds), stock = prompts_and_seeds(1), stock_call(network, generator)
        ours = partial(generator, prompts, seeds)
        difference = (ours() - stock(prompts, seeds)).abs().max().item()
        count = 2 if target.rehearsal else 10
        times = [(elapsed(ours, target), elapsed(partial(stock, prompts, seeds), target)) for _ in range(count)]
        mine, theirs = (spread(each) for each in zip(*times, strict=True))
        rows.append(
            _row(network, model, generator, 1, "no")
            | _throughput(mine, 1)
            | {f"stock_{key}": value for key, value in theirs.items()}
            | {"ratio": statistics.median(a / b for a, b in times), "difference": difference}
        )
    return rows


def stock_call(network: Network, generator: ImageGenerator) -> Callable[[list[str], list[int]], Tensor]:
    """Pictures (B, 3, H, W) in [0, 1] on the CPU by the stock pipeline, called as the student's card says, with embeddings as its prompts."""
    family, dtype = network.family, next(network.backbone.parameters()).dtype
    pipeline = family.load_pipeline(network.backbone, family.export_scheduler()).to(network.device)
    pipeline.set_progress_bar_config(disable=True)
    call = family.call_arguments(generator.steps, generator.guidance)

    def embeddings(cond: Conditioning, prefix: str) -> dict[str, Any]:
        names = {f"{prefix}prompt_embeds": "encoder_hidden_states", f"{prefix}pooled_prompt_embeds": "pooled_projections"}
        return {name: cond[key].to(dtype) for name, key in names.items()}

    def draw(prompts: list[str], seeds: list[int]) -> Tensor:
        given = embeddings(generator.conditioning(prompts), "")
        if generator.guidance != 1:
            given |= embeddings(generator.conditioning([""] * len(prompts)), "negative_")
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        return pipeline(**given, **call, generator=generators, output_type="pt").images.float().cpu()

    return draw


if __name__ == "__main__":
    alone.main(cases, "What a picture costs.")
