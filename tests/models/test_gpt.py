import math
from dataclasses import replace

import pytest
import torch
from support.harness import run_ranks
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from distkit.errors import ConfigError
from distkit.losses import chunked_cross_entropy, token_cross_entropy
from distkit.models import GPT, Block, GPTConfig, generate
from distkit.models.gpt import ACTIVATIONS, attend_alike, attend_fast, rotary_tables, rotate

SMALL = GPTConfig(vocab_size=29, context_length=16, num_layers=2, num_heads=2, dim=16)
pytestmark = pytest.mark.usefixtures("one_thread")


def build(config: GPTConfig = SMALL, seed: int = 0) -> GPT:
    torch.manual_seed(seed)
    return GPT(config, chunked_cross_entropy)


def tokens_of(config: GPTConfig = SMALL, batch: int = 3, length: int | None = None, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(config.vocab_size, (batch, length or config.context_length), generator=generator)


def gradients_of(model: nn.Module, tokens: Tensor) -> list[Tensor]:
    model.zero_grad()
    loss, _ = model(tokens, tokens.flip(1))
    loss.backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def test_gpt2_small_has_the_size_of_gpt2_small() -> None:
    with torch.device("meta"):
        model = GPT(GPTConfig(), chunked_cross_entropy)
    # GPT-2 has 124.4 M: positions are rotary here, 1024 x 768 fewer, and there are no biases and gains
    assert sum(p.numel() for p in model.parameters()) == 50_304 * 768 + 12 * 12 * 768**2 == 123_568_128


def test_swiglu_has_about_as_many_weights_as_the_others() -> None:
    sizes = {a: sum(p.numel() for p in build(GPTConfig(vocab_size=8, num_layers=1, num_heads=2, dim=96, activation=a))
                    .parameters()) for a in ACTIVATIONS}  # fmt: skip
    assert sizes["gelu"] == sizes["relu2"]
    assert sizes["swiglu"] == pytest.approx(sizes["gelu"], rel=0.01)


def test_matrices_start_as_in_gpt2() -> None:
    model = build(GPTConfig(vocab_size=500, context_length=8, num_layers=8, num_heads=4, dim=128))
    for name, parameter in model.named_parameters():
        end = name.endswith(("attention.out.weight", "mlp.down.weight"))
        assert parameter.std().item() == pytest.approx(0.02 / 4 if end else 0.02, rel=0.05)


def test_the_loss_is_that_of_the_logits_and_starts_at_a_uniform_guess() -> None:
    model, tokens = build(), tokens_of()
    targets = tokens.flip(1).clone()
    targets[0, :5] = -100
    hidden = model(tokens)
    assert hidden.shape == (3, 16, 16)
    expected, count = token_cross_entropy(model.logits(hidden), targets)
    loss, weight = model(tokens, targets)
    torch.testing.assert_close(loss, expected)
    assert weight.item() == count.item() == 43
    assert loss.item() == pytest.approx(math.log(29), abs=0.1)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("qk_norm", [False, True])
def test_every_parameter_learns(activation: str, qk_norm: bool) -> None:
    model = build(replace(SMALL, activation=activation, qk_norm=qk_norm))
    assert all(g.abs().max() > 0 for g in gradients_of(model, tokens_of()))
    assert len(gradients_of(model, tokens_of())) == len(list(model.parameters()))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(60):
        gradients_of(model, tokens_of())
        optimizer.step()
    assert model(tokens_of(), tokens_of().flip(1))[0] < 0.5


def test_a_row_depends_on_nothing_after_it() -> None:
    model, tokens = build().double(), tokens_of()
    other = tokens.clone()
    other[:, 9] = (other[:, 9] + 1) % 29
    before, after = model(tokens), model(other)
    torch.testing.assert_close(before[:, :9], after[:, :9], rtol=0, atol=0)
    assert (before[:, 9:] - after[:, 9:]).abs().amax(dim=(0, 2)).min() > 0
    torch.testing.assert_close(model(tokens[:, :7]), before[:, :7])


def test_rotary_keeps_lengths_and_sees_only_distances() -> None:
    tables = rotary_tables(32, 8, 10_000.0, torch.device("cpu"))
    query, key = torch.randn(2, 1, 8).expand(2, 32, 8).unbind(0)
    turned_query, turned_key = rotate(query, *tables), rotate(key, *tables)
    torch.testing.assert_close(turned_query.norm(dim=1), query.norm(dim=1))
    scores = turned_query @ turned_key.T
    for distance in (0, 1, 7):
        diagonal = scores.diagonal(-distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), rtol=1e-4, atol=1e-4)
    assert (scores[8, 8] - scores[8, 1]).abs() > 1e-3
    torch.testing.assert_close(turned_query[0], query[0])
    assert rotate(query.bfloat16(), *tables).dtype == torch.bfloat16


