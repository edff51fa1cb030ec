"""`parallel.auto=true`: the choice of the search is used, recorded and kept on resume."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from cli.auto_parallel import CHOSEN
from cli.composition import compose_config
from cli.config import check_config, check_for_tasks
from parallel.mesh import MeshShape
from planning import fit_check
from resilience.rank_check import RankReport, compare
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


def save(config: JobConfig) -> None:
    """Write what a launch with this configuration leaves in the run folder."""
    Path("run").mkdir(exist_ok=True)
    Path("run/config.yaml").write_text(yaml.safe_dump(plain(config)))


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
        patched.setattr("cli.auto_parallel._search", lambda *_: pytest.fail("searched"))
        for command in ((), (*CPU, "parallel.devices=4", "parallel.tp=2")):
            assert values(checked(*command)) == values(first)
    assert "keeps the choice of the last launch on 4 × cpu" in capsys.readouterr().out
    other = checked("parallel.devices=2", "parallel.accelerator=cpu")
    assert other.parallel.tp * other.parallel.dp_shard * other.parallel.dp_replicate <= 2
    assert "4 × cpu in the last launch, now 2 × cpu" in capsys.readouterr().out
    changed = checked(*CPU, "parallel.devices=4", "parallel.tp=1")
    assert changed.parallel.tp == 1


def test_error_if_nothing_fits_names_the_smallest_number(
    checked: Callable[..., JobConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cli.auto_parallel.machine_memory", lambda: 2**29)
    monkeypatch.setattr(fit_check, "machine_memory", lambda: 2**29)
    words = ("model.dim=1024", "model.ffn_dim=8192", "model.n_layers=8")
    with pytest.raises(ConfigError, match="finds no mesh that fits on 2 × cpu; use ") as error:
        checked(*CPU, *words, "parallel.devices=2", "parallel.tp=2")
    assert "omit parallel.tp" in str(error.value)


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
