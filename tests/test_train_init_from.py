"""`run.init_from`: training starts from weights of any format, on any mesh."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import read_events, reproducible_metrics
from fork_server import Fault, ForkServer
from omegaconf import OmegaConf
from random_weights import SMALL, RandomWeights
from transformers import LlamaForCausalLM

from cli.config import load_train_config
from data.config import TokenizerConfig
from data.dataset import Dataset
from data.loader import TrainLoader
from data.tokenizer import ready_tokenizer
from formats.conversion import convert
from model.config import ModelConfig, RopeScaling
from training.config import JobConfig

MODEL = ModelConfig(
    "weights",
    64,
    2,
    4,
    2,
    192,
    272,
    rope_scaling=RopeScaling(8.0),
    tie_embeddings=True,
    max_seq_len=128,
)
SAME = ["model.rope_scaling={factor:8.0}", "data.document_mask=false"]
SHORT = ["train.max_steps=3", "checkpoint.interval=2"]
# Meshes and transformers sum in different orders.
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return folders with the same weights and tokenizer in each format."""
    folder = tmp_path_factory.mktemp("weights")
    byte = ready_tokenizer(TokenizerConfig(name="byte", vocab_size=272))
    for format, parts in (("native", 1), ("hf", 1), ("meta", 2)):
        convert(RandomWeights(MODEL), byte, folder / format, format, parts=parts)  # type: ignore[arg-type]
    return {format: folder / format for format in ("native", "hf", "meta")}


@pytest.fixture(scope="module")
def expected(
    folders: dict[str, Path], fork_server: ForkServer, train_arguments: Any, tmp_path_factory: Any
) -> tuple[list[dict[str, Any]], float]:
    """Return the metrics of a run from the Hugging Face folder, and transformers' first loss."""
    run = tmp_path_factory.mktemp("expected") / "run"
    start = fork_server.run(
        train_arguments(run, *SHORT, *SAME, f"run.init_from={folders['hf']}"), 1
    )
    assert start.exit_codes == {0: 0}, start.output()
    return reproducible_metrics(run), transformers_loss(folders["hf"], run)


def transformers_loss(folder: Path, run: Path) -> float:
    """Return the mean loss of the first batch of a run, computed by transformers."""
    values = yaml.safe_load((run / "config.yaml").read_text())
    config: JobConfig = load_train_config(OmegaConf.create(values))
    dataset = Dataset.open(config.data.folder, document_mask=False)
    loader = TrainLoader(dataset, config.stages(), seed=config.run.seed, rank=0, size=1)
    (batch,) = loader.step(0).micro_batches
    reference = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        logits = reference(batch.tokens).logits
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.labels.flatten()).item()


def test_first_loss_equals_transformers_on_same_batch(
    expected: tuple[list[dict[str, Any]], float],
) -> None:
    steps, loss = expected
    assert steps[0]["loss"] == pytest.approx(loss, rel=TOLERANCE)
    assert abs(steps[0]["loss"] - steps[1]["loss"]) > 1e-3  # different batch and weights


@pytest.mark.parametrize(
    ("format", "mesh"),
    [("hf", "tp"), ("hf", "dp_shard"), ("meta", "tp"), ("meta", "dp_shard"), ("native", "cp")],
)
def test_every_format_and_mesh_gives_same_run(
    format: str,
    mesh: str,
    folders: dict[str, Path],
    expected: tuple[list[dict[str, Any]], float],
    fork_server: ForkServer,
    train_arguments: Any,
    tmp_path: Path,
) -> None:
    run = tmp_path / "run"
    init_from = f"run.init_from={folders[format]}"
    start = fork_server.run(train_arguments(run, *SHORT, *SAME, init_from, f"parallel.{mesh}=2"), 2)
    assert start.exit_codes == {0: 0, 1: 0}, start.output()
    for found, step in zip(reproducible_metrics(run), expected[0], strict=True):
        assert found["batch_hash"] == step["batch_hash"]
        assert found["loss"] == pytest.approx(step["loss"], rel=TOLERANCE)
    if (format, mesh) != ("hf", "tp"):
        return
    assert f"from the weights of {folders[format]}" in " ".join(start.output().split())
    assert read_events(run)[0]["init_from"] == str(folders[format])
    # A checkpoint of two ranks is also a valid source of weights.
    again = tmp_path / "again"
    checkpoint = run / "checkpoints" / "step-00000003"
    assert (checkpoint / "tokenizer.model").exists()
    branch = fork_server.run(
        train_arguments(again, *SHORT, *SAME, f"run.init_from={checkpoint}"), 1
    )
    assert branch.exit_codes == {0: 0}, branch.output()
    longer = fork_server.run(train_arguments(run, *SAME, "train.max_steps=4"), 1)
    assert longer.exit_codes == {0: 0}, (
        longer.output()
    )  # from its own checkpoint, without run.init_from
    assert (
        reproducible_metrics(again)[0]["batch_hash"] == reproducible_metrics(run)[0]["batch_hash"]
    )
    assert reproducible_metrics(again)[0]["loss"] < reproducible_metrics(run)[0]["loss"]
    # A changed run.init_from is rejected when the run resumes.
    shutil.copytree(run, tmp_path / "copy")
    more = [*SAME, "train.max_steps=5"]
    gone = fork_server.run(train_arguments(tmp_path / "copy", *more, "run.init_from=gone"), 1)
    assert gone.exit_codes == {0: 1}
    assert "determines the initial weights" in gone.output()


