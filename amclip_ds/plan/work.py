"""What one optimizer step works through on a rank: which towers see how many tokens, and what follows from it: floating
point operations and the bytes that wait for the backward pass.

Shapes: B samples of a rank, N patches, K kept, D vision width, W text width, E embedding, T tokens of a text.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from amclip_ds import config as settings
from amclip_ds import hub
from amclip_ds.config import BatchPlan, TrainConfig
from amclip_ds.engine.ds_config import NO_COMPILE, compile_mode_of, fetches_weights, read_ds_config, stage_of
from amclip_ds.errors import SettingsError, UserError, in_one_line
from amclip_ds.masks import STAGES, masks_of_views, needs_of
from amclip_ds.masks.units import num_kept
from amclip_ds.model.config import ModelConfig, grid_of
from amclip_ds.plan import objectives, shapes
from amclip_ds.plan.objectives import FP32, Cost, Part
from amclip_ds.plan.shapes import Parameters, Tower

TERA = 1e12
ATTENTION_BACKWARD = 2.5  # times the forward's products: the scores are formed again, as fused kernels do


@dataclass(frozen=True)
class Work:
    """A step of a configuration on a rank of a world."""

    config: TrainConfig
    world: int
    batch: BatchPlan
    tower: Tower
    grid: int
    views: tuple[int, ...]
    """patch tokens that each view keeps"""
    teacher_grid: int | None
    """patches along a side of the teacher's crop; None: nothing reads a teacher"""
    text_tokens: int
    texts: tuple[bool, ...]
    """of each form of the texts that is read: whether all of its tokens are, or the end token's alone"""
    parts: dict[str, Part]
    """the objectives"""
    student: Parameters
    teacher: Parameters
    """empty without one"""
    frozen: ModelConfig | None
    """distill.teacher's, where it is a run or a checkpoint of ours"""
    bytes: int
    """of a number in the dtype of the forward"""
    stage: int
    compile_mode: str
    """none | block | tower: what torch.compile takes on a GPU"""

    def sizes(self) -> objectives.Sizes:
        """What the objectives' costs depend on."""
        model = self.config.model
        return objectives.Sizes(
            views=len(self.views),
            local=self.batch.local,
            world=self.world,
            micro=self.batch.micro,
            width=self.tower.width,
            text_width=model.text.width,
            embed_dim=model.embed_dim,
            bytes=self.bytes,
            kept=self.views,
            text_tokens=self.text_tokens,
            teacher_patches=(self.teacher_grid or self.grid) ** 2,
            teacher_looks=len(self.views) if self.config.teacher.sees == "views" else 0,
        )


def work_of(config: TrainConfig, world: int, text_tokens: int | None = None) -> Work:
    """The work of a configuration. text_tokens: of the longest text of a batch; None: the context length.

    Raises UserError for what cannot be built or shared out.
    """
    ds = read_ds_config(config.engine)
    stage = stage_of(ds)
    try:
        tower = shapes.tower_of(config.model.vision)
        grid = grid_of(config.model.vision.image_size, tower.patch)
        views = tuple(num_kept(mask.at_most(), grid) for mask in masks_of(config))
    except ValueError as error:
        raise SettingsError(in_one_line(error)) from None
    parts = objectives.parts_of(config, tower.width, grid, tower.patch)
    parameters = {name: part.parameters for name, part in parts.items()}
    has_bias = any("logit_bias" in part.features for part in parts.values())
    teacher_grid = _teacher_grid(config, parts, tower)
    teacher: Parameters = {}
    if teacher_grid is not None or config.teacher.always:
        averaged = {name: part.averaged for name, part in parts.items()}
        teacher = shapes.teacher_parameters(config.model, tower, parameters, averaged)
    context = _longest_text(config, parts)
    return Work(
        config=config,
        world=world,
        batch=settings.plan_batch(config.batch, world),
        tower=tower,
        grid=grid,
        views=views,
        teacher_grid=teacher_grid,
        text_tokens=min(text_tokens or context, context),
        texts=_texts_of(config, parts),
        parts=parts,
        student=shapes.model_parameters(config.model, tower, parameters, has_bias),
        teacher=teacher,
        frozen=settings.model_of_run(hub.local(config.distill.teacher)) if config.distill.teacher else None,
        bytes=2 if ds.get("bf16", {}).get("enabled") else FP32,
        stage=stage,
        compile_mode=compile_mode_of(str(config.engine.compile), stage, "cuda", fetches_weights(ds, world)),
    )


