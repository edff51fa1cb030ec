"""Every measured claim, one command each: `python -m bench.NAME`; results in `bench/results/`."""
