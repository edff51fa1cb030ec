"""A run is resumed with the configuration of its last launch, which typed keys override."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from run_config import changed, commit

from cli.composition import compose_config
from cli.config import load_train_config
from data.tokenizer import model_file, train_bpe
from resilience.run_folder import RunFolder, RunFolderError
from training.config import JobConfig
from training.config_validation import ConfigError, plain

START = ("experiment=smoke", "data=text", "data.name=kjv", "data.sources.text.path=kjv.txt")
PROMPT = "${model.name} ${"


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    """A run with a checkpoint."""
    folder = RunFolder(tmp_path / "run")
    words = ["train.max_steps=90", "optim.lr=0.5", f"validation.prompt={PROMPT}"]
    config = plain(load(folder, *START, *words))
    folder.write_config(config)
    commit(folder, 5, config)
    return folder


def load(folder: RunFolder, *words: str) -> JobConfig:
    return load_train_config(compose_config("train", [f"run.dir={folder.path}", *words]))


def test_run_dir_alone_is_the_last_configuration_and_typed_keys_override_it(
    folder: RunFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    last = folder.last_config()
    assert last is not None and plain(load(folder)) == last
    assert last["validation"]["prompt"] == PROMPT
    assert "keeps the configuration of its last launch" in capsys.readouterr().out
    typed = load(folder, "optim.lr=0.25", "--log.interval=7")
    assert plain(typed) == changed("optim.lr", 0.25, "log.interval", 7, of=last)
    # The keys that the file of an experiment sets are typed; `optim.lr` is one, `log.wandb` not.
    assert load(folder, "experiment=smoke").optim.lr == 1e-3
    # schedule_steps=${train.max_steps} follows a typed length, as it would in a new run.
    longer = load(folder, "train.max_steps=200")
    assert (longer.train.max_steps, longer.optim.schedule_steps) == (200, 200)


def test_typed_mesh_replaces_the_mesh_of_the_last_launch(folder: RunFolder) -> None:
    folder.write_config(plain(load(folder, "parallel.dp_shard=2", "parallel.compile=true")))
    assert load(folder).parallel.dp_shard == 2
    resumed = load(folder, "parallel.tp=2").parallel
    assert (resumed.dp_shard, resumed.tp, resumed.compile) == (-1, 2, True)


def test_checkpoints_of_the_run_replace_the_one_it_started_from(folder: RunFolder) -> None:
    folder.write_config(plain(load(folder, "run.resume=runs/other/checkpoints/step-00000001")))
    assert load(folder).run.resume == "auto"
    shutil.rmtree(folder.checkpoints)
    assert load(folder).run.resume == "runs/other/checkpoints/step-00000001"


def test_run_dir_alone_without_a_run_is_not_a_new_run_with_the_default_configuration(
    folder: RunFolder,
) -> None:
    source = folder.path.with_name("books")
    folder.path.rename(source)

    def load_from(path: Path, *words: str) -> JobConfig:
        return load(RunFolder(path), *words)

    for name, hint in (
        ("boks", f"; did you mean run.dir={source}\\?"),
        ("books2", f"; did you mean run.dir={source}\\?"),
        ("another", "; for a new run"),
    ):
        path = source.with_name(name)
        with pytest.raises(
            ConfigError, match=f"run.dir={path} does not exist.*{hint}.*, add model="
        ):
            load_from(path)
    with pytest.raises(RunFolderError, match=f"has run folders in it .*; use run.dir={source}"):
        load_from(source.parent)
    with pytest.raises(RunFolderError, match=f"use run.dir={source} to resume"):
        load_from(source / "checkpoints" / "step-00000005")
    assert load_from(path, "model=llama3_tiny").optim.lr == 4e-3  # the remedy


@pytest.mark.parametrize("lost", ["missing", "", "{", "[1]", "a: 1", "train: 1"])
def test_lost_configuration_is_that_of_the_newest_checkpoint(folder: RunFolder, lost: str) -> None:
    last = folder.last_config()
    folder.config.unlink() if lost == "missing" else folder.config.write_text(lost)
    assert plain(load(folder)) == last
    (folder.step_folder(5) / "manifest.json").unlink()
    if lost != "missing":
        with pytest.raises(RunFolderError, match=r"config\.yaml cannot be read"):
            load(folder)


@pytest.mark.parametrize(
    ("word", "there"),
    [("model=llama3_8b", "smoke"), ("tokenizer=bpe", "byte"), ("data=stdlib", "kjv")],
)
def test_another_typed_group_is_an_error_once_there_are_checkpoints(
    folder: RunFolder, word: str, there: str
) -> None:
    with pytest.raises(ConfigError) as raised:
        load(folder, word)
    [error] = raised.value.errors
    assert error.startswith(word) and there in error and "Omit" in error
    group = word.partition("=")[0]
    kept = plain(load(folder))[group]
    assert kept["name"] == there  # the remedy
    same: dict[str, Any] = {"tokenizer": "tokenizer=byte", "data": "data=text"}
    if group in same:
        assert plain(load(folder, same[group]))[group] == kept


@pytest.mark.parametrize("words", [("tokenizer=bpe",), ()])
def test_same_command_resumes_a_run_with_a_tokenizer_file(
    words: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file determines the size, and the name unless `tokenizer=` is typed."""
    (tmp_path / "tokenizer.model").write_bytes(
        model_file(train_bpe(["to be or not " * 9], 275).ranks)
    )
    folder = RunFolder(tmp_path / "run")
    command = [*START, *words, f"tokenizer.path={tmp_path}"]
    monkeypatch.setattr("sys.argv", ["train.py", *command])
    first = load(folder, *command)
    assert (first.tokenizer.name, first.tokenizer.vocab_size) == ("bpe", 275)
    commit(folder, 5, plain(first))
    folder.write_config(plain(first))
    assert load(folder, *command) == first
    with pytest.raises(ConfigError, match="tokenizer=byte is not the tokenizer of the run"):
        load(folder, *START, "tokenizer=byte")


