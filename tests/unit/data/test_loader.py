"""The training stream: one global sequence whatever ranks and workers make it; what is skipped; what ends it."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from amclip_ds.data.batch import Batch
from amclip_ds.data.config import DataConfig
from amclip_ds.data.exclude import read_excluded
from amclip_ds.data.loader import TrainingData
from amclip_ds.data.prepare import find_sources
from amclip_ds.data.workers import Fault, Workers
from amclip_ds.errors import AmclipError, UserError
from amclip_ds.shards.index import Index
from amclip_ds.shards.reader import ShardReader
from tests.conftest import ROOT
from tests.unit.data.shards import UNEVEN, jpeg, open_data, write_shards, write_tar

STEPS = sum(UNEVEN) // 12  # of an epoch, at a global batch of 12
TWO_EPOCHS = 2 * STEPS
NAMED_WORLDS = {(1, 0), (2, 3), (3, 1)}
WORLDS = [
    pytest.param(world_size, workers, marks=() if (world_size, workers) in NAMED_WORLDS else pytest.mark.nightly)
    for world_size in (1, 2, 3, 4)
    for workers in (0, 1, 3)
]


@pytest.fixture(scope="module")
def uneven(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """5 shards of different sizes, one of a single sample."""
    folder = tmp_path_factory.mktemp("uneven")
    write_shards(folder)
    return folder


@pytest.fixture(scope="module")
def sequence(uneven: Path) -> list[list[int]]:
    """The global sequence of two epochs, made by one rank without workers."""
    return ids_of_world(uneven, world_size=1, workers=0, cursor=None, steps=TWO_EPOCHS)[0]


def ids_of_world(
    train: Path, world_size: int, workers: int, cursor: dict[str, Any] | None, steps: int
) -> tuple[list[list[int]], dict[str, Any]]:
    """The ids of each global batch, put together from the ranks, and the last cursor, on which all ranks agree."""
    by_rank, cursors = [], []
    for rank in range(world_size):
        with contextlib.closing(open_data(train, rank=rank, world_size=world_size, workers=workers)) as data:
            stream = data.batches(cursor)
            batches = [next(stream) for _ in range(steps)]
        by_rank.append([batch.sample_ids.tolist() for batch in batches])
        cursors.append(batches[-1].cursor)
    assert all(cursor == cursors[0] for cursor in cursors)
    return [sum((ids[step] for ids in by_rank), []) for step in range(steps)], cursors[0]


@pytest.mark.parametrize(("world_size", "workers"), WORLDS)
def test_every_world_and_worker_count_makes_the_same_sequence(
    world_size: int, workers: int, uneven: Path, sequence: list[list[int]]
) -> None:
    made, _ = ids_of_world(uneven, world_size, workers, cursor=None, steps=TWO_EPOCHS)
    assert made == sequence


def test_each_sample_comes_once_an_epoch_but_a_reported_tail(uneven: Path, sequence: list[list[int]]) -> None:
    reported: list[str] = []
    with contextlib.closing(open_data(uneven, say=reported.append)) as data:
        assert (data.samples_per_epoch, data.steps_per_epoch) == (sum(UNEVEN), STEPS)
    tail = sum(UNEVEN) - 12 * STEPS
    assert any(f"the last {tail} " in line for line in reported)
    for epoch in range(2):
        ids = sum(sequence[epoch * STEPS : (epoch + 1) * STEPS], [])
        assert len(ids) == len(set(ids)) == sum(UNEVEN) - tail
    assert sequence[:STEPS] != sequence[STEPS:]


@pytest.mark.slow
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cuts=st.lists(st.tuples(st.integers(1, TWO_EPOCHS - 1), st.sampled_from([1, 2, 3, 4])), min_size=1, max_size=3))
def test_cut_anywhere_and_resumed_on_another_world_it_continues_unbroken(
    cuts: list[tuple[int, int]], uneven: Path, sequence: list[list[int]]
) -> None:
    made: list[list[int]] = []
    cursor, world_size = None, 1
    for stop, next_world in [*sorted(cuts), (TWO_EPOCHS, 1)]:
        if stop > len(made):
            part, cursor = ids_of_world(uneven, world_size, 0, cursor, stop - len(made))
            made += part
        world_size = next_world
    assert made == sequence


@pytest.mark.parametrize(
    "first, second",
    [((1, 3), (2, 0)), pytest.param((2, 1), (4, 3), marks=pytest.mark.nightly), ((3, 0), (1, 1))],
)
def test_what_workers_prefetched_is_not_lost_at_a_cut(
    first: tuple[int, int], second: tuple[int, int], uneven: Path, sequence: list[list[int]]
) -> None:
    """The cursor is that of the consumed batch; workers are by then several batches ahead."""
    early, cursor = ids_of_world(uneven, *first, cursor=None, steps=STEPS - 2)
    late, _ = ids_of_world(uneven, *second, cursor=json.loads(json.dumps(cursor)), steps=5)
    assert early + late == sequence[: STEPS + 3]


def test_a_cursor_off_by_one_batch_breaks_the_sequence(uneven: Path, sequence: list[list[int]]) -> None:
    """The twin: what the tests above compare does change when a batch is lost."""
    early, cursor = ids_of_world(uneven, 1, 0, None, 3)
    late, _ = ids_of_world(uneven, 1, 0, cursor | {"step": cursor["step"] + 1}, 3)
    assert early + late != sequence[:6]


def test_a_sample_looks_the_same_in_every_world_and_differs_between_epochs(uneven: Path) -> None:
    """Crops, photometric changes, captions and mask noise are keyed by (seed, epoch, sample)."""

    def samples(world_size: int, workers: int, steps: int, **changes: Any) -> dict[tuple[int, int], list[np.ndarray]]:
        looks = {}
        for rank in range(world_size):
            with contextlib.closing(
                open_data(uneven, rank=rank, world_size=world_size, workers=workers, **changes)
            ) as d:
                stream = d.batches(None)
                for batch in (next(stream) for _ in range(steps)):
                    looks |= {(batch.epoch, key): look for key, look in looks_of(batch).items()}
        return looks

    one, two, other = samples(1, 0, TWO_EPOCHS), samples(4, 1, TWO_EPOCHS), samples(1, 0, 1, seed=1)
    assert one.keys() == two.keys()
    assert all(np.array_equal(a, b) for key in one for a, b in zip(one[key], two[key]))
    both = [key for (epoch, key) in one if epoch == 0 and (1, key) in one]
    assert both and all(not np.array_equal(one[(0, key)][4], one[(1, key)][4]) for key in both)
    shared = [key for (_, key) in other if (0, key) in one]
    assert shared and all(not np.array_equal(one[(0, key)][4], other[(0, key)][4]) for key in shared)


def looks_of(batch: Batch) -> dict[int, list[np.ndarray]]:
    """Sample id -> everything it looks like in this batch (texts without the padding that depends on the batch)."""
    assert batch.teacher_uint8 is not None
    looks = {}
    for place, key in enumerate(batch.sample_ids.tolist()):
        tokens = batch.token_ids[place].numpy()
        looks[key] = [
            batch.views_uint8[:, place].numpy(),
            batch.teacher_uint8[place].numpy(),
            batch.boxes[:, place].numpy(),
            batch.photometric.table[:, place],
            batch.mask_noise[:, place].numpy(),
            np.trim_zeros(tokens, "b"),
        ]
    return looks


def test_shapes_and_types(uneven: Path) -> None:
    with contextlib.closing(open_data(uneven, num_views=3, teacher_size=8, num_units=9, text_bucket=4)) as data:
        batch = next(data.batches(None))
    assert batch.views_uint8.shape == (3, 12, 3, 16, 16) and batch.views_uint8.dtype == torch.uint8
    assert batch.teacher_uint8 is not None and batch.teacher_uint8.shape == (12, 3, 8, 8)
    assert batch.boxes.shape == (4, 12, 4) and batch.mask_noise.shape == (3, 12, 9)
    assert batch.photometric.table.shape == (3, 12, 12)
    assert batch.token_ids.shape == (12, 8), "`picture N of shard S` is 7 or 8 tokens, in buckets of 4"
    assert batch.mask_noise.min() >= 0 and batch.mask_noise.max() < 1
    with contextlib.closing(open_data(uneven, teacher_size=None, num_units=0)) as data:
        batch = next(data.batches(None))
    assert batch.teacher_uint8 is None and batch.mask_noise.shape == (2, 12, 0)


def test_captions_belong_to_their_images(uneven: Path) -> None:
    from amclip_ds.data.captions import build_tokenizer

    with contextlib.closing(open_data(uneven, text_bucket=0)) as data:
        batch = next(data.batches(None))
        keys = [data.index.key(int(i)) for i in batch.sample_ids]
    expected = [f"picture {int(key.split('_')[1])} of shard {key.split('_')[0]}" for key in keys]
    assert torch.equal(batch.token_ids, build_tokenizer()(expected, 16))


def test_what_is_excluded_is_said_as_it_is_found(uneven: Path, tmp_path: Path) -> None:
    """A misspelt key leaves out nothing, which a decontaminated run must not find out afterwards."""
    with contextlib.closing(open_data(uneven)) as data:
        keys = [data.index.key(number) for number in range(len(data.index))]
        shards = [list(data.index.keys(number)) for number in range(len(data.index.shards))]
        name = Path(data.shards[1]).name
    assert sum(shards, []) == keys and sorted(map(len, shards)) == sorted(data.index.counts)
    lines, said = [keys[0], f"{name}/{shards[1][0]}", f"{keys[1]}.jpg", f"{name}/{keys[0]}"], list[str]()
    (tmp_path / "out.txt").write_text("\n".join(lines))
    open_data(uneven, exclude=str(tmp_path / "out.txt"), say=said.append).close()
    expected = f"data: 2 samples are left out by {tmp_path}/out.txt; 2 of its 4 lines name no sample here"
    assert expected in said
    (tmp_path / "out.txt").write_text("\n".join(lines[:2]))
    open_data(uneven, exclude=str(tmp_path / "out.txt"), say=said.append).close()
    assert expected.partition(";")[0] in said


def test_a_mark_at_the_files_beginning_and_a_signed_url_hide_no_sample(tmp_path: Path) -> None:
    (tmp_path / "out.txt").write_bytes("\ufeff000000000\r\n00001.tar/k\r\n".encode())
    found = read_excluded(str(tmp_path / "out.txt"))
    assert ("a.tar", "000000000") in found and ("a.tar", "k") not in found
    for shard in ("data/00001.tar", "https://h/d/00001.tar?sig=ab/cd"):
        assert (shard, "k") in found and found.count([(shard, ["k", "l"])]) == (1, 1)


def test_keeping_colours_leaves_every_other_draw_as_it_is(uneven: Path) -> None:
    """Hue, gray and solarize go; crops, the other changes and the masks' noise stay those of the same seed."""
    made = []
    for keep in (False, True):
        with contextlib.closing(open_data(uneven, keep_colours=keep)) as data:
            made.append(next(data.batches(None)))
    every, kept = (batch.photometric.table for batch in made)
    assert (every[..., [4, 9, 11]] != 0).any(axis=(0, 1)).all() and not kept[..., [4, 9, 11]].any()
    others = [column for column in range(every.shape[-1]) if column not in (4, 9, 11)]
    assert np.array_equal(every[..., others], kept[..., others]) and every[..., 1:4].any()
    assert torch.equal(made[0].views_uint8, made[1].views_uint8)
    assert torch.equal(made[0].mask_noise, made[1].mask_noise)
    assert list(made[0].text_lengths["plain"]) == [int((ids != 0).sum()) for ids in made[0].token_ids]


