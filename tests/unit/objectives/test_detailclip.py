"""DetailCLIP's objective as a part of the model: its terms and their weights, its centres, and what the teacher sees.

The published numbers: tests/parity/detailclip.py.
"""

import pytest
import torch
from torch import Tensor, nn

from amclip_ds import cli, config
from amclip_ds.comm import Comm, SingleProcess
from amclip_ds.engine.teacher import copied
from amclip_ds.method import method_of
from amclip_ds.model.amclip import Sizes
from amclip_ds.model.config import DetailCLIPOptions, HeadsConfig
from amclip_ds.model.features import Features, Seen
from amclip_ds.model.teacher_model import TeacherModel
from amclip_ds.objectives import builder
from amclip_ds.objectives.detailclip import ENTROPY, INFORMATION, DetailCLIP, PrototypeHead
from tests.unit.model import tiny
from tests.unit.thread_ranks import run_threads

GRID, WIDTH, PATCH, B, K, P = 4, 32, 8, 6, 5, 20
SIZES = Sizes(WIDTH, 12, 8, GRID, PATCH, 16, 100)
Targets = tuple[Tensor, ...]


def objective(**changes: object) -> DetailCLIP:
    torch.manual_seed(0)
    given = {"weight": 1.0, "prototypes": P, "hidden_dim": 24, "bottleneck_dim": 12, **changes}
    made = DetailCLIP(DetailCLIPOptions(**given), SIZES)  # type: ignore[arg-type]
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_(std=0.3)
    return made


def given(seed: int = 0) -> tuple[Features, Targets]:
    """Of two views."""
    g = torch.Generator().manual_seed(seed)
    keep = [torch.stack([torch.randperm(GRID**2, generator=g)[:K].sort().values for _ in range(B)]) for _ in "uv"]
    features = Features(
        cls=torch.randn(2, B, WIDTH, generator=g),
        keep_indices=tuple(keep),
        patches=tuple(torch.randn(B, K, WIDTH, generator=g) for _ in "uv"),
        pixels=tuple(torch.randn(B, GRID**2, 3 * PATCH**2, generator=g) for _ in "uv"),
    )
    seen = Seen(torch.randn(B, 2, WIDTH, generator=g), torch.randn(B, 2, GRID**2, WIDTH, generator=g))
    head = PrototypeHead(WIDTH, 24, 12, P)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=g))
        return features, objective().observe(nn.ModuleDict({"head": head}), seen, SingleProcess())


def rows_of(features: Features, targets: Targets, rows: slice) -> tuple[Features, Targets]:
    held = {
        name: tuple(view[rows] for view in getattr(features, name)) for name in ("patches", "keep_indices", "pixels")
    }
    assert features.cls is not None
    return features._replace(cls=features.cls[:, rows], **held), tuple(target[rows] for target in targets)


def test_a_pieces_mean_is_the_wholes() -> None:
    made, both = objective(), given()
    whole = made.per_sample(*both)
    pieces = [made.per_sample(*rows_of(*both, rows)) for rows in (slice(0, 2), slice(2, 6))]
    assert set(whole) == {"detail_pixel", "detail_patch", "detail_cls"}
    for name, term in whole.items():
        torch.testing.assert_close((2 * pieces[0][name] + 4 * pieces[1][name]) / 6, term)


def test_every_weight_gets_a_gradient_in_fp32() -> None:
    """The release has no backward pass in fp32: it writes into a tensor that was saved for it."""
    made = objective()
    torch.stack(list(made.per_sample(*given()).values())).sum().backward()
    assert all(weight.grad is not None and weight.grad.any() for weight in made.parameters())


def test_what_stays_is_not_predicted() -> None:
    made, (features, targets) = objective(), given()
    before = made.per_sample(features, targets)
    assert features.pixels is not None and features.keep_indices is not None
    places = [keep[..., None] for keep in features.keep_indices if keep is not None]
    pixels = tuple(view.scatter(1, at.expand(-1, -1, view.shape[-1]), 9.0) for view, at in zip(features.pixels, places))
    inside = targets[0].clone()
    for view, at in enumerate(places):
        inside[:, view, 1:].scatter_(1, at.expand(-1, -1, inside.shape[-1]), 9.0)
    after = made.per_sample(features._replace(pixels=pixels), (inside, targets[1]))
    assert all(torch.equal(before[name], after[name]) for name in ("detail_pixel", "detail_patch"))
    moved = tuple(view + torch.randn_like(view) for view in features.pixels)
    assert not torch.equal(
        before["detail_pixel"], made.per_sample(features._replace(pixels=moved), targets)["detail_pixel"]
    )


