"""The one opener: formats by content, limits before decoding, marks where they can be, causes that can be counted."""

import ast
import io
import struct
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from amclip_ds.data.check import CheckConfig, check
from amclip_ds.images import BadImage, header_size, open_image
from tests.unit.data.shards import encode, jpeg, write_tar

PACKAGE = Path(__file__).resolve().parents[3] / "amclip_ds"
EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 20 20\n%%EndComments\n(/tmp/x) (w) file closefile\nshowpage\n"
OTHERS = [
    (EPS, "is PostScript"),
    (b"\xc5\xd0\xd3\xc6" + bytes(26) + EPS, "is PostScript"),
    (encode(Image.new("RGB", (9, 9)), "GIF"), "is a GIF"),
    (encode(Image.new("RGB", (9, 9)), "BMP"), "is a BMP"),
    (encode(Image.new("RGB", (9, 9)), "TIFF"), "is a TIFF"),
    (encode(Image.new("RGB", (16, 16)), "ICO"), "is an ICO"),
    (encode(Image.new("RGB", (9, 9)), "PDF"), "is a PDF"),
    (encode(Image.new("RGB", (9, 9)), "JPEG2000"), "is a JPEG 2000"),
    (encode(Image.new("RGB", (9, 9)), "TGA"), "is no image"),
    (b"\0\0\0\x1cftypavif\0\0\0\0avifmif1", "is an AVIF"),
    (b"\0\0\0\x1cftypisom\0\0\0\0isommp42", "is a video"),
    (b"\xef\xbb\xbf <?xml version='1.0'?><svg onload='x()'/>", "is an SVG"),
    (b"\n<!DOCTYPE html><html><svg/></html>", "is a page of HTML"),
    (b"", "is empty"),
    (bytes(4000), "is zeros"),
    (b"RIFF\x24\0\0\0WAVEfmt ", "is no image"),
]


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def segment(code: int, data: bytes) -> bytes:
    return bytes([0xFF, code]) + struct.pack(">H", len(data) + 2) + data


def progressive() -> bytes:
    return encode(Image.open(io.BytesIO(jpeg(width=64, height=48))), "JPEG", progressive=True)


def pixels(content: bytes) -> np.ndarray:
    return open_image(content).decode().pixels


def test_images_are_opened_in_one_place_alone() -> None:
    openers = {
        str(path.relative_to(PACKAGE))
        for path in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute)
        and (node.attr.startswith("decode_jpeg") or ast.unparse(node) in ("Image.open", "PIL.Image.open"))
    }
    assert openers == {"images.py"}, openers


@pytest.mark.parametrize(("content", "said"), OTHERS, ids=[said for _, said in OTHERS])
def test_other_formats_are_named_and_not_opened(content: bytes, said: str) -> None:
    with pytest.raises(BadImage) as caught:
        open_image(content)
    assert str(caught.value) == f"{said}; JPEG, PNG, WebP are read" and header_size(content) == (0, 0)


def test_the_check_counts_the_causes(tmp_path: Path) -> None:
    cut = jpeg(1)[:300], jpeg(2)[:330]
    images = [encode(Image.new("RGB", (9, 9)), "GIF")] * 3 + [EPS, *cut, jpeg(3)]
    members = {
        f"{n}.{end}": data for n, image in enumerate(images) for end, data in (("jpg", image), ("txt", b"words"))
    }
    shard = write_tar(tmp_path / "0.tar", members)
    report = check([str(shard)], CheckConfig(), processes=1)
    assert report.problems()["broken image"] == 6 and report.total("read") == 1
    causes = report.as_json()["shards"][0]["causes"]
    assert causes["is a GIF; JPEG, PNG, WebP are read"] == 3 and causes["is PostScript; JPEG, PNG, WebP are read"] == 1
    assert sum(causes.values()) == 6 and not any("0x" in cause for cause in causes)


def test_what_follows_the_end_mark_is_not_checked() -> None:
    video = b"\0\0\0\x18ftypmp42" + b"\xff\xda" * 1000 + np.random.default_rng(0).bytes(16 << 20)
    for content in (progressive(), jpeg(width=64, height=48)):
        began = time.process_time()
        assert np.array_equal(pixels(content + video), pixels(content))
        assert time.process_time() - began < 2


def test_marks_inside_metadata_are_not_of_the_picture() -> None:
    """A thumbnail, or random bytes, in APP segments of any length: none of their marks counts, the rotation does."""
    exif = Image.Exif()
    exif[0x0112] = 6
    content = encode(Image.open(io.BytesIO(progressive())), "JPEG", progressive=True, exif=exif)
    assert pixels(content).shape == (64, 48, 3)
    before = segment(0xE2, b"\xff\xda\0\x08" * 10_000) * 200  # 8 MB
    moved = content[:2] + before + content[2:]
    assert np.array_equal(pixels(moved), pixels(content)) and header_size(moved) == (64, 48)
    assert header_size(moved[: 1 << 20]) == (0, 0)


