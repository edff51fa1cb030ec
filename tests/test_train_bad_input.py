"""What `train.py` refuses: in words, before a process is launched or anything is written.

Each claim is tried with the real program in an empty working directory, where everything that it
writes by itself (`runs/`, `shards/`) would appear. One start shows several problems where the
program tells them together. A launched process would be a Python that starts anew, and is counted.
"""

import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, start_program, start_python

from parallel.config import ParallelConfig
from parallel.mesh import plan_processes

CPU = "parallel.accelerator=cpu"
# Run by every Python that starts with it on its path: so launched processes are counted.
COUNTER = """
import os
with open(os.environ["LLAMESH_TEST_STARTS"], "a") as file:
    file.write("started\\n")
"""


@pytest.fixture(scope="module")
def counted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """An environment in which every start of a Python adds a line to a file."""
    folder = tmp_path_factory.mktemp("counter")
    (folder / "sitecustomize.py").write_text(COUNTER)
    starts = folder / "starts"
    environment = {"PYTHONPATH": str(folder), "LLAMESH_TEST_STARTS": str(starts)}
    launching = "import subprocess, sys; subprocess.run([sys.executable, '-c', ''])"
    start_python(["-c", launching], environment=environment)
    assert len(starts.read_text().splitlines()) == 2, "launched processes are not counted"
    return environment


@pytest.fixture
def refused(tmp_path: Path, counted: dict[str, str]) -> Callable[..., str]:
    """`refused("train.max_steps=0", …)`: what is said, after a check that nothing else happened.

    `beside` is a folder that must stay as it is, like the empty one that the program runs in.
    """

    def refuse(*overrides: str, beside: Path | None = None) -> str:
        cwd = tmp_path / "cwd"
        cwd.mkdir()
        before = contents(beside) if beside else {}
        starts = Path(counted["LLAMESH_TEST_STARTS"])
        starts.write_text("")
        done = start_program([str(ROOT / "train.py"), *overrides], cwd=cwd, environment=counted)
        assert done.returncode != 0
        assert "Traceback" not in done.stderr, done.stderr
        assert done.stdout == ""
        assert contents(cwd) == {}, "something was written"
        assert (contents(beside) if beside else {}) == before, "something was changed"
        assert starts.read_text() == "", "a process was launched"
        return done.stderr

    return refuse


