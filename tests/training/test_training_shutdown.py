"""The summary at the end of a launch."""

from resilience.goodput import Goodput
from training.shutdown import goodput_row


def test_goodput_row_shows_the_ratio_and_every_part() -> None:
    goodput = Goodput(3600.0, 60.0, 120.0, 200.0, 20.0, starts=3, lost_steps=17)
    assert goodput_row(goodput) == (
        "goodput",
        "90.0% of 1:06:40: 1:00:00 productive, 0:01:00 stalled, 0:02:00 lost (17 steps), "
        "0:03:20 starting (3 launches), 0:00:20 other",
    )


def test_goodput_row_omits_parts_that_took_no_time() -> None:
    row = goodput_row(Goodput(3600.0, 0.0, 0.0, 200.0, 0.4, starts=1, lost_steps=0))
    assert row[1].endswith(": 1:00:00 productive, 0:03:20 starting")
