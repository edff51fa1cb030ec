"""Benchmarks: lm-eval's scores of a model here are those of its own `hf` model on the export.

The tasks are files of the test's own, the models small twins with weights of one size, so that
answers differ by much more than rounding. Nothing may leave the machine.
"""

import dataclasses
import json
import re
import socket
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lm_eval.api.instance import Instance
from lm_eval.models.utils import postprocess_generated_text as cut_at_stops
from model_configs import FILES
from reference_models import paired_models, scaled_down
from torch import nn
from transformers import AutoTokenizer, LlamaForCausalLM

from data.tokenizer import Tokenizer, train_bpe
from evaluation import harness
from evaluation.errors import TaskError
from evaluation.harness import run_tasks, task_errors
from evaluation.language_model import LlameshModel
from formats.tokenizers import stop_ids, write_hugging_face
from model.llama import Llama

CPU = torch.device("cpu")
CONTEXT = 96
TASKS = ["toy_choice", "toy_text", "toy_answer"]
# Texts with all that encoding is particular about: spaces at the seam, an empty context, a name of
# a special token, characters of several bytes, and more tokens than the context has.
QUESTIONS = [
    ("The sky is", ["blue", "made of green cheese", "blue"[::-1], "b"], 0),
    ("Two and two make ", ["four", " five", "4"], 0),
    ("", ["Once upon a time", "xq"], 1),
    ("ein Bär läuft über", [" die Straße", " – 😀", " die Straßen"], 2),
    ("some words " * 60, ["end", "start of another"], 1),
    ("<|begin_of_text|>In the beginning", [" was", " were <|end_of_text|>"], 0),
]
TEXTS = ["A short text.", "naïve – 😀\n\n", "A long text of many words. " * 30, "x"]
PROMPTS = ["def add(a, b):", "Once upon", "", "long ago " * 50, "Liste: ä,"]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_bpe([*TEXTS, *PROMPTS, *(text for text, _, _ in QUESTIONS), __doc__ or ""], 320)


