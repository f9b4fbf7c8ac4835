"""Packed images, as `distkit data pack` writes them: opened without reading the images, checked on request.

The format is described in `distkit.data.packed.format`.
"""

from __future__ import annotations

import bisect
import hashlib
import io
import json
import os
import weakref
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from distkit.config import Split
from distkit.data.packed.format import INDEX, PACK, Index, ShardEntry, read_index
from distkit.data.sets.decode import Mode, decode, planes
from distkit.data.sets.fingerprint import fingerprint
from distkit.data.sets.image_folder import entries
from distkit.data.sets.images import ImageDataset, default_normalization
from distkit.errors import DataError

#: Bytes that are hashed at a time.
READ_BYTES = 4 << 20
#: Damaged samples of a file that are named.
MAX_NAMED = 10


def open_packed(root: Path, split: Split) -> ImageDataset | PackedImages:
    """ROOT/SPLIT/: raw images as an `ImageDataset` over the mapped files, encoded ones as a map-style data set.

    Raises:
        DataError: there is no such folder, or it cannot be used; see `PackedSplit`.
    """
    images = PackedImages(packed_folder(root, split))
    return images if images.split.index.form == "encoded" else images.resident()


def packed_folder(root: Path, split: Split) -> Path:
    """ROOT/SPLIT.

    Raises:
        DataError: it has no index, or cannot be read.
    """
    folder = root / split
    inside = entries(folder)
    if INDEX not in [entry.name for entry in inside or ()]:
        unfinished = bool(inside)
        present = "no such folder" if entries(root) is None else ", ".join(packed_splits(root))
        raise DataError(
            f"there is no packed split {folder}",
            expected="a folder made by distkit data pack",
            got="files of an unfinished pack" if unfinished else present or "a folder without packed splits",
            fix=f"distkit data pack FOLDER {root}",
        )
    return folder


def packed_splits(root: Path) -> list[str]:
    """The packed splits in a folder."""
    return sorted(str(path.parent) for path in root.glob(f"*/{INDEX}"))


