"""Data is prepared and checked before launch; the remedies in its errors work."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from run_config import commit

from cli.arguments import CONF, hydra_arguments
from cli.config import check_config
from data.errors import DataError
from data.tokenizer import Tokenizer
from resilience.run_folder import RunFolder, RunFolderError
from training.config import JobConfig
from training.config_validation import ConfigError, plain
from training.preflight import abandoned_on_error, acquire_run_lock, check_folder, prepare_data


@pytest.fixture(autouse=True)
def in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def configure(*overrides: str) -> JobConfig:
    """Return the configuration of a small run on `text.txt`."""
    base = ("experiment=smoke", "data=text", "data.name=own", "parallel.accelerator=cpu")
    path = () if "sources" in str(overrides) else ("data.sources.text.path=text.txt",)
    with initialize_config_dir(str(CONF), version_base="1.3"):
        composed = compose("train", hydra_arguments([*base, *path, *overrides], "train"))
    return check_config(composed)[0]


def suggestions(message: str) -> list[list[str]]:
    """Return the command-line arguments in a message: those joined by `with` belong together."""
    found = re.findall(r"((?:\S+=\S+ with )*\w+(?:\.\w+)+=[^\s,;]+)", message.partition("; ")[2])
    return [each.split(" with ") for each in found]


def test_each_remedy_for_missing_held_out_text_works(tmp_path: Path) -> None:
    Path("text.txt").write_text("A line of text.\n" * 150)
    with pytest.raises(DataError, match=r"holds out 49 tokens of .*needs 65") as fresh:
        prepare_data(configure())
    assert not Path("shards").exists()
    prepare_data(configure("validation.samples=0"))  # prepares the folder
    with pytest.raises(DataError, match=r"holds out 49 tokens") as prepared:
        prepare_data(configure())
    tried = suggestions(str(fresh.value)), suggestions(str(prepared.value))
    for remedies in tried:
        keys = [each[0].partition("=")[0] for each in remedies]
        assert keys == ["data.validation_fraction", "validation.samples", "train.seq_len"]
    for remedy in tried[1]:
        assert prepare_data(configure(*remedy)).hash
    for remedy in tried[0]:
        shutil.rmtree("shards")
        assert prepare_data(configure(*remedy)).hash


def test_validation_without_a_fraction_is_rejected_before_the_preparation() -> None:
    with pytest.raises(ConfigError, match=r"validation\.samples=8 needs held-out text") as error:
        configure("data.validation_fraction=0")
    for (remedy,) in suggestions(str(error.value)):
        assert configure("data.validation_fraction=0", remedy)


@pytest.mark.parametrize(
    ("n_lines", "overrides", "error"),
    [
        (4, ["train.global_batch_size=1"], "has 65 training tokens, but a window"),
        (18, [], r"global_batch_size=8 is larger than the 4 windows"),
    ],
)
def test_remedy_for_too_little_training_text_works(
    n_lines: int, overrides: list[str], error: str
) -> None:
    Path("text.txt").write_text("A line of text.\n" * n_lines)
    given = ["validation.samples=0", "train.seq_len=65" if overrides else "train.seq_len=64"]
    with pytest.raises(DataError, match=error) as raised:
        prepare_data(configure(*given, *overrides))
    ((remedy,),) = suggestions(str(raised.value))
    assert prepare_data(configure(*given, *overrides, remedy)).hash


def resumed(config: JobConfig) -> RunFolder:
    """Write the run folder of a run with this configuration after its first checkpoint."""
    folder = RunFolder(Path(config.run.dir))
    folder.write_config(plain(config))
    commit(folder, 20, plain(config), data_hash=prepare_data(config).hash)
    return folder


def test_run_resumes_wherever_its_corpus_is_and_not_on_another_one(tmp_path: Path) -> None:
    Path("text.txt").write_text("A line of text.\n" * 2000)
    resumed(configure())
    Path("moved").mkdir()
    shutil.move("text.txt", "moved/book.txt")
    for path in (f"{tmp_path}/moved/book.txt", "moved/", "./moved/*.txt"):
        config = configure(f"data.sources.text.path={path}")
        assert set(check_folder(config).free) == {"data.sources.text.path"}
        assert prepare_data(config).hash
    config = configure("data.sources.text.path=moved", "data.name=again")
    assert prepare_data(config).hash  # the same tokens in another folder

    Path("text.txt").write_text("Another text.\n" * 2000)
    with pytest.raises(RunFolderError, match=r"trained on the data in shards/own\S*, and this is"):
        prepare_data(configure("data.name=other"))
    assert not list(Path("shards").glob("other*"))
    shutil.rmtree("shards")
    with pytest.raises(RunFolderError, match=r"has other tokens .* than the run in"):
        prepare_data(configure())


def test_run_resumes_after_its_sources_changed_and_a_new_run_is_rejected(
    capsys: pytest.CaptureFixture[str],
) -> None:
    Path("text.txt").write_text("A line of text.\n" * 2000)
    resumed(configure())
    Path("text.txt").write_text("A line of TEXT.\n" * 2000)
    prepare_data(configure())
    errors = capsys.readouterr().err
    assert "another revision" in errors and "The prepared shards are used" in errors
    with pytest.raises(DataError, match=r"another revision(.|\n)*replaced: text\.txt"):
        prepare_data(configure("run.name=new"))


@pytest.mark.parametrize("has_tokenizer", [False, True])
def test_tokenizer_of_initial_weights_is_checked_before_the_preparation(
    has_tokenizer: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("text.txt").write_text("A line of text.\n" * 1000)
    source = Tokenizer("llama3", {b"a": 0}) if has_tokenizer else None
    monkeypatch.setattr("formats.detection.find_checkpoint", lambda path, verify: path)
    monkeypatch.setattr("formats.tokenizers.find_tokenizer", lambda folder: source)
    name = "byte" if has_tokenizer else "bpe"
    config = configure(f"tokenizer={name}")
    config = replace(config, run=replace(config.run, init_from="weights"))
    expected = "Omit tokenizer" if has_tokenizer else "contains no tokenizer"
    with pytest.raises(DataError, match=expected):
        prepare_data(config)
    assert not Path("shards").exists()


@pytest.mark.parametrize("has_file", [False, True])
def test_launch_that_fails_leaves_neither_lock_nor_empty_folder(has_file: bool) -> None:
    Path("text.txt").write_text("text")
    lock = acquire_run_lock(configure("run.dir=runs/a"))
    folder = Path("runs/a")
    assert (folder / "lock").exists()
    if has_file:
        (folder / "config.yaml").touch()
    with pytest.raises(DataError), abandoned_on_error(lock):
        raise DataError("the weights are damaged")
    assert folder.exists() == has_file and not (folder / "lock").exists()


def test_checkpoint_of_another_run_is_rejected_unless_adopted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("text.txt").write_text("A line of text.\n" * 150)
    config = configure(f"run.dir={tmp_path / 'run'}")
    folder = RunFolder(Path(config.run.dir))
    for step, run_id in ((2, "a" * 32), (4, None), (6, "b" * 32)):
        manifest = commit(folder, step, plain(config)) / "manifest.json"
        manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"run_id": run_id}))
    with pytest.raises(RunFolderError, match="step-00000006") as raised:
        check_folder(config)
    (remedy,) = re.findall(r"Use (\S+)", str(raised.value))
    check_folder(configure(f"run.dir={tmp_path / 'run'}", remedy))
    shutil.rmtree(folder.step_folder(6))
    assert not capsys.readouterr().err
    check_folder(config)
    assert "step-00000004 was saved by an earlier version" in capsys.readouterr().err
