"""Are two checkouts' numbers equal, bit for bit? Trains small runs through the product itself and compares everything.

    python benchmarks/record_numbers.py record CHECKOUT numbers.json [--full] [--only aclip]
    python benchmarks/record_numbers.py compare A B        each a file that `record` wrote, or a checkout
    python benchmarks/record_numbers.py goes-on A B        checkouts: does B resume from A's checkpoint of step 10 as A?

A cell is a method x ZeRO stage x precision x ranks x GradCache splits: 20 steps of METHOD-tiny on synthetic scenes, or
on photographs. Recorded are each step's loss and terms, gradient norm and kept tokens (exact, as hexadecimal floats),
a hash of all keep_indices, and a hash of every tensor of the last checkpoint: masters, moments, EMA, statistics.
Savings (engine.savings) and flat gradients are off. Without --full the cells are few and span the factors. The ranks
are forked from one process, which imports once.
"""

import argparse
import contextlib
import hashlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve()
METHODS = ("aclip", "aclip-eff", "clip", "flip", "random2x")
STEPS, HALF, BATCH = 20, 10, 16
EXACT = (
    "loss",
    "loss_contrastive",
    "loss_o2o",
    "loss_o2e",
    "grad_norm",
    "lr",
    "momentum",
    "logit_scale",
    "kept_tokens",
    "step_applied",
    "samples_seen",
    "updates",
)
# What a later checkout calls a tensor -> what it was called before: only the name moved.
EARLIER_NAMES = (
    ("objectives.simclr.head.", "heads.o2o."),
    ("objectives.byol.projector.", "heads.o2e_projector."),
    ("objectives.byol.predictor.", "heads.o2e_predictor."),
)


@dataclass(frozen=True)
class Cell:
    method: str
    stage: int
    precision: str
    ranks: int
    splits: int
    photographs: bool = False

    @property
    def name(self) -> str:
        where = " photographs" if self.photographs else ""
        return f"{self.method} zero{self.stage} {self.precision} ranks {self.ranks} splits {self.splits}{where}"

    def overrides(self, out: Path, shards: str) -> list[str]:
        per_gpu = BATCH // self.ranks // self.splits
        return [
            f"data.train={shards}",
            f"run.out={out}",
            f"run.steps={STEPS}",
            f"batch.global_size={BATCH}",
            f"batch.per_gpu={per_gpu}",
            f"engine.deepspeed=zero{self.stage}_{self.precision}.json",
            "data.workers=0",
            f"data.index={out.parent}/index-{'photographs' if self.photographs else 'scenes'}",
            "log.every_steps=1",
            "log.tensorboard=false",
            "checkpoint.asynchronous=false",
            "optim.warmup_steps=5",
        ]


def cells(full: bool) -> list[Cell]:
    """All 120, or a few that hold every factor's every value, and aclip's crossed ones; one on photographs."""
    photographs = Cell("aclip", 2, "fp32", 2, 1, photographs=True)
    if full:
        every = [
            Cell(method, stage, precision, ranks, splits)
            for method in METHODS
            for stage in (1, 2, 3)
            for precision in ("fp32", "bf16")
            for ranks in (1, 2)
            for splits in (1, 4)
        ]
        return [*every, photographs]
    return [
        Cell("aclip", 1, "fp32", 1, 1),
        Cell("aclip", 2, "fp32", 2, 4),
        Cell("aclip", 3, "bf16", 2, 1),
        Cell("aclip", 3, "fp32", 2, 4),
        Cell("aclip", 1, "bf16", 2, 4),
        Cell("aclip-eff", 2, "bf16", 1, 4),
        Cell("aclip-eff", 3, "fp32", 2, 1),
        Cell("aclip-eff", 1, "fp32", 2, 4),
        Cell("clip", 2, "fp32", 2, 1),
        Cell("clip", 3, "bf16", 1, 4),
        Cell("flip", 1, "bf16", 2, 4),
        Cell("flip", 2, "fp32", 1, 1),
        Cell("random2x", 3, "fp32", 2, 4),
        Cell("random2x", 2, "bf16", 2, 1),
        Cell("random2x", 1, "fp32", 1, 1),
        photographs,
    ]


# --- inside the checkout that is recorded: one server, which forks the ranks of each cell


def serve(requests: list[dict[str, Any]]) -> None:
    """Trains each cell in turn; writes its numbers as one JSON line. After a cell that fails the next one runs."""
    import importlib

    import torch

    import amclip_ds  # noqa: F401  first: it fixes torchvision

    torch.set_num_threads(1)
    for module in ("deepspeed", "timm", "open_clip", "transformers.models.clip.modeling_clip", "amclip_ds.train"):
        importlib.import_module(module)
    for request in requests:
        began = time.monotonic()
        out = Path(request["out"])
        codes = run_ranks(request, out)
        said = out.with_suffix(".0.log").read_text()[-2000:]
        found = read_numbers(out) if not any(codes) else {"failed": f"exit codes {codes}\n{said}"}
        if not request["kept"]:
            shutil.rmtree(out, ignore_errors=True)
        print(
            json.dumps({"cell": request["name"], "seconds": round(time.monotonic() - began, 1), "numbers": found}),
            flush=True,
        )


