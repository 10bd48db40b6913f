"""Photometric changes of the student views, batched on the device, each sample with its own parameters; normalisation.

A-CLIP's changes as its code has them: ColorJitter(.4, .4, .2, .1) with probability .8, in random order; grayscale .2;
Gaussian blur, sigma in [.1, 2], .1; solarize .2. SLIP's for its SimCLR views: saturation .4, blur .5, no solarize.
Parameters are drawn on the CPU, keyed by sample.
"""

import functools
from collections.abc import Callable, Iterator
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


Change = Callable[[Tensor, Tensor], Tensor]
"""images [n, 3, H, W] in 0 to 1, and each one's factor [n, 1, 1, 1] -> changed"""


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
        images.index_copy_(0, places, change(images.index_select(0, places), factors))
    return _standardise(images).unflatten(0, views_uint8.shape[:2])


def _planned(rows: np.ndarray) -> list[_Step]:
    """What is changed one after another, the images of each step and their factors; steps of no image are left out.

    rows: [n, 12], as Photometric has them.
    """
    steps = []
    for place in range(4):
        for kind, change in enumerate((_brightness, _contrast, _saturation, _hue)):
            steps.append((change, (rows[:, 0] > 0) & (rows[:, 5 + place] == kind), 1 + kind))
    steps += [(change, rows[:, column] > 0, column) for change, column in ((_gray, 9), (_blur, 10), (_solarize, 11))]
    return [
        _Step(change, np.flatnonzero(chosen), rows[chosen, column]) for change, chosen, column in steps if chosen.any()
    ]


def _on_device(steps: list[_Step], device: torch.device) -> Iterator[tuple[Change, Tensor, Tensor]]:
    """Each step with its images' places [n] and their factors [n, 1, 1, 1] on the device: one copy for all steps."""
    if not steps:
        return
    places = np.concatenate([step.places for step in steps]).astype(np.int64)
    factors = np.concatenate([step.factors for step in steps]).astype(np.float32)
    packed = upload(torch.from_numpy(np.concatenate([places.view(np.uint8), factors.view(np.uint8)])), device)
    counts = [len(step.places) for step in steps]
    all_places = packed[: places.nbytes].view(torch.int64).split(counts)
    all_factors = packed[places.nbytes :].view(torch.float32).view(-1, 1, 1, 1).split(counts)
    yield from zip([step.change for step in steps], all_places, all_factors)


def _planes(images_uint8: Tensor) -> Tensor:
    """[..., 3, H, W] uint8, in memory perhaps [..., H, W, 3] -> float32 in 0 to 1, each colour a plane in memory."""
    return images_uint8.to(torch.float32, memory_format=torch.contiguous_format) / 255


class _Constants(NamedTuple):
    """[3, 1, 1] each."""

    mean: Tensor
    std: Tensor
    luma: Tensor


_CONSTANTS: dict[torch.device, _Constants] = {}  # a compiler reads a dict as it is; functools.cache it traces through


def constants(device: torch.device) -> _Constants:
    """Made once a device, since each is a copy from the host. Before change_all is compiled they must be there."""
    if device not in _CONSTANTS:
        with torch.inference_mode(False):
            made = _Constants(*(torch.tensor(value, device=device).view(3, 1, 1) for value in (MEAN, STD, LUMA)))
        _CONSTANTS[device] = made
    return _CONSTANTS[device]


def _standardise(x: Tensor) -> Tensor:
    held = constants(x.device)
    return (x - held.mean) / held.std


def _luma(x: Tensor) -> Tensor:
    return (x * constants(x.device).luma).sum(-3, keepdim=True)


def _gray(x: Tensor, _: Tensor) -> Tensor:
    return _luma(x).expand_as(x)


def _solarize(x: Tensor, _: Tensor) -> Tensor:
    return torch.where(x >= 0.5, 1 - x, x)


def _brightness(x: Tensor, factor: Tensor) -> Tensor:
    return (x * factor).clamp(0, 1)


def _contrast(x: Tensor, factor: Tensor) -> Tensor:
    mean = _luma(x).mean((-2, -1), keepdim=True)
    return (mean + (x - mean) * factor).clamp(0, 1)


