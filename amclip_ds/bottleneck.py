"""What a run waits for: data, communication or computation; the shares of a step's time, and what to change."""

from dataclasses import dataclass

DATA_BOUND, COMMUNICATION_BOUND = 0.10, 0.30  # shares from which waiting is worth a change


@dataclass(frozen=True)
class Bottleneck:
    """Where the time of the steps since the last report went. Shares of 1."""

    bound: str
    """data-bound | communication-bound | compute-bound"""
    data: float
    communication: float
    compute: float
    advice: str

    def __str__(self) -> str:
        shares = f"data {self.data:.0%}, communication {self.communication:.0%}, compute {self.compute:.0%}"
        return f"{self.bound} ({shares})" + (f": {self.advice}" if self.advice else "")


def judge(step_s: float, data_wait_s: float, communication_s: float, workers: int, cores_per_rank: int) -> Bottleneck:
    """The verdict on a mean step of `step_s` seconds, of which the run was waiting for data and for other ranks.

    Data comes first: a rank that waits for data lets the others wait for it, which looks like communication there.
    """
    whole = max(step_s, 1e-9)
    data = min(1.0, max(0.0, data_wait_s / whole))
    communication = min(1.0 - data, max(0.0, communication_s / whole))
    compute = 1.0 - data - communication
    if data >= DATA_BOUND:
        return Bottleneck("data-bound", data, communication, compute, _feed_faster(workers, cores_per_rank))
    if communication >= COMMUNICATION_BOUND:
        advice = "raise batch.per_gpu or batch.global_size, or take a lower ZeRO stage (engine.deepspeed)"
        return Bottleneck("communication-bound", data, communication, compute, advice)
    return Bottleneck("compute-bound", data, communication, compute, "")


def _feed_faster(workers: int, cores_per_rank: int) -> str:
    spare = cores_per_rank - 1
    if workers < spare:
        return f"set data.workers={max(1, min(spare, 2 * max(workers, 1)))} ({cores_per_rank} cores a rank)"
    return "all cores are at work: store smaller images, or set data.stage_dir if the disk is slow"
