"""What a report says of a run: its verdict, its time, its events with cause and effect, and nothing of a stranger's."""

import json
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from amclip_ds import cli
from amclip_ds.errors import RunStopped, UserError
from amclip_ds.jsonl import encode, read_lines
from amclip_ds.plain_yaml import flat
from amclip_ds.record import evaluation_lines
from amclip_ds.report import charts, events
from amclip_ds.report.page import (
    HERE,
    MAX_EVENTS,
    MAX_LOSSES,
    classes,
    differences,
    evaluations,
    marks,
    page,
    run_page,
    shorten,
    tiles,
    write_report,
)
from amclip_ds.report.read import read_run
from amclip_ds.report.time_spent import PARTS, attempts_of, goodput, total
from amclip_ds.run_folder import write_verdict_at_end
from tests.unit.report.runs import EPOCH, event, eventful, incident, long, metrics_row


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return eventful(tmp_path_factory.mktemp("runs") / "eventful")


def test_time_adds_up_to_the_clock(run: Path) -> None:
    """Attempt 0: 72 s, of which 10 s of steps were made again; 100 s of queue less the 10 of imports; attempt 1: 95."""
    attempts = attempts_of(read_run(run))
    first, second = attempts
    assert (first.wall_s, second.wall_s) == (pytest.approx(72), pytest.approx(95))
    assert first.seconds["again"] == pytest.approx(10) and first.seconds["save"] == pytest.approx(2)
    assert first.seconds["start"] == pytest.approx(30) and second.seconds["start"] == pytest.approx(20)
    assert second.seconds["compute"] == pytest.approx(70 * 0.7) and second.seconds["data"] == pytest.approx(7)
    assert (second.first_step, second.last_step, second.world_size, second.code) == (30, 100, 2, 0)
    sums = total(attempts)
    assert sums["between"] == pytest.approx(100) and sum(sums.values()) == pytest.approx(72 + 100 + 95)
    assert goodput(sums) == pytest.approx(0.9 * 100 / 267)


def test_every_part_of_the_time_has_its_colour() -> None:
    style = (HERE / "page.css").read_text()
    assert [part for part in PARTS if f".t-{part} {{ background:" not in style] == []


def test_an_evaluation_before_training_is_counted_once(tmp_path: Path) -> None:
    """As one that a resume makes up: it is among the evaluations, and no part of the start."""
    run = eventful(tmp_path / "run")
    rows = list(read_lines(run / "timeline.jsonl", {}, 1 << 20))
    place = next(n for n, row in enumerate(rows) if row["attempt"] == 1 and row["event"] == "training")
    rows.insert(place, rows[place] | {"event": "evaluate", "seconds": 8.0})
    (run / "timeline.jsonl").write_bytes(b"".join(map(encode, rows)))
    attempt = attempts_of(read_run(run))[1]
    assert attempt.seconds["start"] == pytest.approx(12) and attempt.seconds["evaluate"] == pytest.approx(13)
    assert sum(attempt.seconds.values()) == pytest.approx(attempt.wall_s) == pytest.approx(95)


def test_the_last_evaluation_is_of_the_newest_step_and_a_probe_is_named(tmp_path: Path) -> None:
    """Also where `amclip eval` evaluates an older checkpoint later, or a probe, whose accuracy has the same name."""
    run = eventful(tmp_path / "run")
    rows = [
        {"step": step, "weights": "student", "dataset": "pets", "task": task, "metrics": {"acc1": step / 100}}
        | {"main_metric": "acc1", "per_class": {"a": [1, 2], "b": [step, 100]}}
        for step, task in [(n, "zeroshot_classification") for n in (20, 40, 30)] + [(n, "knn") for n in (25, 15)]
    ]
    for name, lines in evaluation_lines(rows).items():
        (run / name).write_bytes(lines)
    facts = read_run(run)
    attempts = attempts_of(facts)
    shown = {name: value for name, value, _ in tiles(facts, attempts, total(attempts), []) if name.startswith("top-1")}
    assert shown == {"top-1 accuracy, pets, student": "40.0%", "top-1 accuracy, pets, knn, student": "25.0%"}
    chart = next(chart for chart in evaluations("r", facts) if chart)
    last = {line.name: line.last for line in chart.lines if "pets, " in line.name and "chance" not in line.name}
    assert last == {"pets, student": 0.4, "pets, knn, student": 0.25}
    assert [row["step"] for row in facts.evaluations] == [15, 20, 25, 30, 40]
    assert {classes(row)["title"] for row in facts.classes} == {"pets, student, step 40", "pets, knn, student, step 25"}
    both = page([facts, read_run(eventful(tmp_path / "other"))])
    assert "run: pets, knn, student" in both and "run: pets, student" in both


