"""Validation loss, seconds and a sample of the GPT recipe's `tiny` preset on tinyshakespeare, by characters.

The goal is nanoGPT's configuration for a CPU: 0.80 M parameters, 1.54 M training tokens, a validation loss of 1.886
nats in 83 s on 2 such cores. The loss here is over the whole validation split, the last tenth of the text, in windows
of 128 characters.

Targets on 2 CPU cores: at most 1.80 nats, 83 s of training, 0.85 M parameters, 1.54 M tokens.

    python benchmarks/gpt_tiny.py --text FILE --json benchmarks/results/gpt_tiny.json --check
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from harness import add_flags, conclude, launch

TARGET_NATS, TARGET_SECONDS, MOST_PARAMETERS, MOST_TOKENS = 1.80, 83.0, 850_000, 1_540_000


def train(text: Path, folder: Path) -> dict[str, float | str]:
    """Run the command; loss, seconds and sizes from its run directory."""
    argv = ["--preset", "tiny", "--text", str(text), "--data.root", str(folder.parent)]
    summary = launch("gpt", argv, folder)
    config = json.loads((folder / "config.json").read_text())
    samples = summary["step"] * config["global_batch_size"]
    return {
        "validation_loss": summary["last"]["loss"],
        "train_seconds": summary["train_seconds"],
        "parameters": float(summary["model"].split()[1].replace(",", "")),
        "tokens": float(samples * config["context_length"]),
        "state_digest": summary["state_digest"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, required=True, help="tinyshakespeare")
    add_flags(parser)
    flags = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        results = train(flags.text.resolve(), run)
        generate = [sys.executable, "-m", "distkit", "generate", str(run), "--prompt", "ROMEO:"]
        print(subprocess.run(generate, check=True, capture_output=True, text=True).stdout)
    for name, value in results.items():
        print(f"{name:20s} {value}")
    targets = {
        "validation loss <= 1.80 nats": float(results["validation_loss"]) <= TARGET_NATS,
        "training <= 83 s": float(results["train_seconds"]) <= TARGET_SECONDS,
        "parameters <= 0.85 M": float(results["parameters"]) <= MOST_PARAMETERS,
        "tokens <= 1.54 M": float(results["tokens"]) <= MOST_TOKENS,
    }
    conclude(flags, "gpt_tiny on tinyshakespeare", results, targets)


if __name__ == "__main__":
    main()
