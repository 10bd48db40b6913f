"""Steps of other trainers beside ours, on the same images and texts, their steps taking turns in one process.

    python -m benchmarks.peers --batch 8                                       # open_clip's CLIP and ours
    python -m benchmarks.peers --batch 8 --release CHECKOUT --timm FOLDER      # and the published A-CLIP
    python -m benchmarks.peers --batch 256 --tokens 77 --compiled              # on a GPU: open_clip compiled too

open_clip is the installed package: its ViT-B-16 without weights, its ClipLoss, AdamW; on a GPU under bf16 autocast, as
its --precision amp_bf16. It pads every text to 77 tokens, as it does in training. CHECKOUT is microsoft/A-CLIP; it
wants timm 0.5.4, which `pip install --no-deps --target FOLDER timm==0.5.4` puts beside the installed one. Its step is
its own model, loss and AdamW without its loop's reads and logging (that its losses are ours under compat=release, from
the same weights, is tests/parity's to show). Ours runs at ZeRO 1 with every exact saving, through the run's own
`train_step`, photometric changes included, which the others do not make. Rows as in benchmarks/step.py; the peak of
memory is that of all these models together.
"""

import argparse
import contextlib
import importlib
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from amclip_ds.data import photometric
from benchmarks.step import Ours, flops_of, made_scenes, matrix_rate, row_of, show, take_turns, two_numbers

SIZES = {  # open_clip's name, our recipes', the published code's
    "b16": ("ViT-B-16", "vitb16", "mask_vit_base_patch16_224"),
    "l16": ("ViT-L-16", "vitl16", "mask_vit_large_patch16_224"),
}


@contextlib.contextmanager
def autocast() -> Iterator[None]:
    """bf16 on a GPU, nothing on a CPU."""
    with torch.autocast("cuda", torch.bfloat16) if torch.cuda.is_available() else contextlib.nullcontext():
        yield


def stepper(model: torch.nn.Module, loss: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """One optimisation step of a plain loop: AdamW as A-CLIP's recipes have it, gradients clipped at 1."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, betas=(0.9, 0.98), weight_decay=0.5, foreach=True)

    def step() -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        with autocast():
            value = loss()
        value.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0, foreach=True)
        optimizer.step()
        return value.detach()

    return step


def open_clip_step(name: str, images: Tensor, token_ids: Tensor, compiled: bool) -> Callable[[], Tensor]:
    """open_clip's CLIP on [B, 3, 224, 224] and [B, 77]."""
    import open_clip
    from open_clip.loss import ClipLoss

    model: Any = open_clip.create_model(name, pretrained=None, output_dict=True).to(images.device).train()
    call = torch.compile(model) if compiled else model
    loss = ClipLoss()
    return stepper(model, lambda: loss(**call(images, token_ids)))


def release_step(
    checkout: Path, timm: Path, name: str, views: Tensor, teacher: Tensor, boxes: Tensor, token_ids: Tensor
) -> Callable[[], Tensor]:
    """The published A-CLIP: its ACLIP model on views [2, B, 3, 224, 224] and the teacher's crop, its ACLIPLoss."""
    models, losses = load_release(checkout, timm)
    factory = getattr(models, name)
    online, average = (factory(num_classes=0, mask_ratio=ratio) for ratio in (0.5, 0.0))
    model = (
        models.ACLIP(
            embed_dim=512,
            vision_width=online.embed_dim,
            vision_model=online,
            vision_model_ema=average,
            context_length=77,
            vocab_size=49408,
            transformer_width=512,
            transformer_heads=8,
            transformer_layers=12,
        )
        .to(views.device)
        .train()
    )
    positions = boxes.transpose(0, 1).round().int()  # [B, 3, 4]
    criterion = losses.ACLIPLoss()
    return stepper(model, lambda: criterion(model(views.flatten(0, 1), teacher, token_ids, positions, 0.996))["loss"])


def load_release(checkout: Path, timm: Path) -> tuple[Any, Any]:
    """Its modules `models` and `losses`, with the timm of its time while they load."""
    functional = importlib.import_module("torchvision.transforms._functional_tensor")
    sys.modules["torchvision.transforms.functional_tensor"] = functional
    if "torch._six" not in sys.modules:
        six = types.ModuleType("torch._six")
        six.container_abcs = importlib.import_module("collections.abc")  # type: ignore[attr-defined]
        sys.modules["torch._six"] = six
    installed = {name: sys.modules.pop(name) for name in list(sys.modules) if name.split(".")[0] == "timm"}
    sys.path[:0] = [str(timm), str(checkout)]
    try:
        loaded = importlib.import_module("models"), importlib.import_module("losses")
    finally:
        del sys.path[:2]
        for name in [name for name in sys.modules if name.split(".")[0] == "timm"]:
            del sys.modules[name]
        sys.modules.update(installed)
    return loaded


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="b16")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--tokens", type=two_numbers, default=(20, 20), metavar="N[-M]", help="of a caption")
    parser.add_argument("--recipes", nargs="+", default=["clip", "aclip", "random2x"])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--warm", type=int, default=1)
    parser.add_argument("--compiled", action="store_true", help="open_clip's step compiled as well")
    parser.add_argument("--release", type=Path, metavar="CHECKOUT", help="of microsoft/A-CLIP")
    parser.add_argument("--timm", type=Path, metavar="FOLDER", help="that holds timm 0.5.4")
    parser.add_argument("--peak", type=float, help="the maker's TFLOP/s")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="of our recipes")
    args = parser.parse_args()
    if args.release and not args.timm:
        parser.error("--release needs --timm FOLDER: pip install --no-deps --target FOLDER timm==0.5.4")
    theirs, ours, published = SIZES[args.size]
    with made_scenes(args.batch) as scenes:
        engines = {name: Ours(f"{name}-{ours}", args.set, args.batch, args.tokens, scenes) for name in args.recipes}
    batch = next(iter(engines.values())).batches[False]
    images = photometric.normalise(batch.views_uint8[0])
    works: dict[str, Callable[[], Any]] = {}
    works[f"open_clip {theirs}"] = open_clip_step(theirs, images, batch.token_ids, compiled=False)
    if args.compiled:
        works[f"open_clip {theirs} compiled"] = open_clip_step(theirs, images, batch.token_ids, compiled=True)
    if args.release:
        two = engines["aclip"].batches[False]
        assert two.teacher_uint8 is not None
        works["published A-CLIP"] = release_step(
            args.release,
            args.timm,
            published,
            photometric.normalise(two.views_uint8),
            photometric.normalise(two.teacher_uint8),
            two.boxes,
            two.token_ids,
        )
    works |= {f"ours {name}": engine.step for name, engine in engines.items()}
    times = take_turns(works, args.repeats, args.warm)
    dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
    rate = matrix_rate(dtype)
    print(
        f"batch {args.batch}, captions of {args.tokens} tokens, a matrix product {rate / 1e12:.3f} TFLOP/s;"
        f" medians of {args.repeats}, x: against open_clip"
    )
    against = None
    for name, work in works.items():
        row = row_of(name, args.batch, times[name], flops_of(work), rate, args.peak)
        show(row, against)
        against = against or row["step_s"]
    return 0


if __name__ == "__main__":
    sys.exit(main())
