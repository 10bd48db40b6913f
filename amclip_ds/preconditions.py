"""What is known of a run before torch is loaded, ranks meet and shards are indexed; `train` and `submit` ask here."""

import importlib.util
import os
from pathlib import Path
from typing import Any

from amclip_ds import config as settings
from amclip_ds import hub, run_files
from amclip_ds.checkpoint.step_folders import STEP_FOLDER, list_steps
from amclip_ds.config import TrainConfig
from amclip_ds.data.exclude import read_excluded
from amclip_ds.data.train_sources import check_inputs
from amclip_ds.engine.ds_config import FP8_TEACHER, check_fp8, check_optimizer, check_torchao, read_ds_config
from amclip_ds.errors import UserError
from amclip_ds.files import not_read
from amclip_ds.masks import MASKS, NONE, masks_of_views
from amclip_ds.masks.text import TextMaskConfig
from amclip_ds.model.config import ModelConfig, VisionConfig, check_teacher_fits, other_width
from amclip_ds.plan.shapes import Tower, tower_of
from amclip_ds.shards.stage import check_stage

# One of them: a run.
OURS = {run_files.ATTEMPTS, run_files.METRICS, run_files.VERSIONS, run_files.CHECKPOINTS, "slurm", "index"}
# What may be there without one, as may a batch system's output.
BESIDE = {run_files.CONFIG, run_files.OWNER, run_files.STOP}
OUTPUT = (".out", ".err", ".log")


def check(config: TrainConfig, resume: str = "auto", trains_here: bool = True) -> None:
    """Raises UserError for a start that could only fail later: run folder, data, DeepSpeed's file, weights, W&B.

    trains_here: whether this machine is one of those that train, whose local disk takes data.stage_dir.
    """
    check_folder(Path(config.run.out))
    check_engine(config)
    if config.model.vision.name not in settings.shipped_towers():
        settings.check_buildable(config)  # only timm knows the name, and it loads torch
    check_inputs(config.data, config.eval.data)
    read_excluded(config.data.exclude)
    if config.data.stage_dir and trains_here:
        check_stage(config.data.stage_dir)
    check_words(config)
    check_teacher(config)
    check_init(config)
    check_resume(resume)
    if config.eval.data and not resumes(config):
        from amclip_ds.evaluate.datasets import check_sets  # it needs numpy

        check_sets(config.eval.data)
    for tracker in config.log.chosen():
        if importlib.util.find_spec(tracker) is None:
            key = "log.wandb_project" if tracker == "wandb" and config.log.wandb_project else "log.trackers"
            raise UserError(f"{key}: {tracker} is not installed: pip install 'amclip_ds[track]', or leave it out")


def check_resume(resume: str) -> None:
    """Raises UserError for a path that is no checkpoint and holds none."""
    if resume in ("auto", "never"):
        return
    path = Path(resume)
    if not path.exists():
        raise UserError(f"--resume {resume}: no such checkpoint; auto (the default) takes the newest of run.out")
    is_one = STEP_FOLDER.fullmatch(path.resolve().name) or (path / run_files.MANIFEST).exists()
    if not is_one and not list_steps(path / run_files.CHECKPOINTS) and not list_steps(path):
        raise UserError(f"--resume {resume}: there is no checkpoint (step_XXXXXXXX with a {run_files.MANIFEST})")


def check_engine(config: TrainConfig) -> None:
    """Raises UserError for a DeepSpeed file that the optimizer or engine.fp8 cannot have, and fp8 for no teacher."""
    ds = read_ds_config(config.engine)
    check_optimizer(ds, config.engine.deepspeed, config.optim.name)
    check_fp8(ds, config.engine)
    check_torchao(config.engine)
    if config.engine.fp8 == FP8_TEACHER:
        from amclip_ds.method import method_of  # it loads torch

        if not method_of(config).reads_teacher:
            raise UserError("engine.fp8: nothing of this run reads a teacher; use engine.fp8=all, or none")


def check_words(config: TrainConfig) -> None:
    """Raises UserError for a table of words that the text mask cannot read, or that is of another tokenizer."""
    table = config.data.text_mask.read_table()
    if table is not None and table.tokenizer:
        from amclip_ds.data.captions import check_table  # it loads torch

        check_table(table, config.data.text_mask.table)


