"""Benchmarks: scores equal those of lm-eval's own `hf` model on the exported weights.

Tasks are local files and models are small pairs with weights of equal scale, so that answers differ
by much more than rounding. Network access fails the tests.
"""

import copy
import dataclasses
import importlib
import json
import re
import socket
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from conftest import ROOT
from lm_eval.api.instance import Instance
from lm_eval.models.utils import postprocess_generated_text as cut_at_stops
from model_configs import FILES
from reference_models import paired_models, scaled_down
from transformers import AutoTokenizer, LlamaForCausalLM

from data.tokenizer import Tokenizer, train_bpe
from evaluation import lm_eval_model, lm_eval_tasks
from evaluation.errors import TaskError
from evaluation.generation import GenerationSync
from evaluation.lm_eval_model import LlameshLM
from evaluation.lm_eval_tasks import TaskOptions, run_tasks, task_errors
from evaluation.third_party import third_party_imports
from formats.instruct import ChatTemplate
from formats.tokenizers import stop_token_ids, write_hugging_face
from model.llama import Llama

CPU = torch.device("cpu")
CONTEXT = 96
TASKS = ["toy_choice", "toy_text", "toy_answer"]
# Special cases of encoding: spaces at the boundary of a pair, an empty context, names of special
# tokens, multi-byte characters, and more tokens than the context length.
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
    """A folder with three task files and their data."""
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
    """Make network connections fail."""

    def fail(*arguments: Any) -> None:
        raise AssertionError(f"network connection to {arguments}")

    monkeypatch.setattr(socket.socket, "connect", fail)
    monkeypatch.setattr(socket, "getaddrinfo", fail)


@pytest.fixture(scope="module")
def theirs(
    models: tuple[Llama, LlamaForCausalLM],
    tokenizer: Tokenizer,
    tmp_path_factory: pytest.TempPathFactory,
) -> Any:
    """lm-eval's own model with the same weights and the exported tokenizer, with batch size 1."""
    from lm_eval.models.huggingface import HFLM

    folder = tmp_path_factory.mktemp("exported")
    write_hugging_face(tokenizer, folder, CONTEXT)
    models[1].generation_config.eos_token_id = stop_token_ids(tokenizer)
    loaded = AutoTokenizer.from_pretrained(folder)
    return HFLM(pretrained=models[1], tokenizer=loaded, batch_size=1)


def ours(
    model: Llama,
    tokenizer: Tokenizer,
    batch_size: int = 4,
    data_rank: int = 0,
    data_size: int = 1,
    is_first: bool = True,
    template: ChatTemplate | None = None,
) -> LlameshLM:
    context: Any = SimpleNamespace(
        fabric=SimpleNamespace(device=CPU, is_global_zero=is_first),
        mesh=SimpleNamespace(dp=data_size, ranks_per_sample=1),
        weights=SimpleNamespace(model=model.config, folder=Path("none")),
        **{"llama": model, "model": model, "data_rank": data_rank, "sync": GenerationSync()},
    )
    return LlameshLM(context, tokenizer, batch_size, template)


def scores_of(lm: LlameshLM, tasks: list[str], options: TaskOptions) -> dict[str, Any]:
    """Return the scores of tasks without an error."""
    found = run_tasks(lm, tasks, options)
    assert found.errors == {}
    return found.scores


def requests(kind: str, arguments: Sequence[tuple[Any, ...]]) -> list[Instance]:
    return [Instance(kind, {}, each, i) for i, each in enumerate(arguments)]


PAIRS = requests("loglikelihood", [(q, each) for q, options, _ in QUESTIONS for each in options])
ROLLING = requests("loglikelihood_rolling", [(text,) for text in TEXTS])
GENERATION_KWARGS = [
    {"until": ["a", "ß"], "max_gen_toks": 16, "do_sample": False},
    {"until": "\n\n", "max_gen_toks": 40, "temperature": 0.0},
]
GENERATE = requests(
    "generate_until", [(text, kwargs) for kwargs in GENERATION_KWARGS for text in PROMPTS]
)
SAMPLED = requests(
    "generate_until",
    [(text, {"max_gen_toks": 12, "do_sample": True, "temperature": 1.0}) for text in PROMPTS * 2],
)


