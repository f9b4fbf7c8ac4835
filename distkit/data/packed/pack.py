"""Packed splits made, described and checked: the work of `distkit data pack`, `show` and `verify`."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Literal

from distkit.config import Color, Split
from distkit.config.check import require_number
from distkit.config.data import ground_color
from distkit.data.packed.format import INDEX, PACK
from distkit.data.packed.plan import SHARD_BYTES, Plan, channels_of, common_shape, plan_folder, plan_set
from distkit.data.packed.read import PackedSplit, packed_splits
from distkit.data.packed.write import write_packed
from distkit.data.sets.image_folder import LAYOUT, SPLITS, all_classes, class_folders, entries, list_split
from distkit.data.sets.torchvision_sets import TORCHVISION_SETS, torchvision_set
from distkit.errors import ConfigError, DataError, DistkitError, Stopped, printable, say
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
    color: Color = "auto",
    background: str = "white",
    allow_empty_classes: bool = False,
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
        color: channels of the images of a folder; auto: grey where every training image is grey, else rgb.
        background: what their transparent pixels are laid on: white, grey, black or #rrggbb.
        allow_empty_classes: accept classes that have images in only one split.
        shard_bytes: bytes of images in one file, >= 1; a larger image has a file of its own.

    Raises:
        DataError: the source or an image in it is damaged, the disk is full, or `out` holds another data set.
        ConfigError: the options do not fit the source.
        Stopped: it was interrupted from the keyboard.
    """
    require_number("workers", num_workers, least=1, example="4")
    require_number("shard_bytes", shard_bytes, least=1, example=str(SHARD_BYTES))
    num_workers = num_workers or available_cores()
    ground_color(background, "background")
    if source in TORCHVISION_SETS:
        if form == "encoded" or check or (color, background, allow_empty_classes) != ("auto", "white", False):
            fix = f"distkit data pack {source} {out}"
            expected = "--form raw, without --check, --color, --background and --allow-empty-classes"
            raise ConfigError(f"{source} has no image files", expected=expected, fix=fix)
        sets = ((split, torchvision_set(source, root, split)) for split in splits or SPLITS)
        plans: Iterator[Plan] = (plan_set(source, split, images, shard_bytes=shard_bytes) for split, images in sets)
    else:
        folders, chosen = _split_folders(Path(source), splits, out)
        plans = _folder_plans(folders, chosen, form=form, num_workers=num_workers, check=check, color=color,
                              background=background, allow_empty=allow_empty_classes,
                              shard_bytes=shard_bytes)  # fmt: skip
    lines: list[str] = []
    try:
        for plan in plans:
            folder = out / plan.index.split
            with _explained(folder, plan):
                out.mkdir(parents=True, exist_ok=True)
                wrote = write_packed(folder, plan, num_workers=num_workers, overwrite=overwrite, report=report,
                                     progress=progress)  # fmt: skip
            packed = PackedSplit(folder)
            for note in packed.index.notes:
                report(f"{folder}: {note}")
            lines.append(packed.describe() + ("" if wrote else ", packed before"))
    except KeyboardInterrupt:
        raise Stopped("stopped; the same command continues with the files that are missing") from None
    return "\n".join(lines)


def _folder_plans(
    folders: dict[Split, Path],
    chosen: Sequence[Split],
    *,
    form: Literal["auto", "raw", "encoded"],
    num_workers: int,
    check: bool,
    color: Color,
    background: str,
    allow_empty: bool,
    shard_bytes: int,
) -> Iterator[Plan]:
    classes = {split: class_folders(folder, PACK) for split, folder in folders.items()}
    names = all_classes(next(iter(folders.values())).parent, classes, allow_empty, "--allow-empty-classes")
    channels = None
    for split, folder in folders.items():
        if split not in chosen and channels is not None:
            continue
        listing = list_split(folder, classes[split], names, allow_empty, "--allow-empty-classes")
        channels = channels or channels_of(listing, color, num_workers)  # train comes first
        if split not in chosen:
            continue
        for note in listing.notes:
            report(note)
        shape = common_shape(listing, form, num_workers, channels)
        yield plan_folder(listing, split, shape, channels=channels, color=color, background=background, check=check,
                          shard_bytes=shard_bytes)  # fmt: skip


def _split_folders(root: Path, splits: Sequence[Split] | None, out: Path) -> tuple[dict[Split, Path], Sequence[Split]]:
    """The splits that are there, train first, and those to pack: the classes are those of all, whatever is packed."""
    inside = entries(root)
    if inside is None:
        expected = f"{LAYOUT}, or one of {', '.join(TORCHVISION_SETS)}"
        raise DataError(f"there is no folder {root}", expected=expected, fix=PACK)
    folders = {entry.name for entry in inside if entry.is_dir()}
    present: dict[Split, Path] = {split: root / split for split in SPLITS if split in folders}
    if present:
        for split in splits or ():
            if split not in present:
                fix = f"--split {next(iter(present))}"
                raise DataError(f"there is no folder {root / split}", expected=LAYOUT, fix=fix)
        return present, splits or tuple(present)
    if len(splits or ()) > 1:
        what = f"{root} has neither train/ nor test/, so it is one split"
        raise DataError(what, expected=LAYOUT, fix="--split train")
    if out.resolve().parent == root.resolve():
        fix = f"distkit data pack {root} {root}-packed"
        raise ConfigError(f"{out} would be mistaken for a class of {root}", expected="a folder elsewhere", fix=fix)
    split = (splits or SPLITS)[0]
    return {split: root}, (split,)


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
    names = printable(", ".join(index.class_names[:10])) + (", …" if len(index.class_names) > 10 else "")
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
            *(f"  note:    {note}" for note in index.notes),
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
    say(line)


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
