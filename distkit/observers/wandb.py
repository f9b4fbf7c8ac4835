"""Weights & Biases. The only module that imports wandb, and only when a run starts."""

# ruff: noqa: ARG002 (an observer ignores what it has no use for)
from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from distkit.errors import ConfigError
from distkit.observers.base import Event, Observer, RunInfo, curves

if TYPE_CHECKING:
    from wandb import Run

RUN_ID = "wandb_run_id"


def build(run_dir: Path) -> WandbObserver:
    """A wandb run with the name of the run directory."""
    return WandbObserver(run_dir)


class WandbObserver(Observer):
    """Reports every number of train and eval events under `train/` and `eval/`, over `step`.

    wandb's environment variables are honoured (WANDB_MODE=offline, WANDB_PROJECT, WANDB_ENTITY...). Without
    WANDB_PROJECT the project is the recipe's name; the run has the name of its directory, and its facts as config.
    A resumed run continues the same wandb run. Terminal output is not captured: the console observer draws there.

    Raises:
        ConfigError: from start, when wandb refuses, for example without a login.
    """

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir
        self._run_id: str | None = None
        self._run: Run | None = None

    def start(self, info: RunInfo, step: int) -> None:
        """Open the wandb run, the one of the loaded state where there is one."""
        import wandb

        try:
            run = wandb.init(
                dir=self.run_dir,
                project=os.environ.get("WANDB_PROJECT") or info.recipe,
                name=os.environ.get("WANDB_NAME") or info.run_dir.name,
                id=self._run_id,
                resume="allow",
                config=dict(info.facts),
                settings=wandb.Settings(console="off"),
            )
        except wandb.Error as error:
            raise ConfigError(
                f"--observe.wandb: wandb did not start: {error}",
                expected="a login, or offline mode",
                fix="wandb login, or WANDB_MODE=offline, or --observe.no-wandb",
            ) from error
        # With `step` as the axis, a resumed run may go back to its checkpoint; wandb's own counter only grows.
        run.define_metric("step")
        run.define_metric("*", step_metric="step")
        self._run, self._run_id = run, run.id

    def record(self, event: Event) -> None:
        """Report the numbers of a train or eval event; other events are ignored."""
        values = curves(event)
        if self._run is not None and values:
            self._run.log({**values, "step": event["step"]})

    def close(self, status: str, message: str) -> None:
        """Finish the wandb run, as failed unless the status says otherwise, and end wandb's service process."""
        if self._run is None:
            return
        import wandb

        code = {"completed": 0, "preempted": 0}.get(status, 1)
        self._run.finish(exit_code=code)
        self._run = None
        wandb.teardown(exit_code=code)

    def state_dict(self) -> dict[str, str]:
        """The id of the wandb run, once there is one."""
        return {} if self._run_id is None else {RUN_ID: self._run_id}

    def load_state_dict(self, state: Mapping[str, str]) -> None:
        """Continue the wandb run of `state`."""
        self._run_id = state.get(RUN_ID)
