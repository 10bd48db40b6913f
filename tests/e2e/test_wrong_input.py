"""Wrong input, as users give it: exit code 2 and one line that names the key or file; damage in data is reported."""

import io
import json
import re
import socket
import tarfile
from pathlib import Path

import pytest

from amclip_ds.jsonl import read_lines
from tests.e2e.conftest import Amclip
from tests.harness import RankFailed, run_ranks

SETTINGS = [  # what is typed -> what the one line must say
    (["aclip-vitb17"], r"recipe 'aclip-vitb17' is not known; did you mean aclip-vitb16\?"),
    (["aclip-tiny", "optim.learning_rate=1"], r"optim.learning_rate: unknown key; did you mean optim\.lr\?"),
    (["aclip-tiny", "optim.lr=fast"], r"optim\.lr"),
    (["aclip-tiny", "mask.keep_ratio=1.5"], r"mask\.keep_ratio: 1\.5 is outside \(0, 1\]"),
    (["aclip-tiny", "mask.unit=3"], r"mask\.unit: 3 does not divide"),
    (["aclip-tiny", "model.vision.image_size=60"], r"model\.vision\.image_size: 60"),
    (["aclip-tiny", "batch.global_size=0"], r"batch\.global_size"),
    (["aclip-tiny", "compat=papr"], r"compat: 'papr'"),
    (["aclip-tiny", "optim"], r"'optim': expected key=value"),
    (["aclip-tiny", "optim=1"], r"optim: a section"),
    (["aclip-tiny", "run.epochs=1", "run.steps=1"], r"run\.steps and run\.epochs"),
    (["aclip-tiny", "data.train=$NO_SUCH_VARIABLE/x.tar"], r"NO_SUCH_VARIABLE"),
    (["aclip-tiny", "data.train=/nowhere/{00000..00003}.tar"], r"data\.train: .*/nowhere/00000\.tar"),
    (["aclip-tiny"], r"data\.train"),
    (["aclip-tiny", "engine.deepspeed=zero9.json"], r"engine\.deepspeed: .*zero9\.json"),
    (["aclip-tiny", "model.vision.name=vit_bse_patch16_224"], r"model\.vision\.name"),
    (["nowhere.yaml"], r"recipe nowhere\.yaml: no such file"),
]


@pytest.mark.parametrize("typed, said", SETTINGS, ids=[" ".join(typed) for typed, _ in SETTINGS])
def test_a_wrong_setting_is_one_line_and_code_2(typed: list[str], said: str, tmp_path: Path, amclip: Amclip) -> None:
    code, printed = amclip("train", *typed, f"run.out={tmp_path}/run")
    assert code == 2, printed
    lines = [line for line in printed.splitlines() if line.startswith("amclip train: ")]
    assert len(lines) == 1 and re.search(said, lines[0]), printed
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_the_global_batch_must_divide(scenes: Path, tmp_path: Path, amclip: Amclip) -> None:
    code, printed = amclip(
        "train", "aclip-tiny", f"data.train={scenes}/train", f"run.out={tmp_path}/run", "batch.global_size=33", ranks=2
    )
    assert code == 2 and "33 = 2 ranks x 16 + 1" in printed, printed


@pytest.mark.parametrize("key", ["train_batch_size", "optimizer", "gradient_clipping"])
def test_what_the_run_decides_is_refused_in_a_ds_config(key: str, scenes: Path, tmp_path: Path, amclip: Amclip) -> None:
    file = tmp_path / "mine.json"
    file.write_text(json.dumps({"zero_optimization": {"stage": 1}, key: 1}))
    code, printed = amclip(
        "train", "aclip-tiny", f"data.train={scenes}/train", f"run.out={tmp_path}/run", f"engine.deepspeed={file}"
    )
    assert code == 2 and key in printed and "mine.json" in printed, printed


def test_an_unwritable_folder_is_named(scenes: Path, tmp_path: Path, amclip: Amclip) -> None:
    (tmp_path / "file").write_text("in the way")
    code, printed = amclip("train", "aclip-tiny", f"data.train={scenes}/train", f"run.out={tmp_path}/file/run")
    assert code == 2 and "run.out" in printed and str(tmp_path / "file") in printed, printed


def test_a_port_in_use_is_named(scenes: Path, tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        argv = ["train", "aclip-tiny", f"data.train={scenes}/train", f"run.out={tmp_path}/run"]
        [(code, printed)] = run_ranks(
            "tests.e2e.cases:command", world_size=1, timeout_s=120, env={"MASTER_PORT": port}, argv=argv
        )
    assert code == 2 and port in printed and "in use" in printed, printed


def test_an_empty_tar_is_refused(tmp_path: Path, amclip: Amclip) -> None:
    tarfile.open(tmp_path / "empty.tar", "w").close()
    code, printed = amclip("train", "aclip-tiny", f"data.train={tmp_path}/empty.tar", f"run.out={tmp_path}/run")
    assert code == 2 and "empty.tar" in printed, printed


def test_a_broken_jpeg_and_a_missing_text_are_counted_not_fatal(scenes: Path, tmp_path: Path, amclip: Amclip) -> None:
    source = sorted((scenes / "train").glob("*.tar"))[0]
    with tarfile.open(source) as old, tarfile.open(tmp_path / "mixed.tar", "w") as new:
        for member in old:
            content = old.extractfile(member).read()  # type: ignore[union-attr]
            number, extension = member.name.split(".")
            if int(number) == 40:
                break
            if int(number) == 3 and extension == "jpg":
                content = content[: len(content) // 3]  # cut short
                member.size = len(content)
            if int(number) == 5 and extension in ("txt", "json"):
                continue  # no caption
            new.addfile(member, io.BytesIO(content))
    code, printed = amclip(
        "train",
        "aclip-tiny",
        f"data.train={tmp_path}/mixed.tar",
        f"run.out={tmp_path}/run",
        "run.steps=2",
        "batch.global_size=20",
        "data.max_skip_rate=0.5",
    )
    assert code == 0, printed
    keys = {row["key"] for row in read_lines(tmp_path / "run" / "incidents.jsonl")}
    assert len(keys) == 2, "what was skipped must be in incidents.jsonl"


def test_a_crash_on_one_rank_reaches_the_harness() -> None:
    """The twin: a rank that fails is never taken for a clean refusal."""
    with pytest.raises(RankFailed):
        run_ranks("tests.e2e.cases:no_such_case", world_size=1, timeout_s=60)
