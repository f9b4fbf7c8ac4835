"""What strategies ask of a GPU, as far as that can be told without one."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from support.tiny import BASE, TinyConfig

from distkit.errors import ConfigError
from distkit.runtime import Topology
from distkit.runtime.process import Runtime
from distkit.strategies import build_strategy, set_fp32_precision

GPU = Runtime(topology=Topology(), device=torch.device("cuda", 0))
CPU = Runtime(topology=Topology(), device=torch.device("cpu"))


@pytest.fixture
def own_precision() -> Iterator[None]:
    yield
    set_fp32_precision("fp32")


@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16", "fp16"])
@pytest.mark.usefixtures("own_precision")
def test_fp32_is_the_same_by_every_name(precision: str) -> None:
    set_fp32_precision(precision)
    tf32 = precision == "tf32"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert torch.backends.cuda.matmul.allow_tf32 is tf32
        assert torch.backends.cudnn.allow_tf32 is tf32
        assert torch.get_float32_matmul_precision() == ("high" if tf32 else "highest")
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=tf32):
            assert torch.backends.cudnn.allow_tf32 is tf32
    set_fp32_precision(precision)
    found = {torch.backends.cuda.matmul.fp32_precision, torch.backends.cudnn.conv.fp32_precision,
             torch.backends.cudnn.rnn.fp32_precision}  # fmt: skip
    assert found == {"tf32" if tf32 else "ieee"}


class Pretended:
    """A strategy's own tensors stay on the CPU."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capability: int) -> None:
        zeros = torch.zeros
        monkeypatch.setattr(torch, "zeros", lambda *size, device=None, **other: zeros(*size, **other))
        monkeypatch.setattr(torch, "autocast", lambda kind, dtype: contextlib.nullcontext())
        monkeypatch.setattr(torch.amp, "GradScaler", lambda kind, enabled: None)
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True:
                            capability >= 8 or including_emulation)  # fmt: skip
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla V100-SXM2-16GB")


def test_bf16_is_not_emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    Pretended(monkeypatch, 7)
    with pytest.raises(ConfigError, match=r"(?s)bf16 needs .* 8\.0 .*V100.*--precision fp16"):
        build_strategy(replace(BASE, precision="bf16"), GPU)
    build_strategy(replace(BASE, precision="fp16"), GPU)
    Pretended(monkeypatch, 9)
    build_strategy(replace(BASE, precision="bf16"), GPU)


GRAPHS = [{"compile_mode": "reduce-overhead"}, {"compile_mode": "max-autotune"}, {"compile_backend": "cudagraphs"}]


@pytest.mark.parametrize("how", GRAPHS)
def test_graphs_that_write_over_their_results(how: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    config: TinyConfig = replace(BASE, compile=True, **how)  # type: ignore[arg-type]
    assert not build_strategy(replace(config, microbatch_size=4), CPU).reuses_outputs
    Pretended(monkeypatch, 9)
    assert build_strategy(config, GPU).reuses_outputs
    (value,) = how.values()
    with pytest.raises(ConfigError, match=rf"{value} captures CUDA graphs.* 2 microbatches"):
        build_strategy(replace(config, microbatch_size=4), GPU)
    plain = build_strategy(replace(BASE, compile=True, microbatch_size=4), GPU)
    assert not plain.reuses_outputs
