"""Shards on disk: which there are, what they hold, an index of their samples, reading by offset. Knows no training."""
