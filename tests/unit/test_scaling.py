"""The model of benchmarks/scaling.py asks for the collectives that the code makes."""

import pytest

from amclip_ds import config as settings
from amclip_ds.plan.work import Work, work_of
from benchmarks.scaling import gathered, gradient_passes

WORLD, LOCAL = 4, 8


def work(recipe: str, *words: str) -> Work:
    asked = [f"batch.global_size={WORLD * LOCAL}", f"batch.per_gpu={LOCAL}", *words]
    return work_of(settings.load(recipe, asked), WORLD)


@pytest.mark.parametrize(
    ("file", "words", "passes"),
    [
        ("zero0_fp32.json", [], 2),
        ("zero1_bf16.json", [], 1),  # reduce-scatter of flat gradients
        ("zero1_bf16.json", ["engine.flat_gradients=false"], 2),
        ("zero1_bf16.json", ["optim.name=muon"], 2),
        ("zero2_bf16.json", [], 2),  # DeepSpeed's all-reduce of buckets
        ("zero3_bf16.json", [], 1),
    ],
)
def test_passes_of_the_gradients(file: str, words: list[str], passes: int) -> None:
    assert gradient_passes(work("aclip-tiny", f"engine.deepspeed={file}", *words)) == passes


def test_every_tensor_that_the_losses_gather_counts() -> None:
    """In fp32, of all ranks: both views' embeddings, the texts', and the features of o2o."""
    found = work("aclip-tiny")
    rows, model, heads = 4.0 * WORLD * LOCAL, found.config.model, found.config.heads
    embeddings = [rows * 2 * model.embed_dim, rows * model.embed_dim]
    assert gathered(found) == [*embeddings, rows * 2 * heads.output_dim]
    assert gathered(work("aclip-tiny", "loss.o2o_weight=0")) == embeddings
