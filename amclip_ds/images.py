"""The one opener of images: training, checks, evaluation, export proofs and the demo read theirs through it.

JPEG, PNG and WebP, by their content and never by a name; no other decoder is started. What a header claims
is checked before a pixel is decoded. Images are read as a viewer shows them: upright (EXIF), CMYK as RGB, 16 bits
scaled to 8, what is transparent over white, the first frame of an animation.
"""

import contextlib
import io
import math
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import simplejpeg
from PIL import Image, UnidentifiedImageError

T = TypeVar("T")
MAX_PIXELS = 89_478_485
MAX_SCANS = 200  # an honest progressive JPEG has about ten; each is a pass over all pixels
MAX_PARTS = 1 << 17  # segments of a JPEG, chunks of a PNG; each costs a decoder some time and may be empty
STRIP = 1 << 20  # pixels whose colours are converted at once
FORMATS = ("JPEG", "PNG", "WEBP")
ARE_READ = "JPEG, PNG, WebP are read"
SIGNATURES = {
    b"\xff\xd8\xff": "JPEG",
    b"\x89PNG\r\n\x1a\n": "PNG",
    b"GIF8": "a GIF",
    b"BM": "a BMP",
    b"II*\0": "a TIFF",
    b"MM\0*": "a TIFF",
    b"II+\0": "a TIFF",
    b"MM\0+": "a TIFF",
    b"%!PS": "PostScript",
    b"\xc5\xd0\xd3\xc6": "PostScript",
    b"%PDF": "a PDF",
    b"\0\0\1\0": "an ICO",
    b"8BPS": "a PSD",
    b"\xff\x0a": "a JPEG XL",
    b"\0\0\0\x0cJXL ": "a JPEG XL",
    b"\0\0\0\x0cjP  ": "a JPEG 2000",
    b"\xff\x4f\xff\x51": "a JPEG 2000",
    b"\x1a\x45\xdf\xa3": "a video",
    b"\x1f\x8b": "a gzip archive",
    b"PK\3\4": "a zip archive",
    b"\0\0\0\0": "zeros",
}
BRANDS = {b"avif": "an AVIF", b"avis": "an AVIF", b"heic": "a HEIC", b"heix": "a HEIC", b"mif1": "a HEIC"}
MARK = re.compile(rb"\xff[^\x00\x01\xd0-\xd8\xff]")  # of a JPEG's segment; restarts and stuffed bytes are none
START_OF_SCAN, END_OF_IMAGE, APP1 = 0xDA, 0xD9, 0xE1
FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
SEQUENTIAL = {0xC0, 0xC1, 0xC9}
PNG_CHUNKS = {b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND", b"eXIf"}
XMP = b"XML:com.adobe.xmp\0\0"  # a text of a PNG, uncompressed, in which Pillow finds the orientation
ORIENTATION = 0x0112
EXIF_TURNS: dict[int, Callable[[np.ndarray], np.ndarray]] = {  # EXIF orientation -> the upright view of the pixels
    2: lambda pixels: pixels[:, ::-1],
    3: lambda pixels: pixels[::-1, ::-1],
    4: lambda pixels: pixels[::-1],
    5: lambda pixels: pixels.swapaxes(0, 1),
    6: lambda pixels: pixels[::-1].swapaxes(0, 1),
    7: lambda pixels: pixels[::-1, ::-1].swapaxes(0, 1),
    8: lambda pixels: pixels[:, ::-1].swapaxes(0, 1),
}


class BadImage(ValueError):
    """An image that cannot be read; its text is the cause alone, the same for all images with that cause."""

    def __init__(self, kind: str, cause: str, detail: str = "") -> None:
        """kind: too large | unreadable. detail: what is this image's own, such as its size."""
        super().__init__(cause)
        self.kind, self.detail = kind, detail


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
    damaged: str = ""
    """what was wrong with the file and did not hinder decoding"""


class Scratch:
    """Memory that is used again for image after image: new pages cost the system time.

    What is larger than most_bytes gets memory of its own, which goes back when it is no longer used.
    """

    def __init__(self, most_bytes: int = 1 << 24) -> None:
        self._held, self._most_bytes = np.empty(0, np.uint8), most_bytes

    def take(self, *shape: int) -> np.ndarray:
        """[*shape] uint8 of any content. What was taken before is overwritten through it."""
        size = math.prod(shape)
        if size > self._most_bytes:
            return np.empty(shape, np.uint8)
        if size > self._held.size:
            self._held = np.empty(size, np.uint8)
        return self._held[:size].reshape(shape)


class ImageSource:
    """An image whose header was read and whose pixels were not."""

    def __init__(self, content: bytes, image: Image.Image | None, height: int, width: int, orientation: int) -> None:
        self._content, self._image, self._orientation = content, image, orientation
        self._stored = (height, width)
        turned = orientation >= 5
        self.height, self.width = (width, height) if turned else (height, width)

    def decode(self, reduction: float = 1.0, scratch: Scratch | None = None) -> Decoded:
        """Decodes at 1/1, 1/2, 1/4 or 1/8 of the size: the smallest not below 1/reduction. Raises BadImage.

        scratch: where the pixels may be put, which are then valid until the next image's.
        """
        factor = next(f for f in (8, 4, 2, 1) if f <= max(reduction, 1.0))
        damaged = ""
        if self._image is None:
            try:
                return self._upright(self._turbo(factor, scratch), factor)
            except ValueError as error:
                damaged = str(error)  # damaged, or a kind of JPEG that the fast decoder does not know: Pillow decides
        pixels = _decode(self._pillow(), _pixels, factor)
        return self._upright(pixels, factor, _countable(damaged) if _is_damage(damaged) else "")

    def picture(self, plain: bool = False) -> Image.Image:
        """The whole image in RGB, decoded by Pillow. Raises BadImage.

        plain: colours by Pillow's convert alone, neither turned nor laid on white, as CLIP_benchmark opens its sets.
        """
        if plain or self._orientation not in EXIF_TURNS:
            return _decode(self._pillow(), (lambda found: found.convert("RGB")) if plain else as_rgb)
        return Image.fromarray(self._upright(_decode(self._pillow(), _pixels), 1).pixels)

    def _pillow(self) -> Image.Image:
        if self._image is None:
            self._image = _open(self._content, "JPEG")
        return self._image

    def _turbo(self, factor: int, scratch: Scratch | None) -> np.ndarray:
        height, width = (-(-side // factor) for side in self._stored)
        least = (height, width) if factor > 1 else (0, 0)
        buffer = scratch.take(height, width, 3) if scratch else None
        return simplejpeg.decode_jpeg(
            self._content, min_height=least[0], min_width=least[1], min_factor=1, buffer=buffer
        )

    def _upright(self, pixels: np.ndarray, factor: int, damaged: str = "") -> Decoded:
        if self._orientation in EXIF_TURNS:
            pixels = np.ascontiguousarray(EXIF_TURNS[self._orientation](pixels))
        whole = pixels.shape[:2] == (self.height, self.width)
        return Decoded(pixels, self.height, self.width, 1 if whole else factor, damaged)


def open_image(content: bytes, max_pixels: int = MAX_PIXELS) -> ImageSource:
    """Reads the header alone. Raises BadImage for one that cannot be read or claims more than max_pixels."""
    kind = kind_of(content)
    if kind == "WEBP":
        _check_size(*_webp_size(content), max_pixels)  # Pillow takes memory for a canvas as soon as it opens one
    if kind == "PNG":
        content = _bare_png(content)
    if kind == "JPEG" and not _walk_jpeg(content).has_exif:
        try:
            height, width, colours, _ = simplejpeg.decode_jpeg_header(content, strict=False)
        except (ValueError, KeyError):  # KeyError: its table of colour spaces, asked for one of a broken header
            colours = ""
        if colours in ("YCbCr", "Gray", "RGB"):
            _check_size(width, height, max_pixels)
            return ImageSource(content, None, height, width, 1)
    image = _open(content, kind)
    _check_size(image.width, image.height, max_pixels)
    fast = kind == "JPEG" and image.mode in ("RGB", "L")
    return ImageSource(content, None if fast else image, image.height, image.width, _orientation(image))


def header_size(head: bytes) -> tuple[int, int]:
    """(width, height) of an image of which only the beginning may be there; (0, 0) where that does not say it."""
    try:
        kind = kind_of(head)
        if kind == "JPEG":
            return _walk_jpeg(head).size
        if kind == "WEBP":
            return _webp_size(head)
    except BadImage:
        return (0, 0)
    is_header = head[12:16] == b"IHDR" and len(head) >= 24
    return (int.from_bytes(head[16:20], "big"), int.from_bytes(head[20:24], "big")) if is_header else (0, 0)


def kind_of(content: bytes) -> str:
    """JPEG, PNG or WEBP, by the first bytes. Raises BadImage that names what else it is."""
    if content[:4] == b"RIFF" and content[8:12] == b"WEBP":
        return "WEBP"
    kind = next((name for start, name in SIGNATURES.items() if content.startswith(start)), None)
    if kind in FORMATS:
        return kind
    if kind is None and content[4:8] == b"ftyp":
        kind = BRANDS.get(content[8:12], "a video")
    if kind is None:
        start = content[:1024].removeprefix(b"\xef\xbb\xbf").lstrip().lower()
        is_page = start.startswith((b"<!doctype html", b"<html"))
        kind = "a page of HTML" if is_page else "an SVG" if b"<svg" in start else None
    raise BadImage("unreadable", f"is {kind or ('no image' if content else 'empty')}; {ARE_READ}")


@dataclass
class _Jpeg:
    has_exif: bool = False
    size: tuple[int, int] = (0, 0)
    """(width, height) of the first frame"""


def _walk_jpeg(content: bytes) -> _Jpeg:
    """What the segments before the end mark say; what is inside or behind them is not checked.

    Raises BadImage for more scans or segments than an honest one has. A sequential JPEG whose first scan holds all
    colours is decoded in that one pass, whatever follows.
    """
    found, place, scans, in_one = _Jpeg(), 2, 0, 0
    for _ in range(MAX_PARTS):
        mark = MARK.search(content, place)
        end = mark.start() if mark else len(content)
        if not scans and end - place > MAX_PARTS:
            raise BadImage("unreadable", "a damaged JPEG: no segments where they should be")
        if mark is None or content[end + 1] == END_OF_IMAGE:
            return found
        code, place = content[end + 1], end + 2
        body = content[place + 2 : place + 10]
        if code == START_OF_SCAN:
            scans += 1
            if body[:1] == bytes([in_one]):
                return found
            if scans > MAX_SCANS:
                raise BadImage("unreadable", f"a JPEG of more than {MAX_SCANS} scans, made to keep a decoder busy")
        elif code == APP1 and body.startswith(b"Exif\0\0"):
            found.has_exif = True
        elif code in FRAMES and len(body) >= 6 and found.size == (0, 0):
            found.size = (int.from_bytes(body[3:5], "big"), int.from_bytes(body[1:3], "big"))
            in_one = body[5] if code in SEQUENTIAL else 0
        place += max(2, int.from_bytes(content[place : place + 2], "big"))
    raise BadImage("unreadable", f"a JPEG of more than {MAX_PARTS} segments, made to keep a decoder busy")


def _bare_png(content: bytes) -> bytes:
    """The chunks that make the picture: no texts, profiles and frames, whose unpacked size has no limit."""
    kept: list[bytes | memoryview] = [content[:8]]
    view, place = memoryview(content), 8
    for count in range(1, MAX_PARTS):
        end = place + 12 + int.from_bytes(content[place : place + 4], "big")
        name = content[place + 4 : place + 8]
        is_xmp = name == b"iTXt" and content.startswith(XMP, place + 8) and end - place < 1 << 20
        if name in PNG_CHUNKS or is_xmp:
            kept.append(view[place:end])
        if name == b"IEND" or end >= len(content):
            return content if len(kept) == count + 1 else b"".join(kept)
        place = end
    raise BadImage("unreadable", f"a PNG of more than {MAX_PARTS} chunks, made to keep a decoder busy")


def _webp_size(content: bytes) -> tuple[int, int]:
    """(width, height) of the canvas; (0, 0) where the header is none or cut."""
    if len(content) < 30:
        return (0, 0)
    if content[12:16] == b"VP8X":
        return 1 + int.from_bytes(content[24:27], "little"), 1 + int.from_bytes(content[27:30], "little")
    if content[12:16] == b"VP8L":
        bits = int.from_bytes(content[21:25], "little")
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    return int.from_bytes(content[26:28], "little") & 0x3FFF, int.from_bytes(content[28:30], "little") & 0x3FFF


def _check_size(width: int, height: int, max_pixels: int) -> None:
    if height * width > max_pixels:
        raise BadImage("too large", f"more than {max_pixels} pixels", f"{width} x {height} pixels")
    if height < 1 or width < 1:
        raise BadImage("unreadable", "a header without a size")


def _open(content: bytes, kind: str) -> Image.Image:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return Image.open(io.BytesIO(content), formats=(kind,))
    except Image.DecompressionBombError:
        raise BadImage("too large", "more pixels than Pillow opens") from None
    except UnidentifiedImageError:
        raise BadImage("unreadable", f"a {kind} with a damaged header") from None
    except Exception as error:  # decoders raise whatever they like on bytes that anybody may have written
        raise BadImage("unreadable", f"a damaged {kind}: {_countable(str(error))}") from None


def _orientation(image: Image.Image) -> int:
    with contextlib.suppress(Exception):
        value = image.getexif().get(ORIENTATION, 1)
        return value if isinstance(value, int) and 1 <= value <= 8 else 1
    return 1


def _decode(image: Image.Image, colours: Callable[[Image.Image], T], factor: int = 1) -> T:
    """What `colours` makes of the loaded image, as stored (not yet upright). Raises BadImage."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if factor > 1:
                image.draft("RGB", (max(1, image.width // factor), max(1, image.height // factor)))
            image.load()
            return colours(image)
    except Exception as error:
        raise BadImage("unreadable", f"a damaged {image.format}: {_countable(str(error))}") from None


def _pixels(image: Image.Image) -> np.ndarray:
    """[h, w, 3] uint8 of a loaded image, some rows at a time: the copies that colours take are many times the image."""
    rows = max(1, STRIP // image.width)
    pixels = np.empty((image.height, image.width, 3), np.uint8)
    for top in range(0, image.height, rows):
        bottom = min(top + rows, image.height)
        part = image if rows >= image.height else image.crop((0, top, image.width, bottom))
        pixels[top:bottom] = np.asarray(as_rgb(part))
    return pixels


def as_rgb(image: Image.Image) -> Image.Image:
    """A loaded image's colours as a viewer shows them on white."""
    if image.mode.startswith("I"):  # 16 bits of gray
        image = Image.fromarray((np.asarray(image) >> 8).clip(0, 255).astype(np.uint8))
    if image.mode == "CMYK":
        return _cmyk_as_rgb(image)
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        return _on_white(image)
    return image if image.mode == "RGB" else image.convert("RGB")


def _on_white(image: Image.Image) -> Image.Image:
    """Some rows at a time."""
    shown, rows = Image.new("RGB", image.size), max(1, STRIP // image.width)
    for top in range(0, image.height, rows):
        part = image.crop((0, top, image.width, min(top + rows, image.height))).convert("RGBA")
        white = Image.new("RGBA", part.size, "white")
        shown.paste(Image.alpha_composite(white, part).convert("RGB"), (0, top))
    return shown


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


def _countable(cause: str) -> str:
    """A decoder's words without this image's own numbers, bytes and addresses, so that equal causes are equal."""
    return " ".join(re.sub(r"b'.*?'|b\".*?\"|0x[0-9a-fA-F]+|\d+", "N", cause).split())[:120]
