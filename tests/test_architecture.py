"""The layer order, the libraries of each package, the start-up imports and the line budget.

A package imports only packages before it in the table. Imports under `TYPE_CHECKING` and inside
functions count.
"""

import ast
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, start_python

# Lowest layer first: each package, and the libraries that it may import. A dotted name permits
# itself and its submodules; the standard library is open to all.
LAYERS: dict[str, tuple[str, ...]] = {
    "model": ("torch",),
    "data": (
        *("torch", "numpy", "datasets", "pyarrow", "fsspec", "zstandard", "isal", "xxhash"),
        *(
            "tiktoken",
            "tokenizers",
            "llama_models",
            "filelock",
            "rich",
            "pydantic",
            "annotated_types",
        ),
    ),
    "parallel": ("torch", "torchao", "lightning_fabric"),
    "resilience": ("torch", "lightning_fabric", "filelock", "yaml"),
    "checkpoint": ("torch", "xxhash", "filelock"),
    "formats": (
        *("torch", "safetensors", "tokenizers", "xxhash", "filelock", "pydantic", "jinja2"),
    ),
    "evaluation": ("torch", "numpy", "lightning_fabric", "lm_eval", "tqdm"),
    "training": (
        *("torch", "torchao", "lightning_fabric", "numpy", "yaml", "rich", "pydantic"),
        *("matplotlib", "tensorboard", "wandb"),
    ),
    "planning": ("torch", "matplotlib", "yaml", "pydantic", "annotated_types", "rich"),
    "cli": ("hydra", "omegaconf", "pydantic", "rich", "yaml"),
}
ORDER = tuple(LAYERS)
# Packages that import fewer of the earlier packages than the order permits.
RESTRICTED: dict[str, tuple[str, ...]] = {"data": ("model.config_base",), "parallel": ("model",)}
PROGRAM_LIBRARIES = ("torch", "lightning_fabric", "hydra", "omegaconf")
FOLDERS = {  # outside the layers: may import any package, and these libraries
    "slurm": ("submitit", "hydra", "omegaconf"),
    "bench": (
        *PROGRAM_LIBRARIES,
        *("numpy", "datasets", "tiktoken", "transformers", "litgpt", "bench", "train"),
    ),
}
# Validated dataclasses: pydantic declares the constraints of their fields.
CONFIG_FILES = ("config.py", "config_base.py")
CONFIG_LIBRARIES = ("pydantic", "annotated_types")

HEAVY = {"torch", "numpy", "lightning_fabric", "datasets", "tiktoken", "matplotlib", "transformers"}

CORE = ("train.py", "model", "parallel")
MAX_CORE_LINES = 4200  # with pipeline parallelism
MAX_HELP_SECONDS = 1.0

TRAIN_MODULES = Path(__file__).with_name("train_modules.txt")
# Modules of features that are off in `experiment=smoke`, and libraries that only they need.
OPTIONAL = (
    *("evaluation.lm_eval_model", "evaluation.lm_eval_tasks", "evaluation.completer"),
    "evaluation.kv_cache",
    *("training.wandb_logger", "data.stream"),
    *("parallel.tensor_parallel", "parallel.context_parallel", "parallel.float8"),
    *("parallel.activation_checkpoint", "parallel.pipeline_parallel", "parallel.pipeline_links"),
    *("formats.hugging_face", "formats.meta", "formats.native", "formats.weights"),
    *("planning.memory_plot", "planning.report", "planning.calibration", "planning.tracing"),
    *("wandb", "lm_eval", "torchao", "datasets", "pyarrow", "safetensors", "llama_models"),
    *("submitit", "litgpt", "transformers", "torchmetrics", "scipy", "pandas"),
)


@dataclass(frozen=True)
class Import:
    """One imported name and its line."""

    module: str
    line: int


def source_files() -> list[Path]:
    """Return the programs, slurm/*.py and the modules of every package."""
    packages = [path.parent for path in ROOT.glob("*/__init__.py") if path.parent.name != "tests"]
    modules = [file for package in packages for file in package.rglob("*.py")]
    return sorted([*ROOT.glob("*.py"), *ROOT.glob("slurm/*.py"), *modules])


def package_of(path: Path) -> str:
    """Return `model` for model/rope.py and `train` for train.py."""
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


