"""The remedies in the messages of all configuration rules work: each is read from the message.

A remedy is applied to the configuration that caused the message: the message disappears, and no
other error appears. Every message in the source of the rules occurs here.
"""

import ast
import copy
import inspect
import re
import shutil
import sys
from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import Any

import pytest
import yaml
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

import data.stages
import model.config
import planning.config
from cli.arguments import CONF, hydra_arguments
from cli.last_launch import register_resolvers
from data.config import PrepareJobConfig
from evaluation.config import EvaluateJobConfig, GenerateJobConfig
from formats.config import ConvertJobConfig
from parallel import mesh
from planning.config import PlanJobConfig
from resilience import accelerator
from resilience.gpu_probe import Gpu, Machine
from resilience.processes import Processes
from training import config_rules as rules
from training.config import JobConfig
from training.config_validation import ConfigError, Rule, validate

SHARED = (*rules.CONFIG_RULES, *rules.INSTALLATION_RULES)
INFERENCE = (*rules.CONFIG_RULES, rules.inference_errors)
PLAN = (*rules.CONFIG_RULES, rules.saving_errors, *planning.config.PLAN_RULES)
TASKS = Processes("auto", 4, 1, "srun")
PROGRAMS: dict[str, tuple[list[str], Any, Sequence[Rule]]] = {
    "train": (
        ["model=llama3_2_1b", "tokenizer=llama3", "parallel.accelerator=cpu"],
        JobConfig,
        (*SHARED, rules.launch_rule()),
    ),
    "gpu": (["model=llama3_2_1b", "tokenizer=llama3"], JobConfig, (*SHARED, rules.launch_rule())),
    "turing": (
        ["model=llama3_2_1b", "tokenizer=llama3"],
        JobConfig,
        (*SHARED, rules.launch_rule()),
    ),
    "no compiler": (
        ["model=llama3_2_1b", "tokenizer=llama3"],
        JobConfig,
        (*SHARED, rules.launch_rule()),
    ),
    "no compiler on CPU": (
        ["model=llama3_2_1b", "tokenizer=llama3", "parallel.accelerator=cpu"],
        JobConfig,
        (*SHARED, rules.launch_rule()),
    ),
    "no gpu": (["tokenizer=llama3"], JobConfig, (*SHARED, rules.launch_rule())),
    "srun": (
        ["model=llama3_2_1b", "tokenizer=llama3"],
        JobConfig,
        (*SHARED, rules.launch_rule(TASKS)),
    ),
    "plan": (["model=llama3_2_1b", "tokenizer=llama3", "hardware=h100"], PlanJobConfig, PLAN),
    "prepare": ([], PrepareJobConfig, rules.PREPARE_RULES),
    "evaluate": (
        ["checkpoint=runs/a"],
        EvaluateJobConfig,
        (*INFERENCE, rules.task_errors),
    ),
    "generate": (
        ["checkpoint=runs/a"],
        GenerateJobConfig,
        (*INFERENCE, rules.generate_errors),
    ),
    "convert": (["checkpoint=runs/a", "target=b"], ConvertJobConfig, (rules.convert_errors,)),
}
GPUS = {"gpu": (8, 9), "turing": (7, 5), "no compiler": (9, 0)}
"""Compute capability of the two GPUs of a program's machine."""
SOURCES = "data.sources"
HUB = {"format": "huggingface", "path": "who/what"}
STREAM = {SOURCES: {"web": HUB}, "data.stream_shards": 4, "validation.samples": 0}
ROPE = {"factor": 8.0, "low_freq_factor": 4.0, "high_freq_factor": 1.0}
FP8 = {"precision.fp8": "rowwise"}
ASYNC_TP = {"parallel.async_tp": True, "parallel.tp": 8, "parallel.compile": True}

