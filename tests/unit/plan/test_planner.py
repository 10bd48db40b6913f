"""The plan: peaks against those measured on a GPU, what fits and what is recommended, and the command."""

import dataclasses
import json
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest

from amclip_ds import config
from amclip_ds.cli import main
from amclip_ds.optim import NAMES, parameter_groups
from amclip_ds.plan import optimizer, shown, work
from amclip_ds.plan.gpus import AS_MEASURED, GPUS, MEASURED, Gpu, _work_of, gpu_of, rate_of
from amclip_ds.plan.model_state import averaged_by_rank, reduced_by_rank, sizes_of, state_of, trained_elements
from amclip_ds.plan.planner import GIB, Ask, Plan, communication_bytes, make_plan, memory_of
from amclip_ds.plan.work import work_of

RECOMPUTED = ["model.vision.checkpoint_every=1", "model.text.checkpoint_every=1"]
PEAKS = [  # docs/results/gpu-step.md and the table of one H100: GiB that torch had allocated at most
    ("aclip-vitb16", 1, 256, [], 23.1),
    ("aclip-vitb16", 2, 256, [], 23.1),
    ("aclip-vitb16", 3, 256, [], 23.5),
    ("aclip-vitb16", 1, 256, RECOMPUTED, 6.4),
    ("aclip-vitb16", 2, 256, RECOMPUTED, 6.6),
    ("aclip-vitb16", 3, 256, RECOMPUTED, 6.8),
    ("aclip-vitl16", 1, 128, ["model.vision.checkpoint_every=0"], 29.2),
    ("aclip-vitl16", 2, 128, ["model.vision.checkpoint_every=0"], 29.2),
    ("aclip-vitl16", 3, 128, ["model.vision.checkpoint_every=0"], 30.0),
    ("aclip-vitl16", 1, 128, RECOMPUTED, 10.5),
    ("aclip-vitl16", 2, 128, RECOMPUTED, 10.6),
    ("aclip-vitl16", 3, 128, RECOMPUTED, 10.8),
    ("clip-vitb16", 1, 256, [], 21.1),
    ("aclip-eff-vitb16", 1, 256, [], 23.1),
    ("aclip-vitb16", 1, 256, ["engine.compile=block"], 22.2),
]


@pytest.mark.parametrize(("recipe", "stage", "batch", "words", "measured"), PEAKS)
def test_the_peak_is_what_was_measured(recipe: str, stage: int, batch: int, words: list[str], measured: float) -> None:
    settings = config.load(
        recipe,
        [
            *(word for word in AS_MEASURED if word.split("=")[0] not in {given.split("=")[0] for given in words}),
            *words,
            f"batch.global_size={batch}",
            f"batch.per_gpu={batch}",
            f"engine.deepspeed=zero{stage}_bf16.json",
            "data.workers=0",  # a batch that stays
        ],
    )
    assert memory_of(work_of(settings, 1)).peak / GIB == pytest.approx(measured, rel=0.06)


COMPILED_PEAKS = [  # docs/results/gpu-compiled.md: with every saving, towers compiled
    ("aclip-vitb16", 1, 256, 20.71),
    ("aclip-eff-vitb16", 1, 256, 20.66),
    ("clip-vitb16", 1, 256, 18.9),
    ("aclip-vitl16", 1, 128, 27.8),
    ("aclip-vitb16", 3, 256, 21.3),
]


@pytest.mark.parametrize(("recipe", "stage", "batch", "measured"), COMPILED_PEAKS)
def test_the_peak_of_compiled_towers_is_what_was_measured(recipe: str, stage: int, batch: int, measured: float) -> None:
    words = [f"batch.global_size={batch}", f"batch.per_gpu={batch}", f"engine.deepspeed=zero{stage}_bf16.json"]
    words += ["model.vision.checkpoint_every=0", "model.text.checkpoint_every=0", "data.workers=0"]
    settings = config.load(recipe, words)
    assert memory_of(work_of(settings, 1)).peak / GIB == pytest.approx(measured, rel=0.02)


