"""What a data set is to distkit, and how any map-style torch data set becomes one."""

from __future__ import annotations

from typing import Protocol, cast, runtime_checkable

from torch import Tensor, nn
from torch.utils.data import IterableDataset

from distkit.data.batch import Batch, batch_size, to_device
from distkit.data.collate import collate_of
from distkit.data.stream.draws import Draws
from distkit.errors import DataError, raised_inside

__all__ = ["Augments", "Batch", "Dataset", "Indexable", "MapDataset", "as_dataset", "batch_size", "to_device"]


@runtime_checkable
class Dataset(Protocol):
    """Samples by index, a whole batch at a time.

    It may also have `augment`, see `Augments`, and `fingerprint`, a text that tells its data from others: a resume on
    data with another one is refused.
    """

    def __len__(self) -> int:
        """Number of samples."""

    def fetch(self, indices: Tensor) -> Batch:
        """The samples with these indices, in this order.

        Args:
            indices: int64 [B] on the CPU, each in [0, len(self)); an index may occur twice.

        Returns:
            a batch whose tensors have first dim B, on any device; always the same one for the same indices.
        """


@runtime_checkable
class Augments(Protocol):
    """A data set that changes its batches on the training device, with draws keyed per sample."""

    def augment(self, batch: Batch, draws: Draws) -> Batch:
        """A batch from `fetch`, on the training device, with as many samples -> what the model is given."""


class Indexable(Protocol):
    """A map-style torch data set: `len(it)` samples, `it[i]` one of them.

    It may also have `collate(samples)`, which makes a batch of a list of samples: for those of different sizes, which
    it pads (return the lengths, too, and `weight` from compute_loss where the mean is over tokens). Without it
    torch's `default_collate` does. See `distkit.data.collate`.
    """

    def __len__(self) -> int:
        """Number of samples."""

    def __getitem__(self, index: int, /) -> object:
        """One sample: tensors, arrays, numbers, or tuples and dicts of them; without `collate` always of one shape."""


class MapDataset:
    """A map-style torch data set as a `Dataset`: samples are taken one by one and collated."""

    def __init__(self, samples: Indexable) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def fetch(self, indices: Tensor) -> Batch:
        """The samples with these numbers, collated; `__getitems__` is used where the data set has it."""
        numbers = indices.tolist()
        several = getattr(self.samples, "__getitems__", None)
        samples = several(numbers) if several else [self.samples[i] for i in numbers]
        return collate_of(self.samples)(samples)


def as_dataset(candidate: object) -> Dataset:
    """`candidate` itself where it has `fetch`, or adapted where it is a map-style torch data set.

    Raises:
        DataError: it is neither, or it has no samples.
    """
    sized = hasattr(candidate, "__len__") and not isinstance(candidate, type | nn.Module)
    dataset: Dataset | None = None
    if sized and hasattr(candidate, "fetch"):
        dataset = cast(Dataset, candidate)
    elif sized and hasattr(candidate, "__getitem__") and not isinstance(candidate, IterableDataset | dict):
        dataset = MapDataset(cast(Indexable, candidate))
    if dataset is None:
        raise DataError(
            "build_dataset returned something that is not a data set",
            expected="__len__ and fetch(indices), or a torch data set with __len__ and __getitem__",
            got=f"the class {candidate.__name__}" if isinstance(candidate, type) else type(candidate).__name__,
        )
    if count_samples(dataset) == 0:
        raise DataError("build_dataset returned an empty data set", expected="at least one sample", got=0)
    return dataset


def count_samples(dataset: Dataset) -> int:
    """The number of samples.

    Raises:
        DataError: Python takes what `__len__` gives for no length.
    """
    samples = dataset.samples if isinstance(dataset, MapDataset) else dataset
    try:
        return len(samples)
    except (TypeError, ValueError) as error:
        if raised_inside(error):
            raise
        raise DataError(f"__len__ of {type(samples).__name__}, which build_dataset returned, gives no length",
                        expected="the number of samples", got=error) from error  # fmt: skip
