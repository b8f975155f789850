"""The transformer: its modules, initial weights, key/value cache, accounting and weight files."""