def test_another_model_does_not_fit_the_measured_peak() -> None:
    """The twin."""
    settings = config.load("aclip-vitl16", ["batch.global_size=128", "batch.per_gpu=128", *RECOMPUTED])
    assert memory_of(work_of(settings, 1)).peak / GIB != pytest.approx(29.2, rel=0.5)


def test_operations_are_those_of_the_measured_steps() -> None:
    measured = [("aclip-vitb16", 256, 40.8), ("clip-vitb16", 256, 31.6), ("aclip-eff-vitb16", 256, 34.0)]
    for recipe, batch, tflop in [*measured, ("aclip-vitl16", 128, 65.9)]:
        settings = config.load(recipe, [f"batch.global_size={batch}", f"batch.per_gpu={batch}", *AS_MEASURED])
        assert work.flops_of(work_of(settings, 1)).model / 1e12 == pytest.approx(tflop, abs=0.06)


@pytest.mark.parametrize("row", MEASURED, ids=str)
def test_a_measured_cell_is_found_again(row: Any) -> None:
    step = _work_of(row)
    rate = rate_of(GPUS[row.gpu], step)
    assert rate is not None
    assert row.batch / rate.step_s(step) == pytest.approx(row.samples_per_s, rel=0.15)


@pytest.mark.parametrize(
    ("words", "gpus", "mode", "is_compiled"),
    [
        (["engine.deepspeed=zero1_bf16.json"], 8, "tower", True),
        (["engine.deepspeed=zero3_bf16.json"], 1, "tower", True),
        (["engine.deepspeed=zero3_bf16.json"], 8, "block", False),
        (["engine.deepspeed=zero3_bf16_offload.json"], 1, "block", None),
        (["engine.deepspeed=zero3_bf16.json", "engine.compile=none"], 1, "none", False),
        (["engine.deepspeed=zero0_fp32.json"], 1, "none", None),
    ],
)
def test_the_speed_is_of_what_the_run_compiles(
    words: list[str], gpus: int, mode: str, is_compiled: bool | None
) -> None:
    """What `auto` means is the engine's own rule; compiled blocks were not measured. None: nor was what is in fp32, or
    offloaded."""
    step = work_of(config.load("aclip-vitb16", words), gpus)
    assert step.compile_mode == mode
    rate = rate_of(GPUS["h100"], step)
    assert (rate and rate.is_compiled) == is_compiled


def ask(gpus: int = 8, name: str = "h100", **more: Any) -> Ask:
    return Ask(gpus=gpus, gpu=GPUS[name], gpus_per_node=8, **more)


def plan(recipe: str, *words: str, **more: Any) -> Plan:
    return make_plan(config.load(recipe, list(words)), ask(**more))


def test_the_lowest_stage_that_fits_is_recommended() -> None:
    found = plan("aclip-vitb16")
    assert found.recommended == 1 and found.settings == []
    assert plan("aclip-vitb16", "engine.deepspeed=zero2_bf16.json").settings == ["engine.deepspeed=zero1_bf16.json"]
    assert plan("aclip-tiny", "batch.global_size=64").recommended == 0  # fp32


def test_a_higher_stage_where_the_state_is_large() -> None:
    words = ["model.vision.name=vit_gigantic_patch14_224", "batch.per_gpu=2", "batch.global_size=64"]
    small = Gpu("small", 12.0, None, None)
    found = make_plan(config.load("aclip-vitl16", words), Ask(gpus=8, gpu=small, gpus_per_node=8))
    assert found.recommended is not None and found.recommended >= 2
    assert not found.stages[0].fits and found.stages[found.recommended].fits


