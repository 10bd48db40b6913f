"""Batches made ahead: a thread puts the next one together while this one is trained on.

Workers hand over chunks; joining them into a batch (115 MB for 256 samples of two views and a teacher's crop at 224
pixels) and, for a GPU, into page-locked memory takes the time of a copy, which the step need not wait for.
"""

import contextlib
import queue
import threading
from collections.abc import Generator

import torch

from amclip_ds.data.batch import Batch

ASK_EVERY_S = 0.1  # whether anybody still wants batches
JOIN_TIMEOUT_S = 6.0  # longest wait for the thread at the end; what still hangs then ends with the process


def prefetched(batches: Generator[Batch, None, None], device: torch.device) -> Generator[Batch, None, None]:
    """The same batches, which have no end, or the same error; one is made while the one before is used.

    Closing it closes `batches`.
    """
    ready: queue.Queue[Batch | BaseException] = queue.Queue(maxsize=1)
    is_over = threading.Event()

    def hand_over(item: Batch | BaseException) -> None:
        while not is_over.is_set():
            with contextlib.suppress(queue.Full):
                return ready.put(item, timeout=ASK_EVERY_S)

    def work() -> None:
        try:
            if device.type == "cuda":
                torch.cuda.set_device(device)  # a thread has its own current device, and page-locking opens it
            with contextlib.closing(batches):
                for batch in batches:
                    hand_over(batch)
                    if is_over.is_set():
                        return
        except BaseException as error:
            hand_over(error)

    thread = threading.Thread(target=work, name="batches", daemon=True)
    thread.start()
    try:
        while True:
            item = ready.get()
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        is_over.set()
        thread.join(JOIN_TIMEOUT_S)
