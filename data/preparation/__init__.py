"""From rows to shards: parts, worker processes, and how a stopped preparation goes on."""
