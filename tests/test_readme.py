"""Every command of the README works, in a reduced form that takes seconds."""

import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, start_program
from hydra import compose, initialize_config_dir

from cli.arguments import CONF, hydra_arguments
from cli.config import load_train_config
from parallel.mesh import resolve_mesh
from training.config_rules import batch_errors, model_errors

README = (ROOT / "README.md").read_text(encoding="utf-8")


def commands(program: str) -> list[list[str]]:
    """Return the README's shell commands that run `program`, split, with continued lines joined."""
    blocks = re.findall(r"```bash\n(.*?)```", README, flags=re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    words = [shlex.split(line, comments=True) for line in lines]
    return [command for command in words if command and command[0] == program]


def small(command: list[str]) -> bool:
    """Return whether a command trains the default model, not a published one on GPUs."""
    return not any(word.startswith("model=") for word in command)


@pytest.fixture
def books(tmp_path: Path, corpus: Path) -> Path:
    """Return a working folder that contains the README's `books/`."""
    (tmp_path / "books").symlink_to(corpus)
    return tmp_path


def test_readme_is_short_and_has_the_commands() -> None:
    assert len(README.splitlines()) < 200
    for program in ("make", "python", "torchrun", "srun", "sbatch"):
        assert commands(program)


def test_make_targets_run_the_programs() -> None:
    for command in commands("make"):
        shown = subprocess.run(
            [*command, "--dry-run", "--always-make"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        assert "constraints.txt" in shown
        target = {
            "train": "train.py",
            "check": "mypy",
            "test": 'pytest -n 3 --dist loadfile --no-loadscope-reorder -m "not slow"',
            "test-quick": "-m quick",
            "test-slow": "-m slow",
            "storm": "test_storm.py --storm=",
        }
        assert target[command[1]] in shown


def test_prepare_and_train_commands_run(books: Path) -> None:
    trained = 0
    for command in commands("python"):
        program, *overrides = command[1:]
        assert (ROOT / program).exists()
        if program == "train.py" and not small(command):
            continue
        extra = []
        if program in ("evaluate.py", "generate.py", "convert.py"):
            # The README uses the default run; this test has a shorter one.
            assert overrides[0] == "checkpoint=runs/llama3_tiny"
            overrides = ["checkpoint=runs/smoke", *overrides[1:]]
            extra = [] if program == "convert.py" else ["parallel.accelerator=cpu"]
        if program == "train.py":
            trained += 1
            # The default corpus would take half a minute to prepare.
            corpus = ["data=text", "data.name=books", "data.sources.text.path=books/"]
            extra = [] if "data=text" in overrides else corpus
            extra += ["experiment=smoke", "tokenizer=bpe", "train.max_steps=2"]
            extra += ["train.seq_len=32", "data.validation_fraction=0.2"]  # 2% of 30 files is none
        if program == "prepare.py":
            extra = ["data.validation_fraction=0.2"]
        done = start_program([str(ROOT / program), *overrides, *extra], cwd=books)
        assert done.returncode == 0, done.stdout + done.stderr
    assert trained == 3
    assert (books / "llama3_tiny_hf" / "tokenizer.json").exists()
    assert {run.name for run in (books / "runs").iterdir()} == {"smoke", "two", "books"}


@pytest.mark.parametrize("launcher", ["python", "torchrun", "srun", "sbatch"])
def test_gpu_commands_are_valid_configurations(launcher: str) -> None:
    checked = 0
    for command in commands(launcher):
        program = "slurm/train.sbatch" if launcher == "sbatch" else "train.py"
        if program not in command or small(command):
            continue
        assert (ROOT / program).exists()
        overrides = hydra_arguments(command[command.index(program) + 1 :], "train")
        with initialize_config_dir(str(CONF), version_base="1.3"):
            config = load_train_config(compose("train", overrides))
        nodes = [word for word in command if word.startswith("--nodes=") or "nnodes=" in word]
        world_size = 8 * int(nodes[0].partition("=")[2]) if nodes else 8
        mesh, errors = resolve_mesh(config.parallel, world_size)
        assert not errors
        assert not list(model_errors(mesh, config.parallel, config.model, config.train.seq_len))
        assert not list(batch_errors(mesh, config.train))
        checked += 1
    assert checked == 1


def test_error_example_is_printed_by_the_program(tmp_path: Path) -> None:
    done = start_program(
        [
            str(ROOT / "train.py"),
            "train.max_step=3",
            "parallel.tp=8",
            "parallel.accelerator=cpu",
        ],
        cwd=tmp_path,
    )
    shown: Any = re.search(r"```text\n(Invalid configuration.*?)```", README, flags=re.DOTALL)
    assert set(shown.group(1).splitlines()) <= set(done.stderr.splitlines())
    assert done.returncode != 0
