"""Photometric changes of the student views, batched on the device, each sample with its own parameters; normalisation.

A-CLIP's changes as its code has them: ColorJitter(.4, .4, .2, .1) with probability .8, in random order; grayscale .2;
Gaussian blur, sigma in [.1, 2], .1; solarize .2. SLIP's for its SimCLR views: saturation .4, blur .5, no solarize.
Parameters are drawn on the CPU, keyed by sample.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

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
    uniform, order = random.random(9), random.permutation(4)
    changes = CHANGES[colours]
    jitter, gray, blur, solarize = uniform[:4] < (JITTER_P, GRAY_P, changes.blur_p, changes.solarize_p)
    amounts = np.array([BRIGHTNESS, CONTRAST, changes.saturation, HUE])
    factors = np.array([1, 1, 1, 0]) + amounts * (2 * uniform[4:8] - 1)
    sigma = SIGMA[0] + (SIGMA[1] - SIGMA[0]) * uniform[8] if blur else 0.0
    return np.array([jitter, *factors, *order, gray, sigma, solarize], dtype=np.float32)


def normalise(images_uint8: Tensor) -> Tensor:
    """[..., 3, H, W] uint8 -> float32, ImageNet mean and std."""
    return _standardise(images_uint8.float() / 255)


def apply(views_uint8: Tensor, photometric: Photometric) -> Tensor:
    """[V, B, 3, H, W] uint8 -> the changed and normalised views, float32, on the same device."""
    images = views_uint8.flatten(0, 1).float() / 255
    rows = photometric.rows()
    for place in range(4):
        for kind, change in enumerate((_brightness, _contrast, _saturation, _hue)):
            chosen = np.flatnonzero((rows[:, 0] > 0) & (rows[:, 5 + place] == kind))
            _change(images, chosen, rows[:, 1 + kind], change)
    _change(images, np.flatnonzero(rows[:, 9] > 0), rows[:, 9], lambda x, _: _luma(x).expand_as(x))
    _change(images, np.flatnonzero(rows[:, 10] > 0), rows[:, 10], _blur)
    _change(images, np.flatnonzero(rows[:, 11] > 0), rows[:, 11], lambda x, _: torch.where(x >= 0.5, 1 - x, x))
    return _standardise(images).unflatten(0, views_uint8.shape[:2])


def _change(images: Tensor, chosen: np.ndarray, values: np.ndarray, change) -> None:  # type: ignore[no-untyped-def]
    """images[chosen] <- change(images[chosen], values[chosen]), in place."""
    if len(chosen):
        index = torch.from_numpy(chosen).to(images.device)
        factor = torch.from_numpy(values[chosen]).to(images.device).view(-1, 1, 1, 1)
        images[index] = change(images[index], factor)


def _standardise(x: Tensor) -> Tensor:
    mean, std = (torch.tensor(v, device=x.device).view(3, 1, 1) for v in (MEAN, STD))
    return (x - mean) / std


def _luma(x: Tensor) -> Tensor:
    return (x * torch.tensor(LUMA, device=x.device).view(3, 1, 1)).sum(-3, keepdim=True)


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
        k = (offset + hue * 6) % 6
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
