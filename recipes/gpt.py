"""A GPT on a text file, by characters, bytes or ready-made tokens. Expected: 1.67 nats on tinyshakespeare (tiny).

    accelerate launch recipes/gpt.py --text FILE                      # 2 CPU cores or any GPU: tiny
    accelerate launch recipes/gpt.py --preset 124m --tokens FILE      # every GPU of this machine
    python recipes/gpt.py --text FILE --debug                         # one process, every module watched

tiny: 0.60 M parameters, 1.54 M characters, 1.67 nats. 124m: GPT-2 small, 524,288 tokens a step.
The loss is in nats per token, over windows of --context-length from the end of the file (--test-share of it).
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from distkit import LossOutput, Recipe, TrainConfig, main
from distkit.config import AdamW, CheckpointConfig, Cosine, DataConfig, OneCycle, Split
from distkit.config.check import require, require_number
from distkit.data import TokenDataset, read_vocabulary
from distkit.data.sets.text import Level, Vocabulary, encoded_text
from distkit.errors import DataError
from distkit.losses import chunked_cross_entropy
from distkit.metrics import expected_initial_loss
from distkit.models import GPT, GPTConfig, generate
from distkit.models.gpt import Activation


@dataclass(frozen=True, kw_only=True)
class Config(TrainConfig):
    """A decoder-only transformer on one file."""

    text: Path = Path("data/tinyshakespeare.txt")
    """Text in UTF-8 (for bytes any file); it is encoded once, into --data.root."""
    level: Level = "char"
    """What a token of the text is: char, one of its different characters, or byte."""
    tokens: Path | None = None
    """Instead of a text: a file of raw little-endian tokens, uint16, or uint32 where --vocab-size is above 65536."""
    test_share: float = 0.1
    """Share of the tokens, at the end of the file, that is the test split, in (0, 1)."""
    vocab_size: int | None = None
    """Rows of the embedding; None: as many as the text has different tokens."""
    context_length: int = 128
    """Tokens of one sample, >= 1."""
    num_layers: int = 3
    """Blocks, >= 1."""
    num_heads: int = 2
    """Heads of attention in a block, >= 1."""
    dim: int = 128
    """Channels between the blocks: a multiple of 2 x heads."""
    mlp_dim: int | None = None
    """Channels inside an MLP; None: 4 x dim, for swiglu 8/3 x dim."""
    activation: Activation = "relu2"
    """Between the two matrices of an MLP: relu2, gelu or swiglu."""
    qk_norm: bool = True
    """RMSNorm of queries and keys."""
    dropout: float = 0.0
    """Of the embeddings, the attention and both branches of a block, in [0, 1)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_number("test_share", self.test_share, above=0, below=1, example="0.1")
        source = DataConfig().source
        require(self.data.source == source, "data.source", "unset: this recipe reads --text or --tokens",
                self.data.source, source)  # fmt: skip
        ok = self.tokens is None or self.vocab_size is not None
        require(ok, "vocab_size", "the number of different tokens in --tokens", self.vocab_size, "50304")
        self.model_config(self.vocab_size or 1)

    def model_config(self, vocab_size: int) -> GPTConfig:
        """The shape of the model; raises ConfigError where it is none."""
        return GPTConfig(
            vocab_size=vocab_size,
            context_length=self.context_length,
            num_layers=self.num_layers,
            num_heads=self.num_heads,
            dim=self.dim,
            mlp_dim=self.mlp_dim,
            activation=self.activation,
            qk_norm=self.qk_norm,
            dropout=self.dropout,
        )


def token_file(config: Config) -> Path:
    """The tokens of the run: --tokens, or those of --text, encoded once into --data.root."""
    if config.tokens is not None:
        return config.tokens
    return encoded_text(config.text, config.data.root, config.level)


def vocabulary_of(config: Config) -> Vocabulary | None:
    """What the tokens mean; None for --tokens, which do not say."""
    return None if config.tokens is not None else read_vocabulary(token_file(config))


