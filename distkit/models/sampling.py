"""Text out of a GPT, token by token."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from distkit.errors import ConfigError
from distkit.models.gpt import GPT


@torch.no_grad()
def generate(
    model: GPT,
    tokens: Tensor,
    num_new: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    vocab_size: int | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Continue `tokens` one by one, each drawn given at most the last `context_length` tokens before it.

    Args:
        model: not wrapped; it is put into evaluation mode for the while.
        tokens: [B, T] int64 on the model's device, T >= 1.
        num_new: tokens to add, >= 0.
        temperature: divides the logits, >= 0; 0 takes the most likely token.
        top_k: draw among this many most likely tokens, >= 1; None: among all.
        vocab_size: draw among the first this many tokens, >= 1: an embedding may have unused rows.
        generator: of the draws, on the model's device; None: torch's global one.

    Returns:
        [B, T + num_new] int64, beginning with `tokens`.

    Raises:
        ConfigError: an argument is out of range.
    """
    ok = num_new >= 0 and 0 <= temperature < math.inf and tokens.shape[1] >= 1
    ok = ok and all(number is None or number >= 1 for number in (top_k, vocab_size))
    if not ok:
        got = f"{tokens.shape[1]} tokens, num_new={num_new}, temperature={temperature}, {top_k=}, {vocab_size=}"
        raise ConfigError("generate: an argument is out of range", got=got,
                          expected="a token, num_new >= 0, temperature >= 0, top_k and vocab_size >= 1")  # fmt: skip
    was_training = model.training
    model.eval()
    for _ in range(num_new):
        logits = model.logits(model(tokens[:, -model.config.context_length :])[:, -1])[:, :vocab_size].float()
        tokens = torch.cat((tokens, _draw(logits, temperature, top_k, generator)), dim=1)
    model.train(was_training)
    return tokens


def _draw(logits: Tensor, temperature: float, top_k: int | None, generator: torch.Generator | None) -> Tensor:
    """[B, V] -> [B, 1]."""
    if temperature == 0:
        return logits.argmax(1, keepdim=True)
    if top_k is not None and top_k < logits.shape[1]:
        least = logits.topk(top_k, dim=1).values[:, -1:]
        logits = logits.masked_fill(logits < least, -math.inf)
    return torch.multinomial(F.softmax(logits / temperature, dim=1), 1, generator=generator)
