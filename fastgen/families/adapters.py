"""The LoRA adapters that a teacher was tuned with (`teacher.lora`): found, identified, held against its shapes, and fused into its parts.

All reading is diffusers' own `load_lora_weights`, so every dialect of keys that it knows is one here. It runs on a pipeline whose other parts
are shapes without weights: the same call checks a file before anything is loaded, fuses into the network alone, or into text encoders alone.
"""

from __future__ import annotations

import inspect
import logging
import math
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import safe_open
from torch import nn

from fastgen.errors import UserError
from fastgen.files import expanded, loading, reading
from fastgen.fingerprints import known_hash

if TYPE_CHECKING:
    from fastgen.families.source import Source

KEY = "teacher.lora"
FILE = "pytorch_lora_weights.safetensors"  # what diffusers itself calls it


@dataclass(frozen=True)
class Adapter:
    """name: what records call it, without this machine's folders; key: the recipe key that messages begin with."""

    file: Path
    weight: float
    name: str
    key: str

    @cached_property
    def sha256(self) -> str:
        return known_hash(self.file)

    @property
    def record(self) -> dict[str, Any]:
        return {"name": self.name, "weight": self.weight, "sha256": self.sha256}

    @property
    def identity(self) -> list[Any]:
        """What it is, wherever it lies and whatever it is called."""
        return [self.sha256, self.weight]


def find(lora: Sequence[Mapping[str, Any]]) -> tuple[Adapter, ...]:
    """Each `{path, weight}` with its file; UserError where there is none, or none that could be an adapter, and for a weight that adds nothing."""
    return tuple(_find(str(each["path"]), float(each.get("weight", 1.0)), f"recipe key {KEY}.{i}") for i, each in enumerate(lora))


def _find(path: str, weight: float, key: str) -> Adapter:
    if weight == 0 or not math.isfinite(weight):
        raise UserError(f"{key}.weight: {weight:g} of {path!r} is {'nothing; leave it out' if weight == 0 else 'no finite number'}")
    here = expanded(path)
    if here.is_dir():
        file, name = _in_folder(here, path, key), here.resolve().name
    elif here.exists():
        file, name = here, here.name
    else:
        file, name = _from_hub(path, key), path
    if file.suffix != ".safetensors":
        raise UserError(f"{key}.path: {path!r} is no .safetensors file, and fastgen reads adapters from no other: pickles run code")
    _check_content(file, path, key)
    return Adapter(file, weight, name, key)


def _in_folder(folder: Path, path: str, key: str) -> Path:
    names = sorted(file.name for file in folder.glob("*.safetensors"))
    if FILE in names:
        return folder / FILE
    if len(names) != 1:
        found = "no .safetensors file" if not names else f"several ({', '.join(names[:3])}{', …' * (len(names) > 3)}): name the one"
        raise UserError(f"{key}.path: the folder {path!r} holds {found}")
    return folder / names[0]


def is_on_hub(path: str) -> bool:
    """Whether a path, where nothing lies, is `owner/name` or `owner/name/FILE.safetensors` of the hub."""
    parts = path.split("/")
    local = path.startswith((".", "/", "~")) or not all(parts) or len(parts) < 2
    return not local and path.endswith(".safetensors") == (len(parts) > 2)


def _from_hub(path: str, key: str) -> Path:
    if not is_on_hub(path):
        raise UserError(
            f"{key}.path: no file {path!r}; allowed: a .safetensors file, a folder with one, or 'owner/name' or 'owner/name/FILE' of the hub"
        )
    import huggingface_hub.constants
    from huggingface_hub import hf_hub_download

    owner, name, *inside = path.split("/")
    try:
        return Path(hf_hub_download(f"{owner}/{name}", "/".join(inside) or FILE))
    except (OSError, ValueError) as error:
        offline = "HF_HUB_OFFLINE is set, and its cache lacks it" if huggingface_hub.constants.HF_HUB_OFFLINE else ""
        reason = offline or str(error).strip().splitlines()[0]
        raise UserError(f"{key}.path: no file {path!r}, and the hub does not give it ({reason})") from error


