"""A checkpoint or run of an older version is read under today's names, its first values are keyed by the first ones."""

from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import save_file

from amclip_ds.checkpoint import load
from amclip_ds.checkpoint.load import FoundCheckpoint
from amclip_ds.checkpoint.manifest import Manifest
from amclip_ds.model import pretrained
from amclip_ds.model.init import Start, init_tensor
from amclip_ds.model.names import MOVED, first_name, present_buffer, present_name
from tests.unit.model import tiny

OLD, NEW = "heads.o2e_projector.layers.0.weight", "objectives.byol.projector.layers.0.weight"


def test_names_go_there_and_back() -> None:
    assert len({now for _, now in MOVED}) == len(MOVED)
    assert present_name(OLD) == NEW and first_name(NEW) == OLD
    assert present_name("vision.cls_token") == first_name("vision.cls_token") == "vision.cls_token"
    assert (
        present_buffer("teacher.heads.o2o.layers.1.running_var")
        == "teacher.objectives.simclr.head.layers.1.running_var"
    )


def test_a_checkpoints_names_are_todays_once_it_is_verified() -> None:
    values: dict[str, Any] = {field.name: None for field in fields(Manifest)}
    manifest = Manifest(
        **(
            values
            | {
                "tensors": {"ema": {OLD: 6}, "master": {OLD: 6, "logit_scale": 1}},
                "shapes": {OLD: [2, 3], "logit_scale": [1]},
            }
        )
    )
    index: Any = SimpleNamespace(pieces={("ema", OLD): ["here"], ("master", "logit_scale"): ["there"]})
    found = load.under_present_names(FoundCheckpoint(Path("x"), manifest, index, {}, ""))
    assert found.manifest.tensors == {"ema": {NEW: 6}, "master": {NEW: 6, "logit_scale": 1}}
    assert found.manifest.shapes == {NEW: [2, 3], "logit_scale": [1]}
    assert found.index.pieces == {("ema", NEW): ["here"], ("master", "logit_scale"): ["there"]}


def test_first_values_are_keyed_by_the_first_name() -> None:
    """The same numbers as before the heads moved: a hash of the draw under the old name."""
    from amclip_ds.model.init import generator, uniform_by_fan_in

    shape, model = (4, 3), tiny.model_config()
    expected = uniform_by_fan_in(generator(7, OLD), shape, model)
    assert torch.equal(init_tensor(NEW, shape, Start(7, model)), expected)
    assert not torch.equal(uniform_by_fan_in(generator(7, NEW), shape, model), expected), "the twin"


def test_weights_of_an_older_run_start_a_new_one(tmp_path: Path) -> None:
    student = tiny.student(seed=3)
    older = {first_name(name): tensor for name, tensor in student.state_dict().items()}
    assert OLD in older
    save_file(older, tmp_path / "student.safetensors")
    source = pretrained.Source(tmp_path)
    assert set(source.names()) == set(student.state_dict())
    for name, tensor in student.state_dict().items():
        assert torch.equal(source.read(name), tensor.float() if tensor.is_floating_point() else tensor), name