def test_a_smaller_micro_batch_where_the_activations_are_large() -> None:
    found = plan("aclip-vitb16", "batch.per_gpu=512", name="l4")
    assert not found.stages[1].fits
    largest = found.stages[found.recommended or 0].largest_per_gpu
    assert largest and 512 % largest == 0 and f"batch.per_gpu={largest}" in found.settings
    again = plan("aclip-vitb16", *found.settings, name="l4")
    assert again.stages[again.recommended or 0].fits and again.settings == []


def test_the_numbers_are_those_of_what_is_recommended() -> None:
    """Not of the batch that does not fit, which a second forward would not slow down."""
    small = dataclasses.replace(GPUS["h100"], memory_gib=15.0)

    def made(*words: str) -> Plan:
        return make_plan(config.load("aclip-vitb16", ["run.steps=1000", *words]), Ask(8, small, 8))

    found = made("batch.per_gpu=512")
    again = made(*found.settings)
    assert found.settings == ["batch.per_gpu=128"] and again.settings == []
    assert found.chosen.memory.peak == again.chosen.memory.peak and found.chosen.fits
    time = found.time_of(found.chosen)
    assert time["hours"] and time == again.time_of(again.chosen)
    assert found.json()["chosen"] == again.json()["chosen"]
    assert list(shown.explain(found)) == list(shown.explain(again))
    assert found.time_of(found.stages[1])["hours"] is None  # it does not fit: no step is made
    printed = "\n".join(shown.lines(found, "aclip-vitb16"))
    assert f"{time['samples_per_s']:,.0f} samples/s" in printed


def test_a_batch_that_divides_by_nothing_but_one_is_not_taken_one_by_one() -> None:
    """4,024 = 8 x 503."""
    found = plan("aclip-vitb16", "batch.global_size=4024", "batch.per_gpu=512", name="l4")
    largest = found.stages[found.recommended or 0].largest_per_gpu
    assert largest and largest > 100 and 503 % largest and f"batch.per_gpu={largest}" in found.settings
    again = plan("aclip-vitb16", *found.settings, "batch.global_size=4024", name="l4")
    assert again.stages[again.recommended or 0].fits and again.settings == []


def test_nothing_fits() -> None:
    tiny = Gpu("small", 1.2, None, None)
    found = make_plan(config.load("aclip-vitb16"), Ask(gpus=1, gpu=tiny, gpus_per_node=1))
    assert found.recommended is None and any("nothing fits" in note for note in found.notes)
    assert found.json()["recommended"] is None
    none = make_plan(config.load("aclip-vitb16"), Ask(1, dataclasses.replace(GPUS["h100"], memory_gib=1.2), 1))
    assert not any(line.startswith("speed:") for line in shown.lines(none, "aclip-vitb16"))


def test_an_optimizer_that_cannot_step_in_host_memory_is_planned_where_it_can() -> None:
    found = plan("aclip-tiny", "optim.name=lion", "engine.deepspeed=zero2_fp32_offload.json")
    assert list(found.stages) == [0, 1] and set(found.impossible) == {2, 3} and found.recommended in (0, 1)
    assert "cannot step in host memory" in found.impossible[2]


def test_muon_and_lion_hold_less_than_adamw() -> None:
    """Of ViT-B's 177 M trained parameters 120 matrices of the blocks are Muon's: one moment in place of two; at stages
    1 and 2 in the gradients' dtype, and twice."""
    state: dict[str, list[float]] = {}
    for name in ("adamw", "muon", "lion"):
        of_stages = [
            [f"optim.name={name}", f"engine.deepspeed=zero{n}_{'bf16' if n else 'fp32'}.json"] for n in range(4)
        ]
        loaded = [config.load("aclip-vitb16", words) for words in of_stages]
        state[name] = [state_of(work_of(one, 1))["moments"] for one in loaded]
        assert optimizer.muon_elements(work_of(loaded[0], 1)) == (name == "muon") * 122_683_392
    for number in (0, 3):
        assert state["adamw"][number] - state["muon"][number] == 4 * 122_683_392
    for number in (1, 2):
        assert state["adamw"][number] - state["muon"][number] == (8 - 2 * 2) * 122_683_392
    assert all(state["lion"][number] == state["adamw"][number] / 2 for number in range(4))


