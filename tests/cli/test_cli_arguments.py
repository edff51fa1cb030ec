"""Arguments are accepted as typed, or explained with the argument as it should be."""

import re
import shlex
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import ROOT, start_python
from hypothesis import example, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from pydantic import TypeAdapter

from cli.arguments import hydra_arguments, parse_options, schema_of
from cli.composition import compose_config, compose_words
from cli.config import load_plan_config, load_prepare_config, load_train_config
from cli.groups import group_files, groups_of
from cli.help import help_text
from training.config_validation import ConfigError, field_at, known_keys, takes_text
from training.key_suggestions import EXPLANATIONS, OTHER_NAMES, explanation, named_keys


def errors_of(program: str, *arguments: str) -> list[str]:
    with pytest.raises(ConfigError) as raised:
        compose_config(program, arguments)
    return raised.value.errors


def composed(program: str, *arguments: str) -> dict[str, Any]:
    values: Any = OmegaConf.to_container(compose_config(program, arguments), resolve=True)
    return values


# ---------------------------------------------------------------- free text

AWKWARD = "a, b=(c) ~[d]{e}: #f ${g} \"h\" 'i' \\ "


@pytest.mark.parametrize("program", ["train", "prepare", "evaluate", "generate", "convert"])
def test_every_text_key_takes_its_value_literally(program: str) -> None:
    schema = schema_of(program)
    keys = [key for key in known_keys(schema, values={"data": {"sources": {"stdlib": {}}}})]
    keys = [key for key in keys if takes_text(schema, key)]
    words = [f"{key}={AWKWARD}" for key in keys]
    assert len(words) >= 3
    values: Any = OmegaConf.to_container(compose_words(parse_options(words, program)), resolve=True)
    for key in keys:
        value = values
        for name in key.split("."):
            value = value[name]
        assert value == AWKWARD, key


@settings(deadline=None, max_examples=5)
@given(st.text("\\\"'${}[]()=,:#! ~\tan0é", min_size=1).filter(lambda text: text != "null"))
@example("${oc.env:HOME}")
def test_prompts_of_samples_are_literal(text: str) -> None:
    config = load_train_config(compose_config("train", [f"validation.prompt={text}"]))
    assert config.validation.prompt == text


@pytest.mark.parametrize("name", ["2111", "1e5", "null", "true", "~", "0x1f", "1_000", "nan"])
def test_names_that_look_like_other_types_are_names(name: str) -> None:
    values = composed("train", f"run.name={name}", f"model.name={name}")
    assert (values["run"]["name"], values["model"]["name"]) == (name, name)
    assert values["run"]["dir"] == f"runs/{name}"


def test_groups_of_other_programs_are_rejected() -> None:
    [error] = errors_of("prepare", "experiment=smoke")
    assert "not an argument of prepare.py; remove it (its groups are data, tokenizer)" in error
    [error] = errors_of("evaluate", "checkpoint=runs/x", "model=llama3_8b")
    assert "not an argument of evaluate.py; use checkpoint=FOLDER" in error
    [error] = errors_of("evaluate", "checkpoint=runs/x", "data=text")
    assert "use evaluation.data=FOLDER" in error
    [error] = errors_of("generate", "checkpoint=runs/x", "tokenizer=bpe")
    assert "use tokenizer_path=FILE" in error


def test_groups_without_a_file_by_default_may_be_null() -> None:
    assert composed("train", "experiment=null", "hardware=null") == composed("train")


def test_paths_keep_interpolations_of_keys_and_variables(monkeypatch: Any) -> None:
    monkeypatch.setenv("SCRATCH", "/scratch")
    values = composed("train", "run.dir=${oc.env:SCRATCH}/${run.name}/${x}", "run.name=a")
    assert values["run"]["dir"] == "/scratch/a/${x}"


# ---------------------------------------------------------------- forms of arguments


