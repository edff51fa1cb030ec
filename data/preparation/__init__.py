"""Preparation of a dataset: documents → tokenizer → token shards → manifest."""
