"""Whether a run may go on in its folder is decided before anything is launched or written."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from program.command_line import CONF
from program.config import load_train_config, plain
from training.run_folder import COMMITTED, RunFolder, RunFolderError

# Keys that decide samples or model. Every other one may change from start to start.
FIXED = (
    "run.seed",
    "model.",
    "precision.param",
    "precision.reduce",
    "precision.fp8",
    "data.name",
    "data.sources",
    "data.validation_fraction",
    "data.document_mask",
    "data.shard_tokens",
    "data.invalid_text",
    "data.packing",
    "data.shuffle_block_tokens",
    "data.stages",
    "data.stream_lanes",
    "tokenizer.name",
    "tokenizer.vocab_size",
    "tokenizer.training_characters",
    "train.global_batch_size",
    "train.seq_len",
    "train.max_grad_norm",
    "optim.optimizer",
    "optim.betas",
    "optim.eps",
    "optim.weight_decay",
)


def default() -> dict[str, Any]:
    """The configuration of `python train.py`, without Hydra."""
    composed: Any = OmegaConf.load(CONF / "train.yaml")
    del composed["defaults"], composed["hydra"]
    for group, name in (("model", "llama3_2_1b"), ("data", "stdlib"), ("tokenizer", "llama3")):
        composed[group] = OmegaConf.load(CONF / group / f"{name}.yaml")
    return plain(load_train_config(composed))


CONFIG = default()


def leaves(config: dict[str, Any], prefix: str = "") -> list[str]:
    """The dotted keys of all values."""
    found = []
    for key, value in config.items():
        path = f"{prefix}{key}"
        found += leaves(value, f"{path}.") if isinstance(value, dict) else [path]
    return found


def with_other(key: str) -> tuple[dict[str, Any], Any, Any]:
    """The configuration with another value at `key`, the value before, and the other one."""
    config = copy.deepcopy(CONFIG)
    section = config
    *path, last = key.split(".")
    for name in path:
        section = section[name]
    before = section[last]
    section[last] = "another" if isinstance(before, str | None) else 12345
    return config, before, section[last]


def commit(folder: RunFolder, step: int, **position: Any) -> Path:
    """A folder that looks like a committed checkpoint to those who read small files alone."""
    target = folder.step_folder(step)
    target.mkdir(parents=True)
    manifest = {"position": {"step": step, **position}}
    (target / "manifest.json").write_text(json.dumps(manifest))
    (target / COMMITTED).touch()
    return target


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    """A run with its configuration and two checkpoints."""
    folder = RunFolder(tmp_path / "run")
    folder.write_config(CONFIG)
    for step in (5, 40):
        commit(folder, step)
    return folder


def content(folder: RunFolder) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.path.rglob("*") if path.is_file()}


def test_the_same_configuration_goes_on(folder: RunFolder) -> None:
    before = content(folder)
    assert folder.check(CONFIG) == {}
    assert content(folder) == before


def test_a_first_start_writes_nothing(tmp_path: Path) -> None:
    assert RunFolder(tmp_path / "new").check(CONFIG) == {}
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("key", [key for key in leaves(CONFIG) if key != "run.resume"])
def test_a_key_is_told_as_changed_or_refused_with_both_values(folder: RunFolder, key: str) -> None:
    config, old, new = with_other(key)
    fixed = any(key == name or key.startswith(f"{name.removesuffix('.')}.") for name in FIXED)
    if not fixed or key == "model.attention":  # a kernel computes the same attention
        assert folder.check(config) == {key: [old, new]}
        return
    before = content(folder)
    with pytest.raises(RunFolderError) as error:
        folder.check(config)
    assert f"{key}: {old!r} -> {new!r}" in str(error.value)
    assert "run.name" in str(error.value)
    assert content(folder) == before


def test_every_fixed_key_that_changed_is_named_at_once(folder: RunFolder) -> None:
    config = copy.deepcopy(CONFIG)
    config["model"]["dim"], config["run"]["seed"], config["optim"]["lr"] = 64, 9, 1.0
    with pytest.raises(RunFolderError) as error:
        folder.check(config)
    message = str(error.value)
    assert "model.dim" in message and "run.seed" in message and "optim.lr" not in message


def test_another_set_of_sources_is_refused(folder: RunFolder) -> None:
    config = copy.deepcopy(CONFIG)
    config["data"]["sources"]["more"] = {"format": "text", "path": "books"}
    with pytest.raises(RunFolderError, match=r"data\.sources\.more"):
        folder.check(config)


def test_before_the_first_checkpoint_everything_may_change(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.write_config(CONFIG)
    config, old, new = with_other("model.dim")
    assert folder.check(config) == {"model.dim": [old, new]}


def resuming(resume: str) -> dict[str, Any]:
    config = copy.deepcopy(CONFIG)
    config["run"]["resume"] = resume
    return config


def test_never_is_refused_where_checkpoints_are(folder: RunFolder, tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match=r"run\.resume \(never\)"):
        folder.check(resuming("never"))
    RunFolder(tmp_path / "new").check(resuming("never"))


def test_a_path_has_to_be_a_committed_checkpoint(folder: RunFolder, tmp_path: Path) -> None:
    new = RunFolder(tmp_path / "new")
    new.check(resuming(str(folder.step_folder(5))))
    (folder.step_folder(5) / COMMITTED).unlink()
    for path in (folder.step_folder(5), tmp_path / "nowhere"):
        with pytest.raises(RunFolderError, match="is not a committed checkpoint"):
            new.check(resuming(str(path)))


def test_a_checkpoint_under_another_name_is_one_too(folder: RunFolder, tmp_path: Path) -> None:
    best = folder.step_folder(5).rename(tmp_path / "best")
    RunFolder(tmp_path / "new").check(resuming(str(best)))
    (best / "manifest.json").write_text("{")
    with pytest.raises(RunFolderError, match=r"manifest\.json"):
        RunFolder(tmp_path / "new").check(resuming(str(best)))


def test_a_path_before_the_newest_checkpoint_is_refused(folder: RunFolder) -> None:
    """The steps after it would have to be written over."""
    with pytest.raises(RunFolderError, match=r"before step 40.*run\.resume=auto to go on"):
        folder.check(resuming(str(folder.step_folder(5))))
    folder.check(resuming(str(folder.step_folder(40))))


def test_checkpoints_that_are_gone_stop_the_run(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.write_config(CONFIG)
    folder.ledger.write_text('{"event": "start", "step": 0}\n{"event": "sa')
    folder.check(CONFIG)  # started and killed before the first save
    folder.ledger.write_text('{"event": "start", "step": 0}\ntorn{\n{"event": "save", "step": 5}\n')
    with pytest.raises(RunFolderError, match=r"ledger\.jsonl tells of saved checkpoints"):
        folder.check(CONFIG)


@pytest.mark.parametrize("text", ["{", "[1, 2]", "", "a: b: c"])
def test_an_unreadable_configuration_stops_the_run(folder: RunFolder, text: str) -> None:
    folder.config.write_text(text)
    with pytest.raises(RunFolderError, match=r"config\.yaml cannot be read"):
        folder.check(CONFIG)


def test_the_configuration_comes_back_as_it_was_written(folder: RunFolder) -> None:
    """Numbers like 1e-8 are strings to YAML 1.1 when written carelessly."""
    assert folder.check(CONFIG) == {}
    assert not folder.config.with_suffix(".tmp").exists()


def test_steps_are_read_from_whole_names_of_committed_folders(folder: RunFolder) -> None:
    for name in ("step-00000050.damaged-1", "step-abc", ".step-00000060-1", "step-00000070"):
        (folder.checkpoints / name).mkdir()
        if name != "step-00000070":
            (folder.checkpoints / name / COMMITTED).touch()
    assert folder.committed_steps() == [5, 40]


def test_position_is_that_of_the_newest_checkpoint_that_can_be_read(folder: RunFolder) -> None:
    assert folder.newest_position() is None
    commit(folder, 50, samples=100, data_hash="old")
    commit(folder, 60, samples=120, data_hash="new")
    assert folder.newest_position() == {"step": 60, "samples": 120, "data_hash": "new"}
    (folder.step_folder(60) / "manifest.json").write_text("{")
    assert folder.newest_position() == {"step": 50, "samples": 100, "data_hash": "old"}


@pytest.mark.parametrize(
    ("before", "now", "allowed"),
    [
        (None, [{"from_sample": 120, "seq_len": 512}], True),
        (None, [{"from_sample": 119, "seq_len": 512}], False),
        ([{"from_sample": 80, "seq_len": 512}], None, False),
        ([{"from_sample": 160, "seq_len": 512}], None, True),
        (
            [{"from_sample": 80, "seq_len": 512}, {"from_sample": 160, "seq_len": 1024}],
            [{"from_sample": 80, "seq_len": 512}, {"from_sample": 120, "seq_len": 2048}],
            True,
        ),
        ([{"from_sample": 80, "seq_len": 512}], [{"from_sample": 80, "seq_len": 256}], False),
        (
            [{"from_sample": 80, "micro_batch_size": 4}],
            [{"from_sample": 80, "micro_batch_size": 2}],  # as train.micro_batch_size may
            True,
        ),
        ([{"from_sample": 80, "micro_batch_size": 4}], None, False),
    ],
)
def test_stages_may_change_where_no_sample_has_been_taken(
    folder: RunFolder, before: Any, now: Any, allowed: bool
) -> None:
    """The newest checkpoint has taken the samples 0 … 119."""
    commit(folder, 60, samples=120, data_hash="same")
    configs = [copy.deepcopy(CONFIG), copy.deepcopy(CONFIG)]
    for config, stages in zip(configs, (before, now), strict=True):
        config["data"]["stages"] = stages
    folder.write_config(configs[0])
    if allowed:
        assert folder.check(configs[1]) == {"data.stages": [before, now]}
    else:
        with pytest.raises(RunFolderError, match=r"data\.stages"):
            folder.check(configs[1])


def test_samples_are_appended(folder: RunFolder) -> None:
    for step in (1, 2):
        folder.append_sample(step, f"text {step} é")
    text = folder.samples.read_text(encoding="utf-8")
    assert text.index("--- step 1 ---\ntext 1 é") < text.index("--- step 2 ---\ntext 2 é")