@pytest.mark.parametrize(
    "words",
    [
        ["--optim.lr=0.5", "--model=llama3_8b"],
        ["+optim.lr=0.5", "+model=llama3_8b"],
        ["++optim.lr=0.5", "model=llama3_8b"],
        ["--config-name=train", "optim.lr=0.5", "model=llama3_8b"],
        ["--config-name", "train.yaml", "optim.lr=0.5", "model=llama3_8b", "--run"],
    ],
)
def test_forms_of_other_command_lines_are_accepted(words: list[str]) -> None:
    values = composed("train", *words)
    assert values["optim"]["lr"] == 0.5 and values["model"]["name"] == "llama3_8b"


@pytest.mark.parametrize(
    ("words", "written"),
    [
        ("optim.lr 1e-3", "optim.lr=1e-3"),
        ("--optim.lr 1e-3", "optim.lr=1e-3"),
        ("lr 1e-3", "optim.lr=1e-3"),
        ("optim.lr = 1e-3", "optim.lr=1e-3"),
        ("optim.lr =1e-3", "optim.lr=1e-3"),
        ("optim.lr= 1e-3", "optim.lr=1e-3"),
        ("optim.lr: 1e-3", "optim.lr=1e-3"),
        ("optim.lr:1e-3", "optim.lr=1e-3"),
        ("model llama3_8b", "model=llama3_8b"),
        ("validation.prompt=Once upon a time", "'validation.prompt=Once upon a time'"),
        ("smoke", "experiment=smoke"),
        ("--tokenizer_path x --grad_clip 1", "tokenizer.path=x"),
        ("--compile --lr 1e-3", "parallel.compile=true"),
        ("--compile --lr 1e-3", "optim.lr=1e-3"),
        ("--no-compile", "parallel.compile=false"),
        ("--batch-size 8", "train.micro_batch_size=8"),
        ("--epochs 3", "train.max_steps=8"),
        ("optim.betas=0.9,0.95", "'optim.betas=[0.9,0.95]'"),
        ("--config-name=smoke", "experiment=smoke"),
    ],
)
def test_remedy_for_a_misformed_argument_is_accepted(words: str, written: str) -> None:
    errors = errors_of("train", *words.split())
    assert any(written.replace("=8", "=") in error for error in errors)
    hydra_arguments(shlex.split(written), "train")


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["help"], ["--help"]),
        (["--foo"], ["--foo is not an option", "--help"]),
        (["--hlep"], ["did you mean --help?"]),
        (["--info"], ["--info is not supported", "--cfg job"]),
        (["--cfg=hydra"], ["use --cfg job"]),
        (["--resolve"], ["--cfg job"]),
        (["--config-dir=nowhere"], ["--config-dir=nowhere is not a folder"]),
        (["hydra.run.dir=x"], ["hydra.run.dir", "use run.dir"]),
        (["hydra/launcher=x"], ["hydra/launcher is not a key"]),
        (["data.stages[0].seq_len=8"], ["data.stages=[{"]),
        (["optim.lr=1,2"], ["one command per value", "slurm/sweep.py"]),
        (["model=lama3_8b"], ["did you mean model=llama3_8b"]),
        (["model=Llama-3-8B"], ["did you mean model=llama3_8b"]),
        (["model=llama3_8b.yaml"], ["did you mean model=llama3_8b"]),
        (["data=fineweb"], ["did you mean data=fineweb_edu?"]),
        (["experiment=h100_8b"], ["experiment=h100x8_8b", "Choices"]),
        (["tokenizer="], ["choices: bpe, byte, llama3"]),
        ([f"data={ROOT / 'README.md'}"], ["data=text data.name=README", "path="]),
        (["~nothing"], ["~nothing deletes a key that is not set; remove"]),
        (["--config-name=plan"], ["--config-name=plan is not a configuration of train.py"]),
        (["model="], ["model= is not a file in conf/model; choices"]),
    ],
)
def test_other_arguments_are_explained(words: list[str], parts: list[str]) -> None:
    [error] = errors_of("train", *words)
    assert all(part in error for part in parts), error


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("lr", "optim.lr"),
        ("learning_rate", "optim.lr"),
        ("prompt", "validation.prompt"),
        ("interval", "checkpoint.interval, validation.interval or log.interval"),
        ("model.lr", "optim.lr"),
        ("batch_size", "train.global_batch_size or train.micro_batch_size"),
        ("path", "data.sources.stdlib.path or tokenizer.path"),
        ("train.grad_clip", "train.max_grad_norm"),
        ("eval.interval", "validation.interval"),
        ("training.steps", "train.max_steps"),
        ("trainingSteps", "train.max_steps"),
        ("model.hidden_dim", "model.dim or model.ffn_dim"),
        ("optim.name", "optim.optimizer"),
        ("optim.type", "optim.optimizer"),
    ],
)
def test_key_without_its_section_suggests_every_key_of_that_name(key: str, meant: str) -> None:
    with pytest.raises(ConfigError) as raised:
        load_train_config(compose_config("train", [f"{key}=1"]))
    assert raised.value.errors[0] == f"Unknown key {key}. Did you mean {meant}?"


