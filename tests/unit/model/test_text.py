import pytest
import torch
from transformers.models.clip import CLIPTextConfig, CLIPTextModel

from amclip_ds.model.init import Start, initialise
from amclip_ds.model.text import TextConfig, TextTower
from benchmarks.tensor_memory import TensorMemory
from tests.unit.model import tiny


def tower_of(**changes: object) -> TextTower:
    torch.manual_seed(0)
    tower = TextTower(tiny.text_config(**changes))
    with torch.no_grad():
        for parameter in tower.parameters():
            parameter.copy_(torch.randn(parameter.shape) * 0.3)
    return tower


def texts(lengths: tuple[int, ...] = (5, 9, 12), T: int = 16) -> torch.Tensor:
    """Start token 98, words, end token, padding 0."""
    ids = torch.zeros(len(lengths), T, dtype=torch.long)
    draw = torch.Generator().manual_seed(0)
    for row, length in enumerate(lengths):
        ids[row, :length] = torch.randint(1, 90, (length,), generator=draw)
        ids[row, 0], ids[row, length - 1] = 98, tiny.EOS
    return ids


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
def test_equals_transformers(activation: str) -> None:
    tower = tower_of(activation=activation)
    theirs = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=100,
            hidden_size=32,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=16,
            hidden_act=activation,
            eos_token_id=tiny.EOS,
            bos_token_id=None,
            pad_token_id=None,
        )
    )
    assert list(theirs.state_dict()) == list(tower.state_dict())  # in this order, which a checkpoint depends on
    theirs.load_state_dict(tower.state_dict())
    expected = theirs.eval()(texts()).pooler_output
    found = tower(texts())
    torch.testing.assert_close(found, expected)
    found.square().sum().backward()
    expected.square().sum().backward()
    for (name, own), their in zip(tower.named_parameters(), theirs.parameters(), strict=True):
        largest = their.grad.abs().max().item()
        torch.testing.assert_close(own.grad, their.grad, atol=1e-5 * largest + 1e-6, rtol=0, msg=name)
    with torch.no_grad():
        other = tower_of(activation="gelu" if activation == "quick_gelu" else "quick_gelu")
        with pytest.raises(AssertionError):
            torch.testing.assert_close(other(texts()), expected)


def test_trimming_changes_neither_feature_nor_gradient() -> None:
    tower = tower_of()
    features, gradients = [], []
    for T in (16, 12):
        tower.zero_grad()
        feature = tower(texts()[:, :T])
        (feature * torch.arange(32.0)).sum().backward()
        features.append(feature.detach())
        gradients.append({name: p.grad.clone() for name, p in tower.named_parameters()})
    torch.testing.assert_close(features[0], features[1], atol=1e-6, rtol=1e-5)
    for name, gradient in gradients[0].items():
        largest = gradient.abs().max().item()
        torch.testing.assert_close(gradient, gradients[1][name], atol=1e-5 * largest + 2e-6, rtol=0)
    with torch.no_grad(), pytest.raises(AssertionError):  # the twin: trimmed into the longest text
        torch.testing.assert_close(features[0], tower(texts()[:, :11]), atol=1e-6, rtol=1e-5)


def test_pools_at_the_first_end_token() -> None:
    tower = tower_of()
    ids = texts((6,))
    twice = ids.clone()
    twice[0, 9] = tiny.EOS
    earlier = ids.clone()
    earlier[0, 3] = tiny.EOS
    with torch.no_grad():
        torch.testing.assert_close(tower(twice), tower(ids))
        assert not torch.allclose(tower(earlier), tower(ids))


def test_is_causal() -> None:
    tower = tower_of()
    ids = texts((6,))
    after, before = ids.clone(), ids.clone()
    after[0, 10], before[0, 2] = 7, 7
    with torch.no_grad():
        torch.testing.assert_close(tower(after), tower(ids))
        assert not torch.allclose(tower(before), tower(ids))


def test_recomputed_blocks_give_the_same_gradients_in_less_memory() -> None:
    gradients, peaks = [], []
    for every in (0, 1):
        tower = tower_of(checkpoint_every=every, depth=4)
        with TensorMemory() as memory:
            tower(texts()).square().sum().backward()
        gradients.append([parameter.grad for parameter in tower.parameters()])
        peaks.append(memory.peak_bytes)
    assert all(torch.equal(a, b) for a, b in zip(*gradients))
    assert peaks[1] < peaks[0]


def test_refuses_too_long_a_text() -> None:
    with pytest.raises(ValueError, match="17 tokens"):
        tower_of()(torch.zeros(1, 17, dtype=torch.long))


def test_meta_construction_needs_no_buffer() -> None:
    """What to_empty leaves as garbage is filled by name, and the tower reads nothing else."""
    with torch.device("meta"):
        tower = TextTower(tiny.text_config())
    tower.to_empty(device="cpu")
    assert not list(tower.buffers())
    holder = torch.nn.Module()
    holder.text = tower
    initialise(holder, Start(0, tiny.model_config()))
    assert tower(texts()).isfinite().all()


@pytest.mark.parametrize(
    ("changes", "key"),
    [({"activation": "relu"}, "activation"), ({"heads": 5}, "heads"), ({"eos_token_id": 100}, "eos_token_id")],
)
def test_refuses_settings(changes: dict[str, object], key: str) -> None:
    with pytest.raises(ValueError, match=rf"model\.text\.{key}"):
        TextConfig(**{**dict(width=32, heads=4, vocab_size=100, eos_token_id=99), **changes})
