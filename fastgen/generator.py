"""Pictures from prompts and seeds, with our own sampler: validation grids, evaluation and export parity all draw here.

A sample's noise is `torch.randn((1, *shape), generator=Generator().manual_seed(seed))`, which is also what a diffusers pipeline
draws when it is given one such generator per prompt. So seed by seed the pictures are the same.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastgen import conditioning
from fastgen.conditioning import Conditioning
from fastgen.denoiser import Denoiser, Predictor, guided
from fastgen.errors import UserError
from fastgen.families import find_family
from fastgen.families.base import Family
from fastgen.files import reading
from fastgen.sampling import Predict, few_step


def noise_from_seeds(seeds: Sequence[int], shape: Sequence[int]) -> Tensor:
    """Unit noise (B, *shape) fp32, one CPU generator a sample."""
    return torch.cat([torch.randn((1, *shape), generator=torch.Generator().manual_seed(seed)) for seed in seeds])


class ImageGenerator:
    """A model with its sampler settings. steps: default number of evaluations; grid: explicit times for exactly `steps`.

    own_steps_only: the network serves that grid alone, and other numbers of steps are a UserError.
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
    ) -> None:
        self.family, self.steps, self.guidance, self.explicit_grid = family, steps, guidance, grid
        self.own_steps_only = own_steps_only
        self.device = torch.device(device)
        self.predict = predict if guidance == 1 else guided(predict, guidance, self._encode([negative_prompt]))
        self._encoded: dict[str, Conditioning] = {}

    def times(self, steps: int | None = None) -> Tensor:
        """The grid (N,), fp64 path times; an explicit grid serves its own number of steps only."""
        steps = steps or self.steps
        if self.own_steps_only and steps != self.steps:
            raise UserError(f"--steps: {steps}, but this student was made for {self.steps}: its second time is part of its weights; train another")
        return self.family.grid(steps, self.explicit_grid if steps == self.steps else None)

    @torch.no_grad()
    def latents(self, prompts: Sequence[str], seeds: Sequence[int], steps: int | None = None) -> Tensor:
        """Latents (B, *shape) of one sample a (prompt, seed) pair."""
        noise = noise_from_seeds(seeds, self.family.latent.shape).to(self.device)
        return few_step(self.predict, noise, self.times(steps).to(self.device), self.conditioning(prompts), renoise="euler")

    def __call__(self, prompts: Sequence[str], seeds: Sequence[int], steps: int | None = None) -> Tensor:
        """Pixels (B, 3, H, W) fp32 in [0, 1], on the CPU."""
        return self.family.decode_latents(self.latents(prompts, seeds, steps)).cpu()

    def conditioning(self, prompts: Sequence[str]) -> Conditioning:
        """Conditioning (B, ...); each distinct prompt is encoded once in this object's life."""
        missing = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._encoded]
        if missing:
            rows = self._encode(missing)
            self._encoded |= {prompt: conditioning.select(rows, torch.tensor([i])) for i, prompt in enumerate(missing)}
        return conditioning.cat([self._encoded[prompt] for prompt in prompts])

    def _encode(self, prompts: list[str]) -> Conditioning:
        return conditioning.to(self.family.encode_prompts(prompts), self.device)


_NEEDED = {
    "": ("weights", "steps", "grid", "call", "teacher", "prompts"),
    "call.": ("num_inference_steps", "guidance_scale"),
    "teacher.": ("pretrained", "guidance", "negative_prompt"),
}


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
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{str(path)!r} is not valid JSON ({error})") from error
    version = manifest.get("format") if isinstance(manifest, dict) else None
    if version != 1:
        raise UserError(f"{str(path)!r} has format {version!r}, this fastgen reads 1")
    blocks = {"": manifest, "call.": manifest.get("call"), "teacher.": manifest.get("teacher")}
    missing = [prefix + name for prefix, block in blocks.items() for name in _NEEDED[prefix] if not isinstance(block, dict) or name not in block]
    if missing:
        raise UserError(f"{str(path)!r} has no {missing[0]!r}; export the student again")
    if manifest["weights"] not in ("full", "lora"):
        raise UserError(f"{str(path)!r} has weights {manifest['weights']!r}; allowed: full, lora")
    return manifest


def load_student(folder: str | Path, *, device: torch.device | str = "cpu") -> ImageGenerator:
    """An exported student (full weights or LoRA folder) with the settings of its fastgen.json."""
    folder = Path(folder)
    manifest = read_manifest(folder)
    call = manifest["call"]
    adapter = "student" if manifest["weights"] == "lora" else None
    family = find_family(
        manifest["teacher"]["pretrained"] if adapter else folder,
        max_sequence_length=call.get("max_sequence_length"),
        resolution=call.get("height"),
    )
    backbone = family.load_backbone()
    if adapter:
        weights = "pytorch_lora_weights.safetensors"  # unless told this name, diffusers looks for a pickle
        with reading(folder / weights):
            load = backbone.load_lora_adapter
            load(folder, prefix=family.component, weight_name=weights, adapter_name=adapter)  # type: ignore[operator]
    return ImageGenerator(
        family,
        Predictor(Denoiser(backbone.to(device), family, adapter=adapter), family),
        steps=call["num_inference_steps"],
        guidance=call["guidance_scale"],
        negative_prompt=manifest["teacher"]["negative_prompt"],
        grid=call.get("sigmas"),
        device=device,
        own_steps_only=manifest.get("own_steps_only", False),
    )


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
    """A teacher: `fastgen:digits`, a hub id, a diffusers folder or a live pipeline; steps and guidance default to its own."""
    found = find_family(source, family, **options)
    return ImageGenerator(
        found,
        Predictor(Denoiser(found.load_backbone().to(device), found), found),
        steps=steps or found.own_call["num_inference_steps"],
        guidance=found.own_call["guidance_scale"] if guidance is None else guidance,
        negative_prompt=negative_prompt,
        device=device,
    )
