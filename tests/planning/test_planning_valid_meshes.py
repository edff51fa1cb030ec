"""A search without a valid mesh names the rule, and devices or axes that are valid."""

import re
from collections.abc import Iterator

import pytest
from hydra import compose, initialize_config_dir

from cli.arguments import CONF, plan_arguments
from cli.config import load_plan_config
from plan import search as plan_search
from planning.config import PlanJobConfig
from planning.search import search
from planning.valid_meshes import no_valid_mesh

LLAMA_8B = ("model=llama3_8b", "data=fineweb_edu", "tokenizer=llama3", "hardware=h100")
LLAMA_70B = ("model=llama3_70b", *LLAMA_8B[1:])
BATCH = "train.global_batch_size=512 is not a multiple of the {} data ranks"


@pytest.fixture(scope="module", autouse=True)
def _hydra() -> Iterator[None]:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        yield


def invalid(*words: str) -> str | None:
    """Return the error of `plan.py WORDS search=true`."""
    config, kept = searched(*words)
    return no_valid_mesh(config.request.keeping(*kept), config.n_devices, bool(config.devices))


def searched(*words: str) -> tuple[PlanJobConfig, list[str]]:
    config = load_plan_config(compose("plan", plan_arguments([*words, "search=true"])))
    return config, [word.partition("=")[0] for word in words if word.startswith(("par", "train."))]


@pytest.mark.parametrize(
    ("words", "rule", "numbers"),
    [
        ((*LLAMA_8B, "devices=24"), BATCH.format(24), (16, 32)),
        ((*LLAMA_8B, "devices=7"), BATCH.format(7), (4, 8)),
        ((*LLAMA_70B, "devices=100000"), BATCH.format(100000), (65536, 131072)),
        (
            (*LLAMA_8B, "devices=12", "parallel.tp=8"),
            "parallel.tp=8 needs a multiple of 8 devices",
            (8, 16),
        ),
        (
            (*LLAMA_8B, "devices=1", "parallel.async_tp=true"),
            "parallel.async_tp=true has nothing to overlap with parallel.tp=1",
            (2,),
        ),
        (
            (
                *("experiment=smoke", "hardware=h100", "devices=2"),
                *("train.global_batch_size=1", "parallel.tp=1", "parallel.cp=1"),
            ),
            "train.global_batch_size=1 is not a multiple of the 2 data ranks",
            (1,),
        ),
    ],
)
def test_invalid_number_of_devices_is_named_with_the_nearest_valid_ones(
    words: tuple[str, ...], rule: str, numbers: tuple[int, ...]
) -> None:
    found = invalid(*words)
    assert found is not None and f": {rule}" in found and " 1 devices" not in found
    named = found.partition("; use ")[2].partition(" device")[0]
    assert tuple(map(int, named.split(" or "))) == numbers
    given = next(word for word in words if word.startswith("devices="))
    devices = int(given.partition("=")[2])
    for number in numbers:  # the remedies are valid, and no number between them is
        replaced = [word if word != given else f"devices={number}" for word in words]
        assert invalid(*replaced) is None
    for number in range(max(devices - 4, numbers[0] + 1), min(devices + 4, numbers[-1])):
        replaced = [word if word != given else f"devices={number}" for word in words]
        assert invalid(*replaced) is not None


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (
            ("experiment=h100x8_8b", "parallel.tp=3"),
            "parallel.tp=3 does not divide model.n_kv_heads=8; use 1, 2, 4 or 8",
        ),
        (
            (*LLAMA_8B, "devices=4", "parallel.tp=3"),
            "parallel.tp=3 does not divide model.n_kv_heads=8; use 1, 2 or 4",
        ),
        (
            (*LLAMA_8B, "devices=24", "parallel.tp=3"),
            "parallel.tp=3 does not divide model.n_kv_heads=8; use 1, 2, 4 or 8 on 16 or 32 "
            "devices",
        ),
        (
            (*LLAMA_8B, "devices=16", "parallel.dp_shard=2048"),
            f"{BATCH.format(2048)} (dp_replicate × dp_shard); use parallel.dp_shard=1, 2, 4, 8 or "
            "16",
        ),
    ],
)
def test_given_axis_that_no_mesh_admits_is_named_with_valid_sizes(
    words: tuple[str, ...], error: str
) -> None:
    assert invalid(*words) == error
    options = error.partition("; use ")[2].rpartition("=")[2].partition(" on ")[0]
    numbers = re.findall(r"\d+", error.partition(" on ")[2])
    axis = next(word for word in words if word.startswith("parallel.")).partition("=")[0]
    for size in options.replace(" or ", ", ").split(", "):
        for number in numbers or [None]:
            more = [] if number is None else [f"devices={number}"]
            kept = [w for w in words if not w.startswith((axis, *(["devices"] if more else [])))]
            assert invalid(*kept, f"{axis}={size}", *more) is None


def test_two_given_axes_that_no_mesh_admits_are_both_named() -> None:
    found = invalid(*LLAMA_8B, "devices=9", "parallel.cp=3", "parallel.tp=3")
    assert found is not None and "parallel.cp=3 splits" in found
    assert "parallel.tp=3 does not divide model.n_kv_heads=8; use 1, 2, 4 or 8" in found


def test_given_axes_that_do_not_divide_the_devices_can_be_omitted() -> None:
    found = invalid(*LLAMA_8B, "devices=4", "parallel.tp=8")
    assert found is not None and found.endswith("use 8 devices, or omit parallel.tp")
    assert invalid(*LLAMA_8B, "devices=8", "parallel.tp=8") is None
    assert invalid(*LLAMA_8B, "devices=4") is None


def test_micro_batch_that_divides_no_batch_is_reported_with_its_own_remedy() -> None:
    found = invalid(*LLAMA_8B, "devices=16", "train.micro_batch_size=3")
    assert found is not None and found.startswith("train.micro_batch_size=3 does not divide")


def test_micro_batch_that_divides_no_batch_does_not_hide_an_invalid_axis() -> None:
    words = ("experiment=smoke", "hardware=h100", "devices=4", "train.micro_batch_size=5")
    found = invalid(*words, "parallel.dp_replicate=3")
    assert found is not None and found.startswith("train.global_batch_size=8 is not a multiple of")
    assert found.endswith("; use parallel.dp_replicate=1, 2 or 4")


@pytest.mark.parametrize("devices", [3, 5, 8, 12])
def test_mesh_is_invalid_where_the_search_rejects_every_candidate_as_invalid(devices: int) -> None:
    words = ("experiment=smoke", "hardware=cpu", f"devices={devices}")
    config, _ = searched(*words)
    result = search(config.request, devices, config.hardware, keep=1)
    assert (invalid(*words) is not None) == (not result.best)
    assert result.best or all(reason.startswith("invalid: ") for reason in result.rejections)


def test_program_prints_an_invalid_mesh_instead_of_memory(
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = [*LLAMA_8B, "devices=24", "search=true", "output=null"]
    config, _ = searched(*words[:-2], "output=null")
    assert not plan_search(config, words)
    printed = capsys.readouterr().out
    assert "Invalid configuration: no valid mesh of 24 devices: " in printed
    assert "Does not fit" not in printed and "use 16 or 32 devices" in printed
