"""The keys of `data`: what is trained on, how it is read, and which views of each image are made. Loads no torch."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from amclip_ds.masks import ViewMask
from amclip_ds.masks.text import TextMaskConfig

SCALE = (0.5, 1.0)  # part of the image's area that a view covers, unless data.views says otherwise
RATIO = (3 / 4, 4 / 3)
COLOURS = ("aclip", "simclr")


@dataclass
class ViewConfig:
    """One view of each image for the student."""

    scale: list[float] | None = None
    """Part of the image's area that the crop covers, from and to; null: [0.5, 1]."""
    ratio: list[float] | None = None
    """Width over height of the crop, from and to; null: [0.75, 1.3333]."""
    flip: bool | None = None
    """True: half of the samples are mirrored; null: false."""
    photometric: bool | None = None
    """Colour jitter, grayscale, blur and solarize; null: data.photometric."""
    colours: str = ""
    """Which changes those are: aclip | simclr; empty: data.colours."""
    same_crop_as: int | None = None
    """An earlier view, from 0, whose crop, mirroring and colour changes this one repeats; null: its own."""
    mask: ViewMask = field(default_factory=ViewMask)

    def check(self, place: int) -> None:
        """Raises ValueError for what cannot be the view at this place of the list."""
        key = f"data.views.{place}"
        for name in ("scale", "ratio"):
            bounds = getattr(self, name)
            if bounds is not None and (len(bounds) != 2 or not 0 < bounds[0] <= bounds[1]):
                raise ValueError(f"{key}.{name}: {bounds} is no pair of numbers above 0, the smaller first")
        if self.colours not in ("", *COLOURS):
            raise ValueError(f"{key}.colours: {self.colours!r} is none of {', '.join(COLOURS)}")
        if self.scale is not None and self.scale[1] > 1:
            raise ValueError(f"{key}.scale: {self.scale} is above 1, the whole image")
        if self.same_crop_as is None:
            return
        if not 0 <= self.same_crop_as < place:
            earlier = f"the earlier ones are 0 to {place - 1}" if place else "there is none before it"
            raise ValueError(f"{key}.same_crop_as: {self.same_crop_as} is no view before this one; {earlier}")
        for name in ("scale", "ratio", "flip", "colours"):
            if getattr(self, name) not in (None, ""):
                raise ValueError(
                    f"{key}.{name}: the crop is that of view {self.same_crop_as} (same_crop_as); set it"
                    f" there, or leave one of the two out"
                )


class View(NamedTuple):
    """How one view is cut and changed, nothing left out."""

    scale: tuple[float, float] = SCALE
    ratio: tuple[float, float] = RATIO
    flip: bool = False
    photometric: bool = True
    colours: str = "aclip"
    draws_of: int | None = None
    """the earlier view whose draws (box, mirroring, colours) it takes; None: its own"""


