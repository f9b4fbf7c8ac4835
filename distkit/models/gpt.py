"""A decoder-only transformer: tied embeddings, rotary positions, RMSNorm before each branch, no biases.

Shapes and initial values follow GPT-2 (Radford et al. 2019); differences are noted where they occur.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args, overload

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from distkit.config.check import require, require_number
from distkit.errors import ConfigError, nearest

#: hidden [B, T, D], the head's weight [V, D], targets int64 [B, T] -> mean loss, number of tokens; both 0-dim.
TokenLoss = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
Activation = Literal["relu2", "gelu", "swiglu"]
ACTIVATIONS: tuple[str, ...] = get_args(Activation)


@dataclass(frozen=True, kw_only=True)
class GPTConfig:
    """The shape of a GPT; the defaults are GPT-2 small, its vocabulary padded to a multiple of 128.

    Raises:
        ConfigError: a number is out of range, or the heads do not share out `dim` in even parts.
    """

    vocab_size: int = 50_304
    """Different tokens, >= 1."""
    context_length: int = 1024
    """Most tokens that are read at once, >= 1."""
    num_layers: int = 12
    """Blocks, >= 1."""
    num_heads: int = 12
    """Heads of attention in a block, >= 1; `dim` is a multiple of twice this, since rotary positions turn pairs."""
    dim: int = 768
    """Channels between the blocks, >= 2."""
    mlp_dim: int | None = None
    """Channels inside an MLP, >= 1; None: 4 x dim, for swiglu 8/3 x dim, which is the same number of weights."""
    activation: Activation = "gelu"
    """relu2: relu(x)^2; gelu: its tanh form; swiglu: silu(gate) * x."""
    qk_norm: bool = False
    """RMSNorm of queries and keys, over the channels of a head."""
    dropout: float = 0.0
    """Of the embeddings, the attention and both branches of a block, in [0, 1)."""
    rotary_base: float = 10_000.0
    """Longest wavelength of the rotary positions over 2 pi, in tokens, > 1."""

    def __post_init__(self) -> None:
        least = {"vocab_size": 1, "context_length": 1, "num_layers": 1, "num_heads": 1, "dim": 2, "mlp_dim": 1}
        for name, bound in least.items():
            require_number(name, getattr(self, name), least=bound, example=str(bound))
        unit = 2 * self.num_heads
        near = max(1, round(self.dim / unit)) * unit
        require(self.dim % unit == 0, "dim", f"a multiple of {unit} for {self.num_heads} heads", self.dim, str(near))
        close = nearest(self.activation, ACTIVATIONS) or "gelu"
        require(self.activation in ACTIVATIONS, "activation", ", ".join(ACTIVATIONS), self.activation, close)
        require_number("dropout", self.dropout, least=0, below=1, example="0.1")
        require_number("rotary_base", self.rotary_base, above=1, example="10000")

    @property
    def head_dim(self) -> int:
        """Channels of one head."""
        return self.dim // self.num_heads

    @property
    def hidden_dim(self) -> int:
        """Channels inside an MLP."""
        if self.mlp_dim is not None:
            return self.mlp_dim
        # in steps of 8, which tensor cores want
        return 4 * self.dim if self.activation != "swiglu" else max(8, round(self.dim / 3) * 8)


class RMSNorm(nn.Module):
    """x / rms(x), without a gain: the matrix that follows can learn one.

    Source: Zhang and Sennrich 2019, arXiv:1910.07467, equation 4; torch.nn.functional.rms_norm.
    """

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., D]."""
        return F.rms_norm(x, x.shape[-1:], eps=1e-6)


