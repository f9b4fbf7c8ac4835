"""The limits that control groups set for this process, version 1 and 2 (cgroups(7)). No torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path, PurePosixPath

#: Version 1 writes about 2^63 where there is no limit.
UNLIMITED = 2**60


@dataclass(frozen=True)
class Limits:
    """The strictest limits on the way from this process's group up to the root; None: there is none.

    Attributes:
        memory: bytes.
        cpus: processors' time, 1.5 for one and a half.
        processes: processes and threads that may exist, and how many of them do (of the group that limits).
    """

    memory: int | None
    cpus: float | None
    processes: tuple[int, int] | None


def limits(proc: Path = Path("/proc/self")) -> Limits:
    """Read them; a system without control groups has no limits."""
    memory: list[int] = []
    cpus: list[float] = []
    processes: list[tuple[int, int]] = []
    for group in _groups(proc):
        memory += _numbers(group, "memory.max") + _numbers(group, "memory.limit_in_bytes")
        cpus += _ratio(_numbers(group, "cpu.max"))
        cpus += _ratio(_numbers(group, "cpu.cfs_quota_us") + _numbers(group, "cpu.cfs_period_us"))
        if most := _numbers(group, "pids.max"):
            processes.append((most[0], *(_numbers(group, "pids.current") or [0])))  # type: ignore[arg-type]
    bounded = [value for value in memory if value < UNLIMITED]
    return Limits(min(bounded, default=None), min(cpus, default=None),
                  min(processes, key=lambda pair: pair[0] - pair[1], default=None))  # fmt: skip


def _ratio(values: list[int]) -> list[float]:
    """Quota and period in microseconds as processors; nothing where the quota is `max` or -1."""
    return [values[0] / values[1]] if len(values) == 2 and values[0] > 0 and values[1] > 0 else []


def _numbers(group: Path, name: str) -> list[int]:
    """The numbers in a file of a group; [] without the file, or where the first word is `max`."""
    try:
        words = (group / name).read_text().split()
        return [] if not words or words[0] == "max" else [int(word) for word in words]
    except (OSError, ValueError):
        return []


def _groups(proc: Path) -> list[Path]:
    """The folders of this process's groups in every hierarchy, and of those above them."""
    try:
        paths = _paths((proc / "cgroup").read_text())
        mounts = (proc / "mountinfo").read_text().splitlines()
    except OSError:
        return []
    folders = []
    for line in mounts:
        before, _, after = line.partition(" - ")
        kind, _, options = after.split(" ", 2)
        if kind not in ("cgroup", "cgroup2"):
            continue
        root, mount = before.split()[3:5]
        controllers = {""} if kind == "cgroup2" else set(options.split(","))
        for controller in controllers & paths.keys():
            folders += _upwards(Path(mount), root, paths[controller])
    return folders


def _paths(text: str) -> dict[str, str]:
    """/proc/self/cgroup: controller -> path; "" is version 2."""
    paths = {}
    for line in text.splitlines():
        _, controllers, path = line.split(":", 2)
        paths.update(dict.fromkeys(controllers.split(","), path))
    return paths


def _upwards(mount: Path, root: str, path: str) -> list[Path]:
    """The folder of `path` and its parents; a container may see only what lies under `root`, or only itself."""
    inside = PurePosixPath(path)
    inside = inside.relative_to(root) if inside.is_relative_to(root) else PurePosixPath()
    folder = mount / inside.relative_to("/") if inside.is_absolute() else mount / inside
    folder = folder if folder.is_dir() else mount
    return [folder, *(parent for parent in folder.parents if parent.is_relative_to(mount))]
