import pytest
import torch

from amclip_ds.masks import MaskConfig
from amclip_ds.masks.units import num_kept
from amclip_ds.model.config import patch_grid
from amclip_ds.model.init import Start, initialise
from amclip_ds.model.vision import VisionConfig, VisionTower, build_vit
from benchmarks.tensor_memory import TensorMemory
from tests.unit.model import tiny


def tower_of(**changes: object) -> VisionTower:
    return tiny.student(tiny.model_config(**changes)).vision


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "vit_base_patch16_clip_224", "deit3_small_patch16_224"])
def test_equals_timm(name: str) -> None:
    """Plain, with a norm before the blocks, and with layer scale and a CLS token without position."""
    config = tiny.vision_config(name=name)
    tower, vit = VisionTower(config), build_vit(config)
    state = {key: torch.randn(value.shape) * 0.2 for key, value in tower.state_dict().items()}
    tower.load_state_dict(state)
    vit.load_state_dict(state)
    images = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        expected = vit.forward_features(images)[:, 0]
        torch.testing.assert_close(tower(images).cls, expected)
        tower.pos_embed[0, 2, ::2] += 0.1
        with pytest.raises(AssertionError):
            torch.testing.assert_close(tower(images).cls, expected)


def test_the_mean_of_all_tokens_is_timms_with_its_prefix() -> None:
    """FLIP's feature: class token, kept patches, after the norm; removed ones are in no mean."""
    import timm

    config = tiny.vision_config(pool="mean")
    tower = VisionTower(config)
    vit = timm.create_model(
        config.name,
        num_classes=0,
        img_size=32,
        patch_size=config.patch_size,
        embed_dim=config.width,
        depth=config.depth,
        num_heads=config.heads,
        mlp_ratio=config.mlp_ratio,
        global_pool="avg",
        pool_include_prefix=True,
        fc_norm=False,
    )
    state = {key: torch.randn(value.shape) * 0.2 for key, value in tower.state_dict().items()}
    tower.load_state_dict(state)
    vit.load_state_dict(state)
    images = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        tokens = tower(images).tokens
        torch.testing.assert_close(tower.feature(tokens), vit(images))
        assert not torch.allclose(tower.feature(tokens), tokens[:, 0])
        torch.testing.assert_close(tower.feature(tokens.unflatten(0, (3, 1)))[:, 0], vit(images))


def test_removed_tokens_do_not_exist_and_order_does_not_matter() -> None:
    tower = tower_of()
    images = torch.randn(2, 3, 32, 32)
    keep = torch.tensor([[0, 3, 5, 9], [1, 2, 14, 15]])
    changed = images.clone()
    changed[0, :, 0:8, 8:16] += 5  # patch 1: removed in the first sample
    shuffled = keep[:, [2, 0, 3, 1]]
    with torch.no_grad():
        cls = tower(images, keep_indices=keep).cls
        torch.testing.assert_close(tower(changed, keep_indices=keep).cls, cls, atol=0, rtol=0)
        torch.testing.assert_close(tower(images, keep_indices=shuffled).cls, cls)
        assert not torch.allclose(tower(changed).cls, tower(images).cls)


def test_tokens_that_reach_the_blocks() -> None:
    """100 of 196 at keep ratio 0.5, all 197 in evaluation."""
    tower = VisionTower(tiny.vision_config(image_size=224, patch_size=16, depth=1))
    lengths: list[int] = []
    tower.blocks[0].register_forward_pre_hook(lambda block, args: lengths.append(args[0].shape[1]))
    images = torch.randn(1, 3, 224, 224)
    kept = num_kept(MaskConfig(keep_ratio=0.5), tower.grid)
    with torch.no_grad():
        tower(images, keep_indices=torch.arange(kept)[None])
        tower(images)
    assert lengths == [101, 197]


