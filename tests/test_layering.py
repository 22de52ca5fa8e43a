"""Imports run one way. Module-level and function-level imports both count; `if TYPE_CHECKING` and the lazy package root do not."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import fastgen
from fastgen.distillers import distiller_names
from fastgen.families import family_names

PACKAGE = Path(fastgen.__file__).parent
# Each layer may import itself and those before it.
LAYERS = [
    {
        "errors",
        "across",
        "group",
        "path",
        "timesteps",
        "conditioning",
        "rng",
        "sampling",
        "windows",
        "shards",
        "jvp",
        "config",
        "files",
        "fingerprints",
        "living",
        "discovery",
        "progress",
        "legibility",
        "guidance",
        "tf32",
    }
    | {"printing", "unused", "records", "manifest", "yaml_files", "static", "optional", "own_code"},
    {"denoiser", "families", "surgery", "data", "generator", "assets", "perceptual", "feature_distance", "rewards", "portable", "provenance"}
    | {"second_round"},
    {"roles", "ema", "parallel", "sharding"},
    {"distillers"},
    {"divergence", "optimizers", "trainer", "checkpoint", "tensor_files", "saving"},
    {"export", "evaluation", "report", "report_table", "card", "comfy", "adapter_files", "curves", "pictures", "doctor", "diagnostics", "runlog"}
    | {"report_quality", "report_nearest", "pages", "gallery", "votes", "straightness"},
    {"foresight", "sizes", "plan", "inputs", "licensing", "memory", "outlook", "activations", "room"},
    {"run"},
    {"caching"},
    {"terminal", "cli", "cli_evaluate", "cli_gallery", "cli_straightness", "__main__"},
]
# A script that trains the bundled teacher with the whole package; nothing imports it.
SCRIPTS = {"assets.build": len(LAYERS) - 1}
MODULES = {
    ".".join(file.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__"): file
    for file in sorted(PACKAGE.rglob("*.py"))
    if file != PACKAGE / "__init__.py"
}


def layer(module: str) -> int:
    if module in SCRIPTS:
        return SCRIPTS[module]
    found = [i for i, names in enumerate(LAYERS) if module.split(".")[0] in names]
    assert found, f"fastgen.{module} is in no layer: add it to LAYERS"
    return found[0]


def runtime_nodes(tree: ast.AST) -> Iterator[ast.AST]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        yield node
        yield from runtime_nodes(node)


def imports(module: str) -> set[str]:
    """Modules of fastgen that `module` imports, without the `fastgen.` prefix; names inside a module count as the module."""
    found = set()
    for node in runtime_nodes(ast.parse(MODULES[module].read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.removeprefix("fastgen.") for alias in node.names if alias.name.startswith("fastgen.")}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"relative import in fastgen.{module}"
            if node.module == "fastgen":
                found |= {alias.name for alias in node.names if alias.name != "__version__"}
            elif node.module and node.module.startswith("fastgen."):
                base = node.module.removeprefix("fastgen.")
                found |= {inner if (inner := f"{base}.{alias.name}") in MODULES else base for alias in node.names}
    return found


def test_the_reader_of_imports_sees_every_form() -> None:
    assert {"run", "terminal", "config", "errors"} <= imports("cli")  # function-level, and `from fastgen import …`
    assert {"roles", "ema", "distillers.base"} <= imports("trainer")
    assert "families" in imports("families.source")  # inside a function


@pytest.mark.parametrize("module", MODULES)
def test_imports_run_one_way(module: str) -> None:
    above = {name for name in imports(module) if layer(name) > layer(module)}
    assert not above, f"fastgen.{module} imports {sorted(above)} from a higher layer"


def test_scripts_are_imported_by_nobody() -> None:
    assert not [module for module in MODULES if imports(module) & SCRIPTS.keys()]


def test_every_layer_names_existing_modules() -> None:
    assert set().union(*LAYERS) == {module.split(".")[0] for module in MODULES}


@pytest.mark.parametrize("module", [name for name in MODULES if name.startswith("distillers")])
def test_distillers_take_only_specs_from_roles(module: str) -> None:
    for node in ast.walk(ast.parse(MODULES[module].read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "fastgen.roles":
            assert {alias.name for alias in node.names} <= {"RoleSpec", "student", "trainable", "judge", "frozen"}
        elif isinstance(node, ast.ImportFrom) and node.module == "fastgen":
            assert "roles" not in {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            assert "fastgen.roles" not in {alias.name for alias in node.names}


def test_the_trainer_names_no_method_and_no_family() -> None:
    source = MODULES["trainer"].read_text().lower()
    methods = {word for name in distiller_names() for word in (name, name.replace("_", ""), name.replace("_", " "))}
    assert {"dmd2", "flowmatching"} <= methods
    assert {"sd3", "toy"} <= set(family_names())
    for name in methods | set(family_names()):
        assert not re.search(rf"\b{name}\b", source), name


def python(code: str) -> str:
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=PACKAGE.parent, check=False)
    assert process.returncode == 0, process.stderr
    return process.stdout.strip()


def test_the_first_layer_imports_without_diffusers() -> None:
    modules = ", ".join(f"fastgen.{name}" for name in sorted(LAYERS[0]))
    blocked = "for name in ('diffusers', 'transformers', 'peft', 'accelerate'): sys.modules[name] = None\n"
    assert python(f"import sys\n{blocked}import {modules}\nprint('ok')") == "ok"


def test_importing_the_package_does_not_import_torch() -> None:
    heavy = "{'torch', 'numpy', 'pydantic', 'diffusers', 'transformers'} & sys.modules.keys()"
    assert python(f"import sys, fastgen\nprint(fastgen.__version__, sorted({heavy}))") == f"{fastgen.__version__} []"
