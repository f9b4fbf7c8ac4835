"""torchvision's data sets: some by name, resident, one table row each; any other as an object that the caller made.

An instance of any torchvision set with a `transform` that ends in tensors of one size is a map-style set and needs
nothing from here: `as_dataset` takes it as it is. Without a transform its images are PIL objects, which torch does not
collate: wrap it in `TensorSamples`, or hold all of it in memory with `resident_images`.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import warnings
import zlib
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Protocol, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from distkit.config import Split
from distkit.config.data import ground_color
from distkit.data.collate import with_inner
from distkit.data.dataset import Indexable
from distkit.data.sets.decode import check_depth, flattened, is_transparent, orientation, planes, upright
from distkit.data.sets.images import CIFAR10_MEAN, CIFAR10_STD, ImageDataset
from distkit.errors import DataError, nearest
from distkit.files import locked

#: Files of a set that are opened to see whether torchvision's loader is right for them.
MAX_LOOKS = 64
MNIST_MEAN, MNIST_STD = (0.1307,), (0.3081,)
FASHION_MNIST_MEAN, FASHION_MNIST_STD = (0.2860,), (0.3530,)
CIFAR100_MEAN = (0.5071, 0.4867, 0.4408)
CIFAR100_STD = (0.2675, 0.2565, 0.2761)


@dataclass(frozen=True)
class TorchvisionSet:
    """A set with `train=`, `download=`, `data` and `targets`, as the CIFAR and MNIST families of torchvision have them.

    Args:
        title: its name for people, with the year of the paper.
        class_name: the class in `torchvision.datasets`.
        folder: what is left below the root once it is unpacked.
        mean: mean per channel on the scale of [0, 1].
        std: standard deviation per channel likewise.
        num_classes: classes.
    """

    title: str
    class_name: str
    folder: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    num_classes: int = 10


TORCHVISION_SETS = {
    "cifar10": TorchvisionSet("CIFAR-10", "CIFAR10", "cifar-10-batches-py", CIFAR10_MEAN, CIFAR10_STD),
    "cifar100": TorchvisionSet("CIFAR-100", "CIFAR100", "cifar-100-python", CIFAR100_MEAN, CIFAR100_STD, 100),
    "mnist": TorchvisionSet("MNIST", "MNIST", "MNIST", MNIST_MEAN, MNIST_STD),
    "fashion_mnist": TorchvisionSet(
        "Fashion-MNIST", "FashionMNIST", "FashionMNIST", FASHION_MNIST_MEAN, FASHION_MNIST_STD
    ),
}


class _Opened(Protocol):
    """What is read of an instance: images uint8 [N, H, W, 3] or [N, H, W], and a class number each."""

    data: Tensor | np.ndarray[tuple[int, ...], np.dtype[np.uint8]]
    targets: Tensor | list[int]
    classes: list[str]


class _Opener(Protocol):
    """A torchvision class of the families above."""

    def __call__(self, root: Path, *, train: bool = True, download: bool = False) -> _Opened: ...


def torchvision_set(name: str, root: Path, split: Split) -> ImageDataset:
    """A set of `TORCHVISION_SETS` in memory, downloaded into `root` unless it is there: images uint8 [N, C, H, W].

    Raises:
        DataError: no such name; or it cannot be downloaded, unpacked or verified: the message names the other sources.
            Nothing is left of a failed download.
    """
    if name not in TORCHVISION_SETS:
        names = ", ".join(TORCHVISION_SETS)
        raise DataError(
            "there is no data set of this name", expected=names, got=name, fix=nearest(name, TORCHVISION_SETS)
        )
    row = TORCHVISION_SETS[name]
    try:
        opened = _open(row, root, split)
    except PermissionError as error:
        raise DataError(
            f"{row.title} cannot be read in {root}, nor downloaded to it",
            expected="files that this user may read, or a folder that it may write",
            got=error,
            fix="--data.root DIR",
        ) from error
    except (OSError, HTTPException, RuntimeError, EOFError, ImportError) as error:
        raise DataError(
            f"{row.title} cannot be downloaded to {root}",
            expected="a network connection, or a verified copy made before by the same command",
            got=f"{type(error).__name__}: {error}",
            fix="--data.source folder --data.root DIR, or --data.source synthetic",
        ) from error
    return ImageDataset(
        _channels_first(torch.as_tensor(opened.data)),
        torch.as_tensor(opened.targets, dtype=torch.int64),
        class_names=tuple(opened.classes),
        source=f"{row.title} in {root}",
        mean=row.mean,
        std=row.std,
    )


def _channels_first(data: Tensor) -> Tensor:
    """[N, H, W] -> [N, 1, H, W]; [N, H, W, C] -> [N, C, H, W]."""
    return data.unsqueeze(1) if data.ndim == 3 else data.permute(0, 3, 1, 2).contiguous()


def _opener(row: TorchvisionSet) -> _Opener:
    from torchvision import datasets

    return cast(_Opener, getattr(datasets, row.class_name))


def _open(row: TorchvisionSet, root: Path, split: Split) -> _Opened:
    """torchvision's instance; every file is compared with a checksum before it is read."""
    opener = _opener(row)

    def opened() -> _Opened:
        if not _unpacked_whole(root / row.folder / "raw"):
            raise RuntimeError(f"a file in {root / row.folder} is damaged")
        with warnings.catch_warnings():
            # NumPy 2.4 warns about the way in which the arrays of 2009 were pickled.
            warnings.simplefilter("ignore", np.exceptions.VisibleDeprecationWarning)
            try:
                return opener(root, train=split == "train")
            except (AssertionError, KeyError, TypeError, ValueError) as error:
                # How torchvision refuses the head of a file of the MNIST family.
                raise RuntimeError(f"a file in {root / row.folder} is damaged") from error

    try:
        return opened()
    except RuntimeError:
        root.mkdir(parents=True, exist_ok=True)
    with locked(root / ".distkit-lock"):
        try:
            return opened()
        except RuntimeError:
            _download(row, root)
        return opened()


