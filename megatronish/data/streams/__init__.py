"""Text that is read while training runs: where it lies, its shards, and their documents in order."""
