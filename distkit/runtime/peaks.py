"""What devices can do at most, by their makers: the denominator of MFU."""

from __future__ import annotations

import torch

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
