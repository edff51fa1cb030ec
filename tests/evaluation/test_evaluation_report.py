"""The printed tables of `evaluate.py`."""

from evaluation.report import report_lines

LOSS = {"loss": 1.5, "perplexity": 4.4817, "bits_per_byte": 1.25, "targets": 12345}


def test_losses_are_printed_by_source() -> None:
    large = {"loss": 20.0, "perplexity": 485165195.4, "bits_per_byte": 9.0, "targets": 45}
    sources = {"books": LOSS, "code": large}
    results = {"checkpoint": "runs/a", "step": 2000, "data": "shards/a", "seq_len": 2048}
    assert report_lines({**results, **LOSS, "sources": sources}) == [
        "runs/a, step 2,000",
        "held-out text of shards/a, windows of 2,048 tokens",
        "",
        "          loss  perplexity  bits per byte  tokens",
        "all     1.5000        4.48         1.2500  12,345",
        "books   1.5000        4.48         1.2500  12,345",
        "code   20.0000    4.85e+08         9.0000      45",
        "",
    ]
    one = report_lines({**results, **LOSS, "sources": {"books": LOSS}})
    assert one[-2].startswith("all") and len(one) == 6


def test_scores_are_printed_with_standard_errors_and_without_missing_values() -> None:
    scores = {
        "hellaswag": {"alias": "hellaswag", "acc,none": 0.25, "acc_stderr,none": 0.0123},
        "gsm8k": {"exact_match,strict-match": 0.5, "exact_match_stderr,strict-match": None},
        "broken": {"acc,none": None, "acc_stderr,none": None, "sample_len": 3},
    }
    lines = report_lines({"checkpoint": "hf", "step": None, "tasks": {"results": scores}})
    assert lines == [
        "hf",
        "",
        "task       metric                       score  standard error",
        "hellaswag  acc                         0.2500          0.0123",
        "gsm8k      exact_match (strict-match)  0.5000",
        "",
    ]
