"""What the matrix of worlds and splits compares gradients by (tests/e2e/short_runs.py)."""

import math

import torch

from tests.e2e.short_runs import apart

KEY = "text.encoder.layers.0.self_attn.k_proj.bias"


def test_a_wrong_gradient_of_a_small_tensor_is_seen() -> None:
    """One that leaves the norm of all of them as it was, to 1e-8."""
    right = {"large": torch.full((4,), 10.0), "small": torch.tensor([1e-3, -2e-3]), KEY: torch.tensor([1e-9])}
    assert apart(right, right) == 0.0
    wrong = right | {"small": torch.tensor([1e-3, -1e-3])}
    norms = [math.sqrt(sum(float(g.square().sum()) for g in found.values())) for found in (right, wrong)]
    assert abs(norms[0] - norms[1]) < 1e-8 * norms[0] and math.isclose(apart(right, wrong), 0.5, rel_tol=1e-6)
    assert apart(right, right | {KEY: torch.tensor([-1e-9])}) == 0.0  # rounding alone
    scale = {"logit_scale": torch.tensor([1e-4])}
    assert 4e-6 < apart(scale, {"logit_scale": torch.tensor([1e-4 + 5e-8])}) < 6e-6  # of what cancelled
    assert apart(scale, {"logit_scale": torch.tensor([1.1e-4])}) > 5e-4
    assert apart(right, right | {"small": torch.tensor([1e-3, math.nan])}) == math.inf