def run_ranks(request: dict[str, Any], out: Path) -> list[int]:
    with socket.socket() as free:  # no module of ours: it runs on older revisions too
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    pids = []
    for rank in range(request["ranks"]):
        pid = os.fork()
        if not pid:
            world = str(request["ranks"])
            os.environ.update(
                RANK=str(rank),
                LOCAL_RANK=str(rank),
                WORLD_SIZE=world,
                LOCAL_WORLD_SIZE=world,
                MASTER_ADDR="127.0.0.1",
                MASTER_PORT=port,
            )
            os._exit(one_rank(request, out, rank))
        pids.append(pid)
    return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]


def one_rank(request: dict[str, Any], out: Path, rank: int) -> int:
    quiet = os.open(out.with_suffix(f".{rank}.log"), os.O_WRONLY | os.O_CREAT)
    os.dup2(quiet, 1)
    os.dup2(quiet, 2)
    chosen = hashlib.sha256()
    try:
        watch_kept_tokens(chosen)
        from amclip_ds import config
        from amclip_ds.train import train

        code = train(config.load(request["recipe"], request["overrides"]), resume=request["resume"])
        out.joinpath(f"keep-{rank}.txt").write_text(chosen.hexdigest())
        return code
    except BaseException:
        traceback.print_exc()
        return 1


def watch_kept_tokens(chosen: Any) -> None:
    """Every keep_indices by which the student's tokens are removed goes into the hash."""
    modules = [sys.modules.get(f"amclip_ds.{name}") for name in ("model.vision", "masks.selection", "model.masking")]
    holder, name = next(  # a function of today's, a module's forward of older revisions
        (getattr(module, of, module), name)
        for module in modules
        for of, name in (("", "keep_tokens"), ("TokenMask", "forward"))
        if module is not None and hasattr(getattr(module, of, module), name)
    )
    remove = getattr(holder, name)

    def watched(*given: Any) -> Any:
        if given[-1] is not None:
            chosen.update(given[-1].cpu().numpy().tobytes())
        return remove(*given)

    setattr(holder, name, watched)


def read_numbers(out: Path) -> dict[str, Any]:
    """The run's rows, keep_indices and last checkpoint."""
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    [checkpoint] = sorted((out / "checkpoints").glob("step_*"))[-1:]
    return {
        "rows": [{key: exact(row[key]) for key in EXACT} for row in rows],
        "keep": [file.read_text() for file in sorted(out.glob("keep-*.txt"))],
        "state": hashes(checkpoint),
    }


def exact(value: Any) -> Any:
    return value.hex() if isinstance(value, float) else value


