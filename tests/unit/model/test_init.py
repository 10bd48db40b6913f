import numpy as np
import pytest
import torch

from amclip_ds.errors import UserError
from amclip_ds.model import init
from amclip_ds.model.amclip import ModelConfig
from amclip_ds.model.config import LossConfig
from amclip_ds.model.init import Start, init_tensor, initialise, persistent_buffers
from tests.unit.model import tiny

KNOWN = [-0.004591429606080055, 0.02545737661421299, 0.01045834831893444, 0.005785660818219185]


def test_depends_on_seed_and_name_alone() -> None:
    state = tiny.student().state_dict()
    torch.manual_seed(5)
    np.random.seed(5)
    again = tiny.student().state_dict()
    other = tiny.student(seed=1).state_dict()
    for name, tensor in state.items():
        assert torch.equal(tensor, again[name]), name
    assert not torch.equal(state["vision.cls_token"], other["vision.cls_token"])
    fc1 = "vision.blocks.{}.mlp.fc1.weight"
    assert not torch.equal(state[fc1.format(0)], state[fc1.format(1)])
    alone = init_tensor(fc1.format(1), state[fc1.format(1)].shape, Start(0, tiny.model_config()))
    assert torch.equal(alone, state[fc1.format(1)])  # one parameter, without the rest


def test_known_numbers() -> None:
    """The same start on every machine: a change here breaks the reproducibility of every run."""
    drawn = init_tensor("vision.cls_token", (1, 1, 4), Start(0, ModelConfig()))
    expected = init.generator(0, "vision.cls_token").standard_normal(4, dtype=np.float32) * np.float32(0.02)
    assert np.array_equal(drawn.numpy().ravel(), expected)
    torch.testing.assert_close(drawn.ravel(), torch.tensor(KNOWN), atol=0, rtol=1e-6)


def test_teacher_starts_as_the_student() -> None:
    student = tiny.student().state_dict()
    for name, tensor in tiny.teacher().state_dict().items():
        assert torch.equal(tensor, student[name]), name


def test_spreads_of_the_paper() -> None:
    model = ModelConfig()

    def std(name: str, *shape: int) -> float:
        return init_tensor(name, shape, Start(0, model)).std().item()

    assert std("vision.blocks.3.attn.qkv.weight", 2304, 768) == pytest.approx(0.02, rel=0.01)
    assert std("vision.pos_embed", 1, 197, 768) == pytest.approx(0.02, rel=0.01)
    assert std("vision.patch_embed.proj.weight", 768, 3, 16, 16) == pytest.approx(768**-0.5 / 3**0.5, rel=0.01)
    assert std("text.embeddings.token_embedding.weight", 4000, 512) == pytest.approx(0.02, rel=0.01)
    assert std("text.embeddings.position_embedding.weight", 77, 512) == pytest.approx(0.01, rel=0.02)
    assert std("text.encoder.layers.0.self_attn.q_proj.weight", 512, 512) == pytest.approx(512**-0.5, rel=0.01)
    assert std("text.encoder.layers.0.self_attn.out_proj.weight", 512, 512) == pytest.approx(
        (512 * 24) ** -0.5, rel=0.01
    )
    assert std("text.encoder.layers.9.mlp.fc1.weight", 2048, 512) == pytest.approx(1024**-0.5, rel=0.01)
    assert std("text.encoder.layers.9.mlp.fc2.weight", 512, 2048) == pytest.approx((512 * 24) ** -0.5, rel=0.01)
    assert std("image_projection.weight", 512, 768) == pytest.approx(768**-0.5, rel=0.01)
    assert std("text_projection.weight", 512, 512) == pytest.approx(512**-0.5, rel=0.01)
    assert std("objectives.simclr.head.layers.0.weight", 4096, 768) == pytest.approx(768**-0.5 / 3**0.5, rel=0.01)


def test_constants() -> None:
    state = tiny.student().state_dict()
    for name, tensor in state.items():
        if "norm" in name and name.endswith("weight"):
            assert (tensor == 1).all(), name
        if name.endswith("bias") and "patch_embed" not in name:
            assert (tensor == 0).all(), name
    assert state["logit_scale"].item() == pytest.approx(np.log(1 / 0.07))
    siglip = tiny.student(loss=LossConfig(kind="sigmoid")).state_dict()
    assert siglip["logit_scale"].item() == pytest.approx(np.log(10)) and siglip["logit_bias"].item() == -10


def test_sincos_positions() -> None:
    position = tiny.student(tiny.model_config(position_init="sincos")).vision.pos_embed
    assert position.shape == (1, 17, 32) and (position[:, 0] == 0).all()
    assert position.abs().max().item() == pytest.approx(0.3)
    assert len(position[0, 1:].unique(dim=0)) == 16


def test_a_parameter_without_a_rule_is_refused() -> None:
    student = tiny.student()
    student.vision.register_parameter("newcomer", torch.nn.Parameter(torch.zeros(3)))
    with pytest.raises(UserError, match="vision.newcomer"):
        initialise(student, Start(0, tiny.model_config()))


def test_every_tensor_is_drawn_whatever_the_threads() -> None:
    student = tiny.student()
    tensors = {**dict(student.named_parameters()), **persistent_buffers(student)}
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        with torch.no_grad():
            for tensor in tensors.values():
                tensor.fill_(torch.nan if tensor.is_floating_point() else -1)
        initialise(student, Start(0, tiny.model_config()))
    finally:
        torch.set_num_threads(threads)
    for name, tensor in tensors.items():
        assert torch.equal(tensor, init_tensor(name, tensor.shape, Start(0, tiny.model_config()))), name


def test_low_precision_parameters_get_the_rounded_values() -> None:
    exact = tiny.student()
    rounded = tiny.student().bfloat16()
    initialise(rounded, Start(0, tiny.model_config()))
    for name, tensor in exact.named_parameters():
        assert torch.equal(tensor.bfloat16(), rounded.get_parameter(name)), name
