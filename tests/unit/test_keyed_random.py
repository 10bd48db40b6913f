"""One generator set to key after key draws what a new one for each key draws."""

import numpy as np

from amclip_ds.keyed_random import Keyed, keyed


def drawn_from(random: np.random.Generator) -> list:
    """Draws of every kind that a sample makes, an odd count of 32-bit numbers among them: half of a word is left."""
    return [
        random.integers(7),
        random.random((10, 4)).tolist(),
        random.permutation(4).tolist(),
        random.random(7, dtype=np.float32).tolist(),
        random.random(),
    ]


def test_a_generator_that_is_used_again_draws_what_a_new_one_draws() -> None:
    again = Keyed()
    for number in range(50):
        key = (number % 3, "sample", number, "instead of 3" if number % 2 else 0)
        assert drawn_from(again(*key)) == drawn_from(keyed(*key))
        again(*key).random(number, dtype=np.float32)  # whatever was drawn last
    first = again(0, "a")
    assert first.random() == keyed(0, "a").random()
    assert first.random() != keyed(0, "a").random()  # the twin: without a key it draws on
