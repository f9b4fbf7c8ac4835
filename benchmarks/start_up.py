"""Seconds from the command to the first step, against a script by hand.

distkit: python recipes/cifar10.py --preset quick --precision fp32 --data.source synthetic --num-steps 1, until the line
  of its first step stands on stdout.
by hand: a script that imports torch and torchvision, makes the same images and a network of the same parameters, and
  prints the loss of one step of SGD on 128 images, cropped and flipped.

Both are started as a user starts them, a second time: the first start, which compiles Python's files, is not counted.
Both parameter counts are checked to be the same.

Target: distkit <= 1.15 x by hand.

    python benchmarks/start_up.py --json benchmarks/results/start_up.json --check
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from time import perf_counter

from harness import Median, conclude, interleave, median_of, parse_flags

ROOT = Path(__file__).resolve().parent.parent
TARGET = 1.15
RECIPE_FLAGS = ["--preset", "quick", "--precision", "fp32", "--data.source", "synthetic", "--num-steps", "1"]
#: Prints `model …, N parameters` and `step …`, as the recipe does.
BY_HAND = """
import importlib.util
import sys

import torch
import torchvision
from torch import nn
from torch.nn import functional as F
from torchvision.transforms import v2

spec = importlib.util.spec_from_file_location("synthetic", sys.argv[1])
synthetic = importlib.util.module_from_spec(spec)
spec.loader.exec_module(synthetic)  # by itself: without the rest of distkit.data


class Block(nn.Module):
    def __init__(self, inner, outer, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(inner, outer, 3, stride=stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(outer)
        self.conv2 = nn.Conv2d(outer, outer, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(outer)
        self.stride, self.new = stride, outer - inner

    def forward(self, x):
        branch = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.new))
        return F.relu(branch + x)


torch.manual_seed(0)
images, labels = map(torch.from_numpy, synthetic.generate(0, "train", 10_000, 10))
synthetic.generate(0, "test", 2_000, 10)
stem = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
blocks = [Block(16, 16, 1), Block(16, 32, 2), Block(32, 64, 2)]
model = nn.Sequential(stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))
model = model.to(memory_format=torch.channels_last)
print(f"model  ResNet, {sum(p.numel() for p in model.parameters()):,} parameters", flush=True)
optimizer = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9, nesterov=True, weight_decay=5e-4)
change = v2.Compose([
    v2.RandomCrop(32, padding=2), v2.RandomHorizontalFlip(), v2.ToDtype(torch.float32, scale=True),
    v2.Normalize((0.491, 0.482, 0.447), (0.247, 0.243, 0.262)),
])
chosen = torch.randperm(len(images))[:128]
batch = change(images[chosen]).to(memory_format=torch.channels_last)
loss = F.cross_entropy(model(batch), labels[chosen])
loss.backward()
optimizer.step()
optimizer.zero_grad()
print(f"step  1/1  loss {loss.item():.4f}", flush=True)
"""


def seconds_to_first_step(command: list[str], folder: Path) -> tuple[float, str]:
    """Seconds until the process prints the line of a step, and the number of parameters that it named before.

    Raises:
        SystemExit: it failed; its output is printed.
    """
    # a benchmark started without bytecode must not make both arms compile distkit each time
    env = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    env |= {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    seconds, parameters, lines = 0.0, "", []
    start = perf_counter()
    with subprocess.Popen(
        command, cwd=folder, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            lines.append(line)
            words = line.split()
            if words[:1] == ["model"]:
                parameters = words[-2]
            if words[:1] == ["step"] and not seconds:
                seconds = perf_counter() - start
    if process.returncode or not seconds:
        sys.exit(f"{' '.join(command)} ended with {process.returncode}:\n{''.join(lines)}")
    return seconds, parameters


def main() -> None:
    flags = parse_flags(__doc__)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        script = folder / "by_hand.py"
        script.write_text(BY_HAND)
        commands = {
            "distkit": [sys.executable, str(ROOT / "recipes" / "cifar10.py"), *RECIPE_FLAGS],
            "by hand": [sys.executable, str(script), str(ROOT / "distkit" / "data" / "sets" / "synthetic.py")],
        }
        parameters = {arm: seconds_to_first_step(command, folder)[1] for arm, command in commands.items()}
        if len(set(parameters.values())) != 1:
            sys.exit(f"the arms train different models: {parameters} parameters")
        print(f"both train {parameters['distkit']} parameters")
        arms = {arm: (lambda words=words: seconds_to_first_step(words, folder)[0]) for arm, words in commands.items()}
        rounds = interleave(arms, flags.rounds)
    ratios = [a / b for a, b in zip(rounds["distkit"], rounds["by hand"], strict=True)]
    results: dict[str, Median | float | str] = {f"{arm}, s": median_of(values) for arm, values in rounds.items()}
    results["distkit / by hand"] = median_of(ratios)
    for label, value in results.items():
        print(f"{label:20s} {value}")
    conclude(flags, "start_up", results, {f"distkit <= {TARGET} x by hand": statistics.median(ratios) <= TARGET})


if __name__ == "__main__":
    main()
