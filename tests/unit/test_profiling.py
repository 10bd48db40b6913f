"""run.profile: the page of a real profile, and what becomes of one that cannot be written or is cut short."""

import gzip
import json
from pathlib import Path

import pytest
import torch
from torch.autograd import DeviceType
from torch.autograd.profiler_util import EventList, FunctionEvent

from amclip_ds.record.profiling import WAIT, WARM, Profile, costs_of, kind_of, operators_of, page_of


def steps(profile: Profile, count: int) -> None:
    left, right = torch.rand(1024, 1024), torch.rand(1024, 1024)  # so large that the product is the largest cost
    for _ in range(count):
        torch.nn.functional.layer_norm((left @ right)[:64], (1024,))
        profile.step()


def test_the_page_names_the_largest_costs(tmp_path: Path) -> None:
    reported: list[str] = []
    profile = Profile(tmp_path, 3, True, reported.append, on_gpu=False)
    steps(profile, WAIT + WARM + 3 + 4)
    profile.close()
    [said] = reported
    assert said.startswith("profile of 3 steps: ") and "matrix products" in said
    page = (tmp_path / "profile" / "summary.txt").read_text()
    assert "3 steps of " in page and "aten::mm" in page and "elementwise and norms" in page
    assert page.index("matrix products") < page.index("elementwise and norms")
    with gzip.open(tmp_path / "profile" / "trace.json.gz") as file:
        names = [event.get("name", "") for event in json.load(file)["traceEvents"]]
    assert names.count("aten::mm") == 3


GEMM, COPY = "nvjet_gemm", "void elementwise_kernel<direct_copy_kernel_cuda(TensorIteratorBase&)::{lambda()#3}>(int)"


def seen_on_a_gpu(steps: int) -> EventList:
    """What torch's profiler has of steps of 20 ms in which the device multiplies for 10 ms and copies for 2, built of
    its own events: operators with their kernels, the kernels, and the annotations that the device has of both."""
    events: list[FunctionEvent] = []

    def add(name: str, start_ms: float, ms: float, on_device: bool = False, is_annotation: bool = False) -> None:
        where = DeviceType.CUDA if on_device else DeviceType.CPU
        at = {"thread": 7 if on_device else 1, "start_us": start_ms * 1e3, "end_us": (start_ms + ms) * 1e3}
        kind = {"use_device": "cuda", "device_type": where, "is_user_annotation": is_annotation, "stack": []}
        events.append(FunctionEvent(id=len(events), name=name, **at, **kind))

    for start in range(0, 20 * steps, 20):
        add(f"ProfilerStep#{start}", start, 20, is_annotation=True)
        for name, kernel, at, ms in (("aten::mm", GEMM, 1, 10), ("aten::copy_", COPY, 12, 2)):
            add(name, start + at, 0.1)
            events[-1].append_kernel(kernel, 0, ms * 1e3)
            add(kernel, start + at, ms, on_device=True)
        for name in (f"ProfilerStep#{start}", "nccl:all_reduce"):
            add(name, start + 1, 13, on_device=True, is_annotation=True)
    found = EventList(events, use_device="cuda")
    found._build_tree()
    return found


def test_a_gpus_work_is_counted_once() -> None:
    """A kernel's time is its operator's too, and that of the annotations around it; "#" is in the names of kernels."""
    seen = seen_on_a_gpu(steps=2)
    everything = sum(event.self_device_time_total for event in seen.key_averages())
    assert everything == pytest.approx(2 * (2 * 12e3 + 2 * 13e3))
    operators = operators_of(seen.key_averages(), on_gpu=True)
    assert sorted(operators) == [(GEMM, pytest.approx(0.02), 2), (COPY, pytest.approx(0.004), 2)]
    page = " ".join(page_of(operators, steps=2, wall_s=0.04, device="the GPU").split())
    assert page.startswith("2 steps of 20.0 ms; of it the GPU worked 12.0 ms ")
    assert "matrix products 10.00 83.3%" in page and "waiting (data, host, ranks) 8.00" in page


def test_a_run_that_ends_before_says_so(tmp_path: Path) -> None:
    reported: list[str] = []
    profile = Profile(tmp_path, 50, True, reported.append, on_gpu=False)
    steps(profile, WAIT + WARM + 3)
    profile.close()
    assert "ended before" in reported[0] and not (tmp_path / "profile").exists()


def test_a_full_disk_ends_nothing(tmp_path: Path) -> None:
    (tmp_path / "profile").write_text("in the way")
    reported: list[str] = []
    steps(Profile(tmp_path, 1, True, reported.append, on_gpu=False), WAIT + WARM + 3)
    assert "not written" in reported[0] and "training continues" in reported[0]


def test_other_ranks_and_other_runs_watch_nothing(tmp_path: Path) -> None:
    for wanted, is_main in ((3, False), (None, True)):
        profile = Profile(tmp_path, wanted, is_main, pytest.fail, on_gpu=False)
        steps(profile, WAIT + WARM + 5)
        profile.close()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("aten::addmm", "matrix products"),
        ("ncclDevKernel_AllReduce", "communication"),
        ("aten::copy_", "copies"),
        ("gloo:all_reduce", "communication"),
        ("aten::_scaled_dot_product_flash_attention", "attention"),
        ("aten::_foreach_lerp_", "optimizer"),
        ("aten::native_layer_norm", "elementwise and norms"),
        ("xyz", "other"),
    ],
)
def test_kinds(name: str, kind: str) -> None:
    assert kind_of(name)[0] == kind


def test_costs_are_of_a_step_and_sorted() -> None:
    first, second = costs_of([("aten::mm", 1.0, 4), ("aten::copy_", 3.0, 2), ("aten::bmm", 1.0, 2)], steps=2)
    assert (first.kind, first.seconds, first.calls) == ("copies", 1.5, 1)
    assert (second.kind, second.seconds, second.calls) == ("matrix products", 1.0, 3)
