"""Saving and resuming."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from distkit.config.check import require, require_number
from distkit.config.every import Epochs

Saving = Literal["auto", "on", "off"]


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When a run saves its state, how, and what it keeps."""

    enabled: bool = True
    """Save checkpoints; without them a run that is killed starts over."""
    save_every: int | Epochs | None = 500
    """Steps between saves, >= 1, or epochs, as 1e; None: only at the end and when keep_best calls for one."""
    asynchronous: Saving = "auto"
    """Copy the state at the step boundary and write it in the background (`--checkpoint.async` for short). auto: on
    if the copy fits into half of the free memory."""
    keep_last: int | None = 3
    """Newest checkpoints to keep, >= 1; None: all."""
    keep_best: int | None = 1
    """Also keep this many checkpoints with the best evaluations, and save after every new best, >= 1; None: off."""
    keep_every: int | None = None
    """Also keep checkpoints whose step is a multiple of this, >= 1; None: off."""
    max_failures: int = 3
    """Consecutive saves that may fail (a full disk) before the run ends, >= 1."""

    def __post_init__(self) -> None:
        for name, example in (("save_every", "500"), ("keep_last", "3"), ("keep_best", "1"), ("keep_every", "5000"),
                              ("max_failures", "3")):  # fmt: skip
            if not isinstance(getattr(self, name), Epochs):
                require_number(f"checkpoint.{name}", getattr(self, name), least=1, example=example)
        if self.keep_last is None:
            need = "None, where --checkpoint.keep-last None keeps all"
            require(self.keep_every is None, "checkpoint.keep_every", need, self.keep_every, "None")
        ok = self.asynchronous in get_args(Saving)
        require(ok, "checkpoint.asynchronous", "auto, on or off", self.asynchronous, "auto")


@dataclass(frozen=True, kw_only=True)
class ResumeConfig:
    """Where a run starts from."""

    source: str = "auto"
    """auto: continue the run in --run-dir, if there is one. never: refuse a directory that holds a run. Or a
    checkpoint or run directory to start from (`--resume DIR` for short), or a file of weights with weights_only."""
    weights_only: bool = False
    """Load only the model's weights and start at step 0 (fine-tuning): from a run where names and shapes match, from a
    file (.safetensors, or a state dict by torch.save) all of them."""

    def __post_init__(self) -> None:
        require(bool(self.source), "resume.source", "auto, never or a directory", repr(self.source), "auto")
        if self.weights_only:
            ok = self.source not in ("auto", "never")
            require(
                ok, "resume.source", "a directory or a file, with --resume.weights-only", self.source, "runs/RECIPE/RUN"
            )
