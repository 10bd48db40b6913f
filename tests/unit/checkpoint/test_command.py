"""`amclip checkpoints`: what it prints and writes, its codes, and what it refuses."""

import json
import pickle
from pathlib import Path

import pytest

from amclip_ds import config as settings
from amclip_ds.cli import main
from tests.unit.checkpoint.damage import Hostile, flip
from tests.unit.checkpoint.test_save import save_steps, steps_in


@pytest.fixture
def run(tmp_path: Path) -> Path:
    save_steps(tmp_path / "run" / "checkpoints", 1, 2, 3, keep_last=9)
    return tmp_path / "run"


def test_list_shows_what_there_is(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["checkpoints", str(run), "--json", str(tmp_path / "rows.json")]) == 0
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert [row["step"] for row in rows] == [1, 2, 3] and all(row["valid"] for row in rows)
    assert {"age_s", "bytes", "world_size", "stage", "pinned"} <= rows[0].keys()
    assert rows[0]["world_size"] == 1 and rows[0]["stage"] == 2
    assert "world" in capsys.readouterr().out


def test_verify_reads_every_byte_where_list_does_not(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flip(run / "checkpoints/step_00000002/ema/rank0000.safetensors")
    assert main(["checkpoints", str(run)]) == 0
    assert main(["checkpoints", str(run), "verify"]) == 2
    assert "step_00000002/ema/rank0000.safetensors" in capsys.readouterr().out


def test_prune_follows_the_rules_and_pins(run: Path) -> None:
    checkpoints = run / "checkpoints"
    assert main(["checkpoints", str(run), "pin", "--step", "1"]) == 0
    assert main(["checkpoints", str(run), "prune", "--keep-last", "1"]) == 0
    assert steps_in(checkpoints) == [1, 3]
    assert main(["checkpoints", str(run), "unpin", "--step", "1"]) == 0
    assert main(["checkpoints", str(run), "prune", "--keep-last", "1"]) == 0
    assert steps_in(checkpoints) == [3]
    (checkpoints / "step_00000003" / "trainer.json").unlink()
    assert main(["checkpoints", str(run), "prune", "--keep-last", "1", "--damaged"]) == 0
    assert steps_in(checkpoints) == [3], "the only one is never removed, even damaged"


def test_prune_finds_the_rules_however_the_run_is_named(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By its checkpoints' folder too: the default, to keep the newest two, is another run's."""
    words = ["data.train=shards", "run.steps=4", "checkpoint.keep_last=9"]
    (run / "config.yaml").write_text(settings.dump(settings.load("aclip-tiny", words)))
    monkeypatch.chdir(run / "checkpoints")
    for name in (str(run), str(run / "checkpoints"), "."):
        assert main(["checkpoints", name, "prune"]) == 0
        assert steps_in(run / "checkpoints") == [1, 2, 3], name
    (run / "config.yaml").unlink()
    assert main(["checkpoints", ".", "prune"]) == 0
    assert steps_in(run / "checkpoints") == [2, 3], "the twin"


@pytest.mark.parametrize(
    "words, said",
    [
        ("prune --step 0", "--step: prune does not read it; it goes by --keep-last, --damaged, --set-aside"),
        ("prune --keep-last 1 --weights student", "--weights: prune does not read it; it goes by --keep-last"),
        ("--out w.safetensors", "--out: list does not read it; consolidate does"),
        ("--keep-last 1", "--keep-last: list does not read it; prune does"),
        ("verify --step 2", "--step: verify does not read it; pin, unpin, consolidate do"),
        ("pin --damaged", "--damaged: pin does not read it; it goes by --step"),
        ("consolidate --out w --keep-last 1", "--keep-last: consolidate does not read it; it goes by --out, --weights"),
        ("import --step 2", "--step: import does not read it; it goes by --source"),
    ],
)
def test_an_option_of_another_action_is_refused(
    run: Path, words: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["checkpoints", str(run), *words.split()]) == 2
    assert said in capsys.readouterr().err
    assert steps_in(run / "checkpoints") == [1, 2, 3] and not list(run.glob("checkpoints/*/pinned"))


def test_wrong_input_is_one_line(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "config.yaml").write_text("run: {}\n")
    for argv, said in (
        ([str(tmp_path / "nowhere")], "missing"),
        ([str(tmp_path)], "not a run's folder: it has no config.yaml"),
        ([str(run / "checkpoints" / "step_00000003")], "a checkpoint; name its run, "),
        ([str(run), "pin", "--step", "7"], "--step 7"),
        ([str(run), "consolidate"], "--out"),
        ([str(run), "consolidate", "--out", str(run / "config.yaml")], "holds something else; name a new file"),
        ([str(run), "import"], "--source"),
        ([str(run), "prune", "--keep-last", "0"], "keep-last"),
    ):
        assert main(["checkpoints", *argv]) == 2
        error = capsys.readouterr().err
        assert said in error and len(error.strip().splitlines()) == 1


def test_a_pickle_is_not_opened_without_trust(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "theirs" / "global_step7"
    folder.mkdir(parents=True)
    (tmp_path / "theirs" / "latest").write_text("global_step7")
    for name in ("mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_optim_states.pt"):
        (folder / name).write_bytes(pickle.dumps(Hostile()))
    assert main(["checkpoints", str(run), "import", "--source", str(tmp_path / "theirs")]) == 2
    assert "--trust-pickle" in capsys.readouterr().err
    assert not (tmp_path / "hostile-code-was-run").exists()
