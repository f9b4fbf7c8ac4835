"""TensorBoard event files. The only module that imports tensorboard, and only when a run starts."""

# ruff: noqa: ARG002 (an observer ignores what it has no use for)
from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from distkit.observers.base import Event, Observer, RunInfo, curves

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


def build(run_dir: Path) -> TensorboardObserver:
    """Event files in the run directory."""
    return TensorboardObserver(run_dir / "tensorboard")


class TensorboardObserver(Observer):
    """Writes every number of train and eval events under `train/` and `eval/`, at its step, into `log_dir`.

    A resumed or restarted run writes another file there and tells TensorBoard to hide what the killed one wrote after
    the restored step. Files are flushed after each evaluation, and every two minutes.
    """

    def __init__(self, log_dir: Path) -> None:
        self.log_dir = log_dir
        self._writer: SummaryWriter | None = None

    def start(self, info: RunInfo, step: int) -> None:
        """Open an event file."""
        self._open(step)

    def go_back(self, step: int) -> None:
        """Close the event file, and open another one that hides what came after `step`."""
        self.close("", "")
        self._open(step)

    def _open(self, step: int) -> None:
        with warnings.catch_warnings():
            # tensorboard's own imports, which a run cannot help.
            warnings.simplefilter("ignore", DeprecationWarning)
            from torch.utils.tensorboard import SummaryWriter
        continues = any(self.log_dir.glob("*tfevents*"))
        self._writer = SummaryWriter(self.log_dir, purge_step=step + 1 if continues else None)

    def record(self, event: Event) -> None:
        """Write the numbers of a train or eval event; other events are ignored."""
        step = event["step"]
        if self._writer is None or not isinstance(step, int):
            return
        for name, value in curves(event).items():
            self._writer.add_scalar(name, value, step)
        if event["event"] == "eval":
            self._writer.flush()

    def close(self, status: str, message: str) -> None:
        """Flush and close the event file."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None