def test_muons_updates_are_beside_the_gradients_at_stages_1_and_2() -> None:
    """On two ranks, of which both hold some of a: its gradient is whole on both, and so is its update."""
    trained, groups, of_muon = {"a": 6, "b": 4, "other": 10, "more": 10}, [["a", "b"], ["other", "more"]], [["a", "b"]]
    assert reduced_by_rank(trained, groups, [], 2, 2) == (6 + 10, 6 + 4 + 10)
    assert reduced_by_rank(trained, groups, of_muon, 2, 2) == (2 * 6 + 10, 2 * (6 + 4) + 10)
    assert reduced_by_rank(trained, groups, of_muon, 2, 1) == (30, 30), "before the reduction all gradients are there"
    assert reduced_by_rank(trained, groups, of_muon, 1, 1) == (30 + 10,)
    assert reduced_by_rank(trained, groups, [], 1, 1) == (30,)


def test_what_muon_sends_and_computes_beside_the_model() -> None:
    sharded = "engine.deepspeed=zero3_bf16.json"
    adamw, muon = (config.load("aclip-vitl16", [sharded, f"optim.name={name}"]) for name in ("adamw", "muon"))
    matrices = optimizer.muon_shapes(work_of(muon, 8))
    assert (
        (3072, 1024) in matrices and len(matrices) == 24 * 4 + 12 * 6 and not optimizer.muon_shapes(work_of(adamw, 8))
    )
    added = communication_bytes(work_of(muon, 8)) - communication_bytes(work_of(adamw, 8))
    assert added > 4 * 4 * optimizer.muon_elements(work_of(muon, 8)) * 7 / 8
    n, m = 1024.0, 3072.0
    one = 5 * (4 * n * n * m + 2 * n**3)
    assert optimizer.muon_flops(work_of(muon, 8)) > 24 * one
    notes = plan("aclip-vitl16", sharded, "optim.name=muon").notes
    assert sum("Newton-Schulz over 168 matrices" in note for note in notes) == 1
    assert not any("muon" in note for note in plan("aclip-vitl16").notes)


def test_learning_rates_for_another_batch() -> None:
    found = plan("aclip-vitb16", "batch.global_size=16384", "optim.name=muon")
    rates = found.json()["learning_rate"]
    assert rates["configured"] == 5e-4 and rates["square_root"] == pytest.approx(1e-3)
    assert rates["proportion"] == pytest.approx(2e-3) and rates["rule"] == "square root"
    said = "\n".join(shown.lines(found, "aclip-vitb16"))
    assert "optim.lr=0.0005 at 16,384 samples a step" in said and "muon: the square root" in said
    for name in NAMES:
        assert "learning rate" in "\n".join(shown.lines(plan("aclip-tiny", f"optim.name={name}"), "x"))


def test_a_warm_up_that_a_small_data_set_never_leaves() -> None:
    """Twin: with enough samples the same recipe leaves it."""

    def said(samples: int) -> str:
        return "\n".join(shown.lines(plan("aclip-vitb16", samples=samples), "x"))

    assert "the run has 25: optim.lr is never reached; optim.warmup_steps=1 is a twentieth" in said(5_000)
    assert "never reached" not in said(15_000_000)


def test_accumulation_costs_a_second_forward_and_less_memory() -> None:
    whole, split = plan("aclip-vitb16", "batch.per_gpu=512"), plan("aclip-vitb16", "batch.per_gpu=128")
    assert whole.stages[1].memory.activations > 3 * split.stages[1].memory.activations
    assert whole.stages[1].tflop_per_step == split.stages[1].tflop_per_step
    assert split.stages[1].step_s > whole.stages[1].step_s  # type: ignore[operator]


