"""Command-line arguments become typed dataclasses, or a single error that lists all problems."""

import dataclasses
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from cli.arguments import CONF, explicit_keys, hydra_arguments
from cli.composition import compose_config
from cli.config import (
    check_config,
    check_for_tasks,
    load_convert_config,
    load_evaluate_config,
    load_prepare_config,
    load_train_config,
)
from cli.help import help_text
from data.config import PrepareJobConfig
from evaluation.config import EvaluationConfig
from training.config import JobConfig
from training.config_rules import torchao_errors
from training.config_validation import ConfigError, fields_of, plain


@pytest.fixture(scope="module", autouse=True)
def _hydra() -> Iterator[None]:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        yield


def files(group: str) -> list[str]:
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


def load(*arguments: str) -> JobConfig:
    """Load a configuration as `python train.py ARGUMENTS` does."""
    return load_train_config(compose("train", hydra_arguments(list(arguments), "train")))


def prepared(*arguments: str) -> PrepareJobConfig:
    return load_prepare_config(compose("prepare", hydra_arguments(list(arguments), "prepare")))


def errors_of(*arguments: str) -> list[str]:
    with pytest.raises(ConfigError) as raised:
        load(*arguments)
    assert all(f"  - {error}" in str(raised.value) for error in raised.value.errors)
    return raised.value.errors


def missing_values(group: str, name: str) -> list[str]:
    """Return overrides for the values that a file requires from the user."""
    text = (CONF / group / f"{name}.yaml").read_text()
    given = [f"{group}.name=some"] if re.search(r"^name: \?\?\?", text, re.M) else []
    if re.search(r"^    path: \?\?\?", text, re.M):
        given.append(f"{group}.sources.{name}.path=some/path")
    return given


# ---------------------------------------------------------------- valid configurations


def test_default_configuration_round_trips_through_plain_values() -> None:
    config = load()
    assert (config.run.name, config.run.dir) == ("llama3_tiny", "runs/llama3_tiny")
    assert config.model.vocab_size == config.tokenizer.vocab_size
    assert config.optim.schedule_steps == config.train.max_steps
    assert isinstance(config.optim.betas, tuple) and isinstance(config.optim.eps, float)
    again = load_train_config(OmegaConf.create(plain(config)))
    assert again == config


@pytest.mark.parametrize("tokenizer", files("tokenizer"))
@pytest.mark.parametrize("model", files("model"))
def test_every_model_composes_with_every_tokenizer(model: str, tokenizer: str) -> None:
    config = load(f"model={model}", f"tokenizer={tokenizer}")
    assert (config.model.name, config.tokenizer.name) == (model, tokenizer)
    assert config.model.vocab_size >= config.tokenizer.vocab_size


@pytest.mark.parametrize("tokenizer", files("tokenizer"))
@pytest.mark.parametrize("data", files("data"))
def test_every_data_file_composes_for_both_programs(data: str, tokenizer: str) -> None:
    arguments = [f"data={data}", f"tokenizer={tokenizer}", *missing_values("data", data)]
    config = load(*arguments)
    size = config.tokenizer.vocab_size
    assert config.data.folder == f"shards/{config.data.name}-{tokenizer}-{size}"
    if data != "mock":  # nothing to prepare
        assert prepared(*arguments).data == config.data


@pytest.mark.parametrize("data", [data for data in files("data") if missing_values("data", data)])
def test_missing_values_of_data_files_are_reported(data: str) -> None:
    required = {argument.partition("=")[0] for argument in missing_values("data", data)}
    found = errors_of(f"data={data}")
    assert {error.partition(" ")[0] for error in found} == required
    for error in found:
        key = error.partition(" ")[0]
        assert error == f"{key} has no value; add {key}=… to the command"