def numbers(answers: list[tuple[float, bool]]) -> list[float]:
    return [value for value, _ in answers]


# ---------------------------------------------------------------- parity with lm-eval's hf model


def test_some_texts_exceed_the_context_length(tokenizer: Tokenizer) -> None:
    for texts in ([text for text, _, _ in QUESTIONS], TEXTS, PROMPTS):
        assert max(len(tokenizer.encode(text)) for text in texts) > CONTEXT + 1


def test_answers_equal_the_hf_model(
    models: tuple[Llama, LlamaForCausalLM], tokenizer: Tokenizer, theirs: Any
) -> None:
    """Log-probabilities are sums of up to a few hundred nats: tolerance is float32 rounding."""
    lm = ours(models[0], tokenizer)
    expected, found = theirs.loglikelihood(PAIRS), lm.loglikelihood(PAIRS)
    assert numbers(found) == pytest.approx(numbers(expected), rel=1e-5)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    expected = theirs.loglikelihood_rolling(ROLLING)
    assert lm.loglikelihood_rolling(ROLLING) == pytest.approx(expected, rel=1e-5)
    texts = lm.generate_until(GENERATE)
    assert texts == theirs.generate_until(GENERATE)
    assert len(set(texts)) > 5


def test_greedy_continuations_are_marked(
    models: tuple[Llama, LlamaForCausalLM], tokenizer: Tokenizer, theirs: Any
) -> None:
    """A greedy continuation, the same with another last token, and its first token."""
    llama, context = models[0], [tokenizer.bos_id, 65, 66]
    greedy = list(context)
    with torch.no_grad():
        for _ in range(5):
            greedy.append(int(llama(torch.tensor([greedy]))[0, -1].argmax()))
    right = greedy[len(context) :]
    wrong = [*right[:-1], (right[-1] + 1) % tokenizer.vocab_size]
    pairs = [(None, context, each) for each in (right, wrong, right[:1])]
    found = ours(llama, tokenizer)._loglikelihood_tokens(pairs)
    assert [greedy for _, greedy in found] == [True, False, True]
    assert numbers(found) == pytest.approx(numbers(theirs._loglikelihood_tokens(pairs)), rel=1e-5)