def _texts_of(config: TrainConfig, parts: dict[str, Part]) -> tuple[bool, ...]:
    read = [part for part in parts.values() if part.text is not None]
    whole = {part.text for part in read if "tokens" in part.features or not config.engine.savings.last_block}
    return tuple(form in whole for form in dict.fromkeys(part.text for part in read))


def _longest_text(config: TrainConfig, parts: dict[str, Part]) -> int:
    """Tokens of the longest text that is read, start and end among them."""
    context, mask = config.model.text.context_length, config.data.text_mask
    forms = {part.text for part in parts.values() if part.text is not None}
    return min(context, mask.tokens) if forms == {"masked"} else context


def masks_of(config: Any) -> tuple[Any, ...]:
    """The mask of each view."""
    return masks_of_views(config.mask, config.data.view_masks())


def _teacher_grid(config: TrainConfig, parts: dict[str, Part], tower: Tower) -> int | None:
    reads_scores = any("scores" in needs_of(mask) for mask in masks_of(config))
    if not reads_scores and not any(part.targets or part.averaged for part in parts.values()):
        return None
    return grid_of(config.teacher.image_size(config.model.vision.image_size), tower.patch)


# --- floating point operations ---------------------------------------------------------------------------------------


def blocks_forward(width: int, hidden: int, depth: int, tokens: float, pooled: bool = False) -> tuple[float, float]:
    """(linear layers, attention) of one sequence: 2 operations a multiply-add.

    pooled: the last block makes keys and values of all tokens, and everything else of one (engine.savings.last_block).
    """
    whole = depth - int(pooled)
    linear = 2.0 * whole * tokens * (4 * width**2 + 2 * width * hidden)
    attention = 4.0 * whole * tokens**2 * width
    if not pooled:
        return linear, attention
    one = 2.0 * (2 * width**2 + 2 * width * hidden)
    return linear + 2.0 * tokens * 2 * width**2 + one, attention + 4.0 * tokens * width


def reads_one(work: Work) -> bool:
    """Whether the vision tower's last block is computed for one token: nothing reads the others."""
    if work.config.model.vision.pool != "cls":
        return False  # the mean of all tokens
    return work.config.engine.savings.last_block and not any("patches" in part.features for part in work.parts.values())


def patch_rows(work: Work) -> list[int]:
    """Patches of each view that are embedded: those that stay, unless its mask looks at the others."""
    everything = work.grid**2
    if not work.config.engine.savings.patchify:
        return [everything] * len(work.views)
    masks = zip(work.views, masks_of(work.config))
    return [everything if "patches" in needs_of(mask) else kept for kept, mask in masks]


@dataclass(frozen=True)
class Flops:
    """Of a rank's batch in one step, by part; forward and backward, nothing counted twice that runs twice."""

    vision: float
    text: float
    teacher: float
    objectives: float
    again: float
    """forwards that run a second time: recomputed blocks, and the towers under accumulation"""

    @property
    def model(self) -> float:
        """Without what runs a second time: what MFU goes by."""
        return self.vision + self.text + self.teacher + self.objectives

    @property
    def executed(self) -> float:
        """With it."""
        return self.model + self.again


