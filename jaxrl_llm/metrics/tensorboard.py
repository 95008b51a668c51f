"""TensorBoard event files under <run>/tensorboard: the scalars of each step, one directory per phase."""

import os
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from jaxrl_llm.metrics.writer import numbers


def why_unavailable() -> str:
    """Reason why no event files can be written; "" if they can."""
    try:
        import tensorboardX.event_file_writer  # noqa: F401
    except Exception as error:  # protobuf raises its own errors for versions that do not fit together
        why = (str(error).splitlines() or [type(error).__name__])[0]
        return (
            f"metrics.tensorboard: got true without tensorboardX ({why}): no tensorboard/ is written; "
            "pip install 'jaxrl-llm[track]', or set metrics.tensorboard: false"
        )
    return ""


class TensorBoard:
    """Event files of a run."""

    def __init__(self, directory: Path):
        self._directory = directory
        self._writers: dict[str, Any] = {}

    def scalars(self, step: int, phase: str, row: Mapping[str, Any]) -> None:
        with suppress(OSError):  # a full disk
            self._write(step, phase, row)

    def rollouts(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Event files hold no responses."""

    def _write(self, step: int, phase: str, row: Mapping[str, Any]) -> None:
        # Not SummaryWriter: after its thread died on a full disk, its next call waits for ever.
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event, SessionLog
        from tensorboardX.proto.summary_pb2 import Summary

        if phase not in self._writers:
            (self._directory / phase).mkdir(parents=True, exist_ok=True)
            self._writers[phase] = EventsWriter(str(self._directory / phase / "events"), f".{os.getpid()}")
            hide_later = SessionLog(status=SessionLog.START)  # what a killed process wrote from this step on
            self._writers[phase].write_event(Event(wall_time=time.time(), step=step, session_log=hide_later))
        values = [Summary.Value(tag=name, simple_value=value) for name, value in numbers(row).items()]
        self._writers[phase].write_event(Event(wall_time=time.time(), step=step, summary=Summary(value=values)))
        self._writers[phase].flush()

    def close(self, failed: bool) -> None:
        for writer in self._writers.values():
            with suppress(OSError):
                writer.close()
