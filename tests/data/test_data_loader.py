"""From the stream to a batch: the same augmented samples however the global batch is cut."""

import torch

from distkit.config import BatchSplit
from distkit.data import Augmentation, synthetic
from distkit.data.loader import ResidentLoader

CPU = torch.device("cpu")
IMAGES = synthetic("train", 0, num_train=200, num_test=10).augmented(Augmentation(crop_padding=4, flip=True, cutout=8))


def loader(world_size: int, micro: int, rank: int, channels_last: bool = False) -> ResidentLoader:
    split = BatchSplit(global_batch_size=24, microbatch_size=micro, world_size=world_size)
    return ResidentLoader(dataset=IMAGES, seed=5, split=split, rank=rank, device=CPU, channels_last=channels_last)


def test_pixels_do_not_depend_on_the_split() -> None:
    whole = loader(1, 24, 0)
    for world_size, micro in ((1, 6), (2, 4), (3, 8), (24, 1)):
        ranks = [loader(world_size, micro, rank) for rank in range(world_size)]
        for step in (0, 1, 9, 1_000):
            images, labels = whole.microbatch(step, 0)
            parts = [ranks[r].microbatch(step, a) for a in range(24 // world_size // micro) for r in range(world_size)]
            assert torch.equal(torch.cat([part[0] for part in parts]), images)
            assert torch.equal(torch.cat([part[1] for part in parts]), labels)


def test_channels_last_changes_the_layout_only() -> None:
    plain, last = loader(1, 24, 0).microbatch(3, 0), loader(1, 24, 0, channels_last=True).microbatch(3, 0)
    assert torch.equal(plain[0], last[0])
    assert last[0].is_contiguous(memory_format=torch.channels_last)
    assert not plain[0].is_contiguous(memory_format=torch.channels_last)


def test_augmentation_changes_with_the_epoch() -> None:
    source = loader(1, 24, 0)
    first = source.stream.indices(0, 200).tolist()
    second = source.stream.indices(200, 200).tolist()
    assert sorted(first) == sorted(second) == list(range(200))
    assert first != second
