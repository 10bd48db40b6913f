"""The keys of `model`, `heads`, `loss` and `teacher`. Loads no torch."""

import re
from dataclasses import dataclass, field, replace

from amclip_ds.errors import UserError


@dataclass
class VisionConfig:
    name: str = "vit_base_patch16_224"
    """Any timm ViT with a class token and no register tokens (vit_small_patch16_224, vit_huge_patch14_224, ...)."""
    image_size: int = 224
    """Side of the training images in pixels; the patch size must divide it."""
    patch_size: int | None = None
    """Side of a patch in pixels; none: what the name says."""
    width: int | None = None
    """Channels of a token; none: what the name says."""
    depth: int | None = None
    """Number of blocks; none: what the name says."""
    heads: int | None = None
    """Attention heads; none: what the name says (the paper's S/16 has 12, timm's 6)."""
    mlp_ratio: float | None = None
    """Hidden width of the MLP over the width; none: what the name says."""
    freeze_patch_embed: bool = True
    """The patch embedding stays at its random initialisation (as published), with model.init_from at that value,
    and has no backward pass."""
    pool: str = "cls"
    """cls: the class token is the image's feature | mean: the mean of all tokens, the class token among them (FLIP)."""
    position_init: str = "normal"
    """normal: truncated normal 0.02 | sincos: 0.3 x the 2-D sine-cosine table (learns faster at tiny sizes)."""
    checkpoint_every: int = 0
    """Recompute every n-th block in the backward pass instead of storing its activations; 0: none, 1: all."""

    def __post_init__(self) -> None:
        if self.position_init not in ("normal", "sincos"):
            raise ValueError(f"model.vision.position_init: {self.position_init!r} is neither normal nor sincos")
        if self.pool not in ("cls", "mean"):
            raise ValueError(f"model.vision.pool: {self.pool!r} is neither cls nor mean")
        if self.checkpoint_every < 0:
            raise ValueError(f"model.vision.checkpoint_every: {self.checkpoint_every} must be 0 or more")
        for key in ("image_size", "patch_size", "width", "depth", "heads", "mlp_ratio"):
            value = getattr(self, key)
            if value is not None and value <= 0:
                raise ValueError(f"model.vision.{key}: {value} must be positive")
        if self.width and self.heads and self.width % self.heads:
            raise ValueError(f"model.vision.heads: {self.heads} does not divide model.vision.width {self.width}")

    @property
    def grid(self) -> int:
        """Patches along a side of a training image. Raises ValueError where the patch does not divide the image."""
        return patch_grid(self)


@dataclass
class TextConfig:
    width: int = 512
    """Channels of a token."""
    depth: int = 12
    """Number of blocks."""
    heads: int = 8
    """Attention heads."""
    mlp_ratio: float = 4.0
    """Hidden width of the MLP over the width."""
    context_length: int = 77
    """Longest text in tokens, start and end token included."""
    vocab_size: int = 49408
    """Number of token ids (CLIP's byte-pair encoding: 49408)."""
    eos_token_id: int = 49407
    """The end token; the feature is read at its first place."""
    activation: str = "quick_gelu"
    """quick_gelu (CLIP's, x * sigmoid(1.702 x)) | gelu (exact)."""
    checkpoint_every: int = 0
    """Recompute every n-th block in the backward pass instead of storing its activations; 0: none, 1: all."""

    def __post_init__(self) -> None:
        if self.activation not in ("quick_gelu", "gelu"):
            raise ValueError(f"model.text.activation: {self.activation!r} is neither quick_gelu nor gelu")
        for key in ("width", "depth", "heads", "mlp_ratio", "vocab_size"):
            if getattr(self, key) <= 0:
                raise ValueError(f"model.text.{key}: {getattr(self, key)} must be positive")
        if self.width % self.heads:
            raise ValueError(f"model.text.heads: {self.heads} does not divide model.text.width {self.width}")
        if not 0 <= self.eos_token_id < self.vocab_size:
            raise ValueError(f"model.text.eos_token_id: {self.eos_token_id} is outside the vocabulary")
        if self.checkpoint_every < 0:
            raise ValueError(f"model.text.checkpoint_every: {self.checkpoint_every} must be 0 or more")
        if self.context_length < 3:
            raise ValueError(f"model.text.context_length: {self.context_length} must be at least 3")