def flops_of(work: Work) -> Flops:
    """The floating point operations of a rank's batch."""
    model, B, tower = work.config.model, work.batch.local, work.tower
    pooled = reads_one(work)
    vision_blocks = [blocks_forward(tower.width, tower.hidden, tower.depth, 1 + kept, pooled) for kept in work.views]
    text_hidden = int(model.text.width * model.text.mlp_ratio)
    of_texts = [
        blocks_forward(model.text.width, text_hidden, model.text.depth, work.text_tokens, not whole)
        for whole in work.texts
    ]
    text_blocks = (sum(linear for linear, _ in of_texts), sum(attention for _, attention in of_texts))
    patches = 2.0 * sum(patch_rows(work)) * tower.width * 3 * tower.patch**2
    patch_passes = 1 if model.vision.freeze_patch_embed else 2  # the images need no gradient
    vision = sum(3 * linear + (1 + ATTENTION_BACKWARD) * attention for linear, attention in vision_blocks)
    vision += patches * patch_passes + len(work.views) * 6.0 * tower.width * model.embed_dim
    text = 3 * text_blocks[0] + (1 + ATTENTION_BACKWARD) * text_blocks[1]
    text += 6.0 * _embedded(work) * model.text.width * model.embed_dim
    forward = sum(map(sum, vision_blocks)) + patches + sum(text_blocks)
    again = _recomputed(vision_blocks, text_blocks, model)
    if work.batch.splits > 1:
        again += forward
    sizes = work.sizes()
    return Flops(
        vision=B * vision,
        text=B * text,
        teacher=B * (max(1, sizes.teacher_looks) * _teacher_forward(work) + _frozen_forward(work))
        + _observed(work, sizes),
        objectives=sum(part.cost(sizes).flops for part in work.parts.values()),
        again=B * again,
    )


def _embedded(work: Work) -> int:
    """Forms of the texts of which embeddings are made."""
    return len({part.text for part in work.parts.values() if "text_embeds" in part.features})


def _recomputed(vision: list[tuple[float, float]], text: tuple[float, float], model: Any) -> float:
    """The forwards of the blocks that run again in the backward pass."""
    forwards = ((sum(map(sum, vision)), model.vision.checkpoint_every), (sum(text), model.text.checkpoint_every))
    return sum(operations / every for operations, every in forwards if every)


def block_passes(work: Work) -> float:
    """How often a step runs a block, forwards and backwards (which launch twice as much): what the host has to do,
    however small the batch is."""
    model, tower = work.config.model, work.tower
    groups = len(set(work.views))  # views with equally many tokens go together
    again = 1 if work.batch.splits > 1 else 0
    passes = 0.0
    for depth, every in (
        (groups * tower.depth, model.vision.checkpoint_every),
        (len(work.texts) * model.text.depth, model.text.checkpoint_every),
    ):
        passes += depth * (3 + again + (1 / every if every else 0))
    return work.batch.splits * passes + (tower.depth if work.teacher_grid else 0)


def _teacher_forward(work: Work) -> float:
    if work.teacher_grid is None:
        return 0.0
    tower, patches = work.tower, work.teacher_grid**2
    reads_all = work.config.model.vision.pool != "cls" or any("patches" in part.targets for part in work.parts.values())
    pooled = work.config.engine.savings.last_block and not reads_all
    linear, attention = blocks_forward(tower.width, tower.hidden, tower.depth, 1 + patches, pooled)
    scores = 2.0 * tower.depth * (1 + patches) * tower.width  # the row of the class token, once more in fp32
    return linear + attention + scores + 2.0 * patches * tower.width * 3 * tower.patch**2


def _frozen_forward(work: Work) -> float:
    """Of distill.teacher, over every view, at the teacher's own size, and the text of a sample."""
    model = work.frozen
    if model is None:
        return 0.0
    tower, side = shapes.tower_of(model.vision), model.vision.image_size
    patches, pooled = grid_of(side, tower.patch) ** 2, model.vision.pool == "cls"
    of_view = sum(blocks_forward(tower.width, tower.hidden, tower.depth, 1 + patches, pooled))
    of_view += 2.0 * tower.width * (patches * 3 * tower.patch**2 + model.embed_dim)
    text, hidden = model.text, int(model.text.width * model.text.mlp_ratio)
    of_text = sum(blocks_forward(text.width, hidden, text.depth, work.text_tokens, pooled=True))
    return len(work.views) * of_view + of_text + 2.0 * text.width * model.embed_dim