# ---------------------------------------------------------------- names of other trainers

PROGRAMS = ("train", "plan", "prepare", "evaluate", "generate", "convert")
USUAL_NAMES = """
epochs num_epochs num_train_epochs grad_clip max_grad_norm clip_grad wd weight_decay save_steps
save_every eval_steps eval_interval log_interval logging_steps dtype num_gpus n_gpus gpus out_dir
output_dir gradient_accumulation_steps per_device_train_batch_size batch_size block_size max_length
max_iters warmup_iters warmup_ratio min_lr lr_scheduler beta1 n_layer n_head n_embd hidden_size
num_hidden_layers tensor_parallel_size tp dp fsdp deepspeed resume_from_checkpoint
model_name_or_path dataset fp16 bf16 compile wandb report_to local_rank train.lr train.grad_clip
model.hidden_size optim.wd training.local_batch_size parallelism.tensor_parallel_degree
"""


def keys_of(program: str) -> list[str]:
    return list(known_keys(schema_of(program), values={"data": {"sources": {"text": {}}}}))


@pytest.mark.parametrize("form", ["--{} 1", "{} 1", "--{}"])
def test_name_of_another_trainer_suggests_a_key_or_is_explained(form: str) -> None:
    for name in USUAL_NAMES.split():
        [error] = errors_of("train", *form.format(name).split())
        assert any(key in error for key in keys_of("train")) or "remove it" in error, error
        assert "--help" not in error.replace(", or --help", "") or "=VALUE" in error, error


def test_suggested_keys_exist_and_no_name_of_another_trainer_is_a_key_of_that_name() -> None:
    every = {program: keys_of(program) for program in PROGRAMS}
    known = {key for keys in every.values() for key in keys}
    assert set(OTHER_NAMES) <= known
    for names in EXPLANATIONS:
        for name in names.split():
            programs = [name for name in PROGRAMS if explanation(every[name], names.split()[0])]
            assert programs, names
            assert all(not named_keys(every[program], name) for program in programs), name


def test_remedies_of_explained_names_are_accepted() -> None:
    text = " ".join(EXPLANATIONS.values())
    remedies = set(re.findall(r"[a-z0-9_.]+=[^ ;,']+(?:,[\d.]+\])?", text))
    assert len(remedies) > 20
    for remedy in remedies:
        key, _, value = re.sub("=N$", "=8", remedy).partition("=")
        programs = [name for name in PROGRAMS if field_at(schema_of(name), key) is not None]
        if key in groups_of("plan"):
            assert value == "NAME" or value in group_files(key), remedy
        else:
            annotation = field_at(schema_of(programs[0]), key)
            TypeAdapter(annotation).validate_python(yaml.safe_load(value))


