"""`distkit data`: pack images, inspect packed ones, and compute what to normalise images with."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from distkit.commands.parser import Parser


def command(args: Sequence[str]) -> str:
    """Pack images, inspect packed ones, compute statistics."""
    parser = Parser(
        "distkit data", description="Packed images: memory-mapped safetensors files with checksums. Statistics of any.",
        allow_abbrev=False,
    )  # fmt: skip
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="pack|show|verify|stats")
    pack = verbs.add_parser("pack", help="images into OUT/SPLIT/; the same command again continues",
                            allow_abbrev=False)  # fmt: skip
    pack.add_argument("source", metavar="FOLDER", help="FOLDER/train/CLASS/* and FOLDER/test/CLASS/*, or FOLDER/CLASS/*"
                      " as one split; or cifar10, cifar100, mnist, fashion_mnist")  # fmt: skip
    pack.add_argument("out", metavar="OUT", type=Path, help="folder of the packed splits")
    pack.add_argument("--split", nargs="+", choices=["train", "test"], help="which splits (all)")
    pack.add_argument("--root", type=Path, default=Path("data"), metavar="DIR",
                      help="where a set by name is or is downloaded to (data)")  # fmt: skip
    pack.add_argument("--form", choices=["auto", "raw", "encoded"], default="auto",
                      help="pixels, or the files as they are (auto: pixels if all have one size up to 64)")  # fmt: skip
    pack.add_argument("--allow-empty-classes", action="store_true",
                      help="accept classes that have images in only one split")  # fmt: skip
    pack.add_argument("--check", action="store_true", help="decode every image that is stored as a file")
    pack.add_argument("--overwrite", action="store_true", help="replace something else, and damaged files")
    stats = verbs.add_parser("stats", help="mean and std of each channel, for --data.mean and --data.std",
                             allow_abbrev=False)  # fmt: skip
    stats.add_argument("folder", metavar="FOLDER", type=Path, help="of images, at any depth, or of packed ones; with"
                       " train/ in it: those")  # fmt: skip
    stats.add_argument("--split", choices=["train", "test"], help="which split (train, if there is one)")
    for reads in (pack, stats):
        reads.add_argument("--color", choices=["auto", "rgb", "grey"], default="auto",
                           help="channels (auto: grey if every training image is grey)")  # fmt: skip
        reads.add_argument("--background", default="white", metavar="COLOR",
                           help="under transparent pixels: white, grey, black or #rrggbb (white)")  # fmt: skip
        reads.add_argument("--workers", type=int, metavar="N", help="threads that read images (one a core)")
    for verb, text in (("show", "what a packed split holds"), ("verify", "compare a packed split with its checksums")):
        verbs.add_parser(verb, help=text).add_argument("folder", metavar="OUT/SPLIT", type=Path)
    typed = parser.parse_args(args)

    from distkit.data.packed import pack as packing

    if typed.verb == "pack":
        return packing.pack(typed.source, typed.out, splits=typed.split, root=typed.root, form=typed.form,
                            num_workers=typed.workers, check=typed.check, overwrite=typed.overwrite,
                            color=typed.color, background=typed.background,
                            allow_empty_classes=typed.allow_empty_classes)  # fmt: skip
    if typed.verb == "stats":
        from distkit.data.stats import image_stats

        return image_stats(typed.folder, split=typed.split, color=typed.color, background=typed.background,
                           num_workers=typed.workers).describe()  # fmt: skip
    return packing.show(typed.folder) if typed.verb == "show" else packing.verify(typed.folder)
