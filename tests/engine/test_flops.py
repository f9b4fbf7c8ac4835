"""FLOPs of a step against arithmetic by hand, and mfu in the metrics."""

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support import tiny, tiny_gpt
from support.harness import run_ranks
from support.tiny import BASE, RECIPE
from torch import Tensor, nn
from torch.nn import functional as F

from distkit.assemble import assemble
from distkit.checkpoint.digest import state_digest
from distkit.config import LBFGS, ActivationCheckpointingConfig
from distkit.engine.fit import fit
from distkit.engine.flops import PEAKS, Outline, known_peak
from distkit.errors import ConfigError
from distkit.losses import LossOutput, chunked_cross_entropy
from distkit.models import GPT, GPTConfig
from distkit.models.resnet import resnet18
from distkit.runtime import Topology, read_topology
from distkit.runtime.process import start

TINY = GPTConfig(
    vocab_size=65, context_length=128, num_layers=3, num_heads=2, dim=128, activation="relu2", qk_norm=True
)
#: forward and backward: 6 FLOPs a weight of a product and sample (2 forward, 2 for each of two gradients).
MLP = 6 * (6 * 8 + 8 * 4) - 2 * 6 * 8  # nobody wants the gradient of the inputs


def gpt_loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> LossOutput:
    return LossOutput(model(*batch)[0])


def gpt_flops(config: GPTConfig, batch: int = 2) -> float:
    """FLOPs of a token."""
    with torch.device("meta"):
        model = GPT(config, chunked_cross_entropy)
    outline, length = Outline(model), config.context_length
    tokens = torch.zeros(batch, length, dtype=torch.int64)
    return outline.count(gpt_loss, outline.batch((tokens, tokens))) / (batch * length)


@pytest.mark.parametrize("config", [TINY, GPTConfig(), replace(TINY, dropout=0.2, activation="swiglu")],
                         ids=["tiny", "124m", "swiglu"])  # fmt: skip
def test_a_gpt_costs_six_flops_a_parameter_and_token_and_attention(config: GPTConfig) -> None:
    with torch.device("meta"):
        parameters = sum(p.numel() for p in GPT(config, chunked_cross_entropy).parameters())
    # PaLM, appendix B: 6 N + 12 L H Q T; the head is the embedding, so N counts it once, as the products do
    attention = 12 * config.num_layers * config.dim * config.context_length
    assert gpt_flops(config) == 6 * parameters + attention


def test_resnet18_costs_what_its_convolutions_cost() -> None:
    """The model of the CIFAR recipe's preset classic."""
    with torch.device("meta"):
        model = resnet18()

    def conv(kernel: int, inside: int, out: int, side: int) -> int:
        return 2 * kernel**2 * inside * out * side**2

    stem, rest = conv(3, 3, 64, 32), 2 * 512 * 10
    for stage, width in enumerate((64, 128, 256, 512)):
        side, inside = 32 >> stage, width if stage == 0 else width // 2
        rest += conv(3, inside, width, side) + 3 * conv(3, width, width, side)
        rest += 0 if stage == 0 else conv(1, inside, width, side)
    assert stem + rest == pytest.approx(1.11e9, rel=0.005)
    outline = Outline(model)
    batch = outline.batch((torch.zeros(4, 3, 32, 32), torch.zeros(4, dtype=torch.int64)))
    counted = outline.count(lambda net, given: LossOutput(F.cross_entropy(net(given[0]), given[1])), batch)
    # the images want no gradient: the stem has one product in its backward, all others two
    assert counted == 4 * (2 * stem + 3 * rest)


def test_counting_changes_nothing() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5), nn.Flatten(), nn.Linear(144, 2))
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    before, state = state_digest(tensors), torch.get_rng_state()
    outline = Outline(model)

    def loss(net: nn.Module, batch: tuple[Tensor, Tensor]) -> LossOutput:
        inputs = batch[0] + torch.rand(batch[0].shape[0])[:, None, None, None]
        return LossOutput(F.cross_entropy(net(inputs), batch[1]))

    batch = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0)), torch.zeros(4, dtype=torch.int64)
    assert outline.count(loss, outline.batch(batch)) > 0
    assert state_digest(tensors) == before
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None for p in model.parameters())


def build(folder: Path, config: tiny.TinyConfig, recipe=RECIPE):  # type: ignore[no-untyped-def]
    config = replace(config, run_dir=folder / "run")
    return assemble(recipe, config, start(config, Topology()))


def lines(folder: Path, event: str = "train") -> list[dict[str, float]]:
    text = (folder / "run" / "metrics.jsonl").read_text()
    return [line for line in map(json.loads, text.splitlines()) if line["event"] == event]


def test_mfu_is_flops_of_the_samples_over_time_and_peak(tmp_path: Path) -> None:
    config = replace(BASE, microbatch_size=4, dropout=0.3, batch_norm=True, noise=0.1)
    plain = fit(build(tmp_path / "a", config))
    counted = fit(build(tmp_path / "b", replace(config, peak_tflops=0.001)))
    assert counted["state_digest"] == plain["state_digest"]
    assert counted["flops_per_sample"] == MLP
    assert counted["mfu"] == pytest.approx(counted["samples_per_second"] * MLP / 1e9)
    assert counted["peak"] == "0.001 TFLOP/s per rank, as given"
    assert len(lines(tmp_path / "b")) == 4
    for line in lines(tmp_path / "b"):
        assert line["mfu"] == pytest.approx(line["samples_per_second"] * MLP / 1e9)
    assert not {"mfu", "flops_per_sample", "peak"} & plain.keys()
    assert all("mfu" not in line for line in lines(tmp_path / "a"))