def test_every_event_has_its_cause_and_effect(run: Path) -> None:
    facts = read_run(run)
    reported = {found.what: found for found in events.events_of(facts, attempts_of(facts))}
    assert reported["broken image"].count == 3 and "/data/b.tar" in reported["broken image"].cause
    loss = reported["non finite loss"]
    assert loss.effect == "skipped on all ranks" and "from rank 1" in loss.cause
    assert loss.command == f"amclip samples {run} 35 --worst 10" and not reported["broken image"].command
    assert "SIGTERM" in reported["attempt 0 ends with code 75"].cause
    resumed = next(found for name, found in reported.items() if name.startswith("attempt 1 starts"))
    assert resumed.effect == (
        "resumes from step 30; steps 31 to 40 are made again; the world changes from 4 to 2 ranks; batch and order of"
        " samples stay"
    )
    assert reported["checkpoint"].effect == "training waited 2.0 s", "the three waits of one save are one event"
    listed = [found for found in events.events_of(facts, attempts_of(facts)) if found.kind == events.SAVE]
    assert [(found.step, found.attempt) for found in listed] == [(30, 0)], "a commit is no checkpoint"
    assert [mark.text for mark in marks(facts, listed) if mark.kind == events.SAVE] == ["step 30: checkpoint"]
    order = [found.time for found in events.events_of(facts, attempts_of(facts))]
    assert order == sorted(order)


def test_the_ledger_counts_a_sample_once_though_a_resume_reports_it_again(run: Path, tmp_path: Path) -> None:
    again = eventful(tmp_path / "run")
    incident(again, 0, 1, 31, "broken image", "cannot be decoded", shard="/data/b.tar", key="000")
    assert [(loss.shard, loss.kind, loss.count) for loss in events.lost_samples(read_run(again))] == [
        ("/data/b.tar", "broken image", 3)
    ]


def test_many_samples_of_one_kind_are_held_as_one(tmp_path: Path) -> None:
    """What the report holds does not grow with the samples that a run lists; all are counted."""
    folder = eventful(tmp_path / "run")
    with (folder / "incidents.jsonl").open("ab") as file:
        for number in range(5000):
            facts = {"step": number % 90, "attempt": 0, "kind": "broken image", "cause": f"byte {number}"}
            more = {"shard": f"{number % 2}.tar", "key": str(number), "action": "replaced"}
            file.write(encode(facts | more))
    run = read_run(folder)
    assert len(run.incidents.alike) == 3 and len(run.incidents.lost) == 3 and len(run.incidents.at_steps) <= 91
    counts = {event.cause: event.count for event in events.events_of(run, attempts_of(run)) if event.count > 1}
    assert counts == {"cannot be decoded: 000 in /data/b.tar": 3, "byte 0: 0 in 0.tar": 5000}
    assert [loss.count for loss in events.lost_samples(run)] == [2500, 2500, 3]
    marked = [mark.text for mark in marks(run, []) if mark.kind == events.INCIDENT]
    assert sum(int((re.search(r"\((\d+)\)$", text) or [0, 1])[1]) for text in marked) == 5004


