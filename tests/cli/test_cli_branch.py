"""`run.branch` takes the configuration of a checkpoint and decays its learning rate."""

import re
import shutil
from pathlib import Path

import pytest
from run_config import changed, commit

from cli.composition import compose_config
from cli.config import load_train_config
from resilience.run_folder import RunFolder
from training.config import JobConfig
from training.config_validation import ConfigError, plain

WSD = ("optim.schedule=wsd", "optim.warmup_steps=10", "train.max_steps=100", "optim.lr=0.25")


@pytest.fixture
def parent(tmp_path: Path) -> RunFolder:
    """A run whose learning rate is constant from step 10 to 80, with checkpoints of it."""
    folder = RunFolder(tmp_path / "parent")
    config = plain(load("experiment=smoke", f"run.dir={folder.path}", *WSD))
    for step in (5, 40, 80, 90):
        commit(folder, step, config)
    folder.write_config(config)
    return folder


def load(*words: str) -> JobConfig:
    return load_train_config(compose_config("train", [*words]))


def branch(parent: RunFolder, step: int, *words: str) -> JobConfig:
    return load(f"run.branch={parent.step_folder(step)}", *words)


def test_branch_has_the_configuration_of_the_checkpoint_and_a_decay(parent: RunFolder) -> None:
    before = sorted(parent.path.rglob("*"))
    checkpoint = str(parent.step_folder(40))
    folder = f"{parent.path}-decay"
    expected = changed(
        *("run.dir", folder, "run.branch", checkpoint, "run.resume", checkpoint),
        *("train.max_steps", 50, "optim.schedule_steps", 50, "optim.decay_start", 40),
        of=parent.last_config() or {},
    )
    assert plain(branch(parent, 40)) == expected
    longer = branch(parent, 40, "train.max_steps=60", "optim.decay_type=sqrt", "run.dir=other")
    assert (longer.optim.schedule_steps, longer.optim.decay_start) == (60, 40)
    assert (longer.optim.decay_type, longer.run.dir) == ("sqrt", "other")
    assert branch(parent, 80, "optim.decay_ratio=0.5").train.max_steps == 160
    with pytest.raises(ConfigError, match="is not the model of the run"):
        branch(parent, 40, "model=llama3_8b")
    copy = parent.path.parent / "copy"  # of the checkpoint alone
    shutil.copytree(parent.step_folder(40), copy)
    assert load(f"run.branch={copy}").optim.decay_start == 40
    shutil.rmtree(copy)
    assert sorted(parent.path.rglob("*")) == before


def test_repeated_command_resumes_the_branch_and_may_lengthen_its_decay(parent: RunFolder) -> None:
    first = branch(parent, 40)
    folder = RunFolder(Path(first.run.dir))
    folder.write_config(plain(first))
    assert branch(parent, 40) == first  # no checkpoint yet: starts again
    commit(folder, 45, plain(first))
    again = branch(parent, 40)
    assert plain(again) == changed("run.resume", "auto", of=plain(first))
    assert load(f"run.dir={folder.path}") == again
    longer = branch(parent, 40, "train.max_steps=70").optim
    assert (longer.decay_start, longer.schedule_steps) == (40, 70)
    with pytest.raises(ConfigError, match=r"use another run\.dir for this branch"):
        branch(parent, 80)
    shutil.rmtree(parent.path)  # the branch no longer needs it
    assert branch(parent, 40) == again


@pytest.mark.parametrize(
    ("step", "words", "message"),
    [
        (5, (), "constant from step 10 to 80; use a checkpoint of these steps"),
        (90, (), "constant from step 10 to 80"),
        (40, ("train.max_steps=40",), "train.max_steps=40 is not above 40"),
        (41, (), "is not a committed checkpoint"),
    ],
)
def test_branch_without_constant_rate_is_rejected(
    parent: RunFolder, step: int, words: tuple[str, ...], message: str
) -> None:
    with pytest.raises(ConfigError, match=message) as raised:
        branch(parent, step, *words)
    if remedy := re.search(r"use (train.max_steps=\d+)", str(raised.value)):
        assert branch(parent, step, remedy[1]).optim.decay_start == 40


@pytest.mark.parametrize(
    "word",
    [
        *("run.resume=never", "run.init_from=weights", "optim.decay_start=50"),
        "train.max_tokens=1000",
    ],
)
def test_key_that_contradicts_a_branch_is_rejected(parent: RunFolder, word: str) -> None:
    key = word.partition("=")[0]
    with pytest.raises(
        ConfigError, match=rf"{re.escape(key)} contradicts run\.branch=.* (omit|use) "
    ):
        branch(parent, 40, word)
    assert branch(parent, 40, "run.resume=auto") == branch(parent, 40)  # the default


def test_branch_is_planned_with_the_configuration_of_its_checkpoint(parent: RunFolder) -> None:
    composed = compose_config("plan", [f"run.branch={parent.step_folder(40)}", "hardware=h100"])
    assert (composed.model.name, composed.train.max_steps) == ("smoke", 50)


def test_branch_into_the_folder_of_its_run_is_rejected(parent: RunFolder) -> None:
    with pytest.raises(ConfigError) as raised:
        branch(parent, 40, f"run.dir={parent.path}")
    remedy = re.search(r"use (run.dir=\S+)", raised.value.errors[0])
    assert remedy and branch(parent, 40, remedy[1]).run.dir == f"{parent.path}-decay"


def test_branch_of_a_cosine_schedule_is_rejected(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "cosine")
    commit(folder, 40, plain(load("experiment=smoke", f"run.dir={folder.path}")))
    with pytest.raises(ConfigError, match=r"optim.schedule=cosine, .* use run.resume instead"):
        branch(folder, 40)
