"""Augmentations of whole batches of images, keyed per sample: the same pixels on every device and for every split.

Two layers. The functions are pure: a batch and numbers drawn before in, a batch out. The frozen dataclasses
(`RandomResizedCrop`, `RandomErasing`, `ColorJitter`, `MixUp`, `CutMix`, `PairGeometry`) draw those numbers by name from
`Draws`, so every sample depends on its seed and position only (C1).

Nothing here waits for the device and no shape depends on data. Arithmetic is on integers, or on floats with one
correctly rounded operation at a time, so CPU and CUDA agree to the bit.
"""

from distkit.data.augment.boxes import draw_boxes, inside
from distkit.data.augment.color import (
    ColorJitter,
    adjust_brightness,
    adjust_contrast,
    adjust_hue,
    adjust_saturation,
    normalization,
    normalize,
)
from distkit.data.augment.erasing import RandomErasing, cutout, erase, noise
from distkit.data.augment.geometry import (
    PaddingMode,
    alternating_flip,
    crop_flip,
    flip,
    random_crop,
    rotate90,
)
from distkit.data.augment.mixing import CutMix, MixUp, beta_table, cutmix, mixup, partner_draws, partners
from distkit.data.augment.pairs import PairGeometry
from distkit.data.augment.resample import RandomResizedCrop, resized_crop, resized_crop_nearest

__all__ = [
    "ColorJitter",
    "CutMix",
    "MixUp",
    "PaddingMode",
    "PairGeometry",
    "RandomErasing",
    "RandomResizedCrop",
    "adjust_brightness",
    "adjust_contrast",
    "adjust_hue",
    "adjust_saturation",
    "alternating_flip",
    "beta_table",
    "crop_flip",
    "cutmix",
    "cutout",
    "draw_boxes",
    "erase",
    "flip",
    "inside",
    "mixup",
    "noise",
    "normalization",
    "normalize",
    "partner_draws",
    "partners",
    "random_crop",
    "resized_crop",
    "resized_crop_nearest",
    "rotate90",
]
