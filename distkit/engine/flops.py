"""FLOPs of a sample, counted once on a copy of the model without memory, and the share of the peak that is used (MFU).

What is counted are the model's own FLOPs: each product once in the forward and, for each gradient, once in the
backward, whatever a run computes again (activation checkpointing, attention kernels) or lays out differently. Attention
counts in full, causal or not, as in Chowdhery et al. 2022 (PaLM), arXiv:2204.02311, appendix B.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from distkit.config import TrainConfig
from distkit.data import Batch
from distkit.data.batch import Microbatches, batch_size, map_tensors
from distkit.losses import ComputeLoss
from distkit.runtime.process import Runtime
from distkit.runtime.seeding import seeded

CPU = torch.device("cpu")
#: Name in torch.cuda.get_device_name (all of the words) -> TFLOP/s of a precision, dense: half of what a data sheet
#: says "with sparsity". 16-bit products are added up in fp32. The first line that fits counts.
PEAKS: tuple[tuple[str, dict[str, float]], ...] = (
    # NVIDIA HGX/DGX B200 data sheet: 4.5 and 2.2 PFLOP/s with sparsity, 75 TFLOP/s
    ("B200", {"bf16": 2250, "fp16": 2250, "tf32": 1100, "fp32": 75}),
    # NVIDIA H200 data sheet: NVL 1,671 and 835 with sparsity, 60; SXM 1,979 and 989 with sparsity, 67
    ("H200 NVL", {"bf16": 835.5, "fp16": 835.5, "tf32": 417.5, "fp32": 60}),
    ("H200", {"bf16": 989.5, "fp16": 989.5, "tf32": 494.5, "fp32": 67}),
    # NVIDIA H100 data sheet: NVL 1,671 and 835 with sparsity, 60; PCIe 1,513 and 756, 51; SXM 1,979 and 989, 67
    ("H100 NVL", {"bf16": 835.5, "fp16": 835.5, "tf32": 417.5, "fp32": 60}),
    ("H100 PCIe", {"bf16": 756.5, "fp16": 756.5, "tf32": 378, "fp32": 51}),
    ("H100", {"bf16": 989.5, "fp16": 989.5, "tf32": 494.5, "fp32": 67}),
    # NVIDIA A100 data sheet (PCIe and SXM, 40 and 80 GB alike)
    ("A100", {"bf16": 312, "fp16": 312, "tf32": 156, "fp32": 19.5}),
    # NVIDIA A10 data sheet
    ("A10", {"bf16": 125, "fp16": 125, "tf32": 62.5, "fp32": 31.2}),
    # NVIDIA L40S data sheet
    ("L40S", {"bf16": 362, "fp16": 362, "tf32": 183, "fp32": 91.6}),
    # NVIDIA L4 data sheet: 242 and 120 with sparsity
    ("L4", {"bf16": 121, "fp16": 121, "tf32": 60, "fp32": 30.3}),
    # NVIDIA V100 data sheet; no bf16 and no tf32
    ("V100 SXM2", {"fp16": 125, "fp32": 15.7}),
    ("V100 PCIE", {"fp16": 112, "fp32": 14}),
    # NVIDIA Ada GPU architecture white paper, appendix A
    ("RTX 4090", {"bf16": 165.2, "fp16": 165.2, "tf32": 82.6, "fp32": 82.6}),
    # NVIDIA Ampere GA102 GPU architecture white paper, appendix A
    ("RTX 3090", {"bf16": 71, "fp16": 71, "tf32": 35.6, "fp32": 35.6}),
    # AMD Instinct MI300X data sheet
    ("MI300X", {"bf16": 1307.4, "fp16": 1307.4, "tf32": 653.7, "fp32": 163.4}),
)
#: Words that make another chip, or a part of one, of a name in the table.
OTHER_CHIPS = frozenset({"D", "LAPTOP", "MIG", "SUPER", "TI"})


class Outline:
    """A model's structure and the shapes of its tensors, without their values: what is counted on.

    It computes with fake CPU tensors, which have no memory, so it is the same for every device and strategy.

    Args:
        model: on any device, before a strategy has wrapped, cut or compiled it; it is not changed.

    Raises:
        Exception: whatever copying the model raised.
    """

    def __init__(self, model: nn.Module) -> None:
        from torch._subclasses.fake_tensor import FakeTensorMode  # with sympy it takes a second, which few runs need

        self._mode = FakeTensorMode(allow_non_fake_inputs=True)
        known: dict[int, object] = {}
        for tensor in [*model.parameters(), *model.buffers()]:
            fake = self._fake(tensor)
            parameter = isinstance(tensor, nn.Parameter)
            known[id(tensor)] = nn.Parameter(fake, tensor.requires_grad) if parameter else fake
        self._model: nn.Module = copy.deepcopy(model, known)

    def _fake(self, tensor: Tensor) -> Tensor:
        with self._mode:
            return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=CPU)

    def batch(self, batch: Batch) -> Batch:
        """A batch of the same shapes."""
        return map_tensors(self._fake, batch)

    def count(self, compute_loss: ComputeLoss, batch: Batch) -> int:
        """FLOPs of the forward and the backward of `batch`, which `batch` made.

        Random generators are as before afterwards.

        Raises:
            Exception: whatever the loss raised that cannot be computed without values.
        """
        from torch.utils.flop_counter import FlopCounterMode

        # decomposed, attention's backward is that of its formula; the fused kernels compute the forward again in it
        with seeded(0), warnings.catch_warnings(), self._mode, sdpa_kernel(SDPBackend.MATH):
            warnings.simplefilter("ignore")  # the real step says the same
            with torch.enable_grad(), FlopCounterMode(display=False) as counter:
                compute_loss(self._model, batch).loss.backward()  # type: ignore[no-untyped-call]
        return int(counter.get_total_flops())


@dataclass
class Utilization:
    """MFU: the model's FLOP/s over those that all devices could do at most.

    Attributes:
        peak: FLOP/s of all ranks' devices together.
        flops_per_sample: None before they are counted, and where they cannot be.
        unknown: why they cannot be counted; "" where they can.
    """

    peak: float
    flops_per_sample: float | None = None
    unknown: str = ""
    outline: Outline | None = field(default=None, repr=False)
    _batch: Batch | None = field(default=None, init=False, repr=False)
    _told: bool = field(default=False, init=False)

    def of(self, samples_per_second: float) -> float | None:
        """MFU in [0, 1] at this speed over all ranks; None where it is not known."""
        return None if self.flops_per_sample is None else samples_per_second * self.flops_per_sample / self.peak

    def see(self, batch: Batch) -> None:
        """Remember the shapes of a microbatch."""
        if self.outline is not None:
            try:
                self._batch = self.outline.batch(batch)
            except Exception as error:
                self.give_up(error)

    def settle(self, compute_loss: ComputeLoss) -> str:
        """Count what `see` saw, once; why that cannot be, once, or ""."""
        if self.outline is not None and self._batch is not None:
            outline, batch, self.outline, self._batch = self.outline, self._batch, None, None
            try:
                self.flops_per_sample = outline.count(compute_loss, batch) / batch_size(batch)
            except Exception as error:
                self.give_up(error)
        if self._told or not self.unknown:
            return ""
        self._told = True
        return f"mfu is unknown, because the FLOPs of a step cannot be counted: {self.unknown}"

    def give_up(self, error: Exception) -> None:
        """Any model and any loss may fail where tensors have no values; a run must not end for that."""
        self.outline = self._batch = None
        self.unknown = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"

    def summary(self, samples_per_second: float) -> dict[str, object]:
        """What summary.json says of it."""
        if self.flops_per_sample is None:
            return {"mfu": f"unknown: {self.unknown or 'no step was reported'}"}
        return {"flops_per_sample": self.flops_per_sample, "mfu": self.of(samples_per_second)}


class FirstBatch:
    """A loader that shows its first microbatch to `see`, and then is the loader itself.

    Args:
        loader: anything with `microbatch(step, accum_index)` and `close()`.
        see: called once.
    """

    def __init__(self, loader: Microbatches, see: Callable[[Batch], None]) -> None:
        self._loader, self._see = loader, see
        self.microbatch: Callable[[int, int], Batch] = self._first
        self.first: Callable[[], Batch] = loader.first
        self.close: Callable[[], None] = loader.close

    def _first(self, step: int, accum_index: int) -> Batch:
        self.microbatch = self._loader.microbatch
        batch = self._loader.microbatch(step, accum_index)
        self._see(batch)
        return batch


def find_peak(config: TrainConfig, runtime: Runtime) -> float | None:
    """FLOP/s of one rank's device: what `--peak-tflops` says, or its data sheet; None where neither does."""
    if config.peak_tflops is not None:
        return config.peak_tflops * 1e12
    return known_peak(device_name(runtime.device), config.precision)


