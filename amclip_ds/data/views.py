"""From an encoded image to the crops of the student's views and the teacher, out of one decode, as uint8.

Images are read as a viewer shows them: upright (EXIF), colours of CMYK as RGB, 16 bits scaled to 8, what is transparent
over white, the first frame of an animation. The header's size is checked before a pixel is decoded.
"""

import contextlib
import io
import itertools
import re
import warnings
from dataclasses import dataclass, field

import numpy as np
import simplejpeg
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from amclip_ds.data.boxes import draw_boxes

MAX_PIXELS = 89_478_485
START_OF_SCAN = re.compile(rb"\xff\xda")
MAX_SCANS = 200  # an honest progressive JPEG has about ten; each is a pass over all pixels
FORMATS = ("JPEG", "PNG", "WEBP")
EXIF = re.compile(rb"Exif\0\0")
ORIENTATION = 0x0112
UPSIDE = {  # EXIF orientation -> PIL's transposition that makes it upright
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # fmt: skip


class BadImage(ValueError):
    """An image that cannot be trained on; `kind` is too large | unreadable."""

    def __init__(self, kind: str, cause: str) -> None:
        super().__init__(cause)
        self.kind = kind


@dataclass
class Decoded:
    """Pixels, perhaps at a reduced scale."""

    pixels: np.ndarray
    """[h, w, 3] uint8"""
    height: int
    """of the upright image at full scale, in pixels"""
    width: int
    factor: int = 1
    """how many times smaller the pixels are than that: 1, 2, 4 or 8"""
    mended: str = ""
    """what was wrong with the file and did not hinder decoding"""


@dataclass
class Views:
    """One sample's crops. V views, S their side, s the teacher's."""

    views: np.ndarray
    """[V, 3, S, S] uint8"""
    teacher: np.ndarray | None
    """[3, s, s] uint8"""
    boxes: np.ndarray
    """[V + 1, 4] float32, in pixels of the upright image at full scale"""
    mended: str = field(default="")


def make_views(
    content: bytes, random: np.random.Generator, num_views: int, size: int, teacher_size: int | None,
    compat: str = "paper", max_pixels: int = MAX_PIXELS,
) -> Views:  # fmt: skip
    """The crops of one encoded image. Raises BadImage."""
    source = open_image(content, max_pixels)
    boxes = draw_boxes(random, source.height, source.width, num_views, compat)
    sides = [size] * num_views + ([teacher_size] if teacher_size else [])
    reduction = min(min(box[2], box[3]) / side for box, side in zip(boxes, sides))
    decoded = source.decode(float(reduction))
    boxes = _on_grid(boxes, decoded)
    pixels = torch.from_numpy(decoded.pixels)
    crops = [_crop(pixels, box, decoded.factor, side) for box, side in zip(boxes, sides)]
    views = torch.stack(crops[:num_views])
    return Views(views.numpy(), crops[num_views].numpy() if teacher_size else None, boxes, decoded.mended)


def _on_grid(boxes: np.ndarray, decoded: Decoded) -> np.ndarray:
    """The boxes moved to the nearest edges of the decoded pixels, so that what is cut is exactly what they say.

    Only where the pixels are reduced, and then by less than one pixel of the crop. What contained another still does.
    """
    if decoded.factor == 1:
        return boxes
    limits = np.array([decoded.height, decoded.width], dtype=np.float32)
    first = np.floor(boxes[:, :2] / decoded.factor + 0.5) * decoded.factor
    last = np.minimum(np.floor((boxes[:, :2] + boxes[:, 2:]) / decoded.factor + 0.5) * decoded.factor, limits)
    first = np.minimum(first, np.floor((limits - 1) / decoded.factor) * decoded.factor)
    last = np.maximum(last, np.minimum(first + decoded.factor, limits))
    return np.concatenate([first, last - first], axis=1)


def _crop(pixels: Tensor, box: np.ndarray, factor: int, side: int) -> Tensor:
    """[3, side, side] uint8: the box, resized (bilinear, antialiased)."""
    top, left = int(box[0]) // factor, int(box[1]) // factor
    bottom, right = -(-int(box[0] + box[2]) // factor), -(-int(box[1] + box[3]) // factor)
    region = pixels[top:bottom, left:right].permute(2, 0, 1)[None]
    if region.shape[-2:] == (side, side):
        return region[0].contiguous()
    return F.interpolate(region, size=(side, side), mode="bilinear", antialias=True, align_corners=False)[0]


class ImageSource:
    """An image whose header was read and whose pixels were not."""

    def __init__(self, content: bytes, image: Image.Image | None, height: int, width: int, orientation: int) -> None:
        self._content, self._image, self._orientation = content, image, orientation
        self._stored = (height, width)
        turned = orientation >= 5
        self.height, self.width = (width, height) if turned else (height, width)

    def decode(self, reduction: float = 1.0) -> Decoded:
        """Decodes at 1/1, 1/2, 1/4 or 1/8 of the size: the smallest not below 1/reduction. Raises BadImage."""
        factor = next(f for f in (8, 4, 2, 1) if f <= max(reduction, 1.0))
        mended = ""
        if self._image is None:
            try:
                return self._upright(self._turbo(factor), factor)
            except ValueError as error:
                mended = str(error)  # damaged, or a kind of JPEG that the fast decoder does not know: Pillow decides
                self._image = _open(self._content)
        return self._upright(_decode_with_pillow(self._image, factor), factor, mended if _is_damage(mended) else "")

    def _turbo(self, factor: int) -> np.ndarray:
        height, width = self._stored
        least = (-(-height // factor), -(-width // factor)) if factor > 1 else (0, 0)
        return simplejpeg.decode_jpeg(self._content, min_height=least[0], min_width=least[1], min_factor=1)

    def _upright(self, pixels: np.ndarray, factor: int, mended: str = "") -> Decoded:
        if self._orientation in UPSIDE:
            pixels = np.array(Image.fromarray(pixels).transpose(UPSIDE[self._orientation]))
        whole = pixels.shape[:2] == (self.height, self.width)
        return Decoded(pixels, self.height, self.width, 1 if whole else factor, mended)


def open_image(content: bytes, max_pixels: int = MAX_PIXELS) -> ImageSource:
    """Reads the header alone. Raises BadImage for one that cannot be read or tells more than max_pixels."""
    is_jpeg = content[:2] == b"\xff\xd8"
    if is_jpeg and next(itertools.islice(START_OF_SCAN.finditer(content), MAX_SCANS, None), None):
        raise BadImage("unreadable", f"a JPEG of more than {MAX_SCANS} scans, made to keep a decoder busy")
    image = None
    if is_jpeg and not EXIF.search(content[:4096]):
        try:
            height, width, colours, _ = simplejpeg.decode_jpeg_header(content, strict=False)
        except (ValueError, KeyError):  # KeyError: its table of colour spaces, asked for one of a broken header
            colours = ""
        if colours in ("YCbCr", "Gray", "RGB"):
            _check_size(height, width, max_pixels)
            return ImageSource(content, None, height, width, 1)
    image = _open(content)
    _check_size(image.height, image.width, max_pixels)
    orientation = _orientation(image)
    fast = is_jpeg and image.mode in ("RGB", "L")
    return ImageSource(content, None if fast else image, image.height, image.width, orientation)


def _check_size(height: int, width: int, max_pixels: int) -> None:
    if height * width > max_pixels:
        raise BadImage("too large", f"{width} x {height} pixels are above data.max_pixels, {max_pixels}")
    if height < 1 or width < 1:
        raise BadImage("unreadable", f"{width} x {height} pixels")


def _open(content: bytes) -> Image.Image:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return Image.open(io.BytesIO(content), formats=FORMATS)
    except Image.DecompressionBombError as error:
        raise BadImage("too large", str(error)) from None
    except Exception as error:  # decoders raise whatever they like on bytes that anybody may have written
        raise BadImage("unreadable", f"{type(error).__name__}: {error}") from None


def _orientation(image: Image.Image) -> int:
    with contextlib.suppress(Exception):
        value = image.getexif().get(ORIENTATION, 1)
        return value if isinstance(value, int) and 1 <= value <= 8 else 1
    return 1


def _decode_with_pillow(image: Image.Image, factor: int) -> np.ndarray:
    """[h, w, 3] uint8 as stored (not yet upright). Raises BadImage."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if factor > 1:
                image.draft("RGB", (max(1, image.width // factor), max(1, image.height // factor)))
            image.load()
            return np.array(as_rgb(image))
    except Exception as error:
        raise BadImage("unreadable", f"{type(error).__name__}: {error}") from None


def as_rgb(image: Image.Image) -> Image.Image:
    """A loaded image's colours as a viewer shows them on white."""
    if image.mode.startswith("I"):  # 16 bits of gray
        values = np.asarray(image).astype(np.int64)
        image = Image.fromarray((values >> 8).clip(0, 255).astype(np.uint8))
    if image.mode == "CMYK":
        return _cmyk_as_rgb(image)
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def _cmyk_as_rgb(image: Image.Image) -> Image.Image:
    """By the embedded profile where there is a usable one, else by the plain formula."""
    profile = image.info.get("icc_profile")
    if profile:
        from PIL import ImageCms

        with contextlib.suppress(ImageCms.PyCMSError, OSError):
            source, target = ImageCms.ImageCmsProfile(io.BytesIO(profile)), ImageCms.createProfile("sRGB")
            converted = ImageCms.profileToProfile(image, source, target, outputMode="RGB")
            if converted is not None:
                return converted
    return image.convert("RGB")


def _is_damage(cause: str) -> bool:
    """Whether a decoder complained about the data, not about a format it does not know."""
    return bool(cause) and not re.search(r"(?i)colorspace|unsupported|conversion", cause)
