"""Resume policy: each key declares one, and a launch reports every forbidden change."""

import dataclasses
import json
import shlex
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

import pytest
from hydra import compose, initialize_config_dir
from run_config import CONFIG, changed, commit, default, leaves, other, value_at

from cli.arguments import CONF, hydra_arguments
from cli.config import load_train_config
from resilience.run_folder import RunFolder, RunFolderError
from training.config import JobConfig
from training.config_validation import plain
from training.resume_policy import Changes, compare, policy_of, with_defaults
from training.run_folder_check import check_run_folder

SAMPLES = 128  # taken by the newest checkpoint of `folder`: whole batches of the default size


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    """Return a run of the default configuration with checkpoints."""
    folder = RunFolder(tmp_path / "run")
    folder.write_config(CONFIG)
    commit(folder, 5)
    commit(folder, 60, samples=SAMPLES)
    return folder


def refused(folder: RunFolder, config: dict[str, Any]) -> str:
    """Return the error of a launch, after checking that nothing was written."""
    before = {path: path.read_bytes() for path in folder.path.rglob("*") if path.is_file()}
    with pytest.raises(RunFolderError) as error:
        check_run_folder(folder, config)
    assert {path: path.read_bytes() for path in folder.path.rglob("*") if path.is_file()} == before
    return str(error.value)


def lines(message: str) -> list[str]:
    return [line.strip() for line in message.splitlines()]


def change(key: str) -> str | None:
    policy = policy_of(key)
    return policy.change if policy else None


# ---------------------------------------------------------------- policies


def schema_keys(schema: Any, prefix: str = "") -> list[str]:
    """Return every key of a configuration; `some` stands for a name chosen by the user."""
    found = []
    for name, annotation in get_type_hints(schema).items():
        if name.startswith("__"):
            continue
        members = get_args(annotation) if get_origin(annotation) in (Union, UnionType) else ()
        inner = next(filter(dataclasses.is_dataclass, (annotation, *members)), None)
        if get_origin(annotation) is dict:
            found.append(f"{prefix}{name}.some")
            found += schema_keys(get_args(annotation)[1], f"{prefix}{name}.some.")
        elif inner is not None:
            found += [f"{prefix}{name}"] if members else []  # or null
            found += schema_keys(inner, f"{prefix}{name}.")
        else:
            found.append(f"{prefix}{name}")
    return found


KEYS = schema_keys(JobConfig)


def test_every_key_has_a_policy() -> None:
    assert {"run.seed", "data.sources.some.weight", "model.rope_scaling.factor"} <= set(KEYS)
    assert [key for key in KEYS if policy_of(key) is None] == []


def test_new_keys_have_no_policy_by_default() -> None:
    """A key added to a section that affects results must declare its policy."""
    sections = ("model", "precision", "data", "tokenizer", "train", "optim", "run")
    assert [policy_of(f"{section}.new") for section in sections] == [None] * len(sections)


@pytest.mark.parametrize(
    ("expected", "keys"),
    [
        ("free", "parallel.tp parallel.dp_shard train.micro_batch_size data.workers optim.lr"),
        ("free", "checkpoint.interval validation.interval log.interval run.time_limit"),
        ("forbidden", "model.dim model.n_layers model.n_kv_heads model.ffn_dim model.vocab_size"),
        ("forbidden", "run.seed data.sources.web data.sources.web.path data.sources.web.weight"),
        ("forbidden", "data.validation_fraction tokenizer.name tokenizer.vocab_size train.seq_len"),
    ],
)
def test_policies_of_documented_keys(expected: str, keys: str) -> None:
    assert {key: change(key) for key in keys.split()} == dict.fromkeys(keys.split(), expected)


def test_policy_closest_to_the_key_applies() -> None:
    """The weight of a source belongs to the sample order, as the batch size does."""
    assert policy_of("data.sources.web.path") == policy_of("data.sources")
    weight, size = policy_of("data.sources.web.weight"), policy_of("train.seq_len")
    assert weight and size and weight.decides == size.decides


# ---------------------------------------------------------------- one change


REQUESTS = ("run.resume", "run.allow_changes")  # other values request another action


@pytest.mark.parametrize(
    "key", [key for key in leaves(CONFIG) if change(key) == "free" and key not in REQUESTS]
)
def test_free_key_changes_and_is_reported(folder: RunFolder, key: str) -> None:
    difference = {key: [value_at(CONFIG, key), other(key)]}
    assert check_run_folder(folder, changed(key, other(key))) == Changes(free=difference)