def vocab_size_of(config: Config) -> int:
    """Rows of the embedding."""
    vocabulary = vocabulary_of(config)
    if vocabulary is None or config.vocab_size is None:
        size = config.vocab_size if vocabulary is None else vocabulary.size
        assert size is not None  # Config requires it with --tokens
        return size
    ok = config.vocab_size >= vocabulary.size
    require(ok, "vocab_size", f"at least {vocabulary.size}, for {config.text}", config.vocab_size, "None")
    return config.vocab_size


def build_model(config: Config) -> GPT:
    return GPT(config.model_config(vocab_size_of(config)), chunked_cross_entropy)


def build_dataset(config: Config, split: Split) -> TokenDataset:
    size, border = vocab_size_of(config), 1 - config.test_share
    return TokenDataset(
        token_file(config),
        config.context_length,
        dtype="uint16" if size <= 2**16 else "uint32",
        vocab_size=size,
        share=(0.0, border) if split == "train" else (border, 1.0),
        option="context_length",
    )


def compute_loss(config: Config, model: nn.Module, batch: tuple[Tensor, Tensor]) -> LossOutput:
    """tokens and the tokens that come next, both [B, T] int64 -> mean cross entropy over B x T, in nats."""
    tokens, targets = batch
    # every window is full, so the mean over tokens is the mean over windows and needs no weight
    loss, _ = model(tokens, targets)
    return LossOutput(loss)


def sample(
    config: Config,
    model: GPT,
    prompt: str = "\n",
    *,
    num_new: int = 500,
    temperature: float = 0.8,
    top_k: int | None = None,
    seed: int = 0,
) -> str:
    """`prompt` and `num_new` tokens that the model (not wrapped) gives after it; the other arguments as in `generate`.

    Raises:
        DataError: the prompt is empty or has characters that the text has not, or --tokens has no characters at all.
    """
    vocabulary = vocabulary_of(config)
    if vocabulary is None:
        raise DataError("--tokens does not say what its tokens mean", expected="a model of --text",
                        fix="distkit.models.generate, with the tokenizer of the file")  # fmt: skip
    tokens = vocabulary.encode(prompt)
    if not len(tokens):
        raise DataError("the prompt is empty", expected="at least one character to continue", got=repr(prompt))
    device = model.embedding.weight.device
    out = generate(
        model,
        torch.from_numpy(tokens)[None].to(device),
        num_new,
        temperature=temperature,
        top_k=top_k,
        vocab_size=vocabulary.size,
        generator=torch.Generator(device).manual_seed(seed),
    )
    return vocabulary.decode(out[0].cpu().numpy())


PRESETS = {
    "tiny": Config(
        num_steps=1_500,
        global_batch_size=8,
        precision="bf16",
        eval_batch_size=32,
        report_every=100,
        optim=AdamW(lr=4e-3, betas=(0.85, 0.98), weight_decay=0.1),
        schedule=OneCycle(warmup_ratio=0.06, anneal="linear"),
    ),
    "124m": Config(
        vocab_size=50_304,
        context_length=1024,
        num_layers=12,
        num_heads=12,
        dim=768,
        activation="gelu",
        qk_norm=False,
        test_share=0.005,
        num_steps=20_000,
        global_batch_size=512,
        microbatch_size=16,
        precision="bf16",
        compile=True,
        deterministic=False,
        max_grad_norm=1.0,
        eval_every=1_000,
        optim=AdamW(lr=6e-4, betas=(0.9, 0.95), weight_decay=0.1),
        schedule=Cosine(warmup_steps=700, min_lr_ratio=0.1),
        checkpoint=CheckpointConfig(save_every=1_000),
    ),
}

recipe = Recipe(
    "gpt",
    Config,
    build_model,
    build_dataset,
    compute_loss,
    presets=PRESETS,
    expected_initial_loss=lambda config: expected_initial_loss(vocab_size_of(config)),
)

if __name__ == "__main__":
    main(recipe)
