"""`evaluate.py`: the run's own figure on any mesh, of any format, by source, and benchmarks."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import read_metrics
from fork_server import ForkServer, Launch

from data.config import TokenizerConfig
from data.tokenizer import ready_tokenizer
from formats.conversion import convert
from formats.recognition import open_weights
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
    """The last checkpoint of ten steps on text and, a second source, a part of it."""
    place = tmp_path_factory.mktemp("evaluate")
    run = place / "run"
    sources = [
        *TWO_SOURCES,
        f"data.sources.again.path={corpus}/email-*.txt",
        f"data.folder={place / 'shards'}",
        "data.validation_fraction=0.4",
        "data.name=two",
    ]
    steps = ["train.max_steps=10", "checkpoint.interval=null", "validation.samples=9"]
    start = fork_server.run(train_arguments(run, *sources, *steps), 1)
    assert start.exit_codes == {0: 0}, start.output()
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
    """`evaluate(folder, "key=value", …, ranks=2)` runs the program to its end."""

    def run(folder: Path, *overrides: str, ranks: int = 1) -> Launch:
        named = [f"evaluation.checkpoint={folder}", "parallel.accelerator=cpu"]
        return fork_server.run([*named, *overrides], ranks, program="evaluate.py")

    return run


def figures_of(start: Launch, folder: Path) -> Any:
    """What was printed, which is what was written."""
    assert set(start.exit_codes.values()) == {0}, start.output()
    figures = json.loads((folder / "evaluation.json").read_text())
    assert start.output().endswith(json.dumps(figures, indent=1) + "\n")
    return figures


def test_loss_is_the_runs_own_and_no_mesh_batch_size_or_format_changes_it(
    checkpoint: Path, exported: Path, evaluate: Evaluate
) -> None:
    trained = read_metrics(checkpoint.parent.parent)[-1]["val_loss"]
    shards = json.loads((checkpoint / "manifest.json").read_text())["config"]["data"]["folder"]
    foreign = [f"evaluation.data={shards}", "evaluation.seq_len=64"]
    variants: list[tuple[Path, list[str], int]] = [
        (checkpoint, [], 1),
        (checkpoint, ["evaluation.micro_batch_size=3"], 1),
        (checkpoint, ["parallel.tp=2"], 2),
        (checkpoint, ["parallel.dp_shard=2", "evaluation.micro_batch_size=2"], 2),
        (exported, foreign, 1),
    ]
    found = []
    for folder, overrides, ranks in variants:
        start = evaluate(folder, "evaluation.samples=9", *overrides, ranks=ranks)
        figures = figures_of(start, folder)
        # Other cuts and meshes sum in another order: a few roundings of float32.
        assert figures["loss"] == pytest.approx(trained, rel=1e-6)
        assert figures["perplexity"] == pytest.approx(math.exp(figures["loss"]))
        found.append(figures)
    whole = found[0]
    hashes = {figures["weights_hash"] for figures in found}
    assert hashes == {fingerprint(open_weights(checkpoint))}
    assert [whole["format"], whole["step"], found[-1]["format"]] == ["native", 10, "hf"]
    assert whole["precision"] == "float32"
    assert whole["versions"].keys() == {"torch", "llamesh"}
    # By source: together they are the whole, in targets and in nats.
    sources = whole["sources"]
    assert sources.keys() == {"text", "again"}
    assert sum(of["targets"] for of in sources.values()) == whole["targets"]
    nats = sum(of["loss"] * of["targets"] for of in sources.values())
    assert nats == pytest.approx(whole["loss"] * whole["targets"])
    assert sources["text"]["loss"] != sources["again"]["loss"]
    for of in (whole, *sources.values()):
        # One token is one byte, but for the end of a document, which is predicted and has none.
        assert of["bytes"] <= of["targets"] < 1.05 * of["bytes"]
        bits = of["loss"] * of["targets"] / math.log(2)
        assert of["bits_per_byte"] == pytest.approx(bits / of["bytes"], rel=1e-12)  # float64


def test_bad_input_is_refused_with_a_remedy(
    checkpoint: Path, exported: Path, evaluate: Evaluate, tmp_path: Path
) -> None:
    def refused(folder: Path, *overrides: str, ranks: int = 1) -> str:
        start = evaluate(folder, *overrides, ranks=ranks)
        assert 1 in start.exit_codes.values() and 0 not in start.exit_codes.values(), start.output()
        assert start.output().startswith("Not evaluated") and "Traceback" not in start.output()
        return start.output()

    assert "is no folder: name one with weights" in refused(tmp_path / "step-00000001")
    mesh = refused(checkpoint, "parallel.tp=3", ranks=3)
    assert "parallel.tp (3) does not divide model.n_heads (4): use 1, 2 or 4" in mesh
    assert "set evaluation.data to a prepared folder" in refused(exported)
    long = refused(checkpoint, "evaluation.seq_len=1000000")
    assert "holds no held-out window of 1000000 tokens" in long
    numbers = refused(checkpoint, "evaluation.samples=0", "limit=0", "num_fewshot=-1")
    assert "evaluation.samples (0) is below 1" in numbers
    assert "limit (0) is below 1" in numbers and "num_fewshot (-1) is below 0" in numbers
    assert "cannot be written" in refused(
        checkpoint, "evaluation.samples=1", f"evaluation.output={tmp_path / 'none' / 'e.json'}"
    )


def test_damage_is_told_once_whatever_the_number_of_processes(
    checkpoint: Path, evaluate: Evaluate
) -> None:
    whole = (checkpoint / "manifest.json").read_bytes()
    (checkpoint / "manifest.json").write_bytes(whole + b"\n")
    try:
        start = evaluate(checkpoint, "parallel.tp=2", ranks=2)
    finally:
        (checkpoint / "manifest.json").write_bytes(whole)
    assert 1 in start.exit_codes.values()
    told = start.output(0) + start.output(1)
    assert told.count("manifest.json has another SHA-256") == 1
    assert "Traceback" not in told


def test_scores_of_local_tasks_are_those_of_lm_evals_own_hf_model(
    exported: Path, evaluate: Evaluate, tmp_path: Path
) -> None:
    """Of multiple choice and of perplexity, on two processes that share the model."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager
    from transformers import AutoModelForCausalLM, AutoTokenizer

    write_tasks(tmp_path)
    start = evaluate(
        exported,
        *("tasks=[choice,text]", f"task_folder={tmp_path}", "parallel.tp=2"),
        "evaluation.micro_batch_size=3",
        ranks=2,
    )
    assert start.exit_codes == {0: 0, 1: 0}, start.output()
    figures = json.loads((exported / "evaluation.json").read_text())
    assert "loss" not in figures  # of no held-out text, as none was named
    assert figures["versions"].keys() == {"torch", "llamesh", "lm_eval"}
    theirs = HFLM(
        pretrained=AutoModelForCausalLM.from_pretrained(exported),
        tokenizer=AutoTokenizer.from_pretrained(exported),
    )
    expected: Any = simple_evaluate(
        model=theirs,
        tasks=["choice", "text"],
        task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False),
    )
    results = figures["tasks"]["results"]
    for task, metrics in (("choice", ["acc", "acc_norm"]), ("text", ["word_perplexity"])):
        for metric in metrics:
            score = expected["results"][task][f"{metric},none"]
            assert results[task][f"{metric},none"] == pytest.approx(score, rel=1e-5)
    assert 0 < results["choice"]["acc,none"] < 1


def write_tasks(folder: Path) -> None:
    """A task of multiple choice and one of perplexity, with their data."""
    questions = [
        {"q": text, "options": ["self", " return", "zq"], "gold": place % 3}
        for place, text in enumerate(["def f(", "    ", "import ", "class A", "x =", "#", "if a:"])
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
        whole = {"task": name, "dataset_kwargs": files, **common, **task}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(whole))
