"""Photometric changes against torchvision's own, one image at a time."""

import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from amclip_ds.data import photometric
from amclip_ds.data.photometric import NUM_COLUMNS, Photometric
from amclip_ds.data.views import planes
from tests.distributed.cases_reads import HostTraffic

V, B, H = 2, 6, 24
TOLERANCE = 1e-3  # torchvision rounds the weight of red to .2989; ours is PIL's, .299
NOTHING = np.zeros(NUM_COLUMNS, dtype=np.float32)


def images(seed: int = 0) -> torch.Tensor:
    """[V, B, 3, H, H] uint8: noise, a gray image and flat colours among them (their hue has cases of its own)."""
    made = torch.randint(0, 256, (V, B, 3, H, H), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    made[0, 1] = made[0, 1, :1]
    made[1, 0], made[1, 1] = 0, 255
    return made


def row(**changes: float) -> np.ndarray:
    """Parameters of one view; brightness, contrast, saturation, hue in this order unless `order` says otherwise."""
    order = changes.pop("order", (0, 1, 2, 3))
    made = NOTHING.copy()
    made[1:5] = (1, 1, 1, 0)
    made[5:9] = order
    for name, column in (
        ("brightness", 1),
        ("contrast", 2),
        ("saturation", 3),
        ("hue", 4),
        ("gray", 9),
        ("sigma", 10),
        ("solarize", 11),
    ):
        if name in changes:
            made[column] = changes[name]
            made[0] = 1 if column < 5 else made[0]
    return made


def slow(image: torch.Tensor, parameters: np.ndarray) -> torch.Tensor:
    """One image [3, H, H] uint8, changed by torchvision's functions one after another, then normalised."""
    import torchvision.transforms.functional as TF

    x = image.float() / 255
    p = parameters.tolist()
    changes = (TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation, TF.adjust_hue)
    if p[0]:
        for kind in (int(k) for k in p[5:9]):
            x = changes[kind](x, p[1 + kind])
    if p[9]:
        x = TF.rgb_to_grayscale(x, 3)
    if p[10]:
        x = blur_slowly(x, p[10])
    if p[11]:
        x = TF.solarize(x, 0.5)
    return TF.normalize(x, photometric.MEAN, photometric.STD)


def blur_slowly(x: torch.Tensor, sigma: float) -> torch.Tensor:
    """Every output pixel as the weighted sum over its neighbours, edges replicated."""
    reach = range(-photometric.BLUR_RADIUS, photometric.BLUR_RADIUS + 1)
    weights = np.array([math.exp(-0.5 * (step / sigma) ** 2) for step in reach])
    weights /= weights.sum()
    for axis in (1, 2):
        places = torch.arange(x.shape[axis])
        moved = [x.index_select(axis, (places + step).clamp(0, x.shape[axis] - 1)) for step in reach]
        x = sum(weight * part for weight, part in zip(weights.tolist(), moved))  # type: ignore[assignment]
    return x


def compare(parameters: np.ndarray) -> float:
    """The largest difference to the slow way, in units of normalised pixels. parameters: [V, B, columns]."""
    views = images()
    fast = photometric.apply(views, Photometric(parameters))
    return max(
        float((fast[v, b] - slow(views[v, b], parameters[v, b])).abs().max()) for v in range(V) for b in range(B)
    )


@pytest.mark.parametrize(
    "changes",
    [
        {"brightness": 1.3},
        {"brightness": 0.6},
        {"contrast": 1.4},
        {"contrast": 0.6},
        {"saturation": 1.2},
        {"saturation": 0.8},
        {"hue": 0.1},
        {"hue": -0.07},
        {"gray": 1},
        {"sigma": 0.1},
        {"sigma": 1.0},
        {"sigma": 2.0},
        {"solarize": 1},
        {"brightness": 1.4, "contrast": 0.7, "saturation": 1.2, "hue": 0.1, "order": (3, 1, 0, 2)},
    ],
    ids=str,
)
def test_each_change_equals_the_slow_way(changes: dict) -> None:
    parameters = np.tile(row(**changes), (V, B, 1))
    assert compare(parameters) < TOLERANCE
    without = photometric.apply(images(), Photometric(np.tile(row(), (V, B, 1))))  # the twin: left out, it is seen
    moved = float((without - photometric.apply(images(), Photometric(parameters))).abs().max())
    assert moved > 0.1 or changes == {"sigma": 0.1}, "a blur of a tenth of a pixel changes nothing"


def test_drawn_parameters_each_sample_its_own() -> None:
    random = np.random.default_rng(0)
    for _ in range(6):
        parameters = np.stack([[photometric.draw(random) for _ in range(B)] for _ in range(V)])
        assert compare(parameters) < TOLERANCE
        swapped = parameters[:, ::-1].copy()
        views = images()
        assert not torch.equal(
            photometric.apply(views, Photometric(parameters)), photometric.apply(views, Photometric(swapped))
        )


def luma(x: torch.Tensor) -> torch.Tensor:
    return (x * torch.tensor(photometric.LUMA).view(3, 1, 1)).sum(-3, keepdim=True)


def brightness(x: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    return (x * factor).clamp(0, 1)


def contrast(x: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    mean = luma(x).mean((-2, -1), keepdim=True)
    return (mean + (x - mean) * factor).clamp(0, 1)


def saturation(x: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    return (luma(x) + (x - luma(x)) * factor).clamp(0, 1)


def hue(x: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    (r, g, b), high, chroma = x.unbind(1), x.amax(1), x.amax(1) - x.amin(1)
    safe = torch.where(chroma > 0, chroma, 1)
    sector = torch.where(high == r, (g - b) / safe, torch.where(high == g, 2 + (b - r) / safe, 4 + (r - g) / safe))
    turned = torch.where(chroma > 0, sector / 6, 0) + shift.view(-1, 1, 1)
    places = [offset + turned * 6 for offset in (5.0, 3.0, 1.0)]
    places = [torch.where(k >= 6, k - 6, torch.where(k < 0, k + 6, k)) for k in places]
    return torch.stack([high - chroma * torch.minimum(k, 4 - k).clamp(0, 1) for k in places], 1)


def blur(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    return torch.stack(photometric._blur(x.unbind(1), sigma.view(-1, 1, 1)), 1)


def blur_by_taps(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    return torch.stack(photometric._blur_by_taps(x.unbind(1), sigma.view(-1, 1, 1)), 1)


def change_by_change(views: torch.Tensor, table: np.ndarray, blur: Callable[..., torch.Tensor] = blur) -> torch.Tensor:
    """`apply` as it was first written: each change by its own indices and factors, on images of three colours."""
    images, rows = views.flatten(0, 1).float() / 255, table.reshape(-1, NUM_COLUMNS)
    kinds = (brightness, contrast, saturation, hue)
    steps = [
        ((rows[:, 0] > 0) & (rows[:, 5 + place] == kind), rows[:, 1 + kind], change)
        for place in range(4)
        for kind, change in enumerate(kinds)
    ]
    rest = (
        (9, lambda x, _: luma(x).expand_as(x)),
        (10, blur),
        (11, lambda x, _: torch.where(x >= 0.5, 1 - x, x)),
    )
    steps += [(rows[:, column] > 0, rows[:, column], change) for column, change in rest]
    for is_chosen, values, change in steps:
        if is_chosen.any():
            index = torch.from_numpy(np.flatnonzero(is_chosen))
            images[index] = change(images[index], torch.from_numpy(values[is_chosen]).view(-1, 1, 1, 1))
    mean, std = (torch.tensor(value).view(3, 1, 1) for value in (photometric.MEAN, photometric.STD))
    return ((images - mean) / std).unflatten(0, views.shape[:2])


@pytest.mark.parametrize("colours", photometric.CHANGES)
def test_one_table_for_all_changes_gives_the_same_bits(colours: str) -> None:
    random = np.random.default_rng(0)
    for seed in range(8):
        table = np.stack([[photometric.draw(random, colours) for _ in range(B)] for _ in range(V)])
        changed = photometric.apply(images(seed), Photometric(table))
        assert torch.equal(changed, change_by_change(images(seed), table))
        table[0, 0, 1] += 0.1  # the twin: another brightness of one sample is seen, or it has no jitter
        other = torch.equal(changed, change_by_change(images(seed), table))
        assert other != bool(table[0, 0, 0])


def test_colours_beside_each_other_in_memory_make_the_same_planes() -> None:
    """As batches are in memory; what is made of them is the same to the bit, and the towers get planes."""
    random, views = np.random.default_rng(1), images(3)
    table = np.stack([[photometric.draw(random) for _ in range(B)] for _ in range(V)])
    beside = planes(views.movedim(-3, -1).contiguous())
    assert torch.equal(beside, views) and not beside.is_contiguous()
    for change in (
        photometric.normalise,
        lambda pixels: photometric.apply(pixels, Photometric(table)),
        lambda pixels: photometric.change_all(pixels, torch.from_numpy(table), blurs=True),
    ):
        made = change(beside)
        assert made.is_contiguous() and torch.equal(made, change(views))
        assert not torch.equal(made, change(beside.flip(-3))), "the twin: colours in another order"


def test_nothing_to_change_is_normalisation_alone() -> None:
    views = images()
    table = np.zeros((V, B, photometric.NUM_COLUMNS), dtype=np.float32)
    changed = photometric.apply(views, Photometric(table))
    assert torch.equal(changed, photometric.normalise(views))
    assert torch.allclose(changed[0, 0], slow(views[0, 0], NOTHING))


def test_draws_have_the_papers_chances_and_ranges() -> None:
    random = np.random.default_rng(0)
    rows = np.stack([photometric.draw(random) for _ in range(6000)])
    chances = [(rows[:, column] > 0).mean() for column in (0, 9, 10, 11)]
    assert np.allclose(chances, [0.8, 0.2, 0.1, 0.2], atol=0.02)
    for column, (low, high) in zip((1, 2, 3, 4), ((0.6, 1.4), (0.6, 1.4), (0.8, 1.2), (-0.1, 0.1))):
        assert low <= rows[:, column].min() < low + 0.01 and high - 0.01 < rows[:, column].max() <= high
    sigmas = rows[rows[:, 10] > 0, 10]
    assert sigmas.min() >= 0.1 and sigmas.max() <= 2.0
    assert {tuple(order) for order in rows[:, 5:9].tolist()} == {
        tuple(map(float, order)) for order in itertools.permutations(range(4))
    }


def test_simclrs_draws_have_slips_chances_and_ranges() -> None:
    """10,000 draws: more saturation and blur than A-CLIP's, no solarize; A-CLIP's are other ones."""
    random = np.random.default_rng(0)
    rows = np.stack([photometric.draw(random, "simclr") for _ in range(10_000)])
    chances = [(rows[:, column] > 0).mean() for column in (0, 9, 10, 11)]
    assert np.allclose(chances, [0.8, 0.2, 0.5, 0.0], atol=0.02)
    assert 0.6 <= rows[:, 3].min() < 0.61 and 1.39 < rows[:, 3].max() <= 1.4
    again = np.random.default_rng(0)
    assert not np.array_equal(rows, np.stack([photometric.draw(again) for _ in range(10_000)]))


def test_what_is_drawn_next_does_not_depend_on_what_was_decided() -> None:
    """Otherwise a blurred first view would change the second one."""
    for seed in range(200):
        drawn, reference = np.random.default_rng(seed), np.random.default_rng(seed)
        photometric.draw(drawn, "simclr" if seed % 2 else "aclip")
        reference.random(9), reference.permutation(4)
        assert drawn.random() == reference.random()


@pytest.mark.parametrize("colours", ["aclip", "simclr"])
def test_every_change_of_every_image_and_a_choice_is_the_same(colours: str) -> None:
    """What a compiler gets, against the changes of chosen images alone, as they were first written: to the bit, since
    an image meets contrast once, and its mean is known before it is changed."""
    views, table = many(colours, 4)
    expected = change_by_change(views, table, blur_by_taps)
    assert (table[..., [0, 9, 10, 11]] > 0).any((0, 1)).sum() >= 3 and not table[..., 0].all()
    assert torch.equal(photometric.change_all(views, torch.from_numpy(table), blurs=True), expected)
    assert float((photometric.apply(views, Photometric(table)) - expected).abs().max()) < 1e-5
    table[0, 0, 1] += 0.01 if table[0, 0, 0] else 0
    table[0, 0, 9] = 1 - table[0, 0, 9]
    assert float((photometric.change_all(views, torch.from_numpy(table), blurs=True) - expected).abs().max()) > 1e-3


def many(colours: str, times: int, seed: int = 0) -> tuple[torch.Tensor, np.ndarray]:
    """Views [V, B * times, 3, H, H] and drawn parameters of each."""
    random = np.random.default_rng(seed)
    rows = np.stack([photometric.draw(random, colours) for _ in range(V * B * times)])
    return images().repeat(1, times, 1, 1, 1), rows.reshape(V, B * times, NUM_COLUMNS)


@pytest.mark.parametrize("colours", ["aclip", "simclr"])
def test_blurred_images_alone_are_blurred(colours: str) -> None:
    """The same bits as blurring all, of one pass, of several and of none; with one upload and nothing read."""
    passes = set()
    for seed, times in ((0, 1), (1, 12)):
        views, table = many(colours, times, seed)
        for count in ("drawn", "none"):
            if count == "none":
                table[..., 10] = 0
            blurred = int((table[..., 10] > 0).sum())
            passes.add(-(-blurred // photometric.BLURRED_AT_A_TIME))
            whole = photometric.change_all(views, torch.from_numpy(table), blurs=True)
            photometric.constants(views.device)
            with HostTraffic() as seen:
                apart = photometric.apply_compiled(photometric.change_all, views, Photometric(table))
            assert torch.equal(apart, whole)
            assert (seen.uploads, sum(seen.reads.values())) == (1, 0)
            without = photometric.change_all(views, torch.from_numpy(table), blurs=False)  # the twin
            assert torch.equal(without, whole) == (not blurred)
    assert passes == ({0, 1} if colours == "aclip" else {0, 1, 3})


def test_any_number_of_blurred_images_needs_two_graphs() -> None:
    """A third would be compiled in the middle of a run."""
    graphs = []

    def count(graph: torch.fx.GraphModule, _: list[torch.Tensor]) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    change_all = torch.compile(photometric.change_all, fullgraph=True, dynamic=False, backend=count)
    for seed in range(4):
        views, table = many("simclr" if seed == 3 else "aclip", 6, seed)
        found = photometric.apply_compiled(change_all, views, Photometric(table))
        assert torch.equal(found, photometric.apply_compiled(photometric.change_all, views, Photometric(table)))
    assert len(graphs) == 2
