"""`train.py` rejects bad input before it launches a process or writes a file.

Each test runs the real program in an empty working directory, where everything that it writes by
default (`runs/`, `shards/`) would appear. One run shows several errors where the program reports
them together. Launched processes are counted.
"""

import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, start_program, start_python

CPU = "parallel.accelerator=cpu"
# Imported by every Python process with this folder on its path, which counts launched processes.
COUNTER = """
import os
with open(os.environ["LLAMESH_TEST_STARTS"], "a") as file:
    file.write("started\\n")
"""


@pytest.fixture(scope="module")
def counted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Return an environment in which every new Python process adds a line to a file."""
    folder = tmp_path_factory.mktemp("counter")
    (folder / "sitecustomize.py").write_text(COUNTER)
    starts = folder / "starts"
    environment = {"PYTHONPATH": str(folder), "LLAMESH_TEST_STARTS": str(starts)}
    launching = "import subprocess, sys; subprocess.run([sys.executable, '-c', ''])"
    start_python(["-c", launching], environment=environment)
    assert len(starts.read_text().splitlines()) == 2, "launched processes are not counted"
    return environment


@pytest.fixture
def rejected(tmp_path: Path, counted: dict[str, str]) -> Callable[..., str]:
    """Return a function that runs `train.py` with overrides and returns its error output.

    It checks that nothing was written or launched, and that the folder `unchanged` did not change.
    """

    def run(*overrides: str, unchanged: Path | None = None) -> str:
        cwd = tmp_path / "cwd"
        cwd.mkdir()
        before = contents(unchanged) if unchanged else {}
        starts = Path(counted["LLAMESH_TEST_STARTS"])
        starts.write_text("")
        done = start_program([str(ROOT / "train.py"), *overrides], cwd=cwd, environment=counted)
        assert done.returncode != 0
        assert "Traceback" not in done.stderr, done.stderr
        kept = "keeps the configuration of its last launch"
        assert all(line == "Loading …" or kept in line for line in done.stdout.splitlines())
        assert contents(cwd) == {}, "files were written"
        assert (contents(unchanged) if unchanged else {}) == before, "files were changed"
        assert starts.read_text() == "", "a process was launched"
        return done.stderr

    return run


def contents(folder: Path) -> dict[str, str]:
    """Return the hash of every file below a folder by path."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        if path.is_file()
        else "not a file"
        for path in folder.rglob("*")
    }


def line_with(message: str, *parts: str) -> str:
    """Return the only line of a message that contains all parts."""
    lines = [line for line in message.splitlines() if all(part in line for part in parts)]
    assert len(lines) == 1, f"{parts} are in {len(lines)} lines of:\n{message}"
    return lines[0]


# ---------------------------------------------------------------- configuration


def test_all_configuration_errors_are_reported_together(rejected: Callable[..., str]) -> None:
    message = rejected(
        "experiment=smoke",
        CPU,
        *("train.max_step=5", "optmi.lr=1e-3"),
        *("optim.lr=fast", "run.seed=1.5", "validation.samples=[8]", "log.tensorboard=perhaps"),
        *("parallel.tp=3", "parallel.dp_shard=2", "train.global_batch_size=9"),
        *("train.seq_len=300", "model.vocab_size=100", "checkpoint.keep_last=0"),
    )
    expected = [
        # misspelt keys, with a suggestion
        line_with(message, "Unknown key train.max_step.", "train.max_steps?"),
        line_with(message, "Unknown key optmi.lr.", "optim.lr?"),
        # wrong types
        line_with(message, "optim.lr='fast'", "number"),
        line_with(message, "run.seed=1.5", "integer"),
        line_with(message, "validation.samples=[8]", "integer"),
        line_with(message, "log.tensorboard='perhaps'", "boolean"),
        # invalid values and combinations, with valid alternatives
        line_with(message, "parallel.tp=3", "model.n_heads=4", "use 1, 2 or 4"),
        line_with(message, "parallel.tp=3", "model.n_kv_heads=2", "use 1 or 2"),
        line_with(message, "parallel.tp=3", "model.vocab_size=100", "use 1, 2, 4"),
        line_with(message, "train.global_batch_size=9", "2 data ranks", "use 8 or 10"),
        line_with(message, "train.seq_len=300", "model.max_seq_len=128", "at most 128"),
        line_with(
            message, "model.vocab_size=100", "tokenizer.vocab_size=272", "use model.vocab_size=272"
        ),
        line_with(message, "checkpoint.keep_last=0", "or null"),
    ]
    lines = [line for line in message.splitlines() if line.startswith("  - ")]
    assert sorted(lines) == sorted(expected)