@pytest.mark.parametrize("experiment", files("experiment"))
def test_every_experiment_overrides_the_defaults(experiment: str) -> None:
    config = load(f"experiment={experiment}")
    own = OmegaConf.load(CONF / "experiment" / f"{experiment}.yaml")
    given: Any = OmegaConf.to_container(own, resolve=False)
    given.pop("defaults", None)

    def holds(mine: Any, theirs: Any) -> bool:
        if isinstance(mine, dict):
            return all(holds(value, theirs[key]) for key, value in mine.items())
        if isinstance(mine, list):
            return len(mine) == len(theirs) and all(map(holds, mine, theirs))
        return (isinstance(mine, str) and "${" in mine) or mine == theirs

    assert holds(given, plain(config))


def test_command_line_overrides_an_experiment() -> None:
    assert load("experiment=smoke", "train.max_steps=3").train.max_steps == 3


@pytest.mark.parametrize("group", ["model", "data", "tokenizer", "experiment", "hardware"])
def test_every_config_group_is_covered_here(group: str) -> None:
    groups = sorted(path.name for path in CONF.iterdir() if path.is_dir())
    assert group in groups and len(groups) == 5


# ---------------------------------------------------------------- invalid configurations


@pytest.mark.parametrize(
    ("argument", "meant"),
    [
        ("optim.learning_rat=1", "optim.lr"),
        ("train.max_step=3", "train.max_steps"),
        ("model.n_head=4", "model.n_heads"),
        ("trian.max_steps=3", "train.max_steps"),
        ("data.sources.stdlib.wieght=2", "data.sources.stdlib.weight"),
        ("data.sources.more.formt=text", "data.sources.more.format"),
        ("+model.rope_scaling={factr: 8}", "model.rope_scaling.factor"),
    ],
)
def test_unknown_key_error_suggests_the_closest_key(argument: str, meant: str) -> None:
    key = argument.partition("=")[0].removeprefix("+")
    if "{" in argument:
        key, argument = "model.rope_scaling.factr", "++model.rope_scaling={factr: 8, factor: 8}"
    [error] = [error for error in errors_of(argument) if error.startswith("Unknown key")]
    if meant == "optim.lr":  # no similar name: all keys are listed
        assert error.startswith(f"Unknown key {key}. Known keys: lr, optimizer")
    else:
        assert error == f"Unknown key {key}. Did you mean {meant}?"


@pytest.mark.parametrize(
    ("argument", "key", "value"),
    [
        ("train.max_steps=many", "train.max_steps", "'many'"),
        ("train.max_steps=1.5", "train.max_steps", "1.5"),
        ("train.max_steps=null", "train.max_steps", "null"),
        ("optim.lr=fast", "optim.lr", "'fast'"),
        ("optim.schedule=cosin", "optim.schedule", "'cosin'"),
        ("optim.betas=[0.9]", "optim.betas[1]", "has no value"),
        ("precision.param=fp16", "precision.param", "'fp16'"),
        ("precision.optimizer_state=int4", "precision.optimizer_state", "'int4'"),
        ("precision.float32_matmul=tf32", "precision.float32_matmul", "'tf32'"),
        ("precision.fp8=blockwise", "precision.fp8", "'blockwise'"),
        ("parallel.activation_checkpoint=no", "parallel.activation_checkpoint=", "'no'"),
        ("parallel.activation_checkpoint=null", "parallel.activation_checkpoint=", "null"),
        ("parallel.sequence_parallel=perhaps", "parallel.sequence_parallel", "'perhaps'"),
        ("parallel.compile=maybe", "parallel.compile", "'maybe'"),
        ("parallel.accelerator=tpu", "parallel.accelerator", "'tpu'"),
        ("data.sources.stdlib.format=pdf", "data.sources.stdlib.format", "'pdf'"),
        ("data.sources.stdlib.weight=heavy", "data.sources.stdlib.weight", "'heavy'"),
        ("validation=5", "validation", "5"),
    ],
)
def test_wrong_type_or_choice_error_has_key_and_value(argument: str, key: str, value: str) -> None:
    found = errors_of(argument)
    assert len(found) == 1
    assert found[0].startswith(key) and value in found[0], found


