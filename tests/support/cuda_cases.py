"""Every augmentation and every draw as a case: a function of a batch's tensors and its draws."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from support.augmenting import images_of
from torch import Tensor

from distkit.data.augment import (
    ColorJitter,
    CutMix,
    MixUp,
    PairGeometry,
    RandomErasing,
    RandomResizedCrop,
    adjust_hue,
    alternating_flip,
    crop_flip,
    cutmix,
    cutout,
    erase,
    flip,
    inside,
    mixup,
    noise,
    normalization,
    normalize,
    partner_draws,
    partners,
    random_crop,
    resized_crop_nearest,
    rotate90,
)

ONE = 2**16
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)


@dataclass
class Case:
    """`function(*tensors, draws)`; the batch is the tensors' first dim."""

    function: Callable[..., Tensor | tuple[Tensor, ...]]
    tensors: tuple[Tensor, ...]
    start: int = 1000


def floats(seed=0, dtype=torch.float32, batch=24):
    return normalize(images_of(batch, seed=seed), *normalization(MEAN, STD)).to(dtype)


def channels_last(images):
    return images.to(memory_format=torch.channels_last)


def crop(padding, mode="zero", fill=0.0):
    def function(images, draws):
        y, x = draws.integers("crop", 0, 2 * padding + 1, count=2).unbind(1)
        return random_crop(images, y, x, padding, mode, fill)

    return function


def crop_and_flip(padding, mode="zero", fill=0.0):
    def function(images, draws):
        y, x = draws.integers("crop", 0, 2 * padding + 1, count=2).unbind(1)
        return crop_flip(images, y, x, draws.bernoulli("flip", 0.5), padding, mode, fill)

    return function


def cut(size):
    def function(images, draws):
        y, x = draws.integers("y", 0, images.shape[2]), draws.integers("x", 0, images.shape[3])
        return cutout(images.clone(), y, x, size)

    return function


def mix_with_partners(mix):
    def function(images, pool, draws):
        other = partners(draws, len(pool))
        share = draws.uniform("share")
        mixed, part = mix.apply(images, pool.index_select(0, other), partner_draws(draws))
        return mixed, part, other, mixup(images, pool.index_select(0, other), share)

    return function


def boxes_of(image, scale, ratio):
    how, erasing = RandomResizedCrop(size=(8, 8), scale=scale, ratio=ratio), RandomErasing(ratio=ratio)
    return lambda _, draws: (how.boxes(draws, *image), erasing.boxes(draws, *image))


def every_draw(_, draws):
    return (
        draws.bits("a"),
        draws.bits("a", 3),
        draws.uniform("b", 2),
        draws.integers("c", -5, 90, 2),
        draws.integers("d", -(2**30), 2**30),
        draws.bernoulli("e", 0.3),
        draws.bernoulli("f", 1.0, 2),
    )


