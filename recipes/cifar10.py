"""CIFAR-10 with a residual network. Expected: 95 % test accuracy in 160 epochs (classic).

    accelerate launch recipes/cifar10.py                              # 2 CPU cores or any GPU, a few epochs
    accelerate launch recipes/cifar10.py --preset classic             # every GPU of this machine
    torchrun --nproc-per-node 2 recipes/cifar10.py                    # two ranks, on GPUs or CPU cores
    python recipes/cifar10.py --debug                                 # one process, every module watched

quick: ResNet-8, 4 epochs. classic: ResNet-18, 160 epochs. fast: an airbench-like net, 10 epochs on one GPU.
"""

from dataclasses import dataclass, replace
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from distkit import LossOutput, Recipe, TrainConfig, main
from distkit.config import SGD, Cosine, OneCycle, Split
from distkit.config.check import require, require_number
from distkit.data import Augmentation, Dataset, ImageDataset, ImageFacts, image_facts, load_images
from distkit.metrics import expected_initial_loss, topk_correct
from distkit.models import FastNet, resnet18, resnet_cifar, whitening_init_
from distkit.optim import ParamGroup, default_param_groups


@dataclass(frozen=True, kw_only=True)
class Config(TrainConfig):
    """ResNets and a fast net on CIFAR-10, or on any folder of 32x32 images, by class."""

    model: Literal["resnet8", "resnet20", "resnet18", "fastnet"] = "resnet18"
    """Which network."""
    num_classes: int | None = None
    """Classes of the head; None: as many as the data has."""
    channels: int | None = None
    """Channels of an image; None: as many as the data has."""
    norm: Literal["batch", "group", "none"] = "batch"
    """Normalisation layers of the ResNets."""
    crop_padding: int = 4
    """Random crops from images padded by this many pixels, >= 0."""
    flip: bool = True
    """Random left-right flips."""
    cutout: int = 0
    """Side of a random square that is blanked, in pixels, >= 0."""
    label_smoothing: float = 0.0
    """Share of the target spread over all classes, in [0, 1)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_number("num_classes", self.num_classes, least=1, example="None")
        require(self.channels in (None, 1, 3), "channels", "1, 3 or None", self.channels, "None")
        require_number("crop_padding", self.crop_padding, least=0, most=31, example="4")
        require_number("cutout", self.cutout, least=0, most=32, example="8")
        require_number("label_smoothing", self.label_smoothing, least=0, below=1, example="0.1")
        ok = self.model != "fastnet" or self.norm == "batch"
        require(ok, "norm", "batch, which fastnet has built in", self.norm, "batch")


def facts_of(config: Config) -> ImageFacts:
    """Classes and channels: those of the data, where the configuration leaves them to it."""
    if config.num_classes and config.channels:
        return ImageFacts(config.num_classes, config.channels)
    facts = image_facts(config.data)
    return ImageFacts(config.num_classes or facts.num_classes, config.channels or facts.channels)


def resolve_config(config: Config) -> Config:
    """What the data decide becomes part of the run, so that its model can be loaded without them."""
    facts = facts_of(config)
    return replace(config, num_classes=facts.num_classes, channels=facts.channels)


def build_model(config: Config) -> nn.Module:
    facts = facts_of(config)
    if config.model == "fastnet":
        return FastNet(facts.num_classes, in_channels=facts.channels)
    if config.model == "resnet18":
        return resnet18(facts.num_classes, norm=config.norm, in_channels=facts.channels)
    depth = int(config.model.removeprefix("resnet"))
    return resnet_cifar(depth, num_classes=facts.num_classes, norm=config.norm, in_channels=facts.channels)


def build_dataset(config: Config, split: Split) -> ImageDataset:
    augmentation = Augmentation(crop_padding=config.crop_padding, flip=config.flip, cutout=config.cutout)
    return load_images(config.data, split, seed=config.seed, augmentation=augmentation, facts=facts_of(config))


def init_model_(config: Config, model: nn.Module, train_set: Dataset) -> None:
    """FastNet's first layer whitens the patches of the first 5,000 training images."""
    if isinstance(model, FastNet) and isinstance(train_set, ImageDataset):
        whitening_init_(model, train_set.normalized(range(min(5_000, len(train_set)))))


def build_param_groups(config: Config, model: nn.Module) -> list[ParamGroup]:
    """FastNet's batch norm biases learn 64 times as fast; everything else as usual."""
    groups = default_param_groups(model, config.optim)
    if isinstance(model, FastNet):
        for group in groups:
            if all(name.endswith(".bias") for name in group["param_names"]):
                group["lr"] = 64 * config.optim.lr
    return groups


def compute_loss(config: Config, model: nn.Module, batch: tuple[Tensor, Tensor]) -> LossOutput:
    """images [B, C, 32, 32], labels [B] int64 -> mean cross entropy over B, and counts of correct samples."""
    images, labels = batch
    logits = model(images)
    smoothing = config.label_smoothing if model.training else 0.0
    loss = F.cross_entropy(logits, labels, label_smoothing=smoothing)
    ks = (1, 5) if logits.shape[1] > 5 else (1,)
    return LossOutput(loss, topk_correct(logits, labels, ks))


PRESETS = {
    "quick": Config(
        model="resnet8",
        num_epochs=4,
        global_batch_size=128,
        precision="bf16",
        channels_last=True,
        crop_padding=2,
        eval_batch_size=500,
        optim=SGD(lr=0.2, momentum=0.9, nesterov=True, weight_decay=5e-4),
        schedule=OneCycle(warmup_ratio=0.2),
    ),
    "classic": Config(
        model="resnet18",
        num_epochs=160,
        global_batch_size=128,
        precision="bf16",
        channels_last=True,
        eval_every=3_910,
        eval_batch_size=500,
        optim=SGD(lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4),
        schedule=Cosine(warmup_epochs=1),
    ),
    "fast": Config(
        model="fastnet",
        num_epochs=10,
        global_batch_size=1_000,
        precision="bf16",
        channels_last=True,
        compile=True,
        deterministic=False,
        crop_padding=2,
        label_smoothing=0.2,
        eval_batch_size=2_000,
        optim=SGD(lr=1.5, momentum=0.85, nesterov=True, weight_decay=1.3e-3),
        schedule=OneCycle(warmup_ratio=0.23, initial_lr_ratio=0.2, anneal="linear"),
    ),
}

recipe = Recipe(
    "cifar10",
    Config,
    build_model,
    build_dataset,
    compute_loss,
    presets=PRESETS,
    build_param_groups=build_param_groups,
    init_model_=init_model_,
    best=("top1", "max"),
    expected_initial_loss=lambda config: expected_initial_loss(facts_of(config).num_classes),
    resolve_config=resolve_config,
)

if __name__ == "__main__":
    main(recipe)
