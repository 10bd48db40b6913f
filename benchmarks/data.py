"""How fast samples become views: `python -m benchmarks.data [--rounds 5] [--json FILE] [--no-train]`; the stream alone,
beside an older commit's: `python -m benchmarks.data --stream --baseline CHECKOUT`.

Makes JPEGs of its own (500 x 375 and other sizes), then, in one run and on the same files:

pipelines   our three views (one decode, uint8 crops; photometric parameters drawn, applied later on the device) against
            the straightforward ones (Pillow: full decode, three resized crops; colour jitter, grayscale, blur and
            solarize on both student views; three ToTensor and Normalize). Exit code 1 if ours is not 3 times as fast.
decoders    and resizers, alone: what the choice of simplejpeg and torch rests on
stream      TrainingData, all of it, against decoding alone and against another checkout's (benchmarks/stream.py)
loader      the same by the clock, by number of workers
training    the part of a step of aclip-tiny that waits for data

Times are CPU seconds of one thread, so other work on the machine disturbs them little; rounds alternate, medians count.
"""

import argparse
import contextlib
import io
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg
import torch
import torch.nn.functional as F
from PIL import Image
from webdataset import TarWriter

from amclip_ds.data import photometric, synthetic
from amclip_ds.data.config import View
from amclip_ds.data.views import ViewMaker, planes
from amclip_ds.images import Decoded
from amclip_ds.keyed_random import keyed
from benchmarks.stream import open_data

ROOT = Path(__file__).resolve().parents[1]
SIZES = ((256, 192), (500, 375), (1024, 768), (2048, 1536), (4096, 3072))
VIEW = 224
QUALITY = 92
NEEDED = 3.0
WORDS = """a an the photo picture view of in on at with and beside under old new small large red green blue white wooden
street house garden kitchen table window river mountain dog cat horse bird child woman man people car bicycle train
sunny cloudy morning evening winter summer standing sitting running close-up"""
Times = dict[str, list[float]]


def make_jpeg(number: int, width: int, height: int) -> bytes:
    """A cluttered scene of any size, as cameras write JPEGs (half colour resolution)."""
    generator = keyed(0, "benchmark", number, width)
    image = synthetic.draw_background(generator, width, height)
    synthetic.draw_distractors(generator, image, coloured=True)
    shape, colour = synthetic.CLASSES[number % len(synthetic.CLASSES)]
    synthetic.draw_object(generator, image, shape, colour)
    encoded = io.BytesIO()
    image.save(encoded, "JPEG", quality=QUALITY)
    return encoded.getvalue()


class Ours:
    """What a worker does for one sample's image."""

    def __init__(self) -> None:
        self._maker = ViewMaker()
        self._crops = planes(torch.empty(3, VIEW, VIEW, 3, dtype=torch.uint8)).split(1)

    def __call__(self, content: bytes) -> None:
        generator = keyed(0, "benchmark")
        self._maker.make(content, generator, [View()] * 2, self._crops)
        for _ in range(2):
            photometric.draw(generator)


class Straightforward:
    """What one writes first: torchvision's transforms on Pillow images, one view after the other."""

    def __init__(self) -> None:
        from torchvision import transforms  # here, after amclip_ds has repaired it

        end = [transforms.ToTensor(), transforms.Normalize(photometric.MEAN, photometric.STD)]
        crop = transforms.RandomResizedCrop(VIEW, scale=(0.5, 1.0))
        jitter = transforms.RandomApply([transforms.ColorJitter(0.4, 0.4, 0.2, 0.1)], p=0.8)
        blur = transforms.RandomApply([_PillowBlur()], p=0.1)
        changes = [jitter, transforms.RandomGrayscale(0.2), blur, transforms.RandomSolarize(128, p=0.2)]
        self.student, self.teacher = transforms.Compose([crop, *changes, *end]), transforms.Compose([crop, *end])

    def __call__(self, content: bytes) -> None:
        image = Image.open(io.BytesIO(content)).convert("RGB")
        for transform in (self.student, self.student, self.teacher):
            transform(image)


class _PillowBlur:
    """The blur of SimCLR's descendants."""

    def __call__(self, image: Image.Image) -> Image.Image:
        from PIL import ImageFilter

        return image.filter(ImageFilter.GaussianBlur(radius=random.uniform(0.1, 2.0)))


def alternate(works: dict[str, Callable[[bytes], Any]], files: list[bytes], rounds: int) -> Times:
    """CPU seconds a file, by work and round; every round does all works on all files, in turn."""
    times: Times = {name: [] for name in works}
    for round_number in range(rounds + 1):
        for name, work in works.items():
            began = time.thread_time()
            for content in files:
                work(content)
            if round_number:  # the first one warms up
                times[name].append((time.thread_time() - began) / len(files))
    return times


