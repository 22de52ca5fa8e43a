"""What this installation can do: versions, devices, kernels, access to the hub, bundled teachers."""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil
import platform
import sys
from importlib import metadata
from pathlib import Path

import fastgen
from fastgen.printing import put

PACKAGES = ("torch", "diffusers", "transformers", "accelerate", "peft", "triton")
KERNELS = "fastgen_kernels"
ASSETS = Path(__file__).with_name("assets")


def doctor_report() -> list[tuple[str, str]]:
    """Pairs of what and how it is; several pairs may have the same name (one for each CUDA device, kernel or bundled teacher)."""
    versions = [(package, _version(package)) for package in PACKAGES]
    python = ("python", f"{platform.python_version()} on {platform.platform()}")
    return [("fastgen", fastgen.__version__), python, *versions, *_devices(), *_compiling(), *_kernels(), *_hub(), *_teachers()]


def print_doctor() -> None:
    """Print the report as two aligned columns."""
    pairs = doctor_report()
    width = max(len(name) for name, _ in pairs)
    for name, value in pairs:
        put(f"{name:<{width}}  {value}", sys.stdout)


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _devices() -> list[tuple[str, str]]:
    import torch

    pairs = [("CPU", f"{torch.get_num_threads()} threads")]
    for i in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(i)
        memory, capability = device.total_memory / 2**30, f"{device.major}.{device.minor}"
        pairs.append((f"cuda:{i}", f"{device.name}, {memory:.1f} GiB, compute capability {capability}"))
    if not torch.cuda.is_available():
        build = f"none visible (PyTorch is built for CUDA {torch.version.cuda})" if torch.version.cuda else "PyTorch is built without CUDA"
        pairs.append(("CUDA", build))
    return [*pairs, ("MPS", "available" if torch.backends.mps.is_available() else "not available")]


def _compiling() -> list[tuple[str, str]]:
    """Whether recipes may say train.compile: blocks."""
    import torch

    from fastgen.surgery.compiled import missing

    lacks = {kind: missing(torch.device(kind)) for kind in ("cpu", *(["cuda"] if torch.cuda.is_available() else []))}
    return [(f"compile, {kind}", "possible" if lack is None else f"not possible: {lack}") for kind, lack in lacks.items()]


def _kernels() -> list[tuple[str, str]]:
    """One pair for each operation in fastgen_kernels: what its own `describe()` says, where it has one."""
    spec = importlib.util.find_spec(KERNELS)
    places = spec.submodule_search_locations if spec is not None else None
    names = [module.name for module in pkgutil.iter_modules(places) if module.ispkg] if places else []
    if not names:
        return [("kernels", "no kernels in this version: native PyTorch attention")]
    return [(f"kernel {name}", _describe(name)) for name in names]


def _describe(name: str) -> str:
    try:
        module = importlib.import_module(f"{KERNELS}.{name}")
    except ImportError as error:
        return f"cannot be imported: {error}"
    describe = getattr(module, "describe", None)
    return describe() if describe is not None else "present"


def _hub() -> list[tuple[str, str]]:
    from huggingface_hub import constants

    mode = "offline: only files in the cache (HF_HUB_OFFLINE)" if constants.HF_HUB_OFFLINE else "online (HF_HUB_OFFLINE=1 turns access off)"
    caches = {"hub cache": Path(constants.HF_HUB_CACHE), "fastgen cache": Path.home() / ".cache" / "fastgen"}
    return [("hub access", mode), *((name, f"{cache}" + ("" if cache.is_dir() else " (not there yet)")) for name, cache in caches.items())]


def _teachers() -> list[tuple[str, str]]:
    """Pipelines that come with fastgen, by the name a recipe gives them."""
    folders = sorted(index.parent for index in ASSETS.glob("*/model_index.json"))
    return [("bundled teacher", f"fastgen:{folder.name} ({_megabytes(folder):.1f} MB)") for folder in folders] or [("bundled teachers", "none")]


def _megabytes(folder: Path) -> float:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 1e6
