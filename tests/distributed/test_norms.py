"""At ZeRO 2, and 1 with DeepSpeed's own gradients, a group's norm is taken at once and is DeepSpeed's, bit for bit."""

import pytest

from tests.harness import run_ranks


@pytest.mark.parametrize(
    ("ds", "world_size"),
    [
        ("zero2_bf16.json", 2),
        *(
            pytest.param(*cell, marks=pytest.mark.nightly)
            for cell in (("zero2_fp32.json", 1), ("zero2_fp32.json", 3), ("zero1_bf16.json", 2), ("zero1_fp32.json", 1))
        ),
    ],
)
def test_it_is_deepspeeds(ds: str, world_size: int) -> None:
    for found in run_ranks("tests.distributed.cases_engine:norms", world_size=world_size, ds=ds):
        own, theirs = zip(*found)
        assert own == theirs and len(own) % 3 == 0
        *sound, spoilt = (own[at : at + len(own) // 3] for at in range(0, len(own), len(own) // 3))
        assert all(norm >= 0 for norms in sound for norm in norms) and any(norm > 0 for norm in sound[0])
        assert -1 in spoilt
