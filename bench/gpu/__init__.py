"""`make gpu`: checks and measurements on one GPU in under eight minutes (`bench.gpu.__main__`)."""
