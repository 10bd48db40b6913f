"""model.init_from: each table of names is read both ways; what does not fit is one line; pickles are refused."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from amclip_ds.errors import UserError
from amclip_ds.model import other_libraries, pretrained
from amclip_ds.model.amclip import AClip, ModelConfig
from amclip_ds.model.init import Start, init_tensor, initialise
from amclip_ds.model.text import TextConfig
from amclip_ds.model.vision import VisionConfig


def config(name: str = "vit_tiny_patch16_224", **more) -> ModelConfig:
    return ModelConfig(
        vision=VisionConfig(name=name, image_size=32, patch_size=8, width=32, depth=2, heads=2, mlp_ratio=2.0),
        text=TextConfig(width=24, depth=2, heads=2, vocab_size=60, eos_token_id=59, context_length=16),
        embed_dim=16,
        **more,
    )


def state_of(model: ModelConfig, seed: int = 5) -> dict[str, torch.Tensor]:
    module = AClip(model)
    initialise(module, Start(seed, model))
    return dict(module.state_dict())


@pytest.fixture(autouse=True)
def fresh_sources() -> None:
    pretrained.open_source.cache_clear()


@pytest.mark.parametrize("fmt", other_libraries.FORMATS)
def test_there_and_back(fmt: str, tmp_path: Path) -> None:
    has_norm_pre = "CLIPModel" in fmt or fmt.startswith("open_clip") and "timm" not in fmt
    model = config("vit_base_patch16_clip_224" if has_norm_pre else "vit_tiny_patch16_224")
    state = state_of(model)
    if fmt == "timm":
        state = {name: tensor for name, tensor in state.items() if name.startswith("vision.")}
    theirs = other_libraries.export_state(fmt, state)
    assert other_libraries.recognise(theirs) == fmt
    save_file(theirs, tmp_path / "weights.safetensors")
    source = pretrained.Source(tmp_path / "weights.safetensors")
    assert set(source.names()) == set(state) and source.unused_keys() == []
    loaded = ModelConfig(model.vision, model.text, model.embed_dim, init_from=str(tmp_path / "weights.safetensors"))
    for name, tensor in state.items():
        assert torch.equal(init_tensor(name, tensor.shape, Start(0, loaded)), tensor), name


def test_one_wrong_rule_would_be_seen(tmp_path: Path) -> None:
    """The twin: query and key exchanged."""
    state = state_of(config())
    theirs = other_libraries.export_state("open_clip timm", state)
    key = "text.transformer.resblocks.0.attn.in_proj_weight"
    q, k, v = theirs[key].chunk(3)
    theirs[key] = torch.cat([k, q, v])
    save_file(theirs, tmp_path / "w.safetensors")
    name = "text.encoder.layers.0.self_attn.q_proj.weight"
    found = pretrained.loaded_tensor(str(tmp_path / "w.safetensors"), name, state[name].shape)
    assert found is not None and not torch.equal(found, state[name])


def test_a_checkpoint_in_pieces(tmp_path: Path) -> None:
    """Pieces of two ranks, of the student and of its average."""
    state = state_of(config())
    (tmp_path / "manifest.json").write_text("{}")
    for folder, kind, factor in (("model", "master", 1), ("ema", "ema", 2)):
        (tmp_path / folder).mkdir()
        ranks: list[dict[str, torch.Tensor]] = [{}, {}]
        for name, tensor in state.items():
            if kind == "ema" and name == "logit_scale":
                continue
            flat, cut = tensor.flatten() * factor, tensor.numel() // 3
            ranks[0][f"{kind}|{name}|0|{cut}"] = flat[:cut].clone()
            ranks[1][f"{kind}|{name}|{cut}|{flat.numel() - cut}"] = flat[cut:].clone()
        for rank, tensors in enumerate(ranks):
            tensors = {key: tensor for key, tensor in tensors.items() if tensor.numel()}
            save_file(tensors, tmp_path / folder / f"rank{rank:04d}.safetensors")
    student, teacher = pretrained.Source(tmp_path), pretrained.Source(tmp_path, "teacher")
    for name, tensor in state.items():
        read = student.read(name)
        assert read is not None and torch.equal(pretrained.fit(read, name, tensor.shape, ""), tensor)
        read = teacher.read(name)
        assert read is not None
        wanted = tensor if name == "logit_scale" else 2 * tensor  # the teacher has none of its own
        assert torch.equal(pretrained.fit(read, name, tensor.shape, ""), wanted)
    (tmp_path / "model" / "rank0001.safetensors").unlink()
    with pytest.raises(UserError, match=r"lacks|missing|model's is|pieces"):
        pretrained.loaded_tensor(str(tmp_path), "vision.cls_token", (1, 1, 32))


def test_positions_of_another_grid_are_resampled(tmp_path: Path) -> None:
    save_file(state_of(config()), tmp_path / "student.safetensors")
    larger = pretrained.loaded_tensor(str(tmp_path), "vision.pos_embed", (1, 65, 32))
    assert larger is not None and larger.shape == (1, 65, 32)
    assert torch.equal(larger[:, 0], state_of(config())["vision.pos_embed"][:, 0])


def test_positions_without_a_class_token_s_are_resampled_too() -> None:
    """DeiT III's towers."""
    even = torch.arange(4.0).expand(1, 49, 4)  # the same everywhere
    larger = pretrained.fit(even, "vision.pos_embed", (1, 196, 4), "RUN")
    assert larger.shape == (1, 196, 4) and torch.allclose(larger, torch.arange(4.0).expand(1, 196, 4), atol=1e-5)
    for length in (50, 197):  # of a tower whose class token has one: at another grid, and at the same
        said = rf"vision.pos_embed is \[1, 196, 4\] in RUN, the model's is \[1, {length}, 4\]"
        with pytest.raises(UserError, match=said):
            pretrained.fit(larger, "vision.pos_embed", (1, length, 4), "RUN")