def test_task_scores_equal_the_hf_model(
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
    options = TaskOptions(folder=str(folder), num_fewshot=1, limit=5)
    found = scores_of(lm, TASKS, options)
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


class Gathered(Exception):
    """Carries the answers that a data rank passes to all_gather."""


OnDataRanks = Callable[[int, Callable[..., Any]], Any]


@pytest.fixture
def on_data_ranks(monkeypatch: pytest.MonkeyPatch) -> OnDataRanks:
    """Function that returns the answer of data rank 0 after running the other ones one by one."""

    def run(size: int, answer: Callable[..., Any]) -> Any:
        def capture(answers: list[Any]) -> list[list[Any]]:
            raise Gathered(answers)

        others = []
        monkeypatch.setattr(lm_eval_model, "all_gather", capture)
        for rank in range(1, size):
            with pytest.raises(Gathered) as gathered:
                answer(data_rank=rank, data_size=size)
            others.append(gathered.value.args[0])
        monkeypatch.setattr(lm_eval_model, "all_gather", lambda answers: [answers, *others])
        return answer(data_rank=0, data_size=size)

    return run


@pytest.mark.parametrize("kind", ["pairs", "rolling", "greedy", "sampled"])
def test_answers_do_not_depend_on_batch_size_or_data_ranks(
    models: tuple[Llama, LlamaForCausalLM],
    tokenizer: Tokenizer,
    kind: str,
    on_data_ranks: OnDataRanks,
) -> None:
    """Texts are equal, also sampled ones; numbers to float32 rounding, which depends on shapes."""

    def answer(**options: Any) -> list[Any]:
        lm = ours(models[0], tokenizer, **options)
        if kind == "pairs":
            return numbers(lm.loglikelihood(PAIRS))
        if kind == "rolling":
            return lm.loglikelihood_rolling(ROLLING)
        return lm.generate_until(GENERATE if kind == "greedy" else SAMPLED)

    expected: Any = answer(batch_size=1)
    assert len(set(expected)) > len(expected) // 2
    if kind in ("pairs", "rolling"):
        expected = pytest.approx(expected, rel=1e-5)
    assert answer(batch_size=7) == expected
    assert on_data_ranks(2, lambda **options: answer(batch_size=3, **options)) == expected
    assert on_data_ranks(5, lambda **options: answer(batch_size=4, **options)) == expected


def test_data_ranks_run_equally_many_forwards(
    models: tuple[Llama, LlamaForCausalLM], tokenizer: Tokenizer, on_data_ranks: OnDataRanks
) -> None:
    """5 rows in batches of 2 on two ranks: 2 forwards each, one of them empty."""
    calls = [0, 0]
    pairs = [(None, [1] * n, [2]) for n in range(1, 6)]

    def answer(data_rank: int, **options: Any) -> None:
        def count(*_: Any) -> None:
            calls[data_rank] += 1

        handle = models[0].register_forward_pre_hook(count)
        try:
            lm = ours(models[0], tokenizer, batch_size=2, data_rank=data_rank, **options)
            lm._loglikelihood_tokens(pairs)
        finally:
            handle.remove()

    on_data_ranks(2, answer)
    assert calls == [2, 2]


def test_batch_ends_when_all_texts_reach_a_stop_sequence(
    models: tuple[Llama, LlamaForCausalLM], tokenizer: Tokenizer
) -> None:
    """The stops are the first two letters of each text, which may span two tokens."""
    lm = ours(models[0], tokenizer)

    def answer(*stops: str) -> list[str]:
        kwargs = {"until": list(stops), "max_gen_toks": 40}
        return lm.generate_until(requests("generate_until", [(text, kwargs) for text in PROMPTS]))

    free, shapes = answer(), list[tuple[int, ...]]()
    pairs = [re.search("[a-zA-Z]{2}", text) for text in free]
    stops = sorted({pair.group() for pair in pairs if pair is not None})
    expected = [cut_at_stops(text, stops, None) for text in free]
    assert all(len(text) < 20 for text in expected)
    handle = models[0].register_forward_pre_hook(lambda _, inputs: shapes.append(inputs[0].shape))
    try:
        assert answer(*stops) == expected
    finally:
        handle.remove()
    assert len(shapes) < 2 * 25


def test_only_the_first_process_prints(
    models: tuple[Llama, LlamaForCausalLM],
    tokenizer: Tokenizer,
    folder: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    first = scores_of(ours(models[0], tokenizer), TASKS, TaskOptions(str(folder)))
    assert "loglikelihood, batches" in capfd.readouterr().err
    other = scores_of(ours(models[0], tokenizer, is_first=False), TASKS, TaskOptions(str(folder)))
    assert capfd.readouterr() == ("", "")
    for task, scores in first["results"].items():
        for name, score in scores.items():
            assert "stderr" in name or other["results"][task][name] == score


def test_continuations_that_differ_in_the_last_token_share_a_row(
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


# ---------------------------------------------------------------- rejected configurations


def test_unknown_task_is_rejected_with_similar_names(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Runs without lm-eval's own 14,000 tasks, which take seconds to index."""
    index = lm_eval_tasks._index.__wrapped__
    monkeypatch.setattr(lm_eval_tasks, "_index", lambda folder, _=None, **__: index(folder, False))
    assert not list(task_errors([*TASKS, "toy_*", str(folder / "toy_text.yaml")], str(folder)))
    (error,) = task_errors(["toy_choise"], str(folder))
    assert "tasks=toy_choise is not a task or group" in error and "use toy_choice" in error
    (error,) = task_errors(TASKS, str(tmp_path / "none"))
    assert error.startswith("task_folder=") and "is not a folder" in error
    (tmp_path / "broken.yaml").write_text("task: broken\n  bad: [\n")
    (error,) = task_errors(["broken"], str(tmp_path))
    assert f"tasks=broken is not defined by {tmp_path}/broken.yaml; correct its YAML" in error


def test_missing_lm_eval_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    (error,) = task_errors(["hellaswag"], None)
    assert "pip install '.[lm-eval]'" in error


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"max_gen_toks": CONTEXT}, "leaves no context for a prompt"),
        ({"max_gen_toks": 4, "num_beams": 10}, "num_beams"),
        ({"max_gen_toks": 4, "penalty_alpha": 0.6}, "penalty_alpha"),
    ],
)
def test_unsupported_task_options_are_rejected(
    models: tuple[Llama, LlamaForCausalLM],
    tokenizer: Tokenizer,
    kwargs: dict[str, Any],
    message: str,
) -> None:
    with pytest.raises(TaskError, match=message):
        ours(models[0], tokenizer).generate_until(requests("generate_until", [("a", kwargs)]))
    with pytest.raises(TaskError, match="remove the task"):
        ours(models[0], tokenizer)._loglikelihood_tokens([(None, [1], [2] * (CONTEXT + 1))])


