"""`parallel.auto=true`: the choice of the search is used, recorded and kept on resume."""

import re
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import FAULT_STEPS
from fork_server import Fault, ForkServer

from cli.auto_parallel import CHOSEN
from cli.composition import compose_config
from cli.config import check_config, check_for_tasks
from parallel.mesh import MeshShape
from planning import fit_check
from resilience.rank_check import RankReport, compare
from resilience.run_folder import RunFolder
from training.config import JobConfig
from training.config_validation import ConfigError, plain

CPU = ("experiment=smoke", "tokenizer=byte", "parallel.accelerator=cpu", "parallel.auto=true")


@pytest.fixture
def checked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., JobConfig]:
    """Check a command as `train.py` does, in the run folder `tmp_path / "run"`."""
    monkeypatch.chdir(tmp_path)

    def check(*words: str) -> JobConfig:
        monkeypatch.setattr(sys, "argv", ["train.py", "run.dir=run", *words])
        return check_config(compose_config("train", sys.argv[1:]))[0]

    return check


def save(config: JobConfig, checkpoint: bool = True) -> None:
    """Write what a launch with this configuration leaves in the run folder."""
    Path("run").mkdir(exist_ok=True)
    Path("run/config.yaml").write_text(yaml.safe_dump(plain(config)))
    if checkpoint:
        Path("run/checkpoints/step-00000001").mkdir(parents=True, exist_ok=True)
        Path("run/checkpoints/step-00000001/COMMITTED").touch()


def values(config: JobConfig) -> list[Any]:
    sections = plain(config)
    return [sections[key.partition(".")[0]][key.partition(".")[2]] for key in CHOSEN]


def test_first_choice_of_the_search_is_used_and_printed(
    checked: Callable[..., JobConfig], capsys: pytest.CaptureFixture[str]
) -> None:
    config = checked(*CPU, "parallel.devices=4")
    mesh = MeshShape(*(getattr(config.parallel, axis) for axis in MeshShape.__annotations__))
    assert mesh.world_size == 4 and config.train.micro_batch_size is not None
    printed = capsys.readouterr().out.splitlines()
    assert "choices on 4 × cpu" in printed[0]
    assert [line[:5] for line in printed[1:4]] == ["  1: ", "  2: ", "  3: "]
    assert str(mesh) in printed[1]
    assert values(checked(*CPU, "parallel.devices=4")) == values(config)  # on every rank


def test_given_keys_are_kept(checked: Callable[..., JobConfig]) -> None:
    given = ("parallel.tp=2", "train.micro_batch_size=1", "parallel.activation_checkpoint=full")
    config = checked(*CPU, "parallel.devices=4", *given)
    assert (config.parallel.tp, config.train.micro_batch_size) == (2, 1)
    assert config.parallel.activation_checkpoint == "full"