def rotary_tables(length: int, head_dim: int, base: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosines and sines of position x base^(-2 i / head_dim), both float32 [length, head_dim / 2].

    Recomputed in every block rather than stored: a table would be saved with the weights, rounded where a strategy
    casts buffers or inputs, and left without values by a model that starts on the meta device.
    """
    pairs = torch.arange(0, head_dim, 2, device=device, dtype=torch.float32)
    positions = torch.arange(length, device=device, dtype=torch.float32)
    angles = positions[:, None] * torch.exp(pairs * (-math.log(base) / head_dim))
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the channel pairs (i, i + head_dim / 2) of row t by the angles of position t.

    Source: Su et al. 2021 (RoFormer), arXiv:2104.09864, equation 34, with the pairs laid out as halves.

    Args:
        x: [..., T, head_dim] float.
        cos: [T, head_dim / 2].
        sin: [T, head_dim / 2].

    Returns:
        The shape and dtype of x.
    """
    first, second = x.chunk(2, dim=-1)
    turned = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    return turned.to(x.dtype)


def attend_fast(query: Tensor, key: Tensor, value: Tensor, dropout: float) -> Tensor:
    """torch.nn.functional.scaled_dot_product_attention by the kernel that torch prefers."""
    return F.scaled_dot_product_attention(query, key, value, is_causal=True, dropout_p=dropout)


@torch.compiler.disable(reason="only outside of compiled code does it give the same bits each time (--deterministic)")  # type: ignore[no-untyped-call, untyped-decorator]
def attend_alike(query: Tensor, key: Tensor, value: Tensor, dropout: float) -> Tensor:
    """The same by kernels whose backward adds up in one order.

    In the mode that only warns, torch picks the non-deterministic kernels here, though it has both, and warns
    (aten/src/ATen/native/transformers/cuda/attention_backward.cu). So the mode is "error" around this operation.
    """
    mode = torch.get_deterministic_debug_mode()

    def refuse(*_: object) -> None:
        torch.set_deterministic_debug_mode("error")

    def restore(*_: object) -> None:
        torch.set_deterministic_debug_mode(mode)

    refuse()
    try:
        mixed = attend_fast(query, key, value, dropout)
    finally:
        restore()
    node = mixed.grad_fn
    if node is not None and "ScaledDotProduct" not in node.name():
        node = node.next_functions[0][0]  # what pads an odd head_dim also cuts the result
    if node is not None:
        node.register_prehook(refuse)
        node.register_hook(restore)
    return mixed


def attend(query: Tensor, key: Tensor, value: Tensor, dropout: float) -> Tensor:
    """Causal torch.nn.functional.scaled_dot_product_attention, all [B, heads, T, head_dim].

    On the CPU in float32 at least: torch's kernel there takes 4 times as long in bf16 (2.2 against 9.3 ms for 1,024
    tokens in windows of 64, forward and backward, torch 2.15).
    """
    if query.device.type != "cpu":
        if query.device.type == "cuda" and torch.are_deterministic_algorithms_enabled():
            alike: Tensor = attend_alike(query, key, value, dropout)
            return alike
        return attend_fast(query, key, value, dropout)
    wide = torch.promote_types(query.dtype, torch.float32)
    with torch.autocast("cpu", enabled=False):
        return F.scaled_dot_product_attention(
            query.to(wide), key.to(wide), value.to(wide), is_causal=True, dropout_p=dropout
        )


class Attention(nn.Module):
    """Causal attention of several heads."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.head_dim, self.dropout, self.rotary_base = config.head_dim, config.dropout, config.rotary_base
        self.query = nn.Linear(config.dim, config.dim, bias=False)
        self.key = nn.Linear(config.dim, config.dim, bias=False)
        self.value = nn.Linear(config.dim, config.dim, bias=False)
        self.query_norm = RMSNorm() if config.qk_norm else nn.Identity()
        self.key_norm = RMSNorm() if config.qk_norm else nn.Identity()
        self.out = nn.Linear(config.dim, config.dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, dim] -> [B, T, dim]; row t depends on rows 0 to t."""
        tables = rotary_tables(x.shape[1], self.head_dim, self.rotary_base, x.device)
        query = rotate(self.query_norm(self._by_head(self.query(x))), *tables)
        key = rotate(self.key_norm(self._by_head(self.key(x))), *tables)
        value = self._by_head(self.value(x))
        dropout = self.dropout if self.training else 0.0
        mixed = attend(query, key, value, dropout)
        out: Tensor = self.out(mixed.transpose(1, 2).flatten(2))
        return out

    def _by_head(self, x: Tensor) -> Tensor:
        """[B, T, dim] -> [B, heads, T, head_dim]."""
        batch, length, _ = x.shape
        return x.view(batch, length, -1, self.head_dim).transpose(1, 2)


class MLP(nn.Module):
    """down(activation(up(x))); for swiglu down(silu(gate(x)) * up(x)).

    Source: relu2: So et al. 2021 (Primer), arXiv:2109.08668; swiglu: Shazeer 2020, arXiv:2002.05202.
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.activation = config.activation
        self.up = nn.Linear(config.dim, config.hidden_dim, bias=False)
        self.gate = nn.Linear(config.dim, config.hidden_dim, bias=False) if self.activation == "swiglu" else None
        self.down = nn.Linear(config.hidden_dim, config.dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[..., dim] -> [..., dim]."""
        hidden = self.up(x)
        if self.gate is not None:
            hidden = F.silu(self.gate(x)) * hidden
        elif self.activation == "relu2":
            hidden = F.relu(hidden)
            # not square(), which autocast computes in float32
            hidden = hidden * hidden
        else:
            hidden = F.gelu(hidden, approximate="tanh")
        out: Tensor = self.down(hidden)
        return out


class Block(nn.Module):
    """x + attention(norm(x)), then the same with an MLP: the unit to shard, to compile and to recompute."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.attention_norm = RMSNorm()
        self.attention = Attention(config)
        self.mlp_norm = RMSNorm()
        self.mlp = MLP(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, dim] -> [B, T, dim]."""
        x = x + self.dropout(self.attention(self.attention_norm(x)))
        x = x + self.dropout(self.mlp(self.mlp_norm(x)))
        return x  # noqa: RET504  # the two lines above are one picture


class GPT(nn.Module):
    """Tokens -> hidden states, and the loss of the next token.

    The head's weight is the embedding's (Press and Wolf 2017, arXiv:1608.05859), one parameter under one name. Only
    `forward` reads it, and the loss is computed there, because a wrapper (DDP, FSDP2, ZeRO, torch.compile) sees a
    model through `forward` alone: shard the blocks and then the whole model, never the embedding by itself.
    Matrices start normal with std 0.02, the two of a block that end a branch with 0.02 / sqrt(2 x layers), as in GPT-2.

    Args:
        config: the shape.
        loss: what `forward` gives its hidden states, the head's weight and the targets to, such as
            distkit.losses.chunked_cross_entropy.
    """

    def __init__(self, config: GPTConfig, loss: TokenLoss) -> None:
        super().__init__()
        self.config, self.loss = config, loss
        self.embedding = nn.Embedding(config.vocab_size, config.dim)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList([Block(config) for _ in range(config.num_layers)])
        self.norm = RMSNorm()
        self._init_()

    @property
    def head(self) -> nn.Module:
        """What gives the logits: the embedding."""
        return self.embedding

    def _init_(self) -> None:
        blocks = [module for module in self.modules() if isinstance(module, Block)]
        ends = {end for block in blocks for end in (block.attention.out, block.mlp.down)}
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                scale = 1 / math.sqrt(2 * self.config.num_layers) if module in ends else 1.0
                nn.init.normal_(module.weight, std=0.02 * scale)

    @overload
    def forward(self, tokens: Tensor) -> Tensor: ...

    @overload
    def forward(self, tokens: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]: ...

    def forward(self, tokens: Tensor, targets: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """Hidden states, or the loss.

        Args:
            tokens: [B, T] int64, T up to the context length.
            targets: [B, T] int64, the token after each.

        Returns:
            Without targets: [B, T, dim], what `logits` takes. With targets: what `loss` gives, the mean over tokens
            and their number, both 0-dim.

        Raises:
            ConfigError: T is longer than the context.
        """
        length = self.config.context_length
        if tokens.shape[1] > length:
            raise ConfigError("GPT: more tokens than the context holds", expected=f"at most {length}",
                              got=tokens.shape[1], fix=f"--context-length {tokens.shape[1]}")  # fmt: skip
        x = self.dropout(self.embedding(tokens))
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        return x if targets is None else self.loss(x, self.embedding.weight, targets)

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., dim] -> [..., vocab_size]; of a model that is not wrapped."""
        return F.linear(hidden, self.embedding.weight)