def check_teacher(config: TrainConfig) -> None:
    """Raises UserError where distill.teacher points nowhere, at no model, or at one that does not fit the student."""
    if not config.distill.teacher:
        return
    path = hub.local(config.distill.teacher)
    if not path.exists():
        raise UserError(f"distill.teacher: no such file or folder: {config.distill.teacher}{hub.missing(str(path))}")
    if teacher := settings.model_of_run(path):
        check_teacher_fits(teacher, config.model, str(path))
        check_width(config, teacher.embed_dim)
        check_weights(path)
        return
    from amclip_ds.distill import check_export  # it loads torch
    from amclip_ds.evaluate import export_folder

    check_export(str(path))
    if (path / "open_clip_config.json").is_file():
        check_width(config, export_folder.read_open_clip(path).model["embed_dim"])
    else:
        check_width(config, export_folder.read_hugging_face(path).model["projection_dim"])


def check_weights(path: Path) -> None:
    """Raises UserError for a run that has saved nothing, and for what is no checkpoint or export in a run; the ranks
    read the files."""
    names = (run_files.MANIFEST, "student.safetensors", "teacher.safetensors")
    if any((path / name).exists() for name in names) or list_steps(path / run_files.CHECKPOINTS):
        return
    if not (path / run_files.CONFIG).is_file():
        from amclip_ds.distill import check_export  # it loads torch

        check_export(str(path))
    else:
        raise UserError(f"distill.teacher: {path}: no weights yet: neither student.safetensors nor a checkpoint")


def check_width(config: TrainConfig, width: int) -> None:
    """Raises UserError for a teacher whose embeddings are of another width than what is compared with them."""
    options = config.loss.clipkd
    own = options.project_to or config.model.embed_dim
    if options.weight and width != own:
        raise UserError(other_width(width, config.model.embed_dim, options.project_to))


def check_folder(folder: Path) -> None:
    """Raises UserError for a folder that holds something and is no run: a run's files would be mixed with it."""
    try:
        names = sorted(path.name for path in folder.iterdir())
    except FileNotFoundError:
        above = next(path for path in folder.absolute().parents if path.exists())
        if not os.access(above, os.W_OK):
            raise UserError(f"run.out: {folder} cannot be written: {above} is not yours to write in") from None
        return
    except NotADirectoryError:
        raise UserError(f"run.out: {folder} cannot be written: it is a file, or below one; name a folder") from None
    except OSError as error:
        raise not_read(f"run.out: {folder} cannot be read", error) from None
    strange = [name for name in names if name not in BESIDE and not name.startswith(".") and not name.endswith(OUTPUT)]
    if strange and not OURS & set(names):
        more = f" and {len(strange) - 1} more" if len(strange) > 1 else ""
        raise UserError(
            f"run.out: {folder} holds other things ({strange[0]!r}{more}) and no run; name a new or an empty folder"
        )


def resumes(config: TrainConfig) -> bool:
    """Whether there is a checkpoint: what a run began with, or is evaluated on, must not keep it from resuming."""
    return bool(list_steps(Path(config.run.out, run_files.CHECKPOINTS)))


def check_init(config: TrainConfig) -> None:
    """Raises UserError where model.init_from points nowhere, or at weights of a model that computes something else with
    the same shapes; a run that resumes needs it no more."""
    source = config.model.init_from
    if not source or resumes(config):
        return
    if not hub.local(source).exists():
        raise UserError(f"model.init_from: no such file or folder: {source}{hub.missing(source)}")
    started = model_of_start(source)
    pairs: dict[str, tuple[Any, Any]] = {}
    if started is None:
        check_norm(config.model.vision, source)
        pairs["text.activation"] = (text_activation(hub.local(source)), config.model.text.activation)
    else:  # of another width no weight fits, which is what their reader says
        before, now = tower_in(started.vision), tower_in(config.model.vision)
        if started.text.width == config.model.text.width:
            pairs["text.activation"] = (started.text.activation, config.model.text.activation)
            pairs["text.heads"] = (started.text.heads, config.model.text.heads)
        if before and now and before.width == now.width:
            pairs["vision.heads"] = (before.heads, now.heads)
            is_other = is_quick(started.vision) != is_quick(config.model.vision)
            if is_other or before.is_clip != now.is_clip:
                pairs["vision.name"] = (started.vision.name, config.model.vision.name)
    for key, (theirs, own) in pairs.items():
        if None not in (theirs, own) and theirs != own:
            raise UserError(
                f"model.{key}: {own}, but the weights of model.init_from={source} were trained with {theirs}; set"
                f" model.{key}={theirs}"
            )