def test_cfg_job_prints_the_tokenizer_of_the_initial_weights(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "tokenizer.model"
    file.write_bytes(model_file(train_bpe(["to be or not " * 9], 275).ranks))
    for words, size in (([], 275), (["tokenizer=byte"], 272)):
        with pytest.raises(SystemExit):
            compose_config("train", ["--cfg", "job", f"run.init_from={tmp_path}", *words])
        assert yaml.safe_load(capsys.readouterr().out)["tokenizer"]["vocab_size"] == size
    file.write_text("not a tokenizer")
    with pytest.raises(ConfigError, match=r"tokenizer\.path="):
        compose_config("train", ["--cfg", "job", f"tokenizer.path={file}"])


def test_configuration_of_an_older_version_gets_todays_keys(folder: RunFolder) -> None:
    old: Any = folder.read_config()
    del old["watchdog"], old["train"]["micro_batch_size"]
    old["faults"]["max_in_a_row"] = old["faults"].pop("max_consecutive_skips") + 1
    old["run"] |= {"resume": "never", "allow_changes": ["optim.eps"]}
    folder.write_config(old)
    config = load(folder)
    assert config.faults.max_consecutive_skips == old["faults"]["max_in_a_row"]
    assert config.train.micro_batch_size is None and config.optim.lr == 0.5
    assert (config.run.resume, config.run.allow_changes) == ("auto", [])


def test_complete_command_does_not_keep_a_launch_that_left_no_checkpoint(
    folder: RunFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    """The launch may have failed because of a value that the repeated command lacks."""
    shutil.rmtree(folder.checkpoints)
    repeated = load(folder, *START)
    assert (repeated.optim.lr, repeated.train.max_steps) == (1e-3, 40)
    assert load(folder, "model=llama3_tiny").model.name == "llama3_tiny"
    assert capsys.readouterr().out == ""
    assert load(folder).optim.lr == 0.5
    assert "optim.lr=0.5" in capsys.readouterr().out


def test_group_of_an_experiment_that_differs_names_the_experiment(folder: RunFolder) -> None:
    with pytest.raises(ConfigError) as raised:
        load(folder, "experiment=h200_1b")
    assert all(
        error.startswith("experiment=h200_1b") and "Omit experiment=" in error
        for error in raised.value.errors
    )