def test_what_befell_a_whole_batch_is_one_incident(tmp_path: Path) -> None:
    """Every rank lists its samples where none is to blame. Steps of one cause are one row."""
    folder = eventful(tmp_path / "run")
    for step in (60, 61):
        for rank in range(4):
            facts = {"rank": rank, "action": "skipped on all ranks", "key": str(rank)}
            incident(folder, 0, 1, step, "non_finite_gradient", f"step {step}: summed over the ranks", **facts)
    run = read_run(folder)
    assert run.incidents.at_steps["non_finite_gradient", 60] == 1
    found = events.events_of(run, attempts_of(run))
    gradient = next(event for event in found if event.what == "non finite gradient")
    assert (gradient.step, gradient.until, gradient.count, gradient.cause) == (60, 61, 2, "summed over the ranks")
    shown = {name: value for name, value, _ in tiles(run, [], total([]), found)}
    assert shown["incidents"] == "6", "3 samples, a loss, 2 gradients"


def test_a_short_time_line_has_every_start_and_end_and_the_newest_incidents(tmp_path: Path) -> None:
    folder = eventful(tmp_path / "run")
    for step in range(1, 1000):
        incident(folder, EPOCH + 20 + step / 100, 0, step, "loss_spike", f"step {step}: loss {step} leapt over 1")
        incident(folder, EPOCH + 182 + step / 100, 1, step, "straggler", f"rank {step} is slow")
    run = read_run(folder)
    found = events.events_of(run, attempts_of(run))
    shown = shorten(found)
    assert len(found) > 2000 and len(shown) == MAX_EVENTS and shown == sorted(shown, key=found.index)
    kinds = [event.kind for event in shown]
    assert kinds.count(events.START) == 2 and kinds.count(events.END) == 2
    assert {"loss 1 leapt over 1", "rank 999 is slow"} <= {event.cause for event in shown}
    made = run_page("r", run)
    assert len(made.slow_ranks) == MAX_LOSSES and made.num_slow == 999
    assert f"{999 - MAX_LOSSES} more rows are in" in page([run])
    many = [replace(event, kind=events.START) for event in found]
    assert len(shorten(many)) == MAX_EVENTS // 2, "a run that starts again and again"


@pytest.mark.parametrize(
    "verdict, line",
    [
        ({"code": 3, "step": 9, "reason": "guards.max_skipped: 5"}, "The run stopped itself (guards, data limits)"),
        ({"code": 75, "step": 9, "reason": "SIGTERM"}, "Stopped from outside after a committed checkpoint"),
        (None, "Ended without a verdict"),
    ],
)
def test_the_verdict_comes_first(verdict: dict | None, line: str, tmp_path: Path) -> None:
    folder = eventful(tmp_path / "run")
    (folder / "exit.json").unlink()
    (folder / "owner.json").write_text('{"released": true}')
    if verdict:
        (folder / "exit.json").write_text(json.dumps(verdict))
    facts = read_run(folder)
    headline, reason, is_well = events.describe_verdict(facts, attempts_of(facts))
    assert headline.startswith(line) and is_well == bool(verdict and verdict["code"] == 75)
    text = page([facts])
    assert text.index(line) < text.index("Where the time went"), "the verdict is the first thing to read"


def test_the_samples_of_the_last_logged_step_say_which_it_is(tmp_path: Path) -> None:
    """A run that stops between two logged steps has seen more."""
    folder = eventful(tmp_path / "run")
    assert "by step 100" not in page([read_run(folder)])
    (folder / "exit.json").write_text(json.dumps({"code": 75, "step": 104, "attempt": 1, "reason": "SIGTERM"}))
    assert "by step 100" in page([read_run(folder)])


def test_a_run_that_has_just_begun_or_has_no_new_files_has_a_report(tmp_path: Path) -> None:
    """Settings alone; then a folder of before there was a time line."""
    folder = eventful(tmp_path / "run")
    for file in folder.iterdir():
        if file.name != "config.yaml":
            file.unlink()
    assert "Not started" in page([read_run(folder)])
    (folder / "metrics.jsonl").write_text(json.dumps(metrics_row(10, 0, 0.0)) + "\n{torn\n")
    text = page([read_run(folder)])
    assert "At work: step 10" in text and "metrics.jsonl 1" in text, "what could not be read is counted"