def _saturation(x: Tensor, factor: Tensor) -> Tensor:
    gray = _luma(x)
    return (gray + (x - gray) * factor).clamp(0, 1)


def _hue(x: Tensor, shift: Tensor) -> Tensor:
    """Turns the hue of HSV by `shift` (a part of the circle)."""
    high, low = x.amax(1), x.amin(1)
    chroma = high - low
    safe = torch.where(chroma > 0, chroma, 1)
    r, g, b = x.unbind(1)
    sector = torch.where(high == r, (g - b) / safe, torch.where(high == g, 2 + (b - r) / safe, 4 + (r - g) / safe))
    hue = torch.where(chroma > 0, sector / 6, 0) + shift.view(-1, 1, 1)
    # A channel is high - chroma * (how far its own hue is from h on the circle, clipped): one formula, no cases.
    channels = []
    for offset in (5.0, 3.0, 1.0):
        k = offset + hue * 6  # of (-6, 12): the remainder by 6, which a division would take several times as long for
        k = torch.where(k >= 6, k - 6, torch.where(k < 0, k + 6, k))
        channels.append(high - chroma * torch.minimum(k, 4 - k).clamp(0, 1))
    return torch.stack(channels, 1)


def _blur(x: Tensor, sigma: Tensor) -> Tensor:
    """Separable Gaussian, each sample its own sigma; edges are replicated."""
    radius = min(BLUR_RADIUS, x.shape[-1] - 1)
    steps = torch.arange(-radius, radius + 1, device=x.device, dtype=x.dtype)
    kernel = torch.exp(-0.5 * (steps / sigma.view(-1, 1)) ** 2)
    kernel = (kernel / kernel.sum(-1, keepdim=True)).repeat_interleave(3, 0)  # [n * 3, taps]
    flat = x.reshape(1, -1, *x.shape[-2:])
    padded = F.pad(flat, [radius] * 4, mode="replicate")
    across = F.conv2d(padded, kernel[:, None, None, :], groups=flat.shape[1])
    return F.conv2d(across, kernel[:, None, :, None], groups=flat.shape[1]).view_as(x)


def change_all(views_uint8: Tensor, table: Tensor) -> Tensor:
    """What `apply` does, each change computed for every image and kept where it is asked for: shapes that never differ,
    for a compiler that makes few kernels of it. Without one it is several times slower.

    views_uint8 [V, B, 3, H, W]; table [V, B, 12] float32, as Photometric's, on the same device.
    """
    images = _planes(views_uint8.flatten(0, 1))
    columns = table.flatten(0, 1)[:, :, None, None, None].unbind(1)  # 12 x [V * B, 1, 1, 1]
    for place in range(4):
        changed = images
        for kind, change in enumerate((_brightness, _contrast, _saturation, _hue)):
            changed = torch.where(columns[5 + place] == kind, change(images, columns[1 + kind]), changed)
        images = torch.where(columns[0] > 0, changed, images)
    images = torch.where(columns[9] > 0, _luma(images), images)
    images = torch.where(columns[10] > 0, _blur_by_taps(images, columns[10]), images)
    images = torch.where((columns[11] > 0) & (images >= 0.5), 1 - images, images)
    return _standardise(images).unflatten(0, views_uint8.shape[:2])


def _blur_by_taps(x: Tensor, sigma: Tensor) -> Tensor:
    """_blur as sums of shifted images; sigma 0: any finite number."""
    radius = min(BLUR_RADIUS, x.shape[-1] - 1)
    steps = torch.arange(-radius, radius + 1, device=x.device, dtype=x.dtype)
    kernel = torch.exp(-0.5 * (steps / torch.where(sigma > 0, sigma, 1)) ** 2)  # [n, 1, 1, taps]
    taps = (kernel / kernel.sum(-1, keepdim=True)).unbind(-1)
    height, width = x.shape[-2:]
    for length, dim in ((width, -1), (height, -2)):
        places = torch.arange(length, device=x.device)
        shifted = (x.index_select(dim, (places + step).clamp(0, length - 1)) for step in range(-radius, radius + 1))
        x = functools.reduce(torch.add, (tap[..., None] * image for tap, image in zip(taps, shifted)))
    return x