@pytest.mark.parametrize(
    ("arguments", "errors"),
    [
        (("parallel.tp=0", "parallel.dp_shard=0"), ("tp=0 is below 1", "dp_shard=0 is below 1")),
        (("parallel.dp_shard=-2",), ("dp_shard=-2 is below 1; use -1 or at least 1",)),
        (("parallel.cp=0", "parallel.dp_replicate=-1"), ("dp_replicate=-1 is", "cp=0 is below 1")),
        (("parallel.devices=0", "parallel.num_nodes=0"), ("devices=0 is", "num_nodes=0 is below")),
        (("parallel.activation_checkpoint=1.5",), ("activation_checkpoint=1.5 is above 1",)),
        (("data.folder=",), ("data.folder='' is empty",)),
        (("data.shard_tokens=0",), ("data.shard_tokens=0 is below 1",)),
        (("data.validation_fraction=1",), ("data.validation_fraction=1 is not below 1",)),
        (("tokenizer.training_characters=0",), ("tokenizer.training_characters=0 is below 1",)),
        (("run.time_limit=0",), ("run.time_limit=0 is not above 0; use a number above 0 or null",)),
    ],
)
def test_every_value_out_of_bounds_is_reported(
    arguments: tuple[str, ...], errors: tuple[str, ...]
) -> None:
    found = errors_of(*arguments)
    assert len(found) == len(errors)
    assert all(any(part in each for each in found) for part in errors), found


# Key: a valid value at each of its bounds, and the nearest invalid one.
BOUNDS: dict[str, list[tuple[float, float]]] = {
    "run.seed": [(0, -1), (2**63 - 1, 2**63)],
    "run.time_limit": [(1e-9, 0)],
    "train.max_steps": [(1, 0)],
    "train.global_batch_size": [(1, 0)],
    "train.seq_len": [(1, 0)],
    "train.micro_batch_size": [(1, 0)],
    "train.max_grad_norm": [(1e-9, 0)],
    "optim.lr": [(1e-9, 0)],
    "optim.eps": [(1e-9, 0)],
    "optim.weight_decay": [(0, -1e-9)],
    "optim.schedule_steps": [(1, 0)],
    "optim.warmup_steps": [(0, -1)],
    "optim.min_lr_ratio": [(0, -1e-9), (1, 1.001)],
    "optim.decay_start": [(1, 0)],
    "optim.decay_ratio": [(0, -1e-9), (1, 1.001)],
    "validation.interval": [(1, 0)],
    "validation.samples": [(0, -1)],
    "validation.sample_tokens": [(0, -1)],
    "validation.temperature": [(0, -1e-9)],
    "log.interval": [(1, 0)],
    "checkpoint.interval": [(1, 0)],
    "checkpoint.interval_minutes": [(1e-9, 0)],
    "checkpoint.keep_last": [(1, 0)],
    "checkpoint.keep_every": [(1, 0)],
    "faults.max_consecutive_skips": [(1, 0)],
    "faults.max_rewinds": [(0, -1)],
    "faults.replica_check_interval": [(1, 0)],
    "faults.spike_threshold": [(1e-9, 0)],
    "watchdog.setup_seconds": [(1e-9, 0)],
    "watchdog.step_seconds": [(1e-9, 0)],
    "watchdog.checkpoint_seconds": [(1e-9, 0)],
    "data.validation_fraction": [(0, -1e-9), (0.999, 1)],
    "data.shard_tokens": [(1, 0)],
    "data.workers": [(1, 0)],
    "data.shuffle_block_tokens": [(1, 0)],
    "data.stream_shards": [(1, 0)],
    "data.loader_threads": [(1, 0)],
    "data.prefetch": [(1, 0)],
    "data.sources.stdlib.weight": [(0, -1e-9)],
    "tokenizer.vocab_size": [(1, 0)],
    "tokenizer.training_characters": [(1, 0)],
    "parallel.dp_replicate": [(1, 0)],
    "parallel.dp_shard": [(1, 0)],
    "parallel.cp": [(1, 0)],
    "parallel.tp": [(1, 0)],
    "parallel.pp": [(1, 0)],
    "parallel.pp_parts": [(1, 0)],
    "parallel.devices": [(1, 0)],
    "parallel.num_nodes": [(1, 0)],
    "model.dim": [(1, 0)],
    "model.n_layers": [(1, 0)],
    "model.norm_eps": [(1e-9, 0)],
    "model.rope_theta": [(1.001, 1)],
    "model.max_seq_len": [(1, 0)],
}