# Program, and an invalid configuration as changes of a valid one.
CASES: list[tuple[str, dict[str, Any]]] = [
    ("train", {"run.init_from": "weights", "run.resume": "runs/a"}),
    ("train", {"parallel.activation_checkpoint": 0.5}),
    ("train", {"parallel.activation_checkpoint": 0.5, "parallel.compile": False}),
    ("train", {**FP8, "precision.param": "fp32"}),
    ("train", {"faults.rewind_on_spike": True, "faults.spike_threshold": None}),
    ("train", {"tokenizer.vocab_size": 4096}),
    ("train", {"tokenizer": {"name": "bpe", "vocab_size": 100}}),
    ("train", {"tokenizer": {"name": "byte", "vocab_size": 272, "path": "tokenizer.model"}}),
    ("train", {"data.packing": "best_fit", "data.document_mask": False}),
    ("train", {**STREAM, SOURCES: {"text": {"format": "text", "path": "a.txt"}}}),
    ("train", {**STREAM, "data.packing": "best_fit"}),
    ("train", {"data": "mock", "data.sources.text": {"format": "text", "path": "a"}}),
    ("train", {"data": "mock", "data.packing": "best_fit"}),
    ("prepare", {"data": "mock"}),
    ("train", {SOURCES: {"a": {"format": "stdlib", "path": "b"}}}),
    ("train", {SOURCES: {"a": {"format": "stdlib", "filter": [["a", "==", 1]]}}}),
    ("train", {SOURCES: {"a": {"format": "stdlib", "split": "test"}}}),
    ("train", {SOURCES: {"a": {"format": "text", "path": "b", "split": "train[:10%]"}}}),
    ("train", {SOURCES: {"a": {"format": "text", "path": "b", "streaming": True}}}),
    ("train", {SOURCES: {"a": {"format": "text", "path": "b", "revision": "main"}}}),
    ("train", {SOURCES: {"a": {"format": "stdlib"}, "b": {"format": "stdlib", "weight": 0.0}}}),
    ("train", {SOURCES: {"a": {"format": "stdlib", "weight": 0.0}}}),
    (
        "train",
        {
            SOURCES: {"a": {"format": "stdlib", "weight": 0.0}},
            "data.stages": [{"from_sample": 128, "weights": {"a": 1.0}}],
        },
    ),
    ("train", {"data.stages": [{"from_sample": 129}]}),
    ("train", {"train.seq_len": 2**20}),
    ("train", {"data.stages": [{"from_sample": 128, "seq_len": 2**20}]}),
    ("train", {"model.vocab_size": 100}),
    ("train", {**STREAM, "validation.samples": 8}),
    ("train", {"data.validation_fraction": 0}),
    ("train", {**STREAM, "tokenizer": {"name": "bpe", "vocab_size": 4096}}),
    ("train", {"precision.optimizer_state": "bf16", "optim.betas": [0.9, 0.999]}),
    (
        "train",
        {"optim.schedule": "wsd", "optim.decay_type": "exponential", "optim.min_lr_ratio": 0.0},
    ),
    ("train", {"optim.decay_start": 5000}),
    ("train", {"optim.schedule": "wsd", "optim.decay_start": 10}),
    ("train", {"optim.schedule": "wsd", "optim.decay_start": 10**6}),
    ("train", {"checkpoint.interval": None, "checkpoint.keep_every": 100}),
    ("train", {"checkpoint.interval": 40, "checkpoint.keep_every": 100}),
    ("train", {"checkpoint.interval": 40, "checkpoint.keep_every": 30}),
    ("train", {"checkpoint.when_busy": "skip", "checkpoint.async_save": False}),
    ("train", {"faults.rewind_on_spike": True, "checkpoint.interval": None}),
    ("train", FP8),
    ("train", {"model.attention": "flex"}),
    ("train", {"model.attention": "varlen"}),
    ("train", {**ASYNC_TP, "parallel.tp": 2}),
    ("train", {"parallel.num_nodes": 2}),
    ("train", {"log.wandb": "project"}),
    ("train", {"log.wandb": "true"}),
    ("train", {"precision.optimizer_state": "int8"}),
    ("gpu", {"parallel.devices": 8}),
    ("gpu", FP8),
    ("gpu", {"model.attention": "varlen", "model.dim": 3200, "model.n_heads": 16}),
    ("gpu", {"model.attention": "flex", "model.dim": 3200, "model.n_heads": 16}),
    ("turing", FP8),
    ("turing", {"precision.param": "bf16"}),
    ("turing", {"model.attention": "varlen"}),
    ("turing", {"model.attention": "flex", "model.dim": 4096}),
    ("no compiler", {"parallel.compile": True}),
    ("no compiler", {"parallel.compile": False, "model.attention": "flex"}),
    ("no compiler", {"parallel.compile": False, "precision.optimizer_state": "int8"}),
    ("no compiler", {"parallel.compile": False, "precision.param": "fp32"}),  # auto is flex
    ("no compiler", {"parallel.cp": 2, "precision.optimizer_state": "int8"}),
    ("no compiler", {"parallel.activation_checkpoint": 0.5}),
    ("no compiler", {**ASYNC_TP, "parallel.tp": 2}),
    ("no compiler on CPU", {"parallel.compile": True}),
    ("no compiler on CPU", {"parallel.compile": True, "parallel.activation_checkpoint": 0.5}),
    ("no compiler on CPU", {"precision.optimizer_state": "int8"}),
    ("no gpu", {"parallel.accelerator": "cuda"}),
    ("srun", {"parallel.devices": 8}),
    ("srun", {"parallel.num_nodes": 2}),
    ("srun", {"parallel.dp_shard": 8}),
    ("train", {"parallel.auto": True, "run.plan_check": "off"}),
    ("evaluate", {"parallel.auto": True}),
    ("evaluate", {"parallel.pp": 2}),
    ("generate", {"parallel.pp": 2}),
    ("generate", {"parallel.pp_parts": 2}),
    ("evaluate", {"parallel.pp_layers": [1, 1]}),
    ("evaluate", {"parallel.pp_checkpoint": ["full", "none"]}),
    ("srun", {"train.global_batch_size": 2}),
    ("plan", {"search_fp8": True}),
    ("plan", {"devices": 16, "parallel.num_nodes": 4}),
    ("plan", {"output": "plan.png"}),
    ("plan", {"smallest": True, "devices": 8}),
    ("plan", {"parallel.accelerator": "cpu"}),
    ("plan", {**FP8, "hardware": "a100"}),
    ("plan", {"flash_attention_impl": "FA4", "hardware": "h100"}),
    ("plan", {"framework": "tochtitan"}),
    ("plan", {"power_limit_watts": 800}),
    ("plan", {"power_limit_watts": 800, "hardware": "cpu"}),
    ("plan", {"model.attention": "varlen", "precision.param": "fp32"}),
    ("plan", {"model.attention": "varlen", "parallel.cp": 2}),
    ("plan", {"model.attention": "varlen", "model.n_heads": 512}),
    ("plan", {"model.attention": "flex", "model.n_heads": 256}),
    ("train", {"parallel.pp_parts": 2}),
    ("train", {"parallel.pp_layers": [8, 8]}),
    ("train", {"parallel.pp": 2, "parallel.pp_layers": [8, 7]}),
    ("train", {"parallel.pp": 2, "parallel.pp_layers": [0, 16]}),
    ("train", {"parallel.pp": 2, "parallel.pp_layers": [8, 4, 4]}),
    ("train", {"parallel.pp_checkpoint": ["full", "none"]}),
    ("train", {"parallel.pp": 2, "parallel.pp_checkpoint": ["full"]}),
    ("train", {"parallel.pp": 2, "parallel.pp_checkpoint": ["full", "none", "none"]}),
    ("train", {"parallel.pp": 2, "parallel.pp_checkpoint": []}),
    ("train", {"parallel.pp": 2, "parallel.pp_checkpoint": [0.5, "none"]}),
    (
        "train",
        {
            "parallel.pp": 2,
            "parallel.pp_checkpoint": ["full", "none"],
            "parallel.activation_checkpoint": "full",
        },
    ),
    ("plan", {"model.n_layers": 6, "parallel.pp": 8}),
    ("plan", {"model.n_layers": 6, "parallel.pp": 4, "parallel.pp_parts": 2}),
    ("plan", {"model.n_layers": 2, "parallel.pp": 8, "parallel.pp_parts": 2}),
    ("plan", {"parallel.pp": 4, "parallel.pp_parts": 2, "train.micro_batch_size": 32}),
    ("plan", {"parallel.pp": 4, "parallel.pp_parts": 2, "train.global_batch_size": 6}),
    ("plan", {**ASYNC_TP, "parallel.tp": 1}),
    ("plan", {**ASYNC_TP, "parallel.compile": False}),
    ("plan", {**ASYNC_TP, "parallel.sequence_parallel": False}),
    ("plan", {"parallel.tp": 16}),
    ("plan", {"parallel.cp": 8, "train.seq_len": 24}),
    ("plan", {"parallel.cp": 8, "train.seq_len": 25}),
    ("plan", {"parallel.tp": 8, "train.seq_len": 4}),
    ("plan", {"parallel.tp": 8, "parallel.cp": 2, "train.seq_len": 8}),
    ("plan", {"train.global_batch_size": 12}),
    ("plan", {"train.global_batch_size": 4}),
    ("plan", {"train.micro_batch_size": 5}),
    ("plan", {**STREAM, "data.stream_shards": 24}),
    ("plan", {**STREAM, "data.stream_shards": 4}),
    ("plan", {**FP8, "model.ffn_dim": 8200}),
    ("plan", {**FP8, "train.seq_len": 100}),
    ("plan", {"data.stages": [{"from_sample": 128, "global_batch_size": 12}]}),
    ("plan", {"model.n_kv_heads": 3}),
    ("plan", {"model.dim": 2000}),
    ("plan", {"model.rope_scaling": ROPE}),
    ("evaluate", FP8),
    ("evaluate", {"tasks": ["hellaswag"], "tokenizer_path": None}),
    ("generate", {"parallel.dp_shard": 2}),
    ("generate", {"system": "Be brief."}),
    ("generate", {"chat": True, "tokenizer_path": None}),
    ("generate", {"tokenizer_path": None}),
    ("convert", {"parts": 2}),
]