@dataclass
class ModelConfig:
    vision: VisionConfig = field(default_factory=VisionConfig)
    """The image tower."""
    text: TextConfig = field(default_factory=TextConfig)
    """The text tower."""
    embed_dim: int = 512
    """Width of the shared embedding of images and texts."""
    init_from: str | None = None
    """A run, checkpoint, or safetensors of ours, open_clip, transformers or timm (a folder, a file, hf-hub:ORG/NAME),
    whose weights replace the random start; none: random."""

    def __post_init__(self) -> None:
        if self.embed_dim < 1:
            raise ValueError(f"model.embed_dim: {self.embed_dim} must be at least 1")


@dataclass
class HeadsConfig:
    norm: str = "batch"
    """batch: statistics over all ranks, as in the paper | layer: no communication, for very large worlds."""
    norm_by: str = "batch"
    """batch: the views are normalised together, as in A-CLIP's code | view: each by itself (SLIP)."""
    hidden_dim: int = 4096
    """Width of the hidden layers."""
    output_dim: int = 256
    """Width of what the self-supervised losses compare."""
    norm_momentum: float = 0.1
    """How fast the running statistics of batch norm follow the batches (read only in evaluation mode)."""

    def __post_init__(self) -> None:
        if self.norm not in ("batch", "layer"):
            raise ValueError(f"heads.norm: {self.norm!r} is neither batch nor layer")
        if self.norm_by not in ("batch", "view"):
            raise ValueError(f"heads.norm_by: {self.norm_by!r} is neither batch nor view")
        for key in ("hidden_dim", "output_dim"):
            if getattr(self, key) < 1:
                raise ValueError(f"heads.{key}: {getattr(self, key)} must be at least 1")
        if not 0.0 < self.norm_momentum <= 1.0:
            raise ValueError(f"heads.norm_momentum: {self.norm_momentum} is outside (0, 1]")


FLAT_OBJECTIVES = ("contrastive", "sigmoid", "simclr", "byol")  # their options are LossConfig's own keys


@dataclass
class Weighted:
    """The options that every objective has."""

    weight: float = 0.0
    """Weight of its terms in the loss; 0: it is not built."""
    views: list[int] | None = None
    """The views that it reads, by their places in data.views; null: those that it is made for, else all."""
    start: float = 0.0
    """Share of the run, from 0 to below 1, after which it begins; before, it costs nothing and its heads stay."""


@dataclass
class OcclusionOptions(Weighted):
    """OCL's loss between two views of one crop."""

    temperature: float = 0.07
    """Temperature of the softmax over candidates."""
    kappa: float = 1 / 64
    """How much closeness is stretched: similarity = (1 + cos) / 2 / (1 + kappa (1 - cos))."""

    def __post_init__(self) -> None:
        if self.temperature <= 0:
            raise ValueError(f"loss.occlusion.temperature: {self.temperature} must be positive")
        if self.kappa < 0:
            raise ValueError(f"loss.occlusion.kappa: {self.kappa} must be 0 or more")


@dataclass
class ClipKDOptions(Weighted):
    """CLIP-KD's losses against distill.teacher; each has its own weight beside `weight`, which multiplies them all."""

    feature_weight: float = 2000.0
    """Of the squared difference of the embeddings (FD), a mean over their channels."""
    interactive_weight: float = 1.0
    """Of the contrast with the teacher's embeddings (ICL)."""
    relation_weight: float = 1.0
    """Of the divergence from the teacher's distribution over the batch (CRD)."""
    project_to: int | None = None
    """Width of the teacher's embeddings where it is not model.embed_dim: FD and ICL then compare linear maps of the
    student's, as published; null: no map."""
    raw_scale: bool = False
    """True: ICL's learned scale multiplies the cosine as it is, its logarithm, as in the published code."""

    def __post_init__(self) -> None:
        for name in ("feature_weight", "interactive_weight", "relation_weight"):
            if getattr(self, name) < 0:
                raise ValueError(f"loss.clipkd.{name}: {getattr(self, name)} must be 0 or more")
        if self.project_to is not None and self.project_to < 1:
            raise ValueError(f"loss.clipkd.project_to: {self.project_to} must be at least 1")