def test_the_report_lists_what_came_and_what_did_not(tmp_path: Path) -> None:
    theirs = other_libraries.export_state("open_clip timm", state_of(config()))
    theirs["visual.trunk.head.weight"] = torch.zeros(2)
    save_file(theirs, tmp_path / "open_clip_model.safetensors")
    names = [*state_of(config()), "heads.o2o.layers.0.weight"]
    lines = "\n".join(pretrained.describe(str(tmp_path), names))
    assert f"{len(names) - 1} of {len(names)} parameters" in lines and "(open_clip timm)" in lines
    assert "vision.cls_token <- visual.trunk.cls_token" in lines
    assert "q_proj.weight <- text.transformer.resblocks.0.attn.in_proj_weight [1 of 3]" in lines
    assert "heads.o2o.layers.0.weight: not in the source, starts at random" in lines
    assert "left out: visual.trunk.head.weight" in lines


def test_what_does_not_fit_is_named(tmp_path: Path) -> None:
    save_file(state_of(config()), tmp_path / "student.safetensors")
    with pytest.raises(UserError, match=r"image_projection.weight is \[16, 32\] in .*, the model's is \[8, 32\]"):
        pretrained.loaded_tensor(str(tmp_path), "image_projection.weight", (8, 32))
    for path, said in [(tmp_path / "none", "no such file"), (tmp_path / "w.pt", "a pickle")]:
        with pytest.raises(UserError, match=said):
            pretrained.Source(path)
    (tmp_path / "pickled").mkdir()
    (tmp_path / "pickled" / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(UserError, match=r"pytorch_model\.bin:? (is )?a pickle"):
        pretrained.Source(tmp_path / "pickled")
    save_file({"some.weight": torch.zeros(2)}, tmp_path / "strange.safetensors")
    with pytest.raises(UserError, match="no names of ours"):
        pretrained.Source(tmp_path / "strange.safetensors")
    (tmp_path / "torn.safetensors").write_bytes(json.dumps({}).encode())
    with pytest.raises(UserError, match="torn.safetensors"):
        pretrained.Source(tmp_path / "torn.safetensors")


POSITIONS = "text.embeddings.position_embedding.weight"
PATCHES = "vision.patch_embed.proj.weight"


@pytest.mark.parametrize("is_flat", [False, True], ids=["whole", "in pieces"])
def test_text_positions_become_more_by_linear_interpolation_and_fewer_by_leaving_the_last(is_flat: bool) -> None:
    held = torch.randn(16, 24)
    given = held.flatten() if is_flat else held
    more = pretrained.fit(given, POSITIONS, (32, 24), "w")
    wanted = torch.nn.functional.interpolate(held.T[None], size=32, mode="linear", align_corners=False)[0].T
    assert torch.equal(more, wanted) and torch.equal(more[0], held[0]) and torch.equal(more[-1], held[-1])
    torch.testing.assert_close(more[1], 0.75 * held[0] + 0.25 * held[1])
    assert torch.equal(pretrained.fit(given, POSITIONS, (9, 24), "w"), held[:9])


@pytest.mark.parametrize("is_flat", [False, True], ids=["whole", "in pieces"])
def test_patches_of_another_size_give_of_resized_images_what_they_gave(is_flat: bool) -> None:
    held = torch.randn(32, 3, 4, 4)
    found = pretrained.fit(held.flatten() if is_flat else held, PATCHES, (32, 3, 8, 8), "w")
    small = torch.randn(5, 3, 4, 4)
    large = torch.nn.functional.interpolate(small, size=(8, 8), mode="bicubic", antialias=True)
    before, after = (torch.einsum("bchw,dchw->bd", image, weight) for image, weight in ((small, held), (large, found)))
    torch.testing.assert_close(after, before, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("name", "held", "wanted"),
    [(POSITIONS, (16, 20), (32, 24)), (PATCHES, (16, 3, 8, 8), (32, 3, 4, 4)), (PATCHES, (2, 5), (32, 3, 4, 4))],
)
def test_another_width_is_one_line(name: str, held: tuple[int, ...], wanted: tuple[int, ...]) -> None:
    with pytest.raises(UserError, match=f"model.init_from: {name} is") as error:
        pretrained.fit(torch.zeros(held), name, wanted, "w")
    assert "\n" not in str(error.value)
