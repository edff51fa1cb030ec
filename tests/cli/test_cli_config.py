"""The gate: what a person typed becomes typed dataclasses, or all of its problems at once."""

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from cli.arguments import CONF, help_text, hydra_arguments
from cli.config import check_for_tasks, load_prepare_config, load_train_config
from data.config import PrepareJobConfig
from training.config import JobConfig
from training.config_rules import torchao_errors
from training.config_validation import ConfigError, plain


@pytest.fixture(scope="module", autouse=True)
def _hydra() -> Iterator[None]:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        yield


def files(group: str) -> list[str]:
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


def load(*arguments: str) -> JobConfig:
    """As `python train.py ARGUMENTS` reads it."""
    return load_train_config(compose("train", hydra_arguments(list(arguments), "train")))


def prepared(*arguments: str) -> PrepareJobConfig:
    return load_prepare_config(compose("prepare", hydra_arguments(list(arguments), "prepare")))


def problems(*arguments: str) -> list[str]:
    with pytest.raises(ConfigError) as error:
        load(*arguments)
    assert all(f"  - {problem}" in str(error.value) for problem in error.value.errors)
    return error.value.errors


def missing_values(group: str, name: str) -> list[str]:
    """Overrides for what a file leaves to the person."""
    text = (CONF / group / f"{name}.yaml").read_text()
    given = [f"{group}.name=some"] if re.search(r"^name: \?\?\?", text, re.M) else []
    if re.search(r"^    path: \?\?\?", text, re.M):
        given.append(f"{group}.sources.{name}.path=some/path")
    return given


# ---------------------------------------------------------------- what is right


def test_the_default_is_typed_and_comes_back_through_plain_values() -> None:
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
    assert config.data.folder == f"shards/{config.data.name}-{tokenizer}"
    assert prepared(*arguments).data == config.data


@pytest.mark.parametrize("data", [data for data in files("data") if missing_values("data", data)])
def test_what_a_data_file_leaves_to_the_person_is_asked_for(data: str) -> None:
    asked = {argument.partition("=")[0] for argument in missing_values("data", data)}
    found = problems(f"data={data}")
    assert {problem.partition(" ")[0] for problem in found} == asked
    for problem in found:
        key = problem.partition(" ")[0]
        assert problem == f"{key} has no value; add {key}=… to the command"


@pytest.mark.parametrize("experiment", files("experiment"))
def test_every_experiment_composes_and_beats_the_defaults(experiment: str) -> None:
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


def test_the_command_line_beats_an_experiment() -> None:
    assert load("experiment=smoke", "train.max_steps=3").train.max_steps == 3


@pytest.mark.parametrize("group", ["model", "data", "tokenizer", "experiment", "hardware"])
def test_every_group_of_files_is_tested_here(group: str) -> None:
    groups = sorted(path.name for path in CONF.iterdir() if path.is_dir())
    assert group in groups and len(groups) == 5


# ---------------------------------------------------------------- what is wrong


@pytest.mark.parametrize(
    ("argument", "meant"),
    [
        ("optim.learning_rat=1", "optim.lr"),
        ("train.max_step=3", "train.max_steps"),
        ("model.n_head=4", "model.n_heads"),
        ("trian.max_steps=3", "train"),
        ("data.sources.stdlib.wieght=2", "data.sources.stdlib.weight"),
        ("data.sources.more.formt=text", "data.sources.more.format"),
        ("+model.rope_scaling={factr: 8}", "model.rope_scaling.factor"),
    ],
)
def test_a_misspelt_key_is_named_with_the_one_that_was_meant(argument: str, meant: str) -> None:
    key = argument.partition("=")[0].removeprefix("+")
    if "{" in argument:
        key, argument = "model.rope_scaling.factr", "++model.rope_scaling={factr: 8, factor: 8}"
    [problem] = [problem for problem in problems(argument) if "is not a key" in problem]
    assert problem.startswith(f"{key if '.' in meant else key.partition('.')[0]} is not a key")
    if meant == "optim.lr":  # too far from the name: all of them are told
        assert "known: lr, optimizer" in problem
    else:
        assert problem.endswith(f"did you mean {meant}?")