def test_rotary_is_the_rotation_of_the_paper() -> None:
    x = torch.randn(6, 4)
    turned = torch.view_as_complex(torch.stack((x[:, :2], x[:, 2:]), dim=-1).contiguous())
    angles = torch.outer(torch.arange(6.0), torch.tensor([1.0, 0.1]))
    turned = turned * torch.polar(torch.ones(6, 2), angles)
    tables = rotary_tables(6, 4, 100.0, torch.device("cpu"))
    torch.testing.assert_close(rotate(x, *tables), torch.cat((turned.real, turned.imag), dim=1))


def test_the_state_is_the_parameters_and_the_head_has_no_name_of_its_own() -> None:
    model = build()
    assert set(model.state_dict()) == {name for name, _ in model.named_parameters()}
    assert not list(model.buffers())
    assert sum(isinstance(module, Block) for module in model.modules()) == 2
    again = build(seed=5)
    again.load_state_dict(model.state_dict())
    torch.testing.assert_close(again(tokens_of()), model(tokens_of()), rtol=0, atol=0)


def test_dropout_acts_in_training_only() -> None:
    model, tokens = build(replace(SMALL, dropout=0.5)), tokens_of()
    assert not torch.equal(model(tokens), model(tokens))
    model.eval()
    assert torch.equal(model(tokens), model(tokens))


def test_bf16_computes_nearly_the_same_without_a_warning() -> None:
    model, tokens = build(replace(SMALL, qk_norm=True, activation="relu2")), tokens_of()
    expected, exact = model(tokens, tokens)[0], gradients_of(model, tokens)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, _ = model(tokens, tokens)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected, rtol=1e-2, atol=0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough = gradients_of(model, tokens)
    for a, b in zip(rough, exact, strict=True):
        assert a.dtype == torch.float32
        assert (a - b).norm() < 0.05 * b.norm()