def _check_content(file: Path, path: str, key: str) -> None:
    """UserError unless it holds factors of weights, all finite."""
    with _named(f"{key}.path"), reading(file), safe_open(file, "pt") as tensors:
        names = list(tensors.keys())
        if not any("lora" in name or "lokr" in name for name in names):
            raise UserError(f"{key}.path: {path!r} is no LoRA adapter: none of its {len(names)} tensors is a factor, such as {names[:1] or 'none'}")
        for name in names:
            tensor = tensors.get_tensor(name)
            if tensor.is_floating_point() and not tensor.isfinite().all():
                raise UserError(f"{key}.path: {path!r} has numbers that are not finite, in {name}, so it is damaged or its training went wrong")


@contextmanager
def _named(key: str) -> Iterator[None]:
    """A UserError within that names no key names this one."""
    try:
        yield
    except UserError as error:
        raise (error if str(error).startswith(key) else UserError(f"{key}: {error}")) from error


def check(source: Source, adapters: Sequence[Adapter]) -> list[str]:
    """UserError unless each adapter fits layers of the pipeline, from shapes alone; warnings of those that fit in part."""
    unused = []
    for adapter in adapters:
        pipeline = _around(source, {})
        parts = {name: part for name in pipeline._lora_loadable_modules if (part := getattr(pipeline, name, None)) is not None}
        before = {name: dict(part.config) if isinstance(part.config, Mapping) else None for name, part in parts.items()}
        keys = _noting_keys(pipeline)
        said = _load(pipeline, adapter, "fits")
        adapted = [name for name, part in parts.items() if _adapted(part)]
        elsewhere = sorted({key.partition(".")[0] for key in keys} - parts.keys())  # which the loader passes over without a word
        if not adapted or (elsewhere and all(name.startswith("text") for name in adapted)):
            other = f"its keys are of {' and '.join(elsewhere)[:60]}" if elsewhere else "it was made for another model"
            raise UserError(f"{adapter.key}.path: {adapter.name!r} fits no layer of this {source.pipeline_class}'s network: {other}")
        for name, part in parts.items():
            if hasattr(part, "_transformer_norm_layers") or (before[name] is not None and dict(part.config) != before[name]):
                raise UserError(f"{adapter.key}.path: {adapter.name!r} changes the shape of the {name}, as control adapters do; fastgen takes none")
        _check_sum(adapter, parts, said, len(adapters))
        lines = [line for line in said if "unexpected" in line.lower()] + ([f"keys of {' and '.join(elsewhere)[:60]}"] if elsewhere else [])
        unused += [f"{KEY}: of {adapter.name!r} some is not used: {line}" for line in lines]
    return unused


def _check_sum(adapter: Adapter, parts: Mapping[str, nn.Module], said: Sequence[str], count: int) -> None:
    """UserError where the weights would not be the base's plus each adapter's weight times alpha/rank B A. said: by its loader; count: of all."""
    if (count > 1 or adapter.weight != 1) and any(_has_magnitudes(part) for part in parts.values()):
        asked = f"{count} adapters" if adapter.weight == 1 else f"weight {adapter.weight:g}"
        what = "scales whole layers anew (DoRA's magnitudes), so it is no sum that a weight could share out"
        raise UserError(f"{adapter.key}.path: {adapter.name!r} {what}: it is fused alone and with weight 1, not with {asked}")
    if any("alpha_pattern" in line and "ignored" in line for line in said):  # diffusers names UNets' and CLIP's layers otherwise there than peft
        what = "has alphas that differ from layer to layer, of which diffusers takes the most frequent for all"
        raise UserError(f"{adapter.key}.path: {adapter.name!r} {what}; multiply each up factor by its alpha over rank and leave the alphas out")