@pytest.mark.parametrize(
    ("argument", "key", "value"),
    [
        ("train.max_steps=many", "train.max_steps", "'many'"),
        ("train.max_steps=1.5", "train.max_steps", "1.5"),
        ("train.max_steps=null", "train.max_steps", "None"),
        ("optim.lr=fast", "optim.lr", "'fast'"),
        ("optim.schedule=cosin", "optim.schedule", "'cosin'"),
        ("optim.betas=[0.9]", "optim.betas[1]", "has no value"),
        ("precision.param=fp16", "precision.param", "'fp16'"),
        ("precision.optimizer_state=int4", "precision.optimizer_state", "'int4'"),
        ("precision.fp8=blockwise", "precision.fp8", "'blockwise'"),
        ("parallel.activation_checkpoint=no", "parallel.activation_checkpoint (", "'no'"),
        ("parallel.activation_checkpoint=null", "parallel.activation_checkpoint (", "None"),
        ("parallel.sequence_parallel=perhaps", "parallel.sequence_parallel", "'perhaps'"),
        ("parallel.accelerator=tpu", "parallel.accelerator", "'tpu'"),
        ("data.sources.stdlib.format=pdf", "data.sources.stdlib.format", "'pdf'"),
        ("data.sources.stdlib.weight=heavy", "data.sources.stdlib.weight", "'heavy'"),
        ("run.name=[a]", "run.name", "['a']"),
        ("validation=5", "validation", "5"),
    ],
)
def test_a_wrong_type_or_choice_is_named_with_key_and_value(
    argument: str, key: str, value: str
) -> None:
    found = problems(argument)
    # optim.schedule_steps follows train.max_steps, and is as wrong.
    assert len(found) == 1 + (key == "train.max_steps")
    assert found[0].startswith(key) and value in found[0], found


@pytest.mark.parametrize("value", ["true", "false"])
def test_true_and_false_are_no_numbers(value: str) -> None:
    """They would be 1 and 0: as a memory budget, to keep everything or nothing."""
    for key in ("parallel.activation_checkpoint", "parallel.tp"):
        found = problems(f"{key}={value}", "parallel.compile=true")
        assert f"{key} ({value}) is not a switch; use a number or a named choice" in found


def test_a_number_that_fits_is_no_wrong_type() -> None:
    assert load("train.max_grad_norm=1").train.max_grad_norm == 1.0
    assert load("optim.lr=1").optim.lr == 1.0
    assert load("train.max_grad_norm=null").train.max_grad_norm is None


def test_all_problems_are_told_together() -> None:
    found = problems(
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
        "trian is not a key",
        "Unknown key optim.lrr",
        "log.interval='often'",
        "train.global_batch_size=0",
        "optim.lr=-1.0",
        "optim.betas",
        "data.sources.stdlib.weight=0.0",
        "parallel.tp=0",
        "run.seed=-1",
    ):
        assert sum(part in problem for problem in found) == 1, (part, found)


def test_keys_inside_lists_are_checked_and_named_by_their_place() -> None:
    found = problems("data.stages=[{from_sample:16},{seq_lenn:512}]")
    assert any("Unknown key data.stages[1].seq_lenn: did you mean" in one for one in found)
    assert any(
        "data.stages[1].from_sample has no value; add it to the list" in one for one in found
    )
    [problem] = problems("data.stages=[{from_sample:never}]")
    assert problem.startswith("data.stages[0].from_sample='never' has the wrong type")


def test_a_missing_value_and_an_unknown_key_are_told_together() -> None:
    found = problems("data=text", "data.name=x", "train.max_step=3")
    assert any(problem.startswith("data.sources.text.path has no value") for problem in found)
    assert any(problem.startswith("Unknown key train.max_step") for problem in found)


def test_an_interpolation_of_nothing_is_named_with_its_key_beside_unknown_keys() -> None:
    problem, other = problems("run.name=${model.nmae}", "log.intervall=3")
    assert problem.startswith("run.") and "nmae" in problem
    assert other.startswith("Unknown key log.intervall")


def test_rules_between_sections_name_both_values() -> None:
    [problem] = problems("train.seq_len=4096")
    assert problem == ("train.seq_len=4096 is over model.max_seq_len=1024; use at most 1024")
    [problem] = problems("model.vocab_size=100")
    assert "model.vocab_size=100" in problem and "tokenizer.vocab_size=4096" in problem
    assert problem.endswith("use model.vocab_size=4096")


@pytest.mark.parametrize(
    ("steps", "rule"),
    [("[]", "lists no steps"), ("[0,3]", "lists no steps"), ("[160,161]", "train.max_steps=160")],
)
def test_steps_to_look_into_are_steps_of_the_run(steps: str, rule: str) -> None:
    words = hydra_arguments([f"log.profile={steps}"], "train")
    with pytest.raises(ConfigError) as error:
        check_for_tasks(compose("train", words), per_node=1, num_nodes=1)
    (problem,) = error.value.errors
    assert problem.startswith(f"log.profile={steps.replace(',', ', ')} ") and rule in problem


# ---------------------------------------------------------------- the command line


