"""Images a second through the data path, one core, against what people use.

resident: 32x32 images in memory, random crop (4) + flip + normalise to float32 batches of 500.
  Arms: distkit (placements device and host), torchvision v2 transforms on tensors, and the in-memory PIL pipeline of
  torchvision's CIFAR10. All draw per sample from the same distribution; first distkit's pixels are checked to be PIL's
  for the same draws.
decode: JPEG files of 64 to 256 px in an ImageFolder, RandomResizedCrop(64) + flip of torchvision v2, one worker.
  Arms: distkit (placement workers) and a plain DataLoader.
tokens: windows of 1,024 from a memory-mapped file. Arms: distkit, and slicing window by window.
permutation: milliseconds for 4,096 positions of 10^12 samples.

Targets: >= 20 x PIL, >= 3 x v2 on tensors, workers >= 1.0 x DataLoader, permutation < 2 ms.

    python benchmarks/data.py --json benchmarks/results/data.json --check
"""

from __future__ import annotations

import os
import statistics
import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from time import perf_counter
from typing import cast

import numpy as np
import torch
from harness import Median, conclude, interleave, median_of, parse_flags
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision import datasets
from torchvision.transforms import v2

from distkit.config import BatchSplit, DataConfig, Placement
from distkit.data import Augmentation, Draws, ImageDataset, SampleStream, as_dataset, synthetic
from distkit.data.reading.loader import Loader
from distkit.data.reading.placement import Reading, place
from distkit.data.sets.images import CIFAR10_MEAN, CIFAR10_STD
from distkit.data.sets.tokens import TokenDataset
from distkit.data.stream.permutation import permute

CPU = torch.device("cpu")
BATCH, PADDING = 500, 4
Arm = Callable[[], float]


def open_loader(dataset: object, batch: int, data: DataConfig) -> Loader:
    placed = place(as_dataset(dataset), Reading(data=data, seed=0, device=CPU))
    split = BatchSplit(global_batch_size=batch, microbatch_size=batch, world_size=1)
    return Loader(placed.fetcher, SampleStream(0, len(placed.dataset), batch), split, 0)


def rate(loader: Loader, steps: int) -> float:
    """Samples a second over `steps` steps after two warm-up steps; starting and ending are not counted."""
    with closing(loader):
        for step in range(2):
            loader.microbatch(step, 0)
        begin = perf_counter()
        for step in range(2, 2 + steps):
            loader.microbatch(step, 0)
        return steps * loader.split.global_batch_size / (perf_counter() - begin)


def distkit_arm(images: ImageDataset, placement: Placement) -> Arm:
    return lambda: rate(open_loader(images, BATCH, DataConfig(placement=placement)), 60)


def pil_arm(images: ImageDataset) -> Arm:
    """What torchvision's CIFAR10 does for a sample: array -> PIL -> transform -> tensor; then collate."""
    arrays = cast(Tensor, images.images).permute(0, 2, 3, 1).contiguous().numpy()
    change = [v2.RandomCrop(32, padding=PADDING), v2.RandomHorizontalFlip(), v2.PILToTensor()]
    transform = v2.Compose([*change, v2.ToDtype(torch.float32, scale=True), v2.Normalize(CIFAR10_MEAN, CIFAR10_STD)])
    return per_sample_arm(lambda i: cast(Tensor, transform(Image.fromarray(arrays[i]))), len(images), 4)


def tensor_arm(images: ImageDataset) -> Arm:
    """torchvision v2 on a uint8 tensor, a sample at a time: one call on a batch would draw once for all of it."""
    pixels = cast(Tensor, images.images)
    change = [v2.RandomCrop(32, padding=PADDING), v2.RandomHorizontalFlip()]
    transform = v2.Compose([*change, v2.ToDtype(torch.float32, scale=True), v2.Normalize(CIFAR10_MEAN, CIFAR10_STD)])
    return per_sample_arm(lambda i: cast(Tensor, transform(pixels[i])), len(images), 4)


def per_sample_arm(sample: Callable[[int], Tensor], count: int, steps: int) -> Arm:
    def arm() -> float:
        order = torch.randperm(count)[: steps * BATCH].view(steps, BATCH).tolist()
        begin = perf_counter()
        for rows in order:
            torch.stack([sample(i) for i in rows])
        return steps * BATCH / (perf_counter() - begin)

    return arm


def check_pixels(images: ImageDataset) -> None:
    """distkit's batch is what PIL and plain arithmetic give for the same draws."""
    pixels, labels = cast(tuple[Tensor, Tensor], open_loader(images, 64, DataConfig()).microbatch(3, 0))
    stream = SampleStream(0, len(images), 64)
    draws = Draws(0, torch.arange(3 * 64, 4 * 64))
    corner, mirrored = draws.integers("crop", 0, 2 * PADDING + 1, count=2), draws.bernoulli("flip", 0.5)
    mean, std = torch.tensor(CIFAR10_MEAN)[:, None, None], torch.tensor(CIFAR10_STD)[:, None, None]
    for row, index in enumerate(stream.global_batch(3).tolist()):
        padded = Image.new("RGB", (32 + 2 * PADDING, 32 + 2 * PADDING))
        padded.paste(Image.fromarray(cast(Tensor, images.images)[index].permute(1, 2, 0).numpy()), (PADDING, PADDING))
        y, x = corner[row].tolist()
        window = padded.crop((x, y, x + 32, y + 32))
        if mirrored[row]:
            window = window.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        expected = (torch.from_numpy(np.array(window)).permute(2, 0, 1) / 255 - mean) / std
        torch.testing.assert_close(pixels[row], expected, atol=1e-5, rtol=1e-5)
        assert labels[row] == images.labels[index]


