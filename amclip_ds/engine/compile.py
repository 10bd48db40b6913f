"""torch.compile of the towers, whole or block by block: what engine.compile asks for, and what to do where it fails.

The same compiles what is between two collectives of the heads and the losses: hundreds of small kernels, for which
a GPU would wait for the host. A module names what may be compiled of it (`compiled_parts`: methods that compute and
exchange nothing).

Shapes are fixed (dynamic=False): a view has one, texts have a few lengths (model/text_groups.py), so that what is
compiled depends on no timing. On a CPU neither does any digit. On a GPU the compiler times a few block sizes of some
sums, once, and keeps its choice beside the run; with run.deterministic=true it takes theirs by a rule.
Where the compiler does not work the towers run as they are, and one line says so: a run must not end for want of a
compiler on one machine. Whether it works at all the ranks find out together.
"""

import contextlib
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from amclip_ds.data import photometric
from amclip_ds.engine.ds_config import BLOCK, NO_COMPILE
from amclip_ds.engine.zero3 import blocks_of
from amclip_ds.errors import in_one_line
from amclip_ds.ranks.collectives import gather_objects

BACKEND = "inductor"
FALLEN_BACK: list[str] = []
"""What began to run uncompiled in this process, and why: the run takes it from here into incidents.jsonl."""
MOST_GRAPHS = 256  # of one function: lengths of texts x (all, a group) x (training, evaluation); torch would stop at 8


def compile_towers(model: nn.Module, mode: str) -> str | None:
    """Compiles the towers of a student or teacher in place; returns why not, or None. Names of parameters stay.

    Collective, unless mode is none: every rank must call.
    """
    if mode == NO_COMPILE:
        return None
    problem = _why_not()
    problem = next((theirs for theirs in gather_objects(problem) if theirs), None)
    if problem:
        warnings.warn(f"engine.compile: {problem}; the towers run uncompiled", stacklevel=2)
        return problem
    _quiet_deepspeed()
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, MOST_GRAPHS)
    compile_backward_with_forward()
    model.text.fixed_shapes = True  # type: ignore[union-attr,assignment]
    if mode == BLOCK:  # without ZeRO-3's hooks, which are on the block's call
        for block in blocks_of(model):
            block.forward = Compiled(block.forward, f"a {type(block).__name__}")
        return None
    for module in model.modules():
        for part in getattr(module, "compiled_parts", ()):
            setattr(module, part, Compiled(getattr(module, part), f"{type(module).__name__}.{part}"))
    return None


def compile_changes(mode: str, device: torch.device) -> Callable[[Tensor, photometric.Photometric], Tensor]:
    """What changes the views: photometric.apply, or where a GPU's towers are compiled the same in few kernels."""
    if mode == NO_COMPILE or device.type != "cuda":
        return photometric.apply
    change_all = Compiled(photometric.change_all, "the photometric changes")

    def apply(views_uint8: Tensor, changes: photometric.Photometric) -> Tensor:
        if change_all.failed:
            return photometric.apply(views_uint8, changes)
        return photometric.apply_compiled(change_all, views_uint8, changes)

    return apply


def compile_function(mode: str, plain: Callable[..., Any]) -> Callable[..., Any]:
    """A function that exchanges nothing, compiled where the towers are."""
    return plain if mode == NO_COMPILE else Compiled(plain, plain.__name__)


@contextlib.contextmanager
def reported(begins: Callable[[], None], ends: Callable[[], None]) -> Iterator[None]:
    """Inside, what this process compiles is reported when it begins and when it ends, a part within another with it.

    Later steps compile too: a stage of a schedule keeps other numbers of tokens, texts have lengths not met before.
    """
    from torch._dynamo import callback_handler

    def begin(about: Any) -> None:
        begins()

    def end(about: Any) -> None:
        ends()

    callback_handler.register_start_callback(begin)
    callback_handler.register_end_callback(end)
    try:
        yield
    finally:
        callback_handler.remove_start_callback(begin)
        callback_handler.remove_end_callback(end)


class Compiled:
    """A function compiled whole, for each shape it meets; or, from its first failure on, as it was.

    Shapes beyond what torch keeps of one function's graphs run as it was too; those that have a graph keep it.
    """

    def __init__(self, plain: Callable[..., Any], name: str) -> None:
        self._plain, self._name = plain, name
        self._call = torch.compile(plain, fullgraph=True, dynamic=False, backend=BACKEND)
        self.failed: str | None = None
        self._is_full = False

    def __call__(self, *inputs: Any, **named: Any) -> Any:
        if self.failed is None:
            try:
                if self._is_full:
                    with torch.compiler.set_stance("eager_on_recompile"):
                        return self._call(*inputs, **named)
                return self._call(*inputs, **named)
            except torch._dynamo.exc.FailOnRecompileLimitHit:
                self._is_full = True
                warnings.warn(
                    f"engine.compile: {self._name} has as many graphs as torch keeps of one function"
                    f" ({torch._dynamo.config.recompile_limit}); further shapes run uncompiled",
                    stacklevel=2,
                )
            except torch._dynamo.exc.TorchDynamoException as error:
                self.failed = f"{type(error).__name__}: {in_one_line(error, 150)}"
                FALLEN_BACK.append(f"{self._name} runs uncompiled ({self.failed})")
                warnings.warn(f"engine.compile: {FALLEN_BACK[-1]}", stacklevel=2)
        return self._plain(*inputs, **named)


def compile_backward_with_forward() -> None:
    """A backward is compiled in the call of its forward, where `Compiled` can do without it; torch would do so in the
    first backward pass, and what fails there ends the run."""
    import torch._functorch.config as functorch

    functorch.force_non_lazy_backward_lowering = True


def _quiet_deepspeed() -> None:
    """DeepSpeed marks each of its calls for a profiler, which torch.compile would have to break its graphs for."""
    import deepspeed.utils.nvtx

    deepspeed.utils.nvtx.enable_nvtx = False


def _why_not() -> str | None:
    """What keeps torch.compile from working here, found by compiling something small, forward and backward."""
    try:
        device = "cuda" if torch.cuda.is_available() else "cpu"  # each has a toolchain of its own
        x = torch.ones(8, requires_grad=True, device=device)
        torch.compile(_probe, backend=BACKEND, dynamic=False)(x).sum().backward()
    except Exception as error:  # the compiler's toolchain may raise anything
        reason = f"{type(error).__name__}: {in_one_line(error, 150)}"
        return f"torch.compile does not work on this machine ({reason})"
    return None


def _probe(x: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.gelu(x) + 1
