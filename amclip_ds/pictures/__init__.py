"""What the masks keep of the same few training images during a run: RUN/pictures, TensorBoard, the report.

    pictures = Pictures(...)                # once; the images are the first of epoch 0, on any world
    pictures.after_step(step, progress)     # in the loop; collective

samples.json names the images and their captions; masks.jsonl has a row a time: which tokens stay of each view, how much
the teacher attends to each patch of its crop; masks.png is the newest of them for people. No number of the run changes.
Shapes: V views, B images, N patches of a view, n of the teacher's crop, K kept.
"""

import io
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from amclip_ds import run_files
from amclip_ds.checkpoint import CheckpointConfig
from amclip_ds.data import photometric
from amclip_ds.data.batch import Batch
from amclip_ds.data.captions import build_tokenizer
from amclip_ds.data.loader import TrainingData
from amclip_ds.engine.student import StudentEngine
from amclip_ds.engine.teacher import Teacher
from amclip_ds.errors import AmclipError, in_one_line
from amclip_ds.files import removed_on_error, write_atomically
from amclip_ds.masks import NONE
from amclip_ds.masks.selection import choose
from amclip_ds.method import Method
from amclip_ds.model.amclip import by_view
from amclip_ds.model.features import StudentInputs, ViewGroup
from amclip_ds.pictures.mask_statistics import object_boxes, object_share
from amclip_ds.ranks.collectives import on_main
from amclip_ds.record import LogConfig, Record
from amclip_ds.step import student_inputs, teachers_images

IMAGES = 8
WITH_SAVES = 200  # pictures of a run, at most, that saves bring along: each takes as long as a step of a tiny model
SIDE = 112  # pixels of a stored image
HEAD, FOOT, GAP, MARGIN = 22, 20, 6, 8
INK, PAPER, BLUE = (20, 22, 26), (255, 255, 255), (0, 114, 178)
REMOVED_BRIGHTNESS = 0.18  # how bright a removed patch is left


class Shot(NamedTuple):
    """What was seen at one step."""

    kept: list[Tensor | None]
    """by view [B, K]; None: every token stays"""
    scores: Tensor | None
    """[B, n]"""


class Pictures:
    """A run's pictures. Making it is collective: every rank must call. Nothing that fails here ends the run."""

    def __init__(
        self,
        log: LogConfig,
        checkpoint: CheckpointConfig,
        method: Method,
        data: TrainingData,
        record: Record,
        device: torch.device,
        total_steps: int,
    ) -> None:
        self._method, self._record, self._total = method, record, total_steps
        self._steps = steps_between(log.pictures_every_steps, checkpoint.every_steps or 0, total_steps)
        self._batch: Batch | None = None
        self._objects: Tensor | None = None
        if not log.pictures_every_steps or all(mask.strategy == NONE for mask in method.masks):
            return
        try:
            batch, self._objects = on_main(partial(first_samples, data))
            self._batch = batch.to(device)
            if record.is_main:
                store_samples(record.folder / run_files.PICTURES, self._batch, method)
        except (AmclipError, OSError) as error:
            self._failed(error)

    def is_due(self, step: int) -> bool:
        """At the first step and the last, every log.pictures_every_steps, and with checkpoints by steps."""
        return step in (1, self._total) or any(step % every == 0 for every in self._steps)

    def after_step(self, step: int, progress: float, student: StudentEngine, teacher: Teacher | None) -> None:
        """Applies the masks and stores what they keep, where it is due. Collective: every rank must call."""
        if self._batch is None or not self.is_due(step):
            return
        shot = observe(self._batch, self._method, student, teacher, progress)
        if self._record.is_main:
            try:
                self._store(step, shot)
            except OSError as error:
                self._failed(error)

    def _store(self, step: int, shot: Shot) -> None:
        assert self._batch is not None
        picture = draw(self._batch, shot, self._method, captions_of(self._batch))
        self._record.masks(self._row(step, shot), encoded(picture, "JPEG"), *picture.size)
        partial = self._record.folder / run_files.PICTURES / ".masks.png.partial"
        with removed_on_error(partial):
            partial.write_bytes(encoded(picture))
            partial.replace(self._record.folder / run_files.PICTURES / "masks.png")

    def _row(self, step: int, shot: Shot) -> dict[str, Any]:
        assert self._batch is not None
        views, flips = self._batch.boxes[:-1].cpu(), self._batch.flips
        share = object_share(shot.kept, self._objects, views, self._method.grid, None if flips is None else flips.cpu())
        row = row_of(step, shot, self._method.grid)
        return row if share is None else row | {"object_share": round(share, 4)}

    def _failed(self, error: Exception) -> None:
        cause = f"pictures of the masks: {in_one_line(error, 300)}"
        if self._record.is_main:
            self._record.incident("pictures", cause, action="training continues")


