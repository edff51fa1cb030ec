"""Progress messages of a preparation."""

from data.progress import ProgressCounts, format_progress


def test_remaining_time_is_omitted_until_bytes_are_counted() -> None:
    """Arrow files and streams count bytes only when a part is complete."""
    message = format_progress(ProgressCounts(0, 0, 0), ProgressCounts(0, 2000, 9000), 3.0, 10**6)
    assert message == "2,000 documents  9,000 tokens  3,000 tokens/s"
    message = format_progress(
        ProgressCounts(0, 0, 0), ProgressCounts(250_000, 4000, 18_000), 6.0, 10**6
    )
    assert message == "4,000 documents  18,000 tokens  3,000 tokens/s  25%  0:00:18 left"