def outline_utilization(config: TrainConfig, runtime: Runtime, model: nn.Module) -> Utilization | None:
    """What MFU is computed with; None where the peak is not known. Called before a strategy takes the model."""
    peak = find_peak(config, runtime)
    if peak is None or config.debug.enabled:
        return None
    found = Utilization(peak * runtime.world_size)
    if config.optim.needs_closure:
        found.unknown = f"{config.optim.name} evaluates the loss several times a step"
        return found
    try:
        found.outline = Outline(model)
    except Exception as error:
        found.give_up(error)
    return found


def describe_peak(config: TrainConfig, runtime: Runtime) -> dict[str, str]:
    """The fact `peak`; {} on a CPU whose peak was not given."""
    peak, name = find_peak(config, runtime), device_name(runtime.device)
    if peak is not None:
        source = "as given" if config.peak_tflops is not None else f"of {name} in {config.precision}"
        return {"peak": f"{peak / 1e12:g} TFLOP/s per rank, {source}"}
    unknown = f"unknown for {name} in {config.precision}; set --peak-tflops to report mfu"
    return {"peak": unknown} if runtime.device.type == "cuda" else {}


def known_peak(name: str, precision: str) -> float | None:
    """Dense FLOP/s of the device `name` in `precision` (fp32, tf32, bf16 or fp16); None where the table has none."""
    words = set(name.upper().replace("-", " ").split())
    if words & OTHER_CHIPS:
        return None
    for known, peaks in PEAKS:
        if set(known.upper().split()) <= words:
            return peaks[precision] * 1e12 if precision in peaks else None
    return None


def device_name(device: torch.device) -> str:
    """What the device is called, for people and for `known_peak`."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