class PixelShards:
    """Raw images in several files, read as one uint8 tensor [N, C, H, W] on the CPU.

    Args:
        shards: the images of each file, [n, C, H, W] with the same C, H and W.
    """

    dtype = torch.uint8
    device = torch.device("cpu")

    def __init__(self, shards: Sequence[Tensor]) -> None:
        self._shards = shards
        sizes = [len(shard) for shard in shards]
        self._ends = np.cumsum(sizes)
        self._starts = (self._ends - sizes).tolist()
        self.shape = torch.Size((sum(sizes), *shards[0].shape[1:]))

    def __len__(self) -> int:
        return self.shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes of all pixels."""
        return sum(shard.nbytes for shard in self._shards)

    def index_select(self, dim: int, index: Tensor) -> Tensor:
        """The images numbered `index`, int64 [B] -> uint8 [B, C, H, W]; `dim` is 0.

        Raises:
            IndexError: there are not so many.
        """
        numbers = index.numpy()
        shard_of = np.searchsorted(self._ends, numbers, "right")
        order = np.argsort(shard_of, kind="stable")
        parts = [torch.empty((0, *self.shape[1:]), dtype=torch.uint8)]
        for number in np.unique(shard_of).tolist():
            rows = torch.from_numpy(numbers[shard_of == number] - self._starts[number])
            parts.append(self._shards[number].index_select(dim, rows))
        return torch.cat(parts).index_select(dim, torch.from_numpy(np.argsort(order)))

    def narrow(self, dim: int, start: int, length: int) -> Tensor:
        """Images `start` to `start + length`, uint8 [length, C, H, W]; `dim` is 0."""
        return self.index_select(dim, torch.arange(start, start + length))

    def to(self, device: torch.device | str) -> PixelShards | Tensor:
        """The same images on `device`; the copy is one tensor there, filled a file at a time."""
        if torch.device(device).type == "cpu":
            return self
        images = torch.empty(self.shape, dtype=torch.uint8, device=device)
        for shard, end in zip(self._shards, self._ends.tolist(), strict=True):
            images[end - len(shard) : end].copy_(shard)
        return images


class PackedSplit:
    """An open packed split. Opening reads the index and the labels; everything else is mapped.

    Args:
        folder: made by `distkit data pack`.

    Raises:
        DataError: it is missing, no packed split, of a newer version, or a file is missing, truncated, of another
            split, or its labels are damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.index, self.sha256 = read_index(folder)
        self._shards = [_Shard(folder, entry, self.index) for entry in self.index.shards]
        self._ends = np.cumsum([entry.num_samples for entry in self.index.shards]).tolist()
        labels = [shard.tensors["labels"] for shard in self._shards]
        self.labels = labels[0] if len(labels) == 1 else torch.cat(labels)
        if hashlib.sha256(self.labels.numpy().data).hexdigest() != self.index.labels_sha256:
            raise DataError(
                f"the labels of {folder} are damaged",
                expected="the labels that were written",
                got="another checksum",
                fix=f"{PACK} --overwrite",
            )

    def __len__(self) -> int:
        return self.index.num_samples

    @property
    def images(self) -> Tensor | PixelShards:
        """The images of a raw split, uint8 [N, C, H, W]; nothing is read."""
        images = [shard.tensors["images"] for shard in self._shards]
        return images[0] if len(images) == 1 else PixelShards(images)

    @property
    def fingerprint(self) -> str:
        """Identifies the labels and images of this split by the checksums of the images: 16 digits."""
        index = self.index
        how = [] if (index.channels, index.background) == (3, "white") else [index.channels, *index.background.encode()]
        decoding = [torch.tensor(how)] if how and index.form == "encoded" else []
        return fingerprint(self.labels, torch.cat([shard.tensors["crc"] for shard in self._shards]), *decoding)

    def read(self, index: int) -> bytes:
        """The bytes of a sample, compared with their checksum.

        They are read, not mapped: a failing disk is an exception that names the file, not the death of the process.

        Raises:
            DataError: it is damaged or cannot be read; the message has its original path.
        """
        shard, row = self._locate(index)
        try:
            data = shard.read(row)
        except OSError as error:
            fix = f"distkit data verify {self.folder}"
            raise DataError(f"the packed file {shard.path} cannot be read", got=error, fix=fix) from error
        if data is None:
            raise DataError(
                f"the image {self.sample_name(index)} in {shard.path} is damaged",
                expected="the bytes that were packed",
                got="another checksum",
                fix=f"distkit data verify {self.folder}",
            )
        return data

    def sample_name(self, index: int) -> str:
        """The original path of a sample below its split's folder; its number in a set that had no files."""
        shard, row = self._locate(index)
        if "paths" not in shard.tensors:
            return f"{self.index.name} {self.index.split} {index}"
        start, stop = shard.tensors["path_offsets"][row : row + 2].tolist()
        return os.fsdecode(shard.tensors["paths"][max(start, 0) : max(stop, 0)].numpy().tobytes())

    def describe(self) -> str:
        """One line: "data/train: 50,000 raw images 3x32x32, 10 classes, 146.5 MiB"."""
        index = self.index
        shape = " " + "x".join(map(str, index.sample_shape)) if index.sample_shape else ""
        size = f"{index.num_bytes / 2**20:,.1f} MiB"
        return f"{self.folder}: {len(self):,} {index.form} images{shape}, {len(index.class_names)} classes, {size}"

    def damage(self, advance: Callable[[int], None] = lambda _: None) -> Iterator[str]:
        """Compare every byte with its checksum; yields a line for each damaged file, with the images that are damaged.

        Args:
            advance: called with the number of bytes done.
        """
        for shard, end in zip(self._shards, self._ends, strict=True):
            if shard.file_sha256(advance) != shard.entry.sha256:
                first = end - shard.entry.num_samples
                rows = [row for row in range(shard.entry.num_samples) if shard.read(row) is None]
                names = [self.sample_name(first + row) for row in rows[:MAX_NAMED]]
                more = f" and {len(rows) - MAX_NAMED} more" if len(rows) > MAX_NAMED else ""
                what = f"images {', '.join(names)}{more}" if rows else "its header or its tables"
                yield f"{shard.entry.file} is damaged: {what}"

    def _locate(self, index: int) -> tuple[_Shard, int]:
        """The shard that has a sample, and its row there."""
        if not 0 <= index < len(self):
            raise IndexError(f"{self.folder} has {len(self)} images, none with the number {index}")
        shard = self._shards[bisect.bisect_right(self._ends, index)]
        return shard, index - self._ends[bisect.bisect_right(self._ends, index)] + shard.entry.num_samples