@pytest.mark.parametrize("bound", [0, 1])
def test_values_beyond_their_bounds_are_rejected_and_values_at_them_are_not(bound: int) -> None:
    rows = {key: pairs[bound] for key, pairs in BOUNDS.items() if len(pairs) > bound}

    def out_of_bounds(values: dict[str, float]) -> set[str]:
        words = (f"{key}={value}" for key, value in values.items())
        found = errors_of(*words, "unknown=1")  # there is at least one error
        rule = r"is (below|above|not below|not above) \d+"
        pattern = rf"([a-z_.]+)=\S+ {rule}; use (off, )?(a number|at|-1)"
        keys = {match[1] for error in found if (match := re.match(pattern, error))}
        return keys & values.keys()  # without keys interpolated from them

    assert out_of_bounds({key: invalid for key, (_, invalid) in rows.items()}) == set(rows)
    at_bounds = out_of_bounds({key: valid for key, (valid, _) in rows.items()})
    assert at_bounds <= {"train.seq_len"}  # a rule compares it with model.max_seq_len


@pytest.mark.parametrize("value", ["true", "false"])
def test_booleans_are_rejected_as_numbers(value: str) -> None:
    """pydantic converts them to 1 and 0, which as a memory budget keep everything or nothing."""
    for key in ("parallel.activation_checkpoint", "parallel.tp"):
        found = errors_of(f"{key}={value}", "parallel.compile=true")
        assert f"{key}={value} is not a number; use a number or a named choice" in found


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("data.sources.stdlib.weight=1e400", "weight=inf is not finite; use a finite number"),
        ("data.sources.stdlib.filter=[1]", "filter[0]=1 has the wrong type; use a list"),
        ("data.invalid_text=true", "invalid_text=true is not a valid choice; use strict, replace"),
    ],
)
def test_values_of_another_kind_are_reported_for_what_they_are(argument: str, message: str) -> None:
    [error] = errors_of(argument)
    assert message in error


@pytest.mark.parametrize(
    ("program", "key"),
    [
        ("train", "run.dir"),
        ("train", "run.init_from"),
        ("generate", "checkpoint"),
        ("plan", "hardware"),
        ("prepare", "tokenizer.path"),
    ],
)
def test_names_longer_than_file_systems_admit_are_rejected(program: str, key: str) -> None:
    rule = rf"{key}=é+… has a name of 256 bytes; use names of at most 255"
    with pytest.raises(ConfigError, match=rule):
        compose_config(program, [f"{key}=a/{'é' * 128}"])


@pytest.mark.parametrize(
    ("value", "remedy"),
    [
        ("resume", "use run.dir=runs/NAME without run.init_from to resume a run"),
        ("scratch", "use no run.init_from for random weights"),
    ],
)
def test_values_of_init_from_in_nanogpt_are_explained(
    value: str, remedy: str, tmp_path: Path
) -> None:
    words = [f"run.init_from={value}", f"run.dir={tmp_path}"]  # a run may be in the default folder
    composed = compose("train", hydra_arguments(words, "train"))
    with pytest.raises(ConfigError, match=f"run.init_from={value} does not exist; {remedy}"):
        check_config(composed)


def test_integers_are_accepted_as_floats() -> None:
    assert load("train.max_grad_norm=1").train.max_grad_norm == 1.0
    assert load("optim.lr=1").optim.lr == 1.0
    assert load("train.max_grad_norm=null").train.max_grad_norm is None