def other_width(theirs: int, own: int, mapped: int | None) -> str:
    """What is said of a teacher whose embeddings meet none of that width."""
    now = f"loss.clipkd.project_to is {mapped}" if mapped else f"the student's {own}"
    return (
        f"distill.teacher: its embeddings are {theirs} wide, {now}; set loss.clipkd.project_to={theirs}, or"
        f" model.embed_dim={theirs}"
    )


def check_teacher_fits(teacher: ModelConfig, student: ModelConfig, name: str) -> None:
    """Raises UserError, in one line, for a frozen teacher of ours (distill.teacher) that cannot read what this student
    reads."""
    theirs, own = teacher.text, student.text
    if (theirs.vocab_size, theirs.eos_token_id) != (own.vocab_size, own.eos_token_id):
        raise UserError(f"distill.teacher: {name} has another vocabulary than the student")
    if theirs.context_length < own.context_length:
        raise UserError(
            f"distill.teacher: {name} reads texts of {theirs.context_length} tokens, the student of"
            f" {own.context_length}; set model.text.context_length={theirs.context_length}"
        )


@dataclass
class PatchesOptions(Weighted):
    """Prediction of the teacher's tokens at removed places (MaskCLIP), which sees that crop (teacher.view)."""

    depth: int = 1
    """Blocks of the decoder."""

    def __post_init__(self) -> None:
        if self.depth < 1:
            raise ValueError(f"loss.patches.depth: {self.depth} must be at least 1")


