"""Whether a pipeline's folder holds all that any later stage loads, and nothing that would run code: from names of files alone."""

from __future__ import annotations

import inspect
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastgen.errors import UserError
from fastgen.families.components import of_teacher, read_index
from fastgen.families.weights import WeightsIndex
from fastgen.surgery.moe import stored

_LIBRARIES = ("diffusers", "transformers")
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")
_NO_NETWORK = r"Tokenizer|Processor|FeatureExtractor|Scheduler"
_STEMS = {"diffusers": "diffusion_pytorch_model", "transformers": "model"}


def check_complete(folder: Path, optional: Sequence[str] = (), *, weights: bool = True) -> None:
    """UserError for a component that is missing, that has no weights as safetensors (where `weights`), or whose class is not the libraries' own.

    An entry [null, null] says that a component is not there; optional: those that the family does without. The scheduler may be of any
    kind: the export has one of its own. Weights may be a variant's, such as fp16's, where that is all there is, of one name in all.
    """
    index = read_index(folder)
    if isinstance(index["_class_name"], list):
        raise _refusal(f"{str(folder)!r} is of the class {'.'.join(index['_class_name'])}, which is code of its own, and fastgen runs none")
    there = {name: entry for name, entry in index.items() if isinstance(entry, list) and entry[0] is not None}
    for name in _needed(index["_class_name"]):
        if name not in there and name not in optional:
            raise _refusal(f"{str(folder / 'model_index.json')!r} names no {name}, without which diffusers does not load a {index['_class_name']}")
    for name, (library, cls) in there.items():
        if name == "scheduler":
            continue
        if library not in _LIBRARIES and not _of_diffusers(library) and not _of_experts(folder / name, library, cls):
            raise _refusal(f"its {name} is a {library}.{cls}, which is none of {' and '.join(_LIBRARIES)}; fastgen runs no code of a pipeline's own")
        if not (folder / name).is_dir() or not any((folder / name).iterdir()):
            raise _refusal(f"its model_index.json names a {name} ({cls}), but there is nothing in {str(folder / name)!r}; get the pipeline whole")
        partner = name.replace("text_encoder", "tokenizer")
        if partner not in there:
            raise _refusal(f"its {name} has no {partner} in {str(folder / 'model_index.json')!r}")
        if not re.search(_NO_NETWORK, cls):
            if not (folder / name / "config.json").is_file():
                raise _refusal(f"there is no {str(folder / name / 'config.json')!r}; get the pipeline whole")
            if weights:
                _check_weights(folder / name, _STEMS["diffusers"] if _of_experts(folder / name, library, cls) else _STEMS.get(library, "model"))
    if len(names := set(variants(folder).values())) > 1:
        raise _refusal(f"{str(folder)!r} has weights as the variants {' and '.join(sorted(names))} alone, and diffusers loads one")


def has_no_weights(folder: Path) -> bool:
    """Whether a folder holds the configurations of a pipeline and no weights at all, of any kind: enough to plan with."""
    endings = (".safetensors", ".safetensors.index.json", *_PICKLES, ".msgpack", ".h5", ".onnx", ".gguf")
    return not any(path.name.endswith(endings) for path in folder.glob("*/*"))


def variants(folder: Path) -> dict[str, str]:
    """The components of a folder whose weights are there as a variant alone, and which: fp16 where there are several."""
    found: dict[str, str] = {}
    for name, entry in read_index(folder).items():
        if isinstance(entry, list) and entry[0] is not None and (folder / name).is_dir():
            stem = _STEMS["diffusers"] if _of_experts(folder / name, *entry) else _STEMS.get(entry[0], "model")
            if not any((folder / name / f"{stem}.{ending}").is_file() for ending in ("safetensors", "safetensors.index.json")):
                names = sorted(file.name for file in (folder / name).iterdir())
                pattern = re.compile(rf"{stem}\.(?:([^.-]+)\.safetensors|safetensors\.index\.([^.]+)\.json)")
                if loaded := [match[1] or match[2] for each in names if (match := pattern.fullmatch(each))]:
                    found[name] = "fp16" if "fp16" in loaded else loaded[0]
    return found


def is_variant(name: str, variant: str) -> bool:
    """Whether a file of weights, or their index, is a variant's."""
    return re.search(rf"\.{re.escape(variant)}(-\d+-of-\d+)?\.(safetensors|json)$", name) is not None


def _needed(pipeline_class: str) -> list[str]:
    """The components without which `from_pretrained` does not load a pipeline; its call might do without more, such as SD3's without T5."""
    import diffusers

    cls = getattr(diffusers, pipeline_class, None)
    if cls is None:  # a family has to know it
        return []
    optional = {*cls._optional_components, "self", "scheduler"}
    parameters = inspect.signature(cls.__init__).parameters.values()
    # What diffusers may go without where a call is given embeddings, prompts are read with.
    readers = [each.name for each in parameters if re.match("text_encoder|tokenizer", each.name)]
    return list(dict.fromkeys([*(each.name for each in parameters if each.name not in optional and each.default is each.empty), *readers]))


def _of_diffusers(library: str) -> bool:
    """Whether the word is one of the packages in which diffusers keeps what belongs to a pipeline."""
    from diffusers import pipelines

    return library.isidentifier() and hasattr(pipelines, library)


def _of_experts(folder: Path, library: str, cls: str) -> bool:
    """Whether it is a network as fastgen itself exports it, which is loaded without the code that lies beside it."""
    file = folder / "config.json"
    experts = of_teacher(file).get("experts") if file.is_file() else None
    return isinstance(experts, dict) and [library, cls] == stored.entry(str(experts.get("dense")))


def _check_weights(folder: Path, stem: str) -> None:
    if (folder / f"{stem}.safetensors").is_file():
        return
    names = sorted(file.name for file in folder.iterdir() if file.is_file())
    indices = [name for name in names if re.fullmatch(rf"{stem}\.safetensors\.index\.([^.]+\.)?json", name)]
    if indices:
        index = folder / (f"{stem}.safetensors.index.json" if f"{stem}.safetensors.index.json" in indices else indices[0])
        for name in sorted(set(of_teacher(index, WeightsIndex)["weight_map"].values())):
            if not (folder / name).is_file():
                raise _refusal(f"{index.name} names the weights {str(folder / name)!r}, which are not there; get the pipeline whole")
        return
    if any(re.fullmatch(rf"{stem}\.[^.-]+\.safetensors", name) for name in names):
        return
    for name in (name for name in names if re.fullmatch(rf"{stem}\S*-\d+-of-\d+\S*\.safetensors", name)):
        raise _refusal(f"{str(folder)!r} has a part of its weights ({name}) and no index of all; get the pipeline whole")
    for name in (name for name in names if name.endswith(_PICKLES)):
        raise _refusal(
            f"{str(folder)!r} has its weights as a pickle alone ({name}), and pickles run code; save them as safetensors with diffusers, "
            "where you trust them: save_pretrained(FOLDER, safe_serialization=True)"
        )
    raise _refusal(f"{str(folder)!r} has no weights: no {stem}.safetensors; get the pipeline whole")


def _refusal(what: Any) -> UserError:
    return UserError(f"recipe key teacher.pretrained: {what}")