def test_windows_are_asked_for_ahead_once_each(uneven: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every byte that is read was asked for before, in one range a window and shard."""
    asked: list[tuple[str, int, int]] = []
    read: list[tuple[str, int, int]] = []
    really_read = ShardReader.read

    def reading(self: ShardReader, requests: Any) -> Any:
        requests = list(requests)
        assert all(any(s == shard and a <= at and at + n <= b for s, a, b in asked) for shard, at, n in requests)
        read.extend(requests)
        return really_read(self, requests)

    monkeypatch.setattr(ShardReader, "will_need", lambda self, *where: asked.append(where))
    monkeypatch.setattr(ShardReader, "read", reading)
    with contextlib.closing(open_data(uneven)) as data:
        stream = data.batches(None)
        for _ in range(STEPS):
            next(stream)
    assert read and len(asked) == len(set(asked)) < len(read) / 10


# What cannot be used


@pytest.fixture
def broken(tmp_path: Path) -> Path:
    """60 samples: number 7 is no image, 20 a cut JPEG, 33 without caption, 41 with a caption that is not UTF-8; and a
    caption without an image, which has no place in the order."""
    members = {}
    for number in range(60):
        content = jpeg(number)
        if number in (7, 20):
            content = b"not an image" if number == 7 else content[: len(content) // 2]
        members[f"{number:03d}.jpg"] = content
        if number != 33:
            members[f"{number:03d}.txt"] = b"\xff\xfe\xfd" if number == 41 else f"number {number}".encode()
    write_tar(tmp_path / "broken.tar", members | {"060.txt": b"no image"})
    return tmp_path


def test_a_bad_sample_is_counted_and_replaced_by_the_same_other_one_everywhere(broken: Path) -> None:
    def run(world_size: int, workers: int) -> tuple[list[list[int]], list[tuple[str, str]]]:
        ids, seen = [], []
        for rank in range(world_size):
            with contextlib.closing(open_data(broken, rank=rank, world_size=world_size, workers=workers)) as data:
                stream = data.batches(None)
                batches = [next(stream) for _ in range(5)]
            ids.append([batch.sample_ids.tolist() for batch in batches])
            seen += [(row["kind"], row["key"]) for batch in batches for row in batch.incidents]
        return [sum((rank_ids[step] for rank_ids in ids), []) for step in range(5)], seen

    alone, seen = run(1, 0)
    assert set(seen) - {("no image", "060")} == {
        ("unreadable", "007"),
        ("unreadable", "020"),
        ("no caption", "033"),
        ("not utf-8", "041"),
    }
    assert all(len(batch) == 12 for batch in alone)
    assert not {7, 20, 33, 41} & set(sum(alone, []))
    assert set(range(60)) - {7, 20, 33, 41} <= set(sum(alone, [])), "what is whole still comes"
    for world_size, workers in ((2, 0), (3, 1)):
        assert run(world_size, workers)[0] == alone


def test_what_indexing_found_is_reported_by_rank_0_once(broken: Path) -> None:
    reported = []
    for rank in range(2):
        with contextlib.closing(open_data(broken, rank=rank, world_size=2)) as data:
            stream = data.batches(None)
            reported.append([row for batch in (next(stream), next(stream)) for row in batch.incidents])
    indexed = [row for row in reported[0] if "indexing" in row["cause"]]
    assert [(row["kind"], row["key"]) for row in indexed] == [("no image", "060")]
    assert not [row for row in reported[1] if "indexing" in row["cause"]]


def test_a_stream_with_nothing_usable_is_an_error_not_a_hang(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", {f"{n}.{suffix}": b"junk" for n in range(80) for suffix in ("jpg", "txt")})
    for workers in (0, 1):
        with contextlib.closing(open_data(tmp_path, workers=workers)) as data:
            stream = data.batches(None)
            pytest.raises(UserError, next, stream).match(r"65 samples in a row cannot be used.*a\.tar")


@pytest.mark.parametrize(
    "build, said",
    [
        (lambda folder: "", r"data\.train"),
        (lambda folder: f"{folder}/{{0..3}}.tar", r"data\.train: no such shard: .*0\.tar"),
        (lambda folder: write_tar(folder / "empty.tar", {}), r"data\.train: .*empty\.tar"),
        (lambda folder: write_shards(folder, (5,))[0], r"data\.train: an epoch has 5 samples, batch\.global_size"),
        (lambda folder: f"{write_shards(folder, (20,))[0]}::", None),
        (lambda folder: "pipe:cat x.tar", r"data\.train: .*training reads by offset, which a pipe has not"),
    ],
)
def test_wrong_sources_are_one_line(build: Any, said: str | None, tmp_path: Path) -> None:
    if said is None:
        open_data(build(tmp_path)).close()
        return
    with pytest.raises(UserError, match=said) as caught:
        open_data(build(tmp_path))
    assert "\n" not in str(caught.value)


def test_wrong_settings_are_named() -> None:
    for changes in (
        {"workers": -1},
        {"max_skip_rate": 2.0},
        {"captions": ["text"]},
        {"weights": [0.0]},
        {"timeout_s": 0},
    ):
        with pytest.raises(ValueError, match=rf"data\.{next(iter(changes))}"):
            DataConfig(**changes)  # type: ignore[arg-type]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_folder_for_copies_that_a_node_has_not_is_one_line(uneven: Path, workers: int) -> None:
    with (
        contextlib.closing(open_data(uneven, workers=workers, stage_dir="/proc/x")) as data,
        pytest.raises(UserError, match="^data.stage_dir: /proc/x/amclip-"),
    ):
        next(iter(data.batches()))


def test_weights_need_one_number_a_source(uneven: Path) -> None:
    with pytest.raises(UserError, match=r"data\.weights: 1 numbers for 2 sources"):
        open_data(f"{uneven}/0.tar::{uneven}/2.tar", weights=[1.0])
    with contextlib.closing(open_data(f"{uneven}/0.tar::{uneven}/2.tar", weights=[2.0, 0.5])) as data:
        assert data.samples_per_epoch == 2 * UNEVEN[0] + UNEVEN[2] // 2


# The index a run finds or makes


def test_a_missing_index_is_made_in_the_runs_folder_and_found_again(tmp_path: Path) -> None:
    write_shards(tmp_path / "data", (20, 20))
    reported: list[str] = []
    for _ in range(2):
        open_data(tmp_path / "data", index_dir=tmp_path / "run", say=reported.append).close()
    assert sum("indexed 40 samples" in line for line in reported) == 1
    assert len(list((tmp_path / "run").iterdir())) == 1
    assert sorted(path.name for path in (tmp_path / "data").iterdir()) == ["0.tar", "1.tar"]


def test_a_shard_that_changed_makes_the_index_again(tmp_path: Path) -> None:
    write_shards(tmp_path / "data", (20, 20))
    reported: list[str] = []
    with contextlib.closing(open_data(tmp_path / "data", index_dir=tmp_path / "run")) as data:
        before = data.fingerprint
    write_shards(tmp_path / "data", (20, 24))
    with contextlib.closing(open_data(tmp_path / "data", index_dir=tmp_path / "run", say=reported.append)) as data:
        assert data.samples_per_epoch == 44 and data.fingerprint != before
    assert any("1.tar: changed since it was indexed: 24 samples now, 20 when" in line for line in reported)


def test_a_named_index_that_is_stale_is_refused(tmp_path: Path) -> None:
    write_shards(tmp_path / "data", (20, 20))
    open_data(tmp_path / "data", index=str(tmp_path / "index")).close()
    assert len(Index(tmp_path / "index")) == 40
    write_shards(tmp_path / "data", (21, 20))
    with pytest.raises(UserError, match=r"data\.index: .*0\.tar: changed since it was indexed.*amclip data index"):
        open_data(tmp_path / "data", index=str(tmp_path / "index"))


def test_moved_shards_are_the_same_data(tmp_path: Path) -> None:
    write_shards(tmp_path / "data", (20, 20))
    with contextlib.closing(open_data(tmp_path / "data", index=str(tmp_path / "index"))) as data:
        ids, fingerprint = next(data.batches(None)).sample_ids.tolist(), data.fingerprint
    shutil.copytree(tmp_path / "data", tmp_path / "elsewhere", copy_function=shutil.copyfile)
    with contextlib.closing(open_data(tmp_path / "elsewhere", index=str(tmp_path / "index"))) as data:
        assert (next(data.batches(None)).sample_ids.tolist(), data.fingerprint) == (ids, fingerprint)


def test_some_shards_of_a_larger_index_can_be_trained_on(tmp_path: Path) -> None:
    write_shards(tmp_path / "data", (20, 20, 20))
    open_data(tmp_path / "data", index=str(tmp_path / "index")).close()
    with contextlib.closing(open_data(tmp_path / "data" / "2.tar", index=str(tmp_path / "index"))) as data:
        ids = next(data.batches(None)).sample_ids
    assert data.samples_per_epoch == 20 and ids.min() >= 40


def test_the_search_is_done_once_for_all_ranks_and_reports_in_between(uneven: Path, monkeypatch: Any) -> None:
    """`once` is called again and again while rank 0 works, so that no collective waits longer than it may."""
    monkeypatch.setattr("amclip_ds.data.prepare.BUILD_REPORTS_EVERY_S", 0.05)
    monkeypatch.setattr("amclip_ds.data.prepare._find_sources", lambda *args: time.sleep(0.4) or "found")
    calls: list[Any] = []

    def once(work: Any) -> Any:
        calls.append(work())
        return calls[-1]

    assert find_sources(DataConfig(train=str(uneven)), print, once) == "found"
    assert len(calls) > 3 and calls[:-1] == [(None, False)] * (len(calls) - 1)


# Workers as processes


def workers_of(data: TrainingData) -> list[psutil.Process]:
    """The living processes that make this process's chunks. One that was just killed is still listed for a moment."""
    own, found = psutil.Process(), []
    for process in own.children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):  # gone since it was listed, or ended and not yet waited for
            if process.ppid() != own.pid and "forkserver" in " ".join(process.cmdline()):
                found.append(process)
    return found


