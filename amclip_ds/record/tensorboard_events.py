"""TensorBoard's event files as bytes, to be appended like any other file of a run: no thread, no handle kept open."""

import io
import os
import socket
import time


def file_name() -> str:
    """A name that TensorBoard takes for an event file, and that no other process uses."""
    return f"events.out.tfevents.{time.time():010.0f}.{socket.gethostname()}.{os.getpid()}.0"


def head(first_step: int) -> bytes:
    """What an event file begins with. Events of other files from `first_step` on are superseded."""
    from tensorboard.compat.proto.event_pb2 import Event, SessionLog

    version = Event(wall_time=time.time(), step=first_step, file_version="brain.Event:2")
    start = Event(wall_time=time.time(), step=first_step, session_log=SessionLog(status=SessionLog.START))
    return _record(version.SerializeToString()) + _record(start.SerializeToString())


def scalars(step: int, values: dict[str, float]) -> bytes:
    """One step's numbers."""
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary

    summary = Summary(value=[Summary.Value(tag=name, simple_value=value) for name, value in values.items()])
    return _record(Event(wall_time=time.time(), step=step, summary=summary).SerializeToString())


def image(step: int, tag: str, content: bytes, width: int, height: int) -> bytes:
    """One picture, encoded as PNG or JPEG."""
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary

    shown = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=content)
    summary = Summary(value=[Summary.Value(tag=tag, image=shown)])
    return _record(Event(wall_time=time.time(), step=step, summary=summary).SerializeToString())


def _record(data: bytes) -> bytes:
    from tensorboard.summary.writer.record_writer import RecordWriter

    packed = io.BytesIO()
    RecordWriter(packed).write(data)
    return packed.getvalue()