def _unpacked_whole(folder: Path) -> bool:
    """Whether each `NAME` beside a `NAME.gz` has the CRC-32 and the length that the archive ends with (RFC 1952).

    torchvision compares the files of CIFAR with their md5 when it opens them, but those of MNIST only as they arrive.
    """
    for archive in folder.glob("*.gz"):
        trailer = archive.read_bytes()[-8:]
        content = archive.with_suffix("")
        if not content.is_file():
            return False
        whole = content.read_bytes()
        if trailer != zlib.crc32(whole).to_bytes(4, "little") + (len(whole) % 2**32).to_bytes(4, "little"):
            return False
    return True


def _download(row: TorchvisionSet, root: Path) -> None:
    """Download and unpack in a folder of its own, and move it to its place when all of it is verified."""
    opener = _opener(row)
    target = root / row.folder
    with tempfile.TemporaryDirectory(prefix=".download-", dir=root) as name:
        _reuse_archives(opener, root, target, Path(name))
        opener(Path(name), download=True)
        if target.exists():
            shutil.rmtree(target)
        (Path(name) / row.folder).replace(target)


def _reuse_archives(opener: _Opener, root: Path, target: Path, temporary: Path) -> None:
    """Reuse archives in `root` for the new download if their md5 is right."""
    from torchvision.datasets.utils import check_integrity

    filename = getattr(opener, "filename", None)
    if filename and check_integrity(str(root / filename), getattr(opener, "tgz_md5", "")):
        (temporary / filename).symlink_to(os.path.abspath(root / filename))
    for archive, md5 in getattr(opener, "resources", ()):
        if check_integrity(str(target / "raw" / archive), md5):
            place = temporary / target.name / "raw"
            place.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(target / "raw" / archive, place / archive)


class TensorSamples:
    """A map-style set of (image, target) whose PIL objects become tensors, so that torch can collate them.

    The image, or a lone sample that is one: uint8 [1, H, W] where it is grey, else RGB uint8 [3, H, W], upright and
    without transparency, as `open_image` gives it; a `loader` of the set that drops transparency comes before.
    PIL objects in the target, such as the masks of VOC: their raw values, int64 [H, W], upright too. All else is left
    as it is.

    Args:
        samples: the set; `collate` and `fingerprint` stay its own.
        background: what transparent pixels are laid on: white, grey, black or #rrggbb.
    """

    def __init__(self, samples: Indexable, background: str = "white") -> None:
        self.samples = samples
        self.background = background
        ground_color(background, "background")

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> object:
        """Sample `index`, without PIL objects."""
        sample = self.samples[index]
        if isinstance(sample, tuple) and sample:
            return self._image(sample[0]), *(_target(item) for item in sample[1:])
        return self._image(sample)

    def _image(self, value: object) -> object:
        if not isinstance(value, Image.Image):
            return value
        check_depth(value, getattr(value, "filename", "") or "of the data set")
        return torch.from_numpy(planes(np.asarray(flattened(value, None, self.background))).copy())


