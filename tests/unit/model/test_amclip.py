import pytest
import torch

from amclip_ds.comm import SingleProcess
from amclip_ds.model.amclip import AClip
from amclip_ds.model.config import HeadsConfig, LossConfig, ModelConfig, VisionConfig
from amclip_ds.model.features import StudentInputs, ViewGroup
from amclip_ds.model.init import persistent_buffers
from amclip_ds.model.names import first_name, present_name
from amclip_ds.model.teacher_model import TeacherModel, mirrored_names
from amclip_ds.objectives import builder, chosen
from tests.unit.model import tiny
from tests.unit.model.test_text import texts

IMAGES = torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(0))  # two views of three samples
KEEP = torch.arange(8).expand(6, 8)


def test_parameter_counts_of_the_paper() -> None:
    """ViT-B/16 with teacher and heads: 305,409,281 in all, 176,333,569 trained."""
    build = builder(chosen(LossConfig(), HeadsConfig()))
    with torch.device("meta"):
        student, teacher = AClip(ModelConfig(), build), TeacherModel(ModelConfig(), build)
    mirrored = mirrored_names([name for name, _ in teacher.named_parameters()], averages_text_ends=False)
    own = [p.numel() for name, p in teacher.named_parameters() if name not in mirrored]
    assert sum(p.numel() for p in student.parameters()) + sum(own) == 305_409_281
    assert sum(p.numel() for p in student.parameters() if p.requires_grad) == 176_333_569


def test_sizes() -> None:
    def vision_parameters(**changes: object) -> int:
        with torch.device("meta"):
            student = AClip(ModelConfig(vision=VisionConfig(**changes)))
        return sum(p.numel() for p in student.vision.parameters())

    assert vision_parameters(name="vit_small_patch16_224") == 21_665_664
    assert vision_parameters(name="vit_small_patch16_224", heads=12) == 21_665_664
    assert vision_parameters(name="vit_large_patch16_224") == 303_301_632


def test_encode_and_losses_is_encode_then_losses() -> None:
    student = tiny.student()
    inputs, targets = tiny.inputs(IMAGES, texts(), KEEP), tiny.targets(3)
    encoded = student.encode(inputs, targets)
    assert encoded.cls.shape == (2, 3, 32) and encoded.eot["plain"].shape == (3, 32) and encoded.weighted is None
    assert torch.equal(encoded.kept[0], KEEP)
    split = student.losses(encoded.cls, encoded.eot, targets, {}, None, SingleProcess())
    whole, _ = student.encode_and_losses(inputs, targets, SingleProcess())
    assert torch.equal(split.total, whole.total) and split.terms == whole.terms
    assert whole.logit_scale.item() == pytest.approx(1 / 0.07, rel=1e-5) and student.logit_bias is None


def test_views_are_the_major_dimension() -> None:
    student = tiny.student()
    encoded = student.encode(tiny.inputs(IMAGES, texts()), {})
    torch.testing.assert_close(encoded.cls[1, 0], student.vision(IMAGES[3:4]).cls[0])
    torch.testing.assert_close(encoded.eot["plain"], student.text(texts()))
    torch.testing.assert_close(student.embed_images(IMAGES).norm(dim=-1), torch.ones(6))


def test_groups_of_views_come_back_in_the_views_order() -> None:
    """Views of different masks go through the tower apart."""
    student = tiny.student()
    views = IMAGES.unflatten(0, (2, 3))
    second = ViewGroup((1,), views[1:])
    first = ViewGroup((0,), views[:1], (), KEEP[:3])
    encoded = student.encode(StudentInputs((second, first), {"plain": texts()}), {})
    together = student.encode(tiny.inputs(IMAGES, texts(), KEEP), {}).cls
    torch.testing.assert_close(encoded.cls[0], together[0])
    torch.testing.assert_close(encoded.cls[1], student.vision(views[1]).cls)
    assert encoded.kept[0] is None and torch.equal(encoded.kept[1], KEEP[:3])