def test_micro_batch_must_divide_batch_of_data_rank(rejected: Callable[..., str]) -> None:
    message = rejected("experiment=smoke", CPU, "parallel.dp_shard=2", "train.micro_batch_size=3")
    line_with(message, "train.micro_batch_size=3", "4 sequences", "2 data ranks", "1, 2 or 4")


@pytest.mark.parametrize(
    "override",
    [
        *("parallel.dp_replicate=0", "parallel.dp_shard=0", "parallel.dp_shard=-2"),
        *("parallel.cp=0", "parallel.tp=0", "parallel.devices=-1", "train.micro_batch_size=0"),
    ],
)
def test_size_below_one_is_the_only_error(rejected: Callable[..., str], override: str) -> None:
    # Rules across keys divide by these sizes.
    message = rejected("experiment=smoke", CPU, override)
    key, _, value = override.partition("=")
    error = line_with(message, f"{key}={value} is below 1", "use ")
    assert [line for line in message.splitlines() if line.startswith("  - ")] == [error]


def test_missing_values_are_reported(rejected: Callable[..., str]) -> None:
    message = rejected("data=text", CPU)
    line_with(message, "data.name", "data.name=…")
    line_with(message, "data.sources.text.path", "data.sources.text.path=…")


@pytest.mark.parametrize("flag", ["--multirun", "hydra.mode=MULTIRUN"])
def test_multirun_is_rejected(rejected: Callable[..., str], flag: str) -> None:
    message = rejected(flag, "experiment=smoke", CPU, "train.max_steps=1,2")
    line_with(message, "multirun", "run.name", "slurm/sweep.py")


@pytest.mark.skipif(torch.cuda.is_available(), reason="requires a machine without a GPU")
def test_cuda_without_gpu_is_rejected(rejected: Callable[..., str]) -> None:
    message = rejected("experiment=smoke", "parallel.accelerator=cuda", "parallel.tp=2")
    error = line_with(message, "parallel.accelerator=cuda", "no GPU", "parallel.accelerator=cpu")
    assert [line for line in message.splitlines() if line.startswith("  - ")] == [error]


@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise"])
def test_fp8_on_cpu_and_bf16_moments_with_large_beta2_are_rejected(
    rejected: Callable[..., str], recipe: str
) -> None:
    message = rejected(
        *("experiment=smoke", CPU, f"precision.fp8={recipe}"),
        *("precision.optimizer_state=bf16", "optim.betas=[0.9,0.999]"),
    )
    expected = [
        line_with(message, f"precision.fp8={recipe}", "parallel.accelerator=cpu", "fp8=null"),
        line_with(message, "optim.betas=[0.9, 0.999]", "precision.optimizer_state=fp32 or int8"),
    ]
    lines = [line for line in message.splitlines() if line.startswith("  - ")]
    assert sorted(lines) == sorted(expected)


# ---------------------------------------------------------------- data


def no_folder(folder: Path) -> str:
    """Return the error for a path that does not exist."""
    return "matches no file or folder"


def empty_files(folder: Path) -> str:
    """Return the error for empty files."""
    folder.mkdir()
    for name in ("a.txt", "b.txt"):
        (folder / name).touch()
    return "contains no text (documents: 2 empty)"


def few_windows(folder: Path) -> str:
    """Return the error for text shorter than a batch."""
    folder.mkdir()
    (folder / "a.txt").write_text("words " * 50)
    return "train.global_batch_size=8 "


def latin_1(folder: Path) -> str:
    """Return the error for one file in another encoding."""
    folder.mkdir()
    (folder / "a.txt").write_text("fine\n" * 1000)
    (folder / "b.txt").write_bytes("fine\nk\xfchn\n".encode("latin-1"))
    return "line 2 of"


def unreadable(folder: Path) -> str:
    """Return the error for a file that even root cannot read."""
    folder.mkdir()
    (folder / "a.txt").symlink_to("/proc/self/mem")
    return "cannot read"


BAD_DATA = (no_folder, empty_files, few_windows, latin_1, unreadable)


@pytest.mark.parametrize("make", BAD_DATA)
def test_unusable_data_is_rejected(
    rejected: Callable[..., str], tmp_path: Path, make: Callable[[Path], str]
) -> None:
    folder = tmp_path / "text"
    expected = make(folder)
    message = rejected(
        "experiment=smoke",
        CPU,
        "data=text",
        "data.name=bad",
        f"data.sources.text.path={folder}",
        "data.validation_fraction=0",
        "validation.samples=0",
    )
    error = line_with(message, expected)
    assert "data.sources.text" in error or "data.folder" in error or "train." in error
    assert "; " in error  # followed by the remedy