def _target(value: object) -> object:
    if isinstance(value, Image.Image):
        return torch.from_numpy(np.asarray(upright(value)).astype(np.int64))
    if isinstance(value, tuple):
        return tuple(_target(item) for item in value)
    return value


def loader_notes(samples: object) -> tuple[str, ...]:
    """A sentence where torchvision's own loader reads images that it does not show as a person sees them.

    It ignores EXIF and drops transparency. At most 64 files are opened, spread evenly over the set, and not decoded.
    """
    for each in with_inner(samples):
        files = getattr(each, "samples", None)
        if getattr(getattr(each, "loader", None), "__module__", "") != "torchvision.datasets.folder" or not files:
            continue
        chosen = np.unique(np.linspace(0, len(files) - 1, MAX_LOOKS).astype(np.int64)).tolist()
        odd = [str(files[i][0]) for i in chosen if _is_odd(files[i][0])]
        if odd:
            return (f"{len(odd)} of {len(chosen)} images looked at are turned by EXIF or transparent ({odd[0]}), which "
                    "torchvision's loader ignores: give the data set loader=distkit.data.open_image",)  # fmt: skip
    return ()


def _is_odd(path: str | Path) -> bool:
    try:
        with Image.open(path) as image:
            # a PNG without EXIF in its head would be decoded in search of it
            turned = (image.format != "PNG" or "exif" in image.info) and orientation(image) != 1
            return turned or is_transparent(image)
    except Exception:  # a damaged file is named when it is read
        return False


def resident_images(
    samples: Indexable,
    *,
    source: str,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    class_names: tuple[str, ...] | None = None,
) -> ImageDataset:
    """Every sample of a map-style set of (image, class number) in memory, decoded one by one: for any torchvision set.

    Args:
        samples: PIL images, or uint8 tensors [C, H, W]; all of one size.
        source: where they come from, for people.
        mean: mean per channel on the scale of [0, 1].
        std: standard deviation per channel likewise, > 0.
        class_names: one name a class; None: the set's own `classes`, or numbers where it has none.

    Raises:
        DataError: a sample has another form than the first; the message names its number.
    """
    view = TensorSamples(samples)
    if len(view) == 0:
        raise DataError(f"{source} is empty", expected="at least one image", got=0)
    images: Tensor | None = None
    labels = torch.empty(len(view), dtype=torch.int64)
    for i in range(len(view)):
        image, label = _pair(view[i], i, source)
        if images is None:
            images = image.new_empty((len(view), *image.shape))
        if image.shape != images.shape[1:]:
            raise DataError(
                f"image {i} of {source} differs in size",
                expected=f"{list(images.shape[1:])}, as image 0",
                got=list(image.shape),
            )
        images[i] = image
        labels[i] = label
    names = class_names or tuple(getattr(samples, "classes", ())) or tuple(map(str, range(int(labels.max()) + 1)))
    return ImageDataset(cast(Tensor, images), labels, class_names=names, source=source, mean=mean, std=std)


def _pair(sample: object, number: int, source: str) -> tuple[Tensor, int]:
    if isinstance(sample, tuple) and len(sample) == 2:
        image, label = sample
        right = isinstance(image, Tensor) and image.dtype == torch.uint8 and image.ndim == 3
        if right and isinstance(label, int | np.integer | Tensor):
            return image, int(label)
    raise DataError(
        f"sample {number} of {source} has the wrong form",
        expected="a tuple (image, class number), the image of PIL or uint8 [C, H, W]",
        got=tuple(type(item).__name__ for item in sample) if isinstance(sample, tuple) else type(sample).__name__,
    )