@dataclass
class DataConfig:
    """What is trained on, and how it is read."""

    train: str = field(default="", metadata={"shards": True})
    """SHARDS: a folder, a glob, braces ('/data/{00000..00099}.tar'), a list.txt, URLs; sources joined by `::`."""
    index: str | None = None
    """Folder of the index that `amclip data index` made; null: looked for beside the shards and in the run's folder,
    and made in the latter, again for each run."""
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
    """Crops of each image for the student, where data.views does not list them."""
    photometric: bool = True
    """Colour jitter, grayscale, blur and solarize on the views (never on the teacher's crop)."""
    keep_colours: bool = False
    """True: of these only brightness, contrast, saturation and blur, so that captions that name colours stay true."""
    colours: str = "aclip"
    """aclip: A-CLIP's changes | simclr: SLIP's, with more saturation and blur, and no solarize."""
    views: list[ViewConfig] = field(default_factory=list, metadata={"length": "num_views"})
    """The views one by one, each with what it has of its own; empty: data.num_views alike. One key: data.views.1.KEY"""
    captions: list[str] = field(default_factory=lambda: ["txt|json:captions|json:caption"])
    """Where captions are: `txt`, `json:FIELD`, a template such as '{title}. {text}', alternatives joined by `|`."""
    caption_per_line: bool = True
    """True: each line of a text member is a caption of its own, and one is drawn; False: the member is one caption."""
    text_mask: TextMaskConfig = field(default_factory=TextMaskConfig)
    text_bucket: int = 8
    """Texts are cut to the batch's longest, rounded up to a multiple of this; 0: always the full context."""
    open_shards: int = 16
    """Shards read side by side, so that neighbours in a batch come from different ones."""
    shuffle_window: int = 8192
    """Samples shuffled together; a shard is read from front to back, a window at a time."""
    max_pixels: int = 89_478_485
    """An image whose header claims more is refused undecoded; Pillow opens none of more than 178,956,970."""
    exclude: str | None = None
    """A text file of samples to leave out, a line each: KEY, or SHARD/KEY; each is replaced as an unusable one is."""
    max_skip_rate: float = 0.02
    """The run stops (code 3) when more than this part of the samples had to be replaced by others."""
    allow_pipe: bool = False
    """True: `pipe:COMMAND` sources may run a shell command (`amclip data index` and `check` alone; no training)."""
    on_change: str = "refuse"
    """What a shard does that is no longer what was indexed: `refuse` stops the run (code 3), `report` trains on."""
    stage_dir: str = ""
    """A node-local folder; local shards (of Lustre, NFS) are copied into one of this user's alone in it (amclip-UID)
    before they are read. Ranges of remote ones are read from where they are."""
    stage_gb: float = 100.0
    """What the copies in data.stage_dir may take, in GB."""

    def __post_init__(self) -> None:
        for place, view in enumerate(self.views):
            view.check(place)
        self.num_views = len(self.views) or self.num_views
        at_least = {
            "workers": 0,
            "prefetch": 1,
            "num_views": 1,
            "text_bucket": 0,
            "open_shards": 1,
            "shuffle_window": 1,
            "max_pixels": 1,
        }
        for name, least in at_least.items():
            if getattr(self, name) < least:
                raise ValueError(f"data.{name}: {getattr(self, name)} is below {least}")
        if self.colours not in COLOURS:
            raise ValueError(f"data.colours: {self.colours!r} is none of {', '.join(COLOURS)}")
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

    def all_views(self) -> tuple[View, ...]:
        """Every view, in order."""
        found: list[View] = []
        for own in self.views or [ViewConfig()] * self.num_views:
            photometric = self.photometric if own.photometric is None else own.photometric
            if own.same_crop_as is not None:
                source = found[own.same_crop_as]
                first = own.same_crop_as if source.draws_of is None else source.draws_of
                found.append(source._replace(photometric=photometric, draws_of=first))
            else:
                scale, ratio = _pair(own.scale, SCALE), _pair(own.ratio, RATIO)
                colours = own.colours or self.colours
                found.append(View(scale, ratio, bool(own.flip), photometric, colours))
        return tuple(found)

    def view_masks(self) -> list[ViewMask]:
        """What each view's mask has of its own."""
        return [view.mask for view in self.views] or [ViewMask() for _ in range(self.num_views)]


def _pair(given: list[float] | None, default: tuple[float, float]) -> tuple[float, float]:
    return default if given is None else (given[0], given[1])


def check_sources(sources: Sequence[str]) -> None:
    """Raises ValueError for a caption source that can never yield anything."""
    for source in sources:
        for alternative in source.split("|"):
            is_field = alternative.startswith("json:") and len(alternative) > len("json:")
            if alternative != "txt" and not is_field and not re.search(r"\{\w+\}", alternative):
                raise ValueError(
                    f"data.captions: {alternative!r} is neither txt, json:FIELD nor a template like '{{title}}'"
                )
