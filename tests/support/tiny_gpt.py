"""A transformer that trains in milliseconds: what needs sharding, at a size that does not."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from distkit.config import AdamW, CheckpointConfig, Cosine, ObserveConfig, Split, TrainConfig
from distkit.entry import main
from distkit.losses import LossOutput, chunked_cross_entropy
from distkit.models import GPT, GPTConfig
from distkit.recipe import Recipe

SHAPE = GPTConfig(vocab_size=53, context_length=12, num_layers=3, num_heads=2, dim=20, mlp_dim=36)


@dataclass(frozen=True, kw_only=True)
class GPTTrainConfig(TrainConfig):
    """Three blocks of odd sizes; the embedding is the head."""

    dropout: float = 0.0
    """Dropout, in [0, 1)."""


class Tokens:
    """Windows of a sequence in which each token follows from the two before."""

    def __init__(self, split: Split) -> None:
        tokens = [1, 2]
        while len(tokens) < 900:
            tokens.append((tokens[-1] * 3 + tokens[-2] * tokens[-2] + 7) % SHAPE.vocab_size)
        found = torch.tensor(tokens[:800] if split == "train" else tokens[800:])
        self.windows = found.unfold(0, SHAPE.context_length + 1, 6)

    def __len__(self) -> int:
        return len(self.windows)

    def fetch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        windows = self.windows[indices]
        return windows[:, :-1], windows[:, 1:]


def build_model(config: GPTTrainConfig) -> GPT:
    from dataclasses import replace

    return GPT(replace(SHAPE, dropout=config.dropout), chunked_cross_entropy)


def compute_loss(config: GPTTrainConfig, model: nn.Module, batch: tuple[Tensor, Tensor]) -> LossOutput:
    loss, _ = model(*batch)
    return LossOutput(loss)


BASE = GPTTrainConfig(
    num_steps=20,
    global_batch_size=8,
    device="cpu",
    num_threads=1,
    report_every=5,
    timeout_seconds=60,
    observe=ObserveConfig(console=False),
    checkpoint=CheckpointConfig(enabled=False),
    optim=AdamW(lr=0.003, eps=1e-5, weight_decay=0.1),
    schedule=Cosine(warmup_steps=3),
)
RECIPE = Recipe("tiny-gpt", GPTTrainConfig, build_model, lambda config, split: Tokens(split), compute_loss,
                presets={"default": BASE})  # fmt: skip

if __name__ == "__main__":
    main(RECIPE)
