"""Folders of images: decoded once, again when they change, and every fault named."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from distkit.data import folder
from distkit.data.packed import write as pack_writer
from distkit.errors import DataError

ARCHIVE = Path(__file__).parents[4] / "shared" / "data" / "cifar10-jpeg.tar.xz"


SHARD = "images-00000-of-00001.safetensors"


def save(path, seed=0, size=(32, 32), mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    channels = () if mode == "L" else (3,)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], *channels), np.uint8)
    Image.fromarray(pixels).save(path)
    return pixels


@pytest.fixture
def tree(tmp_path):
    """Two classes, six training and two test images, as PNG so that pixels are exact."""
    root = tmp_path / "images"
    for i in range(3):
        save(root / "train" / "cat" / f"{i}.png", i)
        save(root / "train" / "ant" / f"{i}.png", 10 + i)
    save(root / "test" / "cat" / "0.png", 20)
    save(root / "test" / "ant" / "0.png", 21)
    return root


@pytest.fixture
def decoded(monkeypatch):
    """Counts the decoding passes."""
    calls = []
    write = pack_writer._write_shard
    monkeypatch.setattr(pack_writer, "_write_shard", lambda *args: calls.append(args) or write(*args))
    return calls


def pixels_of(path):
    return torch.from_numpy(np.asarray(Image.open(path)).transpose(2, 0, 1).copy())


def test_images_come_by_class_and_name(tree):
    dataset = folder(tree, "train")
    assert dataset.class_names == ("ant", "cat")
    assert dataset.labels.tolist() == [0, 0, 0, 1, 1, 1]
    names = [f"{name}/{i}.png" for name in ("ant", "cat") for i in range(3)]
    for image, name in zip(dataset.images, names, strict=True):
        assert image.equal(pixels_of(tree / "train" / name))
    assert dataset.describe() == f"6 images 3x32x32 uint8, 2 classes, from folder {tree}"
    assert len(folder(tree, "test")) == 2


def test_it_is_decoded_once(tree, decoded):
    first = folder(tree, "train")
    again = folder(tree, "train")
    assert len(decoded) == 1
    assert again.images.equal(first.images)
    assert again.labels.equal(first.labels)
    assert [path.name for path in tree.glob(".*")] == [".distkit-cache-train"]


def change_pixels(root):
    save(root / "train" / "ant" / "1.png", 99)


def add_image(root):
    save(root / "train" / "ant" / "7.png", 99)


def remove_image(root):
    (root / "train" / "ant" / "1.png").unlink()


def touch(root):
    os.utime(root / "train" / "ant" / "1.png", ns=(1, 1))


@pytest.mark.parametrize("change", [change_pixels, add_image, remove_image, touch])
def test_a_changed_folder_is_decoded_again(tree, decoded, change):
    folder(tree, "train")
    change(tree)
    dataset = folder(tree, "train")
    assert len(decoded) == 2
    files = sorted((tree / "train" / "ant").iterdir())
    assert len(dataset) == len(files) + 3
    assert dataset.images[1].equal(pixels_of(files[1]))


def test_a_damaged_copy_is_made_again(tree, decoded):
    expected = folder(tree, "train").images.clone()
    cache = tree / ".distkit-cache-train" / SHARD
    whole = bytearray(cache.read_bytes())
    whole[-1000] ^= 1
    for count, damage in enumerate([bytes(whole), bytes(whole[:-100]), b"", b"nonsense"], 2):
        cache.unlink()
        cache.write_bytes(damage)
        assert folder(tree, "train").images.equal(expected)
        assert len(decoded) == count


def test_an_interrupted_copy_is_completed(tree, decoded):
    expected = folder(tree, "train").images.clone()
    (tree / ".distkit-cache-train" / "index.json").unlink()
    assert folder(tree, "train").images.equal(expected)
    (tree / ".distkit-cache-train" / SHARD).unlink()
    assert folder(tree, "train").images.equal(expected)
    assert len(decoded) == 2


def test_the_copy_may_lie_elsewhere(tree, tmp_path, decoded):
    cache = tmp_path / "a" / "cache"
    other = shutil.copytree(tree, tmp_path / "other")
    save(other / "train" / "ant" / "0.png", 55)
    first = folder(tree, "train", cache)
    second = folder(other, "train", cache)
    assert not first.images.equal(second.images)
    assert folder(tree, "train", cache).images.equal(first.images)
    assert len(decoded) == 2
    assert not list(tree.glob(".distkit*"))
    assert len(list(cache.iterdir())) == 2


def test_the_copy_is_for_everyone_that_the_folder_is_for(tree):
    before = os.umask(0o027)
    try:
        folder(tree, "train")
    finally:
        os.umask(before)
    assert (tree / ".distkit-cache-train" / SHARD).stat().st_mode & 0o777 == 0o640


def test_other_kinds_of_images_become_rgb(tree):
    save(tree / "train" / "cat" / "9.JPG", 3, mode="L")
    Image.open(tree / "train" / "cat" / "1.png").convert("P").save(tree / "train" / "cat" / "8.gif")
    (tree / "train" / "cat" / "notes.txt").write_text("not an image")
    (tree / "train" / "cat" / ".hidden.png").write_text("not an image")
    save(tree / "train" / "cat" / "deeper" / "5.png", 4)
    assert folder(tree, "train").labels.tolist() == [0, 0, 0, 1, 1, 1, 1, 1, 1]


def test_any_one_size_is_taken_when_asked(tree):
    for path in tree.glob("t*/*/*.png"):
        save(path, 0, size=(20, 10))
    assert folder(tree, "train", image_size=None).images.shape == (6, 3, 10, 20)


def no_root(root):
    shutil.rmtree(root)
    return str(root)


def no_test(root):
    shutil.rmtree(root / "test")
    return str(root / "test")


def no_classes(root):
    shutil.rmtree(root / "train")
    (root / "train").mkdir()
    return "no class folders"


def empty_class(root):
    remove = root / "train" / "cat"
    shutil.rmtree(remove)
    remove.mkdir()
    return str(remove)


def other_classes(root):
    save(root / "train" / "dog" / "0.png")
    return "dog"


def truncated(root):
    path = root / "train" / "cat" / "1.png"
    path.write_bytes(path.read_bytes()[:500])
    return str(path)


def not_an_image(root):
    path = root / "train" / "cat" / "2.jpg"
    path.write_text("hello")
    return str(path)


def empty_image(root):
    path = root / "train" / "ant" / "0.png"
    path.write_bytes(b"")
    return str(path)


def another_size(root):
    save(root / "train" / "cat" / "2.png", size=(32, 31))
    return f"{root / 'train' / 'cat' / '2.png'} differs in size"


@pytest.mark.parametrize(
    "spoil",
    [no_root, no_test, no_classes, empty_class, other_classes, truncated, not_an_image, empty_image, another_size],
)
@pytest.mark.parametrize("image_size", [32, None])
def test_faults_are_named_and_leave_nothing(tree, spoil, image_size):
    words = spoil(tree)
    with pytest.raises(DataError) as caught:
        folder(tree, "train", image_size=image_size)
    assert words in str(caught.value)
    assert caught.value.exit_code == 2
    assert not list(tree.glob(".distkit*"))


def test_an_odd_size_names_both_sizes(tree):
    with pytest.raises(DataError, match=r"expected: 16x16 pixels\n  got:      32x32 pixels"):
        folder(tree, "train", image_size=16)


def test_the_first_damaged_image_is_the_one_named(tree):
    for name in ("ant/2.png", "cat/0.png", "cat/2.png"):
        (tree / "train" / name).write_bytes(b"x")
    with pytest.raises(DataError, match=r"ant/2\.png"):
        folder(tree, "train")


def test_a_place_that_cannot_be_written_names_the_option(tree, tmp_path, monkeypatch):
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(DataError, match=r"--data\.cache-dir DIR"):
        folder(tree, "train", file / "cache")

    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("distkit.files.os.open", refuse)
    with pytest.raises(DataError, match=r"--data\.cache-dir DIR"):
        folder(tree, "train")


def test_a_full_disk_leaves_nothing(tree, monkeypatch):
    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("distkit.files.os.fsync", full)
    with pytest.raises(DataError, match="No space left"):
        folder(tree, "train")
    assert not list(tree.glob(".distkit*"))


def load_and_report(root, barrier, queue):
    count = []
    write = pack_writer._write_shard
    pack_writer._write_shard = lambda *args: count.append(1) or write(*args)
    barrier.wait()
    total = int(folder(root, "train").images.long().sum())
    queue.put((total, len(count)))


def test_processes_that_start_together_decode_once(tree):
    context = multiprocessing.get_context("spawn")
    barrier, queue = context.Barrier(2), context.Queue()
    workers = [context.Process(target=load_and_report, args=(tree, barrier, queue)) for _ in range(2)]
    for worker in workers:
        worker.start()
    found = [queue.get(timeout=60) for _ in workers]
    for worker in workers:
        worker.join(60)
        assert worker.exitcode == 0
    assert len({total for total, _ in found}) == 1
    assert sum(decodings for _, decodings in found) == 1
    assert [path.name for path in tree.glob(".*")] == [".distkit-cache-train"]


@pytest.mark.skipif(not ARCHIVE.exists(), reason="../shared/data/cifar10-jpeg.tar.xz is not here")
def test_real_photographs(tmp_path):
    with tarfile.open(ARCHIVE, "r|xz") as archive:
        for member in archive:
            path = Path(member.name)
            if path.parts[0] != "test":
                break
            if member.isfile() and int(path.stem) < 12:
                target = tmp_path / ("train" if int(path.stem) < 10 else "test") / path.parts[1] / path.name
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(archive.extractfile(member).read())
    train, test = folder(tmp_path, "train"), folder(tmp_path, "test")
    assert len(train.class_names) == 10
    assert train.describe().startswith("100 images 3x32x32 uint8, 10 classes")
    assert len(test) == 20
    assert train.images.float().std() > 30
