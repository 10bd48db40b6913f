"""Small shards for the end-to-end tests, and a way to run a command on ranks."""

import functools
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.harness import run_ranks

Amclip = Callable[..., tuple[int, str]]


@pytest.fixture(scope="session")
def amclip() -> Amclip:
    """amclip("train", "aclip-tiny", ..., ranks=2) -> (exit code, what rank 0 printed)."""

    def run(*argv: str, ranks: int = 1, timeout_s: float = 300) -> tuple[int, str]:
        results = run_ranks("tests.e2e.cases:command", world_size=ranks, timeout_s=timeout_s, argv=list(argv))
        assert len({code for code, _ in results}) == 1, results
        return results[0]

    return run


@pytest.fixture(scope="session")
def scenes(amclip: Amclip, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """600 training and 128 held-out synthetic scenes."""
    folder = tmp_path_factory.mktemp("scenes") / "scenes"
    code, printed = amclip("data", "synth", "--out", str(folder), "--train", "600", "--test", "128")
    assert code == 0, printed
    return folder


@pytest.fixture(scope="session")
def words(amclip: Amclip, shared_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], list[str]]:
    """The words for what a method needs besides data; made at the first call for it."""
    from tests.e2e.methods import needed

    @functools.cache
    def of(method: str) -> list[str]:
        return needed(amclip, shared_dir, tmp_path_factory.mktemp(method), method)

    return of