def test_the_world_changes_what_a_rank_holds_and_sends() -> None:
    one, many = (work_of(config.load("aclip-vitb16"), world) for world in (1, 64))
    assert memory_of(many).state["masters"] < memory_of(one).state["masters"] / 60
    assert communication_bytes(one) == 0 and communication_bytes(many) > 4 * 150e6
    with_wires = plan("aclip-vitb16", gpus=64, bandwidth=25e9).stages[1]
    assert with_wires.step_s > plan("aclip-vitb16", gpus=64).stages[1].step_s  # type: ignore[operator]


def test_time_energy_and_money() -> None:
    found = plan("aclip-vitb16", "run.steps=1000", gpus=16, price=2.0)
    stage = found.stages[1]
    time = found.time_of(stage)
    assert stage.step_s is not None
    assert time["hours"] == pytest.approx(1000 * stage.step_s / 3600)
    assert time["node_hours"] == pytest.approx(2 * time["hours"])
    assert time["kwh"] == pytest.approx(16 * 0.7 * time["hours"]) and time["cost"] == pytest.approx(32 * time["hours"])


def test_no_speed_is_made_up() -> None:
    found = plan("aclip-vitb16", name="a100-80")
    assert found.stages[1].step_s is None and found.json()["stages"]["1"]["hours"] is None
    assert any("no speed was measured for a100-80" in note for note in found.notes)


@pytest.mark.parametrize("stage", [2, 3])
def test_what_is_kept_in_host_memory_has_no_speed(stage: int) -> None:
    """Everything was measured on the device."""
    files = f"zero{stage}_bf16.json", f"zero{stage}_bf16_offload.json"
    on_device, offloaded = (plan("aclip-vitb16", f"engine.deepspeed={file}") for file in files)
    assert on_device.stages[stage].step_s and offloaded.stages[stage].step_s is None
    assert offloaded.stages[stage].file == files[1]


def test_a_gpu_by_other_names() -> None:
    assert gpu_of("H100").name == "h100" and gpu_of("A100-80GB").name == "a100-80"


def planned(tmp_path: Path, *words: str) -> dict[str, Any]:
    assert main(["plan", *words, "--json", str(tmp_path / "plan.json")]) == 0
    return json.loads((tmp_path / "plan.json").read_text())


def test_the_command_and_its_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = planned(tmp_path, "aclip-vitb16", "--gpus", "8", "--gpu", "h100", "h200", "run.steps=1000", "--explain")
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= 80
    assert "recommended: stage 1" in printed and "8 x h200" in printed and "q, k, v" in printed
    contract = {"model_state_gib", "activations_gib", "peak_gib", "tflop_per_step", "samples_per_s", "hours", "fits"}
    assert set(found["stages"]) == {"0", "1", "2", "3"} and found["recommended"] == "1"
    for stage in found["stages"].values():
        assert contract <= set(stage)
        assert sum(stage["by_part"].values()) == pytest.approx(stage["peak_gib"])
    assert found["steps"] == 1000 and set(found["by_gpu"]) == {"h100", "h200"}


def test_samples_are_counted_in_the_shards(tmp_path: Path) -> None:
    for shard in range(2):
        with tarfile.open(tmp_path / f"{shard:05d}.tar", "w") as tar:
            for sample in range(70):
                for suffix in ("jpg", "txt"):
                    (tmp_path / "x").write_text("a caption")
                    tar.add(tmp_path / "x", f"{sample}.{suffix}")
    words = [f"data.train={tmp_path}/{{00000..00001}}.tar", "run.epochs=3", "batch.global_size=64"]
    found = planned(tmp_path, "aclip-tiny", *words)
    assert found["steps"] == 6 and found["samples_from"] == "counted in data.train"
    assert planned(tmp_path, "aclip-tiny", *words, "--samples", "640")["steps"] == 30


