"""Randomness keyed by what it is for: the same (seed, epoch, sample, purpose) gives the same numbers everywhere."""

import hashlib

import numpy as np


def keyed(seed: int, *key: int | str) -> np.random.Generator:
    """A Philox generator of its own for each key, whatever was drawn before, on any rank, worker or machine."""
    digest = hashlib.blake2b(repr((seed, *key)).encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=np.frombuffer(digest, dtype=np.uint64)))