@dataclass
class DetailCLIPOptions(Weighted):
    """DetailCLIP's losses against what the teacher sees of the views (teacher.sees=views); `weight` multiplies all."""

    patch_weight: float = 1.0
    """Of the teacher's distribution over prototypes at removed places of the same view."""
    cls_weight: float = 1.0
    """Of its distribution for the class token of the other view."""
    pixel_weight: float = 1.0
    """Of the removed patches' pixels, whitened by patch."""
    depth: int = 1
    """Blocks of the decoder."""
    decoder_heads: int = 16
    """Attention heads of the decoder."""
    prototypes: int | None = None
    """Prototypes; null: twice heads.hidden_dim (8192)."""
    hidden_dim: int | None = None
    """Width of the prototype head's hidden layers; null: half of heads.hidden_dim (2048)."""
    bottleneck_dim: int | None = None
    """Width of what meets the prototypes; null: heads.output_dim (256)."""
    student_temperature: float = 0.1
    """Of the student's softmax over prototypes."""
    teacher_temperature: float = 0.04
    """Of the teacher's, and of its patches' for loss.detailclip.warmup of the run."""
    patch_temperature: float = 0.07
    """Of the teacher's patches after that."""
    warmup: float = 0.04
    """Share of the run, from loss.detailclip.start on, after which the patches' temperature is
    loss.detailclip.patch_temperature (1 of 25 epochs)."""
    centre_momentum: float = 0.9
    """How slowly the centres of the teacher's logits follow the batches."""

    def __post_init__(self) -> None:
        for name in ("patch_weight", "cls_weight", "pixel_weight"):
            if getattr(self, name) < 0:
                raise ValueError(f"loss.detailclip.{name}: {getattr(self, name)} must be 0 or more")
        for name in ("student_temperature", "teacher_temperature", "patch_temperature"):
            if getattr(self, name) <= 0:
                raise ValueError(f"loss.detailclip.{name}: {getattr(self, name)} must be positive")
        for name in ("depth", "decoder_heads", "prototypes", "hidden_dim", "bottleneck_dim"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"loss.detailclip.{name}: {value} must be at least 1")
        for name in ("warmup", "centre_momentum"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"loss.detailclip.{name}: {getattr(self, name)} is outside [0, 1]")

    @property
    def has_prototypes(self) -> bool:
        """Whether a loss over prototypes has a weight."""
        return self.patch_weight > 0 or self.cls_weight > 0

    def sized(self, heads: HeadsConfig) -> "DetailCLIPOptions":
        """With numbers in the place of nulls."""
        return replace(
            self,
            prototypes=self.prototypes or 2 * heads.hidden_dim,
            hidden_dim=self.hidden_dim or max(1, heads.hidden_dim // 2),
            bottleneck_dim=self.bottleneck_dim or heads.output_dim,
        )


@dataclass
class MLMOptions(Weighted):
    """Prediction of hidden words from the rest of a caption (MaskCLIP's text loss), in a text pass of its own."""

    share: float = 0.2
    """Of a caption's tokens that are hidden, start and end aside; at least one."""
    depth: int = 4
    """Blocks of the decoder."""

    def __post_init__(self) -> None:
        if not 0 < self.share < 1:
            raise ValueError(f"loss.mlm.share: {self.share} is outside (0, 1)")
        if self.depth < 1:
            raise ValueError(f"loss.mlm.depth: {self.depth} must be at least 1")


@dataclass
class LossConfig:
    """A further objective's options are a section loss.NAME: a field of that name here, so that reading settings loads
    no torch; of an objective without one, and of a plug-in's, config.py makes the section from its Options."""

    kind: str = "softmax"
    """softmax: CLIP's InfoNCE | sigmoid: SigLIP's pairwise loss (adds a learned logit_bias)."""
    release: str = "aclip"
    """Whose published code compat=release repeats: aclip: pairs view 1 with itself | slip: gathers without gradient."""
    contrastive_weight: float = 1.0
    """Weight of the mean over views of the image-text loss."""
    o2o_weight: float = 1.0
    """Weight of the online-to-online loss (SimCLR between the two views); 0 leaves its head out."""
    o2e_weight: float = 2.0
    """Weight of the online-to-EMA loss (BYOL against the teacher); 0 leaves its head out."""
    o2o_temperature: float = 0.1
    """Temperature of the online-to-online loss."""
    chunk: int = 0
    """Rows of logits held at a time by the image-text and the online-to-online loss, forward and backward; 0: all."""
    views: list[int] | None = None
    """The views that the image-text loss reads, by their places in data.views; null: all."""
    o2o_views: list[int] | None = None
    """The two views that the online-to-online loss compares; null: the two there are."""
    o2e_views: list[int] | None = None
    """The views that the online-to-EMA loss reads; null: all."""
    text: str = "masked"
    """Which form of the texts the image-text loss reads where data.text_mask makes one: masked | plain."""
    occlusion: OcclusionOptions = field(default_factory=OcclusionOptions)
    clipkd: ClipKDOptions = field(default_factory=ClipKDOptions)
    patches: PatchesOptions = field(default_factory=PatchesOptions)
    mlm: MLMOptions = field(default_factory=MLMOptions)
    detailclip: DetailCLIPOptions = field(default_factory=DetailCLIPOptions)

    exchange: str = "gather"
    """gather: each rank collects all ranks' features | ring: the texts travel from rank to rank, and the memory of the
    image-text and the online-to-online loss does not grow with their number (occlusion and clipkd always gather)."""

    def __post_init__(self) -> None:
        if self.exchange not in ("gather", "ring"):
            raise ValueError(f"loss.exchange: {self.exchange!r} is neither gather nor ring")
        if self.kind not in ("softmax", "sigmoid"):
            raise ValueError(f"loss.kind: {self.kind!r} is neither softmax nor sigmoid")
        for key in ("contrastive_weight", "o2o_weight", "o2e_weight", "chunk"):
            if getattr(self, key) < 0:
                raise ValueError(f"loss.{key}: {getattr(self, key)} must be 0 or more")
        for name, options in vars(self).items():
            if isinstance(options, Weighted) and options.weight < 0:
                raise ValueError(f"loss.{name}.weight: {options.weight} must be 0 or more")
            if isinstance(options, Weighted) and not 0 <= options.start < 1:
                raise ValueError(f"loss.{name}.start: {options.start} is outside [0, 1), a share of the run")
        if self.release not in ("aclip", "slip"):
            raise ValueError(f"loss.release: {self.release!r} is neither aclip nor slip")
        if self.text not in ("masked", "plain"):
            raise ValueError(f"loss.text: {self.text!r} is neither masked nor plain")
        if self.o2o_temperature <= 0:
            raise ValueError(f"loss.o2o_temperature: {self.o2o_temperature} must be positive")


@dataclass
class DistillConfig:
    """A second teacher, which is not averaged and never changes."""

    teacher: str | None = None
    """A run, a checkpoint, or an export for open_clip or transformers (a folder, hf-hub:ORG/NAME), whose embeddings of
    the views and texts the objectives that ask for them read; none."""


@dataclass
class TeacherConfig:
    """The EMA of the student that scores the patches and gives the online-to-EMA target."""

    always: bool = False
    """true: the average is kept, evaluated and exported even where no mask or objective reads it"""
    momentum: float = 0.996
    """Momentum at the start."""
    final_momentum: float = 1.0
    """Momentum at the end; a cosine between the two over the run."""
    resolution: str = "full"
    """full: the teacher sees the image at the student's size | half: at half of it, scoring blocks (A-CLIP-eff)."""
    sees: str = "crop"
    """crop: the teacher sees one crop, its own or teacher.view | views: all views as the student gets them,
    with their colour changes and whole."""
    view: int | None = None
    """A view, from 0, that the teacher sees itself, without colour changes; null: a crop of its own around all."""
    placement: str = "auto"
    """auto: replicated at ZeRO 0-2 and on one rank, sharded at 3 | replicated | sharded: where the copy for the forward
    is."""

    def __post_init__(self) -> None:
        if self.resolution not in ("full", "half"):
            raise ValueError(f"teacher.resolution: {self.resolution!r} is neither full nor half")
        if self.sees not in ("crop", "views"):
            raise ValueError(f"teacher.sees: {self.sees!r} is neither crop nor views")
        if self.sees == "views" and self.resolution == "half":
            raise ValueError("teacher.sees: views have their own size; leave out teacher.resolution=half")
        if self.sees == "views" and self.view is not None:
            raise ValueError("teacher.sees: views are all of them; leave out teacher.view")
        if self.view is not None and self.resolution == "half":
            raise ValueError("teacher.view: the teacher then sees the view's size; leave out teacher.resolution=half")
        if self.placement not in ("auto", "replicated", "sharded"):
            raise ValueError(f"teacher.placement: {self.placement!r} is none of auto, replicated, sharded")
        for key in ("momentum", "final_momentum"):
            if not 0.0 <= getattr(self, key) <= 1.0:
                raise ValueError(f"teacher.{key}: {getattr(self, key)} is outside [0, 1]")

    def image_size(self, of_views: int) -> int:
        """Pixels along a side of what the teacher sees, where the views have `of_views`."""
        return of_views // 2 if self.resolution == "half" else of_views


def patch_grid(config: VisionConfig, image_size: int | None = None) -> int:
    """Patches along a side of an image (default: the training size), without building any weight.

    Raises ValueError where the patch does not divide the image.
    """
    patch = config.patch_size
    if patch is None:
        named = re.search(r"_patch(\d+)_", f"{config.name}_")  # timm's names say it; importing timm costs seconds
        patch = int(named[1]) if named else _built_patch_size(config)
    return grid_of(image_size or config.image_size, patch)


def _built_patch_size(config: VisionConfig) -> int:
    from amclip_ds.model.vision import built_patch_size  # only where the name does not say it: this loads torch

    return built_patch_size(config)


def grid_of(image_size: int, patch: int) -> int:
    if image_size % patch:
        raise ValueError(f"model.vision.image_size: {image_size} is not a multiple of the patch size {patch}")
    return image_size // patch
