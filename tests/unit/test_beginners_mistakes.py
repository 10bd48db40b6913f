"""What beginners type: one line with the fix, code 2, no traceback, before torch is loaded or any rank is started."""

import gzip
import io
import json
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest

HEAVY = ("torch", "timm", "deepspeed", "transformers", "open_clip")
PROGRAM = f"""
import contextlib, io, json, os, sys, time
from amclip_ds import cli
for words in json.load(sys.stdin):
    out, err, began = io.StringIO(), io.StringIO(), time.process_time()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = cli.main(words)
    loaded = [name for name in {HEAVY} if name in sys.modules]
    ranks_s = os.times().children_user
    print(json.dumps([code, out.getvalue(), err.getvalue(), loaded, ranks_s]))
"""
TRAIN = "train aclip-tiny data.train=SHARDS run.out=RUN"
MISTAKES = [  # what is typed -> what the line must hold. SHARDS, EMPTY, RUN, FULL, YAML.x are made below
    ("trian aclip-tiny", "did you mean train?"),
    ("train", "RECIPE"),
    ("train aclip", "did you mean aclip-tiny"),
    ("train aclip-tiny", "data.train: give the shards to train on"),
    ("train run.steps=5", "the recipe comes first"),
    ("train FULL", "a folder"),
    ("train none.yaml", "no such file"),
    ("train --train-data SHARDS --batch-size 256 --epochs 3", "did you mean data.train?"),
    (f"{TRAIN} --batch-size 256", "batch.global_size"),
    (f"{TRAIN} --model ViT-B-32", "model.vision.name"),
    (f"{TRAIN} --precision amp_bf16", "engine.deepspeed"),
    (f"{TRAIN} --epochs 3", "run.epochs"),
    (f"{TRAIN} --local-loss", "nothing to set here"),
    (f"{TRAIN} --run.steps=5", "keys are written without dashes: run.steps=5"),
    (f"{TRAIN} optim.learning_rate=1e-3", "did you mean optim.lr?"),
    (f"{TRAIN} optim.wd=0.1", "did you mean optim.weight_decay?"),
    (f"{TRAIN} batch_size=64", "batch.global_size"),
    (f"{TRAIN} precision=bf16", "engine.deepspeed"),
    (f"{TRAIN} run.name=first", "did you mean run.out?"),
    (f"{TRAIN} output_dir=x", "did you mean run.out?"),
    (f"{TRAIN} num_gpus=4", "--procs N"),
    (f"{TRAIN} seed=4", "did you mean run.seed?"),
    (f"{TRAIN} num_train_epochs=4", "did you mean run.epochs?"),
    (f"{TRAIN} run.steps=many", "run.steps: 'many' does not fit; it takes a whole number, or null"),
    (f"{TRAIN} run.steps=1e5", "whole number"),
    (f"{TRAIN} optim.lr=nan", "optim.lr: 'nan' does not fit"),
    (f"{TRAIN} optim.lr=-1", "optim.lr"),
    (f"{TRAIN} batch.global_size=0", "batch.global_size"),
    (f"{TRAIN} run.steps=5 run.epochs=1", "give one of them"),
    (f"{TRAIN} optim.lr=1 optim.lr=2", "optim.lr is given 2 times"),
    ("train aclip-tiny data.train=/x/0.tar data.train=/x/1.tar", "'data.train=/x/{0..1}.tar'"),
    ("recipes aclip-tiny data.train=/x/0.tar data.train=/x/1.tar", "'data.train=/x/{0..1}.tar'"),
    (f"{TRAIN} data.captions=json:title", "in brackets and quotes: 'data.captions=[A,B]'"),
    (f"{TRAIN} optim", "expected key=value"),
    (f"{TRAIN} optim=adamw", "optim: a section"),
    (f"{TRAIN} engine.deepspeed=zero9.json", "engine.deepspeed: no file"),
    (f"{TRAIN} log.wandb_project=mine", "log.wandb_project: wandb is not installed"),
    (f"{TRAIN} model.init_from=/nowhere", "model.init_from: no such file or folder"),
    (f"{TRAIN} model.vision.image_size=60", "model.vision.image_size: 60"),
    (f"{TRAIN} mask.unit=3", "mask.unit: 3 does not divide"),
    (f"{TRAIN} --resume latest", "--resume latest: no such checkpoint; auto (the default)"),
    (f"{TRAIN} --resume /nowhere/step_00000010", "--resume /nowhere/step_00000010: no such checkpoint"),
    (f"{TRAIN} --procs 0", "--procs: 0 is below 1"),
    (f"{TRAIN} --procs 99999999", "--procs: 99999999 is above 1024"),
    ("submit aclip-tiny data.train=SHARDS run.out=RUN --nodes 99999", "does not divide"),
    (f"{TRAIN} --procs -2", "--procs: -2 is below 1"),
    (f"{TRAIN} --procs two", "not a whole number"),
    (f"{TRAIN} --procs 2 batch.global_size=33", "33 = 2 ranks x 16 + 1"),
    ("train aclip-tiny data.train=SHARDS run.out=FULL", "holds other things"),
    ("train YAML.empty run.stepz=1", "did you mean run.steps?"),
    ("train YAML.twice", "is given twice"),
    ("train YAML.escape", "'a\\x1b[31m': unknown key"),
    ("train YAML.typo", "optim.lrr: unknown key; did you mean optim.lr?"),
    ("submit aclip-tiny --nodes 2 --gpus 8", "did you mean --gpus-per-node?"),
    ("submit aclip-tiny --nodes 0", "--nodes: 0 is below 1"),
    ("submit aclip-tiny optim.learning_rate=1", "did you mean optim.lr?"),
    ("data check SHARDS --json /nowhere/report.json", "--json /nowhere/report.json: cannot be written"),
    ("data stats SHARDS --out SHARDS", "cannot be written: "),
    ("data index SHARDS --out .", "--out: .: name a folder of its own"),
    ("data stats SHARDS --words FULL", "--words "),
    ("data synth --out x --image-size 100000", "--image-size: 100000 is above 4096"),
    ("eval FULL --data SHARDS --csv FULL", "--csv "),
    ("reproduce RUN --capsule /nowhere/run.tar.gz", "--capsule /nowhere/run.tar.gz: cannot be written"),
    ("samples RUN 1 --out FULL", "cannot be written: it is a folder"),
    ("submit aclip-tiny data.train=SHARDS --time soon", "--time: 'soon' is no time limit"),
    ("submit aclip-tiny data.train=SHARDS --time=-5", "--time: '-5' is no time limit"),
    ("data check SHARDS --sample 5", "--sample: 5 is outside"),
    ("eval RUN --data x --batch_size 5", "did you mean --batch-size?"),
    ("eval RUN --data x --procs 0", "--procs: 0 is below 1"),
    ("demo --steps 0", "--steps: 0 is below 1"),
    ("checkpoints RUN --keep-last 0", "--keep-last: 0 is below 1"),
    # What is somebody's is never replaced
    (f"{TRAIN} data.index=FULL", "holds other things ('thesis.tex'); name a new or an empty folder"),
    (f"{TRAIN} data.index=SHARDS", "is a file, or below one"),
    ("data index SHARDS --out FULL", "holds other things ('thesis.tex'); name a new or an empty folder"),
    ("data check --json SHARDS SHARDS", "holds something else; name a new file"),
    ("data stats SHARDS --words SHARDS", "holds something else; name a new file"),
    ("report RUN --out SHARDS", "holds something else; name a new file"),
    ("samples RUN 1 --out SHARDS", "holds something else; name a new file"),
    ("eval RUN --data x --csv SHARDS", "holds something else; name a new file"),
    # Kin of the above: a typo of a key, a file for a folder and the reverse, other units, quotes, numbers as texts
    (f"{TRAIN} Run.Steps=5", "run.steps"),
    (f"{TRAIN} run.steps:5", "expected key=value"),
    (f"{TRAIN} run.steps =5", "expected key=value"),
    (f"{TRAIN} run.steps=", "run.steps: '' does not fit"),
    (f"{TRAIN} run.steps=5s", "run.steps: '5s' does not fit"),
    (f"{TRAIN} run.steps=-5", "run.steps: -5 is"),
    (f"{TRAIN} run.steps=1.5", "whole number"),
    (f"{TRAIN} run.steps=99999999999999999999", "run.steps"),
    (f"{TRAIN} 'run.steps=5", "did you mean run.steps?"),
    (f"{TRAIN} run.epochs=inf", "run.epochs: 'inf' does not fit"),
    (f"{TRAIN} run.seed=-1", "run.seed: -1 is below 0"),
    (f"{TRAIN} optim.lr=1,5e-4", "optim.lr: '1,5e-4' does not fit"),
    (f"{TRAIN} optim.lr=$LR", "optim.lr: '$LR' does not fit"),
    (f"{TRAIN} optim.name=adam", "none of adamw, muon, lion, sgd"),
    (f"{TRAIN} optim.betas=0.9,0.98", "in brackets and quotes: 'optim.betas=[A,B]'"),
    (f"{TRAIN} batch.global_size=1k", "batch.global_size: '1k' does not fit"),
    (f"{TRAIN} mask.keep_ratio=50", "mask.keep_ratio: 50.0 is outside (0, 1]"),
    (f"{TRAIN} mask.keep_ratio=50%", "mask.keep_ratio: '50%' does not fit"),
    (f"{TRAIN} mask.strategy=attention", "is none of none, random, attentive"),
    (f"{TRAIN} checkpoint.every_steps=1h", "checkpoint.every_steps: '1h' does not fit"),
    (f"{TRAIN} data.workers=100000", "data.workers: 100000 is above 1000"),
    (f"{TRAIN} data.views=2", "data.views: '2' does not fit; it takes a list"),
    (f"{TRAIN} engine.deepspeed=2", "engine.deepspeed: no file '2'; ds_configs/ has"),
    (f"{TRAIN} engine.deepspeed=FULL", "engine.deepspeed: no file"),
    (f"{TRAIN} data.stage_dir=/proc/x", "data.stage_dir: /proc/x/amclip-"),
    (f"{TRAIN} data.stage_dir=SHARDS", "0.tar/amclip-"),
    (f"{TRAIN} eval.data=/nowhere", "eval.data: no such shard"),
    (f"{TRAIN} --resume FULL", "there is no checkpoint (step_XXXXXXXX with a manifest.json)"),
    (f"{TRAIN} --nproc 2", "did you mean --procs?"),
    (f"{TRAIN} --plugin nope.py", "--plugin nope.py: No such file"),
    ("train aclip-tiny data.train=SHARDS.gz", "is a compressed tar"),
    ("train aclip-tiny data.train=EMPTY", "is empty: 0 bytes"),
    ("train aclip-tiny data.train=FULL", "no .tar file in the folder"),
    ("train aclip-tiny data.train=/x/{0..999999999}.tar", "more than 1048576 shards"),
    ("train aclip-tiny data.train=SHARDS run.out=SHARDS", "it is a file, or below one"),
    ("train aclip-tiny aclip-vitb16", "'aclip-vitb16': expected key=value"),
    ("train aclip_tiny data.train=SHARDS", "did you mean aclip-tiny?"),
    ("train SHARDS", "give a .yaml file"),
    ("train YAML.tabs", "not a yaml file of plain values"),
    ("train YAML.text", "optim.lr: 'fast' does not fit; it takes a number (in "),
    ("train YAML.nan", "optim.lr: nan does not fit"),
    ("demo --out SHARDS", "a file; name an empty or new folder"),
    ("data check SHARDS.gz", "is a compressed tar"),
    ("data synth --out x --train many", "'many' is not a whole number"),
    ("data pack", "the following arguments are required: SOURCE, --out"),
    ("plan", "the following arguments are required: RECIPE ("),
    ("plan aclip-tiny --gpu h1000", "did you mean h100?"),
    ("samples RUN", "the following arguments are required: STEP ("),
    ("compare clip-tiny --budget steps=5 --out x optim.lrr=1", "did you mean optim.lr?"),
    ("report FULL", "it has no config.yaml"),
    ("eval FULL --data SHARDS --procs 2", "neither a run (config.yaml), a checkpoint (manifest.json) nor an export"),
    ("export FULL --format hf --out x", "neither a run (config.yaml)"),
    ("export RUN --format openclip --out x", "choose from 'open_clip'"),
]


