"""Text to token shards to batches: corpora, tokenizer, shard format, order of samples, loader."""