# torch 2.11 makes one when it compiles `apply`
@pytest.mark.filterwarnings("ignore:.*autograd.function.Function.* should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("with_targets", [True, False])
def test_compile_finds_one_graph(with_targets: bool) -> None:
    torch._dynamo.reset()
    model, tokens = build(replace(SMALL, num_layers=1)), tokens_of()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    if not with_targets:
        torch.testing.assert_close(compiled(tokens), model(tokens))
        return
    torch.testing.assert_close(gradients_of(compiled, tokens), gradients_of(model, tokens))


def test_recomputed_blocks_give_the_same_gradients() -> None:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing

    model, tokens = build(), tokens_of()
    expected = gradients_of(model, tokens)
    apply_activation_checkpointing(model, check_fn=lambda module: isinstance(module, Block))
    torch.testing.assert_close(gradients_of(model, tokens), expected, rtol=0, atol=0)


def wrapped_gradients() -> dict[str, float]:
    """Largest difference to one process's gradients, of DDP and of FSDP2 with every block and the root sharded."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    rank, tokens = torch.distributed.get_rank(), tokens_of(batch=4)
    expected = gradients_of(build(), tokens)
    mine = tokens[rank * 2 : rank * 2 + 2]
    sharded = build()
    for block in sharded.blocks:
        fully_shard(block)
    fully_shard(sharded)
    found = {"ddp": gradients_of(DistributedDataParallel(build()), mine), "fsdp": gradients_of(sharded, mine)}
    whole = {
        name: [g.full_tensor() if isinstance(g, DTensor) else g for g in gradients] for name, gradients in found.items()
    }
    torch.distributed.destroy_process_group()
    return {
        name: max((a - b).abs().max().item() for a, b in zip(gradients, expected, strict=True))
        for name, gradients in whole.items()
    }


@pytest.mark.distributed
def test_wrappers_see_the_tied_head() -> None:
    for differences in run_ranks(wrapped_gradients, 2):
        assert differences["ddp"] < 1e-6
        assert differences["fsdp"] < 1e-6


def test_bad_shapes_say_what_to_type() -> None:
    wrong = [("dim", 30, "--dim 32"), ("num_layers", 0, "--num-layers 1"), ("activation", "relu", "relu2"),
             ("dropout", 1.0, "dropout"), ("rotary_base", 1.0, "--rotary-base"), ("mlp_dim", 0, "--mlp-dim"),
             ("vocab_size", 0, "--vocab-size")]  # fmt: skip
    for name, value, hint in wrong:
        with pytest.raises(ConfigError, match=hint):
            replace(SMALL, num_heads=4, **{name: value})
    with pytest.raises(ConfigError, match="--context-length 17"):
        build()(tokens_of(length=17))


def test_generate_goes_on_beyond_the_context() -> None:
    model, start = build(), tokens_of(batch=2, length=3)
    model.train()
    out = generate(model, start, 30, temperature=0)
    assert out.shape == (2, 33)
    assert torch.equal(out[:, :3], start)
    assert model.training
    assert torch.equal(generate(model, start, 30, top_k=1), out)
    last = model.logits(model(out[:, 16:32])[:, -1])
    assert torch.equal(last.argmax(1), out[:, 32])
    assert torch.equal(generate(model, start, 0), start)


def test_generate_draws_from_the_distribution() -> None:
    model = build()
    start = torch.zeros(4000, 1, dtype=torch.int64)
    with torch.no_grad():
        model.embedding.weight.mul_(20)
        p = F.softmax(model.logits(model(start[:1]))[0, 0] / 2, dim=0)
    out = generate(model, start, 1, temperature=2.0, generator=torch.Generator().manual_seed(0))
    counts = torch.bincount(out[:, 1], minlength=29) / 4000
    assert (counts - p).abs().max() < 0.04
    few = generate(model, start, 1, top_k=3, vocab_size=20, generator=torch.Generator().manual_seed(0))[:, 1]
    assert set(few.tolist()) <= set(p[:20].topk(3).indices.tolist())


def test_generate_is_a_function_of_its_generator_and_checks_its_arguments() -> None:
    model, start = build(), tokens_of(batch=1, length=2)
    one, two = (generate(model, start, 9, generator=torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(one, two)
    for bad in ({"num_new": -1}, {"temperature": -1.0}, {"top_k": 0}, {"vocab_size": 0}):
        with pytest.raises(ConfigError, match="generate"):
            generate(model, start, **{"num_new": 1, **bad})
    with pytest.raises(ConfigError, match="generate"):
        generate(model, start[:, :0], 1)


class AttentionModes(TorchDispatchMode):
    """In which mode of determinism attention's kernels are called."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[bool, int]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if "scaled_dot_product" in str(func):
            self.seen.append(("backward" in str(func), torch.get_deterministic_debug_mode()))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("recomputed", [False, True])
@pytest.mark.parametrize("head_dim", [16, 20])
def test_attention_asks_for_one_order_of_sums_in_the_backward_too(recomputed: bool, head_dim: int) -> None:
    q, k, v = (torch.randn(2, 2, 8, head_dim, requires_grad=True) for _ in range(3))
    before = torch.get_deterministic_debug_mode()
    try:
        torch.set_deterministic_debug_mode("warn")
        with AttentionModes() as modes:
            call = (
                checkpoint(attend_alike, q, k, v, 0.0, use_reentrant=False)
                if recomputed
                else attend_alike(q, k, v, 0.0)
            )
            assert torch.get_deterministic_debug_mode() == 1
            (2 * call).sum().backward()
        assert torch.get_deterministic_debug_mode() == 1
    finally:
        torch.set_deterministic_debug_mode(before)
    # 2: what adds up in any order is refused, though everything else may
    assert modes.seen == [(False, 2)] * (1 + recomputed) + [(True, 2)]
    mine = [t.grad for t in (q, k, v)]
    q, k, v = (t.detach().clone().requires_grad_() for t in (q, k, v))
    (2 * attend_fast(q, k, v, 0.0)).sum().backward()
    assert all(torch.equal(a, b.grad) for a, b in zip(mine, (q, k, v), strict=True))
