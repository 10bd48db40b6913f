"""The keys of `data`: what is trained on, and how it is read."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass
class DataConfig:
    """What is trained on, and how it is read."""

    train: str = ""
    """SHARDS: a folder, a glob, braces ('/data/{00000..00099}.tar'), a list.txt, URLs; sources joined by `::`."""
    index: str | None = None
    """Folder of the index that `amclip data index` made; null: looked for beside the shards, made where missing."""
    weights: list[float] | None = None
    """A number for each source in data.train: how often an epoch holds its samples (2.0: twice); empty: once each."""
    resampled: bool = False
    """True: whole shards are drawn with replacement, by weight, instead of each once an epoch."""
    workers: int = 4
    """Processes that read and decode for each rank; 0: the training process does it itself."""
    prefetch: int = 4
    """Chunks of up to 64 samples that each worker makes ahead."""
    timeout_s: float = 600.0
    """Without a sample for so long, the run ends with an error."""
    num_views: int = 2
    """Crops of each image for the student."""
    photometric: bool = True
    """Colour jitter, grayscale, blur and solarize on the views (never on the teacher's crop)."""
    captions: list[str] = field(default_factory=lambda: ["txt|json:captions|json:caption"])
    """Where captions are: `txt`, `json:FIELD`, a template such as '{title}. {text}', alternatives joined by `|`."""
    caption_per_line: bool = True
    """True: each line of a text member is a caption of its own, and one is drawn; False: the member is one caption."""
    text_bucket: int = 8
    """Texts are cut to the batch's longest, rounded up to a multiple of this; 0: always the full context."""
    open_shards: int = 16
    """Shards read side by side, so that neighbours in a batch come from different ones."""
    shuffle_window: int = 8192
    """Samples shuffled together; a shard is read from front to back, a window at a time."""
    max_pixels: int = 89_478_485
    """An image whose header tells more is refused before it is decoded."""
    max_skip_rate: float = 0.02
    """The run stops (code 3) when more than this part of the samples had to be replaced by others."""
    allow_pipe: bool = False
    """True: `pipe:COMMAND` sources may run a shell command (`amclip data index` and `check` alone; no training)."""
    on_change: str = "refuse"
    """What a shard does that is no longer what was indexed: `refuse` stops the run (code 3), `report` trains on."""
    stage_dir: str = ""
    """A node-local folder; shards are copied into one of this user's alone in it (amclip-UID) before they are read."""
    stage_gb: float = 100.0
    """What the copies in data.stage_dir may take, in GB."""

    def __post_init__(self) -> None:
        at_least = {"workers": 0, "prefetch": 1, "num_views": 1, "text_bucket": 0, "open_shards": 1,
                    "shuffle_window": 1, "max_pixels": 1}  # fmt: skip
        for name, least in at_least.items():
            if getattr(self, name) < least:
                raise ValueError(f"data.{name}: {getattr(self, name)} is below {least}")
        if self.on_change not in ("refuse", "report"):
            raise ValueError(f"data.on_change: {self.on_change!r} is neither 'refuse' nor 'report'")
        if not 0 <= self.max_skip_rate <= 1:
            raise ValueError(f"data.max_skip_rate: {self.max_skip_rate} is outside [0, 1]")
        for name in ("timeout_s", "stage_gb"):
            if getattr(self, name) <= 0:
                raise ValueError(f"data.{name}: {getattr(self, name)} is not above 0")
        if not self.captions:
            raise ValueError("data.captions: names no source of captions")
        check_sources(self.captions)
        if self.weights is not None and (not self.weights or min(self.weights) < 0 or sum(self.weights) <= 0):
            raise ValueError(f"data.weights: {self.weights} needs numbers from 0, one of them above it")


def check_sources(sources: Sequence[str]) -> None:
    """Raises ValueError for a caption source that can never yield anything."""
    for source in sources:
        for alternative in source.split("|"):
            is_field = alternative.startswith("json:") and len(alternative) > len("json:")
            if alternative != "txt" and not is_field and not re.search(r"\{\w+\}", alternative):
                raise ValueError(
                    f"data.captions: {alternative!r} is neither txt, json:FIELD nor a template like '{{title}}'"
                )
