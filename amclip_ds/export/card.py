"""README.md of an export: what it is, how to load it, its data, its numbers, and what is left to fill in."""

from typing import Any

from amclip_ds import config as settings
from amclip_ds.display import code, code_block, one_line
from amclip_ds.evaluate.source import Located
from amclip_ds.export.proof import Proof
from amclip_ds.jsonl import EVALUATION, read
from amclip_ds.redact import redact

LOADING = {
    "open_clip": """```python
import open_clip

model, preprocess = open_clip.create_model_from_pretrained("local-dir:PATH")
tokenizer = open_clip.get_tokenizer("local-dir:PATH")
```""",
    "hf": """```python
from transformers import AutoModel, AutoProcessor, pipeline

model, processor = AutoModel.from_pretrained("PATH"), AutoProcessor.from_pretrained("PATH")
classify = pipeline("zero-shot-image-classification", model="PATH")
```""",
    "timm": """```python
import timm

tower = timm.create_model("local-dir:PATH", pretrained=True)  # images -> CLS feature
```""",
    "onnx": """```python
import json, onnxruntime, tokenizers

facts = json.load(open("PATH/clip_onnx.json"))  # image size, mean, deviation, context length, logit scale
image = onnxruntime.InferenceSession("PATH/image.onnx")  # pixel_values [B, 3, H, H] float32 -> image_embeds
text = onnxruntime.InferenceSession("PATH/text.onnx")  # input_ids [B, T] int64 -> text_embeds
tokenizer = tokenizers.Tokenizer.from_file("PATH/tokenizer.json")
tokenizer.enable_truncation(facts["context_length"])
tokenizer.enable_padding(length=facts["context_length"], pad_id=facts["eos_token_id"])
```

Both embeddings have length 1; logits are `logit_scale * image_embeds @ text_embeds.T`.""",
}
CLEANING = """Texts: training cleaned captions with ftfy and unescaped html (`&amp;`); the tokenizer here replaces curly
quotes and ligatures, and nothing else of that. Clean texts that hold mojibake, html entities or full-width
letters with `html.unescape(html.unescape(ftfy.fix_text(text)))` first."""
CROP = """Images whose resized side exceeds the model's
by an odd number of pixels may be cropped one pixel further left or up than in training."""
LITERALS = """A literal `<|endoftext|>` or
`<|startoftext|>` in a text is encoded as that token; in training it was plain text."""
TEXTS = {
    "open_clip": """Texts: open_clip encodes a literal `<end_of_text>` or `<start_of_text>` in a text as that token; in
training it was plain text.""",
    "hf": f"{CLEANING} {CROP} {LITERALS}",
    "timm": "The vision tower alone: no projection, no text tower.",
    "onnx": CLEANING,
}


def write_card(fmt: str, located: Located, weights: str, proof: Proof) -> str:
    """The card's text."""
    assert located.config is not None
    config = located.config
    library = {"open_clip": "open_clip", "hf": "transformers", "timm": "timm", "onnx": "onnx"}[fmt]
    averaged = " (the exponential moving average of the student)" if weights == "teacher" else ""
    lines = [
        "---", "license: unknown  # FILL IN: of the weights, which the licence of the data may limit",
        f"library_name: {library}", "tags: [clip, a-clip, zero-shot-image-classification]", "---", "",
        f"# {code(config.model.vision.name)}, A-CLIP, {weights}", "",
        f"Pre-trained by amclip_ds with {code(f'mask.strategy={config.mask.strategy}')}"
        f" (keep ratio {config.mask.keep_ratio}), {located.step} steps of {config.batch.global_size} pairs;"
        f" these are the {weights}'s weights{averaged}, fp32.", "",
        "## Loading", "", LOADING[fmt], "",
        f"Images: {config.model.vision.image_size} px, shortest side resized (bilinear), centre crop, ImageNet mean"
        " and deviation.", "", TEXTS[fmt], "",
        "## Data", "", code(f"data.train={redact(config.data.train)}"), "",
        "FILL IN: what the data are, under which licence, what is known to be wrong with them.", "",
        "## Numbers", "", *_numbers(located, weights), "",
        "## Proof of this export", "",
        "Unit embeddings of the exported model, run by its library, against those of the model as it was trained:", "",
        *code_block("\n".join(map(one_line, proof.lines()))), "",
        "## Use", "", "FILL IN: what it is meant for, what it is not fit for.", "",
        "## Settings", "", *code_block(settings.dump(config).rstrip(), "yaml"), "",
    ]  # fmt: skip
    return "\n".join(lines)


def _numbers(located: Located, weights: str) -> list[str]:
    file = located.run / "eval.jsonl" if located.run else None
    rows, unreadable = read(file, EVALUATION) if file else ([], 0)
    note = [f"{unreadable} line(s) of the run's eval.jsonl cannot be read and are left out.", ""] if unreadable else []
    mine = [row for row in rows if row["step"] == located.step and row["weights"] == weights]
    if not mine:
        return [*note, "None recorded; `amclip eval` makes them."]
    table = [*note, "| data set | task | metric | value | samples |", "|---|---|---|---|---|"]
    for row in mine:
        table += [f"| {code(row['dataset'])} | {code(row['task'])} | {code(name)} | {value:.4f} | {_count(row)} |"
                  for name, value in row["metrics"].items() if isinstance(value, int | float)]  # fmt: skip
    return table


def _count(row: dict[str, Any]) -> str:
    """How many samples a row is of."""
    count = row.get("num_samples")
    return str(count) if isinstance(count, int) else "?"