# The same for remedies in words: they follow, with the changes that they mean.
IN_WORDS: list[tuple[str, dict[str, Any], str, dict[str, Any]]] = [
    ("train", {"run.name": "a/b"}, "use letters", {"run.name": "a-b"}),
    (
        "train",
        {"run.init_from": "weights", "model.vocab_size": 4096},
        "or omit tokenizer=",
        {"tokenizer": {"name": "bpe", "vocab_size": 4096}},  # that of the weights
    ),
    (
        "train",
        {SOURCES: {"a b": {"format": "stdlib"}}},
        "use letters",
        {SOURCES: {"a-b": {"format": "stdlib"}}},
    ),
    (
        "train",
        {SOURCES: {"a": {"format": "text"}}},
        "use a file",
        {SOURCES: {"a": {"format": "text", "path": "b"}}},
    ),
    (
        "train",
        {SOURCES: {"a": {**HUB, "path": None}}},
        "use the name of a dataset",
        {SOURCES: {"a": HUB}},
    ),
    (
        "train",
        {SOURCES: {"a": {**HUB, "filter": [["a", "in", 1]]}}},
        "use a list with in",
        {SOURCES: {"a": {**HUB, "filter": [["a", "in", [1]]]}}},
    ),
    (
        "train",
        {SOURCES: {"a": {**HUB, "filter": [["a", "==", [1]]]}}},
        "use one value with ==",
        {SOURCES: {"a": {**HUB, "filter": [["a", "==", 1]]}}},
    ),
    (
        "train",
        {"data.stages": [{"from_sample": 128, "weights": {"typo": 1.0}}]},
        "use stdlib",
        {"data.stages": [{"from_sample": 128, "weights": {"stdlib": 1.0}}]},
    ),
    (
        "train",
        {"data.stages": [{"from_sample": 256}, {"from_sample": 128}]},
        "list the stages in order",
        {"data.stages": [{"from_sample": 128}, {"from_sample": 256}]},
    ),
    (
        "train",
        {"data.stages": [{"from_sample": 128, "weights": {"stdlib": 0.0}}]},
        "give one a positive weight",
        {"data.stages": [{"from_sample": 128, "weights": {"stdlib": 1.0}}]},
    ),
    ("train", {"log.profile": [20, 99999]}, "use steps up to 23600", {"log.profile": [20, 23600]}),
    ("srun", {"parallel.tp": 8}, "one of 1, 2, 4", {"parallel.tp": 4}),
    ("prepare", {"pack": 8, "verify": True}, "use one per command", {"pack": None}),
    ("prepare", {"sample": 3}, "add inspect=FOLDER", {"inspect": "FOLDER"}),
    ("evaluate", {"limit": 3}, "add tasks=[NAME]", {"tasks": ["NAME"]}),
    (
        "evaluate",
        {"apply_chat_template": True},
        "or omit apply_chat_template",
        {"apply_chat_template": False},
    ),
    ("generate", {"prompt": "a", "prompts": "a.txt"}, "omit one of them", {"prompt": None}),
    ("generate", {"chat": True, "prompt": ""}, "use at least one character", {"prompt": "a"}),
]
MODULES = (rules, planning.config, model.config, data.stages, mesh)


