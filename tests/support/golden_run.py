"""The run whose checkpoint lies in tests/golden_checkpoints/sharded: everything that the one of `tiny` does not have.

Weights in shards of three ranks (fsdp), a replicated tensor whose rows are spread over them, tied weights, a buffer in
bf16 and one without elements, a cache, extra states (a tensor and a value), a plateau schedule and data with a
fingerprint. Written by

    PYTHONPATH=tests torchrun --nproc-per-node 3 tests/support/golden_run.py --run-dir runs/golden
"""

from __future__ import annotations

from dataclasses import replace

import torch
from support import tiny_gpt
from support.tiny_gpt import SHAPE, GPTTrainConfig
from torch import Tensor, nn

from distkit.config import CheckpointConfig, FSDPConfig, Plateau, Split
from distkit.data.sets.fingerprint import fingerprint
from distkit.entry import main
from distkit.losses import chunked_cross_entropy
from distkit.models import GPT
from distkit.recipe import Recipe


class Model(GPT):
    """A GPT that counts its training forwards, and has buffers of every kind."""

    def __init__(self, dropout: float) -> None:
        super().__init__(replace(SHAPE, dropout=dropout), chunked_cross_entropy)
        self.register_buffer("halves", torch.linspace(-1, 1, 7).bfloat16())
        self.register_buffer("nothing", torch.zeros(0, 3))
        self.register_buffer("rows", torch.arange(3 * 65_536, dtype=torch.int32).view(-1, 4))
        self.register_buffer("cache", torch.ones(2), persistent=False)
        self.head = nn.Linear(SHAPE.dim, SHAPE.vocab_size, bias=False)
        self.head.weight = self.embedding.weight
        self.counter = Counter()
        self.forwards = 0

    def get_extra_state(self) -> dict[str, int]:
        return {"forwards": self.forwards}

    def set_extra_state(self, state: dict[str, int]) -> None:
        self.forwards = state["forwards"]

    def forward(self, *batch: Tensor) -> Tensor:
        self.forwards += self.training
        self.counter.count = self.counter.count + self.training
        return super().forward(*batch)


class Counter(nn.Module):
    """Its extra state is a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.count = torch.zeros(1, dtype=torch.int64)

    def get_extra_state(self) -> Tensor:
        return self.count

    def set_extra_state(self, state: Tensor) -> None:
        self.count = state


class Tokens(tiny_gpt.Tokens):
    """They say what they are."""

    @property
    def fingerprint(self) -> str:
        return fingerprint(self.windows.contiguous())


def build_dataset(config: GPTTrainConfig, split: Split) -> Tokens:
    return Tokens(split)


BASE = replace(
    tiny_gpt.BASE, num_steps=12, microbatch_size=1, dropout=0.1, ema_decay=0.9, eval_every=3, report_every=4, seed=3,
    global_batch_size=6, schedule=Plateau(patience=0, threshold=0.5, gamma=0.5),
    strategy="fsdp", fsdp=FSDPConfig(), checkpoint=CheckpointConfig(save_every=10, keep_last=None, keep_best=None),
)  # fmt: skip
RECIPE = Recipe("golden", GPTTrainConfig, lambda config: Model(config.dropout), build_dataset, tiny_gpt.compute_loss,
                presets={"default": BASE})  # fmt: skip

if __name__ == "__main__":
    main(RECIPE)