@pytest.mark.parametrize(
    ("left_out", "gone"),
    [
        ({"pixel_weight": 0.0}, {"pixels"}),
        ({"patch_weight": 0.0, "cls_weight": 0.0}, {"head", "centre", "patch_centre"}),
        ({"patch_weight": 0.0, "pixel_weight": 0.0}, {"decoder", "pixels"}),
    ],
)
def test_what_only_a_loss_of_weight_0_needs_is_not_built(left_out: dict[str, float], gone: set[str]) -> None:
    made, whole = objective(**left_out), objective()
    parts = {name.split(".")[0] for name in whole.state_dict()}
    assert {name.split(".")[0] for name in made.state_dict()} == parts - gone
    features, targets = given()
    terms = made.per_sample(features, targets if "head" not in gone else ())
    weights = {f"detail_{name.removesuffix('_weight')}" for name in left_out}
    assert set(terms) == {"detail_pixel", "detail_patch", "detail_cls"} - weights


def test_the_teacher_keeps_the_head_alone_and_gives_every_place() -> None:
    model, options = tiny.model_config(), {"detailclip": objective().options}
    teacher = TeacherModel(model, builder(options))
    assert {name.split(".")[0] for name, _ in teacher.objectives["detailclip"].named_parameters()} == {"head"}
    for parameter in teacher.parameters():
        nn.init.normal_(parameter, std=0.1)
    views = torch.randn(2, 3, 3, 32, 32)
    targets, scores = teacher.observe(views, frozenset({"cls", "patches", "scores"}), SingleProcess())
    inside, prototypes = targets["detailclip"]
    assert inside.shape == (3, 2, 17, 12) and prototypes.shape == (3, P, 12) and prototypes.stride(0) == 0
    assert scores is not None and scores.shape == (2, 3, 16)
    torch.testing.assert_close(teacher.attention(views[1]), scores[1])
    torch.testing.assert_close(teacher.attention(views), scores)


def test_it_is_given_what_the_teacher_saw_of_its_own_views() -> None:
    made = objective(views=[0, 2])
    seen = Seen(torch.randn(B, 3, WIDTH), torch.randn(B, 3, GRID**2, WIDTH))
    copies = nn.ModuleDict({"head": made.head})
    inside, _ = made.observe(copies, seen, SingleProcess())
    every, _ = objective().observe(copies, seen, SingleProcess())
    assert torch.equal(inside, every[:, [0, 2]])


def test_without_prototypes_the_teacher_keeps_nothing() -> None:
    options = objective(patch_weight=0.0, cls_weight=0.0).options
    teacher = TeacherModel(tiny.model_config(), builder({"detailclip": options}))
    assert not list(teacher.objectives.parameters())


def test_one_thing_for_all_samples_is_not_copied_for_each() -> None:
    shared, own = torch.randn(1, 5, 3).expand(4, -1, -1), torch.randn(4, 2)
    assert copied(shared).stride(0) == 0 and torch.equal(copied(shared), shared)
    assert torch.equal(copied(own), own) and copied(own).data_ptr() != own.data_ptr()
    assert copied(shared).data_ptr() != shared.data_ptr()


def test_centres_move_once_an_applied_step_by_the_mean_over_all_ranks() -> None:
    features, targets = given()
    alone = objective()
    alone(features, targets, SingleProcess())
    alone.commit(SingleProcess())

    def on_a_rank(comm: Comm) -> DetailCLIP:
        made = objective()
        part = rows_of(features, targets, slice(comm.rank * 3, comm.rank * 3 + 3))
        with torch.no_grad():
            made(*part, comm)
            refused = made(*part, comm)  # a step that is not applied: what it saw is left
            assert set(refused) == {ENTROPY, INFORMATION}
            made.commit(comm)
        return made

    for made in run_threads(2, on_a_rank):
        for name in ("centre", "patch_centre"):
            torch.testing.assert_close(getattr(made, name), getattr(alone, name))
    logits = (targets[0] @ targets[1][0].T).float()
    torch.testing.assert_close(alone.centre, 0.1 * logits[:, :, 0].mean((0, 1)))
    torch.testing.assert_close(alone.patch_centre, 0.1 * logits[:, :, 1:].mean((0, 1, 2)))


def test_the_entropy_shows_a_collapse() -> None:
    features, (inside, prototypes) = given()
    spread = float(objective()(features, (inside, prototypes), SingleProcess())[ENTROPY])
    one = torch.nn.functional.normalize(prototypes[0, :1], dim=-1).expand_as(inside)
    assert 0.3 < spread <= 1
    assert float(objective()(features, (one * 9, prototypes), SingleProcess())[ENTROPY]) < 0.1
    assert objective().weight_of(ENTROPY) == 0 and objective(patch_weight=3.0).weight_of("detail_patch") == 3