@pytest.mark.parametrize("key", [key for key in leaves(CONFIG) if change(key) == "forbidden"])
def test_forbidden_key_is_rejected_with_both_values_despite_an_override(
    folder: RunFolder, key: str
) -> None:
    config = changed(key, other(key))
    found = f"  {key}: {value_at(CONFIG, key)!r} -> {other(key)!r} (determines "
    message = refused(folder, config)
    assert found in message and "run.dir=" in message and "run.allow_changes" not in message
    message = refused(folder, changed("run.allow_changes", [key], of=config))
    assert f"run.allow_changes lists {key}, which cannot change within a run" in message


def suggested_value(message: str, key: str) -> Any:
    """Return the value that a message suggests for a key, as the program parses it."""
    [word] = [word for word in shlex.split(message) if word.startswith(f"{key}=")]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        composed = compose("train", hydra_arguments([word], "train"))
    return value_at(plain(load_train_config(composed)), key)


@pytest.mark.parametrize("key", [key for key in leaves(CONFIG) if change(key) == "override"])
def test_override_from_the_error_message_permits_the_change(folder: RunFolder, key: str) -> None:
    config = changed(key, other(key))
    message = refused(folder, config)
    difference = [value_at(CONFIG, key), other(key)]
    assert f"  {key}: {difference[0]!r} -> {difference[1]!r} (determines " in message
    allowed = changed("run.allow_changes", suggested_value(message, "run.allow_changes"), of=config)
    changes = check_run_folder(folder, allowed)
    assert changes.allowed == {key: difference} and set(changes.free) == {"run.allow_changes"}
    folder.write_config(allowed)  # as a launch does before training
    assert check_run_folder(folder, allowed) == Changes()  # requeued job
    assert set(check_run_folder(folder, config).free) == {"run.allow_changes"}


# ---------------------------------------------------------------- many changes at once


def test_all_changes_are_reported_together_by_policy(folder: RunFolder) -> None:
    config = changed(
        *("model.dim", 64, "run.seed", 9, "optim.lr", 1.0, "train.max_grad_norm", 2.0),
        *("optim.eps", 1e-6, "data.document_mask", False),
        *("run.allow_changes", ["data.document_mask", "optim.lr"]),
    )
    kept, rest = refused(folder, config).split("These keys change only with an explicit override:")
    asking, may = rest.split("Also changed, which is permitted:")
    assert "These keys cannot change within a run:" in kept and "run.dir=" in kept
    found = {
        name: {line.split(":")[0] for line in lines(part)} & set(leaves(CONFIG))
        for name, part in (("kept", kept), ("asking", asking), ("may", may))
    }
    assert found == {
        "kept": {"run.seed", "model.dim"},
        "asking": {"train.max_grad_norm", "optim.eps"},
        "may": {"data.document_mask", "optim.lr", "run.allow_changes"},
    }
    # The suggested override includes what was allowed before.
    names = suggested_value(asking, "run.allow_changes")
    config = changed(
        *("model.dim", CONFIG["model"]["dim"], "run.seed", 0, "run.allow_changes", names), of=config
    )
    allowed = {"train.max_grad_norm", "optim.eps", "data.document_mask"}
    assert set(check_run_folder(folder, config).allowed) == allowed
    assert len(check_run_folder(folder, config).rows()) == len(allowed) + len(
        ("lr", "allow_changes")
    )


def test_changed_set_of_sources_is_rejected(folder: RunFolder) -> None:
    more = changed("data.sources.more", {"format": "text", "path": "books"})
    assert "data.sources.more: None -> {" in refused(folder, more)


def test_path_of_local_files_may_change_and_the_name_of_a_hub_dataset_may_not(
    folder: RunFolder, tmp_path: Path
) -> None:
    """The tokens are compared by their hash when the data is opened."""
    sources = {
        "web": {"format": "text", "path": "books/", "weight": 1.0},
        "hub": {"format": "huggingface", "path": "owner/name", "weight": 1.0},
    }
    config = changed("data.sources", sources)
    folder.write_config(config)
    moved = changed("data.sources.web.path", "/elsewhere/books", of=config)
    assert set(check_run_folder(folder, moved).free) == {"data.sources.web.path"}
    copied = changed("data.sources.hub.path", str(tmp_path), of=config)
    assert set(check_run_folder(folder, copied).free) == {"data.sources.hub.path"}
    for key, value in (("hub.path", "owner/other"), ("web.format", "jsonl"), ("web.path", None)):
        assert f"data.sources.{key}" in refused(
            folder, changed(f"data.sources.{key}", value, of=config)
        )


def test_override_of_a_section_covers_its_keys(folder: RunFolder) -> None:
    factor = "model.rope_scaling.factor"
    config = changed(factor, 8.0, "run.allow_changes", ["model.rope_scaling"])
    assert set(check_run_folder(folder, config).allowed) == {factor}


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("optim.weigth_decay", "did you mean optim.weight_decay?"),
        ("optim", "is not a key"),
        ("parallel.new", "is not a key"),
        ("xyz", "list keys like"),
    ],
)
def test_unknown_names_in_allow_changes_are_rejected(tmp_path: Path, name: str, said: str) -> None:
    """Already at the first launch: a later one may be unattended."""
    message = refused(RunFolder(tmp_path), changed("run.allow_changes", ["optim.eps", name]))
    assert message.startswith(f"run.allow_changes lists {name}, ") and said in message