def test_signals_to_the_group_do_not_reach_workers(uneven: Path) -> None:
    # A run starts the server of its workers first of all; in this process another test may have started one that hears.
    forkserver._forkserver._stop()  # type: ignore[attr-defined]
    with contextlib.closing(open_data(uneven, workers=2)) as data:
        stream = data.batches(None)
        for _ in range(8):  # every worker has given something: before its first lines have run, a signal still ends it
            next(stream)
        workers = workers_of(data)
        assert len(workers) == 2
        for process in [*workers, *{worker.parent() for worker in workers}]:
            for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT):
                process.send_signal(number)
        for _ in range(40):
            next(stream)
        assert all(worker.is_running() for worker in workers)


def test_killed_workers_are_replaced_and_the_stream_is_the_same_to_the_bit(uneven: Path) -> None:
    def some(data: TrainingData, kill_after: set[int]) -> list[Batch]:
        batches, stream = [], data.batches(None)
        for number in range(TWO_EPOCHS):
            if number in kill_after:
                for worker in workers_of(data)[: 1 + number % 2]:
                    worker.kill()
            if kill_after and number == 9:  # the server that they are forked from as well
                os.kill(forkserver._forkserver._forkserver_pid, signal.SIGKILL)  # type: ignore[attr-defined]
            batches.append(next(stream))
        return batches

    with contextlib.closing(open_data(uneven, workers=0)) as data:
        expected = some(data, kill_after=set())
    with contextlib.closing(open_data(uneven, workers=2, prefetch=2)) as data:
        found = some(data, kill_after={1, 4, 9})
    for one, other in zip(expected, found, strict=True):
        assert one.cursor == other.cursor
        for name in ("views_uint8", "teacher_uint8", "boxes", "mask_noise", "token_ids", "sample_ids"):
            assert torch.equal(getattr(one, name), getattr(other, name)), name
        assert np.array_equal(one.photometric.table, other.photometric.table)
    reported = [row for batch in found for row in batch.incidents]
    assert {row["kind"] for row in reported} == {"worker_died"}
    assert any("SIGKILL" in row["cause"] for row in reported)


