"""Data pipeline: text sources, tokenizer, token shards, sample order, packing and batches."""