def test_frozen_patch_embedding_changes_no_other_gradient() -> None:
    images, keep = torch.randn(4, 3, 32, 32), torch.arange(8).expand(4, 8)
    gradients = []
    for frozen in (True, False):
        tower = tower_of(freeze_patch_embed=frozen)
        tower(images, keep_indices=keep).cls.square().sum().backward()
        gradients.append({name: parameter.grad for name, parameter in tower.named_parameters()})
    frozen_gradients, free_gradients = gradients
    for name, gradient in frozen_gradients.items():
        if name.startswith("patch_embed."):
            assert gradient is None and free_gradients[name].abs().sum() > 0
        else:
            assert torch.equal(gradient, free_gradients[name])


@pytest.mark.parametrize("every", [1, 2])
def test_recomputed_blocks_give_the_same_gradients_in_less_memory(every: int) -> None:
    images = torch.randn(8, 3, 32, 32)
    gradients, peaks = [], []
    for checkpoint_every in (0, every):
        tower = tower_of(checkpoint_every=checkpoint_every)
        with TensorMemory() as memory:
            tower(images).cls.square().sum().backward()
        gradients.append([p.grad for p in tower.parameters() if p.requires_grad])
        peaks.append(memory.peak_bytes)
    assert all(torch.equal(a, b) for a, b in zip(*gradients))
    assert peaks[1] < peaks[0]


def test_another_image_size_interpolates_positions() -> None:
    tower = tower_of()
    with torch.no_grad():
        output = tower(torch.randn(2, 3, 16, 16), with_scores=True)
        cls, scores = output.cls, output.scores
        assert cls.shape == (2, 32) and scores.shape == (2, 4)
        flat = tower.pos_embed[:, 1:].mean(dim=1, keepdim=True).expand(-1, 16, -1)
        tower.pos_embed[:, 1:] = flat  # a constant stays itself under interpolation
        small, constant = (tower._embed(torch.zeros(1, 3, side, side), (), None, 1)[0] for side in (16, 32))
    torch.testing.assert_close(small[:, 1:], constant[:, 1:5])


def test_runs_with_bf16_parameters() -> None:
    tower = tower_of().bfloat16()
    output = tower(torch.randn(2, 3, 32, 32), with_scores=True)
    cls, scores = output.cls, output.scores
    assert cls.dtype == torch.bfloat16 and scores.dtype == torch.float32
    cls.float().sum().backward()


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("vit_base_patch16_siglip_224", "class token"),
        ("vit_base_patch14_reg4_dinov2", "register tokens"),
        ("vit_base_r50_s16_224", "HybridEmbed"),
        ("vit_base_patch16_18x2_224", "blocks"),
        ("resnet50", "VisionTransformer"),
        ("vit_bse_patch16_224", "nearest: vit_base_patch16_224"),
    ],
)
def test_refuses_what_it_cannot_hold(name: str, reason: str) -> None:
    with torch.device("meta"), pytest.raises(ValueError, match=rf"^model\.vision\.name: .*{reason}") as caught:
        VisionTower(VisionConfig(name=name))
    assert "\n" not in str(caught.value)


def test_grid() -> None:
    assert VisionConfig().grid == 14
    assert VisionConfig(name="vit_huge_patch14_224").grid == 16
    assert tiny.vision_config().grid == 4
    assert patch_grid(VisionConfig(), 112) == 7
    with pytest.raises(ValueError, match=r"model\.vision\.image_size: 60"):
        patch_grid(VisionConfig(image_size=60, patch_size=8))


@pytest.mark.parametrize(("name", "heads"), [("vit_small_patch16_224", 6), ("vit_huge_patch14_224", 16)])
def test_sizes_by_name(name: str, heads: int) -> None:
    with torch.device("meta"):
        tower = VisionTower(VisionConfig(name=name))
        assert tower.blocks[0].attn.num_heads == heads
        assert VisionTower(VisionConfig(name="vit_small_patch16_224", heads=12)).blocks[0].attn.num_heads == 12


def test_meta_construction_then_initialisation_equals_direct_construction() -> None:
    direct = tiny.student()
    with torch.device("meta"):
        later = tiny.AClip(tiny.model_config())
    later.to_empty(device="cpu")
    initialise(later, Start(0, tiny.model_config()))
    for name, tensor in later.state_dict().items():
        assert torch.equal(tensor, direct.state_dict()[name]), name
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(direct.vision(images).cls, later.vision(images).cls)
