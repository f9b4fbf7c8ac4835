"""What the main thread of a process stands in, as a sentence for others: which collective, or which line."""

from __future__ import annotations

import json
import sys
import sysconfig
import threading
from contextlib import suppress
from itertools import takewhile
from pathlib import Path
from types import FrameType

#: Frames between a collective and its wait, which say nothing.
_WRAPPERS = ("torch/distributed/c10d_logger.py", "torch/_ops.py", "torch/utils/_contextlib.py")
#: Where a rank waits for others, or for a device that does.
_COLLECTIVES = ("torch/distributed/", "deepspeed/comm/", "distkit/runtime/process.py")
#: Files that are nobody's own: of torch, of Python, of this package.
_LIBRARIES = (sysconfig.get_path("stdlib"), "site-packages", "<", str(Path(__file__).parent.parent))


def standing(world_size: int) -> tuple[bool, str]:
    """Whether the main thread waits for other ranks, and what it stands in.

    `in all_reduce, called from compute_loss (cifar10.py:31)`. A backward counts as waiting, where there is anybody to
    wait for: the gradients are exchanged in it.
    """
    calls = list(_calls(sys._current_frames().get(threading.main_thread().ident or 0)))
    if not calls:
        return False, ""
    waited_in = list(takewhile(lambda call: _is_in(call, _COLLECTIVES), calls))
    inner = calls[0]
    if waited_in:
        text = f"in {waited_in[-1].f_code.co_name}{_last_collective()}"
    elif inner.f_code.co_name == "_engine_run_backward":
        text = f"in the backward{_last_collective() if world_size > 1 else ''}"
    else:
        text = f"in {_name(inner)}"
    own = next((call for call in calls if not _is_in(call, _LIBRARIES)), None)
    if own is not None and own is not inner and own.f_code.co_name != "<module>":
        text += f", called from {_name(own)}"
    return world_size > 1 and (bool(waited_in) or "in the backward" in text), text


def _calls(frame: FrameType | None) -> list[FrameType]:
    """The calls of a thread, the innermost first."""
    calls = []
    while frame is not None:
        if not _is_in(frame, _WRAPPERS):
            calls.append(frame)
        frame = frame.f_back
    return calls


def _is_in(call: FrameType, places: tuple[str, ...]) -> bool:
    return any(place in call.f_code.co_filename for place in places)


def _name(call: FrameType) -> str:
    return f"{call.f_code.co_name} ({Path(call.f_code.co_filename).name}:{call.f_lineno})"


def _last_collective() -> str:
    """The newest collective that has not ended, by torch's Flight Recorder: ` (gloo:all_reduce of [128, 10])`."""
    library = sys.modules.get("torch._C._distributed_c10d")
    for name in ("_dump_fr_trace_json", "_dump_nccl_trace_json"):
        # not in every version of torch, nor with these arguments
        with suppress(AttributeError, KeyError, TypeError, ValueError, RuntimeError):
            entries = json.loads(getattr(library, name)()).get("entries", ())
            running = [entry for entry in entries if not entry["retired"]]
            if running:
                sizes = ", ".join(map(str, running[-1]["input_sizes"][:2]))
                return f" ({running[-1]['profiling_name']} of {sizes})"
    return ""