def test_scans_before_the_end_mark_are_counted() -> None:
    content = progressive()
    last = content[content.rindex(b"\xff\xda") : -2]
    assert pixels(content[:-2] + last * 100 + content[-2:]).shape == (48, 64, 3)
    for end in (b"", content[-2:], b"\xff\xff\xff" + content[-2:]):
        with pytest.raises(BadImage, match="more than 200 scans"):
            open_image(content[:-2] + last * 300 + end)


@pytest.mark.parametrize(
    "content",
    [
        b"\xff\xd8" + b"\xff" * (8 << 20) + b"\0",
        b"\xff\xd8" + segment(0xFE, b"") * (1 << 20),
        b"\xff\xd8\xff\xda" + b"\xff\0" * (4 << 20),
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", 9, 9, 8, 2, 0, 0, 0))
        + chunk(b"IDAT", b"") * (1 << 20),
    ],
    ids=["fill bytes", "segments", "stuffed bytes", "chunks"],
)
def test_a_header_without_end_takes_no_time(content: bytes) -> None:
    began = time.process_time()
    with pytest.raises(BadImage):
        open_image(content).decode()
    assert time.process_time() - began < 3


def test_metadata_of_a_png_cost_nothing_and_hinder_nothing() -> None:
    plain = encode(Image.open(io.BytesIO(jpeg())), "PNG")
    packed = zlib.compress(bytes(64 << 20))
    more = [
        chunk(b"iCCP", b"profile\0\0" + packed),
        chunk(b"zTXt", b"Comment\0\0" + packed),
        chunk(b"iTXt", b"Comment\0\1\0\0\0" + packed),
        chunk(b"tEXt", b"Comment\0" + bytes(20 << 20)),
        chunk(b"acTL", struct.pack(">II", 1 << 30, 0)),
        chunk(b"tEXt", b"Comment\0")[:-4] + b"none",
    ]
    assert np.array_equal(pixels(plain[:33] + b"".join(more) + plain[33:] + bytes(1 << 20)), pixels(plain))
    with pytest.raises(BadImage):
        pixels(plain[:-40])


def test_the_orientation_of_a_png_is_kept() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    assert pixels(encode(Image.new("RGB", (20, 10)), "PNG", exif=exif)).shape == (20, 10, 3)
    plain = encode(Image.new("RGB", (20, 10)), "PNG")
    xmp = b"XML:com.adobe.xmp\0\0\0\0\0<x xmlns:tiff='http://ns.adobe.com/tiff/1.0/' tiff:Orientation=\"6\"/>"
    assert pixels(plain[:33] + chunk(b"iTXt", xmp) + plain[33:]).shape == (20, 10, 3)


def test_a_canvas_is_refused_before_memory_is_taken() -> None:
    """A WebP of 50 bytes may claim 16384 x 16384, and its decoder takes 2 GB when it is made."""
    whole = encode(Image.new("RGBA", (8, 8)), "WEBP", save_all=True, append_images=[Image.new("RGBA", (8, 8), "red")])
    claims = whole[:24] + b"\xff\x3f\0\xff\x3f\0" + whole[30:]
    with pytest.raises(BadImage) as caught:
        open_image(claims)
    assert caught.value.kind == "too large" and caught.value.detail == "16384 x 16384 pixels"
    for options in ({"lossless": True}, {}, {"exif": b"Exif\0\0II*\0\x08\0\0\0\0\0\0\0\0\0"}):
        content = encode(Image.new("RGB", (301, 203)), "WEBP", **options)
        assert header_size(content) == (301, 203) and pixels(content).shape == (203, 301, 3)


def test_evaluation_opens_upright_or_plain() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    half = Image.new("RGBA", (20, 10), (0, 0, 0, 0))
    content = encode(half, "PNG", exif=exif)
    upright, plain = open_image(content).picture(), open_image(content).picture(plain=True)
    assert upright.size == (10, 20) and upright.getpixel((0, 0)) == (255, 255, 255)
    assert plain.size == (20, 10) and plain.getpixel((0, 0)) == (0, 0, 0)
    ordinary = jpeg(width=50, height=40)
    theirs = Image.open(io.BytesIO(ordinary)).convert("RGB")
    assert open_image(ordinary).picture().tobytes() == theirs.tobytes() == open_image(ordinary).picture(True).tobytes()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_evaluation_turns_as_pillow_does(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = Image.fromarray(np.random.default_rng(orientation).integers(0, 255, (12, 30, 3), dtype=np.uint8))
    content = encode(image, "PNG", exif=exif)
    turned = ImageOps.exif_transpose(Image.open(io.BytesIO(content)))
    assert np.array_equal(np.asarray(open_image(content).picture()), np.asarray(turned))
    assert np.array_equal(open_image(content).decode().pixels, np.asarray(turned))


def test_what_is_transparent_is_laid_on_white_in_strips(monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(0)
    for mode in ("RGBA", "LA"):
        channels = len(mode)
        image = Image.fromarray(random.integers(0, 255, (37, 50, channels), dtype=np.uint8), mode)
        whole = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA")).convert("RGB")
        for strip in (1, 64, 777, 1 << 20):
            monkeypatch.setattr("amclip_ds.images.STRIP", strip)
            assert np.array_equal(pixels(encode(image, "PNG")), np.asarray(whole)), (mode, strip)
