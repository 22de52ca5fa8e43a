"""The wheel alone, installed away from the checkout, lists its recipes and trains one by its bare name."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import fastgen
from fastgen.config import shipped_recipes

CHECKOUT = Path(__file__).parent.parent
IN_WHEEL = ("fastgen", "kernels", "recipes", "pyproject.toml", "README.md", "LICENSE")
SMALL = ("train.steps=3", "train.batch_size=8", "train.sample_every=0", "evaluate.protocol=null")


def python(*arguments: str, cwd: Path, path: Path | None = None) -> str:
    """Run Python with nothing of ours on its path but `path`; -P keeps the current folder off it. Returns stdout and stderr."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    environment |= {"HF_HUB_OFFLINE": "1"} | ({"PYTHONPATH": str(path)} if path else {})
    done = subprocess.run([sys.executable, "-P", *arguments], cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, without network and without the checkout's ignored files."""
    source = tmp_path_factory.mktemp("source")
    for name in IN_WHEEL:
        if (CHECKOUT / name).is_dir():
            shutil.copytree(CHECKOUT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(CHECKOUT / name, source / name)
    python("-m", "hatchling", "build", "-t", "wheel", cwd=source)
    (built,) = (source / "dist").glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the installed package, to be put on the path."""
    target = tmp_path_factory.mktemp("installed")
    options = ("--no-deps", "--no-index", "--no-compile", "--quiet", "--disable-pip-version-check")
    python("-m", "pip", "install", *options, "--target", str(target), str(wheel), cwd=target)
    return target


def test_the_wheel_holds_the_package_its_recipes_and_its_assets(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        sizes = {info.filename: info.file_size for info in archive.infolist()}
    package = Path(fastgen.__file__).parent
    sources = [path for path in package.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    files = {path.relative_to(package.parent).as_posix() for path in sources}
    assert files <= names  # every module, the digits teacher, its classifier, the report's template
    kernels = {path.relative_to(CHECKOUT / "kernels").as_posix() for path in (CHECKOUT / "kernels" / "fastgen_kernels").rglob("*") if path.is_file()}
    kernels = {name for name in kernels if "__pycache__" not in name}
    assert kernels <= names
    recipes = {f"fastgen/recipes/{path.name}" for path in shipped_recipes().values()}
    assert recipes <= names
    for name in ("assets/digits/model_index.json", "assets/digits_classifier/model.safetensors", "templates/report.html.j2"):
        assert f"fastgen/{name}" in names
    assert sizes["fastgen/assets/digits/transformer/diffusion_pytorch_model.safetensors"] > 1_000_000
    recipes |= {"fastgen/recipes/README.md", "fastgen/recipes/cluster/README.md"}
    others = {name for name in names - files - recipes - kernels if ".dist-info/" not in name}
    assert others == set()
    metadata = next(name for name in names if name.endswith(".dist-info/entry_points.txt"))
    with zipfile.ZipFile(wheel) as archive:
        assert "fastgen = fastgen.cli:run_main" in archive.read(metadata).decode()


def test_the_checkout_is_out_of_reach(installed: Path, tmp_path: Path) -> None:
    where = python("-c", "import fastgen; print(fastgen.__file__)", cwd=tmp_path, path=installed)
    assert Path(where.strip()).is_relative_to(installed)
    finder = "import importlib.util; print(importlib.util.find_spec('fastgen'))"
    found = python("-c", finder, cwd=tmp_path).strip()
    # A checkout that is installed editably is importable, but after the path's own folders.
    assert str(installed) not in found


def test_the_installed_package_differentiates_attention(installed: Path, tmp_path: Path) -> None:
    code = (
        "import torch; from fastgen_kernels.jvp_attention import jvp_attention; from fastgen import cli\n"
        "print(jvp_attention(*[torch.randn(1, 2, 5, 8)] * 6)[1].shape)\n"
        "cli.main(['doctor'])"
    )
    said = python("-c", code, cwd=tmp_path, path=installed)
    assert "torch.Size([1, 2, 5, 8])" in said
    assert "kernel jvp_attention" in said


def test_the_installed_package_lists_recipes_and_trains_one_by_name(installed: Path, tmp_path: Path) -> None:
    listed = python("-m", "fastgen", "recipes", "list", cwd=tmp_path, path=installed)
    assert [line.split()[0] for line in listed.splitlines()] == sorted(shipped_recipes())
    said = python("-m", "fastgen", "train", "digits_dmd2_1step", *SMALL, "--output", "run", cwd=tmp_path, path=installed)
    assert "student: run/student" in said
    made = {path.name for path in (tmp_path / "run").iterdir()}
    assert made == {".lock", "run.json", "recipe.yaml", "inputs.json", "metrics.jsonl", "checkpoints", "student", "report.html", "tensorboard"}
    assert len((tmp_path / "run/metrics.jsonl").read_text().splitlines()) == 3