@pytest.fixture(scope="module")
def models(tokenizer: Tokenizer) -> tuple[Llama, LlamaForCausalLM]:
    config = scaled_down(next(path for path in FILES if path.stem == "llama3_2_1b"))
    return paired_models(
        dataclasses.replace(config, vocab_size=tokenizer.vocab_size, max_seq_len=CONTEXT)
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three task files, and what they ask."""
    folder = tmp_path_factory.mktemp("tasks")
    kinds: dict[str, tuple[list[dict[str, Any]], dict[str, Any]]] = {
        "toy_choice": (
            [{"q": text, "options": options, "gold": gold} for text, options, gold in QUESTIONS],
            {
                "output_type": "multiple_choice",
                "doc_to_text": "{{q}}",
                "doc_to_choice": "{{options}}",
                "doc_to_target": "{{gold}}",
                "target_delimiter": "",
                "metric_list": [{"metric": name} for name in ("acc", "acc_norm")],
            },
        ),
        "toy_text": (
            [{"text": text} for text in TEXTS],
            {
                "output_type": "loglikelihood_rolling",
                "doc_to_text": "",
                "doc_to_target": "{{text}}",
                "metric_list": [{"metric": name} for name in ("word_perplexity", "bits_per_byte")],
            },
        ),
        "toy_answer": (
            [{"prompt": text, "answer": "x"} for text in PROMPTS],
            {
                "output_type": "generate_until",
                "doc_to_text": "{{prompt}}",
                "doc_to_target": "{{answer}}",
                "generation_kwargs": {"until": ["a", "ß"], "max_gen_toks": 16, "do_sample": False},
                "metric_list": [{"metric": "exact_match"}],
            },
        ),
    }
    for name, (samples, task) in kinds.items():
        lines = [json.dumps(sample) for sample in samples]
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
        files = {
            "task": name,
            "dataset_path": "json",
            "dataset_kwargs": {
                "data_files": {"test": str(folder / f"{name}.jsonl")},
                "cache_dir": str(folder / "cache"),
            },
            "test_split": "test",
            "metadata": {"version": 1.0},
        }
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({**files, **task}))
    return folder


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever looks for another machine fails."""

    def refused(*arguments: Any) -> None:
        raise AssertionError(f"a connection to {arguments}")

    monkeypatch.setattr(socket.socket, "connect", refused)
    monkeypatch.setattr(socket, "getaddrinfo", refused)


@pytest.fixture(scope="module")
def theirs(
    models: tuple[Llama, LlamaForCausalLM],
    tokenizer: Tokenizer,
    tmp_path_factory: pytest.TempPathFactory,
) -> Any:
    """lm-eval's own model of the twin and of the exported tokenizer, one request at a time."""
    from lm_eval.models.huggingface import HFLM

    folder = tmp_path_factory.mktemp("exported")
    write_hugging_face(tokenizer, folder, CONTEXT)
    models[1].generation_config.eos_token_id = stop_ids(tokenizer)
    loaded = AutoTokenizer.from_pretrained(folder)
    return HFLM(pretrained=models[1], tokenizer=loaded, batch_size=1)


def ours(model: nn.Module, tokenizer: Tokenizer, **changed: Any) -> LlameshModel:
    options = {"device": CPU, "batch_size": 4, "stop": stop_ids(tokenizer), **changed}
    return LlameshModel(model, tokenizer, **options)


def requests(kind: str, arguments: Sequence[tuple[Any, ...]]) -> list[Instance]:
    return [Instance(kind, {}, each, i) for i, each in enumerate(arguments)]


PAIRS = requests("loglikelihood", [(q, each) for q, options, _ in QUESTIONS for each in options])
ROLLING = requests("loglikelihood_rolling", [(text,) for text in TEXTS])
WISHES = [
    {"until": ["a", "ß"], "max_gen_toks": 16, "do_sample": False},
    {"until": "\n\n", "max_gen_toks": 40, "temperature": 0.0},
]
GENERATE = requests("generate_until", [(text, wish) for wish in WISHES for text in PROMPTS])
SAMPLED = requests(
    "generate_until",
    [(text, {"max_gen_toks": 12, "do_sample": True, "temperature": 1.0}) for text in PROMPTS * 2],
)


def numbers(answers: list[tuple[float, bool]]) -> list[float]:
    return [value for value, _ in answers]


# ---------------------------------------------------------------- against lm-eval's own


def test_there_are_texts_that_the_context_does_not_hold(tokenizer: Tokenizer) -> None:
    for texts in ([text for text, _, _ in QUESTIONS], TEXTS, PROMPTS):
        assert max(len(tokenizer.encode(text)) for text in texts) > CONTEXT + 1


def test_answers_equal_those_of_the_hf_model(
    models: tuple[Llama, LlamaForCausalLM], tokenizer: Tokenizer, theirs: Any
) -> None:
    """Log-probabilities to the rounding of float32: sums of up to a few hundred nats."""
    lm = ours(models[0], tokenizer)
    expected, found = theirs.loglikelihood(PAIRS), lm.loglikelihood(PAIRS)
    assert numbers(found) == pytest.approx(numbers(expected), rel=1e-5)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    expected = theirs.loglikelihood_rolling(ROLLING)
    assert lm.loglikelihood_rolling(ROLLING) == pytest.approx(expected, rel=1e-5)
    texts = lm.generate_until(GENERATE)
    assert texts == theirs.generate_until(GENERATE)
    assert len(set(texts)) > 5


def test_greedy_continuations_are_told_as_such(
    models: tuple[Llama, LlamaForCausalLM], tokenizer: Tokenizer, theirs: Any
) -> None:
    """What the model itself continues with, and the same with another last token."""
    llama, context = models[0], [tokenizer.bos_id, 65, 66]
    greedy = list(context)
    with torch.no_grad():
        for _ in range(5):
            greedy.append(int(llama(torch.tensor([greedy]))[0, -1].argmax()))
    right = greedy[len(context) :]
    wrong = [*right[:-1], (right[-1] + 1) % tokenizer.vocab_size]
    asked = [(None, context, each) for each in (right, wrong, right[:1])]
    found = ours(llama, tokenizer)._loglikelihood_tokens(asked)
    assert [greedy for _, greedy in found] == [True, False, True]
    assert numbers(found) == pytest.approx(numbers(theirs._loglikelihood_tokens(asked)), rel=1e-5)


def test_scores_of_tasks_equal_those_of_the_hf_model(
    models: tuple[Llama, LlamaForCausalLM], tokenizer: Tokenizer, theirs: Any, folder: Path
) -> None:
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    expected = simple_evaluate(
        model=theirs,
        tasks=TASKS,
        num_fewshot=1,
        limit=5,
        task_manager=TaskManager(include_path=str(folder), include_defaults=False),
    )
    lm = ours(models[0], tokenizer)
    found = run_tasks(lm, TASKS, folder=str(folder), num_fewshot=1, limit=5)
    assert found["results"].keys() == set(TASKS)
    for task in TASKS:
        scores = {
            name: pytest.approx(score, rel=1e-5) if isinstance(score, float) else score
            for name, score in expected["results"][task].items()
        }
        assert found["results"][task] == scores
    for key in ("versions", "n-shot", "n-samples"):
        assert found[key] == expected[key]
    assert 0 < found["results"]["toy_choice"]["acc,none"] < 1
    assert found["results"]["toy_choice"]["acc_stderr,none"] > 0
    json.dumps(found)


# ---------------------------------------------------------------- batches and ranks


class Shared(Exception):
    """Carries what a data rank would have gathered."""


def on_data_ranks(size: int, ask: Callable[..., Any]) -> Any:
    """What the first of several data ranks answers; the others come first, one by one."""

    def caught(own: list[Any]) -> list[list[Any]]:
        raise Shared(own)

    shares = []
    for rank in range(1, size):
        with pytest.raises(Shared) as share:
            ask(data_rank=rank, data_size=size, gather=caught)
        shares.append(share.value.args[0])
    return ask(data_rank=0, data_size=size, gather=lambda own: [own, *shares])


@pytest.mark.parametrize("kind", ["pairs", "rolling", "greedy", "sampled"])
def test_neither_batch_size_nor_data_ranks_change_an_answer(
    models: tuple[Llama, LlamaForCausalLM], tokenizer: Tokenizer, kind: str
) -> None:
    """Texts exactly, also drawn ones; numbers to float32's rounding, which shapes decide."""

    def ask(**options: Any) -> list[Any]:
        lm = ours(models[0], tokenizer, **options)
        if kind == "pairs":
            return numbers(lm.loglikelihood(PAIRS))
        if kind == "rolling":
            return lm.loglikelihood_rolling(ROLLING)
        return lm.generate_until(GENERATE if kind == "greedy" else SAMPLED)

    expected: Any = ask(batch_size=1)
    assert len(set(expected)) > len(expected) // 2
    if kind in ("pairs", "rolling"):
        expected = pytest.approx(expected, rel=1e-5)
        assert ask(multiple_of=7) == expected
    assert ask(batch_size=7) == expected
    assert on_data_ranks(2, lambda **options: ask(batch_size=3, **options)) == expected
    assert on_data_ranks(5, lambda **options: ask(batch_size=4, **options)) == expected


def test_data_ranks_make_as_many_forwards(
    models: tuple[Llama, LlamaForCausalLM], tokenizer: Tokenizer
) -> None:
    """Of 5 rows in batches of 2, two ranks have one and a half each."""
    calls = [0, 0]
    asked = [(None, [1] * n, [2]) for n in range(1, 6)]

    def ask(data_rank: int, **options: Any) -> None:
        def count(*_: Any) -> None:
            calls[data_rank] += 1

        handle = models[0].register_forward_pre_hook(count)
        try:
            lm = ours(models[0], tokenizer, batch_size=2, data_rank=data_rank, **options)
            lm._loglikelihood_tokens(asked)
        finally:
            handle.remove()

    on_data_ranks(2, ask)
    assert calls == [2, 2]


def test_a_batch_ends_when_its_texts_have_come_to_a_stop(
    models: tuple[Llama, LlamaForCausalLM], tokenizer: Tokenizer
) -> None:
    """At the first two letters of each, also where they are of two tokens."""
    lm = ours(models[0], tokenizer)

    def ask(*stops: str) -> list[str]:
        wish = {"until": list(stops), "max_gen_toks": 40}
        return lm.generate_until(requests("generate_until", [(text, wish) for text in PROMPTS]))

    free, shapes = ask(), list[tuple[int, ...]]()
    pairs = [re.search("[a-zA-Z]{2}", text) for text in free]
    stops = sorted({pair.group() for pair in pairs if pair is not None})
    expected = [cut_at_stops(text, stops, None) for text in free]
    assert all(len(text) < 20 for text in expected)
    handle = models[0].register_forward_pre_hook(lambda _, inputs: shapes.append(inputs[0].shape))
    try:
        assert ask(*stops) == expected
    finally:
        handle.remove()
    assert len(shapes) < 2 * 25


def test_processes_but_the_first_print_nothing(
    models: tuple[Llama, LlamaForCausalLM],
    tokenizer: Tokenizer,
    folder: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    first = run_tasks(ours(models[0], tokenizer), TASKS, folder=str(folder))
    assert "loglikelihood, batches" in capfd.readouterr().err
    other = run_tasks(ours(models[0], tokenizer, is_first=False), TASKS, folder=str(folder))
    assert capfd.readouterr() == ("", "")
    for task, scores in first["results"].items():
        for name, score in scores.items():
            assert "stderr" in name or other["results"][task][name] == score


def test_answers_that_differ_in_their_last_token_cost_one_row_and_no_column_more(
    models: tuple[Llama, LlamaForCausalLM], tokenizer: Tokenizer
) -> None:
    llama, shapes = models[0], []
    handle = llama.register_forward_pre_hook(
        lambda _, inputs: shapes.append((tuple(inputs[0].shape), inputs[2].shape[1]))
    )
    try:
        ours(llama, tokenizer)._loglikelihood_tokens([(None, [1] * 9, [n]) for n in range(4)])
    finally:
        handle.remove()
    assert shapes == [((1, 9), 4)]


# ---------------------------------------------------------------- what is refused


def test_unknown_tasks_are_refused_with_near_names(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without lm-eval's own 14,000 tasks, which take seconds to list."""
    index = harness._index.__wrapped__
    monkeypatch.setattr(harness, "_index", lambda folder, include_defaults: index(folder, False))
    assert task_errors([*TASKS, "toy_*", str(folder / "toy_text.yaml")], str(folder)) == []
    (problem,) = task_errors(["toy_choise"], str(folder))
    assert "tasks (toy_choise) is neither" in problem and "use toy_choice" in problem
    (problem,) = task_errors(TASKS, str(tmp_path / "none"))
    assert problem.startswith("task_folder (") and "is not a folder" in problem


def test_without_lm_eval_the_message_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    (problem,) = task_errors(["hellaswag"], None)
    assert "pip install '.[lm-eval]'" in problem


@pytest.mark.parametrize(
    ("wish", "message"),
    [
        ({"max_gen_toks": CONTEXT}, "leaves no room for a prompt"),
        ({"max_gen_toks": 4, "num_beams": 10}, "num_beams"),
        ({"max_gen_toks": 4, "penalty_alpha": 0.6}, "penalty_alpha"),
    ],
)
def test_what_a_task_cannot_have_is_told(
    models: tuple[Llama, LlamaForCausalLM],
    tokenizer: Tokenizer,
    wish: dict[str, Any],
    message: str,
) -> None:
    with pytest.raises(TaskError, match=message):
        ours(models[0], tokenizer).generate_until(requests("generate_until", [("a", wish)]))
    with pytest.raises(TaskError, match="leave it out"):
        ours(models[0], tokenizer)._loglikelihood_tokens([(None, [1], [2] * (CONTEXT + 1))])


def test_a_task_whose_data_is_missing_is_told(
    models: tuple[Llama, LlamaForCausalLM], tokenizer: Tokenizer, folder: Path, tmp_path: Path
) -> None:
    text = (folder / "toy_text.yaml").read_text()
    (tmp_path / "lost.yaml").write_text(text.replace("toy_text.jsonl", "lost.jsonl"))
    with pytest.raises(TaskError, match=r"tasks \(toy_text\) cannot be loaded"):
        run_tasks(ours(models[0], tokenizer), ["toy_text"], folder=str(tmp_path))
