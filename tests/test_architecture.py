"""The house keeps its rules: who imports whom, sizes that one reads with pleasure, a fast `--help`.

The table reads like that of the design. What a module imports only for its type annotations, under
`TYPE_CHECKING`, runs no code, so it may come from anywhere, but for `model`, which knows torch
alone. Imports inside functions count like those at the top.
"""

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
HOUSE = {"model", "parallel", "data", "training", "formats", "evaluation", "planning", "program"}
CHEAP = ("hydra", "omegaconf")  # what answers `--help`

# package: what of the house it may import, and which libraries. A dotted name allows itself and
# what is below it; the standard library is open to all.
MAY_IMPORT: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "model": ((), ("torch",)),
    "parallel": (("model",), ("torch", "torchao", "lightning.fabric")),
    "data": (
        (),
        (
            *("torch", "numpy", "datasets", "pyarrow", "fsspec", "zstandard", "isal"),
            *("tiktoken", "tokenizers", "llama_models", "rich"),
        ),
    ),
    "training": (
        (),
        (
            *("torch", "torchao", "lightning.fabric", "yaml", "rich"),
            *("matplotlib", "tensorboard", "wandb", "xxhash"),
        ),
    ),
    # Our checkpoints are the third format, so it reads and writes them as training does.
    "formats": (
        (
            *("model", "data.tokenizer", "data.config", "data.errors"),
            *("checkpoint.files", "checkpoint.writer"),
            *("checkpoint.position", "resilience.run_folder"),
        ),
        ("torch", "safetensors", "tokenizers", "xxhash", "pydantic"),
    ),
    "evaluation": (("model", "data.tokenizer"), ("torch", "numpy", "lm_eval", "tqdm")),
    "planning": (("model", "parallel"), ("torch", "matplotlib", "yaml", "pydantic")),
    "program": (
        ("model", "parallel", "data", "training", "formats", "evaluation", "planning"),
        ("torch", "lightning.fabric", "pydantic", *CHEAP),
    ),
    # The programs.
    "train": (tuple(HOUSE), ("torch", "lightning.fabric", *CHEAP)),
    "evaluate": (tuple(HOUSE), ("torch", "lightning.fabric", *CHEAP)),
    "prepare": (("data", "program"), CHEAP),
    "convert": (("formats", "program", "parallel.host_memory"), CHEAP),
    "plan": (("parallel", "planning", "program"), CHEAP),
    "generate": (tuple(HOUSE), ("torch", "lightning.fabric", *CHEAP)),
    "slurm": (("program", "training"), ("submitit", *CHEAP)),
    "bench": (
        (*HOUSE, "train"),
        (
            *("torch", "lightning.fabric", "numpy", "datasets", "tiktoken"),
            *("transformers", "litgpt"),
            *CHEAP,
        ),
    ),
}
# package: what it never touches, not even for types.
NEVER = {"model": ("torch.distributed", "lightning", *sorted(HOUSE - {"model"}))}

MAX_FILE, MAX_FUNCTION, MAX_TRAIN = 350, 60, 300
HELP_SECONDS = 1.0


@dataclass(frozen=True)
class Import:
    """One imported name, and where; `typing` when it is for type annotations alone."""

    module: str
    line: int
    typing: bool


def files() -> list[Path]:
    """The programs, slurm's among them, and the modules of every package."""
    packages = [path.parent for path in ROOT.glob("*/__init__.py")]
    inside = [file for package in packages for file in package.rglob("*.py")]
    return sorted([*ROOT.glob("*.py"), *ROOT.glob("slurm/*.py"), *inside])


