"""Photometric changes of the student views, batched on the device, each sample with its own parameters; normalisation.

A-CLIP's changes as its code has them: ColorJitter(.4, .4, .2, .1) with probability .8, in random order; grayscale .2;
Gaussian blur, sigma in [.1, 2], .1; solarize .2. SLIP's for its SimCLR views: saturation .4, blur .5, no solarize.
Parameters are drawn on the CPU, keyed by sample.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from amclip_ds.host_copies import upload

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's
JITTER_P, GRAY_P = 0.8, 0.2
BRIGHTNESS, CONTRAST, HUE = 0.4, 0.4, 0.1
SIGMA = (0.1, 2.0)
BLURRED_AT_A_TIME = 32  # images, by what is compiled
BLUR_RADIUS = 6  # three standard deviations of the strongest blur
LUMA = (0.299, 0.587, 0.114)
NUM_COLUMNS = 12
CHANGES_COLOUR = [4, 9, 11]  # the columns of hue, gray and solarize: they make a caption that names a colour untrue


class Changes(NamedTuple):
    """What two published sets of changes differ in."""

    saturation: float
    blur_p: float
    solarize_p: float


CHANGES = {"aclip": Changes(0.2, 0.1, 0.2), "simclr": Changes(0.4, 0.5, 0.0)}


Colours = tuple[Tensor, Tensor, Tensor]
"""red, green and blue of n images, [n, H, W] each, in 0 to 1"""

Change = Callable[[Colours, Tensor], Colours]
"""images and each one's factor [n, 1, 1] -> changed"""


class _Step(NamedTuple):
    change: Change
    places: np.ndarray
    """[n] of the images that it changes"""
    factors: np.ndarray
    """[n]"""


@dataclass
class Photometric:
    """Parameters of each view and sample, on the CPU: table [V, B, 12] float32.

    Columns: jitter?, brightness, contrast, saturation, hue, order of the four (4 columns), gray?, blur sigma (0: none),
    solarize?.
    """

    table: np.ndarray

    def rows(self) -> np.ndarray:
        """[V * B, 12]"""
        return self.table.reshape(-1, NUM_COLUMNS)


def draw(random: np.random.Generator, colours: str = "aclip") -> np.ndarray:
    """The 12 parameters of one view of one sample. The same count of numbers is drawn whatever they decide.

    colours: of CHANGES.
    """
    uniform, order = random.random(9).tolist(), random.permutation(4).tolist()
    changes = CHANGES[colours]
    chances = JITTER_P, GRAY_P, changes.blur_p, changes.solarize_p
    jitter, gray, blur, solarize = (drawn < chance for drawn, chance in zip(uniform, chances))
    amounts = (1, BRIGHTNESS), (1, CONTRAST), (1, changes.saturation), (0, HUE)
    factors = [middle + amount * (2 * drawn - 1) for (middle, amount), drawn in zip(amounts, uniform[4:])]
    sigma = SIGMA[0] + (SIGMA[1] - SIGMA[0]) * uniform[8] if blur else 0.0
    return np.array([jitter, *factors, *order, gray, sigma, solarize], dtype=np.float32)


def normalise(images_uint8: Tensor) -> Tensor:
    """[..., 3, H, W] uint8 -> float32, ImageNet mean and std."""
    return _standardise(_planes(images_uint8))


def apply(views_uint8: Tensor, photometric: Photometric) -> Tensor:
    """[V, B, 3, H, W] uint8 -> the changed and normalised views, float32, on the same device."""
    images = _planes(views_uint8.flatten(0, 1))
    for change, places, factors in _on_device(_planned(photometric.rows()), images.device):
        changed = change(_by_colour(images.index_select(0, places)), factors)
        for whole, part in zip(_by_colour(images), changed):
            whole.index_copy_(0, places, part)
    return _standardise(images).unflatten(0, views_uint8.shape[:2])


def apply_compiled(change_all: Callable[..., Tensor], views_uint8: Tensor, photometric: Photometric) -> Tensor:
    """What `apply` does, by change_all, compiled: all images without blur, then the blurred ones once more with it.

    They are taken BLURRED_AT_A_TIME, the last one repeated to fill up: shapes never differ. One copy to the device.
    """
    blurred = np.flatnonzero(photometric.rows()[:, 10] > 0)
    padded = np.pad(blurred, (0, -len(blurred) % BLURRED_AT_A_TIME), mode="edge")
    places, numbers = _uploaded(padded, photometric.table, views_uint8.device)
    table = numbers.view(photometric.table.shape)
    changed = change_all(views_uint8, table, blurs=False)
    for some in places.view(-1, BLURRED_AT_A_TIME):
        images, rows = (whole.flatten(0, 1).index_select(0, some)[None] for whole in (views_uint8, table))
        changed.flatten(0, 1).index_copy_(0, some, change_all(images, rows, blurs=True)[0])
    return changed