def test_corrupted_initial_weights_are_rejected(
    folders: dict[str, Path], fork_server: ForkServer, train_arguments: Any, tmp_path: Path
) -> None:
    source = shutil.copytree(folders["native"], tmp_path / "source")
    largest = max(source.iterdir(), key=lambda path: path.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)
    start = fork_server.run(train_arguments(tmp_path / "run", f"run.init_from={source}", *SAME), 1)
    assert start.exit_codes == {0: 1}, start.output()
    assert f"is damaged: the hash of {largest.name}" in start.output()


def run_rejected(fork_server: ForkServer, arguments: list[str], run: Path) -> str:
    """Return the output of a launch that fails before it writes anything."""
    start = fork_server.run(arguments, 1)
    assert start.exit_codes == {0: 1}, start.output()
    assert not run.exists()
    return start.output()


def test_mismatching_weights_are_rejected_with_both_values(
    folders: dict[str, Path], fork_server: ForkServer, train_arguments: Any, tmp_path: Path
) -> None:
    run, init_from = tmp_path / "run", f"run.init_from={folders['hf']}"
    other = ["model.n_kv_heads=4", "model.rope_theta=10000", "data.document_mask=false"]
    output = run_rejected(fork_server, train_arguments(run, init_from, *other), run)
    assert "model.n_kv_heads=4 differs from model.n_kv_heads=2 of the weights in" in output
    assert "; use model.n_kv_heads=2\n" in output
    assert "model.rope_theta=10000.0 differs from model.rope_theta=" in output
    assert "or run.allow_changes=[model.rope_theta] to train the weights with another" in output
    scaling = "{factor:8.0,low_freq_factor:1.0,high_freq_factor:4.0,original_max_seq_len:8192}"
    assert f"differs from model.rope_scaling={scaling} of" in output
    assert f"; use 'model.rope_scaling={scaling}'" in output

    convert(RandomWeights(SMALL), None, tmp_path / "small", "hf")
    output = run_rejected(
        fork_server, train_arguments(run, f"run.init_from={tmp_path / 'small'}", *SAME), run
    )
    assert "model.vocab_size=272 differs from model.vocab_size=" in output

    output = run_rejected(
        fork_server, train_arguments(run, f"run.init_from={tmp_path / 'nowhere'}", *SAME), run
    )
    assert "nowhere does not exist; use" in output
    both = [init_from, f"run.resume={folders['native']}", *SAME]
    output = run_rejected(fork_server, train_arguments(run, *both), run)
    assert "loads weights only; use run.resume=auto or" in output
    weights_only = train_arguments(run, f"run.resume={folders['native']}", *SAME)
    assert "has weights only, without optimizer state" in run_rejected(
        fork_server, weights_only, run
    )


def test_changed_function_is_trained_with_allow_changes(
    folders: dict[str, Path], fork_server: ForkServer, train_arguments: Any, tmp_path: Path
) -> None:
    allow = "run.allow_changes=[model.rope_scaling,model.rope_theta]"
    longer = ["model.rope_theta=1000000", "data.document_mask=false", "train.max_steps=1"]
    arguments = train_arguments(
        tmp_path / "run", f"run.init_from={folders['meta']}", allow, *longer
    )
    start = fork_server.run(arguments, 1)
    assert start.exit_codes == {0: 0}, start.output()


def test_read_error_on_one_rank_stops_all_ranks_with_its_reason(
    folders: dict[str, Path], fork_server: ForkServer, train_arguments: Any, tmp_path: Path
) -> None:
    init_from = f"run.init_from={folders['hf']}"
    failing = Fault(rank=1, call=3, action="EIO", function="os.preadv")
    start = fork_server.run(
        train_arguments(tmp_path / "run", init_from, *SAME, "parallel.tp=2"), 2, failing
    )
    assert start.exit_codes == {0: 1, 1: 1}, start.output()
    assert "cannot be read (Input/output error)" in start.output()
    assert "(rank 1)" in start.output()
