"""Data: the sample stream, draws keyed per sample, data sets and their sources. Floor 1: it knows no engine."""

from distkit.data.batch import Batch, ImageBatch, batch_size, map_tensors, to_device
from distkit.data.dataset import Augments, Dataset, MapDataset, as_dataset
from distkit.data.packed.read import PackedImages, open_packed
from distkit.data.reading.iterable import IterableData
from distkit.data.sets.decode import open_image
from distkit.data.sets.images import CIFAR10_MEAN, CIFAR10_STD, Augmentation, ImageDataset, MaskDataset
from distkit.data.sets.mask_folder import mask_folder
from distkit.data.sets.text import encode_text_file, read_vocabulary
from distkit.data.sets.tokens import TokenDataset
from distkit.data.sets.torchvision_sets import TensorSamples, resident_images, torchvision_set
from distkit.data.sources import ImageFacts, cifar10, folder, image_facts, load_images, synthetic
from distkit.data.stream.draws import Draws
from distkit.data.stream.stream import SampleStream, microbatch_start

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
    "ImageFacts",
    "IterableData",
    "MapDataset",
    "MaskDataset",
    "PackedImages",
    "SampleStream",
    "TensorSamples",
    "TokenDataset",
    "as_dataset",
    "batch_size",
    "cifar10",
    "encode_text_file",
    "folder",
    "image_facts",
    "load_images",
    "map_tensors",
    "mask_folder",
    "microbatch_start",
    "open_image",
    "open_packed",
    "read_vocabulary",
    "resident_images",
    "synthetic",
    "to_device",
    "torchvision_set",
]
