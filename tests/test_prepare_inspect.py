"""`prepare.py inspect=…` and `verify=true` on the command line."""

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, read_metrics, start_program
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf

from cli.arguments import CONF, hydra_arguments
from cli.config import load_train_config
from data.dataset import Dataset
from data.loader import TrainLoader
from resilience.run_folder import RunFolder
from training.config_validation import plain

STAGES = "data.stages=[{from_sample:32,seq_len:128},{from_sample:64,global_batch_size:4}]"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, smoke_run: Callable[..., Any]) -> Path:
    """Return a run of twelve steps in three stages."""
    folder = tmp_path_factory.mktemp("inspect") / "run"
    smoke_run(folder, STAGES, "train.max_steps=12", "validation.samples=0", "run.seed=5")
    return folder


def shards_of(run: Path) -> Path:
    return Path(OmegaConf.load(run / "config.yaml").data.folder)


def prepare_program(*arguments: str, cwd: Path = ROOT) -> tuple[int, str, str]:
    """Return exit code, standard output and standard error."""
    done = start_program([str(ROOT / "prepare.py"), *arguments], cwd=cwd)
    assert "Traceback" not in done.stderr
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize(("sample", "step"), [(13, 2), (45, 6), (70, 10)])
def test_inspected_sample_is_in_the_batch_of_the_printed_step(
    run: Path, sample: int, step: int
) -> None:
    """The batch hash in the run's metrics proves that the loader here reads the run's batches."""
    exit_code, text, errors = prepare_program(f"inspect={run}", f"sample={sample}")
    assert exit_code == 0, errors
    assert f"\nstep {step} of 12 (samples " in text
    composed = OmegaConf.load(run / "config.yaml")
    assert isinstance(composed, DictConfig)
    config = load_train_config(composed)
    dataset = Dataset.open(config.data.folder)
    stages = config.stages()
    batches = TrainLoader(dataset, stages, seed=5, rank=0, size=1).step(step - 1)
    (line,) = [line for line in read_metrics(run) if line["step"] == step]
    assert line["batch_hash"] == f"{batches.digest % 2**32:08x}"
    (batch,) = batches.micro_batches
    row = batch.tokens[sample - stages.first_sample(step - 1)]
    shown = re.split(r"document \d+/\d+, .*? ─+\n", text)[1:]
    expected = dataset.tokenizer().decode(row.tolist())
    found = "".join(part.replace(" ⊘\n", "") for part in shown)
    # The last token is only a label, and the output ends at a line.
    assert found.startswith(expected) and len(found) - len(expected) <= 20


def test_inspected_dataset_is_printed_with_assumed_values(run: Path) -> None:
    shards = shards_of(run)
    exit_code, text, errors = prepare_program(f"inspect={shards}", "seq_len=32", "seed=5")
    assert exit_code == 0, errors
    assert "seed 5, seq_len 32" in text and "assumed" not in text
    exit_code, text, errors = prepare_program(f"inspect={shards}", "seq_len=32")
    assert exit_code == 0 and "assumed: seed" in text


def test_verify_reports_flipped_bytes_and_missing_files(run: Path, tmp_path: Path) -> None:
    copy = tmp_path / "shards"
    shutil.copytree(shards_of(run), copy)
    exit_code, text, errors = prepare_program("verify=true", f"data.folder={copy}")
    assert (exit_code, errors) == (0, "")
    assert text.startswith(f"{copy}: verified ") and len(text.splitlines()) == 1
    damaged = next(copy.glob("*/train-*.tokens"))
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 1
    damaged.write_bytes(content)
    exit_code, text, errors = prepare_program("verify=true", f"data.folder={copy}")
    assert (exit_code, text) == (1, "")
    assert f"{damaged} is damaged in MiB 0" in errors
    lost, short = next(copy.glob("*/train-*.offsets")), next(copy.glob("*/validation-*.tokens"))
    lost.unlink()
    os.truncate(short, 8)
    exit_code, _, errors = prepare_program("verify=true", f"data.folder={copy}")
    assert exit_code == 1
    for path in (damaged, lost, short):
        assert str(path) in errors
    exit_code, _, errors = prepare_program(f"inspect={copy}")
    assert exit_code == 1 and str(lost) in errors


def test_verify_prepares_nothing(tmp_path: Path, corpus: Path) -> None:
    exit_code, _, errors = prepare_program(
        *("data=text", "data.name=x", f"data.sources.text.path={corpus}", "verify=true"),
        cwd=tmp_path,
    )
    assert exit_code == 1 and "has no prepared data" in errors
    assert list(tmp_path.iterdir()) == []


def test_inspect_errors_have_rule_and_remedy(run: Path, tmp_path: Path) -> None:
    without_data = tmp_path / "run"
    without_data.mkdir()
    config = (run / "config.yaml").read_text()
    (without_data / "config.yaml").write_text(config.replace(str(shards_of(run)), "gone/shards"))
    other = tmp_path / "other"
    shutil.copytree(run, other)
    changed = tmp_path / "changed"
    shutil.copytree(shards_of(run), changed)
    manifest = json.loads((changed / "manifest.json").read_text())
    manifest["tokenizer"]["name"] = "bytes"
    del manifest["sha256"]  # as another program would write it
    (changed / "manifest.json").write_text(json.dumps(manifest))
    (other / "config.yaml").write_text(config.replace(str(shards_of(run)), str(changed)))
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.yaml").write_text("train: 3\n")
    arguments = [
        "data=fineweb_edu",
        "data.stream_shards=2",
        "validation.samples=0",
        "tokenizer=byte",
    ]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        streaming = load_train_config(compose("train", hydra_arguments(arguments, "train")))
    RunFolder(tmp_path / "stream").write_config(plain(streaming))
    for arguments, message in (
        ([f"inspect={tmp_path}"], f"inspect={tmp_path} contains neither config.yaml of a run nor"),
        (["inspect=nowhere"], "inspect=nowhere is not a folder"),
        ([f"inspect={without_data}"], "the run's data.folder=gone/shards has no prepared data"),
        ([f"inspect={other}"], "has other tokens"),
        ([f"inspect={broken}"], "is not a valid configuration of train.py"),
        ([f"inspect={tmp_path}/stream"], "the run streams its data (data.stream_shards=2)"),
        ([f"inspect={run}", "seq_len=64"], "seq_len=64 is determined by the run"),
        ([f"inspect={shards_of(run)}", "seq_len=10000000"], "seq_len=10000000 is too long"),
    ):
        exit_code, _, errors = prepare_program(*arguments)
        assert exit_code == 1 and message in errors, errors
