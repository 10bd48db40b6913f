"""How long does retrieval over 25,000 images and 125,000 captions take, and how much memory?

  python benchmarks/retrieval.py [--images 25000] [--captions 5] [--width 512] [--threads 2]

Random unit embeddings, a caption near its image. Prints the seconds of both directions, the pairs scored a second, the
peak of resident memory above the embeddings, and the recalls.
"""

import argparse
import resource
import time

import torch
import torch.nn.functional as F

from amclip_ds.comm import SingleProcess
from amclip_ds.evaluate import retrieval


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=25_000)
    parser.add_argument("--captions", type=int, default=5, help="of each image")
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--threads", type=int, default=None)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    generator = torch.Generator().manual_seed(0)
    images = F.normalize(torch.randn(args.images, args.width, generator=generator), dim=-1)
    image_of_text = torch.arange(args.images).repeat_interleave(args.captions)
    noise = torch.randn(len(image_of_text), args.width, generator=generator)
    texts = F.normalize(images[image_of_text] + 0.25 * noise, dim=-1)
    del noise
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began, began_cpu = time.perf_counter(), time.process_time()
    found = retrieval.recalls(images, texts, image_of_text, SingleProcess())
    seconds, cpu_seconds = time.perf_counter() - began, time.process_time() - began_cpu
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    pairs = 2 * len(images) * len(texts)
    print(
        f"{len(images)} images x {len(texts)} texts, width {args.width}, {torch.get_num_threads()} threads:"
        f" {seconds:.1f} s ({cpu_seconds:.1f} s of CPU, {pairs / cpu_seconds / 1e6:.0f} M pairs/s of it),"
        f" {peak / 1024:.0f} MB above the embeddings"
    )
    print({name: round(value, 4) for name, value in found.metrics().items()})


if __name__ == "__main__":
    main()