def frozen_bytes(work: Work) -> float:
    """The weights of distill.teacher, whole in fp32 on every rank."""
    if work.frozen is None:
        return 0.0
    parameters = shapes.model_parameters(work.frozen, shapes.tower_of(work.frozen.vision), {}, False)
    return float(FP32 * sum(parameter.numel() for parameter in parameters.values()))


def _observed(work: Work, sizes: objectives.Sizes) -> float:
    return sum(part.observed(sizes) for part in work.parts.values())


def begun(work: Work, progress: float) -> Work:
    """A step when so much of the run is done, 0 to 1: without what begins later and what that alone reads."""
    parts = {name: part for name, part in work.parts.items() if part.start <= progress}
    if len(parts) == len(work.parts):
        return work
    from amclip_ds.method import method_of  # of objectives that are known by their modules alone: torch is loaded

    now = method_of(work.config).at(progress)
    teacher_grid = work.teacher_grid if now.reads_teacher else None
    texts = _texts_of(work.config, parts)
    return replace(work, parts=parts, texts=texts, views=work.views[: len(now.masks)], teacher_grid=teacher_grid)


def mean_operations(work: Work) -> float:
    """Floating point operations of a rank's batch in one step, the mean over the whole run: masks keep what their
    schedules say, and what begins later costs nothing before. A text has work.text_tokens, or what its form leaves."""
    changes = {0.0, 1.0} | {part.start for part in work.parts.values()}
    if any(mask.final_keep_ratio is not None for mask in masks_of(work.config)):
        changes |= {stage / STAGES for stage in range(STAGES)}
    edges = sorted(changes)
    return sum((end - begin) * flops_of(_at(work, begin)).model for begin, end in zip(edges, edges[1:]))


def _at(work: Work, progress: float) -> Work:
    """A step when so much of the run is done, 0 to 1: what has begun, with as many tokens as the masks then keep."""
    now = begun(work, progress)
    masks = masks_of(work.config)[: len(now.views)]
    return replace(now, views=tuple(num_kept(mask.at(progress), work.grid) for mask in masks))


def operations(config: TrainConfig, world: int) -> Callable[[int | list[int], float, float], float] | None:
    """(kept tokens of the views, tokens of a text, how much of the run is done) -> the operations of a rank's batch:
    what a run's MFU goes by.

    None where a part of the run cannot be counted, as of a teacher from another library: it may be sound all the same.
    """
    try:
        work = work_of(config, world)
        if config.distill.teacher and work.frozen is None:
            return None
        flops_of(work)  # traces what is not known beforehand
    except UserError:
        return None

    def of_step(kept: int | list[int], text_tokens: float, progress: float) -> float:
        now = begun(work, progress)
        views = tuple(kept) if isinstance(kept, list) else (kept,) * len(now.views)
        return flops_of(replace(now, views=views, text_tokens=round(text_tokens))).model

    return of_step


# --- bytes that wait for the backward pass ---------------------------------------------------------------------------


def block_bytes(width: int, hidden: int, heads: int, number: int, activations: int = 2) -> int:
    """What one pre-norm block keeps of a token: inputs of both norms, their outputs, queries, keys and values, what
    attention gave, and the hidden layer `activations` times (before and after its activation function): with a hidden
    layer four times as wide, 32 bytes a channel in bf16.

    number: bytes of a number. Beside them in fp32: mean and deviation of both norms, a sum a head.
    """
    return number * (8 * width + activations * hidden) + FP32 * (4 + heads)


