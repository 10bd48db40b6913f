"""A folder for ONNX runtimes: image.onnx and text.onnx, each from inputs to unit embeddings, and what goes before them.

`clip_onnx.json` holds the preprocessing, the context length and exp(logit_scale); `tokenizer.json` is the byte-pair
encoding for the `tokenizers` package. Weights are in `.data` files beside the graphs, which have no limit of size.
"""

import json
import logging
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from amclip_ds.data.photometric import MEAN, STD
from amclip_ds.errors import UserError
from amclip_ds.evaluate.export_folder import ONNX_FACTS, ONNX_INPUTS
from amclip_ds.export.hugging_face import END, START, build_decoder, build_tokenizer
from amclip_ds.model.amclip import AClip
from amclip_ds.model.config import ModelConfig

OPSET = 20


class Embedding(nn.Module):
    """One of AClip's two embeddings as a module of one argument."""

    def __init__(self, module: AClip, what: str) -> None:
        super().__init__()
        self.module, self.what = module, what

    def forward(self, x: Tensor) -> Tensor:
        """Normalised pixels [B, 3, H, H] or token ids [B, T] -> unit embeddings [B, E]."""
        return self.module.embed_images(x) if self.what == "image" else self.module.embed_texts(x)


def write(folder: Path, module: AClip, model: ModelConfig) -> None:
    """Writes both graphs, clip_onnx.json and tokenizer.json. Raises UserError where torch's exporter is not there."""
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise UserError(f"--format onnx: needs {error.name}; pip install 'amclip_ds[onnx]'") from None
    size, length = model.vision.image_size, model.text.context_length
    ids = torch.zeros(2, length, dtype=torch.long)
    ids[:, -1] = model.text.eos_token_id
    for what, example in (("image", torch.zeros(2, 3, size, size)), ("text", ids)):
        _write_graph(
            folder / f"{what}.onnx", Embedding(module, what).eval(), example, ONNX_INPUTS[what], f"{what}_embeds"
        )
    facts: dict[str, Any] = {
        "image_size": size,
        "resize": "shortest side, bilinear with antialiasing",
        "crop": "centre",
        "rescale": 1 / 255,
        "mean": list(MEAN),
        "std": list(STD),
        "context_length": length,
        "eos_token_id": model.text.eos_token_id,
        "logit_scale": float(module.logit_scale.detach().float().exp()),
    }
    (folder / ONNX_FACTS).write_text(json.dumps(facts, indent=1) + "\n")
    tokenizer = build_tokenizer()
    tokenizer.decoder = build_decoder(dropped=(START, END))  # special ones would be read inside a text, too
    tokenizer.save(str(folder / "tokenizer.json"))


def _write_graph(path: Path, module: nn.Module, example: Tensor, source: str, result: str) -> None:
    reported = logging.getLogger("torch.onnx")
    level = reported.level
    reported.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.onnx.export(
                module,
                (example,),
                str(path),
                input_names=[source],
                output_names=[result],
                opset_version=OPSET,
                dynamic_shapes=({0: torch.export.Dim("batch")},),
                dynamo=True,
                external_data=True,
                verbose=False,
            )
    finally:
        reported.setLevel(level)