# torch 2.11 makes one when it compiles `apply`
@pytest.mark.filterwarnings("ignore:.*autograd.function.Function.* should not be instantiated:DeprecationWarning")
def test_what_is_computed_again_or_compiled_counts_once(tmp_path: Path) -> None:
    again = ActivationCheckpointingConfig(mode="full")
    base = replace(tiny_gpt.BASE, num_steps=4, report_every=2, peak_tflops=1.0)
    configs = [base, replace(base, activation_checkpointing=again),
               replace(base, compile=True, compile_backend="eager", precision="bf16")]  # fmt: skip
    found = [fit(build(tmp_path / str(i), config, tiny_gpt.RECIPE)) for i, config in enumerate(configs)]
    assert len({summary["flops_per_sample"] for summary in found}) == 1
    shape = tiny_gpt.SHAPE
    parameters = sum(p.numel() for p in GPT(shape, chunked_cross_entropy).parameters())
    token = 6 * parameters + 12 * shape.num_layers * shape.dim * shape.context_length
    assert found[0]["flops_per_sample"] == token * shape.context_length


def needs_values(config: tiny.TinyConfig, model: nn.Module, batch: dict[str, Tensor]) -> LossOutput:
    output = tiny.compute_loss(config, model, batch)
    return output if batch["labels"].max() < 99 else LossOutput(output.loss * 2)


def test_what_cannot_be_counted_is_said_once_and_the_run_goes_on(tmp_path: Path) -> None:
    summary = fit(build(tmp_path, replace(BASE, peak_tflops=1.0), replace(RECIPE, compute_loss=needs_values)))
    assert summary["mfu"].startswith("unknown: ")
    assert "flops_per_sample" not in summary
    notes = [line["message"] for line in lines(tmp_path, "note") if "mfu" in line["message"]]
    assert len(notes) == 1
    assert all("mfu" not in line for line in lines(tmp_path))


def test_lbfgs_has_no_number_of_flops(tmp_path: Path) -> None:
    config = replace(BASE, peak_tflops=1.0, num_steps=5, optim=LBFGS(lr=0.1))
    assert "several times" in fit(build(tmp_path, config))["mfu"]


def train_each(folder: str, configs: dict[str, tiny.TinyConfig]) -> dict[str, object]:
    """On every rank: the summaries."""
    runtime = start(next(iter(configs.values())), read_topology(os.environ))
    found = {}
    for name, config in configs.items():
        run = assemble(RECIPE, replace(config, run_dir=Path(folder) / name / "run"), runtime)
        found[name] = fit(run)
        run.directory.release()
    runtime.close()
    return found


@pytest.mark.distributed
def test_the_peak_is_that_of_all_ranks(tmp_path: Path) -> None:
    config = replace(BASE, peak_tflops=0.001)
    configs = {name: replace(config, strategy=name) for name in ("ddp", "fsdp")}
    first, second = run_ranks(train_each, 2, str(tmp_path), configs)
    for name in configs:
        assert first[name]["flops_per_sample"] == second[name]["flops_per_sample"] == MLP
        for line in lines(tmp_path / name):
            assert line["mfu"] == pytest.approx(line["samples_per_second"] * MLP / 2e9)


@pytest.mark.parametrize(
    ("name", "precision", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", "bf16", 989.5),
        ("NVIDIA H100 PCIe", "bf16", 756.5),
        ("NVIDIA H200", "fp32", 67),
        ("NVIDIA A100-SXM4-80GB", "tf32", 156),
        ("NVIDIA A10G", "bf16", None),
        ("NVIDIA A10", "fp16", 125),
        ("NVIDIA L40S", "bf16", 362),
        ("NVIDIA L4", "bf16", 121),
        ("Tesla V100-SXM2-16GB", "fp16", 125),
        ("Tesla V100-SXM2-16GB", "bf16", None),
        ("Tesla V100-PCIE-32GB", "fp32", 14),
        ("NVIDIA GeForce RTX 4090", "bf16", 165.2),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", "bf16", None),
        ("NVIDIA GeForce RTX 3090 Ti", "bf16", None),
        ("NVIDIA GeForce RTX 4090 D", "bf16", None),
        ("NVIDIA A100-SXM4-80GB MIG 1g.10gb", "bf16", None),
        ("AMD Instinct MI300X", "bf16", 1307.4),
        ("cpu", "fp32", None),
    ],
)
def test_known_peaks(name: str, precision: str, tflops: float | None) -> None:
    assert known_peak(name, precision) == (None if tflops is None else pytest.approx(tflops * 1e12))


def test_no_line_of_the_table_hides_another() -> None:
    for name, peaks in PEAKS:
        for precision, tflops in peaks.items():
            assert known_peak(f"NVIDIA {name}", precision) == tflops * 1e12
        assert set(peaks) <= {"bf16", "fp16", "tf32", "fp32"}


def test_a_peak_is_a_positive_number() -> None:
    with pytest.raises(ConfigError, match="--peak-tflops"):
        replace(BASE, peak_tflops=0.0)
