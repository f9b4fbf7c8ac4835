"""Generated images: each class is a small periodic colour texture, seen at a random place, contrast and side.

A texture is a sum of a few waves of low frequency whose amplitudes and phases belong to the class. A random shift turns
the phases, a random mirror image exchanges them, and a background of other waves and noise lie over it. The mean image
of every class is nearly the same grey, so that a linear model has little to hold on to.
"""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray

from distkit.config import Split

SIZE = 32
#: Waves of a class's texture, and of the background that belongs to no class.
NUM_WAVES = 4
MAX_FREQUENCY = 4
"""Periods across an image, at most, in each direction."""
MAX_SHIFT = 8
"""Pixels."""
CONTRAST = (12.0, 36.0)
"""Least and most amplitude of the texture in grey levels of 256."""
BACKGROUND = 26.0
NOISE = 26.0


def generate(seed: int, split: Split, count: int, num_classes: int) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Images uint8 [count, 3, 32, 32] and labels int64 [count], a pure function of the arguments."""
    frequencies = _frequencies()
    classes = _generator(seed, "classes")
    textures = np.zeros((num_classes, 3, len(frequencies)), np.complex64)
    for texture in textures:
        waves = classes.choice(len(frequencies), NUM_WAVES, replace=False)
        phases = classes.uniform(0, 2 * np.pi, (3, NUM_WAVES))
        texture[:, waves] = np.exp(1j * phases) / np.sqrt(NUM_WAVES / 2)
    samples = _generator(seed, split)
    labels = samples.permutation(np.arange(count) % num_classes)
    spectrum = _placed(samples, textures[labels], frequencies)
    spectrum += _background(samples, count, len(frequencies))
    return _rendered(samples, spectrum, frequencies), labels


def _frequencies() -> NDArray[np.float32]:
    """Float32 [K, 2]: vertical and horizontal periods across an image, one of each pair f, -f."""
    steps = range(-MAX_FREQUENCY, MAX_FREQUENCY + 1)
    return np.array([(v, u) for v in steps for u in steps if (v, u) > (0, 0)], np.float32)


def _generator(seed: int, purpose: str) -> np.random.Generator:
    digest = hashlib.sha256(f"distkit synthetic images {seed} {purpose}".encode()).digest()
    return np.random.Generator(np.random.Philox(int.from_bytes(digest[:16], "little")))


def _placed(
    samples: np.random.Generator, spectrum: NDArray[np.complex64], frequencies: NDArray[np.float32]
) -> NDArray[np.complex64]:
    """Each texture [N, 3, K] at its own contrast and shift."""
    count = len(spectrum)
    contrast = samples.uniform(*CONTRAST, (count, 1, 1)).astype(np.float32)
    shift = samples.uniform(-MAX_SHIFT, MAX_SHIFT, (count, 2)).astype(np.float32)
    turn = np.exp(np.complex64(2j * np.pi / SIZE) * (shift @ frequencies.T))
    placed: NDArray[np.complex64] = spectrum * contrast * turn[:, None, :]
    return placed


def _background(samples: np.random.Generator, count: int, num_frequencies: int) -> NDArray[np.complex64]:
    """[N, 3, K]: every frequency with a random amplitude and phase, of standard deviation BACKGROUND in all."""
    parts = samples.standard_normal((2, count, 3, num_frequencies), dtype=np.float32)
    background: NDArray[np.complex64] = (parts[0] + np.complex64(1j) * parts[1]) * np.float32(
        BACKGROUND / np.sqrt(num_frequencies)
    )
    return background


def _rendered(
    samples: np.random.Generator, spectrum: NDArray[np.complex64], frequencies: NDArray[np.float32]
) -> NDArray[np.uint8]:
    """Sum the waves, mirror half of the images, add noise: [N, 3, K] -> uint8 [N, 3, 32, 32]."""
    rows, columns = np.mgrid[:SIZE, :SIZE].reshape(2, -1).astype(np.float32)
    angles = 2 * np.pi / SIZE * (frequencies[:, :1] * rows + frequencies[:, 1:] * columns)
    pixels = spectrum.real @ np.cos(angles) - spectrum.imag @ np.sin(angles)
    images = pixels.reshape(len(spectrum), 3, SIZE, SIZE)
    mirrored = samples.random(len(spectrum)) < 0.5
    images[mirrored] = images[mirrored, :, :, ::-1]
    images += NOISE * samples.standard_normal(images.shape, dtype=np.float32)
    images += 128
    return images.clip(0, 255, out=images).astype(np.uint8)
