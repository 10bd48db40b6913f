"""The EMA teacher: fp32 shards aligned with the student's masters, averaged without communication, then published."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from amclip_ds.comm import Comm
from amclip_ds.engine import shards
from amclip_ds.engine.shards import Shard
from amclip_ds.engine.student import StudentEngine
from amclip_ds.engine.teacher_copies import place_teacher
from amclip_ds.model.config import ModelConfig, TeacherConfig
from amclip_ds.model.init import persistent_buffers
from amclip_ds.model.teacher_model import OBSERVING, Observed, TeacherModel, mirrored_names
from amclip_ds.objectives import Chosen


class Teacher:
    """The average of the student's fp32 masters, and the copy of it that encodes images.

    Names the student trains are averaged; frozen ones were copied once, by the common start; without averages_text_ends
    some text parameters stay at the student's current values (as in A-CLIP's published code; mirrored_names).
    """

    def __init__(
        self,
        config: TeacherConfig,
        model: ModelConfig,
        objectives: Chosen,
        *,
        averages_text_ends: bool = True,
        student: StudentEngine,
        device: torch.device,
    ) -> None:
        self.placed = place_teacher(config.placement, model, objectives, student, device)
        self._student = student
        self._masters: dict[str, Shard] | None = None
        self._is_whole = True  # student and teacher start alike
        names = {name for name, _ in self.placed.module.named_parameters()}
        mirrored = mirrored_names(names, averages_text_ends)
        self._averaged = [name for name in self.masters() if name in names and name not in mirrored]
        self._mirrored = [name for name in self.masters() if name in mirrored]
        masters = self.masters()
        self._ema = {
            name: Shard(
                masters[name].tensor.detach().clone(), masters[name].start, masters[name].length, masters[name].numel
            )
            for name in self._averaged
        }

    def masters(self) -> dict[str, Shard]:
        """This rank's shards of the student's fp32 masters.

        Found once, unless the host holds them: DeepSpeed's flat masters never move, and at stage 3 it waits for its
        communication at each of the hundreds of questions.
        """
        if self._masters is None or self._student.in_host_memory:
            self._masters = shards.master_shards(self._student.engine)
        return self._masters

    @torch.no_grad()
    def update(self, momentum: float) -> None:
        """ema <- momentum x ema + (1 - momentum) x master, on this rank's shards: no communication."""
        masters = self.masters()
        if self._ema:  # one call for all: on a GPU, hundreds of small ones would cost more than their work
            averages = [shard.tensor for shard in self._ema.values()]
            torch._foreach_lerp_(averages, [masters[name].tensor for name in self._ema], 1.0 - momentum)

    def publish(self, whole: bool = True) -> None:
        """Brings the weights of the teacher's forward up to date. Collective: every rank must call.

        whole False: only what a training step reads (vision tower and copies of heads); its texts
        are read by evaluations alone, and sending the text tower after every step would double the traffic.
        """
        masters = self.masters()
        published = self._ema | {name: masters[name] for name in self._mirrored}
        self._is_whole = whole
        if not whole:
            published = {name: shard for name, shard in published.items() if name.startswith(OBSERVING)}
        self.placed.publish(published, whole)

    @torch.no_grad()
    def observe(self, images: Tensor, wants: frozenset[str], comm: Comm, progress: float = 1.0) -> Observed:
        """TeacherModel.observe, without gradient. Collective: every rank must call."""
        with torch.inference_mode(self._student.savings.teacher_inference and not self.placed.is_sharded):
            seen = self.placed(TeacherModel.observe, images, wants, comm, progress)
        targets = {name: tuple(copied(target) for target in targets) for name, targets in seen.targets.items()}
        return seen._replace(targets=targets)  # autograd saves no tensor of the inference mode

    @torch.no_grad()
    def attention(self, images: Tensor) -> Tensor:
        """TeacherModel.attention. Collective: every rank must call."""
        return self.placed(TeacherModel.attention, images)

    @torch.no_grad()
    def embed_images(self, images: Tensor) -> Tensor:
        """TeacherModel.embed_images. Collective: every rank must call."""
        return self._whole(TeacherModel.embed_images, images)

    @torch.no_grad()
    def embed_texts(self, token_ids: Tensor) -> Tensor:
        """TeacherModel.embed_texts. Collective: every rank must call."""
        return self._whole(TeacherModel.embed_texts, token_ids)

    def _whole(self, method: Callable[..., Any], *inputs: Any) -> Any:
        assert self._is_whole, f"{method.__name__} reads weights that publish(whole=False) left behind"
        return self.placed(method, *inputs)

    def ema_shards(self) -> dict[str, Shard]:
        """This rank's fp32 shards of the average, by name; writing to them changes the teacher at the next publish."""
        return self._ema

    def frozen_shards(self) -> dict[str, Shard]:
        """This rank's part of the parameters that the student does not train, in the dtype of the forward."""
        trained = {name for name, parameter in self._student.module.named_parameters() if parameter.requires_grad}
        named = self.placed.module.named_parameters()
        return shards.forward_shards({name: parameter for name, parameter in named if name not in trained})

    def buffers(self) -> dict[str, Tensor]:
        """The teacher's own batch norm statistics, the same on every rank."""
        return persistent_buffers(self.placed.module)

    def full_state(self) -> dict[str, Tensor]:
        """The whole teacher in fp32 on the CPU of rank 0; empty elsewhere. Collective: every rank must call."""
        masters = self.masters()
        held = self._ema | {name: masters[name] for name in self._mirrored}
        return shards.gather_state(self.placed.module, held)


def copied(target: Tensor) -> Tensor:
    """A copy; what is one thing for all samples (an expanded tensor) stays one."""
    if target.dim() and target.shape[0] > 1 and target.stride(0) == 0:
        return target[:1].clone().expand_as(target)
    return target.clone()