def jpeg_folder(root: Path, count: int = 240) -> Path:
    """JPEG files of 64 to 256 px, smooth like photographs."""
    dice = np.random.default_rng(0)
    for number in range(count):
        height, width = dice.integers(64, 257, 2).tolist()
        coarse = Image.fromarray(dice.integers(0, 256, (8, 8, 3), dtype=np.uint8))
        folder = root / f"class{number % 4}"
        folder.mkdir(parents=True, exist_ok=True)
        coarse.resize((width, height), Image.Resampling.BICUBIC).save(folder / f"{number:04d}.jpg", quality=90)
    return root


def decode_arms(root: Path) -> dict[str, Arm]:
    transform = v2.Compose([v2.PILToTensor(), v2.RandomResizedCrop(64, antialias=True), v2.RandomHorizontalFlip(),
                            v2.ToDtype(torch.float32, scale=True)])  # fmt: skip
    folder = datasets.ImageFolder(str(root), transform)
    batch, steps = 32, 60

    def plain() -> float:
        def endless() -> Iterator[list[int]]:
            stream = SampleStream(0, len(folder), batch)
            for step in range(2 + steps):
                yield stream.global_batch(step).tolist()

        loader = iter(DataLoader(folder, batch_sampler=endless(), num_workers=1, prefetch_factor=2))
        for _ in range(2):
            next(loader)
        begin = perf_counter()
        for _ in range(steps):
            next(loader)
        return steps * batch / (perf_counter() - begin)

    return {"distkit workers": lambda: rate(open_loader(folder, batch, DataConfig(num_workers=1)), steps),
            "DataLoader": plain}  # fmt: skip


def token_arms(root: Path) -> dict[str, Arm]:
    """Tokens a second."""
    length, batch, steps = 1_024, 64, 100
    file = root / "tokens.bin"
    np.random.default_rng(0).integers(0, 50_000, 20_000_000, dtype=np.uint16).tofile(file)
    windows = TokenDataset(file, length, dtype="uint16")
    memory = np.memmap(file, np.uint16, "r")
    stream = SampleStream(0, len(windows), batch)

    def slices() -> float:
        begin = perf_counter()
        for step in range(steps):
            starts = (stream.global_batch(step) * length).tolist()
            rows = [torch.from_numpy(memory[s : s + length + 1].astype(np.int64)) for s in starts]
            block = torch.stack(rows)
            block[:, :-1].contiguous(), block[:, 1:].contiguous()
        return steps * batch * length / (perf_counter() - begin)

    def windowed() -> float:
        return rate(open_loader(windows, batch, DataConfig(placement="device")), steps) * length

    return {"distkit tokens": windowed, "slicing": slices}


def permutation_milliseconds() -> float:
    places = np.random.default_rng(0).integers(0, 10**12, 4_096)
    times = []
    for epoch in range(50):
        begin = perf_counter()
        permute(0, epoch, 10**12, places)
        times.append(1e3 * (perf_counter() - begin))
    return statistics.median(times)


def main() -> None:
    flags = parse_flags(__doc__)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    torch.set_num_threads(1)
    images = synthetic("train", 0).augmented(Augmentation(crop_padding=PADDING, flip=True))
    check_pixels(images)
    print("distkit's pixels are PIL's for the same draws")
    with tempfile.TemporaryDirectory() as folder:
        arms = {
            "distkit device": distkit_arm(images, "device"),
            "distkit host": distkit_arm(images, "host"),
            "v2 on tensors": tensor_arm(images),
            "PIL": pil_arm(images),
            **decode_arms(jpeg_folder(Path(folder) / "jpeg")),
            **token_arms(Path(folder)),
        }
        values = interleave(arms, flags.rounds)
    results: dict[str, Median | float | str] = {}
    for name, numbers in values.items():
        results[name] = median_of(numbers)
        print(f"{name:16s} {results[name]} samples/s")
    results["permutation ms"] = permutation_milliseconds()
    pairs = (("distkit device", "PIL"), ("distkit device", "v2 on tensors"), ("distkit workers", "DataLoader"),
             ("distkit tokens", "slicing"))  # fmt: skip
    ratios = {}
    for mine, other in pairs:
        ratios[other] = median_of([a / b for a, b in zip(values[mine], values[other], strict=True)])
        results[f"{mine} / {other}"] = ratios[other]
        print(f"{mine} / {other}: {ratios[other].median:.2f} [{ratios[other].low:.2f}, {ratios[other].high:.2f}]")
    print(f"permutation: {results['permutation ms']:.2f} ms for 4,096 of 10^12")
    targets = {
        ">= 20 x the PIL pipeline": ratios["PIL"].median >= 20,
        ">= 3 x v2 transforms on tensors": ratios["v2 on tensors"].median >= 3,
        "workers >= 1.0 x a plain DataLoader": ratios["DataLoader"].median >= 1.0,
        "4,096 positions of 10^12 samples < 2 ms": float(str(results["permutation ms"])) < 2,
    }
    conclude(flags, "data", results, targets)


if __name__ == "__main__":
    main()
