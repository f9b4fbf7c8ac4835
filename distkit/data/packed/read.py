"""Packed images, as `distkit data pack` writes them: opened without reading them, checked on request.

The format is described in `distkit.data.packed.format`.
"""

from __future__ import annotations

import hashlib
import io
import os
import warnings
import weakref
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from distkit.config import Split
from distkit.data.packed.format import DIGESTS, MAGIC, PREFIX_BYTES, START, VERSION, Header, header_from_json
from distkit.data.sets.fingerprint import DIGITS
from distkit.data.sets.image_folder import decode_image
from distkit.data.sets.images import ImageDataset
from distkit.errors import DataError

PACK = "distkit data pack FOLDER OUT"


def open_packed(root: Path, split: Split) -> ImageDataset | PackedImages:
    """ROOT/SPLIT.pack: raw images as an `ImageDataset` over the mapped file, encoded ones as a map-style data set.

    Raises:
        DataError: there is no such file, or it cannot be used; see `PackedFile`.
    """
    path = root / f"{split}.pack"
    if not path.exists():
        found = ", ".join(sorted(file.name for file in root.glob("*.pack"))) if root.is_dir() else "no such folder"
        raise DataError(
            f"there is no packed file {path}",
            expected="a file made by distkit data pack",
            got=found or "a folder without packed files",
            fix=f"distkit data pack FOLDER {root}",
        )
    images = PackedImages(path)
    return images if images.file.header.form == "encoded" else images.resident()


class PackedFile:
    """An open packed file. Opening reads the header and the labels; everything else is mapped.

    Args:
        path: a file made by `distkit data pack`.

    Raises:
        DataError: it is missing, no packed file, of a newer version, truncated, or its header or labels are damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            weakref.finalize(self, os.close, handle)
            self._handle = handle
            self.header, self.digest = self._read_header(os.fstat(handle).st_size)
            self._map = np.memmap(path, np.uint8, "r")
        except OSError as error:
            raise DataError(f"the packed file {path} cannot be opened", expected="a file made by distkit data pack",
                            got=error, fix=PACK) from error  # fmt: skip
        self.labels = self._checked_labels()

    def __len__(self) -> int:
        return self.header.num_samples

    def section(self, name: str) -> NDArray[np.generic]:
        """A section as a mapped, read-only array."""
        place = self.header.sections[name]
        raw = self._map[place.offset : place.offset + place.num_bytes]
        return np.asarray(raw).view(place.dtype).reshape(place.shape)

    def read(self, start: int, stop: int) -> bytes:
        """Bytes `start` to `stop` of the images.

        They are read, not mapped: a failing disk is an exception that names the file, not the death of the process.
        """
        offset, parts = self.header.sections["images"].offset, []
        try:
            while start < stop and (part := os.pread(self._handle, stop - start, offset + start)):
                parts.append(part)
                start += len(part)
        except OSError as error:
            raise DataError(f"the packed file {self.path} cannot be read", got=error,
                            fix=f"distkit data verify {self.path}") from error  # fmt: skip
        return b"".join(parts)

    def bounds(self, index: int) -> tuple[int, int]:
        """First byte of a sample in the images, and the one after its last."""
        if self.header.form == "encoded":
            start, stop = self.section("offsets")[index : index + 2].tolist()
            # A damaged table must not ask for a terabyte; the CRC of no bytes is not that of an image.
            ok = 0 <= start < stop <= self.header.sections["images"].num_bytes
            return (start, stop) if ok else (0, 0)
        size = self.header.sections["images"].num_bytes // len(self)
        return index * size, (index + 1) * size

    def sample_name(self, index: int) -> str:
        """The original path of a sample below its split's folder; its number in a set that had no files."""
        if "paths" not in self.header.sections:
            return f"{self.header.name} {self.header.split} {index}"
        start, stop = self.section("path_offsets")[index : index + 2].tolist()
        return os.fsdecode(self.section("paths")[start:stop].tobytes())

    def describe(self) -> str:
        """One line: "data/train.pack: 50,000 raw images 3x32x32, 10 classes, 146.5 MiB"."""
        header = self.header
        shape = " " + "x".join(map(str, header.sample_shape)) if header.sample_shape else ""
        size = f"{header.file_bytes / 2**20:,.1f} MiB"
        return f"{self.path}: {len(self):,} {header.form} images{shape}, {len(header.class_names)} classes, {size}"

    def damage(self, advance: Callable[[int], None] = lambda _: None) -> Iterator[str]:
        """Compare every byte with its checksum; yields a line for each damaged section or chunk.

        Args:
            advance: told how many bytes of images are done.
        """
        for name, place in self.header.sections.items():
            if name != "images" and _sha256(self.section(name)) != place.sha256:
                yield f"the section {name} is damaged"
        digests, size, end = self.section("digests"), self.header.chunk_bytes, self.header.sections["images"].num_bytes
        for chunk in range(self.header.num_chunks):
            start, stop = chunk * size, min((chunk + 1) * size, end)
            if hashlib.sha256(self.read(start, stop)).digest() != digests[chunk].tobytes():
                first, last = self.sample_at(start), self.sample_at(stop - 1)
                yield (
                    f"chunk {chunk} of {self.header.num_chunks} is damaged: images {first} to {last}, "
                    f"{self.sample_name(first)} to {self.sample_name(last)}"
                )
            advance(stop)

    def sample_at(self, byte: int) -> int:
        """The sample that a byte of the images belongs to."""
        if self.header.form == "encoded":
            found = int(np.searchsorted(self.section("offsets"), byte, "right")) - 1
            return min(max(found, 0), len(self) - 1)
        return byte * len(self) // self.header.sections["images"].num_bytes

    def _read_header(self, size: int) -> tuple[Header, str]:
        start = os.pread(self._handle, PREFIX_BYTES, 0)
        if len(start) < PREFIX_BYTES or not start.startswith(MAGIC):
            raise DataError(f"{self.path} is no packed file", expected="a file made by distkit data pack", fix=PACK)
        _, version, length, file_bytes = START.unpack_from(start)
        if version > VERSION:
            raise DataError(f"{self.path} was packed by a newer distkit", expected=f"version {VERSION} or older",
                            got=f"version {version}", fix=f"pip install --upgrade distkit, or {PACK}")  # fmt: skip
        text = os.pread(self._handle, min(length, size), PREFIX_BYTES)
        digest = DIGESTS.unpack_from(start, START.size)[0]
        if len(text) == length and hashlib.sha256(start[: START.size] + text).digest() == digest:
            if size != file_bytes:
                raise DataError(f"{self.path} is truncated or has grown", expected=f"{file_bytes:,} bytes",
                                got=f"{size:,} bytes", fix=f"{PACK} --overwrite")  # fmt: skip
            try:
                return header_from_json(text), digest.hex()
            except (ValueError, KeyError, TypeError) as error:
                got: object = error
        else:
            got = "another checksum" if len(text) == length else "fewer bytes"
        raise DataError(f"the header of {self.path} is damaged", expected="the header that was written", got=got,
                        fix=f"{PACK} --overwrite")  # fmt: skip

    def _checked_labels(self) -> Tensor:
        labels = self.section("labels")
        if _sha256(labels) != self.header.sections["labels"].sha256:
            raise DataError(f"the labels of {self.path} are damaged", expected="the labels that were written",
                            got="another checksum", fix=f"{PACK} --overwrite")  # fmt: skip
        return mapped_tensor(labels)