def _planned(rows: np.ndarray) -> list[_Step]:
    """What is changed one after another, the images of each step and their factors; steps of no image are left out.

    rows: [n, 12], as Photometric has them.
    """
    steps = []
    for place in range(4):
        for kind, change in enumerate(JITTERS):
            steps.append((change, (rows[:, 0] > 0) & (rows[:, 5 + place] == kind), 1 + kind))
    steps += [(change, rows[:, column] > 0, column) for change, column in ((_gray, 9), (_blur, 10), (_solarize, 11))]
    return [
        _Step(change, np.flatnonzero(chosen), rows[chosen, column]) for change, chosen, column in steps if chosen.any()
    ]


def _on_device(steps: list[_Step], device: torch.device) -> Iterator[tuple[Change, Tensor, Tensor]]:
    """Each step with its images' places [n] and their factors [n, 1, 1] on the device: one copy for all steps."""
    if not steps:
        return
    places, factors = (np.concatenate(arrays) for arrays in zip(*((step.places, step.factors) for step in steps)))
    all_places, all_factors = _uploaded(places, factors, device)
    counts = [len(step.places) for step in steps]
    yield from zip([step.change for step in steps], all_places.split(counts), all_factors.view(-1, 1, 1).split(counts))


def _uploaded(places: np.ndarray, numbers: np.ndarray, device: torch.device) -> tuple[Tensor, Tensor]:
    """Places, int64, and any float32 numbers, both flat, on the device by one copy."""
    parts = places.astype(np.int64).reshape(-1), numbers.astype(np.float32).reshape(-1)
    packed = upload(torch.from_numpy(np.concatenate([part.view(np.uint8) for part in parts])), device)
    return packed[: parts[0].nbytes].view(torch.int64), packed[parts[0].nbytes :].view(torch.float32)


def _planes(images_uint8: Tensor) -> Tensor:
    """[..., 3, H, W] uint8, in memory perhaps [..., H, W, 3] -> float32 in 0 to 1, each colour a plane in memory."""
    return images_uint8.to(torch.float32, memory_format=torch.contiguous_format) / 255


class _Constants(NamedTuple):
    """[3, 1, 1] each."""

    mean: Tensor
    std: Tensor


_CONSTANTS: dict[torch.device, _Constants] = {}  # a compiler reads a dict as it is; functools.cache it traces through


def constants(device: torch.device) -> _Constants:
    """Made once a device, since each is a copy from the host. Before normalise is compiled they must be there."""
    if device not in _CONSTANTS:
        with torch.inference_mode(False):
            made = _Constants(*(torch.tensor(value, device=device).view(3, 1, 1) for value in (MEAN, STD)))
        _CONSTANTS[device] = made
    return _CONSTANTS[device]


def _standardise(x: Tensor) -> Tensor:
    held = constants(x.device)
    return (x - held.mean) / held.std


def _by_colour(images: Tensor) -> Colours:
    """[n, 3, H, W] -> views of it"""
    red, green, blue = images.unbind(1)
    return red, green, blue


def _each(change: Callable[[Tensor], Tensor], x: Colours) -> Colours:
    return change(x[0]), change(x[1]), change(x[2])


def _luma(x: Colours) -> Tensor:
    return x[0] * LUMA[0] + x[1] * LUMA[1] + x[2] * LUMA[2]


def _mean(x: Colours) -> Tensor:
    """What contrast goes by: the mean brightness of each image [n, 1, 1]."""
    return _luma(x).mean((-2, -1), keepdim=True)


def _gray(x: Colours, _: Tensor) -> Colours:
    return (_luma(x),) * 3


def _solarize(x: Colours, _: Tensor) -> Colours:
    return _each(lambda plane: torch.where(plane >= 0.5, 1 - plane, plane), x)


def _brightness(x: Colours, factor: Tensor) -> Colours:
    return _each(lambda plane: (plane * factor).clamp_(0, 1), x)


def _away_from(middle: Tensor, x: Colours, factor: Tensor) -> Colours:
    return _each(lambda plane: (plane - middle).mul_(factor).add_(middle).clamp_(0, 1), x)


def _contrast(x: Colours, factor: Tensor) -> Colours:
    return _away_from(_mean(x), x, factor)


def _saturation(x: Colours, factor: Tensor) -> Colours:
    return _away_from(_luma(x), x, factor)


def _hue(x: Colours, shift: Tensor) -> Colours:
    """Turns the hue of HSV by `shift` (a part of the circle)."""
    r, g, b = x
    high, low = torch.maximum(torch.maximum(r, g), b), torch.minimum(torch.minimum(r, g), b)
    chroma = high - low
    safe = torch.where(chroma > 0, chroma, 1)
    sector = torch.where(high == r, (g - b) / safe, torch.where(high == g, 2 + (b - r) / safe, 4 + (r - g) / safe))
    hue = torch.where(chroma > 0, sector / 6, 0) + shift

    def channel(offset: float) -> Tensor:
        """high - chroma * (how far its own hue is from h on the circle, clipped): one formula, no cases."""
        k = offset + hue * 6  # of (-6, 12): the remainder by 6, which a division would take several times as long for
        k = torch.where(k >= 6, k - 6, torch.where(k < 0, k + 6, k))
        return high - chroma * torch.minimum(k, 4 - k).clamp(0, 1)

    return channel(5.0), channel(3.0), channel(1.0)


