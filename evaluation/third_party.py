"""Imports of third-party code that must not find this program's own modules.

A program's folder is first on `sys.path`, so that `import evaluate` in a task of lm-eval would find
`evaluate.py` instead of the package `evaluate`.
"""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent


class _OwnPackages:
    """Import hook that finds this program's packages, which its own code may import later."""

    @staticmethod
    def find_spec(name: str, path: Sequence[str] | None = None, _: Any = None) -> ModuleSpec | None:
        is_own = path is None and (ROOT / name / "__init__.py").exists()
        return PathFinder.find_spec(name, [str(ROOT)]) if is_own else None


@contextmanager
def third_party_imports() -> Iterator[None]:
    """Find installed packages before this program's packages, and none of its programs."""
    search_path, own = list(sys.path), _OwnPackages()
    programs = {path.stem for path in ROOT.glob("*.py")}
    hidden = {
        name: module
        for name in programs & sys.modules.keys()
        if (module := sys.modules[name]) and _is_own(getattr(module, "__file__", None))
    }
    for name in hidden:
        del sys.modules[name]
    sys.path[:] = [entry for entry in search_path if Path(entry or ".").resolve() != ROOT]
    sys.meta_path.append(own)
    try:
        yield
    finally:
        sys.meta_path.remove(own)
        sys.path[:] = search_path
        sys.modules.update(hidden)


def _is_own(file: str | None) -> bool:
    return file is not None and Path(file).resolve().parent == ROOT
