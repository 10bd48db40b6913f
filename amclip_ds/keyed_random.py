"""Randomness keyed by what it is for: the same (seed, epoch, sample, purpose) gives the same numbers everywhere."""

import hashlib
import struct

import numpy as np

KEY = struct.Struct("=2Q")
ZEROS = (0, 0, 0, 0)


def keyed(seed: int, *key: int | str) -> np.random.Generator:
    """A Philox generator of its own for each key, whatever was drawn before, on any rank, worker or machine."""
    return np.random.Generator(np.random.Philox(key=np.frombuffer(_digest(seed, key), dtype=np.uint64)))


class Keyed:
    """`keyed` for many keys in turn: one generator, set to the beginning of each key's numbers.

    A new generator gathers entropy first, which a key makes useless: four times the time.
    """

    def __init__(self) -> None:
        self._generator = keyed(0)

    def __call__(self, seed: int, *key: int | str) -> np.random.Generator:
        """Draws what keyed(seed, *key) draws, until the next call."""
        self._generator.bit_generator.state = {
            "bit_generator": "Philox",
            "state": {"counter": ZEROS, "key": KEY.unpack(_digest(seed, key))},
            "buffer": ZEROS,
            "buffer_pos": len(ZEROS),  # used up: the next draw counts on
            "has_uint32": 0,
            "uinteger": 0,
        }
        return self._generator


def _digest(seed: int, key: tuple[int | str, ...]) -> bytes:
    return hashlib.blake2b(repr((seed, *key)).encode(), digest_size=16).digest()