def pipelines(rounds: int) -> dict[str, Any]:
    """Samples a second and core, ours and the straightforward, by size of the source."""
    found = {}
    for width, height in SIZES:
        files = [make_jpeg(number, width, height) for number in range(max(4, min(48, 6_000_000 // (width * height))))]
        times = alternate({"ours": Ours(), "straightforward": Straightforward()}, files, rounds)
        ratios = [slow / fast for fast, slow in zip(times["ours"], times["straightforward"])]
        found[f"{width} x {height}"] = {
            "kilobytes": statistics.mean(map(len, files)) / 1e3,
            "ratio": statistics.median(ratios),
            "ratio_min": min(ratios),
            "ratio_max": max(ratios),
        } | {name: 1 / statistics.median(values) for name, values in times.items()}
    return found


def parts(rounds: int) -> dict[str, float]:
    """Milliseconds of one decode of 500 x 375 and of one resize of a crop of it, by library."""
    from torchvision.transforms import v2

    files = [make_jpeg(number, 500, 375) for number in range(24)]
    pixels = torch.from_numpy(simplejpeg.decode_jpeg(files[0]))
    image = Image.fromarray(pixels.numpy())
    region = pixels[20:320, 40:400].permute(2, 0, 1)
    contiguous = region.contiguous()
    maker, decoded = ViewMaker(), Decoded(pixels.numpy(), 375, 500)
    crop = planes(torch.empty(1, VIEW, VIEW, 3, dtype=torch.uint8))
    linear, size = v2.InterpolationMode.BILINEAR, [VIEW, VIEW]

    def interpolate(source: torch.Tensor) -> torch.Tensor:
        return F.interpolate(source[None], size=(VIEW, VIEW), mode="bilinear", antialias=True, align_corners=False)

    works: dict[str, Callable[[bytes], Any]] = {
        "decode, Pillow": lambda content: Image.open(io.BytesIO(content)).convert("RGB"),
        "decode, simplejpeg": lambda content: simplejpeg.decode_jpeg(content),
        "decode, simplejpeg, fast DCT": lambda content: simplejpeg.decode_jpeg(content, fastdct=True),
        "decode, simplejpeg, half scale": lambda content: simplejpeg.decode_jpeg(
            content, min_height=188, min_width=250, min_factor=1
        ),
        "resize, Pillow": lambda _: image.resize((VIEW, VIEW), Image.Resampling.BILINEAR, box=(40, 20, 400, 320)),
        "resize, torch, in place (ours)": lambda _: maker._crop(decoded, (20.0, 40.0, 300.0, 360.0), crop),
        "resize, torch, F.interpolate": lambda _: interpolate(region),
        "resize, torch, channels first": lambda _: interpolate(contiguous),
        "resize, torchvision v2": lambda _: v2.functional.resize(region, size, linear, antialias=True),
    }
    if (cv2 := _opencv()) is not None:
        array = np.ascontiguousarray(pixels.numpy()[20:320, 40:400])
        works["resize, OpenCV (area)"] = lambda _: cv2.resize(array, (VIEW, VIEW), interpolation=cv2.INTER_AREA)
        works["decode, OpenCV"] = lambda content: cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_COLOR)
    times = alternate(works, files, rounds)
    return {name: 1e3 * statistics.median(values) for name, values in times.items()}


def _opencv() -> Any:
    """OpenCV, if it happens to be installed; it is no dependency."""
    try:
        import cv2
    except ImportError:
        return None
    cv2.setNumThreads(1)
    return cv2


def write_photos(folder: Path) -> None:
    """2560 samples in four shards: 256 JPEGs of 500 x 375, each ten times, each time with a caption of its own."""
    folder.mkdir(parents=True)
    photos = [make_jpeg(number, 500, 375) for number in range(256)]
    for shard in range(4):
        with TarWriter(str(folder / f"{shard:05d}.tar")) as tar:
            for number in range(shard * 640, (shard + 1) * 640):
                words = keyed(0, "caption", number).choice(WORDS.split(), size=10)
                tar.write(
                    {"__key__": f"{number:06d}", "jpg": photos[number % 256], "txt": f"{' '.join(words)} {number}"}
                )


class Stream:
    """A process that runs benchmarks/stream.py with the `amclip_ds` of a checkout, on shards of its own."""

    def __init__(self, checkout: Path, shards: Path) -> None:
        command = [sys.executable, "-P", str(Path(__file__).with_name("stream.py")), str(shards)]
        environment = os.environ | {"PYTHONPATH": str(checkout)}
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=environment)

    def __call__(self, word: str) -> str:
        assert self._process.stdin and self._process.stdout
        self._process.stdin.write(f"{word}\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline().strip()
        if not answer:
            raise SystemExit(f"benchmarks.data: {' '.join(map(str, self._process.args))} ended: see its error above")
        return answer

    def close(self) -> None:
        """Ends the process."""
        self._process.kill()
        self._process.wait()


def stream(rounds: int, baseline: Path | None) -> dict[str, Any]:
    """Milliseconds of CPU a sample of the training stream at 224 px over 500 x 375 JPEGs: decoding alone, ours, the
    baseline's; rounds take turns, medians. And whether the two make the same bits."""
    checkouts = {"ours": ROOT} | ({"baseline": baseline.resolve()} if baseline else {})
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as processes:
        streams: dict[str, Stream] = {}
        for name, checkout in checkouts.items():
            write_photos(Path(folder, name))
            streams[name] = Stream(checkout, Path(folder, name))
            processes.callback(streams[name].close)
        hashes = {name: one("hash") for name, one in streams.items()}
        times: Times = {}
        for round_number in range(rounds + 1):
            for name, one in streams.items():
                for word in ("decode", "stream", "worker"):
                    value = 1e3 * float(one(word))
                    if round_number:  # the first one warms up
                        times.setdefault("decode" if word == "decode" else f"{name}, {word}", []).append(value)
    found: dict[str, Any] = {name: statistics.median(values) for name, values in times.items()}
    return found | {"rounds": times, "same bits": len(set(hashes.values())) == 1 if baseline else None}


def show_stream(found: dict[str, Any]) -> None:
    """A line each: milliseconds, samples a second, against decoding alone, against the baseline."""
    print(f"{'500 x 375 to three views of 224':36} {'ms CPU':>7} {'samples/s':>10} {'x decode':>9} {'x baseline':>11}")
    for name, milliseconds in found.items():
        if isinstance(milliseconds, float):
            other = found.get(name.replace("ours", "baseline"))
            against = f"{other / milliseconds:11.2f}" if name.startswith("ours") and other else ""
            row = f"{milliseconds:7.2f} {1e3 / milliseconds:10.0f} {milliseconds / found['decode']:9.2f}"
            print(f"{name:36} {row} {against}")
    if found["same bits"] is not None:
        print(f"the first batches are the same to the bit as the baseline's: {'yes' if found['same bits'] else 'NO'}")


def loader(batches: int = 12) -> dict[str, float]:
    """Samples a second of the same stream by the clock."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        write_photos(Path(folder, "photos"))
        for workers in (0, 1, 2):
            with contextlib.closing(open_data(f"{folder}/photos", workers)) as data:
                made = data.batches()
                for _ in range(2 + 4 * workers):  # start, and what was made ahead meanwhile
                    next(made)
                began = time.perf_counter()
                for _ in range(batches):
                    next(made)
                found[f"{workers} workers"] = 64 * batches / (time.perf_counter() - began)
    return found


def training(steps: int = 60) -> dict[str, float]:
    """The part of a step of `aclip-tiny` (64 px, one process, one worker) that waits for data, by its metrics.jsonl."""
    with tempfile.TemporaryDirectory() as folder:
        scenes, run = Path(folder, "scenes"), Path(folder, "run")
        synthetic.write_dataset(scenes, num_train=4000, num_test=0)
        words = [
            f"data.train={scenes}/train",
            f"run.out={run}",
            f"run.steps={steps}",
            "data.workers=1",
            "engine.deepspeed=zero1_fp32.json",
            "log.every_steps=1",
            "log.tensorboard=false",
        ]
        command = [sys.executable, "-m", "amclip_ds", "train", "aclip-tiny", *words, "--resume", "never"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()][10:]
    waits, seconds = [row["data_wait_s"] for row in rows], [row["step_s"] for row in rows]
    return {
        "step_s": statistics.median(seconds),
        "data_wait_s": statistics.median(waits),
        "share": sum(waits) / sum(seconds),
    }


def all_parts(rounds: int, train: bool) -> dict[str, Any]:
    """Everything but the stream, each printed as it is known."""
    found: dict[str, Any] = {"pipelines": pipelines(rounds)}
    print(f"{'source':14} {'kB':>6} {'ours':>8} {'straight':>8}  samples/s/core   ratio (worst to best round)")
    for name, row in found["pipelines"].items():
        print(
            f"{name:14} {row['kilobytes']:6.0f} {row['ours']:8.0f} {row['straightforward']:8.0f} {'':17}"
            f"{row['ratio']:5.1f} ({row['ratio_min']:.1f} to {row['ratio_max']:.1f})",
            flush=True,
        )
    found["parts"] = parts(rounds)
    for name, milliseconds in found["parts"].items():
        print(f"{name:40} {milliseconds:6.2f} ms")
    found["loader"] = loader()
    print("loader at 500 x 375: " + ", ".join(f"{name} {rate:.0f} samples/s" for name, rate in found["loader"].items()))
    if train:
        found["training"] = training()
        said = "aclip-tiny: a step {step_s:.3f} s, {data_wait_s:.4f} s of it waits for data ({share:.1%} of the run)"
        print(said.format(**found["training"]))
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="how often everything is timed (default 5)")
    parser.add_argument("--stream", action="store_true", help="the stream alone")
    parser.add_argument("--baseline", type=Path, metavar="CHECKOUT", help="whose stream takes turns with ours")
    parser.add_argument("--no-train", action="store_true", help="leave the training step out")
    parser.add_argument("--json", type=Path, help="write the numbers there")
    args = parser.parse_args()
    torch.set_num_threads(1)
    random.seed(0)
    torch.manual_seed(0)
    found: dict[str, Any] = {"stream": stream(args.rounds, args.baseline)}
    show_stream(found["stream"])
    if not args.stream:
        found |= all_parts(args.rounds, train=not args.no_train)
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n")
    return 0 if args.stream else int(found["pipelines"]["500 x 375"]["ratio"] < NEEDED)


if __name__ == "__main__":
    sys.exit(main())
