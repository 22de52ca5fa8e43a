"""One small file per diffusers pipeline family; `find_family` picks it from the pipeline's class."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from fastgen.discovery import find_class, module_names
from fastgen.errors import UserError, nearest
from fastgen.families import adapters
from fastgen.families.base import Family
from fastgen.families.complete import check_complete, has_no_weights, is_variant, variants
from fastgen.families.components import check_sizes, read_index
from fastgen.files import expanded
from fastgen.fingerprints import digest, file_names, folder_hash, known_hash

Lora = Sequence[Mapping[str, Any]]  # adapters of a teacher, `{path, weight}` each

# Modules that are no family.
_SHARED = (
    *("adapters", "base", "betas", "codec", "complete", "components", "discrete", "fitting", "one_stream", "packing", "pipelined", "schedules"),
    *("sizing", "source"),
    *("stock_samplers", "unet", "weights"),
)
_OTHER_WEIGHTS = {".bin", ".ckpt", ".gguf", ".h5", ".md", ".msgpack", ".onnx", ".onnx_data", ".pb", ".pt", ".pth", ".xml"}


def family_names() -> list[str]:
    """Names that `teacher.family` accepts beside `auto`."""
    return module_names(__name__, shared=_SHARED)


def family_class(name: str) -> type[Family]:
    """The one Family that `fastgen.families.<name>` defines; UserError for an unknown name."""
    names = [*family_names(), "auto"]  # `auto` is resolved before, in find_family
    return find_class(__name__, name, Family, names, f"recipe key teacher.family: {name!r} is not a family")


def find_family(source: Any, name: str = "auto", *, revision: str | None = None, lora: Lora = (), planning: bool = False, **options: Any) -> Family:
    """The family of a teacher or student. source: `fastgen:NAME`, `toy:NAME`, a diffusers folder, a hub id, or a live pipeline;
    revision: of a hub id. lora: adapters that it is tuned with. planning: a folder of configurations without any weights will do."""
    if revision is not None:
        source = resolve_source(source, revision)
    if name == "auto":
        name = "toy" if isinstance(source, str) and source.startswith("toy:") else _family_of(_pipeline_class(source))
    if isinstance(source, (str, Path)) and family_class(name).exportable:
        folder = resolve_source(source)
        check_complete(folder, family_class(name).optional, weights=not (planning and has_no_weights(folder)))
        check_sizes(folder)
    family = family_class(name)(source, **options)
    _ = family.shift  # read now, so that a schedule which cannot be followed is refused before anything is loaded
    if lora:
        family.warnings = family.tune_with(lora)
    return family


def _family_of(pipeline_class: str) -> str:
    by_class = {cls: name for name in family_names() for cls in family_class(name).pipeline_classes}
    if pipeline_class not in by_class:
        raise UserError(
            f"recipe key teacher.pretrained: no family for pipeline class {pipeline_class!r}; supported: {', '.join(sorted(by_class))}. "
            "A new family is one file that states the pipeline's and its network's class, path and prediction, how the network is called, "
            "how prompts are encoded and in which shapes, and where blocks and adapters are: see fastgen/families/README.md"
        )
    return by_class[pipeline_class]


def draws_singly(pipeline_class: str, guidance: float | None) -> bool:
    """Whether a stock pipeline's call takes one prompt at a time with so much guidance; of classes that no family knows it is not known."""
    known = (family_class(name) for name in family_names())
    return guidance is not None and guidance > 1 and any(family.guides_singly for family in known if pipeline_class in family.pipeline_classes)


def _pipeline_class(source: Any) -> str:
    if not isinstance(source, (str, Path)):
        return type(source).__name__
    folder = resolve_source(source)
    name = read_index(folder).get("_class_name")
    if name is None:
        raise UserError(f"recipe key teacher.pretrained: {str(folder / 'model_index.json')!r} has no key '_class_name'")
    return name[-1] if isinstance(name, list) else name


def is_hub_id(source: str) -> bool:
    """Whether a source is the name `owner/name` of a repository on the hub: there is no such folder here."""
    return source.count("/") == 1 and not source.startswith((".", "/", "~", "fastgen:", "toy:")) and not Path(source).is_dir()


def pinned_revision(source: str, revision: str | None) -> str | None:
    """The commit that a hub id's revision (None: its newest) is now, once it is downloaded; None for other sources, which have none."""
    if revision is None and not is_hub_id(source):
        return None
    folder = resolve_source(source, revision)
    return folder.name if folder.parent.name == "snapshots" else revision