# ---------------------------------------------------------------- files of the configuration


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{header}train:\n  max_steps: [3\noptim: {{}}\n", "line 4: expected ',' or ']'"),
        ("{header}train:\n\tmax_steps: 3\n", "line 3: found character"),
        ("{header}train: {{}}\ntrain: {{}}\n", "line 3: found duplicate key train"),
        ("{header}defaults:\n  - override /model: llama9\n", "line 3: Could not "),
        ("{header}defaults:\n  - nowhere\n", "line 3: Could not load 'experiment/nowhere'"),
        ("{header}defaults:\n  - override /modell: x\n", "line 3: Could not override 'modell'"),
        ("{header}defaults: x\n", "defaults must be a list"),
        ("{header}- 1\n", "is not a mapping"),
        ("train: {{}}\n", "lacks '# @package _global_'"),
        ("{header}run: {{name: \ud800}}\n", "is not UTF-8 text"),
    ],
)
def test_file_that_cannot_be_composed_is_named_with_its_line(
    tmp_path: Path, text: str, message: str
) -> None:
    file = tmp_path / "experiment" / "mine.yaml"
    file.parent.mkdir()
    content = text.format(header="# @package _global_\n")
    file.write_bytes(content.encode("utf-8", "surrogatepass"))
    [error] = errors_of("train", f"--config-dir={tmp_path}", "experiment=mine")
    assert str(file) in error and message in error and "\n" not in error, error


def test_files_of_another_folder_are_composed(tmp_path: Path) -> None:
    (tmp_path / "experiment").mkdir()
    text = "# @package _global_\ntrain: {max_steps: 7}\n"
    (tmp_path / "experiment" / "mine.yaml").write_text(text)
    assert (
        composed("train", "--config-dir", str(tmp_path), "experiment=mine")["train"]["max_steps"]
        == 7
    )


# ---------------------------------------------------------------- paths


@pytest.mark.parametrize(
    ("word", "remedy"),
    [
        ("run.dir=s3://bucket/run", "run.dir=PATH"),
        ("data.folder=gs://bucket/shards", "data.folder=PATH"),
        ("tokenizer.path=hf://model", "tokenizer.path=PATH"),
        ("run.init_from=file:///weights", "run.init_from=/weights"),
        ("run.init_from=file:/weights", "run.init_from=/weights"),
        ("run.init_from=file://host/weights", "run.init_from=PATH"),
        ("run.dir=", "is empty"),
        ("run.init_from= ", "is empty"),
        ("run.dir=~/runs/x", f"run.dir={Path.home()}/runs/x"),
        ("run.dir=~", f"run.dir={Path.home()}"),
        ("log.profile=20", "use a list: log.profile=[20] or null"),
        ("precision=bf16", "is not a section; set its keys: precision.param"),
        ("train.max_tokens=1e300", "a smaller number or null"),
        (
            "data.sources.stdlib.path=hf://datasets/user/name",
            "data.sources.stdlib.path=user/name with data.sources.stdlib.format=huggingface",
        ),
    ],
)
def test_text_that_would_be_another_path_is_rejected(word: str, remedy: str) -> None:
    with pytest.raises(ConfigError) as raised:
        load_train_config(compose_config("train", [word]))
    assert any(remedy in error for error in raised.value.errors)


@pytest.mark.parametrize("word", ["pp_layers=[2,-1]", "pp_checkpoint=[full,null]"])
def test_remedy_of_an_item_of_a_list_is_valid_for_the_item(word: str) -> None:
    """Null is valid for these keys, but not in the list."""
    with pytest.raises(ConfigError) as raised:
        load_train_config(compose_config("train", [f"parallel.{word}"]))
    [error] = raised.value.errors
    assert "[1]=" in error and "or null" not in error


@pytest.mark.parametrize("value", ["3", "null", "abc", "${x}", "[1]"])
@pytest.mark.parametrize("section", ["run", "train", "log"])
def test_value_of_a_section_is_rejected(section: str, value: str) -> None:
    [error] = errors_of("train", f"{section}={value}")
    assert (
        error.startswith(f"{section}=") and f"is not a section; set its keys: {section}." in error
    )


