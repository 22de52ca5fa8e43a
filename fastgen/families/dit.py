"""DiT (Peebles & Xie 2023): a transformer on a discrete schedule that predicts a variance too, classes of ImageNet instead of text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fastgen.conditioning import Conditioning
from fastgen.errors import UserError, nearest
from fastgen.families.discrete import Discrete
from fastgen.legibility import Legibility


class DiT(Discrete):
    """DiTPipeline. A prompt is the number of a class or one of its names; the empty prompt is the class that stands for none."""

    pipeline_classes = ("DiTPipeline",)
    network = "DiTTransformer2DModel"
    own: ClassVar = {"num_inference_steps": 50, "guidance_scale": 4.0}
    sized = False
    grid_argument = None
    loads_lora = takes_negative = False
    lora_targets = ("to_q", "to_k", "to_v", "to_out.0")

    def check_network(self) -> None:
        _ = self.names  # read now, so that names which cannot be read are refused before anything is trained

    def call(self, backbone: nn.Module, x: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        return backbone(x, self.path.step(t), **cond, return_dict=False)[0][:, : x.shape[1]]  # without the variance

    @property
    def null(self) -> int:
        """The class that stands for none: 1000 for the 1000 of ImageNet, as the pipeline has it."""
        return self.config.option("num_embeds_ada_norm")

    @cached_property
    def names(self) -> dict[str, int]:
        """Classes by their names, of which one class may have several."""
        if self.source.live is not None:
            return dict(self.source.live.labels)
        given = self.source.setting("id2label") or {}
        if not isinstance(given, dict) or not all(str(number).isdecimal() and isinstance(line, str) for number, line in given.items()):
            raise UserError("recipe key teacher.pretrained: id2label of its model_index.json does not give names to numbers of classes")
        return {name.strip(): int(number) for number, line in given.items() for name in line.split(",")}

    def number(self, prompt: str) -> int | None:
        """None: no class is called so."""
        prompt = prompt.strip()
        if prompt.isdecimal() and int(prompt) < self.null:
            return int(prompt)
        numbers = {self.names.get(name.strip()) for name in prompt.split(",")} if prompt else {self.null}
        return numbers.pop() if len(numbers) == 1 else None

    def legibility(self, prompts: Sequence[str]) -> Legibility:
        distinct = dict.fromkeys(prompts)
        return Legibility(len(distinct), {prompt: self._unknown(prompt) for prompt in distinct if self.number(prompt) is None})

    def _unknown(self, prompt: str) -> str:
        close = nearest(prompt, self.names).partition("allowed:")[0]
        return f"is neither a class 0 to {self.null - 1} nor one's name" + (f"; {close.strip()}" if close else "")

    def encode_texts(self, prompts: Sequence[str]) -> Conditioning:
        self.legibility(prompts).check("prompts")
        return {"class_labels": torch.tensor([self.number(prompt) for prompt in prompts])}

    def encode(self, pipeline: Any, prompts: list[str]) -> Conditioning:
        raise AssertionError("classes need no encoder")

    def text_shapes(self) -> Mapping[str, tuple[int, ...]]:
        return {"class_labels": ()}

    def call_inputs(self, prompts: Sequence[str]) -> dict[str, Any]:
        return {"class_labels": self.encode_texts(prompts)["class_labels"].tolist()}

    def load_pipeline(self, backbone: nn.Module | None, scheduler: Any) -> Any:
        pipeline = super().load_pipeline(backbone, scheduler)
        lines = {str(number): ", ".join(name for name, of in self.names.items() if of == number) for number in self.names.values()}
        pipeline.register_to_config(id2label=lines or None)  # which diffusers does not save by itself
        return pipeline
