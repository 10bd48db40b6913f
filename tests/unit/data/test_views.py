"""Images as a viewer shows them, cut from one decode: orientation, colours, scale; what is refused by its header."""

import io
import struct
import zlib
from collections.abc import Iterator

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps

from amclip_ds.data.boxes import draw_boxes
from amclip_ds.data.config import View
from amclip_ds.data.views import ViewMaker, planes
from amclip_ds.images import BadImage, Decoded, open_image
from amclip_ds.keyed_random import keyed
from tests.unit.data.shards import encode, jpeg, make_views

TWO = [View(), View()]


def photograph(width: int, height: int, seed: int = 0) -> Image.Image:
    """Smooth structure at several scales."""
    random, total = np.random.default_rng(seed), np.zeros((height, width, 3))
    for cells in (3, 9, 27):
        coarse = Image.fromarray(random.integers(0, 255, (cells, cells, 3), dtype=np.uint8))
        total += np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), float) / 3
    return Image.fromarray(total.clip(0, 255).astype(np.uint8))


def cut_slowly(content: bytes, boxes: np.ndarray, size: int) -> np.ndarray:
    """The straightforward way: full decode, upright, crop, PIL resize."""
    image = ImageOps.exif_transpose(Image.open(io.BytesIO(content))).convert("RGB")
    crops = [image.crop((int(x), int(y), int(x + w), int(y + h))) for y, x, h, w in boxes]
    return np.stack(
        [np.asarray(crop.resize((size, size), Image.Resampling.BILINEAR)).transpose(2, 0, 1) for crop in crops]
    )


def gap(first: np.ndarray, second: np.ndarray) -> tuple[int, float]:
    difference = np.abs(first.astype(int) - second.astype(int))
    return int(difference.max()), float(difference.mean())


@pytest.mark.parametrize("kind, options", [("PNG", {}), ("WEBP", {"lossless": True}), ("JPEG", {"quality": 92})])
def test_crops_equal_the_slow_way(kind: str, options: dict) -> None:
    content = encode(photograph(160, 120), kind, **options)
    for seed in range(5):
        made = make_views(content, keyed(seed), TWO, 64, 64)
        slow = cut_slowly(content, made.boxes, 64)
        assert made.teacher is not None and made.views.dtype == np.uint8
        most, mean = gap(np.concatenate([made.views, made.teacher[None]]), slow)
        assert most <= 3 and mean < 0.05, (seed, most, mean)
        moved = made.boxes + np.array([3, 0, 0, 0])  # the twin: three pixels off is seen
        assert gap(made.views, cut_slowly(content, moved, 64)[:2])[1] > 0.3