@cache
def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def shell_and_mode_problems(tree: ast.Module) -> Iterator[str]:
    """Yield calls that run a shell, or that create files with permissions of their own."""
    names = ("system", "popen", "getoutput", "getstatusoutput", "create_subprocess_shell")
    modes = ("chmod", "fchmod", "umask", "mkstemp", "NamedTemporaryFile")  # mkstemp: 0o600
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        name = call.func.attr if isinstance(call.func, ast.Attribute) else ""
        if name in (*names, *modes) or any(each.arg == "shell" for each in call.keywords):
            yield f"line {call.lineno}: {ast.unparse(call)}"
        creates = name == "open" and ast.unparse(call).startswith("os.open(") and len(call.args) > 2
        if creates and ast.unparse(call.args[2]) != str(0o666):
            yield f"line {call.lineno}: {ast.unparse(call)}; use 0o666, which the umask reduces"


def test_no_program_runs_a_shell_or_sets_the_permissions_of_files() -> None:
    """Files have the permissions that the user's umask allows, as a shared folder needs."""
    examples = (
        "os.system('a')",
        "subprocess.run('a', shell=True)",
        "path.chmod(0o600)",
        "tempfile.NamedTemporaryFile()",
        "os.open(path, os.O_CREAT, 0o644)",
    )
    assert all([*shell_and_mode_problems(ast.parse(example))] for example in examples)
    assert not [*shell_and_mode_problems(ast.parse("os.open(path, os.O_CREAT | 1, 0o666)"))]
    programs = [path for path in source_files() if package_of(path) != "bench"]
    problems = {path: [*shell_and_mode_problems(parse(path))] for path in programs}
    assert not {path: found for path, found in problems.items() if found}


def imports(node: ast.AST) -> Iterator[Import]:
    """Yield every import below a node, at any depth."""
    for child in ast.walk(node):
        if isinstance(child, ast.Import):
            for alias in child.names:
                yield Import(alias.name, child.lineno)
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0, f"line {child.lineno}: relative import"
            for alias in child.names:
                yield Import(f"{child.module}.{alias.name}", child.lineno)


def within(module: str, names: tuple[str, ...]) -> bool:
    """Return whether a module is one of `names` or a submodule of one."""
    return any(f"{module}.".startswith(f"{name}.") for name in names)


def is_standard(module: str) -> bool:
    return module.partition(".")[0] in sys.stdlib_module_names


def allowed_imports(path: Path) -> tuple[str, ...]:
    """Return the packages and libraries that a file may import."""
    package = package_of(path)
    if package in FOLDERS:
        return (*ORDER, *FOLDERS[package])
    if path.parent == ROOT:
        return (*ORDER, *PROGRAM_LIBRARIES)
    earlier = RESTRICTED.get(package, ORDER[: ORDER.index(package)])
    config = CONFIG_LIBRARIES if path.name in CONFIG_FILES else ()
    return (package, *earlier, *LAYERS[package], *config)


every_file = pytest.mark.parametrize(
    "path", source_files(), ids=lambda path: str(path.relative_to(ROOT))
)


def test_every_package_is_in_the_table() -> None:
    programs = {path.stem for path in ROOT.glob("*.py")}
    assert {package_of(path) for path in source_files()} - programs == {*ORDER, *FOLDERS}


@every_file
def test_package_imports_only_earlier_packages_and_its_libraries(path: Path) -> None:
    allowed = allowed_imports(path)
    errors = [
        f"{path.relative_to(ROOT)}:{each.line} imports {each.module}"
        for each in imports(parse(path))
        if not is_standard(each.module) and not within(each.module, allowed)
    ]
    assert not errors, "\n".join(errors)


def test_imports_are_found_at_any_depth() -> None:
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
    found = {each.module for each in imports(ast.parse(source))}
    assert found == {"a", "b.c", "d", "e.f", "g.h.i"}


def test_model_uses_no_environment_variable_and_no_process_group() -> None:
    for path in source_files():
        if package_of(path) == "model":
            for node in ast.walk(parse(path)):
                if isinstance(node, ast.Attribute):
                    assert node.attr not in ("environ", "getenv", "distributed"), path
            forbidden = ("os", "torch.distributed")
            assert not any(within(each.module, forbidden) for each in imports(parse(path))), path


