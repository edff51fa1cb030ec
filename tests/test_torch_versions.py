"""The names of torch that the sources use exist in the installed and in the oldest torch supported.

`torch_2_11.json` holds the names of the modules of torch 2.11 that are used here, with parameters
of functions. To renew it, for names of another module, from an unpacked wheel:

    pip download torch==2.11.0 --no-deps; unzip torch-*.whl '*.py' '*.pyi' -d sources
    python tests/test_torch_versions.py sources
"""

import ast
import importlib
import importlib.util
import inspect
import json
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
RECORD = Path(__file__).with_name("torch_2_11.json")
PACKAGES = (
    *("model", "data", "parallel", "resilience", "checkpoint", "formats", "evaluation"),
    *("training", "planning", "cli", "bench"),
)
# Names newer than torch 2.11, and the file that uses them only after `hasattr`.
GUARDED = {
    "torch.distributed._functional_collectives.all_gather_single_autograd": (
        "parallel/context_parallel.py"
    ),
}


def sources() -> list[Path]:
    files = [*ROOT.glob("*.py"), *(f for name in PACKAGES for f in (ROOT / name).rglob("*.py"))]
    return sorted(files)


@cache
def used(path: Path) -> list[tuple[str, ast.Call | None]]:
    """Return each dotted name below `torch` in a file, and its call if it is called."""
    return list(_used(path))


def _used(path: Path) -> Iterator[tuple[str, ast.Call | None]]:
    tree = ast.parse(path.read_text())
    aliases: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for name in node.names:
                if name.name.split(".")[0] == "torch":
                    aliases[name.asname or "torch"] = name.name if name.asname else "torch"
                    yield name.name, None
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "torch":
            for name in node.names:
                aliases[name.asname or name.name] = f"{node.module}.{name.name}"
                yield f"{node.module}.{name.name}", None
    calls = {id(node.func): node for node in ast.walk(tree) if isinstance(node, ast.Call)}
    for node in ast.walk(tree):
        names, inner = [], node
        while isinstance(inner, ast.Attribute):
            names.append(inner.attr)
            inner = inner.value
        if isinstance(inner, ast.Name) and inner.id in aliases:
            yield ".".join([aliases[inner.id], *reversed(names)]), calls.get(id(node))


@cache
def module_of(name: str) -> tuple[str, str]:
    """Split a dotted name into its module and the first name inside it; empty for a module."""
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        module = ".".join(parts[:end])
        if module in sys.modules or _is_module(module):
            return module, parts[end] if end < len(parts) else ""
    raise AssertionError(name)


@cache
def _is_module(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):
        return False


def all_used() -> dict[tuple[str, str], set[str]]:
    """Return the files that use each (module, name)."""
    found: dict[tuple[str, str], set[str]] = {}
    for path in sources():
        for name, _ in used(path):
            found.setdefault(module_of(name), set()).add(str(path.relative_to(ROOT)))
    return found


RECORDED: dict[str, dict[str, list[str] | None]] = (
    json.loads(RECORD.read_text()) if RECORD.exists() else {}
)


def test_used_names_exist_in_the_installed_torch() -> None:
    missing = {
        f"{module}.{name}": sorted(files)
        for (module, name), files in all_used().items()
        if name and not hasattr(importlib.import_module(module), name)
    }
    assert {name: files for name, files in missing.items() if name not in GUARDED} == {}


def test_used_names_exist_in_torch_2_11() -> None:
    """Except for operators below `torch.ops`, which are registered in C++."""
    missing = {}
    for (module, name), files in all_used().items():
        known = {"", "ops", *RECORDED.get(module, {})}
        is_operator = module.startswith("torch.ops")
        if not is_operator and (module not in RECORDED or name not in known):
            missing[f"{module}.{name}"] = sorted(files)
    assert {name: files for name, files in missing.items() if name not in GUARDED} == {}


def test_keywords_of_calls_exist_in_torch_2_11_and_in_the_installed_torch() -> None:
    missing = []
    for path in sources():
        for name, call in used(path):
            module, function = module_of(name)
            parameters = RECORDED.get(module, {}).get(function)
            if call is None or not parameters or name != f"{module}.{function}":
                continue
            given = {keyword.arg for keyword in call.keywords} - {None}
            installed = _parameters(getattr(importlib.import_module(module), function))
            for version, known in (("2.11", parameters), ("installed", installed)):
                if known is not None and "**" not in known and (unknown := given - {*known}):
                    missing.append((path.name, name, version, sorted(map(str, unknown))))
    assert missing == []