@pytest.mark.parametrize(
    ("word", "error"),
    [
        ("optim.lr=${train.max_step}", "optim.lr refers to train.max_step, which is not a key; "),
        ("optim.lr=${oc.env:ABSENT}", "optim.lr refers to the environment variable ABSENT, "),
        (
            "train.max_steps=100k",
            "train.max_steps='100k' has the wrong type; use train.max_steps=100e3",
        ),
        (
            "train.max_tokens=1.5T",
            "train.max_tokens='1.5T' has the wrong type; use train.max_tokens=1.5e12 or null",
        ),
        ("train.seq_len=8k", "train.seq_len='8k' has the wrong type; use a valid integer"),
        (
            "run.time_limit=1:00",
            "run.time_limit='1:00' has the wrong type; use a number of minutes",
        ),
    ],
)
def test_only_the_key_with_the_error_is_reported(word: str, error: str) -> None:
    with pytest.raises(ConfigError) as raised:
        load_train_config(compose_config("train", [word]))
    assert [each.startswith(error) for each in raised.value.errors] == [True]


def test_number_of_a_remedy_is_accepted() -> None:
    assert (
        load_train_config(compose_config("train", ["train.max_steps=100e3"])).train.max_steps
        == 10**5
    )
    with pytest.raises(ConfigError, match="Did you mean hardware"):
        load_plan_config(compose_config("plan", ["price=2"]))


@pytest.mark.parametrize(
    ("program", "words", "written"),
    [
        ("convert", ["run", "out"], "checkpoint=run target=out"),
        ("evaluate", ["run"], "checkpoint=run"),
        ("generate", ["run", "a b"], "checkpoint=run 'prompt=a b'"),
        ("train", ["run"], "run.dir=run"),
        ("prepare", ["run"], "inspect=run"),
        ("train", ["kjv.txt"], "data=text data.name=kjv data.sources.text.path=kjv.txt for"),
        ("train", ["my.yaml"], "experiment=NAME"),
    ],
)
def test_path_without_a_key_gets_the_one_it_is_meant_for(
    program: str, words: list[str], written: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("run").mkdir()
    for file in ("run/config.yaml", "kjv.txt", "my.yaml"):
        Path(file).touch()
    [error] = errors_of(program, *words)
    assert f"without keys; write {written}" in error
    assert "without keys" not in errors_of(program, "absent")[0]


def test_switch_for_a_text_gets_a_name_or_null() -> None:
    assert errors_of("train", "--wandb", "true")[0].endswith("write log.wandb=NAME")
    assert errors_of("train", "--no-wandb")[0].endswith("write log.wandb=null")


def test_urls_are_rejected_by_the_other_programs() -> None:
    with pytest.raises(ConfigError, match="inspect=s3://runs is a URL"):
        load_prepare_config(compose_config("prepare", ["inspect=s3://runs"]))


# ---------------------------------------------------------------- help and version


def test_names_that_are_not_utf8_are_rejected(monkeypatch: Any) -> None:
    rejected = r"run.name=\xe9 is not UTF-8; use another name"
    assert errors_of("train", "run.name=\udce9") == [rejected]
    monkeypatch.setattr("os.fsencode", lambda word: word.encode("ascii", "surrogateescape"))
    monkeypatch.setattr("sys.getfilesystemencoding", lambda: "ascii")
    remedy = "run.name=é is not ascii, as the locale; run: export PYTHONUTF8=1"
    assert errors_of("train", "run.name=\udcc3\udca9") == [remedy]


def test_help_lists_the_keys_of_groups_and_version_is_printed(capsys: Any) -> None:
    text = help_text("train")
    for key in ("shard_tokens", "n_kv_heads", "training_characters", "text_column"):
        assert f"{key}:" in text
    for program in ("train", "plan"):
        with pytest.raises(SystemExit):
            compose_config(program, ["--version"])
        version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
        assert capsys.readouterr().out == f"llamesh {version}\n"


def test_help_into_a_closed_pipe_prints_no_trace() -> None:
    script = (
        "import subprocess, sys\n"
        "a = subprocess.Popen([sys.executable, 'prepare.py', '--help'], stdout=-1, stderr=-1)\n"
        "a.stdout.close()\n"
        "print(a.stderr.read().decode(), a.wait())\n"
    )
    assert start_python(["-c", script]).stdout.strip() == "0"
