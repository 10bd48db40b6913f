"""On a real GPU, whose products TF32 may round: what a mask keeps is the same with and without it, as on the CPU."""

import pytest
import torch
from torch import Tensor

from amclip_ds.masks import MaskConfig
from amclip_ds.masks.selection import select
from tests.unit.masks.test_other_masks import inputs_of

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine"),
]


@pytest.mark.parametrize("strategy", ["cluster", "pgs"])
def test_tf32_changes_no_choice(strategy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    given = inputs_of(strategy, rows=64)
    on_gpu = {name: value.cuda() for name, value in given._asdict().items() if isinstance(value, Tensor)}
    config = MaskConfig(strategy, 0.25, 1)
    found = []
    for flag in (True, False):
        monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", flag)
        found.append(select(config, given._replace(**on_gpu)))
    expected = select(config, given)
    assert found[0] is not None and found[1] is not None and expected is not None
    assert torch.equal(found[0], found[1]) and torch.equal(found[0].cpu(), expected)
