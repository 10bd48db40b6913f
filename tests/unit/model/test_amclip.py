import pytest
import torch

from amclip_ds.loss import LossConfig
from amclip_ds.loss.comm import SingleProcess
from amclip_ds.loss.outputs import Outputs
from amclip_ds.model.amclip import AClip, ModelConfig, TowerFeatures
from amclip_ds.model.heads import HeadsConfig
from amclip_ds.model.init import persistent_buffers
from amclip_ds.model.teacher_model import TeacherModel, mirrored_names
from amclip_ds.model.vision import VisionConfig
from tests.unit.model import tiny
from tests.unit.model.test_text import texts

IMAGES = torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(0))  # two views of three samples
KEEP = torch.arange(8).expand(6, 8)


def test_parameter_counts_of_the_paper() -> None:
    """ViT-B/16 with teacher and heads: 305,409,281 in all, 176,333,569 trained."""
    with torch.device("meta"):
        student = AClip(ModelConfig(), HeadsConfig(), LossConfig())
        teacher = TeacherModel(ModelConfig(), HeadsConfig(), LossConfig())
    mirrored = mirrored_names([name for name, _ in teacher.named_parameters()], "release")
    own = [p.numel() for name, p in teacher.named_parameters() if name not in mirrored]
    assert sum(p.numel() for p in student.parameters()) + sum(own) == 305_409_281
    assert sum(p.numel() for p in student.parameters() if p.requires_grad) == 176_333_569


def test_sizes() -> None:
    def vision_parameters(**changes: object) -> int:
        with torch.device("meta"):
            student = AClip(ModelConfig(vision=VisionConfig(**changes)), HeadsConfig(), LossConfig())
        return sum(p.numel() for p in student.vision.parameters())

    assert vision_parameters(name="vit_small_patch16_224") == 21_665_664
    assert vision_parameters(name="vit_small_patch16_224", heads=12) == 21_665_664
    assert vision_parameters(name="vit_large_patch16_224") == 303_301_632


def test_all_is_towers_then_heads() -> None:
    student = tiny.student()
    towers = student("towers", images=IMAGES, keep_indices=KEEP, token_ids=texts())
    assert isinstance(towers, TowerFeatures)
    assert towers.cls.shape == (6, 32) and towers.eot.shape == (3, 32)
    split = student("heads", cls=towers.cls, eot=towers.eot, comm=SingleProcess())
    whole = student("all", images=IMAGES, keep_indices=KEEP, token_ids=texts(), comm=SingleProcess())
    assert isinstance(whole, Outputs)
    for name in Outputs._fields:
        if name != "logit_bias":
            assert torch.equal(getattr(split, name), getattr(whole, name)), name
    assert whole.image_embeds.shape == (2, 3, 16) and whole.o2o.shape == (2, 3, 12) and whole.o2e.shape == (2, 3, 12)
    assert whole.logit_scale.item() == pytest.approx(1 / 0.07, rel=1e-5) and whole.logit_bias is None
    torch.testing.assert_close(whole.image_embeds.norm(dim=-1), torch.ones(2, 3))


def test_views_are_the_major_dimension() -> None:
    student = tiny.student()
    outputs = student("all", images=IMAGES, token_ids=texts())
    second_view_of_first = student("image", images=IMAGES[3:4])
    torch.testing.assert_close(outputs.image_embeds[1, 0], second_view_of_first[0])
    torch.testing.assert_close(outputs.text_embeds, student("text", token_ids=texts()))


def test_heads_exist_only_where_their_loss_has_a_weight() -> None:
    plain = tiny.student(loss=LossConfig(o2o_weight=0, o2e_weight=0))
    assert not list(plain.heads.parameters())
    outputs = plain("all", images=IMAGES[:3], token_ids=texts())
    assert outputs.o2o is None and outputs.o2e is None
    assert list(tiny.student(loss=LossConfig(o2o_weight=0)).heads) == ["o2e_projector", "o2e_predictor"]
    assert not list(tiny.teacher(loss=LossConfig(o2e_weight=0)).heads)


def test_every_trainable_parameter_gets_a_gradient() -> None:
    student = tiny.student(loss=LossConfig(kind="sigmoid"))
    outputs = student("all", images=IMAGES, keep_indices=KEEP, token_ids=texts())
    parts = [t for t in outputs if t is not None]
    sum((t * torch.randn(t.shape)).sum() for t in parts).backward()
    without = {name for name, p in student.named_parameters() if p.requires_grad and p.grad is None}
    assert not without


def test_teacher_holds_the_students_names() -> None:
    student, teacher = tiny.student(), tiny.teacher()
    shapes = {name: p.shape for name, p in student.named_parameters()}
    for name, parameter in teacher.named_parameters():
        assert shapes[name] == parameter.shape and not parameter.requires_grad
    assert set(shapes) - {name for name, _ in teacher.named_parameters()} == {
        name for name in shapes if name == "logit_scale" or name.startswith(("heads.o2o.", "heads.o2e_predictor."))
    }


def test_mirrored_names() -> None:
    names = [name for name, _ in tiny.teacher().named_parameters()]
    assert mirrored_names(names, "paper") == set()
    assert mirrored_names(names, "release") == {
        "text.embeddings.token_embedding.weight",
        "text.embeddings.position_embedding.weight",
        "text.final_layer_norm.weight",
        "text.final_layer_norm.bias",
    }


def test_teachers_projector_normalises_by_the_batch_even_in_evaluation_mode() -> None:
    teacher = tiny.teacher().eval()
    projector = teacher.heads["o2e_projector"]
    with torch.no_grad():
        target, scores = teacher("scores", images=IMAGES)
        assert target.shape == (6, 12) and scores.shape == (6, 16)
        assert projector.layers[1].num_batches_tracked == 1
        torch.testing.assert_close(teacher("image", images=IMAGES).norm(dim=-1), torch.ones(6))
        teacher("text", token_ids=texts())
    assert projector.layers[1].num_batches_tracked == 1  # evaluation leaves the statistics alone


def test_runs_with_bf16_parameters_and_fp32_buffers() -> None:
    student, teacher = tiny.student(), tiny.teacher()
    for module in (student, teacher):
        for parameter in module.parameters():
            parameter.data = parameter.data.bfloat16()
        assert all(b.dtype == torch.float32 for b in persistent_buffers(module).values() if b.is_floating_point())
    with torch.no_grad():
        target, scores = teacher("scores", images=IMAGES)
    outputs = student("all", images=IMAGES, keep_indices=KEEP, token_ids=texts())
    assert scores.dtype == outputs.image_embeds.dtype == torch.float32
    assert outputs.o2o.dtype == target.dtype == torch.bfloat16
    outputs.image_embeds.sum().backward()


def test_refuses_an_unknown_phase() -> None:
    with pytest.raises(ValueError, match="phase"):
        tiny.student()("train")
    with pytest.raises(ValueError, match="phase"):
        tiny.teacher()("all")