def test_guarded_names_are_missing_in_torch_2_11() -> None:
    for name, file in GUARDED.items():
        module, _, last = name.rpartition(".")
        assert last not in RECORDED.get(module, {}), f"{name} needs no guard"
        assert f'"{last}")' in (ROOT / file).read_text()  # of hasattr


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("import torch.distributed as dist\ndist.barrier()", {"torch.distributed.barrier"}),
        ("from torch.nn import functional as F\nF.silu(x)", {"torch.nn.functional.silu"}),
        ("import torch\ntorch.cuda.memory._snapshot()", {"torch.cuda.memory._snapshot"}),
    ],
)
def test_names_are_found_through_aliases(text: str, names: set[str], tmp_path: Path) -> None:
    path = tmp_path / "a.py"
    path.write_text(text)
    assert names <= {name for name, _ in used(path)}


def _parameters(function: Any) -> list[str] | None:
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return None
    return ["**" if p.kind is p.VAR_KEYWORD else p.name for p in parameters]


# ---------------------------------------------------------------- recording


def record(folder: Path) -> dict[str, dict[str, list[str] | None]]:
    """Return the names in the modules of an unpacked wheel that the sources use."""
    modules = {module for module, _ in all_used()}
    return {
        module: names_in(folder, module) for module in sorted(modules) if in_wheel(folder, module)
    }


def in_wheel(folder: Path, module: str) -> bool:
    path = folder.joinpath(*module.split("."))
    return any(f.exists() for f in (path.with_suffix(".py"), path.with_suffix(".pyi"), path))


def names_in(folder: Path, module: str) -> dict[str, list[str] | None]:
    """Return the top-level names of a module, with the parameters of its functions."""
    path = folder.joinpath(*module.split("."))
    files = [path.with_suffix(".py"), path / "__init__.py", path / "__init__.pyi"]
    if module == "torch":  # filled from C++
        files += [folder / "torch/_C/_VariableFunctions.pyi", folder / "torch/_C/__init__.pyi"]
    if module == "torch.distributed":
        files += [folder / f"torch/distributed/{name}.py" for name in ("distributed_c10d",)]
        files += [folder / "torch/_C/_distributed_c10d.pyi"]
    found: dict[str, list[str] | None] = {}
    for file in files:
        if not file.exists():
            continue
        tree = ast.parse(file.read_text())
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.names[0].name == "*":
                above = module.split(".") if file.stem == "__init__" else module.split(".")[:-1]
                above = above[: len(above) - max(node.level - 1, 0)] if node.level else []
                found |= names_in(folder, ".".join([*above, *(node.module or "").split(".")]))
        found |= _top_level(tree.body)
    return dict(sorted(found.items()))


def _top_level(body: list[ast.stmt]) -> dict[str, list[str] | None]:
    found: dict[str, list[str] | None] = {}
    for node in body:
        if isinstance(node, ast.FunctionDef):
            arguments = node.args
            every = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
            parameters = [each.arg for each in every] + ["**"] * (arguments.kwarg is not None)
            decorated = bool(node.decorator_list) or node.name in found
            found[node.name] = None if decorated else parameters  # overloads, wrappers
        elif isinstance(node, ast.ClassDef):
            found[node.name] = None
        elif isinstance(node, ast.Import | ast.ImportFrom):
            found |= {(name.asname or name.name).split(".")[0]: None for name in node.names}
        elif isinstance(node, ast.Assign | ast.AnnAssign | ast.AugAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names = [n.id for t in targets for n in ast.walk(t) if isinstance(n, ast.Name)]
            found |= dict.fromkeys(names, None)
        else:  # conditions, try and with
            for inner in ast.iter_child_nodes(node):
                blocks = [inner] if isinstance(inner, ast.stmt) else getattr(inner, "body", [])
                found |= _top_level([each for each in blocks if isinstance(each, ast.stmt)])
    return found


if __name__ == "__main__":
    found = record(Path(sys.argv[1]))
    lines = [f"{json.dumps(name)}: {json.dumps(names)}" for name, names in found.items()]
    RECORD.write_text("{\n" + ",\n".join(lines) + "\n}\n")