@pytest.mark.parametrize("installed", [True, False])
def test_what_torchao_does_names_the_extra_where_it_is_not_installed(
    monkeypatch: pytest.MonkeyPatch, installed: bool
) -> None:
    formats = ("precision.fp8=rowwise", "precision.optimizer_state=int8")

    def found_in(*words: str) -> list[str]:
        config = load(*words)  # which is planned wherever it is to run
        return torchao_errors(config.precision)

    if installed:
        assert found_in(*formats) == []
        return
    monkeypatch.setitem(sys.modules, "torchao", None)
    assert found_in("precision.optimizer_state=bf16") == []
    found = found_in(*formats)
    assert [problem.split()[0] for problem in found] == [each.split("=")[0] for each in formats]
    assert all("pip install '.[torchao]'" in problem for problem in found)


def test_hydra_arguments_let_unknown_keys_through_and_groups_be() -> None:
    given = [
        "train.max_steps=3",
        "model=llama3_8b",
        "+new.key=1",
        "~data",
        "hydra.run.dir=x",
        "--cfg",
    ]
    rewritten = ["++train.max_steps=3", *given[1:]]
    assert hydra_arguments(given, "train") == rewritten


@pytest.mark.parametrize("flag", ["-m", "--multirun"])
def test_a_multirun_is_refused_with_a_remedy(flag: str) -> None:
    with pytest.raises(SystemExit) as stop:
        hydra_arguments([flag, "optim.lr=1,2"], "train")
    assert "run.name" in str(stop.value.code)


@pytest.mark.parametrize("program", ["train", "prepare"])
@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_help_is_printed_and_ends_the_program(
    program: str, flag: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        hydra_arguments([flag], program)
    assert stop.value.code == 0
    assert capsys.readouterr().out.rstrip("\n") == help_text(program).rstrip("\n")


def test_help_names_every_key_of_the_file_and_every_choice_of_its_groups() -> None:
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
    assert "hydra" not in text and "defaults:" not in text.replace("their defaults:", "")


def test_help_of_prepare_names_the_groups_that_it_has() -> None:
    text = help_text("prepare")
    assert "data=" in text and "tokenizer=" in text and "model=" not in text


def test_configuration_files_hold_no_path_of_a_machine() -> None:
    for path in Path(CONF).rglob("*.yaml"):
        assert not re.search(r"(?<![\w.}])/(?:home|root|work|tmp|mnt)/", path.read_text()), path


# ---------------------------------------------------------------- values beside the sections


def test_lengths_to_pack_are_one_or_a_list() -> None:
    assert prepared().lengths == []
    assert prepared("pack=8192").lengths == [8192]
    assert prepared("pack=[8192,256,8192]").lengths == [256, 8192]


@pytest.mark.parametrize(
    ("argument", "told"),
    [
        ("pack=0", "pack=0 is not a length from 1 to"),
        ("pack=[256,100000000]", "pack=100000000 is not a length from 1 to"),
        ("pack=[]", "pack=[] names no length"),
        ("pack=true", "pack=true is not a switch"),
        ("pack=[256,true]", "pack[1]=true is not a switch"),
        ("pack=long", "pack='long' has the wrong type"),
        ("pack=[long]", "pack[0]='long' has the wrong type"),
        ("pak=3", "pak is not a key: did you mean pack?"),
    ],
)
def test_wrong_lengths_to_pack_are_told_beside_the_problems_of_the_sections(
    argument: str, told: str
) -> None:
    with pytest.raises(ConfigError) as error:
        prepared(argument, "data.validation_fraction=2")
    assert any(problem.startswith(told) for problem in error.value.errors)
    assert any("data.validation_fraction (2" in problem for problem in error.value.errors)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["inspect=runs/x", "sample=-1"], "sample=-1 is not in [0, 2**60]"),
        (["inspect=runs/x", "sample=2000000000000000000"], "sample=2000000000000000000 is not"),
        (["inspect=runs/x", "sample=first"], "sample='first' has the wrong type"),
        (["inspect=runs/x", "sample=true"], "sample=true is not a switch"),
        (["inspect=runs/x", "verify=true"], "verify and inspect are different jobs"),
        (["pack=8", "verify=true"], "pack and verify are different jobs"),
        (["inspect=runs/x", "seq_len=0"], "seq_len=0 is not a length from 1 to"),
        (["inspect=runs/x", "seed=-1"], "seed=-1 is not in [0, 2**63)"),
        (["sample=3"], "sample=3 has no meaning without inspect"),
        (["verify=true", "seed=3"], "seed=3 has no meaning without inspect"),
        (["inspekt=runs/x"], "inspekt is not a key: did you mean inspect?"),
    ],
)
def test_wrong_keys_of_looking_at_a_folder_are_told(arguments: list[str], told: str) -> None:
    with pytest.raises(ConfigError) as error:
        prepared(*arguments)
    assert [problem.startswith(told) for problem in error.value.errors] == [True]
