"""README.md of an export: what it is, how to load it, its data, its numbers, and what is left to fill in."""

import re
from typing import Any

from amclip_ds import config as settings
from amclip_ds import run_files
from amclip_ds.config import TrainConfig
from amclip_ds.display import code, code_block, one_line
from amclip_ds.errors import UserError
from amclip_ds.evaluate.source import Located
from amclip_ds.export.proof import Proof
from amclip_ds.files import read_json
from amclip_ds.hub import HUB
from amclip_ds.jsonl import read, read_lines
from amclip_ds.masks import NONE, masks_of_views
from amclip_ds.record.timeline import world_sizes
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


ATTENTIVE = "attentive"  # the mask whose models are A-CLIP's
UNKNOWN = "unknown"
USE = """Meant for research: zero-shot classification, image-text retrieval, features for probes and as a start for
other training, on images and English texts like those it was trained on. Not meant for decisions about people, for
surveillance, or for use without a test on the intended task: it was not tested for bias, safety or other languages,
and it takes over what is wrong with its data."""


def check_license(license_id: str) -> None:
    """Raises UserError for what is no identifier, as the hub writes them (cc-by-nc-4.0)."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9.+-]{0,60}", license_id):
        raise UserError(f"--license {license_id[:80]!r}: an identifier such as mit or cc-by-nc-4.0")


def write_card(
    fmt: str, located: Located, weights: str, proof: Proof, license_id: str = UNKNOWN, hub_name: str | None = None
) -> str:
    """The card's text. hub_name: ORG/NAME where the folder is to be on the hub, whose readers load it by that name."""
    assert located.config is not None
    config = located.config
    library = {"open_clip": "open_clip", "hf": "transformers", "timm": "timm", "onnx": "onnx"}[fmt]
    loading = LOADING[fmt]
    if hub_name:
        loading = loading.replace("local-dir:PATH", f"{HUB}{hub_name}").replace("PATH", hub_name)
    attends = any(mask.strategy == ATTENTIVE for mask in masks_of_views(config.mask, config.data.view_masks()))
    averaged = " (the exponential moving average of the student)" if weights == "teacher" else ""
    lines = [
        "---",
        f"license: {license_id}"
        + ("  # FILL IN: of the weights, which the licence of the data may limit" if license_id == UNKNOWN else ""),
        f"library_name: {library}",
        f"tags: [clip, {'a-clip, ' if attends else ''}zero-shot-image-classification]",
        "---",
        "",
        f"# {code(config.model.vision.name)}, {'A-CLIP' if attends else 'CLIP'}, {weights}",
        "",
        f"Pre-trained by amclip_ds with {masks_in_words(config)}, {located.step} steps of"
        f" {config.batch.global_size} pairs;"
        f" these are the {weights}'s weights{averaged}, fp32.",
        "",
        "## Loading",
        "",
        loading,
        "",
        f"Images: {config.model.vision.image_size} px, shortest side resized (bilinear), centre crop, ImageNet mean"
        " and deviation.",
        "",
        TEXTS[fmt],
        "",
        "## Data",
        "",
        code(f"data.train={redact(config.data.train)}"),
        "",
        "FILL IN: what the data are, under which licence, what is known to be wrong with them.",
        "",
        "## Numbers",
        "",
        *_numbers(located, weights),
        "",
        "## Proof of this export",
        "",
        "Unit embeddings of the exported model, run by its library, against those of the model as it was trained:",
        "",
        *code_block("\n".join(map(one_line, proof.lines()))),
        "",
        "## Intended use",
        "",
        USE,
        "",
        "## Energy",
        "",
        _energy(located),
        "",
        "## Settings",
        "",
        *code_block(settings.dump(config).rstrip(), "yaml"),
        "",
    ]
    return "\n".join(lines)


def _numbers(located: Located, weights: str) -> list[str]:
    file = located.run / run_files.EVALUATIONS if located.run else None
    rows, unreadable = read(file, run_files.EVALUATION) if file else ([], 0)
    note = [f"{unreadable} line(s) of the run's eval.jsonl cannot be read and are left out.", ""] if unreadable else []
    mine = [row for row in rows if row["step"] == located.step and row["weights"] == weights]
    if not mine:
        return [*note, "None recorded; `amclip eval` makes them."]
    table = [*note, "| data set | task | metric | value | samples |", "|---|---|---|---|---|"]
    for row in mine:
        table += [
            f"| {code(row['dataset'])} | {code(row['task'])} | {code(name)} | {value:.4f} | {_count(row)} |"
            for name, value in row["metrics"].items()
            if isinstance(value, int | float)
        ]
    return table


def _energy(located: Located) -> str:
    """Device-hours of the steps that were logged, and what they take at full power where the GPU is known."""
    rows = (
        read_lines(located.run / run_files.METRICS, run_files.STEP | {"step_s": float}, run_files.MAX_METRICS)
        if located.run
        else []
    )
    try:
        planned = read_json(located.run / "plan.json", dict).get("predicted", {}) if located.run else {}
    except UserError:
        planned = {}
    devices, watts = planned.get("world_size"), planned.get("device_watts")
    if not rows or type(devices) is not int:
        return "FILL IN: device-hours and energy; nothing is recorded here."
    steps = [min(row["step"], located.step) for row in rows]
    spent = [max(0, step - before) for before, step in zip([0, *steps], steps)]
    worlds = world_sizes(located.run) if located.run else {}
    attempts = [row["attempt"] if type(row.get("attempt")) is int else -1 for row in rows]
    ranks = [worlds.get(attempt, devices) for attempt in attempts]  # each may have another number of them
    hours = sum(count * row["step_s"] * world for count, row, world in zip(spent, rows, ranks)) / 3600
    used = " and ".join(map(str, dict.fromkeys(world for count, world in zip(spent, ranks) if count)))
    name = planned.get("device")
    reported = (
        f"{hours:.3g} device-hours of steps on {used or devices} {code(str(name)) if name else 'processes on CPUs'}"
    )
    if isinstance(watts, int | float):
        reported += f"; at full power of the boards ({watts:g} W each) {hours * watts / 1000:.3g} kWh"
    return f"{reported}. Hosts, network, cooling, evaluations and attempts that were thrown away are not in it."


def _count(row: dict[str, Any]) -> str:
    """How many samples a row is of."""
    count = row.get("num_samples")
    return str(count) if isinstance(count, int) else "?"


def masks_in_words(config: TrainConfig) -> str:
    """The masks of the views; where they differ, which views have which."""
    masks = masks_of_views(config.mask, config.data.view_masks())
    different = [mask for place, mask in enumerate(masks) if mask not in masks[:place]]
    said = []
    for mask in different:
        ratio = f"{mask.keep_ratio}" + (f" to {mask.final_keep_ratio}" if mask.final_keep_ratio is not None else "")
        views = [f"{view + 1}" for view, other in enumerate(masks) if other == mask]
        of = f" on view {' and '.join(views)}" if len(different) > 1 else ""
        kept = f" (keep ratio {ratio})" if mask.strategy != NONE else ""
        said.append(f"{code(f'mask.strategy={mask.strategy}')}{kept}{of}")
    return ", ".join(said)
