"""`convert.py` on a trained checkpoint: other programs compute the same results from its output."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, start_program
from fork_server import ForkServer
from random_weights import assert_same_weights, filled

import convert
from data.dataset import Dataset
from data.loader import validation_batches
from formats.config import ConvertJobConfig
from formats.detection import open_weights
from formats.errors import FormatError
from formats.weights import fingerprint

PROMPT = "def encode(self, "
SAMPLES = 8


@pytest.fixture(scope="module")
def checkpoint(
    fork_server: ForkServer, train_arguments: Any, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A checkpoint saved by two ranks, without a document mask, as in transformers."""
    run = tmp_path_factory.mktemp("trained") / "run"
    steps = ["train.max_steps=12", "checkpoint.interval=null", "data.document_mask=false"]
    launch = fork_server.run(train_arguments(run, *steps, "optim.lr=1e-2", "parallel.tp=2"), 2)
    assert launch.exit_codes == {0: 0, 1: 0}, launch.output()
    return run / "checkpoints" / "step-00000012"


@pytest.fixture(scope="module")
def exported(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint converted to a Hugging Face folder by `convert.py`."""
    target = tmp_path_factory.mktemp("exported") / "hf"
    done = start_program(["convert.py", f"checkpoint={checkpoint}", f"target={target}"])
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{target}: Hugging Face folder, 0.5 MB in ")
    assert done.stderr == ""
    return target


@pytest.fixture(scope="module")
def reference(
    exported: Path, checkpoint: Path, tmp_path_factory: Any
) -> tuple[dict[str, Any], Any]:
    """Results of transformers on the exported folder; its input tokens and logits."""
    folder = tmp_path_factory.mktemp("reference")
    config = json.loads((checkpoint / "manifest.json").read_text())["config"]
    dataset = Dataset.open(config["data"]["folder"], document_mask=False)
    windows = validation_batches(
        dataset, samples=SAMPLES, seq_len=64, micro_batch_size=SAMPLES, rank=0, size=1
    )
    (batch,) = windows["text"]
    torch.save((batch.tokens, batch.labels), folder / "windows.pt")
    script = [sys.executable, str(ROOT / "tests" / "transformers_reference.py"), str(exported)]
    done = subprocess.run(
        [*script, str(folder / "windows.pt"), PROMPT, str(folder / "logits.pt")],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    logits = torch.load(folder / "logits.pt", weights_only=True)
    return json.loads(done.stdout), (batch.tokens, logits)


def test_transformers_computes_equal_logits(checkpoint: Path, reference: Any) -> None:
    results, (tokens, expected) = reference
    assert results["dtype"] == "torch.float32"
    with torch.no_grad():
        logits = filled(open_weights(checkpoint))(tokens)
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)
    assert expected.std() > 0.5  # the model has learned something


def test_held_out_loss_equals_transformers_and_hash_is_equal_in_all_formats(
    checkpoint: Path, exported: Path, reference: Any, fork_server: ForkServer
) -> None:
    hashes = set()
    for folder, mesh in ((checkpoint, "tp"), (exported, "dp_shard")):
        data = json.loads((checkpoint / "manifest.json").read_text())["config"]["data"]["folder"]
        more = [] if folder == checkpoint else [f"evaluation.data={data}"]
        launch = fork_server.run(
            [
                *(f"checkpoint={folder}", f"evaluation.samples={SAMPLES}", *more),
                *("parallel.accelerator=cpu", f"parallel.{mesh}=2"),
            ],
            2,
            program="evaluate.py",
        )
        assert launch.exit_codes == {0: 0, 1: 0}, launch.output()
        results = json.loads((folder / "evaluation.json").read_text())
        hashes.add(results["weights_hash"])
        # In both formats with the windows and the document mask of the run.
        assert results["loss"] == pytest.approx(reference[0]["loss"], rel=1e-6)
    assert hashes == {fingerprint(open_weights(checkpoint))}


def test_greedy_text_equals_transformers(checkpoint: Path, reference: Any) -> None:
    """The run folder names its only checkpoint."""
    run = checkpoint.parent.parent
    done = start_program(
        [
            *("generate.py", f"checkpoint={run}", f"prompt={PROMPT}", "temperature=0"),
            *("max_new_tokens=40", "parallel.accelerator=cpu"),
        ]
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == reference[0]["text"] + "\n"
    assert len(reference[0]["text"]) > len(PROMPT)
    assert done.stderr.startswith(f"Using {checkpoint}\n") and "tokens/s" in done.stderr


def test_round_trip_through_all_formats_is_bit_exact(
    checkpoint: Path, exported: Path, fork_server: ForkServer, tmp_path: Path
) -> None:
    for source, target, format in (
        (exported, "native", "native"),
        (tmp_path / "native", "meta", "meta"),
        (tmp_path / "meta", "hf", "hf"),
    ):
        parts = ["parts=2"] if format == "meta" else []
        arguments = [
            f"checkpoint={source}",
            f"target={tmp_path / target}",
            f"format={format}",
            *parts,
        ]
        launch = fork_server.run(arguments, 1, program="convert.py")
        assert launch.exit_codes == {0: 0}, launch.output()
        assert_same_weights(open_weights(tmp_path / target), open_weights(checkpoint))
    tokenizer = (checkpoint / "tokenizer.model").read_bytes()
    assert (tmp_path / "meta" / "tokenizer.model").read_bytes() == tokenizer
    assert (tmp_path / "native" / "tokenizer.model").read_bytes() == tokenizer
    for path in exported.iterdir():
        if path.name != "evaluation.json":
            assert (tmp_path / "hf" / path.name).read_bytes() == path.read_bytes(), path.name


def test_invalid_input_is_rejected_and_nothing_is_written(
    checkpoint: Path, exported: Path, fork_server: ForkServer, tmp_path: Path
) -> None:
    def error_of(*arguments: str) -> str:
        launch = fork_server.run([*arguments], 1, program="convert.py")
        assert launch.exit_codes == {0: 1}, launch.output()
        assert list(tmp_path.iterdir()) == []
        message = launch.output()
        assert message.startswith(("Invalid configuration:", "Error: "))
        assert "Traceback" not in message
        return message

    out = f"target={tmp_path / 'out'}"
    found = error_of(
        f"checkpoint={checkpoint}", out, "parts=2", "file_gb=0", "formt=hf", "dtype=int8"
    )
    assert "Unknown key formt. Did you mean format?" in found
    assert "parts=2 applies to Meta folders only" in found
    assert "file_gb=0 is not above 0" in found
    assert "dtype='int8' is not a valid choice" in found
    assert "checkpoint has no value" in error_of(out)
    assert "is not a folder" in error_of("checkpoint=nowhere", out)
    parts = error_of(f"checkpoint={checkpoint}", out, "format=meta", "parts=3")
    assert "parts=3 does not divide model.n_heads=4" in parts and "use 1 or 2" in parts
    exists = error_of(f"checkpoint={checkpoint}", f"target={exported}")
    assert "exists; use another folder, or overwrite=true" in exists
    llama3 = error_of(f"checkpoint={checkpoint}", out, f"tokenizer_path={_llama3()}")
    assert "(llama3, 128,256 tokens) has other tokens than the tokenizer in" in llama3


def test_existing_target_is_reported_before_the_weights_are_verified(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("formats.detection.open_weights", None)
    step = tmp_path / "run" / "checkpoints" / "step-00000001"
    for file in (step / "COMMITTED", tmp_path / "out" / "text"):
        file.parent.mkdir(parents=True)
        file.touch()
    for name, message in (("out", "exists; use another folder"), ("run", "contains the folder")):
        config = ConvertJobConfig(
            checkpoint=str(tmp_path / "run"),
            target=str(tmp_path / name),
            format=None,
            dtype=None,
            parts=1,
            file_gb=5.0,
            tokenizer_path="auto",
            overwrite=False,
        )
        with pytest.raises(FormatError, match=message):
            convert.run(config)


def _llama3() -> Path:
    import llama_models

    return Path(llama_models.__path__[0]) / "llama3" / "tokenizer.model"
