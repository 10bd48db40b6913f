"""Masked words: which places are hidden, what is predicted there, and that pieces add up."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from amclip_ds import config
from amclip_ds.comm import SingleProcess
from amclip_ds.data.captions import build_tokenizer
from amclip_ds.masks.text.cloze import hide, num_hidden
from amclip_ds.method import method_of
from amclip_ds.model.amclip import AClip, Sizes
from amclip_ds.model.config import MLMOptions
from amclip_ds.model.features import Features
from amclip_ds.model.init import initialise
from amclip_ds.objectives import OBJECTIVES, builder, mlm, start_of
from amclip_ds.objectives.mlm import MLM, hidden_places, in_text
from tests.unit.model import tiny

B, T, WIDTH, WORDS = 6, 12, 32, 100
SIZES = Sizes(32, WIDTH, 16, 4, 8, 16, WORDS)
LENGTHS = (12, 9, 3, 2, 7, 12)  # of texts, start and end among them; one holds no word


def rows(share: float = 0.4, places: int = T) -> tuple[torch.Tensor, torch.Tensor]:
    """Texts of LENGTHS, plain and with words hidden, [B, places]."""
    random = np.random.default_rng(0)
    plain = np.zeros((len(LENGTHS), places), np.int64)
    for row, length in zip(plain, LENGTHS):
        row[:length] = [98, *random.integers(0, 90, length - 2), tiny.EOS]
    cloze = [hide(row, length, random.random(16), share) for row, length in zip(plain, LENGTHS)]
    return torch.from_numpy(plain), torch.from_numpy(np.stack(cloze))


def objective(share: float = 0.4) -> MLM:
    torch.manual_seed(0)
    return MLM(MLMOptions(0.05, share=share, depth=2), SIZES)


def given(share: float = 0.4, padded: int = 0) -> Features:
    ids = F.pad(rows(share)[1], (0, padded))
    torch.manual_seed(1)
    tokens = F.pad(torch.randn(B, T, WIDTH), (0, 0, 0, padded), value=7.0)
    return Features(tokens=tokens, token_ids=ids, vocabulary=torch.randn(WORDS, WIDTH) * 0.1)


def loss_of(features: Features, made: MLM | None = None) -> torch.Tensor:
    return (made or objective()).per_sample(features, ())["mlm"]


def test_start_end_and_padding_are_never_hidden_and_a_fifth_of_the_words_is() -> None:
    tokenizer, random = build_tokenizer(), np.random.default_rng(3)
    texts = ["", "!", "a cat", "naïve 東京 straße", "the red car is parked " * 3, "long " * 200]
    hidden = np.zeros(77, int)
    for text in texts:
        row = tokenizer([text], 77)[0].numpy()
        length = int(row.nonzero()[0][-1]) + 1
        for _ in range(200):
            made = hide(row, length, random.random(77), 0.2)
            at = np.flatnonzero(made < 0)
            assert len(at) == num_hidden(length - 2, 0.2) == (max(1, round((length - 2) / 5)) if text else 0)
            assert all(1 <= place < length - 1 for place in at)
            assert (np.where(made < 0, ~made, made) == row).all()
            hidden[at] += length == 77
    assert num_hidden(75, 0.2) == 15 and hidden[1:76].min() > 15 and hidden[[0, 76]].sum() == 0


def test_every_hidden_word_and_nothing_else_is_predicted() -> None:
    plain, cloze = rows()
    places, is_hidden = hidden_places(cloze, 0.4)
    for row in range(B):
        found = places[row][is_hidden[row].bool()].tolist()
        assert found == torch.where(cloze[row] < 0)[0].tolist()
        assert [int(~cloze[row, place]) for place in found] == [int(plain[row, place]) for place in found]
    assert in_text(cloze).sum(1).tolist() == list(LENGTHS)


def test_the_loss_is_the_mean_over_a_texts_hidden_words_then_over_texts() -> None:
    features, made = given(), objective()
    assert features.tokens is not None and features.token_ids is not None and features.vocabulary is not None
    x, seen = features.tokens, in_text(features.token_ids)[:, None, None]
    for block in made.blocks:
        x = block(x, attn_mask=seen)
    logits = made.norm(x) @ features.vocabulary.T
    losses = []
    for row in range(B):
        at = torch.where(features.token_ids[row] < 0)[0]
        errors = F.cross_entropy(logits[row, at], ~features.token_ids[row, at], reduction="mean")
        losses.append(errors if len(at) else torch.zeros(()))
    torch.testing.assert_close(loss_of(features, made), torch.stack(losses).mean(), rtol=1e-6, atol=1e-6)


def test_chunks_of_rows_pieces_of_a_batch_and_padding_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = loss_of(given())
    torch.testing.assert_close(loss_of(given(padded=4)), whole, rtol=1e-6, atol=1e-6)
    features = given()
    halves = []
    for part in (slice(0, 2), slice(2, 6)):
        assert features.tokens is not None and features.token_ids is not None
        piece = features._replace(tokens=features.tokens[part], token_ids=features.token_ids[part])
        halves.append(loss_of(piece) * (part.stop - part.start) / B)
    torch.testing.assert_close(sum(halves), whole, rtol=1e-6, atol=1e-6)
    monkeypatch.setattr(mlm, "ROWS", 3)
    torch.testing.assert_close(loss_of(given()), whole, rtol=1e-6, atol=1e-6)


def student(weight: float = 0.05) -> AClip:
    model = tiny.model_config()
    objectives = {"contrastive": OBJECTIVES["contrastive"].Options(1.0)}
    objectives |= {"mlm": MLMOptions(weight, share=0.4, depth=2)} if weight else {}
    built = AClip(model, builder(objectives))
    initialise(built, start_of(0, model, objectives))
    return built


def test_the_tower_does_not_see_what_is_hidden_and_the_plain_pass_does() -> None:
    plain, cloze = rows(places=16)
    built = student()
    hidden = built.objectives["mlm"].hidden()  # type: ignore[operator,union-attr]
    other = torch.where(cloze < 0, ~torch.tensor(5), cloze)  # other words are hidden at the same places
    torch.testing.assert_close(built.text.encode(cloze, hidden)[0], built.text.encode(other, hidden)[0], rtol=0, atol=0)
    assert not torch.equal(built.text.encode(cloze, hidden)[0], built.text.encode(plain)[0])


def test_the_term_reaches_tower_decoder_and_hidden_word_and_none_is_built_at_weight_0() -> None:
    plain, cloze = rows(places=16)
    torch.manual_seed(0)
    built = student()
    images = torch.randn(2 * B, 3, 32, 32)
    inputs = tiny.inputs(images, plain)._replace(texts={"plain": plain, "cloze": cloze})
    losses, _ = built.encode_and_losses(inputs, {}, SingleProcess())
    losses.terms["mlm"]
    losses.total.backward()
    gradients = {name: p.grad for name, p in built.named_parameters()}
    assert all(
        gradient is not None and gradient.abs().sum() > 0 for name, gradient in gradients.items() if "mlm." in name
    )
    assert float(losses.terms["mlm"]) == pytest.approx(np.log(WORDS) * (B - 1) / B, rel=0.3)
    bare = student(weight=0)
    assert not [name for name in bare.state_dict() if "mlm" in name]
    shared = {name: value for name, value in bare.state_dict().items()}
    assert all(torch.equal(value, built.state_dict()[name]) for name, value in shared.items())


def test_maskclip_has_it_and_nothing_else_draws() -> None:
    found = method_of(config.load("maskclip-vitb16"))
    assert found.texts == {"plain", "cloze"} and found.hidden_share == 0.2 and found.objectives["mlm"].weight == 0.05
    assert method_of(config.load("maskclip-vitb16", ["loss.mlm.weight=0"])).texts == {"plain"}
    assert method_of(config.load("clip-vitb16")).hidden_share == 0
