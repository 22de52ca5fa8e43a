"""PickScore, a CLIP trained on human preferences (Kirstain et al. 2023, arXiv:2305.01569), by transformers from a folder of weights."""

from __future__ import annotations

from collections.abc import Collection
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from fastgen.evaluation.extractors.base import Extractor, Pictures, Resources
from fastgen.evaluation.extractors.clip_inputs import cosines, each_once, pil_pictures
from fastgen.evaluation.extractors.hub_models import CONFIG, WEIGHTS, load_model
from fastgen.files import loading
from fastgen.fingerprints import folder_hash, known_hash

FOLDER = "PickScore_v1"
ADDRESS = "https://huggingface.co/yuvalkirstain/PickScore_v1 (files of the processor: https://huggingface.co/laion/CLIP-ViT-H-14-laion2B-s32B-b79K)"
FILES = (CONFIG, WEIGHTS, "preprocessor_config.json", "tokenizer.json", "tokenizer_config.json")
_TOKENS = 77


class PickScore(Extractor):
    """Layer `score` (1): exp(logit scale) · cosine of the embeddings of the picture and of its prompt, about 18 to 24."""

    convention = (
        "8-bit pictures through the folder's own processor (Pillow's bicubic to 224 by the shorter side, centre crop, OpenAI's mean and std); "
        "prompt cut to 77 tokens; exp(logit_scale) * cosine, not divided by 26 as some training code does"
    )

    def __init__(self, config: Any, resources: Resources) -> None:
        super().__init__(config, resources)
        self._folder = resources.weights.directory(FOLDER, source=ADDRESS, files=FILES)

    @property
    def hash(self) -> str:
        return folder_hash(self._folder, FILES, of=known_hash)

    @torch.no_grad()
    def __call__(self, pictures: Pictures, layers: Collection[str]) -> dict[str, Tensor]:
        found = cosines(self._images(pictures.pixels), each_once(pictures.prompts, self._texts))
        scores: Tensor = found * self._module.logit_scale.double().exp().cpu()
        return dict.fromkeys(layers, scores.float()[:, None])

    def _images(self, pixels: Tensor) -> Tensor:
        inputs = self._processor(images=pil_pictures(pixels), return_tensors="pt")["pixel_values"]
        return normalize(self._module.get_image_features(inputs.to(self.resources.device)).pooler_output, dim=-1).cpu()

    def _texts(self, prompts: list[str]) -> Tensor:
        # To one length: with the longest of a batch, rounding would depend on the other prompts. What follows the end is not attended to.
        tokens = self._tokenizer(prompts, padding="max_length", truncation=True, max_length=_TOKENS, return_tensors="pt").to(self.resources.device)
        return normalize(self._module.get_text_features(tokens["input_ids"], tokens["attention_mask"]).pooler_output, dim=-1).cpu()

    @cached_property
    def _module(self) -> Any:
        from transformers import CLIPModel

        return load_model(CLIPModel, self._folder, self.resources.device)

    @cached_property
    def _processor(self) -> Any:
        from transformers import AutoImageProcessor

        with loading(self._folder):
            return AutoImageProcessor.from_pretrained(self._folder, backend="pil", local_files_only=True, trust_remote_code=False)

    @cached_property
    def _tokenizer(self) -> Any:
        from transformers import AutoTokenizer

        with loading(self._folder):
            return AutoTokenizer.from_pretrained(self._folder, local_files_only=True, trust_remote_code=False)
