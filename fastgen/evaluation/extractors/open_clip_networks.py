"""CLIP networks that the package open_clip builds, with weights from a file: which file that is, and how pictures and prompts are embedded."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from pickle import UnpicklingError
from types import ModuleType
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize

from fastgen.errors import UserError, nearest
from fastgen.evaluation.extractors.clip_inputs import each_once, pil_pictures
from fastgen.evaluation.weights import Unavailable, Weights
from fastgen.files import loading

Precision = Literal["fp32", "fp16", "bf16"]
_HUB = "https://huggingface.co"
_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth")


class Source(NamedTuple):
    """A file that holds a network's weights: its name below the weights folder, where it can be had, what its SHA-256 begins with where that
    is known, and whether it is a TorchScript archive, as OpenAI's own are."""

    file: str
    address: str
    sha256: str | None = None
    scripted: bool = False


@dataclass(frozen=True)
class Checkpoint:
    """Weights of a model of open_clip. preprocessing: mean, std, interpolation and resize_mode where they are not OpenAI's; quick_gelu: the
    network was trained with OpenAI's approximation of GELU, whatever its configuration says."""

    model: str
    path: Path
    preprocessing: dict[str, Any] = field(default_factory=dict)
    quick_gelu: bool = False
    scripted: bool = False


def open_clip() -> ModuleType:
    """The package; Unavailable where it is not installed."""
    try:
        import open_clip as package  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise Unavailable("needs the package open_clip (pip install open_clip_torch)") from error
    return package


def find_checkpoint(weights: Weights, model: str, pretrained: str) -> Checkpoint:
    """The weights that open_clip calls (model, pretrained), or the file `pretrained` where it ends like one. UserError for a model or weights
    that open_clip does not know, and for a model whose tokenizer or text network lies on a hub; Unavailable where no file is there."""
    _check_model(model)
    if pretrained.endswith(_SUFFIXES):
        return Checkpoint(model, weights.file(pretrained, source="whoever trained it"))
    tags = open_clip().list_pretrained_tags_by_model(model)
    if pretrained not in tags:
        raise UserError(f"open_clip has no weights {pretrained!r} of {model}; {nearest(pretrained, tags)}, or a file {', '.join(_SUFFIXES)}")
    known = open_clip().get_pretrained_cfg(model, pretrained)
    source, path = _first_there(weights, sources(known))
    return Checkpoint(model, path, known, bool(known.get("quick_gelu")), source.scripted)


def sources(known: dict[str, Any]) -> list[Source]:
    """Files that hold the same weights, of a record of open_clip's: the hub's (safetensors first, in a folder of the repository's name), and
    that of a plain address, under its own name. OpenAI's addresses state the whole hash, those of open_clip's releases begin it."""
    found: list[Source] = []
    if hub := known.get("hf_hub"):
        repository, _, file = hub.rpartition("/")
        names = [file] if file else ["open_clip_model.safetensors", "open_clip_pytorch_model.bin"]
        found += [Source(f"{repository.rpartition('/')[2]}/{name}", f"{_HUB}/{repository}") for name in names]
    if url := known.get("url"):
        *_, folder, file = url.split("/")
        if "openaipublic" in url:
            found.append(Source(file, url, folder, scripted=True))
        else:
            found.append(Source(file, url, Path(file).stem.rpartition("-")[2] if "mlfoundations" in url else None))
    return found


def _first_there(weights: Weights, candidates: Sequence[Source]) -> tuple[Source, Path]:
    """The first file that is there; Unavailable, which names the first, and the last where that has another address."""
    for source in candidates:
        if weights.folder is not None and (weights.folder / source.file).is_file():
            return source, weights.file(source.file, source=source.address, sha256=source.sha256)
    first, last = candidates[0], candidates[-1]
    other = f" (or {last.file} from {last.address})" if last.address != first.address else ""
    return first, weights.file(first.file, source=f"{first.address}{other}")


def _check_model(model: str) -> None:
    known = open_clip().list_models()
    if model not in known:
        raise UserError(f"open_clip has no model {model!r}; {nearest(model, known)}")
    text = open_clip().get_model_config(model)["text_cfg"]
    if "siglip" in model.lower() or text.get("hf_model_name") or text.get("hf_tokenizer_name"):
        raise UserError(f"{model}: its tokenizer lies on a hub, which is not asked; choose a model with CLIP's own tokenizer")


class Network:
    """A network, loaded at its first use. Embeddings are fp32, on the CPU, and have unit length."""

    def __init__(self, checkpoint: Checkpoint, precision: Precision, device: torch.device) -> None:
        self.checkpoint, self.precision, self.device = checkpoint, precision, device

    @property
    def image_size(self) -> int:
        size = self._module.visual.image_size
        return size if isinstance(size, int) else size[0]

    def images(self, pixels: Tensor) -> Tensor:
        """(B, D) of pictures (B, 3, H, W) uint8, resized and normalised by open_clip's own transform for inference."""
        return self.preprocessed(torch.stack([self._transform(picture) for picture in pil_pictures(pixels)]))

    @torch.no_grad()
    def preprocessed(self, inputs: Tensor) -> Tensor:
        """(B, D) of inputs (B, 3, S, S) that are resized and normalised already."""
        kind = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[self.precision]
        return normalize(self._module.encode_image(inputs.to(self.device, kind)).float(), dim=-1).cpu()

    def texts(self, prompts: Sequence[str]) -> Tensor:
        """(B, D); a prompt of more than the context's 77 tokens keeps the first 76 and the end."""
        return each_once(prompts, self._texts)

    @torch.no_grad()
    def _texts(self, prompts: list[str]) -> Tensor:
        return normalize(self._module.encode_text(self._tokenizer(prompts).to(self.device)).float(), dim=-1).cpu()

    @cached_property
    def _module(self) -> Any:
        path = self.checkpoint.path
        with loading(path), warnings.catch_warnings(action="ignore", category=FutureWarning):  # PyTorch leaves TorchScript behind
            try:
                module = self._read()
            except UnpicklingError as error:  # whose message advises to unpickle all the same
                raise UserError(f"cannot read {str(path)!r}: it holds more than tensors, which is not unpickled") from error
        return module.to(self.device).eval().requires_grad_(False)

    def _read(self) -> Any:
        of, package = self.checkpoint, open_clip()
        if of.scripted:  # run only where its hash is OpenAI's
            return package.load_openai_model(str(of.path), precision=self.precision, device="cpu")
        return package.create_model(of.model, str(of.path), precision=self.precision, force_quick_gelu=of.quick_gelu)

    @cached_property
    def _tokenizer(self) -> Callable[[list[str]], Tensor]:
        return open_clip().get_tokenizer(self.checkpoint.model)

    @cached_property
    def _transform(self) -> Callable[[Any], Tensor]:
        from open_clip.transform import PreprocessCfg, image_transform_v2, merge_preprocess_dict  # pyright: ignore[reportMissingImports]

        asked = {**self.checkpoint.preprocessing, "size": self.image_size}
        transform: Any = image_transform_v2(PreprocessCfg(**merge_preprocess_dict(PreprocessCfg(), asked)), is_train=False)
        return transform