def test_a_place_that_kills_every_worker_is_an_error_not_a_loop() -> None:
    with contextlib.closing(
        Workers(dies_at_the_third, iter(PLACES), number=2, ahead=1, timeout_s=60, died=print)
    ) as workers:
        assert [workers.next(), workers.next()] == [(0, 0, 1), (0, 1, 2)]
        with pytest.raises(AmclipError, match=r"a worker process died \(exit 7\), the 3rd one over the same samples"):
            workers.next()


PLACES = [(0, number, number + 1) for number in range(8)]


def dies_at_the_third(*place: int) -> tuple[int, ...]:
    if place == PLACES[2]:
        os._exit(7)
    return place


def test_a_fault_in_a_worker_is_no_death() -> None:
    with contextlib.closing(Workers(faulty, iter(PLACES), number=1, ahead=1, timeout_s=60, died=pytest.fail)) as made:
        assert made.next() == Fault("data.train: a worker failed: ZeroDivisionError: division by zero")


def faulty(*place: int) -> float:
    return 1 / place[0]


@pytest.mark.skipif(shutil.which("unshare") is None, reason="no unshare")
def test_a_full_dev_shm_is_none_of_the_loaders_business(uneven: Path, tmp_path: Path) -> None:
    """A container's /dev/shm, smaller still: 64 kB, and full. Chunks of 600 kB come all the same."""
    program = tmp_path / "small.py"
    program.write_text(
        "import contextlib\n"
        "from amclip_ds.processes import map_in_processes\n"
        "from tests.unit.data.shards import open_data\n"
        "if __name__ == '__main__':\n"
        "    print(*map_in_processes(abs, [-1, -2, -3], 2))\n"
        f"    with contextlib.closing(open_data({str(uneven)!r}, workers=2, image_size=128)) as data:\n"
        "        stream = data.batches(None)\n"
        "        print(sum(int(next(stream).views_uint8.sum()) > 0 for _ in range(8)))\n"
    )
    shell = 'mount -t tmpfs -o size=64k none /dev/shm && { cat /dev/zero >/dev/shm/full 2>/dev/null; exec "$@"; }'
    argv = ["unshare", "-rm", "sh", "-c", shell, "sh"]
    if subprocess.run([*argv, "true"], capture_output=True).returncode:
        pytest.skip("no mount namespaces here")
    done = subprocess.run(
        [*argv, sys.executable, program],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0 and done.stdout.split() == ["1", "2", "3", "8"], done.stderr


@pytest.mark.slow
def test_a_file_system_that_hangs_is_an_error_within_the_time_limit(tmp_path: Path) -> None:
    """A pipe that nobody writes to in a shard's place: opening it never returns."""
    [shard] = write_shards(tmp_path / "data", (40,))
    with contextlib.closing(open_data(shard, workers=1, timeout_s=12, index_dir=tmp_path)) as data:
        os.unlink(shard)
        os.mkfifo(shard)
        stream, began = data.batches(None), time.monotonic()
        with ThreadPoolExecutor(1) as pool:
            first = pool.submit(next, stream)
            while not (workers := workers_of(data)) and not first.done():
                time.sleep(0.1)
            assert len(workers) == 1 and workers[0].is_running()
            pytest.raises(AmclipError, first.result).match(r"no sample came within data\.timeout_s=12 s")
    assert 12 <= time.monotonic() - began < 180
    assert not psutil.wait_procs(workers, timeout=30)[1], "a worker that hangs is killed, since it hears no signal"


def test_close_ends_the_workers(uneven: Path) -> None:
    data = open_data(uneven, workers=2)
    next(data.batches(None))
    workers = workers_of(data)
    assert len(workers) == 2
    data.close()
    _, alive = psutil.wait_procs(workers, timeout=30)
    assert not alive


def test_workers_die_with_the_process_that_asked_for_them(uneven: Path, tmp_path: Path) -> None:
    program = (
        "import os, sys, psutil\n"
        "from tests.unit.data.shards import open_data\n"
        "from tests.unit.data.test_loader import workers_of\n"
        f"data = open_data({str(uneven)!r}, workers=2)\n"
        "stream = data.batches(None)\n"
        "next(stream)\n"
        "print(*[worker.pid for worker in workers_of(data)], flush=True)\n"
        "os.kill(os.getpid(), 9)\n"
    )
    file = tmp_path / "parent.py"
    file.write_text(f"if __name__ == '__main__':\n    {program.replace(chr(10), chr(10) + '    ')}")
    root = Path(__file__).resolve().parents[3]
    done = subprocess.run(
        [sys.executable, file],
        cwd=root,
        env=os.environ | {"PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    pids = [int(pid) for pid in done.stdout.split()]
    assert done.returncode == -9 and len(pids) == 2, done.stderr
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline and any(_runs(pid) for pid in pids):
        time.sleep(0.1)
    assert not any(_runs(pid) for pid in pids)


def _runs(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_the_mask_of_signals_is_the_callers_own_again(uneven: Path) -> None:
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    open_data(uneven, workers=1).close()
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == before


READ_ONLY = """
import subprocess, sys
from pathlib import Path
from tests.unit.data.shards import open_data, write_shards
data, elsewhere = Path(sys.argv[1]), Path(sys.argv[2])
subprocess.run(["mount", "-t", "tmpfs", "none", data], check=True)
write_shards(data, (20, 30))
subprocess.run(["mount", "-o", "remount,ro", data], check=True)
for index_dir in (elsewhere, None):  # the run's folder, else where the command was typed
    loaded = open_data(data, index_dir=index_dir)
    assert len(next(loaded.batches(None)).sample_ids) == 12
    loaded.close()
"""


def test_shards_that_cannot_be_written_beside_are_indexed_elsewhere(tmp_path: Path) -> None:
    """Others' data on a read-only file system, for real: a mount of its own."""
    data, elsewhere, here = (tmp_path / name for name in ("data", "run", "here"))
    for folder in (data, elsewhere, here):
        folder.mkdir()
    alone = ["unshare", "--mount"]
    if shutil.which("unshare") is None or subprocess.run([*alone, "true"], capture_output=True).returncode:
        pytest.skip("no mount namespace can be made here (not root?)")
    done = subprocess.run(
        [*alone, sys.executable, "-c", READ_ONLY, data, elsewhere],
        cwd=here,
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert [len(list(folder.glob("*/meta.json"))) for folder in (elsewhere, here)] == [1, 1]