class PackedImages:
    """A packed file as a map-style torch data set: `it[i]` is (uint8 [C, H, W], class number).

    Encoded images are checked against their CRC and decoded to RGB. It may be given to worker processes by fork or
    pickle; a copy opens the file anew.

    Args:
        path: a file made by `distkit data pack`.
        transform: what to do with each image tensor.

    Raises:
        DataError: see `PackedFile`.
    """

    def __init__(self, path: Path, transform: Callable[[Tensor], object] | None = None) -> None:
        self.file = PackedFile(path)
        self.transform = transform
        self.labels = self.file.labels
        self.class_names = self.file.header.class_names
        self._images = mapped_tensor(self.file.section("images")) if self.file.header.form == "raw" else None

    def __len__(self) -> int:
        return len(self.file)

    def __getitem__(self, index: int) -> tuple[object, int]:
        """One image and its class number.

        Raises:
            DataError: the image is damaged or was never one; the message has its original path.
            IndexError: there are not so many.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"{self.file.path} has {len(self)} images, not one with the number {index}")
        image = self._decoded(index) if self._images is None else self._images[index].clone()
        return (self.transform(image) if self.transform else image), int(self.labels[index])

    @property
    def fingerprint(self) -> str:
        """Tells the images and labels of this file from others, by the digests of its sections: 16 digits."""
        sections = self.file.header.sections
        content = " ".join(sections[name].sha256 for name in ("labels", "digests"))
        return hashlib.sha256(content.encode()).hexdigest()[:DIGITS]

    def __getstate__(self) -> tuple[Path, str, Callable[[Tensor], object] | None]:
        return self.file.path, self.file.digest, self.transform

    def __setstate__(self, state: tuple[Path, str, Callable[[Tensor], object] | None]) -> None:
        path, digest, transform = state
        PackedImages.__init__(self, path, transform)
        if self.file.digest != digest:
            raise DataError(f"{path} was replaced while it was in use", expected="the same file in every process",
                            fix="start the run again")  # fmt: skip

    def resident(self) -> ImageDataset:
        """The images of a raw file, not copied: they lie in the mapped file until something reads them.

        Raises:
            DataError: the file holds encoded images.
        """
        header = self.file.header
        if self._images is None:
            raise DataError(f"{self.file.path} holds encoded images", expected="raw images",
                            fix=f"{PACK} --form raw")  # fmt: skip
        return ImageDataset(
            self._images,
            self.labels,
            class_names=header.class_names,
            source=f"packed {self.file.path}",
            mean=header.mean,
            std=header.std,
            memory_mapped=True,
        )

    def _decoded(self, index: int) -> Tensor:
        start, stop = self.file.bounds(index)
        data = self.file.read(start, stop)
        if len(data) != stop - start or zlib.crc32(data) != int(self.file.section("crc")[index]):
            raise DataError(
                f"the image {self.file.sample_name(index)} in {self.file.path} is damaged",
                expected="the bytes that were packed",
                got=f"other bytes in chunk {start // self.file.header.chunk_bytes} or its tables",
                fix=f"distkit data verify {self.file.path}",
            )
        name = f"{self.file.sample_name(index)} in {self.file.path}"
        pixels = decode_image(io.BytesIO(data), name, fix=f"remove it from the folder, then {PACK} --overwrite")
        return torch.from_numpy(pixels.transpose(2, 0, 1).copy())


def mapped_tensor(array: NDArray[np.generic]) -> Tensor:
    """A tensor over a mapped, read-only array; nothing is copied. Nobody may write into it."""
    with warnings.catch_warnings():
        # A private writable map would avoid the warning, but the kernel refuses one larger than memory.
        warnings.filterwarnings("ignore", "The given NumPy array is not writable", UserWarning)
        return torch.from_numpy(array)


def _sha256(array: NDArray[np.generic]) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).data).hexdigest()
