"""The file of wheels to carry is read, names what slices need, and pip takes it."""

from __future__ import annotations

import importlib.metadata
import re
import zipfile
from pathlib import Path

import pytest

from benchmarks.kernels.peers import PEERS
from benchmarks.measuring import wheels
from benchmarks.slices import SLICES


def test_each_line_is_a_pinned_requirement_and_what_it_imports() -> None:
    found = wheels.requirements()
    lines = [line for line in wheels.WHEELS.read_text().splitlines() if not line.startswith("#")]
    assert {f"{peer.distribution}=={peer.version}" for peer in PEERS} <= {line.partition(" ")[0] for line in lines}
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", requirement) for requirement in found.values())
    assert {"diffusers", "pydantic", "lpips"} <= found.keys() & {name for part in SLICES for name in part.needs}
    assert wheels.to_carry("diffusers") == f"package 'diffusers' (carry the wheel of {found['diffusers']})"
    assert wheels.to_carry("xyz") == "package 'xyz'"


def test_what_they_need_themselves_is_there_or_among_them() -> None:
    """pip is told --no-deps, so nothing else brings it."""
    provided = {requirement.partition("==")[0].replace("_", "-").lower() for requirement in wheels.requirements().values()}
    for name in provided & {dist.name.lower() for dist in importlib.metadata.distributions()}:
        for need in importlib.metadata.requires(name) or []:
            wanted = re.split(r"[^\w.-]", need)[0].replace("_", "-").lower()
            assert "extra ==" in need or wanted in provided | ON_THE_MACHINE, f"{name} needs {need}"


# Of what the packages need, what a machine with transformers, accelerate, peft and torchvision has.
ON_THE_MACHINE = {
    "torch", "torchvision", "triton", "numpy", "scipy", "tqdm", "pillow", "requests", "regex", "filelock", "safetensors", "huggingface-hub", "httpx",
    "typing-extensions", "typing-inspection", "zipp", "einops", "hf-xet",
}  # fmt: skip


def wheel(folder: Path, name: str, version: str, text: str) -> None:
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as file:
        info = f"{name}-{version}.dist-info"
        file.writestr(f"{name}/__init__.py", text)
        file.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\nRequires-Dist: no-such-package\n")
        file.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: x\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        file.writestr(f"{info}/RECORD", "")


def test_wheels_are_unpacked_without_what_they_need(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.path", list(__import__("sys").path))
    wheel(tmp_path, "carried_stand_in", "1.0", "value = 7\n")
    wheel(tmp_path, "jvp_flash_attention", "0.14.0", "value = 8\n")
    wheels.install(tmp_path, tmp_path / "packages", tmp_path / "peers")
    assert __import__("carried_stand_in").value == 7
    assert not (tmp_path / "packages" / "jvp_flash_attention").exists()
    assert [path.name for path in (tmp_path / "peers").iterdir()] == ["jvp_flash_attention-0.14.0-py3-none-any.whl"]


def test_no_wheels_and_broken_wheels_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"--wheels: no \*\.whl in"):
        wheels.install(tmp_path, tmp_path / "packages")
    (tmp_path / "broken-1.0-py3-none-any.whl").write_bytes(b"no zip")
    with pytest.raises(SystemExit, match="--wheels: pip cannot install"):
        wheels.install(tmp_path, tmp_path / "packages")