# ---------------------------------------------------------------- errors of single tasks


def write_task(folder: Path, name: str, text: str, utils: str = "") -> None:
    """Write a changed copy of a task, whose `!function utils.…` may run other code."""
    (folder / f"{name}.yaml").write_text(text.replace("task: toy_choice", f"task: {name}"))
    (folder / "utils.py").write_text(
        utils or "def fail(*_):\n    raise ValueError('in the task')\n"
    )


def test_error_in_a_task_keeps_the_results_of_the_others(
    models: tuple[Llama, LlamaForCausalLM],
    tokenizer: Tokenizer,
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Data, prompts, results, a metric, an import and an empty answer; and a group of them."""
    index = lm_eval_tasks._index.__wrapped__  # without lm-eval's own 14,000 tasks
    monkeypatch.setattr(lm_eval_tasks, "_index", lambda folder, _=None, **__: index(folder, False))
    text = (folder / "toy_choice.yaml").read_text()
    question = "doc_to_text: '{{q}}'"
    assert question in text
    write_task(tmp_path, "good", text)
    write_task(tmp_path, "lost", text.replace("toy_choice.jsonl", "lost.jsonl"))
    write_task(tmp_path, "prompt", text.replace(question, "doc_to_text: !function utils.fail"))
    write_task(tmp_path, "results", text + "process_results: !function utils.fail\n")
    aggregation = "metric_list:\n- {metric: acc, aggregation: !function utils.fail}"
    write_task(
        tmp_path,
        "metric",
        re.sub(r"metric_list:(\n- .*)+", "metric_list: []", text).replace(
            "metric_list: []", f"{aggregation}"
        ),
    )
    (tmp_path / "absent.py").write_text("import absent_package\n")
    write_task(tmp_path, "absent", text.replace(question, "doc_to_text: !function absent.f"))
    choices = """doc_to_choice: "{{['x', 'y' if q else '']}}\""""  # empty in the third document
    empty = text.replace("doc_to_choice: '{{options}}'", choices)
    write_task(tmp_path, "empty", empty.replace(question, "doc_to_text: q"))
    write_task(tmp_path, "first", text.replace("'{{options}}'", """"{{['', 'y']}}\""""))
    no_metrics = re.sub(r"metric_list:(\n- .*)+", "metric_list: []", text)
    write_task(tmp_path, "metrics", no_metrics.replace("[]", "[{metric: no_such_metric}]"))
    nan = "[{metric: acc, aggregation: !function utils.nan, higher_is_better: true}]"
    write_task(tmp_path, "nan", no_metrics.replace("[]", nan))
    with (tmp_path / "utils.py").open("a") as file:
        file.write("\ndef nan(values):\n    return float('nan')\n")
    (tmp_path / "group.yaml").write_text("group: both\ntask: [good, lost]\n")
    names = ["good", "lost", "prompt", "results", "metric", "absent", "empty", "both"]
    names += ["first", "metrics", "nan"]
    lm = ours(models[0], tokenizer)
    found = run_tasks(lm, names, TaskOptions(str(tmp_path), samples=True))
    assert found.scores["results"].keys() == {"good", "nan"}
    assert "the first document has an empty choice or answer" in found.errors["first"]
    assert "check metric_list of the task file" in found.errors["metrics"]
    assert "acc,none is NaN" in found.errors["nan"]
    assert found.errors.keys() == set(names) - {"good"}
    assert "lost.jsonl" in found.errors["lost"]
    for name in ("prompt", "results", "metric"):
        assert "ValueError: in the task; check the task file" in found.errors[name]
    assert (
        "install the package that the task needs (pip install absent_package)"
        in (found.errors["absent"])
    )
    assert found.errors["empty"].startswith("a task scores an empty continuation; remove")
    samples = found.samples["good"]
    assert [sample["doc"]["q"] for sample in samples] == [question for question, _, _ in QUESTIONS]
    assert {"resps", "acc", "arguments"} <= samples[0].keys()


def test_task_may_import_the_package_evaluate(
    models: tuple[Llama, LlamaForCausalLM],
    tokenizer: Tokenizer,
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As in a program, whose folder is first on `sys.path` and contains `evaluate.py`."""
    monkeypatch.syspath_prepend(str(ROOT))
    monkeypatch.delitem(sys.modules, "evaluate", raising=False)
    before = list(sys.path)
    text = (folder / "toy_choice.yaml").read_text()
    utils = "import evaluate\nevaluate.load\ndef text(doc):\n    return doc['q']\n"
    task = text.replace("doc_to_text: '{{q}}'", "doc_to_text: !function utils.text")
    write_task(tmp_path, "imports", task, utils)
    found = run_tasks(ours(models[0], tokenizer), ["imports"], TaskOptions(str(tmp_path), limit=1))
    assert found.errors == {} and sys.path == before
    with third_party_imports(), pytest.raises(ModuleNotFoundError):
        importlib.import_module("prepare")  # a program of ours is no library


def test_answers_that_are_not_finite_are_an_error(
    models: tuple[Llama, LlamaForCausalLM], tokenizer: Tokenizer
) -> None:
    llama = copy.deepcopy(models[0])
    with torch.no_grad():
        llama.norm.weight[0] = torch.nan
    lm = ours(llama, tokenizer)
    for answer, n in ((lm.loglikelihood, len(PAIRS)), (lm.generate_until, len(PROMPTS))):
        with pytest.raises(TaskError, match=f"answers to {n} of {n} requests are not finite"):
            answer(PAIRS if n == len(PAIRS) else GENERATE[:n])


def test_chat_template_is_applied_as_in_the_hf_model(
    models: tuple[Llama, LlamaForCausalLM],
    tokenizer: Tokenizer,
    theirs: Any,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    text = "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    monkeypatch.setattr(theirs.tokenizer, "chat_template", text)
    expected = simple_evaluate(
        model=theirs,
        tasks=TASKS[::2],
        num_fewshot=1,
        limit=3,
        apply_chat_template=True,
        task_manager=TaskManager(include_path=str(folder), include_defaults=False),
    )
    template = ChatTemplate(text, "test", {"bos_token": "<|begin_of_text|>"})
    lm = ours(models[0], tokenizer, template=template)
    options = TaskOptions(str(folder), 1, 3, chat=True, samples=True)
    found = run_tasks(lm, TASKS[::2], options)
    for task in TASKS[::2]:
        ours_, theirs_ = found.samples[task], expected["samples"][task]
        assert [each["arguments"] for each in ours_] == [
            [tuple(args) for args in each["arguments"]] for each in theirs_
        ]
        assert "[user]" in str(ours_[0]["arguments"])
    assert (
        found.scores["results"]["toy_choice"]["acc,none"]
        == (expected["results"]["toy_choice"]["acc,none"])
    )