WRONG = {
    "gpu": (["aclip-vitb16", "--gpu", "h1000"], "did you mean h100?"),
    "two": (["aclip-vitb16", "--gpu", "a100"], "did you mean a100-40 or a100-80?"),
    "batch": (["aclip-vitb16", "--gpus", "7"], "batch.global_size: 4096 = 7 ranks x 585 + 1 does not divide"),
    "gpus": (["aclip-vitb16", "--gpus", "0"], "0 is below 1"),
    "recipe": (["aclip-vitb61"], "did you mean aclip-vitb16"),
    "key": (["aclip-vitb16", "optim.lrr=1"], "optim.lr"),
    "memory": (["aclip-vitb16", "--gpu-memory", "many"], "--gpu-memory: 'many' is no size"),
    "mfu": (["aclip-vitb16", "--mfu", "30"], "outside"),
    "tower": (["aclip-vitb16", "model.vision.heads=7"], "does not divide"),
    "probe": (["aclip-vitb16", "--probe", "--gpu", "h100"], "--probe: measures the GPU that is here"),
    "data": (["aclip-vitb16", "data.train=/nowhere/{0..3}.tar"], "/nowhere"),
    "epoch": (["aclip-tiny", "run.epochs=1", "--samples", "9"], "is more than an epoch's samples"),
}


@pytest.mark.parametrize(("words", "said"), WRONG.values(), ids=WRONG)
def test_a_mistake_is_one_line(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *words]) == 2
    printed = capsys.readouterr()
    assert said in printed.err and len(printed.err.strip().splitlines()) == 1 and not printed.out


def test_a_giant_on_512_gpus_without_torch() -> None:
    code = """
import sys, time
from amclip_ds.cli import main
assert main(["plan", "aclip-vitb16", "model.vision.name=vit_giant_patch14_clip_224", "--gpus", "512", "--explain"]) == 0
print([name for name in ("torch", "timm", "transformers", "deepspeed") if name in sys.modules], time.process_time())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    heavy, seconds = done.stdout.strip().splitlines()[-1].rsplit(maxsplit=1)
    assert heavy == "[]" and float(seconds) < 5


def test_stage_3_holds_the_weights_that_are_read_again_on_several_ranks_alone() -> None:
    """All of a ViT-B between its forward and backward pass; with offload, as many as the file's reuse distance."""
    found = {}
    for file, ranks in (("zero3_bf16", 1), ("zero3_bf16", 8), ("zero3_bf16_offload", 1)):
        words = [f"engine.deepspeed={file}.json", "batch.global_size=64", "batch.per_gpu=8"]
        step = work_of(config.load("aclip-vitb16", words), ranks)
        found[file, ranks] = memory_of(step).by_part["buckets"]
    weights = 2 * trained_elements(step.student)
    assert found["zero3_bf16", 8] - found["zero3_bf16", 1] == pytest.approx(weights)
    assert found["zero3_bf16_offload", 1] - found["zero3_bf16", 1] == pytest.approx(2 * 150_000_000)


def test_what_begins_later_is_a_group_of_its_own() -> None:
    """As the engine groups it: ZeRO cuts each group by itself, so a rank's share of the average depends on it."""
    step = work_of(
        config.load(
            "aclip-tiny", ["data.train=x", "loss.patches.weight=1", "loss.patches.start=0.5", "teacher.view=1"]
        ),
        2,
    )
    trained = {name: p.numel() for name, p in step.student.items() if p.requires_grad}

    def shares(starts: dict[str, float]) -> tuple[int, ...]:
        groups = [group["names"] for group in parameter_groups(step.student.items(), step.config.optim, starts)]
        return averaged_by_rank(trained, set(step.teacher), groups, step.world, step.stage)

    assert sizes_of(step, 0).averaged == shares({"patches": 0.5}) != shares({})
