"""Bad steps are recomputed on other ranks: bad data is separated from bad hardware."""

import math

import pytest

from training.rerun import Diagnosis, diagnose

NAN, INF = math.nan, math.inf


@pytest.mark.parametrize(
    ("own", "moved", "expected"),
    [
        ([3.0, 4.0], [3.0, 4.0], Diagnosis([], True, [])),  # transient, or of the backward
        ([3.0, NAN], [3.0, NAN], Diagnosis([], True, [1])),  # the samples of part 1
        ([INF, NAN], [NAN, NAN], Diagnosis([], True, [0, 1])),  # the weights
        # Group 1 computes part 1 itself, and part 0 of two or part 2 of three for the others.
        ([3.0, NAN], [NAN, 4.0], Diagnosis([1], True, [])),
        ([3.0, NAN, 5.0], [3.0, 4.0, NAN], Diagnosis([1], True, [])),
        ([3.0, NAN, 5.0], [3.0, 4.0, 5.0], Diagnosis([1], True, [])),
        ([3.0, 4.5, 5.0], [3.0, 4.0, 5.0], Diagnosis([0, 1], False, [])),
        ([3.0, 4.0], [3.0 + 1e-6, 4.0], Diagnosis([], True, [])),  # rounding
    ],
)
def test_group_with_a_wrong_result_is_separated_from_bad_data(
    own: list[float], moved: list[float], expected: Diagnosis
) -> None:
    assert diagnose(own, moved) == expected