# ---------------------------------------------------------------- stages


@pytest.mark.parametrize(
    ("before", "now", "allowed"),
    [
        (None, [{"from_sample": SAMPLES, "seq_len": 512}], True),
        (None, [{"from_sample": SAMPLES - 1, "seq_len": 512}], False),
        ([{"from_sample": 80, "seq_len": 512}], None, False),
        ([{"from_sample": 160, "seq_len": 512}], None, True),
        (
            [{"from_sample": 80, "seq_len": 512}, {"from_sample": 160, "seq_len": 1024}],
            [{"from_sample": 80, "seq_len": 512}, {"from_sample": SAMPLES, "seq_len": 2048}],
            True,
        ),
        ([{"from_sample": 80, "seq_len": 512}], [{"from_sample": 80, "seq_len": 256}], False),
        (
            [{"from_sample": 80, "micro_batch_size": 4}],
            [{"from_sample": 80, "micro_batch_size": 2}],  # free, as train.micro_batch_size
            True,
        ),
        ([{"from_sample": 80, "micro_batch_size": 4}], None, False),
        ([{"from_sampel": 80}], None, False),  # a file edited by hand
        ([{"from_sample": "80"}], None, False),
        ([80], None, False),
        (80, None, False),
    ],
)
def test_future_stages_may_change(folder: RunFolder, before: Any, now: Any, allowed: bool) -> None:
    folder.write_config(changed("data.stages", before))
    if allowed:
        changes = check_run_folder(folder, changed("data.stages", now))
        assert changes == Changes(free={"data.stages": [before, now]})
    else:
        assert "data.stages: " in refused(folder, changed("data.stages", now))


def test_stage_from_the_error_message_permits_new_sizes_and_weights(folder: RunFolder) -> None:
    config = changed(
        *("train.seq_len", 128, "train.global_batch_size", 4, "data.sources.stdlib.weight", 2.0)
    )
    message = refused(folder, config)
    [stage] = suggested_value(message, "data.stages")
    wanted = {"seq_len": 128, "global_batch_size": 4, "weights": {"stdlib": 2.0}}
    assert stage == {"from_sample": SAMPLES, "micro_batch_size": None, **wanted}
    assert check_run_folder(folder, changed("data.stages", [stage])).forbidden == {}
    # With existing stages, the user decides where to insert it.
    config = changed("data.stages", [{"from_sample": 500, "seq_len": 64}], of=config)
    assert f"{{from_sample:{SAMPLES},global_batch_size:4," in refused(folder, config)
    assert "data.stages=" not in refused(folder, config)


# ---------------------------------------------------------------- other versions


def without(config: Any, names: set[str]) -> Any:
    """Return a configuration without keys of these names at any level."""
    if isinstance(config, list):
        return [without(one, names) for one in config]
    if not isinstance(config, dict):
        return config
    return {key: without(value, names) for key, value in config.items() if key not in names}


def test_new_keys_at_their_defaults_are_not_changes() -> None:
    typed = default()
    stages = [{"from_sample": 64, "seq_len": 128}]
    typed = dataclasses.replace(
        typed,
        data=load_train_config_with_stages(stages),
        checkpoint=dataclasses.replace(typed.checkpoint, when_busy="skip"),
        optim=dataclasses.replace(typed.optim, weight_decay=0.3),
    )
    now = plain(typed)
    added = {"faults", "watchdog", "when_busy", "allow_changes", "streaming", "weight_decay"}
    old = without(now, added | {"micro_batch_size", "rope_scaling"})
    assert len(leaves(old)) < len(leaves(now)) - len(added)
    filled = with_defaults(old, typed)
    changes = compare(filled, now, samples=SAMPLES)
    # Keys that differ from their default did change.
    assert changes.free == {
        "checkpoint.when_busy": ["wait", "skip"],
        "train.micro_batch_size": [None, 1],
    }
    assert changes.unlisted == {
        "optim.weight_decay": [0.1, 0.3],
        "model.rope_scaling": [None, now["model"]["rope_scaling"]],
    }
    assert changes.forbidden == changes.allowed == {}
    assert with_defaults(now, typed) == now


def load_train_config_with_stages(stages: list[dict[str, int]]) -> Any:
    """Return the default data section with stages."""
    typed = ",".join(
        "{" + ",".join(f"{key}:{value}" for key, value in stage.items()) + "}" for stage in stages
    )
    with initialize_config_dir(str(CONF), version_base="1.3"):
        words = hydra_arguments([f"data.stages=[{typed}]"], "train")
        return load_train_config(compose("train", words)).data