def package_of(path: Path) -> str:
    """`model` for model/rope.py, `train` for train.py."""
    first = path.relative_to(ROOT).parts[0]
    return first.removesuffix(".py")


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def imports(node: ast.AST, typing: bool = False) -> Iterator[Import]:
    """Every import below a node, wherever it stands."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            for alias in child.names:
                yield Import(alias.name, child.lineno, typing)
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0, "relative imports hide the package"
            for alias in child.names:
                yield Import(f"{child.module}.{alias.name}", child.lineno, typing)
        elif isinstance(child, ast.If) and ast.unparse(child.test) in (
            "TYPE_CHECKING",
            "typing.TYPE_CHECKING",
        ):
            for part in child.body:
                yield from imports(ast.Module([part], []), typing=True)
            for part in child.orelse:
                yield from imports(ast.Module([part], []), typing)
        else:
            yield from imports(child, typing)


def within(module: str, names: tuple[str, ...]) -> bool:
    """Whether a module is one of the names or below one."""
    return any(f"{module}.".startswith(f"{name}.") for name in names)


def is_standard(module: str) -> bool:
    return module.partition(".")[0] in sys.stdlib_module_names


every_file = pytest.mark.parametrize("path", files(), ids=lambda path: str(path.relative_to(ROOT)))


def test_every_package_and_program_has_its_row() -> None:
    assert {package_of(path) for path in files()} == set(MAY_IMPORT)


@every_file
def test_imports_keep_to_the_table(path: Path) -> None:
    package = package_of(path)
    own, libraries = MAY_IMPORT[package]
    for found in imports(tree(path)):
        here = f"{path.relative_to(ROOT)}:{found.line} imports {found.module}"
        assert not within(found.module, NEVER.get(package, ())), here
        if not found.typing:
            allowed = within(found.module, (package, *own, *libraries))
            assert is_standard(found.module) or allowed, here


def test_the_walk_sees_imports_wherever_they_stand() -> None:
    source = """
import a
if TYPE_CHECKING:
    from b import c
else:
    import d
def function():
    try:
        import e.f
    except ImportError:
        pass
class Class:
    def method(self):
        from g.h import i as j
"""
    found = {(each.module, each.typing) for each in imports(ast.parse(source))}
    assert found == {
        ("a", False),
        ("b.c", True),
        ("d", False),
        ("e.f", False),
        ("g.h.i", False),
    }


def test_model_reads_no_environment_and_no_process_group() -> None:
    for path in files():
        if package_of(path) == "model":
            for node in ast.walk(tree(path)):
                if isinstance(node, ast.Attribute):
                    assert node.attr not in ("environ", "getenv", "distributed"), path
            assert not any(within(found.module, ("os",)) for found in imports(tree(path))), path


@pytest.mark.parametrize(
    "path",
    [path for path in files() if path.name == "config.py" and package_of(path) != "program"],
    ids=lambda path: str(path.relative_to(ROOT)),
)
def test_configurations_of_packages_import_the_standard_library_alone(path: Path) -> None:
    for found in imports(tree(path)):
        assert is_standard(found.module), f"{path}:{found.line} imports {found.module}"


@every_file
def test_every_module_says_what_it_is(path: Path) -> None:
    assert ast.get_docstring(tree(path)), path


@every_file
def test_files_and_functions_have_a_size_that_one_reads_with_pleasure(path: Path) -> None:
    lines = len(path.read_text(encoding="utf-8").splitlines())
    assert lines <= (MAX_TRAIN if path.name == "train.py" else MAX_FILE)
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            length = node.end_lineno - node.lineno + 1
            assert length <= MAX_FUNCTION, f"{path}:{node.lineno} {node.name} has {length} lines"


@pytest.mark.parametrize(
    "program", ["train.py", "prepare.py", "evaluate.py", "generate.py", "plan.py"]
)
def test_help_takes_less_than_a_second_and_loads_nothing_heavy(program: str) -> None:
    """Measured in seconds of processor time: others on the machine hardly change those."""
    process = subprocess.Popen(
        [sys.executable, "-X", "importtime", program, "--help"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None and process.stderr is not None
    # The help fits into the pipe's buffer, so the other stream can be read first.
    loaded, text = process.stderr.read(), process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    process.stdout.close()
    process.stderr.close()
    assert process.returncode == 0 and f"python {program}" in text
    names = {line.rpartition("|")[2].strip() for line in loaded.splitlines()}
    assert "hydra" in names  # the list is the one that is meant
    heavy = {"torch", "numpy", "lightning", "datasets", "tiktoken", "matplotlib", "pydantic"}
    assert not heavy & names
    assert usage.ru_utime + usage.ru_stime < HELP_SECONDS