def steps_between(asked: int, of_saves: int, total: int) -> list[int]:
    """How many steps lie between pictures: as asked, and between the saves that have one. 0: of neither kind."""
    thinned = of_saves * max(1, -(-total // (of_saves * WITH_SAVES))) if of_saves else 0
    return [every for every in (asked, thinned) if every]


def first_samples(data: TrainingData) -> tuple[Batch, Tensor | None]:
    """The samples of the pictures, and where their objects are, if the data say it. Raises UserError."""
    batch = data.first(IMAGES)
    return batch, object_boxes(data.index, batch.sample_ids.tolist())


@torch.no_grad()
def observe(batch: Batch, method: Method, student: StudentEngine, teacher: Teacher | None, progress: float) -> Shot:
    """What stays of each view now. Collective: every rank must call."""
    scores = None
    views = photometric.apply(batch.views_uint8, batch.photometric)
    with torch.compiler.set_stance("force_eager"):  # a tower's graph for so few images takes longer than they do
        if teacher is not None and "scores" in method.wants:
            scores = teacher.attention(teachers_images(batch, views, method))
        inputs = student_inputs(batch, views, scores, method, progress)
        kept = by_view(inputs.groups, chosen(inputs, student.choose))
    on_cpu = [None if rows is None else rows.cpu() for rows in kept]
    return Shot(on_cpu, None if scores is None else of_one_picture(scores).float().cpu())


def of_one_picture(scores: Tensor) -> Tensor:
    """The scores [B, n] that are drawn: of the views themselves, [V, B, N], the first one's."""
    return scores[0] if scores.dim() == 3 else scores


def teachers_picture(batch: Batch, method: Method) -> Tensor:
    """What the teacher looks at, [B, 3, h, w] uint8; where it sees all views, the first one."""
    return batch.views_uint8[method.teacher_view or 0] if batch.teacher_uint8 is None else batch.teacher_uint8


def chosen(inputs: StudentInputs, through_tower: Callable[[ViewGroup], Tensor | None]) -> list[Tensor | None]:
    """By group of views: the tokens that stay, [v * B, K]; None: all. through_tower is asked where a mask reads
    patch embeddings, on every rank alike."""
    found: list[Tensor | None] = []
    for group in inputs.groups:
        if any("patches" in selection.needs for selection in group.selections):
            found.append(through_tower(group))
        elif group.selections:
            found.append(choose(group.selections, len(group.views), None, group.images.flatten(0, 1)))
        else:
            found.append(None)
    return found


def captions_of(batch: Batch) -> list[str]:
    """The captions as the text tower reads them."""
    return [build_tokenizer().text_of(row) for row in batch.token_ids.tolist()]


def store_samples(folder: Path, batch: Batch, method: Method) -> None:
    """samples.json, and each image of it as a small WebP. Raises OSError."""
    folder.mkdir(exist_ok=True)
    views, samples = len(batch.views_uint8), []
    for place, caption in enumerate(captions_of(batch)):
        images = [f"sample{place}_view{view}.webp" for view in range(views)]
        for view, name in enumerate(images):
            thumbnail(batch.views_uint8[view, place]).save(folder / name, quality=80)
        teacher = None
        if batch.teacher_uint8 is not None:
            teacher = f"sample{place}_teacher.webp"
            thumbnail(batch.teacher_uint8[place]).save(folder / teacher, quality=80)
        samples.append({"id": int(batch.sample_ids[place]), "caption": caption, "views": images, "teacher": teacher})
    masks = [{"strategy": mask.strategy, "keep_ratio": mask.keep_ratio, "unit": mask.unit} for mask in method.masks]
    text = json.dumps({"grid": method.grid, "masks": masks, "samples": samples}, indent=1, ensure_ascii=False)
    write_atomically(folder / "samples.json", text + "\n")


def row_of(step: int, shot: Shot, grid: int) -> dict[str, Any]:
    """A row of masks.jsonl. kept: by view and image, a bit a patch in hexadecimal, the first patch the highest bit
    (null: all stay). scores: by image, two digits a patch, the least attended of the image 00, the most ff. Where the
    data have boxes, object_share beside them: how much of the objects' patches stays."""
    kept = [None if rows is None else [bits(row, grid * grid) for row in rows.tolist()] for rows in shot.kept]
    scores = None if shot.scores is None else [shares(row).hex() for row in shot.scores]
    return {"step": step, "kept": kept, "scores": scores}


def bits(kept: list[int], patches: int) -> str:
    """Which of the patches stay, in hexadecimal, filled up with zeros at the end."""
    width = -(-patches // 4)
    return f"{sum(1 << (4 * width - 1 - patch) for patch in kept):0{width}x}"


def shares(scores: Tensor) -> bytes:
    """[N] -> N bytes: 0 for the least attended patch, 255 for the most."""
    low, high = scores.min(), scores.max()
    return bytes(((scores - low) / (high - low).clamp(min=1e-12) * 255).round().to(torch.uint8).tolist())


def draw(batch: Batch, shot: Shot, method: Method, captions: list[str]) -> Image.Image:
    """A row an image: the teacher's crop and its scores, then each view with what is removed darkened; a legend."""
    columns: list[tuple[str, list[Image.Image]]] = []
    if shot.scores is not None:
        columns.append(("teacher's crop", [thumbnail(image) for image in teachers_picture(batch, method)]))
        columns.append(("its attention", [heat(row) for row in shot.scores]))
    for view, (rows, mask) in enumerate(zip(shot.kept, method.masks)):
        pictures = [
            thumbnail(image if rows is None else darkened(image, rows[place], method.grid))
            for place, image in enumerate(batch.views_uint8[view])
        ]
        columns.append((f"view {view + 1}: {mask.strategy}", pictures))
    return sheet(columns, captions, has_scores=shot.scores is not None)


def sheet(
    columns: list[tuple[str, list[Image.Image]]], captions: list[str], has_scores: bool, has_boxes: bool = False
) -> Image.Image:
    """Columns of pictures under their names, a caption under each row, and what the shades mean."""
    font = ImageFont.load_default(12)
    cell = SIDE + GAP
    width = max(2 * MARGIN + len(columns) * cell, 420)
    height = 2 * MARGIN + HEAD + len(captions) * (SIDE + FOOT) + 2 * HEAD
    page = Image.new("RGB", (width, height), PAPER)
    pen = ImageDraw.Draw(page)
    for place, (name, pictures) in enumerate(columns):
        pen.text((MARGIN + place * cell, MARGIN), fitting(pen, name, cell - 2, font), INK, font)
        for row, picture in enumerate(pictures):
            page.paste(picture, (MARGIN + place * cell, MARGIN + HEAD + row * (SIDE + FOOT)))
    for row, caption in enumerate(captions):
        at = (MARGIN, MARGIN + HEAD + row * (SIDE + FOOT) + SIDE + 2)
        pen.text(at, fitting(pen, caption, width - 2 * MARGIN, font), INK, font)
    under = height - MARGIN - 2 * HEAD + 6
    outline = "; outlined: the object; 1, 2: the views" if has_boxes else ""
    pen.text((MARGIN, under), f"dark: removed before the blocks; bright: kept{outline}", INK, font)
    if has_scores:
        left = MARGIN + int(pen.textlength("attention: least ", font))
        pen.text((MARGIN, under + HEAD), "attention: least", INK, font)
        for x in range(90):
            pen.line([(left + x, under + HEAD + 2), (left + x, under + HEAD + 12)], shade(x / 89))
        pen.text((left + 96, under + HEAD), "most, of the patches of one crop", INK, font)
    return page


def fitting(pen: ImageDraw.ImageDraw, text: str, width: float, font: Any) -> str:
    """The text, or as much of it as there is room for; letters that the font has not are left to it."""
    text = text.encode("latin-1", "replace").decode("latin-1")
    while text and pen.textlength(text, font) > width:
        text = text[: -2 if len(text) < 40 else -len(text) // 8].rstrip(".") + "."
    return text


def thumbnail(image_uint8: Tensor) -> Image.Image:
    """[3, H, H] -> a picture of SIDE pixels."""
    picture = Image.fromarray(image_uint8.permute(1, 2, 0).cpu().numpy())
    return picture.resize((SIDE, SIDE), Image.Resampling.BILINEAR)


def darkened(image_uint8: Tensor, kept_K: Tensor, grid: int) -> Tensor:
    """[3, H, H] with the patches that are not kept darkened, on the CPU."""
    bright = torch.full((grid * grid,), REMOVED_BRIGHTNESS).scatter_(0, kept_K.cpu(), 1.0).reshape(1, 1, grid, grid)
    side = image_uint8.shape[-1]
    cells = torch.nn.functional.interpolate(bright, size=(side, side), mode="nearest")[0]
    return (image_uint8.cpu() * cells).to(torch.uint8)


def outlined(picture: Image.Image, is_object_N: Tensor, grid: int) -> Image.Image:
    """The picture with a line around the patches [N] of an object; as it is where there are none."""
    places = is_object_N.reshape(grid, grid).nonzero()
    if len(places):
        (top, left), (bottom, right) = places.min(0).values.tolist(), places.max(0).values.tolist()
        cell = SIDE / grid
        edges = (left * cell, top * cell, (right + 1) * cell - 1, (bottom + 1) * cell - 1)
        pen = ImageDraw.Draw(picture)
        pen.rectangle(edges, outline=INK, width=3)
        pen.rectangle([edges[0] + 1, edges[1] + 1, edges[2] - 1, edges[3] - 1], outline=PAPER, width=1)
    return picture


def heat(scores_N: Tensor) -> Image.Image:
    """[N] as a square of shades, white the least and blue the most."""
    side = round(len(scores_N) ** 0.5)
    picture = Image.new("RGB", (side, side))
    picture.putdata([shade(value / 255) for value in shares(scores_N)])
    return picture.resize((SIDE, SIDE), Image.Resampling.NEAREST)


def shade(share: float) -> tuple[int, int, int]:
    """Between white and blue: read alike by all eyes, and in grey."""
    return tuple(round(255 + (colour - 255) * share) for colour in BLUE)  # type: ignore[return-value]


def encoded(picture: Image.Image, format: str = "PNG") -> bytes:
    """The picture as a file's content."""
    held = io.BytesIO()
    picture.save(held, format=format, quality=85)
    return held.getvalue()