def test_a_folder_that_is_none_is_the_users_mistake(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for run in ("a", "b"):
        (tmp_path / "runs" / run / "checkpoints" / "step_00000001").mkdir(parents=True)
        for folder in ("", "checkpoints/step_00000001"):
            (tmp_path / "runs" / run / folder / "config.yaml").touch()
        (tmp_path / "runs" / run / "checkpoints" / "step_00000001" / "manifest.json").touch()
    meant = f"; a run is {tmp_path}/runs/a"
    for folder, said in (
        ("", "not a run's folder: it has no config.yaml"),
        ("typo", "missing"),
        ("runs", f"not a run's folder: it has no config.yaml{meant} (and 1 more)"),
        ("runs/a/checkpoints", f"not a run's folder: it has no config.yaml{meant}"),
        ("runs/a/checkpoints/step_00000001", f"a checkpoint; name its run, {tmp_path}/runs/a"),
    ):
        assert cli.main(["report", str(tmp_path / folder)]) == 2
        assert capsys.readouterr().err == f"amclip report: {tmp_path / folder}: {said}\n", "no option that nobody gave"


def test_the_command_writes_where_it_says(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["report", str(run)]) == 0
    assert f"its samples: <code>amclip samples {run} 35 " in (run / "report.html").read_text()
    assert (run / "report.html").is_file() and str(run / "report.html") in capsys.readouterr().out
    with pytest.raises(UserError, match="--out"):
        write_report([run], tmp_path / "no" / "folder.html")


@pytest.mark.parametrize(
    "file, wrong",
    [
        ("timeline.jsonl", {"step": 30, "attempt": 1, "event": "save", "seconds": None}),
        ("timeline.jsonl", {"step": 30, "attempt": 1, "event": "save", "time": "noon", "seconds": 1e308}),
        ("timeline.jsonl", {"step": 10**400, "attempt": 1, "event": "save"}),
        ("incidents.jsonl", {"step": 3, "attempt": 0, "kind": "k", "cause": "c", "time": 10**400}),
        ("incidents.jsonl", {"step": 3, "attempt": 0, "kind": "k", "cause": "c", "time": [], "shard": {}}),
        ("metrics.jsonl", {"step": 10**400, "attempt": 1, "loss": 1.0}),
        ("metrics.jsonl", {"step": 102, "attempt": 1, "loss": -1e308}),
        ("eval.jsonl", {"metrics": {"acc1": 10**400}}),
        ("eval.jsonl", {"intervals": [0.4, 0.6]}),
        ("eval.jsonl", {"intervals": {"acc1": 3}}),
        ("eval_classes.jsonl", {"confusions": 5}),
        ("pictures/masks.jsonl", {"scores": [7, 7, 7]}),
        ("exit.json", {"code": 0, "step": 10**400}),
        ("plan.json", {"predicted": {"peak_gib": 10**400}, "measured": {"peak_gib": 1.5}}),
    ],
)
def test_a_value_of_another_type_costs_its_own_place_alone(file: str, wrong: dict, tmp_path: Path) -> None:
    folder = eventful(tmp_path / "run")
    (folder / "pictures").mkdir()
    held = {"grid": 8, "masks": [], "samples": [{"caption": "c", "teacher": "t.webp", "views": []}]}
    (folder / "pictures" / "samples.json").write_text(json.dumps(held))
    of_file = read_lines(folder / file)[-1] if file.startswith("eval") else {"kept": [], "step": 100}
    with (folder / file).open("w" if file.endswith(".json") else "a") as opened:
        opened.write(json.dumps(of_file | wrong) + "\n")
    text = page([read_run(folder)])
    assert "of 100" in text and "non finite loss" in text


def test_nothing_of_a_run_becomes_markup(tmp_path: Path) -> None:
    """Class names, keys, causes, settings and a folder's name are shown, whatever they hold."""
    folder = eventful(tmp_path / "<img src=x onerror=alert(1)>")
    evil = "</script><script>alert(1)</script>\x1b[31m\u202e"
    incident(folder, 0, 1, 3, evil, evil, shard=evil, key=evil, action=evil)
    event(folder, 0, 1, 3, "end", code=1, reason=evil)
    text = page([read_run(folder)])
    assert "<script>alert" not in text and "<img src=x" not in text and "<b>square" not in text
    assert "\x1b" not in text and "\u202e" not in text
    assert "blue &lt;b&gt;square" in text and "&lt;/script&gt;" in text


def test_the_page_names_no_place_to_ask(run: Path) -> None:
    text = page([read_run(run)])
    outside = re.sub(r"http://www\.w3\.org/2000/svg", "", text)
    assert not re.search(r"https?:|//[a-z]+\.|@import|url\(|<link(?! rel=\"icon\" href=\"data:)|<iframe", outside)
    assert "default-src 'none'" in text


@pytest.mark.slow
def test_a_long_runs_page_is_small(tmp_path: Path) -> None:
    """100,000 rows of metrics, 1,000 incidents and saves: under 1.5 MB."""
    out = tmp_path / "long.html"
    assert write_report([long(tmp_path / "run")], out) < 1_500_000
    assert "more events are in" in out.read_text()


def test_runs_are_compared(run: Path, tmp_path: Path) -> None:
    other = eventful(tmp_path / "other")
    config = (other / "config.yaml").read_text()
    assert "lr: " in config
    (other / "config.yaml").write_text(re.sub(r"\blr: .*", "lr: 0.5", config))
    (other / "versions.json").write_text(json.dumps({"torch": "9"}))
    facts = [read_run(run), read_run(other)]
    reported = dict(differences(facts))
    assert reported["optim.lr"][1] == "0.5" and reported["version of torch"] == ["2.13.0", "9"]
    assert set(reported) == {"optim.lr", "run.out", "version of torch"}
    text = page(facts)
    assert "2 runs compared" in text and text.count('role="tablist"') == 3


@pytest.mark.parametrize("most", [5, 700])
def test_a_curve_keeps_its_extremes_and_its_gaps(most: int) -> None:
    values = [1.0] * 1000
    values[500], values[700] = 9.0, float("nan")
    points = charts.buckets(range(1000), values, most)
    assert max(point[3] for point in points if point) == 9.0 and min(point[2] for point in points if point) == 1.0
    assert len(points) <= most + 1
    few = charts.buckets([1, 2, 3], [1.0, float("nan"), 3.0])
    assert few[1] is None and charts.draw("a", "a", "", [("a", few)], steps=(0, 3)).lines[0].path.count("M") == 2  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "low, high, is_log, found",
    [
        (0, 100, False, [0, 20, 40, 60, 80, 100]),
        (0, 1, True, [1, 2, 5, 10]),
        (-3, 3, True, [1e-2, 1, 1e2]),
    ],
)
def test_ticks_are_round(low: float, high: float, is_log: bool, found: list[float]) -> None:
    places = charts.ticks(low, high, 5, is_log)
    assert [10**place if is_log else place for place in places] == pytest.approx(found)


def test_words() -> None:
    assert [charts.number(x) for x in (0, 0.25, 12345.6, 4.1e-6, float("nan"))] == [
        "0",
        "0.25",
        "12,346",
        "4.1e-6",
        "none",
    ]
    assert flat({"a": {"b": 1, "c": [{"d": 2}]}, "e": [1, 2]}) == {"a.b": 1, "a.c.0.d": 2, "e": [1, 2]}


def test_a_report_that_cannot_be_written_ends_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The verdict stays what it is; the line says how to get the report."""
    folder = eventful(tmp_path / "run")
    (folder / "report.html").mkdir()
    state = SimpleNamespace(step=100)
    with write_verdict_at_end(folder, 1, state, is_main=True):
        pass
    assert json.loads((folder / "exit.json").read_text())["code"] == 0
    assert f"`amclip report {folder}` writes it" in capsys.readouterr().err
    (folder / "report.html").rmdir()
    with pytest.raises(RunStopped), write_verdict_at_end(folder, 1, state, is_main=True):
        raise RunStopped("guards.max_skipped: enough")
    assert "guards.max_skipped: enough" in (folder / "report.html").read_text()