def test_configuration_modules_import_nothing_heavy() -> None:
    modules = [f"{name}.config" for name in ORDER if (ROOT / name / "config.py").exists()]
    script = f"import sys, {', '.join(modules)}; print(*sys.modules)"
    process = start_python(["-c", script])
    assert process.returncode == 0, process.stderr
    assert not HEAVY & set(process.stdout.split())


@every_file
def test_every_module_has_a_docstring(path: Path) -> None:
    assert ast.get_docstring(parse(path)), path


# Invariants of our own calls, which no input can break.
INTERNAL_ASSERTS = {"mode == 'wb'", "'time' not in fields"}


def narrows_a_type(test: ast.expr) -> bool:
    """Return whether an assert only gives the type checker what a caller guarantees."""
    if isinstance(test, ast.BoolOp):
        return all(narrows_a_type(each) for each in test.values)
    if isinstance(test, ast.Compare):
        return all(isinstance(each, ast.Is | ast.IsNot) for each in test.ops)
    return isinstance(test, ast.Call) and ast.unparse(test.func) == "isinstance"


@pytest.mark.parametrize("path", source_files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_no_assert_checks_input_or_files(path: Path) -> None:
    """`python -O` removes them."""
    found = [
        ast.unparse(node.test)
        for node in ast.walk(parse(path))
        if isinstance(node, ast.Assert) and not narrows_a_type(node.test)
    ]
    is_bench = path.relative_to(ROOT).parts[0] == "bench"
    assert is_bench or set(found) <= INTERNAL_ASSERTS


def test_core_stays_within_its_line_budget() -> None:
    lines = {
        path: len(path.read_text(encoding="utf-8").splitlines())
        for path in source_files()
        if path.relative_to(ROOT).parts[0] in CORE
    }
    assert sum(lines.values()) < MAX_CORE_LINES


# ---------------------------------------------------------------- start-up


@pytest.fixture(scope="module")
def train_modules(command: Any, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Return the modules that `train.py experiment=smoke` imports if its data are prepared."""
    folder = tmp_path_factory.mktemp("modules")
    program = [*command(folder / "run"), "train.max_steps=1"]
    process = start_python(["tests/record_modules.py", str(folder / "modules.json"), *program])
    assert process.returncode == 0, process.stderr
    modules: list[str] = json.loads((folder / "modules.json").read_text())
    return modules


def test_plain_training_imports_the_listed_modules(train_modules: list[str]) -> None:
    """The list is a file, so that a change shows which modules it adds to every start."""
    listed = set(TRAIN_MODULES.read_text().split())
    imported = {name for name in train_modules if within(name, ORDER)}
    assert not imported - listed, f"add to {TRAIN_MODULES.name} if every run needs them"
    assert not listed - imported, f"remove from {TRAIN_MODULES.name}"


def test_plain_training_imports_no_optional_feature(train_modules: list[str]) -> None:
    assert [name for name in train_modules if within(name, OPTIONAL)] == []


@pytest.mark.parametrize(
    "program", ["train.py", "prepare.py", "evaluate.py", "generate.py", "convert.py", "plan.py"]
)
def test_help_takes_less_than_a_second_and_imports_nothing_heavy(program: str) -> None:
    """Processor time, which other load on the machine hardly changes."""
    process = subprocess.Popen(
        [sys.executable, "-X", "importtime", program, "--help"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None and process.stderr is not None
    # The help fits into the pipe's buffer, so standard error can be read first.
    import_times, text = process.stderr.read(), process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    process.stdout.close()
    process.stderr.close()
    assert process.returncode == 0 and f"python {program}" in text
    names = {line.rpartition("|")[2].strip() for line in import_times.splitlines()}
    assert "cli.help" in names  # otherwise the list is not that of the program
    assert not (HEAVY | {"pydantic"}) & names
    assert usage.ru_utime + usage.ru_stime < MAX_HELP_SECONDS


def test_programs_report_a_wrong_path_before_slow_imports() -> None:
    script = f"""
import importlib, sys
HEAVY = {HEAVY}
for name, *more in (["evaluate"], ["generate", "prompt=x"], ["convert", "target=x"]):
    try:
        importlib.import_module(name).main(["checkpoint=nowhere", *more])
    except SystemExit as exit:
        print(exit.code, sorted(HEAVY & sys.modules.keys()))
"""
    done = start_python(["-c", script])
    assert done.stderr.count("nowhere is not a folder; use a run folder") == 3
    assert done.stdout == "1 []\n" * 3
