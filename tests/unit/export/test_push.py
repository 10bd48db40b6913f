"""The card's licence, use and energy; `--push` offline, refused, and against a hub that does not answer."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from huggingface_hub import constants

from amclip_ds import config as settings
from amclip_ds.cli import main
from amclip_ds.errors import AmclipError, UserError
from amclip_ds.evaluate.source import Located
from amclip_ds.export import push
from amclip_ds.export.card import write_card
from amclip_ds.export.proof import Agreement, Proof
from tests.unit.evaluate.exports import write_run

PROOF = Proof("s", [Agreement("a", 1.0, 0.0, "equal")], None, None)


def card_of(run: Path, step: int = 20, license_id: str = "unknown", recipe: str = "aclip-tiny") -> str:
    located = Located(run, "run", ("student",), step, run, settings.load(recipe))
    return write_card("hf", located, "student", PROOF, license_id)


def test_the_card_has_licence_use_and_energy(tmp_path: Path) -> None:
    assert "license: unknown  # FILL IN" in card_of(tmp_path)
    assert "\nlicense: cc-by-nc-4.0\n" in card_of(tmp_path, license_id="cc-by-nc-4.0")
    card = card_of(tmp_path)
    assert "## Intended use" in card and "Not meant for decisions about people" in card
    assert "FILL IN: device-hours and energy; nothing is recorded here." in card
    rows = [{"step": step, "step_s": 3600.0 * step / 10} for step in (10, 20, 30)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    planned = {"world_size": 4, "device": "h100", "device_watts": 700}
    (tmp_path / "plan.json").write_text(json.dumps({"predicted": planned}))
    assert "120 device-hours of steps on 4 `h100`; at full power of the boards (700 W each) 84 kWh" in card_of(tmp_path)
    planned = {"world_size": 2, "device": None, "device_watts": None}
    (tmp_path / "plan.json").write_text(json.dumps({"predicted": planned}))
    assert "20 device-hours of steps on 2 processes on CPUs. Hosts" in card_of(tmp_path, step=10)


def test_the_hours_are_those_of_each_attempts_ranks(tmp_path: Path) -> None:
    """plan.json is of the last attempt, here on 2 ranks; the one before had 8."""
    rows = [{"step": step, "step_s": 3600.0, "attempt": attempt} for step, attempt in ((5, 0), (10, 0), (20, 1))]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    starts = [
        {"step": 0, "event": "start", "attempt": number, "world_size": world} for number, world in ((0, 8), (1, 2))
    ]
    (tmp_path / "timeline.jsonl").write_text("".join(json.dumps(row) + "\n" for row in starts))
    planned = {"world_size": 2, "device": "h100", "device_watts": 700}
    (tmp_path / "plan.json").write_text(json.dumps({"predicted": planned}))
    assert "100 device-hours of steps on 8 and 2 `h100`; at full power" in card_of(tmp_path)
    assert "40 device-hours of steps on 8 `h100`; at full power" in card_of(tmp_path, step=5)


@pytest.mark.parametrize("recipe, is_aclip", [("aclip-tiny", True), ("clip-tiny", False), ("random2x-tiny", False)])
def test_the_card_calls_a_model_what_it_is(tmp_path: Path, recipe: str, is_aclip: bool) -> None:
    card = card_of(tmp_path, recipe=recipe)
    assert (", A-CLIP, student" in card, "a-clip" in card.split("---")[1]) == (is_aclip, is_aclip)
    assert is_aclip or ", CLIP, student" in card


def test_offline_the_folder_is_ready_and_the_command_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    write_run(tmp_path / "run")
    words = ["export", str(tmp_path / "run"), "--format", "open_clip", "--out", str(tmp_path / "out")]
    assert main([*words, "--push", "my-lab/tiny", "--private", "--license", "mit"]) == 0
    printed = capsys.readouterr().out
    assert (
        f"not pushed: HF_HUB_OFFLINE is set; the folder is ready: hf upload my-lab/tiny {tmp_path}/out --private"
        in printed
    )
    card = (tmp_path / "out" / "README.md").read_text()
    assert "\nlicense: mit\n" in card
    assert 'create_model_from_pretrained("hf-hub:my-lab/tiny")' in card and "PATH" not in card


def test_a_wrong_request_is_refused_before_the_export(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path / "run")
    for words, said in (
        (["--format", "timm", "--push", "a/b"], "by transformers (--format hf) or open_clip, not by timm"),
        (["--format", "hf", "--push", "ab"], "--push ab: write it as ORG/NAME"),
        (["--format", "hf", "--license", "all mine"], "--license 'all mine': an identifier"),
    ):
        assert main(["export", str(tmp_path / "run"), "--out", str(tmp_path / "out"), *words]) == 2
        assert said in capsys.readouterr().err and not (tmp_path / "out").exists()


@pytest.mark.parametrize("was_there", [True, False])
def test_what_is_private_goes_to_no_public_repository(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, was_there: bool
) -> None:
    """The hub leaves a repository that is there as public as it was, whatever is asked for."""
    hub = {"a/b": False} if was_there else {}
    sent: list[str] = []

    class Hub:
        def create_repo(self, name: str, private: bool, exist_ok: bool) -> None:
            assert exist_ok
            hub.setdefault(name, private)

        def model_info(self, name: str) -> SimpleNamespace:
            return SimpleNamespace(private=hub[name])

        def upload_folder(self, repo_id: str, **_: object) -> None:
            sent.append(repo_id)

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: "hf_none")
    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    if was_there:
        with pytest.raises(UserError, match="--private: a/b is there already, and is public.*nothing was sent"):
            push.push(tmp_path, "a/b", True)
        assert not sent
    else:
        assert push.push(tmp_path, "a/b", True) == "pushed: hf-hub:a/b"
    assert push.push(tmp_path, "a/b", False) and sent[-1] == "a/b"


def test_a_hub_that_does_not_answer_leaves_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: "hf_none")
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("huggingface_hub.hf_api.constants.ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(AmclipError, match="the folder is ready: hf upload a/b"):
        push.push(tmp_path, "a/b", False)