@pytest.fixture(scope="module")
def reported(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    """What each line of MISTAKES gave, all typed into one process."""
    folder = tmp_path_factory.mktemp("mistakes")
    (folder / "full").mkdir()
    (folder / "full" / "thesis.tex").touch()
    for name, text in {
        "empty": "run:\n",
        "twice": "optim: {lr: 1, lr: 2}\n",
        "typo": "optim: {lrr: 1}\n",
        "tabs": "optim:\n\tlr: 1\n",
        "text": "optim: {lr: fast}\n",
        "nan": "optim: {lr: .nan}\n",
        "escape": '"a\\e[31m": 1\n',
    }.items():
        (folder / f"{name}.yaml").write_text("recipe: aclip-tiny\n" + text)
    make_shard(folder / "0.tar")
    (folder / "0.tar.gz").write_bytes(gzip.compress((folder / "0.tar").read_bytes()))
    (folder / "empty.tar").touch()
    words = {"SHARDS": str(folder / "0.tar"), "RUN": str(folder / "run"), "FULL": str(folder / "full")}
    words["EMPTY"] = str(folder / "empty.tar")
    lines = []
    for typed, _ in MISTAKES:
        line = typed
        for name, value in words.items():
            line = line.replace(name, value)
        lines.append([f"{folder}/{word[5:]}.yaml" if word.startswith("YAML.") else word for word in line.split()])
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], input=json.dumps(lines), capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return {typed: json.loads(row) for (typed, _), row in zip(MISTAKES, done.stdout.splitlines(), strict=True)}


def make_shard(path: Path) -> None:
    with tarfile.open(path, "w") as tar:
        for number in range(64):
            for kind, content in (("jpg", b"\xff\xd8\xff"), ("txt", b"a caption")):
                member = tarfile.TarInfo(f"{number}.{kind}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))


@pytest.mark.parametrize("typed, said", MISTAKES, ids=[typed for typed, _ in MISTAKES])
def test_a_mistake_is_one_line_with_the_fix(typed: str, said: str, reported: dict[str, list[Any]]) -> None:
    code, printed, line, loaded, ranks_s = reported[typed]
    assert code == 2 and line.startswith("amclip") and line.count("\n") == 1 and printed == "", line
    assert said in line
    assert loaded == [] and ranks_s < 1.0


def test_there_are_many() -> None:
    assert len(MISTAKES) >= 100 and len({typed for typed, _ in MISTAKES}) == len(MISTAKES)