def model_of_start(source: str) -> ModelConfig | None:
    """The model of the run that model.init_from is of; None: it is of none whose settings can be read."""
    path = hub.local(source)
    try:
        return settings.model_of_run(path.parent if path.is_file() else path)
    except UserError:
        return None


def tower_in(vision: VisionConfig) -> Tower | None:
    """The vision tower's shape; None: it cannot be built."""
    try:
        return tower_of(vision)
    except ValueError:
        return None


def is_quick(vision: VisionConfig) -> bool:
    """Whether the tower has OpenAI's activation; in timm a word of the name says it."""
    return "quickgelu" in vision.name


def text_activation(path: Path) -> str | None:
    """quick_gelu | gelu: of another library's text tower; None where its folder says neither."""
    from amclip_ds.evaluate import export_folder  # it loads torch

    folder = path.parent if path.is_file() else path
    try:
        if (folder / "open_clip_config.json").is_file():
            return "quick_gelu" if export_folder.read_open_clip(folder).model.get("quick_gelu") else "gelu"
        said = export_folder.read_hugging_face(folder).text.get("hidden_act", "quick_gelu")
    except UserError:
        return None
    return said if said in ("quick_gelu", "gelu") else None


def check_norm(vision: VisionConfig, source: str) -> None:
    """Raises UserError for weights of another library's tower with a norm before its blocks, where ours has none, or
    the other way round: all other weights have the same names and shapes."""
    from amclip_ds.model import pretrained  # it loads torch

    held, tower = set(pretrained.open_source(source).names()), tower_in(vision)
    has_norm = "vision.norm_pre.weight" in held
    if "vision.cls_token" not in held or tower is None or has_norm == tower.is_clip:
        return
    own, theirs = ("no norm", "one") if has_norm else ("a norm", "none")
    raise UserError(
        f"model.vision.name: {vision.name} has {own} before its blocks (norm_pre), but the weights of"
        f" model.init_from={source} have {theirs}; set model.vision.name to a tower with {theirs}, such as"
        f" vit_base_patch16_{'clip_' if has_norm else ''}224"
    )


def about_unread(config: TrainConfig) -> list[str]:
    """What to say, a line each, of masks' and objectives' settings that nothing of the run reads: it trains as if they
    had not been given. No refusal: what compares recipes gives the same words to all."""
    own = config.data.view_masks()
    masks = masks_of_views(config.mask, own)
    in_use = {mask.strategy for mask in masks} - {NONE}
    takes_ratio = any(mask.strategy != NONE and view.keep_ratio is None for mask, view in zip(masks, own))
    lines = []
    if config.mask.keep_ratio < 1 and not takes_ratio:
        why = "each masked view has its own" if in_use else "no view has a mask (mask.strategy)"
        lines.append(f"mask.keep_ratio: warning: {config.mask.keep_ratio:g} is not read: {why}")
    unread = {f"mask.{name}": getattr(config.mask, name, None) for name in MASKS if name not in in_use}
    unread |= {f"loss.{name}": held for name, held in vars(config.loss).items() if getattr(held, "weight", 1) == 0}
    for section, options in unread.items():
        defaults = {} if options is None else vars(type(options)())
        if given := [f"{section}.{key}" for key, default in defaults.items() if getattr(options, key) != default]:
            is_loss = section.startswith("loss.")
            off = f"{section}.weight is 0" if is_loss else f"{section} is no strategy of this run's"
            lines.append(f"{', '.join(given)}: warning: not read: {off}")
    text = config.data.text_mask
    if text.strategy == NONE and text != TextMaskConfig():
        lines.append("data.text_mask: warning: not read: data.text_mask.strategy is none")
    return lines


def about_pooling(config: TrainConfig) -> list[str]:
    """What to say, in a line or none, of a start from a run that pools otherwise: its feature of an image was another
    one. No refusal: a second stage may be meant to change it."""
    own, source = config.model.vision.pool, config.model.init_from
    started = model_of_start(source) if source else None
    if started is None or started.vision.pool == own:
        return []
    theirs = started.vision.pool
    return [
        f"model.init_from: warning: model.vision.pool is {own}, {source} was trained with {theirs}: images have other"
        f" features than there until this run has learned them; model.vision.pool={theirs} keeps them"
    ]