def fuse(source: Source, adapters: Sequence[Adapter], parts: Mapping[str, nn.Module]) -> None:
    """Add each adapter's effect, times its weight, to the weights of a pipeline's parts for good; those that take none stay as they are."""
    pipeline = _around(source, parts)
    into = [name for name in pipeline._lora_loadable_modules if name in parts]
    for adapter in adapters if into else ():
        _load(pipeline, adapter, "tuned")
        pipeline.fuse_lora(components=into, lora_scale=adapter.weight, adapter_names=["tuned"])
        pipeline.unload_lora_weights()


def of(family: Any) -> tuple[Adapter, ...]:
    """Those that a family's pipeline is tuned with."""
    return getattr(getattr(family, "source", None), "adapters", ())


def loadable(pipeline_class: Any) -> Sequence[str]:
    """The components of a pipeline that take adapters."""
    return getattr(pipeline_class, "_lora_loadable_modules", ())


def _around(source: Source, parts: Mapping[str, nn.Module]) -> Any:
    """A pipeline of these parts, of shapes alone where others take adapters, and of nothing else."""
    cls = source._diffusers(source.pipeline_class)
    shapes = {name: parts[name] if name in parts else source.meta_part(name) for name in loadable(cls) if source.has(name)}
    parameters = [each for name, each in inspect.signature(cls.__init__).parameters.items() if name != "self"]
    with _said():
        return cls(**{each.name: shapes.get(each.name) for each in parameters if each.default is each.empty or each.name in shapes})


def _load(pipeline: Any, adapter: Adapter, name: str) -> list[str]:
    """By diffusers' own loader, and what that and peft warn of; UserError where it refuses."""
    try:
        with _said() as lines, warnings.catch_warnings(record=True) as told, loading(adapter.file):
            warnings.simplefilter("always")
            pipeline.load_lora_weights(str(adapter.file.parent), weight_name=adapter.file.name, adapter_name=name)
    except UserError as error:
        raise UserError(f"{adapter.key}.path: {adapter.name!r} does not fit this {type(pipeline).__name__}: {_why(error)}") from error
    return [*lines, *(str(warning.message) for warning in told)]


def _noting_keys(pipeline: Any) -> list[str]:
    """The keys of what the pipeline's next `load_lora_weights` reads, in its own dialect, once it has."""
    noted: list[str] = []
    own = pipeline.lora_state_dict

    def read(*given: Any, **told: Any) -> Any:
        found = own(*given, **told)
        noted.extend(found if isinstance(found, dict) else found[0])
        return found

    pipeline.lora_state_dict = read
    return noted


def _why(error: UserError) -> str:
    cause = error.__cause__ or error
    text = str(cause) or f"diffusers' reader of its keys ends in {type(cause).__name__}"
    shape = r"torch\.Size\(\[([\d, ]+)\]\)"
    sizes = re.search(rf"size mismatch for (\S+?)(?:\.fits|\.tuned)?\.weight: .*?{shape}.*?{shape}", text, re.DOTALL)
    if sizes:
        return f"it was made for another base: {sizes[1]} has the shape ({sizes[2]}), where ({sizes[3]}) is needed"
    if "Target modules" in text or "target modules" in text.lower():
        return "none of its layers is here, so it was made for another base"
    return " ".join(text.split())[:200]


def _adapted(part: nn.Module) -> bool:
    from peft.tuners.tuners_utils import BaseTunerLayer

    return any(isinstance(module, BaseTunerLayer) for module in part.modules())


def _has_magnitudes(part: nn.Module) -> bool:
    """Whether an adapter in it is more than a multiple of its factors that is added to a layer: peft's variants, of which files can ask for DoRA."""
    return any(getattr(module, "lora_variant", None) for module in part.modules())


class _Lines(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(" ".join(record.getMessage().split())[:200])


@contextmanager
def _said() -> Iterator[list[str]]:
    """What diffusers warns of within, whatever it is told to show, which is shown to nobody."""
    logger, handler = logging.getLogger("diffusers"), _Lines()
    others, propagate, level = list(logger.handlers), logger.propagate, logger.level
    logger.handlers, logger.propagate = [handler], False
    logger.setLevel(logging.WARNING)
    try:
        yield handler.lines
    finally:
        logger.handlers, logger.propagate = others, propagate
        logger.setLevel(level)
