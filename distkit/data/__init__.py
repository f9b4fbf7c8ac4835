"""Data: the sample stream, draws keyed per sample, data sets and their sources. Floor 1: it knows no engine."""

from distkit.data.batch import Batch, ImageBatch, batch_size, map_tensors, to_device
from distkit.data.dataset import Augments, Dataset, MapDataset, as_dataset
from distkit.data.draws import Draws
from distkit.data.images import CIFAR10_MEAN, CIFAR10_STD, Augmentation, ImageDataset
from distkit.data.sources import cifar10, folder, load_images, synthetic
from distkit.data.stream import SampleStream, microbatch_start

__all__ = [
    "CIFAR10_MEAN",
    "CIFAR10_STD",
    "Augmentation",
    "Augments",
    "Batch",
    "Dataset",
    "Draws",
    "ImageBatch",
    "ImageDataset",
    "MapDataset",
    "SampleStream",
    "as_dataset",
    "batch_size",
    "cifar10",
    "folder",
    "load_images",
    "map_tensors",
    "microbatch_start",
    "synthetic",
    "to_device",
]