JITTERS = (_brightness, _contrast, _saturation, _hue)  # by their numbers in a table


def _blur(x: Colours, sigma: Tensor) -> Colours:
    """Separable Gaussian, each sample its own sigma; edges are replicated."""
    radius = min(BLUR_RADIUS, x[0].shape[-1] - 1)
    steps = torch.arange(-radius, radius + 1, device=sigma.device, dtype=sigma.dtype)
    kernel = torch.exp(-0.5 * (steps / sigma.view(-1, 1)) ** 2)
    kernel = (kernel / kernel.sum(-1, keepdim=True)).repeat_interleave(3, 0)  # [n * 3, taps]
    flat = torch.stack(x, 1).flatten(0, 1)[None]
    padded = F.pad(flat, [radius] * 4, mode="replicate")
    across = F.conv2d(padded, kernel[:, None, None, :], groups=flat.shape[1])
    blurred = F.conv2d(across, kernel[:, None, :, None], groups=flat.shape[1])
    return _by_colour(blurred.unflatten(1, (-1, 3))[0])


def change_all(views_uint8: Tensor, table: Tensor, blurs: bool) -> Tensor:
    """What `apply` does, each change computed for every image and kept where it is asked for: shapes that never differ,
    for a compiler that makes few kernels of it. Without one it is several times slower.

    An image meets contrast once, so that two passes over its pixels do: for the mean that contrast goes by, and for all
    changes. What is computed for each colour apart a compiler keeps in registers.

    views_uint8 [V, B, 3, H, W]; table [V, B, 12] float32, as Photometric's, on the same device; blurs: False leaves the
    blur out.
    """
    x = _by_colour(_planes(views_uint8.flatten(0, 1)))
    columns = table.flatten(0, 1)[:, :, None, None].unbind(1)  # 12 x [V * B, 1, 1]
    x = _jittered(x, columns, _mean(_jittered(x, columns)))
    x = _chosen(columns[9] > 0, _gray(x, columns[9]), x)
    if blurs:
        x = _chosen(columns[10] > 0, _blur_by_taps(x, columns[10]), x)
    x = _chosen(columns[11] > 0, _solarize(x, columns[11]), x)
    standardised = [(plane - mean) / std for plane, mean, std in zip(x, MEAN, STD)]
    return torch.stack(standardised, 1).unflatten(0, views_uint8.shape[:2])


def _jittered(x: Colours, columns: Sequence[Tensor], mean: Tensor | None = None) -> Colours:
    """The four changes in each image's order. columns: 12 x [n, 1, 1], as Photometric's.

    mean [n, 1, 1]: what contrast goes by; None: only the changes before contrast.
    """
    contrast: Change = _unchanged if mean is None else functools.partial(_away_from, mean)
    is_on = columns[0] > 0
    for place in range(3 if mean is None else 4):  # in the last place nothing is before contrast
        kind, changed = columns[5 + place], x
        for number, change in enumerate((_brightness, contrast, _saturation, _hue)):
            changed = _chosen(kind == number, change(x, columns[1 + number]), changed)
        if mean is None:
            is_on = is_on & (kind != JITTERS.index(_contrast))
        x = _chosen(is_on, changed, x)
    return x


def _chosen(condition: Tensor, x: Colours, otherwise: Colours) -> Colours:
    red, green, blue = (torch.where(condition, plane, other) for plane, other in zip(x, otherwise))
    return red, green, blue


def _unchanged(x: Colours, _: Tensor) -> Colours:
    return x


def _blur_by_taps(x: Colours, sigma: Tensor) -> Colours:
    """_blur as sums of shifted images; sigma 0: any finite number."""
    radius = min(BLUR_RADIUS, x[0].shape[-1] - 1)
    steps = torch.arange(-radius, radius + 1, device=sigma.device, dtype=sigma.dtype)
    kernel = torch.exp(-0.5 * (steps / torch.where(sigma > 0, sigma, 1)[..., None]) ** 2)  # [n, 1, 1, taps]
    taps = (kernel / kernel.sum(-1, keepdim=True)).unbind(-1)
    across = _each(lambda plane: _weighed(plane, taps, -1), x)
    return _each(lambda plane: _weighed(plane, taps, -2), across)


def _weighed(plane: Tensor, taps: Sequence[Tensor], dim: int) -> Tensor:
    """The sum over the taps of the plane shifted along a dimension; edges are replicated."""
    places, last = torch.arange(plane.shape[dim], device=plane.device), plane.shape[dim] - 1
    radius = len(taps) // 2
    shifted = (plane.index_select(dim, (places + step).clamp(0, last)) for step in range(-radius, radius + 1))
    return functools.reduce(torch.add, (tap * image for tap, image in zip(taps, shifted)))