@pytest.fixture(scope="module")
def valid() -> dict[str, dict[str, Any]]:
    """Return a valid configuration of each program."""
    register_resolvers()
    values: dict[str, Any] = {}
    with initialize_config_dir(str(CONF), version_base="1.3"):
        for name, (words, _, _) in PROGRAMS.items():
            program = name if (CONF / f"{name}.yaml").exists() else "train"
            composed = compose(program, hydra_arguments(words, program))
            values[name] = OmegaConf.to_container(composed, resolve=True)
    return values


def changed(values: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Return a copy with other values of dotted keys; names of groups stand for their files."""
    values = copy.deepcopy(values)
    for key, value in changes.items():
        *path, last = [
            int(name) if name.isdigit() else name for name in re.findall(r"[^.\[\]]+", key)
        ]
        section: Any = values
        for name in path:
            section = section[name]
        file = CONF / key / f"{value}.yaml"
        section[last] = yaml.safe_load(file.read_text()) if file.is_file() else value
    return values


def errors_of(program: str, values: dict[str, Any]) -> list[str]:
    """Return the errors, on a machine with the GPUs and the packages of the case."""
    _, schema, applied = PROGRAMS[program]
    with pytest.MonkeyPatch.context() as patch:
        gpus = (Gpu("GPU", GPUS[program], 2**35),) * 2 if program in GPUS else ()
        patch.setattr(accelerator, "probe_machine", lambda: Machine(gpus, "2.13.0+cu130", "13.0"))
        patch.setitem(sys.modules, "wandb", None)
        if "no compiler" in program:
            patch.delenv("CC", raising=False)
            patch.setenv("CXX", "missing")
            patch.setattr(shutil, "which", lambda name: None)
        if program == "train":
            patch.setitem(sys.modules, "torchao", None)
        try:
            validate(values, schema, applied)
        except ConfigError as error:
            return error.errors
    return []


def remedies(message: str) -> Iterator[dict[str, Any]]:
    """Yield the changes that a message suggests: one for each alternative."""
    key = message.partition("=")[0]
    text = re.sub(r" \([^)]*\)", "", message.rpartition("; ")[2])
    for clause in text.split(", or "):
        if counted := re.search(r"([\d, or]*\d) (data ranks|stream shards)", clause):
            key = {"data ranks": "parallel.dp_shard"}.get(counted[2], "data.stream_shards")
            clause = counted[1]
        elif multiple := re.search(r"multiple of (\d+) for (\S+)", clause):
            key, clause = multiple[2], multiple[1]
        clause = clause.partition("use ")[2] or clause
        for item in re.split(r", | or ", clause):  # lists have no spaces
            if changes := re.findall(r"([\w.\[\]-]+)=(\S+)", item):
                key = changes[0][0]
                yield {name: yaml.safe_load(value) for name, value in changes}
            elif value := re.fullmatch(r"(?:at (?:most|least) )?(\S+)", item):
                yield {key: yaml.safe_load(value[1])}


@pytest.mark.parametrize(("program", "changes"), CASES)
def test_each_remedy_in_a_message_works(
    program: str, changes: dict[str, Any], valid: dict[str, dict[str, Any]]
) -> None:
    """Each alternative removes its message, and at least one of them causes no other error."""
    values = changed(valid[program], changes)
    found = errors_of(program, values)
    assert found
    for message in found:
        remaining = [errors_of(program, changed(values, remedy)) for remedy in remedies(message)]
        assert all(message not in errors for errors in remaining), message
        assert any(set(errors) < set(found) for errors in remaining), (message, remaining)


@pytest.mark.parametrize(("program", "changes", "words", "remedy"), IN_WORDS)
def test_each_remedy_in_words_works(
    program: str,
    changes: dict[str, Any],
    words: str,
    remedy: dict[str, Any],
    valid: dict[str, dict[str, Any]],
) -> None:
    values = changed(valid[program], changes)
    found = errors_of(program, values)
    assert any(words in message.rpartition("; ")[2] for message in found)
    assert errors_of(program, changed(values, remedy)) == []


@pytest.mark.parametrize("accelerator", ["auto", "cuda"])
def test_missing_gpu_is_the_only_error_of_a_run_for_gpus(
    accelerator: str, valid: dict[str, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rules about mesh and device do not apply to a mesh and a device that were made up."""
    changes = {**ASYNC_TP, "parallel.tp": 2, "parallel.accelerator": accelerator}
    changes |= {"model.attention": "flex"}
    values = changed(valid["gpu"], changes)
    machine = Machine((), "2.13.0+cpu", driver="580.65.06")
    _, schema, applied = PROGRAMS["no gpu"]
    monkeypatch.setattr("resilience.accelerator.probe_machine", lambda: machine)
    with pytest.raises(ConfigError) as error:
        validate(values, schema, applied)
    [message] = error.value.errors
    assert "torch sees no GPU, but the machine has one (NVIDIA driver 580.65.06)" in message


def templates(module: ModuleType) -> Iterator[list[str]]:
    """Yield the constant parts of each message with a remedy in the source of a module."""
    nodes = list(ast.walk(ast.parse(inspect.getsource(module))))
    skipped = {
        id(part) for node in nodes if isinstance(node, ast.JoinedStr) for part in node.values
    }
    skipped |= {id(node.value) for node in nodes if isinstance(node, ast.Expr)}  # docstrings
    for node in nodes:
        if id(node) in skipped:
            continue
        parts = node.values if isinstance(node, ast.JoinedStr) else [node]
        values = [part.value for part in parts if isinstance(part, ast.Constant)]
        texts = [value for value in values if isinstance(value, str)]
        if any("; " in text for text in texts):
            yield texts


def has_parts(message: str, parts: list[str]) -> bool:
    """Return whether a message has these parts in this order."""
    position = 0
    for part in parts:
        position = message.find(part, position) + len(part)
        if position < len(part):
            return False
    return True


def test_every_message_occurs_above(valid: dict[str, dict[str, Any]]) -> None:
    cases = [*CASES, *((program, changes) for program, changes, _, _ in IN_WORDS)]
    found = [
        error
        for program, changes in cases
        for error in errors_of(program, changed(valid[program], changes))
    ]
    missing = [
        parts
        for module in MODULES
        for parts in templates(module)
        if not any(has_parts(message, parts) for message in found)
    ]
    assert missing == []
