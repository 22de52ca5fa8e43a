"""Whether a pipeline's folder holds all that any later stage loads, and nothing that would run code: from names of files alone."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from fastgen.errors import UserError
from fastgen.families.components import of_teacher, read_index
from fastgen.families.weights import WeightsIndex

_LIBRARIES = ("diffusers", "transformers")
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")
_NO_NETWORK = r"Tokenizer|Processor|FeatureExtractor|Scheduler"
_STEMS = {"diffusers": "diffusion_pytorch_model", "transformers": "model"}


def check_complete(folder: Path) -> None:
    """UserError for a component that is missing, that has no weights as safetensors without a variant, or whose class is not the libraries' own.

    An entry [null, null] says that a component is not there. The scheduler may be of any kind: the export has one of its own.
    """
    index = read_index(folder)
    if isinstance(index["_class_name"], list):
        raise _refusal(f"{str(folder)!r} is of the class {'.'.join(index['_class_name'])}, which is code of its own, and fastgen runs none")
    there = {name: entry for name, entry in index.items() if isinstance(entry, list) and entry[0] is not None}
    for name in _needed(index["_class_name"]):
        if name not in there:
            raise _refusal(f"{str(folder / 'model_index.json')!r} names no {name}, without which diffusers does not load a {index['_class_name']}")
    for name, (library, cls) in there.items():
        if name == "scheduler":
            continue
        if library not in _LIBRARIES and not _of_diffusers(library):
            raise _refusal(f"its {name} is a {library}.{cls}, which is none of {' and '.join(_LIBRARIES)}; fastgen runs no code of a pipeline's own")
        if not (folder / name).is_dir() or not any((folder / name).iterdir()):
            raise _refusal(f"its model_index.json names a {name} ({cls}), but there is nothing in {str(folder / name)!r}; get the pipeline whole")
        partner = name.replace("text_encoder", "tokenizer")
        if partner not in there:
            raise _refusal(f"its {name} has no {partner} in {str(folder / 'model_index.json')!r}")
        if not re.search(_NO_NETWORK, cls):
            _check_weights(folder / name, _STEMS.get(library, "model"))


def _needed(pipeline_class: str) -> list[str]:
    """The components without which `from_pretrained` does not load a pipeline; its call might do without more, such as SD3's without T5."""
    import diffusers

    cls = getattr(diffusers, pipeline_class, None)
    if cls is None:  # a family has to know it
        return []
    optional = {*cls._optional_components, "self", "scheduler"}
    parameters = inspect.signature(cls.__init__).parameters.values()
    return [each.name for each in parameters if each.name not in optional and each.default is each.empty]


def _of_diffusers(library: str) -> bool:
    """Whether the word is one of the packages in which diffusers keeps what belongs to a pipeline."""
    from diffusers import pipelines

    return library.isidentifier() and hasattr(pipelines, library)


def _check_weights(folder: Path, stem: str) -> None:
    if not (folder / "config.json").is_file():
        raise _refusal(f"there is no {str(folder / 'config.json')!r}; get the pipeline whole")
    if (folder / f"{stem}.safetensors").is_file():
        return
    index = folder / f"{stem}.safetensors.index.json"
    if index.is_file():
        for name in sorted(set(of_teacher(index, WeightsIndex)["weight_map"].values())):
            if not (folder / name).is_file():
                raise _refusal(f"{index.name} names the weights {str(folder / name)!r}, which are not there; get the pipeline whole")
        return
    names = sorted(file.name for file in folder.iterdir() if file.is_file())
    for name, variant in _variants(names, stem):
        save = f'DiffusionPipeline.from_pretrained(SOURCE, variant="{variant}").save_pretrained(FOLDER)'
        raise _refusal(f"{str(folder)!r} has its weights as the variant {variant!r} alone ({name}); save them without one: {save}")
    for name in (name for name in names if name.endswith(_PICKLES)):
        raise _refusal(
            f"{str(folder)!r} has its weights as a pickle alone ({name}), and pickles run code; save them as safetensors with diffusers, "
            "where you trust them: save_pretrained(FOLDER, safe_serialization=True)"
        )
    raise _refusal(f"{str(folder)!r} has no weights: no {stem}.safetensors; get the pipeline whole")


def _variants(names: Iterable[str], stem: str) -> Iterator[tuple[str, str]]:
    """Files of weights that diffusers loads when it is given their variant, each with its name: `model.fp16.safetensors`,
    `model.fp16-00001-of-00002.safetensors`, `model-00001-of-00002.fp16.safetensors`."""
    for name in names:
        found = re.fullmatch(rf"{stem}(?:-\d+-of-\d+)?\.(?P<variant>[^.]+?)(?:-\d+-of-\d+)?\.safetensors", name)
        if found:
            yield name, found["variant"]


def _refusal(what: Any) -> UserError:
    return UserError(f"recipe key teacher.pretrained: {what}")
