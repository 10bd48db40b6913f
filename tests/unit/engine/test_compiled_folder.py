"""Where torch.compile keeps what it made: beside the run, in a folder that nobody else can write to."""

import os
import socket
from pathlib import Path

import pytest

from amclip_ds.ranks.runtime import keep_compiled


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


def test_it_is_beside_the_run_and_is_the_users_own(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    node = keep_compiled(run)
    assert node is not None
    folder = node.parent
    assert folder.parent == tmp_path and run not in folder.parents
    assert folder.stat().st_mode & 0o777 == 0o700 and not list(run.iterdir())
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(node)


def test_nodes_share_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where both see the run, which is where caches of two nodes got into each other's way."""
    folders = []
    for host in ("gpu01", "gpu02"):
        monkeypatch.setattr(socket, "gethostname", lambda host=host: host)
        monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
        monkeypatch.delenv("TRITON_CACHE_DIR", raising=False)
        folders.append(keep_compiled(tmp_path / "run"))
        assert Path(os.environ["TRITON_CACHE_DIR"]).parent == folders[-1]
    assert [folder.name for folder in folders if folder] == ["gpu01", "gpu02"]


def test_what_torch_itself_has_set_is_no_wish_of_the_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    made = cache_dir()
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == made
    assert keep_compiled(tmp_path / "run") is not None


def test_a_folder_that_others_may_write_to_is_not_used(tmp_path: Path) -> None:
    """What is there is executed."""
    node = keep_compiled(tmp_path / "run")
    assert node is not None
    folder = node.parent
    del os.environ["TORCHINDUCTOR_CACHE_DIR"]
    folder.chmod(0o777)
    assert keep_compiled(tmp_path / "run") is None and "TORCHINDUCTOR_CACHE_DIR" not in os.environ
    folder.rmdir()
    (tmp_path / "elsewhere").mkdir()
    folder.symlink_to(tmp_path / "elsewhere")
    assert keep_compiled(tmp_path / "run") is None


def test_the_environment_has_the_last_word(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/scratch/mine")
    assert keep_compiled(tmp_path / "run") is None and os.environ["TORCHINDUCTOR_CACHE_DIR"] == "/scratch/mine"
