"""`evaluate.py`: held-out loss on any mesh and in any format, by source, and benchmarks."""

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import read_metrics
from fork_server import ForkServer, Launch

from data.config import TokenizerConfig
from data.tokenizer import ready_tokenizer
from evaluate import output_file
from formats.conversion import convert
from formats.detection import open_weights
from formats.errors import FormatError
from formats.weights import fingerprint

TWO_SOURCES = ["data.sources.again.format=text", "data.sources.again.weight=0.5"]
Evaluate = Callable[..., Launch]


@pytest.fixture(scope="module")
def checkpoint(
    fork_server: ForkServer,
    train_arguments: Any,
    corpus: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """The last checkpoint of ten steps on a text source and a second source with part of it."""
    folder = tmp_path_factory.mktemp("evaluate")
    run = folder / "run"
    sources = [
        *TWO_SOURCES,
        f"data.sources.again.path={corpus}/email-*.txt",
        f"data.folder={folder / 'shards'}",
        "data.validation_fraction=0.4",
        "data.name=two",
    ]
    steps = ["train.max_steps=10", "checkpoint.interval=null", "validation.samples=9"]
    launch = fork_server.run(train_arguments(run, *sources, *steps), 1)
    assert launch.exit_codes == {0: 0}, launch.output()
    return run / "checkpoints" / "step-00000010"


@pytest.fixture(scope="module")
def exported(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same weights as a Hugging Face folder."""
    folder = tmp_path_factory.mktemp("exported") / "hf"
    byte = ready_tokenizer(TokenizerConfig(name="byte", vocab_size=272))
    convert(open_weights(checkpoint), byte, folder, "hf")
    return folder


@pytest.fixture(scope="module")
def evaluate(fork_server: ForkServer) -> Evaluate:
    """Function that runs the program: `evaluate(folder, "key=value", …, ranks=2)`."""

    def run(folder: Path, *overrides: str, ranks: int = 1) -> Launch:
        named = [f"checkpoint={folder}", "parallel.accelerator=cpu"]
        return fork_server.run([*named, *overrides], ranks, program="evaluate.py")

    return run


def results_of(launch: Launch, folder: Path) -> Any:
    """Return the written results after checking that a table of them was printed."""
    assert set(launch.exit_codes.values()) == {0}, launch.output()
    results = json.loads((folder / "evaluation.json").read_text())
    rows = [line.split() for line in launch.output().splitlines()]
    assert ["loss", "perplexity", "bits", "per", "byte", "tokens"] in rows
    shown = ["all", f"{results['loss']:.4f}", f"{results['perplexity']:,.2f}"]
    assert [*shown, f"{results['bits_per_byte']:.4f}", f"{results['targets']:,}"] in rows
    assert f"\nResults: {folder / 'evaluation.json'}\n" in launch.output()
    return results


def test_loss_equals_validation_loss_for_any_mesh_batch_size_and_format(
    checkpoint: Path, exported: Path, evaluate: Evaluate
) -> None:
    trained = read_metrics(checkpoint.parent.parent)[-1]["val_loss"]
    shards = json.loads((checkpoint / "manifest.json").read_text())["config"]["data"]["folder"]
    other_format = [f"evaluation.data={shards}"]
    variants: list[tuple[Path, list[str], int]] = [
        (checkpoint, [], 1),
        (checkpoint, ["evaluation.micro_batch_size=3"], 1),
        (checkpoint, ["parallel.tp=2"], 2),
        (checkpoint, ["parallel.dp_shard=2", "evaluation.micro_batch_size=2"], 2),
        (exported, other_format, 1),
    ]
    found = []
    for folder, overrides, ranks in variants:
        launch = evaluate(folder, "evaluation.samples=9", *overrides, ranks=ranks)
        results = results_of(launch, folder)
        # Batches and meshes change the summation order: a few float32 roundings.
        assert results["loss"] == pytest.approx(trained, rel=1e-6)
        assert results["perplexity"] == pytest.approx(math.exp(results["loss"]))
        found.append(results)
    first = found[0]
    hashes = {results["weights_hash"] for results in found}
    assert hashes == {fingerprint(open_weights(checkpoint))}
    assert [first["format"], first["step"], found[-1]["format"]] == ["native", 10, "hf"]
    assert first["precision"] == "float32"
    assert first["versions"].keys() == {"torch", "llamesh"}
    # The sources add up to the total, in targets and in nats.
    sources = first["sources"]
    assert sources.keys() == {"text", "again"}
    assert sum(source["targets"] for source in sources.values()) == first["targets"]
    nats = sum(source["loss"] * source["targets"] for source in sources.values())
    assert nats == pytest.approx(first["loss"] * first["targets"])
    assert sources["text"]["loss"] != sources["again"]["loss"]
    for metrics in (first, *sources.values()):
        # Every target is one byte, except end-of-text tokens, which have no bytes.
        assert metrics["bytes"] <= metrics["targets"] < 1.05 * metrics["bytes"]
        bits = metrics["loss"] * metrics["targets"] / math.log(2)
        assert metrics["bits_per_byte"] == pytest.approx(bits / metrics["bytes"], rel=1e-12)


def test_invalid_input_is_rejected_with_a_remedy(
    checkpoint: Path, exported: Path, evaluate: Evaluate, tmp_path: Path
) -> None:
    def error_of(folder: Path, *overrides: str, ranks: int = 1) -> str:
        launch = evaluate(folder, *overrides, ranks=ranks)
        assert 1 in launch.exit_codes.values() and 0 not in launch.exit_codes.values(), (
            launch.output()
        )
        assert launch.output().startswith(("Invalid configuration:", "Error: "))
        assert "Traceback" not in launch.output()
        return launch.output()

    assert "is not a folder; use a run folder" in error_of(tmp_path / "step-00000001")
    mesh = error_of(checkpoint, "parallel.tp=3", ranks=3)
    assert "parallel.tp=3 does not divide model.n_heads=4; use 1, 2 or 4" in mesh
    assert "set evaluation.data to a prepared dataset" in error_of(exported)
    long = error_of(checkpoint, "evaluation.seq_len=1000000")
    assert "contains no held-out window of 1000000 tokens" in long
    numbers = error_of(checkpoint, "evaluation.samples=0", "limit=0", "num_fewshot=-1")
    assert "evaluation.samples=0 is below 1" in numbers
    assert "limit=0 is below 1" in numbers and "num_fewshot=-1 is below 0" in numbers
    assert "cannot be written" in error_of(
        checkpoint, "evaluation.samples=1", f"evaluation.output={tmp_path / 'none' / 'e.json'}"
    )


def test_output_is_checked_before_the_evaluation(tmp_path: Path) -> None:
    assert output_file(None, tmp_path) == tmp_path / "evaluation.json"
    for path, reason in ((tmp_path, "it is a folder"), (tmp_path / "x" / "e.json", "not a folder")):
        with pytest.raises(FormatError, match=f"{reason}.*; set evaluation.output to a file"):
            output_file(str(path), tmp_path)


def test_damage_is_reported_once_by_several_processes(checkpoint: Path, evaluate: Evaluate) -> None:
    content = (checkpoint / "manifest.json").read_bytes()
    (checkpoint / "manifest.json").write_bytes(content + b"\n")
    try:
        launch = evaluate(checkpoint, "parallel.tp=2", ranks=2)
    finally:
        (checkpoint / "manifest.json").write_bytes(content)
    assert 1 in launch.exit_codes.values()
    output = launch.output(0) + launch.output(1)
    assert output.count("the SHA-256 of manifest.json differs") == 1
    assert "Traceback" not in output


def test_local_task_scores_equal_lm_evals_hf_model(
    exported: Path, evaluate: Evaluate, tmp_path: Path
) -> None:
    """Multiple choice and perplexity, on two tensor-parallel processes."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager
    from transformers import AutoModelForCausalLM, AutoTokenizer

    write_tasks(tmp_path)
    launch = evaluate(
        exported,
        *("tasks=[choice,text]", f"task_folder={tmp_path}", "parallel.tp=2"),
        "evaluation.micro_batch_size=3",
        ranks=2,
    )
    assert launch.exit_codes == {0: 0, 1: 0}, launch.output()
    results = json.loads((exported / "evaluation.json").read_text())
    assert "loss" not in results  # no held-out text was configured
    assert re.search(r"^choice  acc +0\.\d{4} +0\.\d{4}$", launch.output(), re.MULTILINE)
    assert results["versions"].keys() == {"torch", "llamesh", "lm_eval"}
    theirs = HFLM(
        pretrained=AutoModelForCausalLM.from_pretrained(exported),
        tokenizer=AutoTokenizer.from_pretrained(exported),
    )
    expected: Any = simple_evaluate(
        model=theirs,
        tasks=["choice", "text"],
        task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False),
    )
    results = results["tasks"]["results"]
    for task, metrics in (("choice", ["acc", "acc_norm"]), ("text", ["word_perplexity"])):
        for metric in metrics:
            score = expected["results"][task][f"{metric},none"]
            assert results[task][f"{metric},none"] == pytest.approx(score, rel=1e-5)
    assert 0 < results["choice"]["acc,none"] < 1


def write_tasks(folder: Path) -> None:
    """Write a multiple-choice task and a perplexity task with their data."""
    questions = [
        {"q": text, "options": ["self", " return", "zq"], "gold": index % 3}
        for index, text in enumerate(["def f(", "    ", "import ", "class A", "x =", "#", "if a:"])
    ]
    texts = [{"text": "import json\n\n\ndef f(x):\n    return x\n" * n} for n in (1, 2, 5)]
    common = {"dataset_path": "json", "test_split": "test", "metadata": {"version": 1.0}}
    tasks: dict[str, tuple[list[dict[str, Any]], dict[str, Any]]] = {
        "choice": (
            questions,
            {
                "output_type": "multiple_choice",
                "doc_to_text": "{{q}}",
                "doc_to_choice": "{{options}}",
                "doc_to_target": "{{gold}}",
                "metric_list": [{"metric": name} for name in ("acc", "acc_norm")],
            },
        ),
        "text": (
            texts,
            {
                "output_type": "loglikelihood_rolling",
                "doc_to_text": "",
                "doc_to_target": "{{text}}",
                "metric_list": [{"metric": "word_perplexity"}],
            },
        ),
    }
    for name, (samples, task) in tasks.items():
        data = folder / f"{name}.jsonl"
        data.write_text("\n".join(json.dumps(sample) for sample in samples))
        files = {"data_files": {"test": str(data)}, "cache_dir": str(folder / "cache")}
        content = {"task": name, "dataset_kwargs": files, **common, **task}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(content))
