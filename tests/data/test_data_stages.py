"""The closed form of the samples of each step with stages equals counting step by step."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.config import DataConfig, SourceConfig, StageConfig
from data.stages import Stages, plan_stages

SOURCES = {"a": SourceConfig("stdlib"), "b": SourceConfig("stdlib", weight=0.5)}


def planned(*changes: StageConfig, batch: int = 4) -> tuple[Stages, list[str]]:
    data = DataConfig("x", "x", SOURCES, stages=list(changes))
    return plan_stages(data, seq_len=8, global_batch_size=batch, micro_batch_size=2)


@settings(deadline=None)
@given(
    changes=st.lists(
        st.tuples(
            st.integers(1, 5),
            st.sampled_from([None, 16, 32]),
            st.sampled_from([None, 2, 12]),
            st.sampled_from([None, {"b": 2.0}, {"a": 0.0}]),
        ),
        max_size=4,
    )
)
def test_any_stages_equal_counting_step_by_step(
    changes: list[tuple[int, int | None, int | None, dict[str, float] | None]],
) -> None:
    configs, expected = [], []
    samples = tokens = 0
    seq_len, batch, weights = 8, 4, {"a": 1.0, "b": 0.5}

    def take(steps: int) -> None:
        nonlocal samples, tokens
        for _ in range(steps):
            expected.append((samples, tokens, seq_len, batch, dict(weights)))
            samples, tokens = samples + batch, tokens + batch * seq_len

    for steps, new_len, new_batch, new_weights in changes:
        take(steps)
        configs.append(StageConfig(samples, new_weights, new_len, new_batch))
        seq_len, batch = new_len or seq_len, new_batch or batch
        weights = weights | (new_weights or {})
    take(6)
    stages, problems = planned(*configs)
    assert problems == []
    actual = []
    for step in range(len(expected)):
        stage = stages.at(step)
        first = stages.first_sample(step), stages.first_token(step)
        actual.append((*first, stage.seq_len, stage.global_batch_size, dict(stage.weights)))
        assert stage.micro_batch_size == 2
    assert actual == expected


def test_stage_that_starts_within_a_step_or_has_no_source_is_rejected() -> None:
    _, [problem] = planned(StageConfig(8), StageConfig(10, global_batch_size=2))
    assert problem.startswith("data.stages[1].from_sample=10 ") and problem.endswith("12")
    _, [problem] = planned(StageConfig(8, {"a": 0.0, "b": 0.0}))
    assert problem.startswith("data.stages[0].weights")


@pytest.mark.parametrize("step", [0, 1, 10**12])
def test_run_without_stages_is_a_single_stage(step: int) -> None:
    stages, _ = planned()
    assert (stages.first_sample(step), stages.first_token(step)) == (4 * step, 32 * step)
