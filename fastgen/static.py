"""What a Python file surely does not do, read without running it: whether it is Python, whether it binds a name, whether a call can fit."""

from __future__ import annotations

import ast
import importlib.machinery
import sys
from collections.abc import Iterator
from pathlib import Path

from fastgen.errors import nearest

# Who uses one of these may bind any name.
_DYNAMIC = {"globals", "locals", "vars", "exec", "eval", "setattr", "__import__", "import_module", "__getattr__", "modules"}
_SCOPES = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda)


def find_module(name: str) -> importlib.machinery.ModuleSpec | None:
    """Where `import name` would find a module; ModuleNotFoundError where it would not, None where its package may put it there itself.

    Unlike `importlib.util.find_spec` it imports no package on the way.
    """
    loaded = getattr(sys.modules.get(name), "__spec__", None)
    if name in sys.modules:
        return loaded
    path, parts = None, name.split(".")
    spec = None
    for depth in range(1, len(parts) + 1):
        whole = ".".join(parts[:depth])
        parent, spec = spec, _find(whole, path)
        if spec is None:
            if parent is not None and _makes_modules(parent):
                return None
            raise ModuleNotFoundError(f"No module named {whole!r}")
        path = spec.submodule_search_locations
        if path is None and depth < len(parts):
            if _makes_modules(spec):
                return None
            raise ModuleNotFoundError(f"No module named {name!r}; {whole!r} is not a package")
    return spec


def _find(name: str, path: list[str] | None) -> importlib.machinery.ModuleSpec | None:
    found = (finder.find_spec(name, path, None) for finder in sys.meta_path)
    return next((spec for spec in found if spec is not None), None)


def _makes_modules(spec: importlib.machinery.ModuleSpec) -> bool:
    """Whether a module may put others below itself, as `os` does with `os.path`."""
    file = source_file(spec)
    text = "" if file is None or file.suffix != ".py" else file.read_text(encoding="utf-8", errors="replace")
    return not text or "__path__" in text or "modules" in text


def source_file(spec: importlib.machinery.ModuleSpec | None) -> Path | None:
    """The file of a module, if it has one."""
    return Path(spec.origin) if spec is not None and spec.has_location and spec.origin else None


class Unfit(Exception):
    """What the name of a file cannot be used for."""


def parse(file: Path) -> ast.Module:
    """A file's syntax tree; SyntaxError where it is no Python, OSError where it cannot be read."""
    try:
        return ast.parse(file.read_bytes(), str(file))
    except (ValueError, RecursionError, MemoryError) as error:  # a zero byte; nesting without end
        raise SyntaxError(str(error) or "nested too deep") from error


def check_function(tree: ast.Module, name: str, arguments: int) -> None:
    """Unfit where a module surely has no `name`, or has one that cannot be called with so many positional arguments."""
    bound = [(node, one) for node in _module_level(tree) for one in _bound(node)]
    own = [node for node, one in bound if one == name]
    if not own and not _may_bind_anything(tree, name):
        functions = [one for node, one in bound if isinstance(node, (ast.FunctionDef, ast.ImportFrom))]
        raise Unfit(f"has no {name!r}; {_nearest(name, functions)}")
    if len(own) == 1:
        _check_call(own[0], arguments)
        for node in _module_level(tree):
            if isinstance(node, ast.Assign) and own[0] in node.targets and isinstance(node.value, ast.Constant):
                raise Unfit(f"is a {type(node.value.value).__name__}")


def _nearest(name: str, names: list[str]) -> str:
    return nearest(name, [one for one in dict.fromkeys(names) if not one.startswith("_")])


def _module_level(node: ast.AST) -> Iterator[ast.AST]:
    """Every node that runs as the module is imported, functions' and classes' own bodies left out."""
    for below in ast.iter_child_nodes(node):
        yield below
        if not isinstance(below, _SCOPES):
            yield from _module_level(below)


def _bound(node: ast.AST) -> list[str]:
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        return [node.name]
    if isinstance(node, (ast.Import, ast.ImportFrom)):
        return [alias.asname or alias.name.partition(".")[0] for alias in node.names]
    if isinstance(node, ast.Name) and isinstance(node.ctx, (ast.Store, ast.Del)):
        return [node.id]
    captured = getattr(node, "name", None) or getattr(node, "rest", None)
    return [captured] if isinstance(captured, str) and isinstance(node, (ast.ExceptHandler, ast.MatchAs, ast.MatchStar, ast.MatchMapping)) else []


def _may_bind_anything(tree: ast.Module, name: str) -> bool:
    for node in ast.walk(tree):
        words = {getattr(node, "id", None), getattr(node, "attr", None), getattr(node, "name", None)}
        if words & _DYNAMIC or (isinstance(node, ast.Global) and name in node.names):
            return True
        if isinstance(node, (ast.Import, ast.ImportFrom)) and any(alias.name == "*" or alias.name in _DYNAMIC for alias in node.names):
            return True
    return False


def _check_call(node: ast.AST, arguments: int) -> None:
    if isinstance(node, ast.AsyncFunctionDef):
        raise Unfit("is an async function, which returns no number")
    if isinstance(node, ast.FunctionDef) and not node.decorator_list:
        _check_signature(node.args, arguments)


def _check_signature(signature: ast.arguments, arguments: int) -> None:
    positional = [*signature.posonlyargs, *signature.args]
    needed = len(positional) - len(signature.defaults)
    named = [arg.arg for arg, default in zip(signature.kwonlyargs, signature.kw_defaults, strict=True) if default is None]
    if needed > arguments:
        raise Unfit(f"missing a required argument: {positional[arguments].arg!r}")
    if len(positional) < arguments and signature.vararg is None:
        raise Unfit("too many positional arguments")
    if named:
        raise Unfit(f"missing a required argument: {named[0]!r}")
