"""The packed file: one split in one file that is read by mapping it. Nothing in it is pickled.

Version 1; all numbers are little-endian:

    offset  bytes
         0      8  "distpack"; "distpart" while the file is being written
         8      4  uint32 version
        12      4  uint32 bytes of the header
        16      8  uint64 bytes of the file
        24     32  sha256 of bytes 0 to 23 and the header
        56     32  sha256 of the plan: the header with every digest blank. Equal plans give equal files
        88     40  zeros; in an unfinished file UTF-8 that says who writes it
       128         the header, a JSON object in ASCII: the fields of `Header`
       ...         the sections, each at a multiple of 4,096 bytes, zeros between them

Sections, with N samples:

    labels        int64 [N]       class numbers
    path_offsets  int64 [N + 1]   where each path begins in `paths`; only in files made of a folder
    paths         uint8           original paths below the split's folder, end to end
    offsets       int64 [N + 1]   where each sample begins in `images`; only in encoded files
    crc           uint32 [N]      CRC-32 of each sample; only in encoded files
    digests       uint8 [K, 32]   sha256 of each chunk of `images`: `chunk_bytes` bytes, the last one fewer
    images                        raw: uint8 [N, C, H, W]; encoded: the original image files end to end

The header holds the sha256 of every section but `images`, whose chunks have theirs in `digests`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from distkit.config import Split

MAGIC = b"distpack"
PARTIAL_MAGIC = b"distpart"
VERSION = 1
ALIGNMENT = 4096
CHUNK_BYTES = 4 << 20
BLANK = "0" * 64
START = struct.Struct("<8sIIQ")
DIGESTS = struct.Struct("<32s32s40s")
PREFIX_BYTES = START.size + DIGESTS.size

Form = Literal["raw", "encoded"]


@dataclass(frozen=True)
class Section:
    """Where an array lies in the file, in bytes from its start, and what it is."""

    offset: int
    num_bytes: int
    dtype: str
    shape: tuple[int, ...]
    sha256: str = BLANK


@dataclass(frozen=True, kw_only=True)
class Header:
    """What a packed file says about itself."""

    name: str
    """The data set, for people: the name of its folder, or of a torchvision set."""
    split: Split
    form: Form
    sample_shape: tuple[int, ...] | None
    """[C, H, W] of every sample of a raw file."""
    num_samples: int
    class_names: tuple[str, ...]
    mean: tuple[float, ...]
    """Mean per channel on the scale of [0, 1], as `ImageDataset` takes it."""
    std: tuple[float, ...]
    source_sha256: str
    """Over the paths, sizes and times of the files that were packed, or over the pixels and labels of a named set."""
    chunk_bytes: int
    sections: Mapping[str, Section]

    @property
    def num_chunks(self) -> int:
        """Chunks of the images, the last one maybe smaller."""
        return -(-self.sections["images"].num_bytes // self.chunk_bytes)

    @property
    def file_bytes(self) -> int:
        """Bytes of the whole file; the images are last."""
        images = self.sections["images"]
        return images.offset + images.num_bytes

    def to_json(self) -> bytes:
        """The header as it stands in the file."""
        return json.dumps(dataclasses.asdict(self), separators=(",", ":")).encode("ascii")

    def plan_digest(self) -> bytes:
        """sha256 of the header with blank digests: known before the first image is read."""
        blank = {name: dataclasses.replace(section, sha256=BLANK) for name, section in self.sections.items()}
        return hashlib.sha256(dataclasses.replace(self, sections=blank).to_json()).digest()


def header_from_json(text: bytes) -> Header:
    """The inverse of `Header.to_json`.

    Raises:
        ValueError, KeyError, TypeError: it is no header.
    """
    values = json.loads(text)
    lists = {name: tuple(values[name]) for name in ("class_names", "mean", "std")}
    shape = values["sample_shape"]
    sections = {
        name: Section(**{**fields, "shape": tuple(fields["shape"])}) for name, fields in values["sections"].items()
    }
    return Header(**{**values, **lists, "sample_shape": shape and tuple(shape), "sections": sections})


def prefix(header: Header, *, holder: str | None = None) -> bytes:
    """The first 128 bytes: of a finished file, or of one that `holder` is writing."""
    text = header.to_json()
    start = START.pack(MAGIC if holder is None else PARTIAL_MAGIC, VERSION, len(text), header.file_bytes)
    digest = hashlib.sha256(start + text).digest()
    return start + DIGESTS.pack(digest, header.plan_digest(), (holder or "").encode()[:40])


def align(offset: int) -> int:
    """The next offset at which a section may begin."""
    return -(-offset // ALIGNMENT) * ALIGNMENT


def lay_out(header: Header, shapes: Mapping[str, tuple[str, tuple[int, ...]]]) -> Header:
    """`header` with a section for each dtype and shape in `shapes`, in their order; all digests blank."""

    def placed(start: int) -> dict[str, Section]:
        sections: dict[str, Section] = {}
        for name, (dtype, shape) in shapes.items():
            num_bytes = int(dtype[2:])
            for size in shape:
                num_bytes *= size
            sections[name] = Section(align(start), num_bytes, dtype, shape)
            start = align(start) + num_bytes
        return sections

    # The header's length depends on the digits of the offsets, and these on its length: grow until it fits.
    start = PREFIX_BYTES
    while True:
        found = dataclasses.replace(header, sections=placed(start))
        if PREFIX_BYTES + len(found.to_json()) <= align(start):
            return found
        start = PREFIX_BYTES + len(found.to_json())
