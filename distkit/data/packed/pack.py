"""Packed files made, described and checked: the work of `distkit data pack`, `show` and `verify`."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Literal

from distkit.config import Split
from distkit.config.check import require_number
from distkit.data.packed.format import CHUNK_BYTES
from distkit.data.packed.read import PackedFile
from distkit.data.packed.sources import Request, plans
from distkit.data.packed.write import write_pack
from distkit.errors import DataError, DistkitError, Stopped
from distkit.runtime.process import available_cores

#: Damaged chunks that `verify` names.
NAMED = 10


def pack(
    source: str,
    out: Path,
    *,
    splits: Sequence[Split] | None = None,
    root: Path = Path("data"),
    form: Literal["auto", "raw", "encoded"] = "auto",
    num_workers: int | None = None,
    check: bool = False,
    overwrite: bool = False,
    chunk_bytes: int = CHUNK_BYTES,
) -> str:
    """Write OUT/SPLIT.pack for every split of `source`; a line for each. What is there already is left as it is.

    Stopped at any instant, it goes on at its last whole chunk when it is called again. Processes that start together
    do the work once: one writes, the others wait.

    Args:
        source: a folder, FOLDER/train/CLASS/* and FOLDER/test/CLASS/* or one split as FOLDER/CLASS/*; or the name of a
            torchvision set: cifar10, cifar100, mnist or fashion_mnist.
        out: folder of the packed files, made when missing.
        splits: which splits; None: those that are there. FOLDER/CLASS/* becomes train unless another is named.
        root: where a torchvision set is or is downloaded to.
        form: raw pixels, the encoded files, or auto: raw where all images have one size and no side above 64 pixels.
        num_workers: threads that read images, >= 1; None: one a core.
        check: decode every image of an encoded split, so that a truncated one is found now.
        overwrite: write again, also over another data set.
        chunk_bytes: bytes of images under one checksum, >= 1.

    Raises:
        DataError: the source or an image in it is damaged, the disk is full, or `out` holds another data set.
        Stopped: it was interrupted from the keyboard.
    """
    require_number("workers", num_workers, least=1, example="4")
    require_number("chunk_bytes", chunk_bytes, least=1, example=str(CHUNK_BYTES))
    request = Request(
        source, root, tuple(splits) if splits else None, form, check, num_workers or available_cores(), chunk_bytes
    )
    lines: list[str] = []
    try:
        for plan in plans(request, out):
            _make_folder(out)
            path = out / f"{plan.header.split}.pack"
            wrote = write_pack(path, plan, num_workers=request.num_workers, overwrite=overwrite, report=report,
                               progress=progress)  # fmt: skip
            lines.append(PackedFile(path).describe() + ("" if wrote else ", packed before"))
    except KeyboardInterrupt:
        raise Stopped("stopped; the same command goes on where it was") from None
    return "\n".join(lines)


def show(path: Path) -> str:
    """A packed file in a few lines; reads its header and labels."""
    file = _open(path)
    header = file.header
    names = ", ".join(header.class_names[:10]) + (", …" if len(header.class_names) > 10 else "")
    counts = file.labels.bincount(minlength=len(header.class_names))
    return "\n".join(
        [
            file.describe(),
            f"  from:    {header.name}, {header.split}",
            f"  classes: {names}",
            f"  images:  {int(counts.min()):,} to {int(counts.max()):,} a class",
            f"  chunks:  {header.num_chunks:,} of {header.chunk_bytes:,} bytes",
            f"  mean:    {', '.join(f'{value:g}' for value in header.mean)}",
            f"  std:     {', '.join(f'{value:g}' for value in header.std)}",
            f"  sha256:  {file.digest}",
        ]
    )


def verify(path: Path) -> str:
    """Compare a packed file with its checksums, every byte of it.

    Raises:
        DistkitError: it is damaged; the message names the chunks and the images in them.
        DataError: it is not there.
    """
    try:
        file = _open(path)
    except DataError as error:
        if path.is_file():
            raise DistkitError(str(error)) from error
        raise
    with progress(f"verify {path}", file.header.sections["images"].num_bytes) as advance:
        damage = list(file.damage(advance))
    if damage:
        more = [f"and {len(damage) - NAMED} more"] if len(damage) > NAMED else []
        fix = f"distkit data pack FOLDER {path.parent} --overwrite"
        raise DistkitError("\n  ".join([f"{path} is damaged", *damage[:NAMED], *more, f"type:     {fix}"]))
    return f"{file.describe()}: every byte as it was written"


def report(line: str) -> None:
    """A line for people, beside the result on stdout."""
    print(line, file=sys.stderr, flush=True)


@contextlib.contextmanager
def progress(title: str, total: int) -> Iterator[Callable[[int], None]]:
    """Show how many of `total` bytes are done: a bar on a terminal, else a line at most every five seconds."""
    if not sys.stderr.isatty():
        yield _Lines(title, total).advance
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (BarColumn(None), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    text = TextColumn("{task.description}", markup=False)
    with Progress(text, *columns, console=Console(stderr=True), transient=True, expand=True) as bar:
        task = bar.add_task(title, total=total)
        yield lambda done: bar.update(task, completed=done)


class _Lines:
    def __init__(self, title: str, total: int) -> None:
        self._title = title
        self._total = total
        self._next = time.monotonic() + 5

    def advance(self, done: int) -> None:
        if time.monotonic() >= self._next:
            self._next = time.monotonic() + 5
            report(f"{self._title}: {done / self._total:.0%} of {self._total / 2**20:,.1f} MiB")


def _open(path: Path) -> PackedFile:
    if path.is_dir():
        files = sorted(str(file) for file in path.glob("*.pack"))
        raise DataError(f"{path} is a folder", expected="a packed file", got=", ".join(files) or None,
                        fix=f"distkit data show {files[0] if files else 'OUT/train.pack'}")  # fmt: skip
    return PackedFile(path)


def _make_folder(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"the folder {out} cannot be made", expected="a folder that can be written", got=error,
                        fix="distkit data pack FOLDER OUT") from error  # fmt: skip
