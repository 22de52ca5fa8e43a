"""The packages that a borrowed machine may lack: named in benchmarks/wheels.txt, installed from a folder of wheels."""

from __future__ import annotations

import importlib
import shutil
import subprocess
import sys
from pathlib import Path

from benchmarks.kernels.peers import FOLDER, PEERS
from benchmarks.measuring.environment import ROOT

WHEELS = ROOT / "benchmarks" / "wheels.txt"


def requirements(path: Path = WHEELS) -> dict[str, str]:
    """Requirements by the name that Python imports: each line is `name==version  # import name`."""
    lines = [line.partition("#") for line in path.read_text(encoding="utf-8").splitlines()]
    return {comment.strip(): requirement.strip() for requirement, _, comment in lines if requirement.strip()}


def to_carry(name: str) -> str:
    """What to install or carry for an import that is missing."""
    known = requirements()
    return f"package {name!r} (carry the wheel of {known[name]})" if name in known else f"package {name!r}"


def install(wheels: Path, into: Path, peers: Path = FOLDER) -> None:
    """Unpack the wheels of a folder into another, which then is importable here too; those of peers, which are imported by one name, go as
    they are into the folder where they are looked for. SystemExit where pip refuses one."""
    found = sorted(wheels.glob("*.whl"))
    if not found:
        raise SystemExit(f"--wheels: no *.whl in {str(wheels)!r}")
    rivals = [path for path in found if path.name.partition("-")[0] in {peer.distribution.replace("-", "_") for peer in PEERS}]
    for path in rivals:
        peers.mkdir(exist_ok=True)
        shutil.copy(path, peers)
    others = [str(path) for path in found if path not in rivals]
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-compile", "--target", str(into), *others]
    done = subprocess.run(command, capture_output=True, text=True, check=False) if others else None
    if done is not None and done.returncode:
        raise SystemExit(f"--wheels: pip cannot install what is in {str(wheels)!r}:\n{done.stderr.strip()}")
    sys.path.insert(0, str(into))
    importlib.invalidate_caches()