def test_all_configuration_errors_are_reported_together() -> None:
    found = errors_of(
        "trian.max_steps=3",
        "optim.lrr=1",
        "train.global_batch_size=0",
        "log.interval=often",
        "optim.lr=-1",
        "optim.betas=[0.9,2]",
        "data.sources.stdlib.weight=0",
        "parallel.tp=0",
        "run.seed=-1",
    )
    for part in (
        "Unknown key trian",
        "Unknown key optim.lrr",
        "log.interval='often'",
        "train.global_batch_size=0",
        "optim.lr=-1 ",
        "optim.betas",
        "data.sources.stdlib.weight=0.0",
        "parallel.tp=0",
        "run.seed=-1",
    ):
        assert sum(part in error for error in found) == 1, (part, found)


def test_errors_inside_lists_have_the_index() -> None:
    found = errors_of("data.stages=[{from_sample:16},{seq_lenn:512}]")
    assert "Unknown key data.stages[1].seq_lenn. Did you mean data.stages[1].seq_len?" in found
    assert any(
        "data.stages[1].from_sample has no value; add it to the list" in one for one in found
    )
    [error] = errors_of("data.stages=[{from_sample:never}]")
    assert error.startswith("data.stages[0].from_sample='never' has the wrong type")


def test_missing_values_and_unknown_keys_are_reported_together() -> None:
    found = errors_of("data=text", "data.name=x", "train.max_step=3")
    assert any(error.startswith("data.sources.text.path has no value") for error in found)
    assert any(error.startswith("Unknown key train.max_step") for error in found)


def test_broken_interpolation_and_unknown_keys_are_reported_together() -> None:
    error, other = errors_of("run.name=${model.nmae}", "log.intervall=3")
    assert error.startswith("run.") and "nmae" in error
    assert other.startswith("Unknown key log.intervall")


def test_cross_section_errors_have_both_values() -> None:
    [error] = errors_of("train.seq_len=4096")
    assert error == ("train.seq_len=4096 is above model.max_seq_len=1024; use at most 1024")
    [error] = errors_of("model.vocab_size=100")
    assert "model.vocab_size=100" in error and "tokenizer.vocab_size=4096" in error
    assert "; use model.vocab_size=4096 (or omit tokenizer= " in error


@pytest.mark.parametrize(
    ("steps", "rule"),
    [
        ("[]", "log.profile=[] is empty"),
        ("[0,3]", "log.profile[0]=0 is below 1"),
        ("[160,161]", "log.profile=[160, 161] lists steps after train.max_steps=160"),
    ],
)
def test_profile_steps_are_steps_of_the_run(steps: str, rule: str) -> None:
    words = hydra_arguments([f"log.profile={steps}"], "train")
    with pytest.raises(ConfigError) as raised:
        check_for_tasks(compose("train", words), per_node=1, num_nodes=1)
    (error,) = raised.value.errors
    assert error.startswith(rule)


# ---------------------------------------------------------------- the command line


@pytest.mark.parametrize("installed", [True, False])
def test_missing_torchao_error_names_the_extra(
    monkeypatch: pytest.MonkeyPatch, installed: bool
) -> None:
    formats = ("precision.fp8=rowwise", "precision.optimizer_state=int8")

    def found_in(*words: str) -> list[str]:
        config = load(*words)
        return list(torchao_errors(config.precision))

    if installed:
        assert found_in(*formats) == []
        return
    monkeypatch.setitem(sys.modules, "torchao", None)
    assert found_in("precision.optimizer_state=bf16") == []
    found = found_in(*formats)
    assert [error.split()[0] for error in found] == list(formats)
    assert all("pip install '.[torchao]'" in error for error in found)