class _Shard:
    """One mapped file of a packed split."""

    def __init__(self, folder: Path, entry: ShardEntry, index: Index) -> None:
        self.path = folder / entry.file
        self.entry = entry
        self._handle: int | None = None
        try:
            size = self.path.stat().st_size
            if size != entry.num_bytes:
                raise DataError(
                    f"{self.path} is truncated or has grown",
                    expected=f"{entry.num_bytes:,} bytes",
                    got=f"{size:,} bytes",
                    fix=f"{PACK} --overwrite",
                )
            with safe_open(self.path, "pt") as file:
                self.tensors: dict[str, Tensor] = {name: file.get_tensor(name) for name in sorted(file.keys())}
                plan = (file.metadata() or {}).get("plan")
            with self.path.open("rb") as opened:
                header = opened.read(int.from_bytes(opened.read(8), "little"))
            self._images = 8 + len(header) + int(json.loads(header)["images"]["data_offsets"][0])
        except (OSError, SafetensorError, KeyError) as error:
            raise DataError(
                f"the packed file {self.path} cannot be opened", expected=f"a file made by {PACK}", got=error, fix=PACK
            ) from error
        if plan != index.plan_digest() or not self._fits(index):
            raise DataError(
                f"{self.path} does not belong to the index next to it",
                expected="a file that was packed with it",
                got="another plan" if plan != index.plan_digest() else "tensors of other shapes",
                fix=f"{PACK} --overwrite",
            )

    def read(self, row: int) -> bytes | None:
        """The bytes of a sample; None where they do not fit their checksum."""
        images = self.tensors["images"]
        if "offsets" in self.tensors:
            start, stop = self.tensors["offsets"][row : row + 2].tolist()
            if not 0 <= start < stop <= len(images):  # a damaged table must not ask for a terabyte
                return None
        else:
            size = images[0].numel()
            start, stop = row * size, (row + 1) * size
        if self._handle is None:
            self._handle = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
            weakref.finalize(self, os.close, self._handle)
        parts = []
        while start < stop and (part := os.pread(self._handle, stop - start, self._images + start)):
            parts.append(part)
            start += len(part)
        data = b"".join(parts)
        return data if zlib.crc32(data) == int(self._crc[row]) else None

    def file_sha256(self, advance: Callable[[int], None]) -> str:
        """sha256 of the whole file."""
        digest = hashlib.sha256()
        with self.path.open("rb") as file:
            while block := file.read(READ_BYTES):
                digest.update(block)
                advance(len(block))
        return digest.hexdigest()

    def _fits(self, index: Index) -> bool:
        """Whether the tensors are those that the index promises."""
        count, tensors = self.entry.num_samples, self.tensors
        shapes = {"labels": ("int64", (count,)), "crc": ("uint8", (count, 4))}
        if index.sample_shape is None:
            shapes |= {"images": ("uint8", (tensors["images"].numel(),)), "offsets": ("int64", (count + 1,))}
        else:
            shapes["images"] = ("uint8", (count, *index.sample_shape))
        if "paths" in tensors:
            shapes |= {"paths": ("uint8", (tensors["paths"].numel(),)), "path_offsets": ("int64", (count + 1,))}
        actual = {name: (str(tensor.dtype)[6:], tuple(tensor.shape)) for name, tensor in tensors.items()}
        self._crc = tensors["crc"].numpy().view("<u4").reshape(-1) if actual == shapes else np.empty(0, "<u4")
        return actual == shapes


