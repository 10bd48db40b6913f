"""End to end against CLIP_benchmark 1.6.2: its reader, open_clip's model and pixels, its amp off."""

from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from clip_benchmark.datasets.builder import build_dataset
from clip_benchmark.metrics import zeroshot_classification, zeroshot_retrieval

from amclip_ds.comm import SingleProcess
from amclip_ds.evaluate.datasets import EvalSet, open_set
from amclip_ds.evaluate.encoder import encode_images
from amclip_ds.evaluate.source import locate, open_encoder
from amclip_ds.evaluate.tasks import run_task
from tests.unit.evaluate.exports import write_export
from tests.unit.evaluate.test_suites import captions, labels, present_numpy, write  # noqa: F401

pytestmark = pytest.mark.slow

BATCH = 8
CLOSE = 1e-4  # logits nearer than this may change places by the order of sums


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("export") / "open_clip"
    write_export("open_clip", folder)
    return folder


def loader_of(folder: Path, transform: object, task: str = "zeroshot_classification") -> torch.utils.data.DataLoader:
    dataset = build_dataset("wds/set", root=str(folder), transform=transform, split="test", download=False, task=task)
    loader = torch.utils.data.DataLoader(dataset.batched(BATCH), batch_size=None, num_workers=0)
    loader.dataset.classes, loader.dataset.templates = dataset.classes, dataset.templates
    return loader


@pytest.mark.parametrize("preprocess", ["ours", "library"])
def test_classification_is_equal_but_for_near_ties(export: Path, tmp_path: Path, preprocess: str) -> None:
    folder = write(tmp_path / "wds_set", "classification", 7, labels(7))
    model, transform = open_clip.create_model_from_pretrained(f"local-dir:{export}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{export}")
    model.eval()
    loader = loader_of(folder, transform)
    classifier = zeroshot_classification.zero_shot_classifier(
        model, tokenizer, loader.dataset.classes, loader.dataset.templates, "cpu", amp=False
    )
    logits, target = zeroshot_classification.run_classification(model, classifier, loader, "cpu", amp=False)
    data = open_set(str(folder))
    assert target.tolist() == [sample.label for sample in data.samples]
    best = logits.topk(2).values
    near = int((best[:, 0] - best[:, 1] < CLOSE).sum())
    expected = int((logits.argmax(1) == target).sum())
    encoder = open_encoder(locate(export), "student", torch.device("cpu"), preprocess)
    found = run_task(data.task, encoder, data, BATCH, SingleProcess())["metrics"]["acc1"]
    assert abs(round(found * len(data)) - expected) <= near
    ours = encode_images(encoder, data.samples, BATCH, SingleProcess())
    with torch.no_grad():
        theirs = torch.cat([torch.nn.functional.normalize(model.encode_image(images), dim=-1) for images, _ in loader])
    if preprocess == "library":
        assert torch.allclose(ours, theirs, atol=1e-5)


def test_retrieval_is_equal_but_for_near_ties(export: Path, tmp_path: Path) -> None:
    folder = write(tmp_path / "wds_set", "retrieval", 0, captions)
    model, transform = open_clip.create_model_from_pretrained(f"local-dir:{export}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{export}")
    model.eval()
    loader = loader_of(folder, transform, "zeroshot_retrieval")
    expected = zeroshot_retrieval.evaluate(model, loader, tokenizer, "cpu", amp=False, recall_k_list=[1, 5, 10])
    data: EvalSet = open_set(str(folder))
    encoder = open_encoder(locate(export), "student", torch.device("cpu"), "library")
    found = run_task(data.task, encoder, data, BATCH, SingleProcess())["metrics"]
    assert {name: float(np.float32(value)) for name, value in found.items()} == pytest.approx(
        expected, abs=1 / 24
    )  # one near tie
