"""Every augmentation and every draw gives the same bits on CPU and CUDA, and never waits for the device.

Each case runs on a CUDA device where there is one, and everywhere on two that take its place: torch's fake tensors,
which know what a device may mix and when the host must wait, and the stand-in, which also computes.
"""

from __future__ import annotations

import pytest
import torch
from support.augmenting import NO_CUDA, assert_cuda_agrees, draws_of, images_of, no_waiting, outputs, same_bits
from support.cuda_cases import CASES
from support.standin import CUDA, NotAlike, OnDevice, forget_tables, stand_in, to_host
from torch._subclasses.fake_tensor import FakeTensorMode

from distkit.data import Augmentation, ImageDataset
from distkit.data.augment import PairGeometry, random_crop
from distkit.data.reading.fetchers import BatchMaker
from distkit.data.sets.images import MaskDataset
from distkit.data.stream.requests import Request


@pytest.fixture(autouse=True)
def _no_tables_are_left():
    """A fake table must not serve a real device later, nor a real one a fake."""
    forget_tables()
    yield
    forget_tables()


@pytest.mark.parametrize("name", CASES)
def test_fake_cuda_mixes_no_devices_and_reads_nothing_back(name):
    case = CASES[name]
    expected = outputs(case.function(*case.tensors, draws_of(len(case.tensors[0]))))
    with FakeTensorMode(allow_non_fake_inputs=True):
        on_device = [torch.empty_like(tensor, device="cuda") for tensor in case.tensors]
        found = outputs(case.function(*on_device, draws_of(len(case.tensors[0]), device="cuda")))
    for one, other in zip(found, expected, strict=True):
        assert (one.device.type, one.dtype, one.shape) == ("cuda", other.dtype, other.shape)


@pytest.mark.parametrize("name", CASES)
def test_device_code_gives_the_same_bits_by_operations_that_cuda_does_alike(name):
    case = CASES[name]
    expected = outputs(case.function(*case.tensors, draws_of(len(case.tensors[0]), start=case.start)))
    with stand_in() as device:
        on_device = [tensor.to("cuda", non_blocking=True) for tensor in case.tensors]
        draws = draws_of(len(case.tensors[0]), start=case.start, device="cuda")
        case.function(*on_device, draws)
        before = device.copies
        found = [to_host(tensor) for tensor in outputs(case.function(*on_device, draws))]
        assert device.copies == before  # tables are sent once
    for one, other in zip(found, expected, strict=True):
        assert same_bits(one, other)


@pytest.mark.gpu
@NO_CUDA
@pytest.mark.parametrize("name", CASES)
def test_cuda_gives_the_same_bits_without_waiting(name):
    case = CASES[name]
    warm_up = draws_of(len(case.tensors[0]), start=case.start, device="cuda")
    case.function(*(tensor.cuda() for tensor in case.tensors), warm_up)
    assert_cuda_agrees(case.function, *case.tensors, start=case.start)


def image_set(device, augmentation):
    images, labels = images_of(200), torch.arange(200) % 5
    images, labels = (tensor.to(device, non_blocking=True) for tensor in (images, labels))
    names = tuple("abcde")
    return ImageDataset(images, labels, class_names=names, source="a test", augmentation=augmentation)


def mask_set(device, augmentation):
    images, masks = images_of(200, 1, 20, 20), images_of(200, 1, 20, 20, seed=1)[:, 0] % 5
    images, masks = (tensor.to(device, non_blocking=True) for tensor in (images, masks))
    return MaskDataset(images, masks, class_names=tuple("abcde"), source="a test", augmentation=augmentation)


DATASETS = {
    "images": (image_set, Augmentation()),
    "images, zero": (image_set, Augmentation(crop_padding=4, flip=True, cutout=6)),
    "images, reflect": (image_set, Augmentation(crop_padding=4, padding_mode="reflect", flip=True, cutout=6)),
    "masks": (mask_set, PairGeometry()),
    "masks, moved": (mask_set, PairGeometry(crop_size=13, flip=True, flip_vertical=True, rotate=True)),
}
REQUESTS = [Request(start, torch.arange(start % 90, start % 90 + 30).numpy()) for start in (0, 30, 10**12)]