class PackedImages:
    """A packed split as a map-style torch data set: `it[i]` is (uint8 [C, H, W], class number).

    Encoded images are checked against their CRC and decoded as `open_image` does it. It may be given to worker
    processes by fork or pickle; a copy opens the files again.

    Args:
        folder: made by `distkit data pack`.
        transform: what to do with each image tensor.

    Raises:
        DataError: see `PackedSplit`.
    """

    def __init__(self, folder: Path, transform: Callable[[Tensor], object] | None = None) -> None:
        self.split = PackedSplit(folder)
        self.transform = transform
        self.labels = self.split.labels
        self.class_names = self.split.index.class_names
        self._pixels = self.split.images if self.split.index.form == "raw" else None

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, index: int) -> tuple[object, int]:
        """One image and its class number.

        Raises:
            DataError: the image is damaged or was never one; the message has its original path.
            IndexError: there are not so many.
        """
        image = self.pixels(index)
        return (self.transform(image) if self.transform else image), int(self.labels[index])

    def pixels(self, index: int) -> Tensor:
        """One image without `transform`, uint8 [C, H, W]; raises as `__getitem__`."""
        if not 0 <= index < len(self):
            raise IndexError(f"{self.split.folder} has {len(self)} images, none with the number {index}")
        return self._decoded(index) if self._pixels is None else self._pixels.narrow(0, index, 1)[0].clone()

    @property
    def notes(self) -> tuple[str, ...]:
        """What is unusual about the images, with the name of the folder."""
        return tuple(f"{self.split.folder}: {note}" for note in self.split.index.notes)

    @property
    def fingerprint(self) -> str:
        """Identifies the images and labels; see `PackedSplit.fingerprint`."""
        return self.split.fingerprint

    def __getstate__(self) -> tuple[Path, str, Callable[[Tensor], object] | None]:
        return self.split.folder, self.split.sha256, self.transform

    def __setstate__(self, state: tuple[Path, str, Callable[[Tensor], object] | None]) -> None:
        folder, sha256, transform = state
        PackedImages.__init__(self, folder, transform)
        if self.split.sha256 != sha256:
            raise DataError(
                f"{folder} was replaced while it was in use",
                expected="the same files in every process",
                fix="start the run again",
            )

    def resident(self) -> ImageDataset:
        """The images of a raw split, not copied: they stay in the mapped files until something reads them.

        Raises:
            DataError: the split holds encoded images.
        """
        index = self.split.index
        borrowed = (index.mean, index.std) == default_normalization(len(index.mean))
        if self._pixels is None:
            what = f"{self.split.folder} holds encoded images"
            raise DataError(what, expected="raw images", fix=f"{PACK} --form raw")
        images = ImageDataset(
            self._pixels,
            self.labels,
            class_names=index.class_names,
            source=f"packed {self.split.folder}",
            mean=None if borrowed else index.mean,
            std=None if borrowed else index.std,
            memory_mapped=True,
        )
        images.file_notes = self.notes
        return images

    def _decoded(self, index: int) -> Tensor:
        data, name = self.split.read(index), f"{self.split.sample_name(index)} in {self.split.folder}"
        fix = f"remove it from the folder, then {PACK} --overwrite"
        mode: Mode = "L" if self.split.index.channels == 1 else "RGB"
        pixels = decode(io.BytesIO(data), mode, self.split.index.background, name=name, fix=fix)
        return torch.from_numpy(planes(pixels).copy())