def test_removed_key_needs_one_override_unless_it_was_null(folder: RunFolder) -> None:
    folder.write_config(changed("optim.nesterov", True, "optim.ema", None, "log.comet", "project"))
    assert "optim.nesterov: True -> None (determines a setting" in refused(folder, CONFIG)
    allowed = changed("run.allow_changes", ["optim.nesterov"])
    changes = check_run_folder(folder, allowed)
    assert changes.allowed == {"optim.nesterov": [True, None]}
    assert set(changes.free) == {"log.comet", "run.allow_changes"}
    folder.write_config(allowed)
    assert (
        check_run_folder(folder, allowed) == Changes()
    )  # requeued job, where no file has the key any longer


def test_lost_configuration_is_read_from_the_newest_checkpoint(
    folder: RunFolder,
) -> None:
    folder.config.unlink()
    commit(folder, 70, changed("run.seed", 3))
    commit(folder, 80)
    (folder.step_folder(80) / "manifest.json").write_text("{")
    assert "run.seed: 3 -> 0" in refused(folder, CONFIG)
    assert check_run_folder(folder, changed("run.seed", 3)) == Changes()


# ---------------------------------------------------------------- another run's checkpoint


@pytest.fixture
def new(tmp_path: Path) -> RunFolder:
    """Return the folder of a run that has not started."""
    return RunFolder(tmp_path / "new")


@pytest.mark.parametrize(
    "key",
    [key for key in leaves(CONFIG) if key not in REQUESTS],
)
def test_start_from_another_run_checks_only_tensors_and_position(
    folder: RunFolder, new: RunFolder, key: str
) -> None:
    policy = policy_of(key)
    assert policy is not None
    checkpoint = str(folder.step_folder(60))
    config = changed("run.resume", checkpoint, key, other(key))
    if not policy.on_load:
        assert check_run_folder(new, config).free[key] == [value_at(CONFIG, key), other(key)]
        return
    message = refused(new, config)
    assert message.startswith(f"run.resume={checkpoint} does not match")
    difference = f"{value_at(CONFIG, key)!r} -> {other(key)!r}"
    assert f"  {key}: {difference} (determines {policy.decides})" in message


def test_start_from_another_run_changes_sizes_by_a_stage(folder: RunFolder, new: RunFolder) -> None:
    config = changed("run.resume", str(folder.step_folder(60)), "train.global_batch_size", 4)
    stages = suggested_value(refused(new, config), "data.stages")
    config["train"], config["data"]["stages"] = CONFIG["train"], stages
    assert check_run_folder(new, config).free["data.stages"] == [None, stages]


def test_command_that_started_a_run_resumes_it(folder: RunFolder, new: RunFolder) -> None:
    """A requeued job repeats its command."""
    checkpoint = folder.step_folder(5)
    config = changed("run.resume", str(checkpoint), "run.seed", 7)
    check_run_folder(new, config)
    new.write_config(config)
    assert new.resume_source(str(checkpoint)) == str(checkpoint)  # killed before its first save
    check_run_folder(new, config)
    commit(new, 10, config)
    assert new.resume_source(str(checkpoint)) == "auto"
    assert check_run_folder(new, config) == Changes()
    assert "run.seed: 7 -> 8" in refused(new, changed("run.seed", 8, of=config))
    # Another checkpoint than the initial one is rejected.
    further = changed("run.resume", str(commit(folder, 7)), of=config)
    assert "is before step 10" in refused(new, further)
    # One of a later step is loaded as requested.
    ahead = str(folder.step_folder(60))
    new.write_config(changed("run.resume", ahead, of=config))
    assert new.resume_source(ahead) == ahead


@pytest.mark.parametrize(
    "manifest",
    [
        *("{", "[]", "", '{"position": {"step": 5, "samples": 10}}'),
        '{"position": {"step": "5", "samples": 10}, "config": {}}',
        '{"position": {"step": 5}, "config": {}}',
        '{"position": 5, "config": {}}',
    ],
)
def test_damaged_manifest_is_reported(folder: RunFolder, new: RunFolder, manifest: str) -> None:
    checkpoint = folder.step_folder(5)
    (checkpoint / "manifest.json").write_text(manifest)
    message = refused(new, changed("run.resume", str(checkpoint)))
    assert lines(message) == [message]
    assert f"run.resume={checkpoint} is damaged" in message and "another checkpoint" in message


def test_recorded_changes_are_json(folder: RunFolder) -> None:
    config = changed("optim.betas", [0.8, 0.9], "run.allow_changes", ["optim.betas"])
    changes = check_run_folder(folder, config)
    for recorded in (changes.free, changes.allowed):
        assert json.loads(json.dumps(recorded)) == recorded
