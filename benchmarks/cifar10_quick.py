"""Test accuracy and seconds of the `quick` preset on real images, as a user starts it: one accelerate launch.

Needs CIFAR-10 as an ImageFolder tree (ROOT/train/CLASS/*, ROOT/test/CLASS/*). Images stored as JPEG are slightly
lossy, so results say "CIFAR-10 (JPEG)".

Target on 2 CPU cores: at least 72 % test accuracy in at most 150 s of training.

    python benchmarks/cifar10_quick.py --root DIR --json benchmarks/results/cifar10_quick.json --check
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from harness import add_flags, conclude, launch

TARGET_ACCURACY, TARGET_SECONDS = 0.72, 150.0


def train(root: Path, folder: Path) -> dict[str, float | str]:
    """Run the command; accuracy, seconds and digest from its summary.json."""
    argv = ["--preset", "quick", "--data.source", "folder", "--data.root", str(root)]
    summary = launch("cifar10", argv, folder)
    return {
        "test_accuracy": summary["last"]["top1"],
        "train_seconds": summary["train_seconds"],
        "samples_per_second": summary["samples_per_second"],
        "state_digest": summary["state_digest"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, required=True, help="the ImageFolder tree")
    add_flags(parser)
    flags = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        results = train(flags.root.resolve(), Path(folder) / "run")
    for name, value in results.items():
        print(f"{name:20s} {value}")
    targets = {
        "test accuracy >= 72 %": float(results["test_accuracy"]) >= TARGET_ACCURACY,
        "training <= 150 s": float(results["train_seconds"]) <= TARGET_SECONDS,
    }
    conclude(flags, "cifar10_quick on CIFAR-10 (JPEG)", results, targets)


if __name__ == "__main__":
    main()