def contents(folder: Path) -> dict[str, str]:
    """The hash of everything below a folder, by path."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        if path.is_file()
        else "no file"
        for path in folder.rglob("*")
    }


def line_with(message: str, *parts: str) -> str:
    """The one line of a message that holds all the parts."""
    lines = [line for line in message.splitlines() if all(part in line for part in parts)]
    assert len(lines) == 1, f"{parts} are in {len(lines)} lines of:\n{message}"
    return lines[0]


# ---------------------------------------------------------------- the configuration alone


def test_every_problem_of_a_configuration_is_told_at_once(refused: Callable[..., str]) -> None:
    message = refused(
        "experiment=smoke",
        CPU,
        *("train.max_step=5", "optmi.lr=1e-3"),
        *("optim.lr=fast", "run.seed=1.5", "validation.samples=[8]", "log.tensorboard=perhaps"),
        *("parallel.tp=3", "parallel.dp_shard=2", "train.global_batch_size=9"),
        *("train.seq_len=300", "model.vocab_size=100", "checkpoint.keep_last=0"),
    )
    expected = [
        # misspelt: the key, and the one that was meant
        line_with(message, "train.max_step is not a key", "train.max_steps?"),
        line_with(message, "optmi is not a key", "optim?"),
        # of a wrong type: key, value, and what it has to be
        line_with(message, "optim.lr", "'fast'", "number"),
        line_with(message, "run.seed", "1.5", "integer"),
        line_with(message, "validation.samples", "[8]", "integer"),
        line_with(message, "log.tensorboard", "'perhaps'", "boolean"),
        # impossible, alone or together: keys, values, and what would do
        line_with(message, "parallel.tp (3)", "model.n_heads (4)", "use 1, 2 or 4"),
        line_with(message, "parallel.tp (3)", "model.n_kv_heads (2)", "use 1 or 2"),
        line_with(message, "parallel.tp (3)", "model.vocab_size (100)", "use 1, 2, 4"),
        line_with(message, "train.global_batch_size (9)", "2 data ranks", "use 8 or 10"),
        line_with(message, "train.seq_len (300)", "model.max_seq_len (128)", "at most 128"),
        line_with(message, "model.vocab_size (100)", "tokenizer.vocab_size (272)", "=272"),
        line_with(message, "checkpoint.keep_last (0)", "use null"),
    ]
    told = [line for line in message.splitlines() if line.startswith("  - ")]
    assert sorted(told) == sorted(expected)


def test_micro_batch_that_does_not_divide_a_rank_s_share(refused: Callable[..., str]) -> None:
    message = refused("experiment=smoke", CPU, "parallel.dp_shard=2", "train.micro_batch_size=3")
    line_with(message, "train.micro_batch_size (3)", "4 sequences", "2 data ranks", "1, 2 or 4")


@pytest.mark.parametrize(
    "override",
    [
        *("parallel.dp_replicate=0", "parallel.dp_shard=0", "parallel.dp_shard=-2"),
        *("parallel.cp=0", "parallel.tp=0", "parallel.devices=-1", "train.micro_batch_size=0"),
    ],
)
def test_a_size_below_one_is_the_only_problem(refused: Callable[..., str], override: str) -> None:
    # The rules that tie sizes together divide by them.
    message = refused("experiment=smoke", CPU, override)
    key, _, value = override.partition("=")
    told = line_with(message, f"{key} ({value})", "use ")
    assert [line for line in message.splitlines() if line.startswith("  - ")] == [told]


def test_values_that_only_a_person_can_give(refused: Callable[..., str]) -> None:
    message = refused("data=text", CPU)
    line_with(message, "data.name", "data.name=…")
    line_with(message, "data.sources.text.path", "data.sources.text.path=…")


@pytest.mark.parametrize("flag", ["--multirun", "hydra.mode=MULTIRUN"])
def test_multirun(refused: Callable[..., str], flag: str) -> None:
    message = refused(flag, "experiment=smoke", CPU, "train.max_steps=1,2")
    line_with(message, "multirun", "run.name", "slurm/sweep.py")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU to run on")
def test_cuda_on_a_machine_without_a_gpu(refused: Callable[..., str]) -> None:
    message = refused("experiment=smoke", "parallel.accelerator=cuda", "parallel.tp=2")
    told = line_with(message, "parallel.accelerator (cuda)", "no GPU", "parallel.accelerator=cpu")
    assert [line for line in message.splitlines() if line.startswith("  - ")] == [told]


@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise"])
def test_fp8_on_a_cpu_and_moments_that_would_not_fade(
    refused: Callable[..., str], recipe: str
) -> None:
    message = refused(
        *("experiment=smoke", CPU, f"precision.fp8={recipe}"),
        *("precision.optimizer_state=bf16", "optim.betas=[0.9,0.999]"),
    )
    expected = [
        line_with(message, f"precision.fp8 ({recipe})", "parallel.accelerator cpu", "fp8=null"),
        line_with(message, "optim.betas ((0.9, 0.999))", "precision.optimizer_state=fp32 or int8"),
    ]
    told = [line for line in message.splitlines() if line.startswith("  - ")]
    assert sorted(told) == sorted(expected)


@pytest.mark.parametrize(
    ("environment", "devices"),
    [({}, 3), ({"TORCHELASTIC_RUN_ID": "none", "LOCAL_WORLD_SIZE": "3", "WORLD_SIZE": "3"}, None)],
    ids=["self-launched", "torchrun"],
)
def test_more_processes_than_gpus(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], devices: int | None
) -> None:
    # No machine of the tests has two GPUs, so the count itself is made up.
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    _, problems = plan_processes(ParallelConfig(devices=devices), environment)
    (problem,) = problems
    line_with(problem, "parallel.devices (3)", "2 visible GPUs", "at most 2")
    assert plan_processes(ParallelConfig(devices=2), {})[1] == []


# ---------------------------------------------------------------- the data


def no_folder(folder: Path) -> str:
    """A path that leads nowhere."""
    return "no file, folder or glob"


def empty_files(folder: Path) -> str:
    """Files without a character."""
    folder.mkdir()
    for name in ("a.txt", "b.txt"):
        (folder / name).touch()
    return "no token to train on"


def few_windows(folder: Path) -> str:
    """Text for a window, and not for a batch of them."""
    folder.mkdir()
    (folder / "a.txt").write_text("words " * 50)
    return "train.global_batch_size (8)"


def latin_1(folder: Path) -> str:
    """A file in another encoding, among good ones."""
    folder.mkdir()
    (folder / "a.txt").write_text("fine\n" * 1000)
    (folder / "b.txt").write_bytes("fine\nk\xfchn\n".encode("latin-1"))
    return "line 2 of"


def unreadable(folder: Path) -> str:
    """A file that the system refuses to read, for the superuser too."""
    folder.mkdir()
    (folder / "a.txt").symlink_to("/proc/self/mem")
    return "cannot be read"


BAD_DATA = (no_folder, empty_files, few_windows, latin_1, unreadable)


@pytest.mark.parametrize("make", BAD_DATA)
def test_data(refused: Callable[..., str], tmp_path: Path, make: Callable[[Path], str]) -> None:
    folder = tmp_path / "text"
    said = make(folder)
    message = refused(
        "experiment=smoke",
        CPU,
        "data=text",
        "data.name=bad",
        f"data.sources.text.path={folder}",
        "data.validation_fraction=0",
    )
    told = line_with(message, said)
    assert "data.sources.text" in told or "data.folder" in told or "train." in told
    assert ": " in told  # what follows is the remedy


# ---------------------------------------------------------------- an existing run


@pytest.fixture(scope="module")
def existing(
    smoke_run: Any,
    data_overrides: list[str],
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Path, list[str]]:
    """The folder of a run of two steps, and the overrides that go on with it."""
    folder = tmp_path_factory.mktemp("existing") / "run"
    short = ["train.max_steps=2", "optim.warmup_steps=1"]
    smoke_run(folder, *short)
    return folder, ["experiment=smoke", *data_overrides, CPU, *short, f"run.dir={folder}"]


def test_another_configuration_in_an_existing_run(
    refused: Callable[..., str], existing: tuple[Path, list[str]]
) -> None:
    folder, command = existing
    changed = ["optim.weight_decay=0.3", "model.dim=128", "run.seed=7", "optim.lr=0.5"]
    message = refused(*command, *changed, beside=folder)
    line_with(message, str(folder), "different configuration")
    rows = [
        line_with(message, "optim.weight_decay: 0.1 -> 0.3", "decides"),
        line_with(message, "model.dim: 64 -> 128", "decides"),
        line_with(message, "run.seed: 0 -> 7", "decides"),
        line_with(message, "optim.lr: 0.001 -> 0.5"),  # which may change, and is no reason
    ]
    headings = [
        line_with(message, "Never changed", ":"),
        line_with(message, "by consent:"),
        line_with(message, "as they may be:"),
    ]
    told = message.splitlines()
    never, consent, free = map(told.index, headings)
    assert never < told.index(rows[1]) < consent and never < told.index(rows[2]) < consent
    assert consent < told.index(rows[0]) < free < told.index(rows[3])
    line_with(message, "run.name=…")  # the remedies
    line_with(message, "'run.allow_changes=[optim.weight_decay]'")


def test_another_run_s_checkpoint_of_another_shape(
    refused: Callable[..., str], existing: tuple[Path, list[str]], tmp_path: Path
) -> None:
    folder, command = existing
    checkpoint = folder / "checkpoints" / "step-00000002"
    new = [f"run.dir={tmp_path / 'new'}", f"run.resume={checkpoint}", "model.ffn_dim=64"]
    message = refused(*command, *new, beside=folder)
    line_with(message, f"run.resume={checkpoint} does not match")
    line_with(message, "model.ffn_dim: 192 -> 64")


@pytest.mark.parametrize(
    ("resume", "said"),
    [
        ("never", ("run.resume=never", "use run.resume=auto")),
        ("{folder}/checkpoints/step-00000001", ("step-00000001 is not a committed", "use auto")),
    ],
    ids=["never", "to nothing"],
)
def test_resume(
    refused: Callable[..., str],
    existing: tuple[Path, list[str]],
    resume: str,
    said: tuple[str, ...],
) -> None:
    folder, command = existing
    message = refused(*command, f"run.resume={resume.format(folder=folder)}", beside=folder)
    line_with(message, *said)


def test_resume_to_a_damaged_checkpoint(
    refused: Callable[..., str], existing: tuple[Path, list[str]], tmp_path: Path
) -> None:
    folder, command = existing
    copy = tmp_path / "best"
    shutil.copytree(folder / "checkpoints" / "step-00000002", copy)
    (copy / "manifest.json").write_text("{")
    message = refused(*command, f"run.resume={copy}", beside=folder)
    line_with(message, f"run.resume={copy}", "manifest.json", "use another checkpoint")


def test_another_vocabulary_than_the_prepared_data_s(
    refused: Callable[..., str], existing: tuple[Path, list[str]]
) -> None:
    _, command = existing
    shards = Path(next(o for o in command if o.startswith("data.folder=")).partition("=")[2])
    # A new run: the old one's folder would refuse another model before the data do.
    new = [override for override in command if not override.startswith("run.dir=")]
    message = refused(*new, "tokenizer=bpe", "tokenizer.vocab_size=300", beside=shards)
    line_with(message, f"data.folder ({shards})", "another configuration")
    line_with(message, "tokenizer.vocab_size", "272 there", "300 now")
    line_with(message, "tokenizer.name", "byte there", "bpe now")
    line_with(message, "another data.folder")
