"""FLUX.2 dev (Black Forest Labs 2025): klein's network with its guidance as an input, told by three layers of Mistral's text behind an instruction.

It was distilled from guided predictions, so its call has no classifier-free guidance: `guidance_scale` is `teacher.embedded_guidance`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from fastgen.families.flux2 import Flux2Klein
from fastgen.legibility import Reader


class Flux2Dev(Flux2Klein):
    """Flux2Pipeline: FLUX.2 dev, without pictures to go by. Its `tokenizer` is a processor of texts and pictures, which holds one."""

    pipeline_classes = ("Flux2Pipeline",)
    own: ClassVar = {"num_inference_steps": 50, "guidance_scale": 1.0}
    own_embedded_guidance = 4.0
    takes_guidance = False

    @property
    def own_call(self) -> dict[str, Any]:
        return super(Flux2Klein, self).own_call  # klein alone may be distilled of its guidance

    def call_arguments(self, steps: int, guidance: float, grid: Sequence[float] | None = None) -> dict[str, Any]:
        told = {} if self.embedded_guidance is None else {"guidance_scale": self.embedded_guidance}
        return super().call_arguments(steps, guidance, grid) | told

    def before(self, pipeline: Any, tokenizer: Any) -> str:
        return ""  # its processor's template has parts, which `readers` counts

    def readers(self) -> list[Reader]:
        """Of `max_sequence_length` tokens the instruction and the marks around the prompt take theirs."""
        from diffusers.pipelines.flux2.pipeline_flux2 import format_input

        (reader,) = super().readers()
        tokenizer = reader.tokenizer.tokenizer
        around = reader.tokenizer.apply_chat_template(format_input([""]), add_generation_prompt=False, tokenize=True, return_dict=True)
        own = tokenizer.num_special_tokens_to_add()
        return [Reader(reader.name, tokenizer, max(own, reader.length + own - len(around["input_ids"][0])))]
