"""One command per measured claim: `python -m bench.NAME`; results are in `bench/results/`."""