def test_the_information_shows_either_collapse() -> None:
    """Samples that all look alike, whether to one prototype or, centred, to all alike."""
    features, (inside, prototypes) = given()
    made = objective()
    assert 0.1 < float(made(features, (inside, prototypes), SingleProcess())[INFORMATION]) <= 1
    alike = inside[:1, :1].expand_as(inside)
    for _ in range(80):
        found = made(features, (alike, prototypes), SingleProcess())
        assert abs(float(found[INFORMATION])) < 1e-4
        made.commit(SingleProcess())
    assert float(found[ENTROPY]) > 0.99 and made.weight_of(INFORMATION) == 0


def test_the_patches_temperature_rises_after_its_share_of_the_run() -> None:
    made, (features, targets) = objective(), given()
    early, before, late = (made.per_sample(features._replace(progress=at), targets) for at in (0.0, 0.0399, 0.04))
    assert torch.equal(early["detail_patch"], before["detail_patch"])
    assert not torch.equal(early["detail_patch"], late["detail_patch"])
    assert torch.equal(early["detail_cls"], late["detail_cls"])
    made = objective(start=0.8)
    early, late = (made.per_sample(features._replace(progress=at), targets) for at in (0.8399, 0.8401))
    assert torch.equal(early["detail_patch"], before["detail_patch"])
    assert not torch.equal(early["detail_patch"], late["detail_patch"])


def test_sizes_that_are_left_open_are_the_heads() -> None:
    sized = DetailCLIPOptions(1.0).sized(HeadsConfig())
    assert (sized.prototypes, sized.hidden_dim, sized.bottleneck_dim) == (8192, 2048, 256)
    assert DetailCLIPOptions(1.0, prototypes=7).sized(HeadsConfig()).prototypes == 7


def test_the_recipe_is_the_published_one() -> None:
    loaded = config.load("detailclip-vitb16")
    method = method_of(loaded)
    assert list(method.objectives) == ["contrastive", "detailclip"] and method.sees_views
    assert method.wants == {"cls", "patches", "scores"} and not method.has_teacher_crop
    assert all(view.scale == (0.14, 1.0) and view.photometric and not view.flip for view in loaded.data.all_views())


@pytest.mark.parametrize(
    ("recipe", "words", "said"),
    [
        ("detailclip", ["teacher.sees=crop"], "teacher.sees: loss.detailclip compares with what the teacher sees of"),
        ("detailclip", ["teacher.sees=both"], "teacher.sees: 'both' is neither crop nor views"),
        ("detailclip", ["teacher.view=0"], "teacher.sees: views are all of them; leave out teacher.view"),
        ("detailclip", ["teacher.resolution=half"], "teacher.sees: views have their own size"),
        ("detailclip", ["mask.strategy=none"], "loss.detailclip.weight: view 0 keeps every token"),
        (
            "detailclip",
            ["mask.schedule=linear", "mask.final_keep_ratio=1"],
            "loss.detailclip.weight: view 0 keeps every token: mask.final_keep_ratio=1 of 16 units is all",
        ),
        ("detailclip", ["data.views.1.mask.keep_ratio=0.98"], "data.views.1.mask.keep_ratio=0.98 of 16 units is all"),
        ("detailclip", ["loss.o2e_weight=1"], "teacher.sees: loss.o2e_weight compares with one crop"),
        ("detailclip", ["loss.detailclip.views=[1]"], "loss.detailclip.cls_weight: one view is compared with another"),
        ("detailclip", ["loss.detailclip.views=[0,2]"], "loss.detailclip.views: there is no view 2"),
        ("detailclip", ["loss.detailclip.prototypes=0"], "loss.detailclip.prototypes: 0 must be at least 1"),
        ("detailclip", ["loss.detailclip.warmup=2"], "loss.detailclip.warmup: 2.0 is outside [0, 1]"),
        ("aclip", ["loss.detailclip.weight=1"], "teacher.sees: loss.detailclip compares with what the teacher sees of"),
        ("aclip", ["teacher.sees=views"], "teacher.sees: loss.o2e_weight compares with one crop"),
        ("maskclip", ["teacher.sees=views", "teacher.view=null"], "teacher.sees: loss.patches.weight compares"),
    ],
)
def test_a_mistake_is_one_line(recipe: str, words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["recipes", f"{recipe}-tiny", *words]) == 2
    printed = capsys.readouterr().err.strip()
    assert said in printed and len(printed.splitlines()) == 1