def read(dataset, device):
    make = BatchMaker(dataset, 7, device, channels_last=True)
    return [make(request) for request in REQUESTS]


@pytest.mark.parametrize("name", DATASETS)
def test_resident_sets_send_their_indices_to_the_device_and_nothing_else(name, monkeypatch):
    make, augmentation = DATASETS[name]
    pinned = []
    # pinning wants a driver
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: pinned.append(tensor) or tensor)
    expected = read(make("cpu", augmentation), torch.device("cpu"))
    with stand_in() as device:
        on_device = make("cuda", augmentation)
        read(on_device, CUDA)
        before = device.copies
        found = read(on_device, CUDA)
        assert device.copies == before + len(REQUESTS)
        assert len(pinned) == 2 * len(REQUESTS)
    for batch, other in zip(found, expected, strict=True):
        for mine, theirs in zip(batch, other, strict=True):
            assert same_bits(to_host(mine), theirs)
            assert mine.stride() == theirs.stride()


@pytest.mark.gpu
@NO_CUDA
@pytest.mark.parametrize("name", DATASETS)
def test_resident_sets_on_cuda(name):
    make, augmentation = DATASETS[name]
    expected = read(make("cpu", augmentation), torch.device("cpu"))
    on_device = make("cuda", augmentation)
    read(on_device, CUDA)
    with no_waiting():
        found = read(on_device, CUDA)
    for batch, other in zip(found, expected, strict=True):
        for mine, theirs in zip(batch, other, strict=True):
            assert mine.device.type == "cuda"
            assert same_bits(mine.cpu(), theirs)


@pytest.mark.parametrize(
    ("what", "words"),
    [
        (lambda on_device, host: on_device + host, "CPU and on the device"),
        (lambda on_device, host: on_device[host.long()] + on_device, "CPU and on the device"),
        (lambda on_device, host: on_device[on_device > 3], "to count"),
        (lambda on_device, host: int(on_device.sum()), "_local_scalar_dense"),
        (lambda on_device, host: on_device.cpu(), "to the host"),
        (lambda on_device, host: host.copy_(on_device), "to the host"),
        (lambda on_device, host: host.to(on_device.device), "without non_blocking"),
        (lambda on_device, host: torch.tensor([1, 2], device=on_device.device), "without non_blocking"),
        (lambda on_device, host: on_device / 3, "not known|reciprocal"),
        (lambda on_device, host: on_device.float() / 3, "div of floats"),
        (lambda on_device, host: on_device.float().add(on_device, alpha=0.3), "alpha"),
        (lambda on_device, host: on_device.float().sum(), "sum of floats"),
        (lambda on_device, host: on_device.float().exp(), "exp of floats"),
        (lambda on_device, host: (on_device.float() * 300).to(torch.uint8), "do not fit"),
        (lambda on_device, host: on_device.long().sub(1).to(torch.uint8), "do not fit"),
    ],
)
def test_the_stand_in_sees_what_cuda_would_not_do(what, words):
    host = torch.arange(8, dtype=torch.uint8)
    with stand_in() as device:
        on_device = host.to("cuda", non_blocking=True)
        assert isinstance(on_device, OnDevice)
        assert device.copies == 1
        assert on_device.is_cuda
        with pytest.raises(NotAlike, match=words):
            what(on_device, host)


def test_cuda_tensors_among_the_hosts_are_refused_by_torch_itself():
    with FakeTensorMode(allow_non_fake_inputs=True), pytest.raises(RuntimeError, match="device"):
        random_crop(torch.empty(2, 3, 8, 8, dtype=torch.uint8, device="cuda"), torch.zeros(2), torch.zeros(2), 2)
