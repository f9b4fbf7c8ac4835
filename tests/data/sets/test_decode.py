"""Image files as people have them: turned, transparent, of several frames, of 16 bits, damaged, not allowed."""

from __future__ import annotations

import io
import os
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin, features
from torch.utils.data import Subset
from torchvision.datasets import ImageFolder

from distkit.data import TensorSamples, as_dataset, cifar10, folder, mask_folder, open_image, open_packed
from distkit.data.packed.pack import pack
from distkit.data.packed.read import PackedImages
from distkit.data.reading.placement import notes_of
from distkit.data.sets.decode import SUFFIXES, Oddities, decode, head
from distkit.errors import ConfigError, DataError

VALUES = {0: 0, 255: 1}


def pixels(size=(6, 4), seed=0, channels=3):
    """uint8 [H, W, C] for a size of (width, height): large fields, which survive JPEG."""
    fields = np.random.default_rng(seed).integers(0, 256, (2, 2, channels), np.uint8)
    return np.kron(fields, np.ones((size[1] // 2, size[0] // 2, 1), np.uint8))


#: What each orientation does to an upright image before it is stored (EXIF 2.3, table of tag 274).
STORED = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, 1),
    7: lambda a: np.rot90(a, 2).swapaxes(0, 1),
    8: lambda a: np.rot90(a, -1),
}
FORMATS = [".jpg", ".png", ".tif", ".webp"] + ([".avif"] if ".avif" in SUFFIXES else [])


def save_turned(path, upright, turned, **options):
    exif = Image.Exif()
    exif[0x0112] = turned
    path.parent.mkdir(parents=True, exist_ok=True)
    lossless = {
        ".webp": {"lossless": True},
        ".jpg": {"quality": 95, "subsampling": 0},
        ".avif": {"quality": 95, "subsampling": "4:4:4"},
    }
    options = {**lossless.get(path.suffix, {}), **options}
    Image.fromarray(np.ascontiguousarray(STORED[turned](upright))).save(path, exif=exif, **options)
    return path


def close(a, b):
    return a.shape == b.shape and np.abs(a.astype(int) - b.astype(int)).max() < 24


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize("turned", range(1, 9))
def test_an_image_is_upright_whatever_its_file_says(tmp_path, suffix, turned):
    upright = pixels((32, 16))
    path = save_turned(tmp_path / f"a{suffix}", upright, turned)
    assert close(decode(path), upright)
    assert head(path) == ("RGB", (16, 32))
    assert close(np.asarray(open_image(str(path))), upright)


def test_exif_after_the_pixels_counts(tmp_path):
    """The PNG specification allows eXIf there."""
    upright = pixels((32, 16))
    data = save_turned(tmp_path / "a.png", upright, 6).read_bytes()
    at = data.index(b"eXIf") - 4
    size = 12 + int.from_bytes(data[at : at + 4], "big")
    moved = data[:at] + data[at + size : -12] + data[at : at + size] + data[-12:]
    (tmp_path / "a.png").write_bytes(moved)
    with Image.open(tmp_path / "a.png") as image:
        assert "exif" not in image.info
    assert close(decode(tmp_path / "a.png"), upright)
    assert head(tmp_path / "a.png")[1] == (16, 32)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
@pytest.mark.parametrize(
    "exif", [b"Exif\0\0", b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03", b"rubbish", b"Exif\0\0II*\0\xff\xff\xff\xff"]
)
def test_damaged_exif_costs_no_image(tmp_path, exif):
    Image.fromarray(pixels((32, 16))).save(tmp_path / "a.jpg", exif=exif, quality=95, subsampling=0)
    assert close(decode(tmp_path / "a.jpg"), pixels((32, 16)))


def turned_tree(root):
    """Two classes of square pixels' images: every second one is turned."""
    uprights = {}
    for split in ("train", "test"):
        for name in ("a", "b"):
            for i in range(3):
                path = root / split / name / f"{i}.png"
                uprights[split, name, i] = pixels((8, 4), seed=i + 10 * (name == "b"))
                save_turned(path, uprights[split, name, i], (1, 6, 3)[i])
    return [uprights["train", name, i] for name in ("a", "b") for i in range(3)]


@pytest.mark.parametrize("form", ["raw", "encoded"])
def test_every_way_to_read_a_folder_turns_its_images(tmp_path, form):
    uprights = turned_tree(tmp_path / "in")
    pack(str(tmp_path / "in"), tmp_path / "out", form=form)
    packed = PackedImages(tmp_path / "out" / "train")
    samples = TensorSamples(ImageFolder(tmp_path / "in" / "train"))
    resident = folder(tmp_path / "in", "train", image_size=None)
    by_hand = ImageFolder(tmp_path / "in" / "train", loader=open_image)
    for i, upright in enumerate(uprights):
        expected = torch.from_numpy(upright.transpose(2, 0, 1).copy())
        for ways in (packed[i][0], samples[i][0], resident.images[i]):
            assert ways.equal(expected)
        assert np.array_equal(np.asarray(by_hand[i][0]), upright)


def test_a_torchvision_set_whose_loader_ignores_exif_is_told_so(tmp_path):
    turned_tree(tmp_path)
    default, own = (ImageFolder(tmp_path / "train", **how) for how in ({}, {"loader": open_image}))
    (note,) = notes_of(as_dataset(Subset(default, range(3))))
    assert note.startswith(f"4 of 6 images looked at are turned by EXIF or transparent ({tmp_path}/train/a/1.png)")
    assert notes_of(as_dataset(own)) == ()
    for path in tmp_path.rglob("*.png"):
        path.write_bytes(b"damaged")
    assert notes_of(as_dataset(default)) == ()


def test_images_and_masks_are_turned_each_for_itself(tmp_path):
    upright = pixels((8, 4), channels=1)[..., 0]
    save_turned(tmp_path / "train" / "images" / "a.jpg", upright, 6)
    save_turned(tmp_path / "train" / "masks" / "a.png", np.where(upright > 100, 255, 0).astype(np.uint8), 3)
    data = mask_folder(tmp_path, "train", VALUES, ("dark", "bright"))
    assert close(data.images[0, 0].numpy(), upright)
    assert np.array_equal(data.masks[0].numpy(), upright > 100)


def transparent(mode):
    """An image that is black, half of it transparent."""
    image = Image.new("RGBA", (8, 8), (0, 0, 0, 255))
    image.paste((0, 0, 0, 0), (0, 0, 4, 8))
    if mode == "P":
        return image.quantize(4)
    return image.convert(mode)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
@pytest.mark.parametrize(("background", "value"), [("white", 255), ("black", 0), ("#808080", 128), ("grey", 128)])
def test_transparent_pixels_lie_on_the_ground_that_was_asked_for(tmp_path, mode, background, value):
    transparent(mode).save(tmp_path / "a.png")
    noted = Oddities()
    for read_as in ("RGB", "L"):
        read = decode(tmp_path / "a.png", read_as, background, oddities=noted)
        assert (read[:, :4] == value).all()
        assert (read[:, 4:] == 0).all()
    assert len(noted.notes(background)) == 1


def test_transparency_by_one_colour_and_half_transparency(tmp_path):
    image = Image.new("RGB", (8, 8), (0, 0, 0))
    image.paste((10, 20, 30), (0, 0, 4, 8))
    image.save(tmp_path / "a.png", transparency=(0, 0, 0))
    read = decode(tmp_path / "a.png")
    assert (read[:, 4:] == 255).all()
    assert (read[:, :4] == [10, 20, 30]).all()
    Image.new("RGBA", (4, 4), (0, 0, 0, 128)).save(tmp_path / "b.webp", lossless=True)
    assert (np.abs(decode(tmp_path / "b.webp").astype(int) - 127) <= 1).all()


def test_an_opaque_image_with_an_alpha_channel_is_nothing_unusual(tmp_path):
    Image.fromarray(pixels()).convert("RGBA").save(tmp_path / "a.png")
    noted = Oddities()
    assert np.array_equal(decode(tmp_path / "a.png", oddities=noted), pixels())
    assert noted.notes("white") == ()


@pytest.mark.parametrize("background", ["pink", "#12345", "white ", ""])
def test_a_ground_that_is_no_colour_is_refused(tmp_path, background):
    transparent("RGBA").save(tmp_path / "a.png")
    with pytest.raises((ConfigError, DataError), match="background"):
        decode(tmp_path / "a.png", background=background)


ANIMATED = [".gif", ".png", ".tif", ".webp"]


@pytest.mark.parametrize("suffix", ANIMATED)
def test_of_several_frames_the_first_is_taken(tmp_path, suffix):
    frames = [Image.new("RGB", (8, 8), color) for color in ((255, 0, 0), (0, 255, 0), (0, 0, 255))]
    options = {"lossless": True} if suffix == ".webp" else {}
    frames[0].save(tmp_path / f"a{suffix}", save_all=True, append_images=frames[1:], **options)
    noted = Oddities()
    assert (decode(tmp_path / f"a{suffix}", oddities=noted) == [255, 0, 0]).all()
    assert noted.notes("white") == (f"1 image of several frames, of which the first is used ({tmp_path}/a{suffix})",)
    frames[0].save(tmp_path / f"b{suffix}", **options)
    noted = Oddities()
    decode(tmp_path / f"b{suffix}", oddities=noted)
    assert noted.notes("white") == ()


def odd_tree(root):
    """20 images, of which 3 are transparent and 4 have frames."""
    for split in ("train", "test"):
        for i in range(20):
            path = root / split / "a" / f"{i:02}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            image = Image.fromarray(pixels((8, 8), i))
            if i < 3:
                image.putalpha(100)
            options = {"save_all": True, "append_images": [image]} if 3 <= i < 7 else {}
            if options:
                options["append_images"] = [Image.fromarray(pixels((8, 8), 99))]
            image.save(path, **options)
    return root


def test_unusual_images_are_counted_and_said_once(tmp_path, capsys):
    root = odd_tree(tmp_path / "in")
    expected = [
        f"{root}/train: 3 images with transparent pixels, laid on black ({root}/train/a/00.png)",
        f"{root}/train: 4 images of several frames, of which the first is used ({root}/train/a/03.png)",
    ]
    for _ in range(2):  # decoded, and from the decoded copy
        notes = folder(root, "train", image_size=8, background="black").notes
        assert list(notes[:2]) == expected
        assert len(notes) == 3
    for form, alpha in (("raw", "with transparent pixels, laid"), ("encoded", "with an alpha channel: what")):
        capsys.readouterr()
        pack(str(root), tmp_path / form, form=form, splits=["train"])
        said = capsys.readouterr().err
        assert said.count(alpha) == said.count("4 images of several frames") == 1
        images = open_packed(tmp_path / form, "train")
        assert sum(alpha in note for note in images.notes) == 1
    pack(str(root), tmp_path / "checked", form="encoded", check=True, splits=["train"])
    assert "3 images with transparent pixels" in capsys.readouterr().err


def test_the_ground_is_part_of_a_decoded_copy_and_of_a_packed_split(tmp_path):
    root = odd_tree(tmp_path / "in")
    white, black = (folder(root, "train", image_size=8, background=each) for each in ("white", "black"))
    assert not white.images[0].equal(black.images[0])
    assert white.images[10].equal(black.images[10])
    assert folder(root, "train", image_size=8).images[0].equal(white.images[0])
    fingerprints = set()
    for ground, expected in (("white", white), ("black", black)):
        pack(str(root), tmp_path / ground, form="encoded", background=ground, splits=["train"])
        packed = PackedImages(tmp_path / ground / "train")
        assert all(packed[i][0].equal(expected.images[i]) for i in range(20))
        fingerprints.add(packed.fingerprint)
        with pytest.raises(DataError, match="holds something else"):
            pack(str(root), tmp_path / ground, form="encoded", background="#010203", splits=["train"])
    assert len(fingerprints) == 2


@pytest.mark.parametrize("mode", ["I;16", "I", "F"])
def test_more_than_8_bits_are_refused_by_name(tmp_path, mode):
    values = np.full((8, 8), 40_000)
    array = {"I;16": np.uint16, "I": np.int32, "F": np.float32}[mode]
    Image.fromarray(values.astype(array)).save(tmp_path / "a.tif")
    with pytest.raises(DataError, match=r"a\.tif has pixels of mode .*8 bits"):
        decode(tmp_path / "a.tif", "L")
    with Image.open(tmp_path / "a.tif") as image, pytest.raises(DataError, match="of mode"):
        TensorSamples([(image, 0)])[0]


@pytest.mark.parametrize(
    ("name", "options"),
    [("a.jfif", {"format": "JPEG"}), ("a.JPE", {"format": "JPEG"}), ("a.WebP", {}), ("a.TIFF", {}), ("a.tif", {}),
     ("a.bmp", {}), ("a.GIF", {}), ("a.avif", {}), ("a.jp2", {})],
)  # fmt: skip
def test_endings_that_people_have(tmp_path, name, options):
    known = {"a.avif": "avif", "a.jp2": "jpg_2000", "a.WebP": "webp"}
    if name in known and not features.check(known[name]):
        pytest.skip("this Pillow cannot")
    place = tmp_path / "train" / "a"
    place.mkdir(parents=True)
    shutil.copytree(tmp_path / "train", tmp_path / "test")
    image = Image.fromarray(pixels((8, 8)))
    image.save(place / name, **options)
    image.save(tmp_path / "test" / "a" / "b.png")
    assert len(folder(tmp_path, "train", image_size=8)) == 1


@pytest.fixture
def nobody():
    """A folder that everybody may enter, and a process without root's rights."""
    place = Path(tempfile.mkdtemp())
    place.chmod(0o755)
    root = os.geteuid() == 0
    yield place, lambda: os.seteuid(65534) if root else None
    if root:
        os.seteuid(0)
    for path in [place, *place.rglob("*")]:
        path.chmod(0o755)
    shutil.rmtree(place)


def test_permission_denied_is_not_absence(nobody):
    place, drop = nobody
    root = place / "in"
    for split in ("train", "test"):
        for name in ("a", "b"):
            (root / split / name).mkdir(parents=True)
            Image.fromarray(pixels((8, 8))).save(root / split / name / "0.png")
    pack(str(root), place / "out")
    cache = place / "cache"
    cache.mkdir()
    cache.chmod(0o777)
    drop()

    def refused(path, what, read):
        if os.geteuid() == 65534:
            os.seteuid(0)
        mode = path.stat().st_mode
        path.chmod(0)
        drop()
        with pytest.raises(DataError) as caught:
            read()
        assert f"{what} cannot be read" in str(caught.value)
        assert "Permission denied" in str(caught.value)
        assert f"type:     chmod u+r{'x' if path.is_dir() else ''} " in str(caught.value)
        if os.geteuid() == 65534:
            os.seteuid(0)
        path.chmod(mode)

    def resident():
        return folder(root, "train", cache, image_size=8)

    refused(root, root / "train", resident)
    refused(root / "train", root / "train", resident)
    refused(root / "train" / "b", root / "train" / "b", resident)
    refused(root / "train" / "b" / "0.png", f"the image {root / 'train' / 'b' / '0.png'}", resident)
    refused(place / "out" / "train", place / "out" / "train", lambda: open_packed(place / "out", "train"))
    index = place / "out" / "train" / "index.json"
    refused(index, index, lambda: open_packed(place / "out", "train"))
    refused(root, root, lambda: pack(str(root), place / "other"))
    named = place / "named"
    named.mkdir()
    named.chmod(0)
    drop()
    with pytest.raises(DataError, match=r"CIFAR-10 cannot be read in (.|\n)*Permission denied") as caught:
        cifar10(named, "train")
    assert "network" not in str(caught.value)


def test_what_is_wrong_with_a_file_is_named(tmp_path):
    whole = io.BytesIO()
    Image.fromarray(pixels((64, 64))).save(whole, "PNG")
    for name, data, says in (
        ("empty.png", b"", "got:      an empty file"),
        ("text.png", b"hello", "cannot be decoded"),
        ("cut.png", whole.getvalue()[:80], "cannot be decoded"),
        ("with space.png", b"x", f"rm '{tmp_path}/with space.png'"),
    ):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(DataError) as caught:
            decode(tmp_path / name)
        assert says in str(caught.value)
        assert name in str(caught.value)


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".gif", ".tif", ".webp", ".bmp"])
def test_no_damage_escapes_as_another_error(tmp_path, suffix):
    """Pillow raises struct.error, KeyError and others on some files."""
    path = tmp_path / f"a{suffix}"
    Image.fromarray(pixels((16, 16))).save(path)
    whole = path.read_bytes()
    rng = np.random.default_rng(0)
    for _ in range(150):
        data = bytearray(whole[: rng.integers(1, len(whole) + 1)])
        for at in rng.integers(len(data), size=4):
            data[at] = rng.integers(256)
        path.write_bytes(data)
        try:
            assert decode(path).ndim == 3
        except DataError as error:
            assert str(path) in str(error)  # noqa: PT017  # most damage is refused, some shows only in the pixels


def test_an_orientation_in_text_chunks_counts(tmp_path):
    """ImageMagick writes EXIF so."""
    exif = Image.Exif()
    exif[0x0112] = 6
    profile = b"Exif\0\0" + exif.tobytes().removeprefix(b"Exif\0\0")
    info = PngImagePlugin.PngInfo()
    info.add_text("Raw profile type exif", f"\nexif\n{len(profile):8}\n{profile.hex()}\n", zip=True)
    upright = pixels((32, 16))
    Image.fromarray(np.ascontiguousarray(STORED[6](upright))).save(tmp_path / "a.png", pnginfo=info)
    assert np.array_equal(decode(tmp_path / "a.png"), upright)