def test_choice_is_kept_on_the_same_devices_and_searched_again_on_others(
    checked: Callable[..., JobConfig],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    first = checked(*CPU, "parallel.devices=4", "parallel.tp=2")
    save(first)
    with monkeypatch.context() as patched:  # another version of the planner would choose this
        patched.setattr("cli.auto_parallel.search", lambda *_: pytest.fail("searched"))
        for command in ((), (*CPU, "parallel.devices=4", "parallel.tp=2")):
            assert values(checked(*command)) == values(first)
    assert "keeps the choice of the last launch on 4 × cpu" in capsys.readouterr().out
    other = checked("parallel.devices=2", "parallel.accelerator=cpu")
    assert other.parallel.tp * other.parallel.dp_shard * other.parallel.dp_replicate <= 2
    assert "4 × cpu in the last launch, now 2 × cpu" in capsys.readouterr().out
    changed = checked(*CPU, "parallel.devices=4", "parallel.tp=1")
    assert changed.parallel.tp == 1


def test_choice_without_a_checkpoint_is_searched_again(
    checked: Callable[..., JobConfig], capsys: pytest.CaptureFixture[str]
) -> None:
    """A model, batch or sequence length changed in a new command may need another choice."""
    words = (*CPU, "parallel.devices=1")
    save(checked(*words), checkpoint=False)
    changed = (*words, "train.global_batch_size=4", "train.seq_len=64")
    Path("other").mkdir()
    assert values(checked(*changed)) == values(checked(*changed, "run.dir=other"))
    capsys.readouterr()
    checked()
    printed = capsys.readouterr().out
    assert "searches again: the last launch has saved no checkpoint" in printed


def test_choice_that_is_invalid_or_does_not_fit_any_more_is_searched_again(
    checked: Callable[..., JobConfig],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    first = checked(*CPU, "parallel.devices=1")
    save(first)
    assert first.train.micro_batch_size == 8
    smaller = checked("train.global_batch_size=4")
    assert smaller.train.micro_batch_size in (1, 2, 4)
    printed = capsys.readouterr().out
    assert "searches again: train.micro_batch_size=8 does not divide the 4 sequences" in printed
    monkeypatch.setattr("cli.auto_parallel.memory_limit", lambda *_: 2**20)
    checked()
    assert re.search(
        r"searches again: the last choice needs .* of 1.0 MiB", capsys.readouterr().out
    )


def test_choice_of_a_launch_with_auto_is_forgotten_after_one_without(
    checked: Callable[..., JobConfig], capsys: pytest.CaptureFixture[str]
) -> None:
    save(checked(*CPU, "parallel.devices=2"))
    own = checked("parallel.auto=false", "parallel.devices=2", "parallel.tp=2")
    assert own.parallel.tp == 2 and own.parallel.auto_record is None
    save(own)
    capsys.readouterr()
    checked("parallel.auto=true")
    assert "parallel.auto: the first of" in capsys.readouterr().out


@pytest.mark.parametrize("word", ["parallel.dp_shard=-1", "train.micro_batch_size=null"])
def test_open_value_is_no_given_key(checked: Callable[..., JobConfig], word: str) -> None:
    words = (*CPU, "parallel.devices=2", word)
    first = checked(*words)
    assert first.parallel.auto_record is not None and "given" not in first.parallel.auto_record
    assert values(first) == values(checked(*CPU, "parallel.devices=2"))
    save(first)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("cli.auto_parallel.search", lambda *_: pytest.fail("searched"))
        assert values(checked(*words)) == values(first)


def test_open_value_releases_a_key_given_before(
    checked: Callable[..., JobConfig], capsys: pytest.CaptureFixture[str]
) -> None:
    save(checked(*CPU, "parallel.devices=1", "train.micro_batch_size=1"))
    released = checked("train.micro_batch_size=null")
    assert released.train.micro_batch_size == 8
    assert "train.micro_batch_size=1 was given to the last launch" in capsys.readouterr().out
    save(released)
    assert values(checked("train.micro_batch_size=null")) == values(released)
    assert "keeps the choice" in capsys.readouterr().out


def test_deleted_key_is_left_to_the_search(checked: Callable[..., JobConfig]) -> None:
    save(checked(*CPU, "parallel.devices=2", "parallel.tp=2"))
    for _ in range(2):
        released = checked(*CPU, "parallel.devices=2", "~parallel.tp")
        assert values(released) == values(checked(*CPU, "parallel.devices=2", "run.dir=other"))
        assert "given" not in str(released.parallel.auto_record)
        save(released)


def test_given_axes_are_kept_by_later_launches(
    checked: Callable[..., JobConfig], capsys: pytest.CaptureFixture[str]
) -> None:
    """Although a typed number of devices resets the axes of a run without `parallel.auto`."""
    save(checked(*CPU, "parallel.devices=2", "parallel.tp=2"))
    resumed = checked("parallel.devices=2")
    assert resumed.parallel.tp == 2
    assert str(resumed.parallel.auto_record).endswith("; given parallel.tp")
    save(resumed)
    assert checked("parallel.devices=4").parallel.tp == 2
    assert "drops" not in capsys.readouterr().out
    fewer = checked("parallel.devices=1")
    assert fewer.parallel.tp == 1 and "given" not in str(fewer.parallel.auto_record)
    assert "drops parallel.tp=2 of an earlier launch" in capsys.readouterr().out


def test_kept_configuration_is_printed_without_the_record(
    checked: Callable[..., JobConfig], capsys: pytest.CaptureFixture[str]
) -> None:
    save(checked(*CPU, "parallel.devices=1", "validation.samples=0"))
    capsys.readouterr()
    checked()
    printed = capsys.readouterr().out
    assert "keeps the configuration of its last launch" in printed
    assert "auto_record" not in printed and "None" not in printed


def test_error_if_nothing_fits_names_the_smallest_number(
    checked: Callable[..., JobConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cli.auto_parallel.machine_memory", lambda: 2**29)
    monkeypatch.setattr(fit_check, "machine_memory", lambda: 2**29)
    words = ("model.dim=1024", "model.ffn_dim=8192", "model.n_layers=8")
    with pytest.raises(ConfigError, match="finds no mesh that fits on 2 × cpu; use ") as error:
        checked(*CPU, *words, "parallel.devices=2", "parallel.tp=2")
    assert "omit parallel.tp" in str(error.value)


def test_error_if_nothing_fits_names_saves_without_a_copy(
    checked: Callable[..., JobConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cli.auto_parallel.machine_memory", lambda: 5 * 2**30)
    sizes = ("model.dim=1024", "model.n_heads=16", "model.n_layers=8", "model.ffn_dim=8192")
    words = (*CPU, "parallel.devices=2", *sizes)
    with pytest.raises(ConfigError, match=r"; use checkpoint\.async_save=false \(no copy"):
        checked(*words)
    assert checked(*words, "checkpoint.async_save=false").parallel.auto


@pytest.mark.parametrize(
    ("words", "error", "remedies"),
    [
        (
            ("parallel.devices=3",),
            "parallel.auto=true: no valid mesh of 3 devices: train.global_batch_size=8 is not a "
            "multiple of the 3 data ranks (dp_replicate × dp_shard); use 2 or 4 devices",
            [("parallel.devices=2",), ("parallel.devices=4",)],
        ),
        (
            ("parallel.devices=3", "parallel.tp=3"),
            "parallel.auto=true: parallel.tp=3 does not divide model.n_kv_heads=2; use 1 or 2 on "
            "2 or 4 devices",
            [("parallel.devices=2", "parallel.tp=2"), ("parallel.devices=4", "parallel.tp=1")],
        ),
    ],
)
def test_error_if_no_mesh_is_valid_names_the_rule_and_valid_meshes(
    checked: Callable[..., JobConfig],
    words: tuple[str, ...],
    error: str,
    remedies: list[tuple[str, ...]],
) -> None:
    with pytest.raises(ConfigError) as raised:
        checked(*CPU, *words)
    assert raised.value.errors == [error]
    for each in remedies:
        assert checked(*CPU, *each).parallel.auto


def test_batch_job_leaves_the_choice_to_its_machines(
    checked: Callable[..., JobConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    """`slurm/sweep.py` checks the run on another machine; three tasks do not divide the batch."""
    config = check_for_tasks(compose_config("train", [*CPU]), per_node=3, num_nodes=1)
    assert config.parallel.auto and config.parallel.auto_record is None


def test_ranks_that_choose_differently_are_an_error() -> None:
    reports = {rank: RankReport(rank, f"n{rank}", choice=f"tp={1 + rank}") for rank in range(2)}
    [error], _ = compare(reports, 2)
    assert "has chosen differently" in error and "rank 1 on n1: tp=2" in error


def test_run_resumes_with_its_choice(tmp_path: Path, smoke_run: Callable[..., Any]) -> None:
    words = ("parallel.auto=true", "parallel.devices=2", "parallel.accelerator=cpu")
    first = smoke_run(tmp_path / "run", *words, "train.max_steps=1").stdout
    assert first.count("parallel.auto: the first of") == 1  # of two processes
    recorded = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["parallel"]
    assert recorded["auto_record"].startswith("2 × cpu; ")
    assert '"auto": "2' in (tmp_path / "run" / "ledger.jsonl").read_text()
    again = smoke_run(tmp_path / "run", *words, "train.max_steps=2").stdout
    assert "parallel.auto keeps the choice" in again and "from step 1" in again


def test_killed_run_searches_again_and_keeps_its_choice_once_it_has_a_checkpoint(
    fork_server: ForkServer, train_arguments: Callable[..., list[str]], tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    words = ("parallel.auto=true", "parallel.devices=1", "checkpoint.interval=1")
    smaller = (*words, "train.global_batch_size=4")
    runs = RunFolder(folder)
    forward = "model.llama.Llama.forward"

    launch = fork_server.run(
        train_arguments(folder, *words), 1, Fault(0, 1, "SIGKILL", function=forward)
    )
    assert launch.exit_codes == {0: -signal.SIGKILL} and runs.config.exists()
    assert not runs.committed_steps()
    # With its choice for another batch, of a micro-batch of 8, the same command would be rejected.
    kill = Fault(0, 12, "SIGKILL", function=forward)
    launch = fork_server.run(train_arguments(folder, *smaller), 1, kill)
    assert launch.exit_codes == {0: -signal.SIGKILL}, launch.output()
    assert "parallel.auto: the first of" in launch.output()
    assert runs.committed_steps()
    launch = fork_server.run(train_arguments(folder, *smaller), 1)
    assert launch.exit_codes == {0: 0}, launch.output()
    assert "parallel.auto keeps the choice" in launch.output()
    assert runs.committed_steps()[-1] == FAULT_STEPS