def source_hash(source: str, revision: str | None = None, lora: Lora = ()) -> str:
    """What a teacher is, wherever it lies: SHA-256 of the files that its pipeline is loaded from, and of its adapters with their weights. A
    closed-form teacher is its name.

    Files that do not count: those outside the pipeline's components, pickles and other frameworks' weights, variants such as fp16 of
    components that have weights without one; a hub's cache may hold any of them. Hashes of large files are remembered (`fingerprints.known_hash`).
    """
    if source.startswith("toy:"):
        return source
    folder = resolve_source(source, revision)
    return _tuned(folder_hash(folder, _loaded(folder), of=known_hash), lora)


def lora_hash(lora: Lora) -> str:
    """What a teacher's adapters are, wherever they lie, with their weights, in their order."""
    return digest([adapter.identity for adapter in adapters.find(lora)])


def _tuned(base: str, lora: Lora) -> str:
    return digest([base, lora_hash(lora)]) if lora else base


def parts_hash(source: str, revision: str | None, prefixes: Sequence[str], lora: Lora = ()) -> str:
    """The same of the components alone whose names begin so, which several teachers may share; of the whole where there are none. lora: where
    adapters may change these components."""
    if source.startswith("toy:"):
        return source
    folder = resolve_source(source, revision)
    names = _loaded(folder)
    chosen = [name for name in names if "/" in name and name.startswith(tuple(prefixes))] or names
    return _tuned(folder_hash(folder, chosen, of=known_hash), lora)


def _loaded(folder: Path) -> list[str]:
    components = {name for name, value in read_index(folder).items() if isinstance(value, list)}
    only = variants(folder)
    return [name for name in file_names(folder) if _is_loaded(PurePosixPath(name), components, only)]


def _is_loaded(file: PurePosixPath, components: set[str], only: Mapping[str, str]) -> bool:
    """only: the components that have their weights as a variant alone."""
    if len(file.parts) == 1:
        return file.name in ("model_index.json", "fastgen.json")
    _, _, ending = file.name.partition(".")
    if "safetensors" in ending or "index" in ending:
        variant = only.get(file.parts[0])
        loaded = ending in ("safetensors", "safetensors.index.json") if variant is None else is_variant(file.name, variant)
        return file.parts[0] in components and loaded
    return file.parts[0] in components and file.suffix not in _OTHER_WEIGHTS


def resolve_source(source: str | Path, revision: str | None = None) -> Path:
    """The local diffusers folder behind a source; hub ids are downloaded into the hub's cache, at a commit, branch or tag where
    `revision` names one. UserError when there is none."""
    text = str(source)
    if revision is not None and not is_hub_id(text):
        raise UserError(f"recipe key teacher.revision: {revision!r} is given, but {text!r} is no hub id 'owner/name', and only these have revisions")
    if text.startswith("fastgen:"):
        return _bundled(text.removeprefix("fastgen:"))
    folder = expanded(text)
    if folder.is_dir():
        if not (folder / "model_index.json").is_file():
            raise UserError(f"recipe key teacher.pretrained: {text!r} is a folder without model_index.json, so not a diffusers pipeline")
        return folder
    if text.startswith((".", "/", "~")) or text.count("/") != 1:
        raise UserError(f"recipe key teacher.pretrained: no folder {text!r}; allowed: fastgen:NAME, a hub id 'owner/name', or a diffusers folder")
    return _download(text, revision)


def _bundled(name: str) -> Path:
    assets = Path(__file__).parent.parent / "assets"
    names = [folder.parent.name for folder in sorted(assets.glob("*/model_index.json"))]
    if name not in names:
        raise UserError(f"recipe key teacher.pretrained: no bundled teacher {name!r}; {nearest(name, names)}")
    return assets / name


def _download(hub_id: str, revision: str | None) -> Path:
    import huggingface_hub.constants
    from diffusers import DiffusionPipeline

    try:
        return Path(DiffusionPipeline.download(hub_id, revision=revision))
    except (OSError, ValueError) as error:
        offline = "HF_HUB_OFFLINE is set, and its cache lacks it" if huggingface_hub.constants.HF_HUB_OFFLINE else ""
        reason = offline or str(error).strip().splitlines()[0]
        key, what = ("pretrained", "") if revision is None else ("revision", f" at {revision!r}")
        raise UserError(f"recipe key teacher.{key}: cannot get {hub_id!r}{what} from the hub ({reason}), and no folder is called so") from error
