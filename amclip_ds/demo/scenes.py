"""How much of a scene's one captioned object do the masks keep? The cheap, early test of an attentive teacher.

Held-out synthetic scenes go through the training path itself (crops, boxes, teacher scores, selection). Their json says
where the object is. Random removal keeps keep_ratio of it.
"""

import dataclasses
import json
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from amclip_ds import config as settings
from amclip_ds import run_files, safetensors_header
from amclip_ds.comm import SingleProcess
from amclip_ds.compat import COMPAT
from amclip_ds.config import TrainConfig
from amclip_ds.data.batch import Batch
from amclip_ds.data.loader import TrainingData
from amclip_ds.data.photometric import normalise
from amclip_ds.evaluate.datasets import open_set
from amclip_ds.evaluate.encoder import TowerEncoder, encode_images
from amclip_ds.evaluate.zero_shot import build_classifier
from amclip_ds.masks import MaskConfig, masks_of_views
from amclip_ds.masks.selection import select
from amclip_ds.masks.units import num_units
from amclip_ds.method import method_of
from amclip_ds.model.amclip import AClip
from amclip_ds.model.names import present_name
from amclip_ds.model.teacher_model import TeacherModel
from amclip_ds.objectives import builder
from amclip_ds.pictures.mask_statistics import patches_inside
from amclip_ds.shards.index import Index
from amclip_ds.shards.reader import ShardReader
from amclip_ds.step import selection


@dataclass
class MaskedScenes:
    """Scenes as a training step sees them. Shapes: V views, B scenes, N patches of a view, K kept."""

    views_uint8: Tensor
    """[V, B, 3, H, H]"""
    teacher_uint8: Tensor
    """[B, 3, h, h]"""
    scores: Tensor
    """[B, n]: the teacher's score of each patch of its own crop"""
    kept: dict[str, list[Tensor]]
    """attentive, random -> by view [B, K] tokens that stay"""
    is_object: Tensor
    """[V, B, N] bool: the patch's centre is in the object's box"""
    captions: list[str]

    def object_kept(self, strategy: str) -> float:
        """The mean share of an object's tokens that stay, over the views that show any of it."""
        stays = torch.stack(
            [
                torch.zeros_like(inside).scatter_(-1, kept, True)
                for inside, kept in zip(self.is_object, self.kept[strategy])
            ]
        )
        seen = self.is_object.sum(-1)
        share = (stays & self.is_object).sum(-1)[seen > 0] / seen[seen > 0]
        return float(share.mean())


@torch.no_grad()
def mask_scenes(config: TrainConfig, teacher: TeacherModel, shards: Path, num_scenes: int) -> MaskedScenes:
    """The first scenes of the training order over `shards`, seen by the teacher."""
    vision = config.model.vision
    masks = masks_of_views(config.mask, config.data.view_masks())
    with closing(
        TrainingData(
            dataclasses.replace(config.data, train=str(shards), index=None, workers=0, captions=["json:captions"]),
            seed=config.run.seed,
            global_batch=num_scenes,
            rank=0,
            world_size=1,
            image_size=vision.image_size,
            teacher_size=config.teacher.image_size(vision.image_size),
            num_units=max(num_units(vision.grid, mask.unit) for mask in masks),
            teacher_contains=COMPAT[config.compat].teacher_sees_views,
            context_length=config.model.text.context_length,
            index_dir=config.run.out,
        )
    ) as data:
        batch = next(data.batches(None))
        facts = read_facts(data.index, batch.sample_ids.tolist())
    assert batch.teacher_uint8 is not None
    images = normalise(batch.teacher_uint8)
    scores = teacher.observe(images, frozenset({"cls", "scores"}), SingleProcess()).scores
    assert scores is not None
    kept = {
        name: [
            kept_by(dataclasses.replace(mask, strategy=name), view, batch, scores, vision.grid)
            for view, mask in enumerate(masks)
        ]
        for name in ("attentive", "random")
    }
    boxes = torch.tensor([fact["box"] for fact in facts], dtype=torch.float32)
    return MaskedScenes(
        batch.views_uint8,
        batch.teacher_uint8,
        scores,
        kept,
        patches_inside(boxes, batch.boxes[:-1], vision.grid, batch.flips),
        [fact["captions"][0] for fact in facts],
    )


def kept_by(mask: MaskConfig, view: int, batch: Batch, scores: Tensor, grid: int) -> Tensor:
    """The tokens that a mask keeps of a view at the end of a run, [B, K]."""
    now = mask.at(1.0)
    kept = select(now, selection(now, (view,), batch, scores, grid, progress=1.0).inputs)
    assert kept is not None
    return kept


def read_facts(index: Index, sample_ids: list[int]) -> list[dict]:
    """The json members of samples."""
    with closing(ShardReader()) as reader:
        found = []
        for sample_id in sample_ids:
            sample = index.sample(sample_id)
            assert sample.json is not None
            found.append(json.loads(reader.read_many(sample.shard, [sample.json])[0]))
        return found


def part_accuracies(encoder: TowerEncoder, folder: Path) -> tuple[float, float]:
    """(colour, shape): how often the class chosen among all (`a COLOUR SHAPE`) has the right one."""
    data, comm = open_set(str(folder)), SingleProcess()
    classifier = build_classifier(encoder, data.classnames, data.templates, 128, comm)
    chosen = (encode_images(encoder, data.samples, 128, comm) @ classifier.T).argmax(-1)
    parts = [name.split()[-2:] for name in data.classnames]
    pairs = [(parts[int(label)], parts[sample.label]) for label, sample in zip(chosen, data.samples)]
    colour, shape = (sum(ours[part] == theirs[part] for ours, theirs in pairs) / len(pairs) for part in (0, 1))
    return colour, shape


def load_modules(run: Path) -> tuple[TrainConfig, AClip, TeacherModel]:
    """The settings, student and teacher that a finished run left in its folder."""
    config = settings.load(str(run / run_files.CONFIG))
    built = builder(method_of(config).objectives)
    student, teacher = AClip(config.model, built), TeacherModel(config.model, built)
    for name, module in (("student", student), ("teacher", teacher)):
        safetensors_header.read(run / f"{name}.safetensors")
        held = load_file(run / f"{name}.safetensors")
        module.load_state_dict({present_name(key): tensor for key, tensor in held.items()})
        module.eval()
    return config, student, teacher