# ---------------------------------------------------------------- existing runs


@pytest.fixture(scope="module")
def existing(
    smoke_run: Any,
    data_overrides: list[str],
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Path, list[str]]:
    """Return the folder of a run of two steps and the overrides that resume it."""
    folder = tmp_path_factory.mktemp("existing") / "run"
    short = ["train.max_steps=2", "optim.warmup_steps=1"]
    smoke_run(folder, *short)
    return folder, ["experiment=smoke", *data_overrides, CPU, *short, f"run.dir={folder}"]


def test_changed_configuration_of_existing_run_is_rejected(
    rejected: Callable[..., str], existing: tuple[Path, list[str]]
) -> None:
    folder, command = existing
    changed = ["optim.weight_decay=0.3", "model.dim=128", "run.seed=7", "optim.lr=0.5"]
    message = rejected(*command, *changed, unchanged=folder)
    line_with(message, str(folder), "different configuration")
    rows = [
        line_with(message, "optim.weight_decay: 0.1 -> 0.3", "determines"),
        line_with(message, "model.dim: 64 -> 128", "determines"),
        line_with(message, "run.seed: 0 -> 7", "determines"),
        line_with(message, "optim.lr: 0.001 -> 0.5"),  # which may change
    ]
    headings = [
        line_with(message, "cannot change within a run:"),
        line_with(message, "only with an explicit override:"),
        line_with(message, "Also changed, which is permitted:"),
    ]
    lines = message.splitlines()
    forbidden, override, free = map(lines.index, headings)
    assert (
        forbidden < lines.index(rows[1]) < override and forbidden < lines.index(rows[2]) < override
    )
    assert override < lines.index(rows[0]) < free < lines.index(rows[3])
    line_with(message, "run.dir=…")  # the remedies
    line_with(message, "'run.allow_changes=[optim.weight_decay]'")


def test_checkpoint_with_other_shapes_is_rejected(
    rejected: Callable[..., str], existing: tuple[Path, list[str]], tmp_path: Path
) -> None:
    folder, command = existing
    checkpoint = folder / "checkpoints" / "step-00000002"
    new = [f"run.dir={tmp_path / 'new'}", f"run.resume={checkpoint}", "model.ffn_dim=64"]
    message = rejected(*command, *new, unchanged=folder)
    line_with(message, f"run.resume={checkpoint} does not match")
    line_with(message, "model.ffn_dim: 192 -> 64")


@pytest.mark.parametrize(
    ("resume", "expected"),
    [
        ("never", ("run.resume=never", "use run.resume=auto")),
        ("{folder}/checkpoints/step-00000001", ("step-00000001 does not exist", "use auto")),
    ],
    ids=["never", "to nothing"],
)
def test_impossible_resume_is_rejected(
    rejected: Callable[..., str],
    existing: tuple[Path, list[str]],
    resume: str,
    expected: tuple[str, ...],
) -> None:
    folder, command = existing
    message = rejected(*command, f"run.resume={resume.format(folder=folder)}", unchanged=folder)
    line_with(message, *expected)


def test_resume_from_damaged_checkpoint_is_rejected(
    rejected: Callable[..., str], existing: tuple[Path, list[str]], tmp_path: Path
) -> None:
    folder, command = existing
    copy = tmp_path / "best"
    shutil.copytree(folder / "checkpoints" / "step-00000002", copy)
    (copy / "manifest.json").write_text("{")
    message = rejected(*command, f"run.resume={copy}", unchanged=folder)
    line_with(message, f"run.resume={copy}", "manifest.json", "use another checkpoint")


def test_tokenizer_other_than_of_prepared_data_is_rejected(
    rejected: Callable[..., str], existing: tuple[Path, list[str]]
) -> None:
    _, command = existing
    shards = Path(next(o for o in command if o.startswith("data.folder=")).partition("=")[2])
    # A new run, because the existing one would reject another model before the data check.
    new = [override for override in command if not override.startswith("run.dir=")]
    message = rejected(*new, "tokenizer=bpe", "tokenizer.vocab_size=300", unchanged=shards)
    line_with(message, f"data.folder={shards}", "another configuration")
    line_with(message, "tokenizer.vocab_size", "272 in the folder", "300 requested")
    line_with(message, "tokenizer.name", "byte in the folder", "bpe requested")
    line_with(message, "another data.folder")