def every_hue():
    """Every fifth level of the three channels, and every turn by a fourth of a sextant."""
    axis = torch.arange(0, 256, 15, dtype=torch.uint8)
    colours = torch.cartesian_prod(axis, axis, axis).T.reshape(1, 3, -1, axis.numel())
    shifts = torch.arange(-3 * ONE, 3 * ONE + 1, ONE // 4)
    return colours.expand(len(shifts), -1, -1, -1), shifts


def random_boxes(count, height, width):
    generator = torch.Generator().manual_seed(4)
    top, left = (torch.randint(0, n, (count,), generator=generator) for n in (height, width))
    h, w = ((torch.rand(count, generator=generator) * (n + 1)).long() for n in (height, width))
    return torch.stack([top, left, h.minimum(height - top), w.minimum(width - left)], 1)


JITTER = ColorJitter(brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1)
STRONGEST = ColorJitter(brightness=63, contrast=63, saturation=63, hue=0.5)
RESIZE = RandomResizedCrop(size=(24, 20))
MOVES = PairGeometry(crop_padding=3, flip=True, rotate=True)
MIRRORED = PairGeometry(crop_padding=3, padding_mode="reflect", flip=True, rotate=True)
EVERYTHING = PairGeometry(resized_crop=RandomResizedCrop(size=(20, 20)), crop_padding=3, flip=True, rotate=True)
PAIR = images_of(24, 3, 24, 24), images_of(24, 1, 24, 24, seed=1)[:, 0]
MANY = torch.zeros(20_000)

CASES = {
    "draws": Case(every_draw, (torch.zeros(5000),)),
    "draws late in the stream": Case(every_draw, (torch.zeros(5000),), start=2**62),
    "partners": Case(lambda _, draws: (partners(draws, 50_000), partners(draws, 2**48)), (MANY,)),
    "crop zero": Case(crop(4), (images_of(81),)),
    "crop zero, one channel": Case(crop(2), (images_of(9, 1, 28, 28),)),
    "crop fill": Case(crop(3, fill=255), (images_of(24, 1, 9, 7).long(),)),
    "crop reflect": Case(crop(4, "reflect"), (images_of(81),)),
    "crop reflect, small": Case(crop(4, "reflect"), (images_of(24, 3, 5, 9),)),
    "crop channels last": Case(crop(4), (channels_last(images_of(24)),)),
    "crop floats": Case(crop(4), (floats(),)),
    "flip": Case(lambda images, draws: flip(images, draws.bernoulli("flip", 0.5)), (images_of(24, 3, 15, 16),)),
    "crop and flip zero": Case(crop_and_flip(4), (images_of(81),)),
    "crop and flip fill": Case(crop_and_flip(3, fill=255), (images_of(24, 1, 9, 7),)),
    "crop and flip reflect": Case(crop_and_flip(4, "reflect"), (images_of(81),)),
    "alternating flip": Case(
        lambda images, epochs, draws: flip(images, alternating_flip(draws, epochs)), (images_of(24), torch.arange(24))
    ),
    "rotate": Case(lambda images, draws: rotate90(images, draws.integers("r", 0, 4)), (images_of(24, 3, 16, 16),)),
    "resized crop": Case(RESIZE.apply, (images_of(24, 3, 40, 50),)),
    "resized crop, hopeless ratio": Case(RESIZE.apply, (images_of(24, 3, 300, 30),)),
    "resized crop, enlarged": Case(RandomResizedCrop(size=(65, 33)).apply, (images_of(24, 1, 17, 9),)),
    "resized crop channels last": Case(RESIZE.apply, (channels_last(images_of(24, 3, 40, 50)),)),
    "resized crop nearest": Case(
        lambda masks, draws: resized_crop_nearest(masks, RESIZE.boxes(draws, 40, 50), (24, 20)),
        (images_of(24, 1, 40, 50).long(),),
    ),
    "boxes": Case(boxes_of((224, 224), (0.08, 1.0), (0.75, 1.333)), (MANY,)),
    "boxes of long images": Case(boxes_of((1333, 201), (0.001, 0.9), (0.1, 10.0)), (MANY,)),
    "cutout": Case(cut(8), (floats(),)),
    "cutout larger than the image": Case(cut(80), (floats(),)),
    "erasing zero": Case(RandomErasing().apply, (floats(),)),
    "erasing zero, levels": Case(RandomErasing(p=1.0).apply, (images_of(24, 3, 32, 31),)),
    "erasing noise": Case(RandomErasing(fill="noise").apply, (images_of(24, 3, 32, 31),)),
    "erase with a colour": Case(
        lambda images, boxes, draws: erase(images, boxes, noise(draws, "n", (3, 1, 1))),
        (images_of(24), random_boxes(24, 32, 32)),
    ),
    "inside": Case(lambda boxes, draws: inside(boxes, 37, 41), (random_boxes(500, 37, 41),)),
    "jitter": Case(JITTER.apply, (images_of(24, 3, 32, 31),)),
    "jitter, one channel": Case(JITTER.apply, (images_of(24, 1, 32, 31),)),
    "jitter, strongest": Case(STRONGEST.apply, (images_of(24, 3, 32, 31),)),
    "jitter channels last": Case(JITTER.apply, (channels_last(images_of(24)),)),
    "every hue": Case(lambda images, shifts, draws: adjust_hue(images, shifts), every_hue()),
    "normalise": Case(
        lambda images, shift, scale, draws: normalize(images, shift[0], scale[0]),
        (images_of(64), *(constant[None] for constant in normalization(MEAN, STD))),
    ),
    "mixup": Case(mix_with_partners(MixUp(alpha=0.2)), (floats(), floats(1, batch=30))),
    "mixup bf16": Case(mix_with_partners(MixUp(alpha=1.0)), (floats(0, torch.bfloat16), floats(1, torch.bfloat16))),
    "mixup fp16": Case(mix_with_partners(MixUp(alpha=1.0)), (floats(0, torch.float16), floats(1, torch.float16))),
    "cutmix": Case(mix_with_partners(CutMix()), (floats(), floats(1, batch=30))),
    "cutmix, small alpha": Case(mix_with_partners(CutMix(alpha=0.1)), (floats(), floats(1, batch=30))),
    "cutmix of many areas": Case(
        lambda images, others, boxes, draws: cutmix(images, others, boxes),
        (images_of(2000, 1, 37, 41), images_of(2000, 1, 37, 41, seed=1), random_boxes(2000, 37, 41)),
    ),
    "pairs": Case(MOVES.apply, PAIR),
    "pairs reflect": Case(MIRRORED.apply, PAIR),
    "pairs resized": Case(EVERYTHING.apply, PAIR),
    "pairs of more masks": Case(
        PairGeometry(crop_padding=3, ignore_label=-100, flip=True).apply,
        (PAIR[0], images_of(24, 2, 24, 24, seed=2).long()),
    ),
}
