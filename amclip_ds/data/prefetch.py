"""Batches made ahead: a thread puts the next one together, and sends it to a GPU, while this one is trained on.

Workers hand over chunks; joining them into a batch (115 MB for 256 samples of two views and a teacher's crop at 224
pixels) and, for a GPU, into page-locked memory and from there to the device takes the time of two copies, which the
step need not wait for.
"""

import contextlib
import queue
import threading
from collections.abc import Generator

import torch

from amclip_ds.data.batch import Batch

ASK_EVERY_S = 0.1  # whether anybody still wants batches
JOIN_TIMEOUT_S = 6.0  # longest wait for the thread at the end; what still hangs then ends with the process
Sent = tuple[Batch, torch.cuda.Event | None]
"""a batch whose copies to a GPU have begun, and what marks their end"""


class Uploads:
    """Sends batches to a GPU on a stream of their own, beside the step that runs. On a CPU they stay as they are.

    Page-locked memory that a copy reads is not given out again before it has been read, since torch notes the stream of
    each copy from it.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def send(self, batch: Batch) -> Sent:
        """Begins the copies, whatever the caller's stream has in hand."""
        if self._stream is None:
            return batch, None
        with torch.cuda.stream(self._stream):
            return batch.to(self._stream.device), self._stream.record_event()

    def receive(self, sent: Sent) -> Batch:
        """The batch for the caller's stream: what is started there from now on waits for the copies, the host does not.

        Its memory is of the other stream, which would take it for the next batch as soon as nothing in Python holds it:
        not before what the caller's stream has begun by then is done.
        """
        batch, arrived = sent
        if arrived is not None:
            reader = torch.cuda.current_stream(batch.views_uint8.device)
            reader.wait_event(arrived)
            for tensor in batch.tensors().values():
                tensor.record_stream(reader)
        return batch


def prefetched(batches: Generator[Batch, None, None], device: torch.device) -> Generator[Batch, None, None]:
    """The same batches, which have no end, or the same error, on the device if it is a GPU; while one is used the next
    one is there and one more is made.

    Closing it closes `batches`.
    """
    ready: queue.SimpleQueue[Sent | BaseException] = queue.SimpleQueue()
    room = threading.Semaphore(1)  # for a batch that nobody has taken yet: one more than is used is on the device
    is_over = threading.Event()
    uploads = Uploads(device)

    def is_wanted() -> bool:
        """Waits until the batch before was taken. False: nobody takes any more."""
        while not is_over.is_set():
            if room.acquire(timeout=ASK_EVERY_S):
                return True
        return False

    def work() -> None:
        try:
            if device.type == "cuda":
                torch.cuda.set_device(device)  # a thread has its own current device, and page-locking opens it
            with contextlib.closing(batches):
                for batch in batches:
                    if not is_wanted():
                        return
                    ready.put(uploads.send(batch))
        except BaseException as error:
            ready.put(error)

    thread = threading.Thread(target=work, name="batches", daemon=True)
    thread.start()
    try:
        while True:
            item = ready.get()
            if isinstance(item, BaseException):
                raise item
            room.release()
            yield uploads.receive(item)
    finally:
        is_over.set()
        thread.join(JOIN_TIMEOUT_S)