def test_explicit_keys_are_those_typed_and_not_those_of_the_files() -> None:
    typed = ["model=llama3_8b", "++optim.lr=1e-3", "--train.max_steps=3", "~data.sources.stdlib"]
    typed += ["validation.prompt=a=b", "--cfg", "job", "~log.wandb=null", "word"]
    assert explicit_keys(typed) == {
        *("model", "optim.lr", "train.max_steps", "data.sources.stdlib"),
        *("validation.prompt", "log.wandb"),
    }


def test_keys_admit_unknown_ones_and_groups_are_unchanged() -> None:
    given = ["train.max_steps=3", "model=llama3_8b", "+new.key=1", "--optim.lr=1", "~data"]
    rewritten = ["++train.max_steps=3", "model=llama3_8b", "++new.key=1", "++optim.lr=1", "~data"]
    rewritten.append("++train.max_tokens=null")  # the other way to set the length
    assert hydra_arguments(given, "train") == rewritten


@pytest.mark.parametrize("flag", ["-m", "--multirun"])
def test_multirun_is_rejected_with_a_remedy(flag: str) -> None:
    with pytest.raises(ConfigError, match=r"run\.name"):
        compose_config("train", [flag, "optim.lr=1,2"])


@pytest.mark.parametrize("program", ["train", "prepare"])
@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_help_is_printed_and_the_program_exits(
    program: str, flag: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        compose_config(program, [flag])
    assert stop.value.code == 0
    assert capsys.readouterr().out.rstrip("\n") == help_text(program).rstrip("\n")


def test_help_lists_every_key_and_every_choice_of_the_groups() -> None:
    text = help_text("train")
    sections = ("run", "parallel", "precision", "train", "optim", "checkpoint", "validation", "log")
    own: Any = OmegaConf.load(CONF / "train.yaml")
    for section in sections:
        if section in own:
            assert f"  {section}:" in text
            assert all(f"    {key}:" in text for key in own[section])
    for group in (path for path in CONF.iterdir() if path.is_dir()):
        listed = f"  {group.name}={' | '.join(files(group.name))}"
        assert listed in (help_text("plan") if group.name == "hardware" else text)
    assert "hydra" not in text and "defaults:" not in text.replace("and defaults:", "")


def test_help_of_prepare_lists_only_its_groups() -> None:
    text = help_text("prepare")
    assert "data=" in text and "tokenizer=" in text and "model=" not in text


def test_configuration_files_have_no_absolute_paths() -> None:
    for path in Path(CONF).rglob("*.yaml"):
        assert not re.search(r"(?<![\w.}])/(?:home|root|work|tmp|mnt)/", path.read_text()), path


# ---------------------------------------------------------------- top-level values


def test_pack_accepts_one_length_or_a_list() -> None:
    assert prepared().lengths == []
    assert prepared("pack=8192").lengths == [8192]
    assert prepared("pack=[8192,256,8192]").lengths == [256, 8192]


def test_invalid_item_of_a_list_is_one_error() -> None:
    with pytest.raises(ConfigError) as raised:
        prepared("pack=[256,long]")
    assert raised.value.errors == ["pack[1]='long' has the wrong type; use a valid integer"]


@pytest.mark.parametrize(
    ("argument", "expected"),
    [
        ("pack=0", "pack=0 is below 1"),
        ("pack=[256,100000000]", "pack[1]=100000000 is above 16777216"),
        ("pack=[]", "pack=[] is empty"),
        ("pack=true", "pack=true is not a number"),
        ("pack=[256,true]", "pack[1]=true is not a number"),
        ("pack=long", "pack='long' has the wrong type"),
        ("pack=[long]", "pack[0]='long' has the wrong type"),
        ("pak=3", "Unknown key pak. Did you mean pack?"),
    ],
)
def test_pack_errors_are_reported_with_section_errors(argument: str, expected: str) -> None:
    with pytest.raises(ConfigError) as raised:
        prepared(argument, "data.validation_fraction=2")
    assert any(error.startswith(expected) for error in raised.value.errors)
    assert any("data.validation_fraction=2" in error for error in raised.value.errors)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["inspect=runs/x", "sample=-1"], "sample=-1 is below 0; use at least 0"),
        (["inspect=runs/x", "sample=2000000000000000000"], "sample=2000000000000000000 is above"),
        (["inspect=runs/x", "sample=first"], "sample='first' has the wrong type"),
        (["inspect=runs/x", "sample=true"], "sample=true is not a number"),
        (["inspect=runs/x", "verify=true"], "verify and inspect are mutually exclusive"),
        (["pack=8", "verify=true"], "pack and verify are mutually exclusive"),
        (["inspect=runs/x", "seq_len=0"], "seq_len=0 is below 1"),
        (["inspect=runs/x", "seed=-1"], "seed=-1 is below 0"),
        (["sample=3"], "sample=3 has no effect without inspect"),
        (["verify=true", "seed=3"], "seed=3 has no effect without inspect"),
        (["inspekt=runs/x"], "Unknown key inspekt. Did you mean inspect?"),
    ],
)
def test_inspect_key_errors(arguments: list[str], expected: str) -> None:
    with pytest.raises(ConfigError) as raised:
        prepared(*arguments)
    assert [error.startswith(expected) for error in raised.value.errors] == [True]


