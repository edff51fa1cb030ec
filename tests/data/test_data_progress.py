"""What is told of a preparation, from its counts alone."""

from data.progress import Done, _told


def test_input_that_counts_no_bytes_until_a_part_is_done_has_no_time_left_yet() -> None:
    """As rows of Arrow files and of streams do."""
    told = _told(Done(0, 0, 0), Done(0, 2000, 9000), 3.0, 10**6)
    assert told == "2,000 documents  9,000 tokens  3,000 tokens/s"
    told = _told(Done(0, 0, 0), Done(250_000, 4000, 18_000), 6.0, 10**6)
    assert told == "4,000 documents  18,000 tokens  3,000 tokens/s  25%  0:00:18 left"