def test_heads_exist_only_where_their_loss_has_a_weight() -> None:
    plain = tiny.student(loss=LossConfig(o2o_weight=0, o2e_weight=0))
    assert not list(plain.objectives.parameters())
    named = [name for name, _ in tiny.student(loss=LossConfig(o2o_weight=0)).objectives.named_children()]
    assert named == ["contrastive", "byol"]
    assert not list(tiny.teacher(loss=LossConfig(o2e_weight=0)).objectives)


def test_every_trainable_parameter_gets_a_gradient() -> None:
    student = tiny.student(loss=LossConfig(kind="sigmoid"))
    losses, _ = student.encode_and_losses(tiny.inputs(IMAGES, texts(), KEEP), tiny.targets(3), SingleProcess())
    losses.total.backward()
    without = {name for name, p in student.named_parameters() if p.requires_grad and p.grad is None}
    assert not without


def test_names_and_order_of_the_first_edition() -> None:
    """What first values are keyed by, and what DeepSpeed's flat buffers follow."""
    names = [first_name(name) for name, _ in tiny.student().named_parameters() if name.startswith("objectives.")]
    assert list(dict.fromkeys(name.split(".")[1] for name in names)) == ["o2o", "o2e_projector", "o2e_predictor"]
    assert all(name.startswith("heads.") for name in names)
    assert [present_name(name) for name in names] == [
        name for name, _ in tiny.student().named_parameters() if name.startswith("objectives.")
    ]
    assert next(iter(dict(tiny.student().named_parameters()))) == "logit_scale"


def test_teacher_holds_the_students_names() -> None:
    student, teacher = tiny.student(), tiny.teacher()
    shapes = {name: p.shape for name, p in student.named_parameters()}
    for name, parameter in teacher.named_parameters():
        assert shapes[name] == parameter.shape and not parameter.requires_grad
    assert set(shapes) - {name for name, _ in teacher.named_parameters()} == {
        name
        for name in shapes
        if name == "logit_scale" or name.startswith(("objectives.simclr.", "objectives.byol.predictor."))
    }


def test_mirrored_names() -> None:
    names = [name for name, _ in tiny.teacher().named_parameters()]
    assert mirrored_names(names, averages_text_ends=True) == set()
    assert mirrored_names(names, averages_text_ends=False) == {
        "text.embeddings.token_embedding.weight",
        "text.embeddings.position_embedding.weight",
        "text.final_layer_norm.weight",
        "text.final_layer_norm.bias",
    }


def test_teachers_projector_normalises_by_the_batch_even_in_evaluation_mode() -> None:
    teacher = tiny.teacher().eval()
    projector = teacher.objectives["byol"]["projector"]
    with torch.no_grad():
        targets, scores = teacher.observe(IMAGES, frozenset({"cls", "scores"}), SingleProcess())
        [target] = targets["byol"]
        assert target.shape == (6, 12) and scores.shape == (6, 16)
        assert projector.layers[1].num_batches_tracked == 1
        torch.testing.assert_close(teacher.embed_images(IMAGES).norm(dim=-1), torch.ones(6))
        teacher.embed_texts(texts())
    assert projector.layers[1].num_batches_tracked == 1  # evaluation leaves the statistics alone


def test_runs_with_bf16_parameters_and_fp32_buffers() -> None:
    student, teacher = tiny.student(), tiny.teacher()
    for module in (student, teacher):
        for parameter in module.parameters():
            parameter.data = parameter.data.bfloat16()
        assert all(b.dtype == torch.float32 for b in persistent_buffers(module).values() if b.is_floating_point())
    with torch.no_grad():
        targets, scores = teacher.observe(IMAGES, frozenset({"cls", "scores"}), SingleProcess())
        [target] = targets["byol"]
    inputs = tiny.inputs(IMAGES, texts(), KEEP)
    losses, _ = student.encode_and_losses(inputs, {"byol": (target[:3],)}, SingleProcess())
    assert scores.dtype == losses.total.dtype == torch.float32
    assert losses.cls.dtype == target.dtype == torch.bfloat16
    losses.total.backward()