# ---------------------------------------------------------------- renamed keys and defaults


@pytest.mark.parametrize(
    ("old", "new", "extra"),
    [
        ("faults.max_in_a_row=7", "faults.max_consecutive_skips", ()),
        (
            "data.stream_lanes=4",
            "data.stream_shards",
            ("data=fineweb_edu", "tokenizer=byte", "validation.samples=0"),
        ),
    ],
)
def test_renamed_key_is_accepted_with_one_warning(
    old: str, new: str, extra: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    key, _, value = old.partition("=")
    config = load(old, *extra)
    section, name = new.split(".")
    assert getattr(getattr(config, section), name) == int(value)
    assert capsys.readouterr().err == f"Warning: {key} is deprecated; use {new}\n"


@pytest.mark.parametrize(
    ("program", "old", "more"),
    [("evaluate", "evaluation.checkpoint", ()), ("convert", "source", ("target=out",))],
)
def test_old_names_of_checkpoint_are_accepted(
    program: str, old: str, more: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    loaders: dict[str, Any] = {"evaluate": load_evaluate_config, "convert": load_convert_config}

    def load(*arguments: str) -> Any:
        return loaders[program](compose(program, hydra_arguments([*arguments, *more], program)))

    assert load(f"{old}=runs/x") == load("checkpoint=runs/x")
    assert capsys.readouterr().err == f"Warning: {old} is deprecated; use checkpoint\n"
    with pytest.raises(ConfigError) as raised:
        load(f"{old}=runs/x", "checkpoint=runs/y")
    assert raised.value.errors == [f"{old} and checkpoint are both given; use checkpoint"]
    with pytest.raises(ConfigError, match="checkpoint has no value; add checkpoint="):
        load()


def test_defaults_of_dataclasses_and_yaml_files_are_equal() -> None:
    """A key's default has one owner: a default in the dataclass equals the one in the YAML."""
    composed: Any = OmegaConf.to_container(compose("train"), resolve=False)
    composed = {"evaluation": OmegaConf.to_container(compose("evaluate"))["evaluation"], **composed}  # type: ignore[call-overload,index]
    schemas = {**fields_of(JobConfig), "evaluation": EvaluationConfig}
    different = [
        f"{section}.{field.name}: {field.default} in the dataclass, {value} in the YAML"
        for section, values in composed.items()
        for schema in [get_args(schemas[section])[:1] or (schemas[section],)]
        for field in dataclasses.fields(schema[0])
        if field.default is not dataclasses.MISSING
        and (value := values.get(field.name, field.default)) != field.default
        and not (isinstance(value, str) and "${" in value)
        and (not isinstance(value, list) or tuple(value) != field.default)
        if section not in ("model", "data", "tokenizer")  # groups, whose files choose
    ]
    assert different == []