def cut_by_interpolate(decoded: Decoded, boxes: np.ndarray, size: int) -> torch.Tensor:
    """[n, 3, size, size]: the public way, each crop resized into memory of its own."""
    crops = []
    for y, x, height, width in boxes.astype(int).tolist():
        ends = [-(-end // decoded.factor) for end in (y + height, x + width)]
        region = decoded.pixels[y // decoded.factor : ends[0], x // decoded.factor : ends[1]]
        source = torch.from_numpy(region).permute(2, 0, 1)[None]
        crops.append(F.interpolate(source, (size, size), mode="bilinear", antialias=True))
    return torch.cat(crops)


def turned(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def images_of_all_kinds() -> Iterator[bytes]:
    for number, (width, height) in enumerate([(160, 120), (500, 375), (64, 64), (31, 200), (301, 403)]):
        image = photograph(width, height, number)
        yield encode(image, "JPEG", quality=92)
        yield encode(image, "JPEG", quality=80, progressive=True, subsampling=0)
        yield encode(image.convert("L"), "JPEG")
        yield encode(image, "JPEG", exif=turned(1 + number))
        yield encode(image, "PNG", exif=turned(8 - number))
        yield encode(image, "WEBP", lossless=True)


def test_crops_are_what_interpolate_makes_to_the_bit() -> None:
    """One maker for all of them: nothing of an image is left in the next one's crops."""
    maker, views, factors = ViewMaker(), [View(), View(scale=(0.4, 1.0))], set()
    for number, content in enumerate(images_of_all_kinds()):
        size = 64 if number % 4 else 24
        crops = planes(torch.empty(3, size, size, 3, dtype=torch.uint8))
        made = maker.make(content, keyed(number), views, crops.split(1))
        source = open_image(content)
        drawn = draw_boxes(keyed(number), source.height, source.width, views)
        decoded = source.decode(float(drawn[:, 2:].min()) / size)
        factors.add(decoded.factor)
        assert torch.equal(crops, cut_by_interpolate(decoded, made.boxes, size)), number
        less = made.boxes - np.array([0, 0, 0, 2 * decoded.factor])  # the twin: two columns less
        assert not torch.equal(crops, cut_by_interpolate(decoded, less, size)), number
    assert factors == {1, 2, 4, 8}


@pytest.mark.parametrize("width, height, size", [(1000, 760, 64), (1201, 801, 112), (640, 480, 224)])
def test_a_reduced_decode_loses_nothing_to_speak_of(width: int, height: int, size: int) -> None:
    content = encode(photograph(width, height), "JPEG", quality=92)
    for seed in range(3):
        made = make_views(content, keyed(seed), TWO, size, size)
        most, mean = gap(made.views, cut_slowly(content, made.boxes[:2], size))
        assert most <= 16 and mean < 0.8, (seed, most, mean)
        assert made.teacher is not None
        assert gap(made.teacher, cut_slowly(content, made.boxes[2:], size)[0])[1] < 0.8


@pytest.mark.parametrize("size, factor", [(64, 8), (100, 4), (200, 2), (300, 1), (700, 1)])
def test_the_scale_is_the_smallest_no_crop_is_enlarged_from(size: int, factor: int) -> None:
    source = open_image(encode(photograph(800, 640), "JPEG"))
    decoded = source.decode(560 / size)  # the smallest box is 560 pixels
    assert decoded.pixels.shape[:2] == (-(-640 // factor), -(-800 // factor))
    assert (decoded.height, decoded.width) == (640, 800)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_exif_orientation_is_obeyed(kind: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = encode(photograph(96, 64, seed=3), kind, exif=exif, **({} if kind == "PNG" else {"quality": 100}))
    decoded = open_image(content).decode()
    upright = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(content))).convert("RGB"))
    assert decoded.pixels.shape == upright.shape == (decoded.height, decoded.width, 3)
    assert gap(decoded.pixels, upright)[1] < 1
    if orientation > 1:
        stored = np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))
        assert stored.shape != upright.shape or gap(stored, upright)[1] > 5


RED = (200, 30, 40)


def flat(mode: str, colour: object, **info: object) -> Image.Image:
    image = Image.new(mode, (32, 24), colour)  # type: ignore[arg-type]
    image.info.update(info)  # type: ignore[arg-type]
    return image


def gray16(value: int) -> bytes:
    """A PNG of 16 bits of gray, written by hand."""
    rows = b"".join(b"\0" + struct.pack(">H", value) * 32 for _ in range(24))

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 32, 24, 16, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    "name, content, colour",
    [
        ("gray JPEG", encode(flat("L", 90), "JPEG"), (90, 90, 90)),
        ("CMYK JPEG", encode(flat("CMYK", (0, 200, 100, 0)), "JPEG", quality=100), (255, 55, 155)),
        ("gray PNG", encode(flat("L", 90), "PNG"), (90, 90, 90)),
        ("black and white PNG", encode(flat("1", 1), "PNG"), (255, 255, 255)),
        ("16 bit PNG", gray16(0x8001), (0x80, 0x80, 0x80)),
        ("16 bit PNG, dark", gray16(0x0123), (1, 1, 1)),
        ("palette PNG", encode(flat("RGB", RED).quantize(4), "PNG"), RED),
        ("opaque RGBA", encode(flat("RGBA", (*RED, 255)), "PNG"), RED),
        ("transparent RGBA", encode(flat("RGBA", (*RED, 0)), "PNG"), (255, 255, 255)),
        ("half transparent WebP", encode(flat("RGBA", (0, 0, 0, 128)), "WEBP", lossless=True), (127, 127, 127)),
        ("gray and alpha", encode(flat("LA", (10, 0)), "PNG"), (255, 255, 255)),
        ("RGB with a transparent colour", encode(flat("RGB", RED), "PNG", transparency=RED), (255, 255, 255)),
        ("palette with a transparent colour", encode(flat("P", 0), "PNG", transparency=0), (255, 255, 255)),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_colours_are_what_a_viewer_shows(name: str, content: bytes, colour: tuple[int, int, int]) -> None:
    pixels = open_image(content).decode().pixels
    assert pixels.shape == (24, 32, 3) and pixels.dtype == np.uint8
    assert np.abs(pixels.reshape(-1, 3).astype(int) - colour).max() <= 3, pixels[0, 0]


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_an_animation_shows_its_first_frame(kind: str) -> None:
    frames = [flat("RGB", RED), flat("RGB", (0, 0, 255))]
    options = {"lossless": True} if kind == "WEBP" else {}
    content = encode(frames[0], kind, save_all=True, append_images=frames[1:], duration=100, **options)
    assert np.abs(open_image(content).decode().pixels[0, 0].astype(int) - RED).max() <= 3


def test_a_large_image_is_refused_by_its_header(monkeypatch: pytest.MonkeyPatch) -> None:
    content = encode(photograph(200, 100), "JPEG")
    with monkeypatch.context() as no_decoding:
        no_decoding.setattr("simplejpeg.decode_jpeg", None)
        no_decoding.setattr("amclip_ds.images._decode", None)
        for encoded in (content, encode(photograph(200, 100), "PNG")):
            with pytest.raises(BadImage, match="more than 19999 pixels") as caught:
                make_views(encoded, keyed(0), TWO, 16, 16, max_pixels=19_999)
            assert caught.value.kind == "too large" and caught.value.detail == "200 x 100 pixels"
    assert make_views(content, keyed(0), TWO, 16, 16, max_pixels=20_000).views.shape == (2, 3, 16, 16)


@pytest.mark.parametrize(
    "content", [b"", b"\xff\xd8", b"\xff\xd8\xff\xe0junk", b"GIF89a", b"\x89PNG\r\n\x1a\n", b"RIFF____WEBP"]
)
def test_what_is_no_image_is_reported(content: bytes) -> None:
    with pytest.raises(BadImage) as caught:
        make_views(content, keyed(0), TWO, 16, 16)
    assert caught.value.kind == "unreadable"


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_a_cut_image_is_refused(kind: str) -> None:
    content = encode(photograph(200, 160), kind)
    for part in (0.3, 0.6, 0.9):
        with pytest.raises(BadImage):
            make_views(content[: int(part * len(content))], keyed(0), TWO, 16, 16)


def test_what_a_viewer_shows_all_the_same_is_fixed_and_reported() -> None:
    """Junk between two segments: strict decoders refuse it, viewers do not."""
    content = jpeg(width=64, height=48)
    place = content.index(b"\xff\xdb")
    made = make_views(content[:place] + b"\x00\x00" + content[place:], keyed(0), TWO, 16, 16)
    assert made.damaged
    assert gap(made.views, make_views(content, keyed(0), TWO, 16, 16).views)[0] <= 2
    assert not make_views(content, keyed(0), TWO, 16, 16).damaged


def test_one_pixel_and_extreme_shapes_give_views() -> None:
    for width, height in ((1, 1), (1, 500), (500, 1), (3, 2)):
        for kind in ("JPEG", "PNG"):
            made = make_views(encode(photograph(width, height), kind), keyed(0), TWO, 16, 8)
            assert made.views.shape == (2, 3, 16, 16)
            assert made.teacher is not None and made.teacher.shape == (3, 8, 8)


def test_without_a_teacher_nothing_is_cut_for_it() -> None:
    made = make_views(jpeg(), keyed(0), TWO[:1], 16, None)
    assert made.teacher is None and made.boxes.shape == (2, 4) and torch.from_numpy(made.views).shape == (1, 3, 16, 16)
