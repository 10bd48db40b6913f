"""Trackers by one key: which are chosen, one line where one is missing, offline without a network, one name a run."""

import importlib.util
import sys
from pathlib import Path

import pytest

from amclip_ds.cli import main
from amclip_ds.errors import AmclipError
from amclip_ds.jsonl import read_lines
from amclip_ds.record import LogConfig, Record, trackers
from tests.unit.test_record import ROW


def test_one_key_chooses_and_the_old_ones_still_do() -> None:
    assert LogConfig().chosen() == {"tensorboard": "amclip_ds"}
    assert LogConfig(trackers=["trackio", "tensorboard"], project="p").chosen() == {"tensorboard": "p", "trackio": "p"}
    assert LogConfig(tensorboard=False).chosen() == LogConfig(trackers=[]).chosen() == {}
    assert LogConfig(wandb_project="w").chosen() == {"tensorboard": "amclip_ds", "wandb": "w"}
    with pytest.raises(ValueError, match="log.trackers: 'mlflow' is none of tensorboard, wandb, trackio"):
        LogConfig(trackers=["mlflow"])


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_tracker_that_is_missing_is_one_line(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda asked, *more: None if asked == name else found(asked, *more)
    )
    write_pairs(tmp_path)
    words = [f"data.train={tmp_path}/0.tar", f"run.out={tmp_path}/run", f"log.trackers=[tensorboard,{name}]"]
    assert main(["train", "aclip-tiny", *words]) == 2
    error = capsys.readouterr().err
    assert f"log.trackers: {name} is not installed: pip install 'amclip_ds[track]'" in error and error.count("\n") == 1


def write_pairs(folder: Path) -> None:
    from tests.unit.data.damaged import samples, tar_of

    (folder / "0.tar").write_bytes(tar_of(samples(range(4))))


FAKE = """
calls = []
class Settings: mode = "{mode}"; base_url = "https://tracker.invalid"
class Setup: settings = Settings
def setup(): return Setup
class Run:
    def log(self, numbers, step): calls.append(("log", step))
    def finish(self): calls.append(("finish",))
def init(**how):
    calls.append(("init", how))
    return Run()
"""


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> object:
    """Modules that note what they are asked; what they are asked is tested against the real ones by hand."""

    def install(name: str, mode: str = "online") -> object:
        (tmp_path / "modules").mkdir(exist_ok=True)
        (tmp_path / "modules" / f"{name}.py").write_text(FAKE.format(mode=mode))
        monkeypatch.syspath_prepend(tmp_path / "modules")
        monkeypatch.delitem(sys.modules, name, raising=False)
        return importlib.import_module(name)

    yield install
    for name in ("wandb", "trackio"):
        sys.modules.pop(name, None)


def record(folder: Path, name: str, first_step: int = 0) -> None:
    folder.mkdir(exist_ok=True)
    config = LogConfig(every_steps=1, trackers=[name], project="p")
    with Record(
        folder, config, rank=0, world_size=1, attempt=0, total_steps=5, samples_per_epoch=9, first_step=first_step
    ) as pen:
        pen.metrics(ROW | {"step": first_step + 1})


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_resumed_run_continues_under_its_name(name: str, tmp_path: Path, fake: object) -> None:
    module = fake(name)  # type: ignore[operator]
    record(tmp_path / "run", name)
    record(tmp_path / "run", name, first_step=1)
    begun = [call[1] for call in module.calls if call[0] == "init"]
    key = "id" if name == "wandb" else "name"
    assert begun[0][key] == begun[1][key] == (tmp_path / "run" / "run_id").read_text().strip()
    assert all(how["resume"] == "allow" and how["project"] == "p" for how in begun)
    assert [call for call in module.calls if call[0] != "init"] == [("log", 1), ("finish",), ("log", 2), ("finish",)]
    assert not read_lines(tmp_path / "run" / "incidents.jsonl")


def test_without_a_network_wandb_is_offline_unless_the_user_said_how(
    tmp_path: Path, fake: object, capsys: pytest.CaptureFixture[str]
) -> None:
    module = fake("wandb")  # type: ignore[operator]
    record(tmp_path / "run", "wandb")
    assert module.calls[0][1]["mode"] == "offline"
    assert "wandb: no way to tracker.invalid: curves are kept in" in capsys.readouterr().out
    module = fake("wandb", mode="disabled")  # type: ignore[operator]
    record(tmp_path / "run", "wandb")
    assert "mode" not in module.calls[0][1]
    assert not trackers.is_reachable("127.0.0.1", 9)


@pytest.mark.skipif(importlib.util.find_spec("trackio") is None, reason="trackio is not installed")
def test_trackio_itself_takes_what_it_is_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    record(tmp_path / "run", "trackio")
    assert not read_lines(tmp_path / "run" / "incidents.jsonl"), AmclipError