def pooled_bytes(width: int, number: int) -> int:
    """What a last block keeps of a token that is not pooled: the first norm's input and output, key and value."""
    return number * 4 * width + FP32 * 2


@dataclass(frozen=True)
class Activations:
    """Bytes of a rank's micro-batch."""

    towers: float
    objectives: float
    """heads and logits"""
    transient: float
    """on top, for a moment of the backward pass"""


def activations_of(work: Work) -> Activations:
    """What the forward of the student keeps, and what its backward needs beside it."""
    model, micro, tower = work.config.model, work.batch.micro, work.tower
    sizes = work.sizes()
    cost = sum((part.cost(sizes) for part in work.parts.values()), Cost(0.0, 0.0))
    tokens = sum(1 + kept for kept in work.views)
    text_hidden = int(model.text.width * model.text.mlp_ratio)
    is_fused = model.text.activation != "quick_gelu" or work.compile_mode != NO_COMPILE
    of_gelu = 2 if is_fused else 3
    vision, of_image = _tower_bytes(
        tokens * block_bytes(tower.width, tower.hidden, tower.heads, work.bytes),
        tokens * tower.width * work.bytes,
        tower.depth,
        model.vision.checkpoint_every,
        tokens * pooled_bytes(tower.width, work.bytes) if reads_one(work) else None,
    )
    text = of_text = 0.0
    for is_whole in work.texts:
        waits, of_text = _tower_bytes(
            work.text_tokens * block_bytes(model.text.width, text_hidden, model.text.heads, work.bytes, of_gelu),
            work.text_tokens * model.text.width * work.bytes,
            model.text.depth,
            model.text.checkpoint_every,
            None if is_whole else work.text_tokens * pooled_bytes(model.text.width, work.bytes),
        )
        text += waits
    normed = len(work.views) if reads_one(work) else tokens
    ends = 2 * work.bytes * normed * tower.width  # the last norm's input and output
    if not model.vision.freeze_patch_embed:
        ends += work.bytes * sum(patch_rows(work)) * 3 * tower.patch**2
    moment = max(
        of_image + work.bytes * tokens * (tower.hidden + 3 * tower.width),
        of_text + work.bytes * work.text_tokens * (text_hidden + 3 * model.text.width),
    )
    cached = 0.0
    if work.batch.splits > 1:  # GradCache holds the features of the whole batch, and their gradients
        features = len(work.views) * tower.width + len(work.texts) * model.text.width
        cached = 2.0 * work.bytes * work.batch.local * features
    return Activations(micro * (vision + text + ends) + cached, cost.saved, max(micro * moment, cost.transient))


def _tower_bytes(of_block: int, of_input: int, depth: int, every: int, of_last: int | None) -> tuple[float, float]:
    """(bytes that wait, bytes for a moment) of a sample: of a recomputed block its input waits, and in the backward
    pass one block at a time is formed again. of_last: what the last block keeps, where it is not as the others."""
    recomputed = -(-depth // every) if every else 0
    waits = (depth - recomputed) * of_block + recomputed * of_input
    if of_last is not None and not (every and (depth - 1) % every == 0):
        waits += of_last - of_block
    return float(waits), float(of_block if every else 0)


def input_bytes(work: Work) -> dict[str, float]:
    """The images of a rank's batch on the device: as bytes, where workers make them those of the next one too, and
    changed and normalised in fp32."""
    side, B = work.config.model.vision.image_size, work.batch.local
    pixels = 3 * side**2
    has_crop = work.teacher_grid and work.config.teacher.view is None and work.config.teacher.sees == "crop"
    teacher = 3 * (side * (work.teacher_grid or 0) // work.grid) ** 2 if has_crop else 0
    batches = 2 if work.config.data.workers else 1  # data/prefetch.py
    return {
        "images": float(batches * B * (len(work.views) * pixels + teacher)),
        "photometric": float(FP32 * B * len(work.views) * pixels),
    }
