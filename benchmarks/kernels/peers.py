"""Other packages that make attention's tangent on a GPU, both MIT and both imported as `jvp_flash_attention`: each is loaded by itself.

A peer is taken from the wheels in benchmarks/.peers, where `gpu.py --wheels` puts them, else from where pip installed it.
"""

from __future__ import annotations

import base64
import hashlib
import importlib
import importlib.metadata
import importlib.util
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from benchmarks.kernels.problems import Problem
from benchmarks.measuring.case import LeftOut

FOLDER = Path(__file__).parents[1] / ".peers"
PACKAGE = "jvp_flash_attention"
ENTRY = f"{PACKAGE}/jvp_attention.py"
HEAD_SIZES = (16, 32, 64, 128, 256)
GRANULE = 32  # tokens of a tile; version 0.14 has no bounds checks, so that other lengths are wrong without a word


@dataclass(frozen=True)
class Peer:
    """name: of the contender; distribution, version: on PyPI; pads: takes any length, and runs in plain PyTorch where there is no GPU."""

    name: str
    distribution: str
    version: str
    pads: bool

    def obstacle(self, problem: Problem, device: str) -> str | None:
        """Why a problem is not for this package, by its own checks or by what its kernel silently assumes."""
        if device == "cpu" and not self.pads:
            return "its kernel needs CUDA"
        if problem.head_size not in HEAD_SIZES:
            return f"takes head sizes {', '.join(map(str, HEAD_SIZES))}, not {problem.head_size}"
        if problem.tangents != "qkv":
            return "needs tangents of keys and values too"
        if problem.num_keys != problem.num_queries and not self.pads:
            return "takes self-attention only"
        if problem.num_keys < problem.num_queries:
            return "takes no fewer keys than queries"
        if problem.num_queries % GRANULE and not self.pads:
            return f"takes lengths that {GRANULE} divides, not {problem.num_queries}"
        return None

    def module(self, folder: Path = FOLDER) -> ModuleType:
        """Its module jvp_attention, under a name of its own. LeftOut where it is neither carried nor installed."""
        alias = f"peer_{self.name}"
        if alias not in sys.modules:
            _load(alias, _unpacked(self, folder) or _installed(self) or self._missing(folder))
        return importlib.import_module(f"{alias}.jvp_attention")

    def _missing(self, folder: Path) -> Path:
        raise LeftOut(f"package {self.distribution} {self.version} is not here (carry its wheel in {folder.parent.name}/{folder.name})")


PEERS = (
    Peer("jvp_flash_attention", "jvp-flash-attention", "0.14.0", pads=False),
    Peer("jvp_flash_attention_fork", "jvp-flash-attention-lucidrains-fork", "0.0.1", pads=True),
)


def _unpacked(peer: Peer, folder: Path) -> Path | None:
    """The package's folder in an unpacked wheel, unpacked now if it is not yet."""
    wheels = sorted(folder.glob(f"{peer.distribution.replace('-', '_')}-{peer.version}-*.whl"))
    if not wheels:
        return None
    into = wheels[0].with_suffix("")
    with zipfile.ZipFile(wheels[0]) as wheel:
        wheel.extractall(into)
    return into / PACKAGE


def _installed(peer: Peer) -> Path | None:
    """The package's folder where pip put it; LeftOut where a package of the same import name has overwritten its files."""
    try:
        distribution = importlib.metadata.distribution(peer.distribution)
    except importlib.metadata.PackageNotFoundError:
        return None
    if distribution.version != peer.version:
        raise LeftOut(f"{peer.distribution} {distribution.version} is installed, not {peer.version}")
    entry = next(file for file in distribution.files or () if file.as_posix() == ENTRY)
    path = Path(str(entry.locate()))
    found = base64.urlsafe_b64encode(hashlib.sha256(path.read_bytes()).digest()).rstrip(b"=").decode()
    if entry.hash is not None and entry.hash.value != found:
        raise LeftOut(f"{peer.distribution} was overwritten by another package of its import name: carry its wheel in benchmarks/{FOLDER.name}")
    return path.parent


def _load(alias: str, folder: Path) -> None:
    """Import a package from its folder under another name."""
    spec = importlib.util.spec_from_file_location(alias, folder / "__init__.py", submodule_search_locations=[str(folder)])
    assert spec is not None and spec.loader is not None
    package = importlib.util.module_from_spec(spec)
    sys.modules[alias] = package
    spec.loader.exec_module(package)
