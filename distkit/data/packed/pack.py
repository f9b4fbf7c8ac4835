"""Packed splits made, described and checked: the work of `distkit data pack`, `show` and `verify`."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Literal

from distkit.config import Split
from distkit.config.check import require_number
from distkit.data.packed.format import INDEX, PACK
from distkit.data.packed.plan import SHARD_BYTES, Plan, common_shape, plan_folder, plan_set
from distkit.data.packed.read import PackedSplit, packed_splits
from distkit.data.packed.write import write_packed
from distkit.data.sets.image_folder import LAYOUT, SPLITS, check_same_classes, class_folders, list_split
from distkit.data.sets.torchvision_sets import TORCHVISION_SETS, torchvision_set
from distkit.errors import ConfigError, DataError, DistkitError, Stopped
from distkit.runtime.process import available_cores


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
    shard_bytes: int = SHARD_BYTES,
) -> str:
    """Write OUT/SPLIT/ for every split of `source`; a line for each. What is there already is left as it is.

    Stopped at any instant, it continues with the first file that is missing when it is called again. Processes that
    start together do the work once: one writes, the others wait.

    Args:
        source: a folder, FOLDER/train/CLASS/* and FOLDER/test/CLASS/* or one split as FOLDER/CLASS/*; or the name of a
            torchvision set: cifar10, cifar100, mnist or fashion_mnist.
        out: folder of the packed splits, made when missing.
        splits: which splits; None: those that are there. FOLDER/CLASS/* becomes train unless another is named.
        root: where a torchvision set is or is downloaded to.
        form: raw pixels, the encoded files, or auto: raw where all images have one size and no side above 64 pixels.
        num_workers: threads that read images, >= 1; None: one a core.
        check: decode every image of an encoded split, so that a truncated one is found now.
        overwrite: replace another data set, and what is damaged.
        shard_bytes: bytes of images in one file, >= 1; a larger image has a file of its own.

    Raises:
        DataError: the source or an image in it is damaged, the disk is full, or `out` holds another data set.
        ConfigError: the options do not fit the source.
        Stopped: it was interrupted from the keyboard.
    """
    require_number("workers", num_workers, least=1, example="4")
    require_number("shard_bytes", shard_bytes, least=1, example=str(SHARD_BYTES))
    num_workers = num_workers or available_cores()
    if source in TORCHVISION_SETS:
        if form == "encoded" or check:
            fix = f"distkit data pack {source} {out}"
            raise ConfigError(f"{source} has no image files", expected="--form raw, without --check", fix=fix)
        sets = ((split, torchvision_set(source, root, split)) for split in splits or SPLITS)
        plans: Iterator[Plan] = (plan_set(source, split, images, shard_bytes=shard_bytes) for split, images in sets)
    else:
        plans = _folder_plans(_split_folders(Path(source), splits, out), form, num_workers, check, shard_bytes)
    lines: list[str] = []
    try:
        for plan in plans:
            folder = out / plan.index.split
            with _explained(folder, plan):
                out.mkdir(parents=True, exist_ok=True)
                wrote = write_packed(folder, plan, num_workers=num_workers, overwrite=overwrite, report=report,
                                     progress=progress)  # fmt: skip
            lines.append(PackedSplit(folder).describe() + ("" if wrote else ", packed before"))
    except KeyboardInterrupt:
        raise Stopped("stopped; the same command continues with the files that are missing") from None
    return "\n".join(lines)


def _folder_plans(
    folders: dict[Split, Path],
    form: Literal["auto", "raw", "encoded"],
    num_workers: int,
    check: bool,
    shard_bytes: int,
) -> Iterator[Plan]:
    names = {split: class_folders(folder, PACK) for split, folder in folders.items()}
    check_same_classes(next(iter(folders.values())).parent, names)
    for split, folder in folders.items():
        listing = list_split(folder, names[split])
        shape = common_shape(listing, form, num_workers)
        yield plan_folder(listing, split, shape, check=check, shard_bytes=shard_bytes)


def _split_folders(root: Path, splits: Sequence[Split] | None, out: Path) -> dict[Split, Path]:
    if not root.is_dir():
        expected = f"{LAYOUT}, or one of {', '.join(TORCHVISION_SETS)}"
        raise DataError(f"there is no folder {root}", expected=expected, fix=PACK)
    present: dict[Split, Path] = {split: root / split for split in SPLITS if (root / split).is_dir()}
    if present:
        for split in splits or ():
            if split not in present:
                fix = f"--split {next(iter(present))}"
                raise DataError(f"there is no folder {root / split}", expected=LAYOUT, fix=fix)
        return {split: present[split] for split in splits or present}
    if len(splits or ()) > 1:
        what = f"{root} has neither train/ nor test/, so it is one split"
        raise DataError(what, expected=LAYOUT, fix="--split train")
    if out.resolve().parent == root.resolve():
        fix = f"distkit data pack {root} {root}-packed"
        raise ConfigError(f"{out} would be mistaken for a class of {root}", expected="a folder elsewhere", fix=fix)
    return {(splits or SPLITS)[0]: root}


@contextlib.contextmanager
def _explained(folder: Path, plan: Plan) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DataError(
            f"{folder} cannot be written",
            expected=f"a folder that can be written, with {plan.index.num_bytes:,} bytes of space",
            got=error,
            fix=f"the same command when there is space: it keeps complete files. To give up: rm -r {folder}",
        ) from error


def show(folder: Path) -> str:
    """A packed split in a few lines; reads its index and labels."""
    packed = _open(folder)
    index = packed.index
    names = ", ".join(index.class_names[:10]) + (", …" if len(index.class_names) > 10 else "")
    counts = packed.labels.bincount(minlength=len(index.class_names))
    return "\n".join(
        [
            packed.describe(),
            f"  from:    {index.name}, {index.split}",
            f"  classes: {names}",
            f"  images:  {int(counts.min()):,} to {int(counts.max()):,} a class",
            f"  files:   {len(index.shards):,} of at most {max(shard.num_bytes for shard in index.shards):,} bytes",
            f"  mean:    {', '.join(f'{value:g}' for value in index.mean)}",
            f"  std:     {', '.join(f'{value:g}' for value in index.std)}",
            f"  sha256:  {packed.sha256}",
        ]
    )


def verify(folder: Path) -> str:
    """Compare a packed split with its checksums, every byte of it.

    Raises:
        DistkitError: it is damaged; the message names the files and the images in them.
        DataError: it is not there.
    """
    try:
        packed = _open(folder)
    except DataError as error:
        if (folder / INDEX).is_file():
            raise DistkitError(str(error)) from error
        raise
    with progress(f"verify {folder}", packed.index.num_bytes) as advance:
        damage = list(packed.damage(advance))
    if damage:
        fix = f"distkit data pack FOLDER {folder.parent} --overwrite"
        raise DistkitError("\n  ".join([f"{folder} is damaged", *damage, f"type:     {fix}"]))
    return f"{packed.describe()}: every byte as it was written"


def report(line: str) -> None:
    """A line for people, in addition to the result on stdout."""
    print(line, file=sys.stderr, flush=True)


@contextlib.contextmanager
def progress(title: str, total: int) -> Iterator[Callable[[int], None]]:
    """Show the bytes that are done of `total`: a bar on a terminal, else a line at most every five seconds."""
    if not sys.stderr.isatty():
        shown, done = time.monotonic(), 0

        def advance(num_bytes: int) -> None:
            nonlocal shown, done
            done += num_bytes
            if time.monotonic() >= shown + 5:
                shown = time.monotonic()
                report(f"{title}: {done / total:.0%} of {total / 2**20:,.1f} MiB")

        yield advance
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (BarColumn(None), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    text = TextColumn("{task.description}", markup=False)
    with Progress(text, *columns, console=Console(stderr=True), transient=True, expand=True) as bar:
        task = bar.add_task(title, total=total)
        yield lambda num_bytes: bar.update(task, advance=num_bytes)


def _open(folder: Path) -> PackedSplit:
    present = packed_splits(folder)
    if present:
        raise DataError(
            f"{folder} is a folder of packed splits",
            expected="one of them",
            got=", ".join(present),
            fix=f"distkit data show {present[0]}",
        )
    return PackedSplit(folder)