def hashes(checkpoint: Path) -> dict[str, str]:
    """`kind name` -> a hash of the whole tensor, put together from the ranks' pieces, under its earliest name."""
    from safetensors import safe_open

    pieces: dict[str, list[tuple[int, bytes]]] = {}
    for file in sorted(checkpoint.rglob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            for key in opened.keys():  # noqa: SIM118  not a dictionary
                kind, name, start = [*key.split("|"), "0"][:3] if "|" in key else ("buffer", key, "0")
                pieces.setdefault(f"{kind} {earlier(name)}", []).append((int(start), raw(opened.get_tensor(key))))
    return {
        name: hashlib.sha256(b"".join(part for _, part in sorted(held))).hexdigest()[:16]
        for name, held in sorted(pieces.items())
    }


def raw(tensor: Any) -> bytes:
    import torch

    return tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def earlier(name: str) -> str:
    for now, before in EARLIER_NAMES:
        name = re.sub(rf"^((student|teacher)\.)?{re.escape(now)}", rf"\g<1>{before}", name)
    return name


# --- outside: which checkout, which data, what differs


def record(
    checkout: Path, wanted: list[Cell], data: Path, folder: Path, resume: Path | None = None, kept: bool = False
) -> dict[str, Any]:
    """Runs the cells in a checkout. data: a folder for the scenes, which must be the same for what is compared.

    folder: where the runs are, one a cell; kept: they stay. resume: such a folder, from whose checkpoints of step HALF
    the cells continue.
    """
    scenes = data / "scenes"
    environment = os.environ | {"PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    if not (scenes / "train").is_dir():
        synth = ["-m", "amclip_ds", "data", "synth", "--out", str(scenes), "--train", "512", "--test", "64"]
        subprocess.run([sys.executable, *synth], env=environment, cwd=checkout, check=True, stdout=subprocess.DEVNULL)
    shared = os.environ.get("AMCLIP_SHARED", str(HERE.parents[2] / "shared"))
    of = {True: f"{shared}/data/openstax/train", False: f"{scenes}/train"}
    requests = []
    for index, cell in enumerate(wanted):
        out = folder / str(index)
        start = "never" if resume is None else str(resume / str(index) / "checkpoints" / f"step_{HALF:08d}")
        overrides = [*cell.overrides(out, of[cell.photographs]), *([f"checkpoint.every_steps={HALF}"] if kept else [])]
        overrides += plain_forward(checkout)
        requests.append(
            {
                "name": cell.name,
                "recipe": f"{cell.method}-tiny",
                "ranks": cell.ranks,
                "resume": start,
                "out": str(out),
                "overrides": overrides,
                "kept": kept,
            }
        )
    todo = folder / "requests.json"
    todo.write_text(json.dumps(requests))
    numbers: dict[str, Any] = {}
    command = [sys.executable, str(HERE), "--serve", str(todo)]
    with subprocess.Popen(command, env=environment, cwd=checkout, stdout=subprocess.PIPE, text=True) as server:
        for line in server.stdout or ():
            with contextlib.suppress(json.JSONDecodeError):
                done = json.loads(line)
                numbers[done["cell"]] = done["numbers"]
                print(f"{done['seconds']:6.1f} s  {done['cell']}  {done['numbers'].get('failed', '')}", flush=True)
    return numbers


def plain_forward(checkout: Path) -> list[str]:
    """What changes the order of roundings, where a checkout has it, is switched off: exact savings, flat gradients."""
    place = checkout / "amclip_ds"
    savings, engine = (
        file.read_text() if file.is_file() else ""
        for file in (place / "model/savings.py", place / "engine/ds_config.py")
    )
    off = [f"engine.savings.{key}=false" for key in re.findall(r"^    (\w+): bool = True", savings, re.M)]
    return off + ["engine.flat_gradients=false"] * ("flat_gradients: bool" in engine)


def going_on(checkouts: list[Path], wanted: list[Cell], data: Path) -> list[dict[str, Any]]:
    """What the first checkout gives without a break, and the second from the first one's checkpoint of step HALF."""
    with tempfile.TemporaryDirectory(prefix="numbers-") as folder:
        places = [Path(folder, name) for name in ("whole", "rest")]
        for place in places:
            place.mkdir()
        whole = record(checkouts[0], wanted, data, places[0], kept=True)
        rest = record(checkouts[1], wanted, data, places[1], resume=places[0])
    for numbers in (*whole.values(), *rest.values()):
        if "rows" in numbers:
            numbers["rows"] = numbers["rows"][HALF - STEPS :]
            del numbers["keep"]
    return [whole, rest]


def first_difference(one: Any, other: Any, at: str = "") -> str | None:
    """Where two records part first; None where they are equal."""
    if isinstance(one, dict) and isinstance(other, dict):
        for key in [*one, *(key for key in other if key not in one)]:
            if key not in one or key not in other:
                return f"{at} {key}: only in {'A' if key in one else 'B'}"
            if found := first_difference(one[key], other[key], f"{at} {key}"):
                return found
        return None
    if isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        pairs = enumerate(zip(one, other), 1)
        return next((found for n, pair in pairs if (found := first_difference(*pair, at=f"{at} {n}"))), None)
    return None if one == other else f"{at}: {readable(one)} | {readable(other)}"


def readable(value: Any) -> str:
    with contextlib.suppress(ValueError, TypeError):
        return repr(float.fromhex(value))
    return str(value)


def numbers_of(source: Path, wanted: list[Cell], data: Path) -> dict[str, Any]:
    if source.is_file():
        return json.loads(source.read_text())
    with tempfile.TemporaryDirectory(prefix="numbers-") as folder:
        return record(source.resolve(), wanted, data, Path(folder))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("do", choices=("record", "compare", "goes-on"))
    parser.add_argument("first", type=Path, help="a checkout (or, to compare, a file that record wrote)")
    parser.add_argument("second", type=Path, help="the file to write, or what to compare with")
    parser.add_argument("--full", action="store_true", help="all cells")
    parser.add_argument("--only", default="", help="a regular expression of cells' names")
    parser.add_argument("--data", type=Path, default=Path(tempfile.gettempdir(), "amclip-numbers"))
    args = parser.parse_args()
    wanted = [cell for cell in cells(args.full) if re.search(args.only, cell.name)]
    if args.do == "record":
        args.second.write_text(json.dumps(numbers_of(args.first, wanted, args.data), indent=0) + "\n")
        return 0
    if args.do == "goes-on":
        one, other = going_on([args.first.resolve(), args.second.resolve()], wanted, args.data)
    else:
        one, other = (numbers_of(source, wanted, args.data) for source in (args.first, args.second))
    names = [cell.name for cell in wanted if cell.name in one and cell.name in other]
    differences = {name: first_difference(one[name], other[name]) for name in names}
    for name, difference in differences.items():
        print(f"{'equal' if difference is None else 'DIFFERS'}  {name}{difference or ''}")
    print(f"{sum(found is None for found in differences.values())} of {len(names)} cells equal")
    return int(any(differences.values()) or not names)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--serve"]:
        serve(json.loads(Path(sys.argv[2]).read_text()))
    else:
        sys.exit(main())
