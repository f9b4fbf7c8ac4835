"""What DeepSpeed is told: a user's JSON over what is generated, and each contradiction in one line."""

from __future__ import annotations

import json
from dataclasses import replace
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest
from support import tiny

from distkit.config import TrainConfig, ZeroConfig, split_batch
from distkit.errors import ConfigError
from distkit.strategies.deepspeed import engine
from distkit.strategies.deepspeed.config import Section, deepspeed_config

BASE = replace(tiny.BASE, strategy="zero2", microbatch_size=2, max_grad_norm=0.5)


def told(tmp_path: Path, own: object, config: TrainConfig = BASE) -> Section:
    """The configuration with `own` (JSON, or text as it is) as the user's file."""
    file = tmp_path / "ds.json"
    file.write_text(own if isinstance(own, str) else json.dumps(own))
    config = replace(config, zero=replace(config.zero, config=file))
    return deepspeed_config(config, split_batch(config, 2), int(config.strategy[-1]), 1000, pinned=False)


def test_what_is_generated() -> None:
    section = deepspeed_config(BASE, split_batch(BASE, 2), 2, 1000, pinned=False)
    assert section["train_batch_size"] == 8
    assert (section["train_micro_batch_size_per_gpu"], section["gradient_accumulation_steps"]) == (2, 2)
    assert "torch_autocast" not in section
    zero = section["zero_optimization"]
    assert isinstance(zero, dict)
    assert (zero["stage"], zero["reduce_bucket_size"]) == (2, 1000)
    low = deepspeed_config(replace(BASE, precision="bf16"), split_batch(BASE, 2), 2, 1000, pinned=False)
    assert low["torch_autocast"] == {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []}
    everything = replace(BASE, strategy="zero3", zero=ZeroConfig(offload="parameters"))
    zero = deepspeed_config(everything, split_batch(BASE, 2), 3, 1000, pinned=True)["zero_optimization"]
    assert isinstance(zero, dict)
    assert zero["offload_param"] == zero["offload_optimizer"] == {"device": "cpu", "pin_memory": True}


def test_a_users_file_lies_above(tmp_path: Path) -> None:
    own = {
        "train_batch_size": "auto",
        "gradient_clipping": 0.5,
        "bf16": {"enabled": "auto"},
        "communication_data_type": "fp32",
        "zero_optimization": {"reduce_bucket_size": 5, "allgather_bucket_size": "auto", "overlap_comm": False},
        "flops_profiler": {"enabled": "auto", "profile_step": 3},
    }
    section = told(tmp_path, own)
    assert (section["train_batch_size"], section["communication_data_type"]) == (8, "fp32")
    zero = section["zero_optimization"]
    assert isinstance(zero, dict)
    assert (zero["reduce_bucket_size"], zero["allgather_bucket_size"], zero["overlap_comm"]) == (5, 1000, False)
    assert section["flops_profiler"] == {"profile_step": 3}
    # clipping is done before DeepSpeed's step, and 16 bits are autocast
    assert section["gradient_clipping"] == 0.0
    assert section["bf16"] == section["fp16"] == {"enabled": False}
    assert told(tmp_path, {"bf16": {"enabled": True}}, replace(BASE, precision="bf16"))["bf16"] == {"enabled": False}
    moved = {"zero_optimization": {"offload_optimizer": {"device": "cpu", "fast_init": True}}}
    section = told(tmp_path, moved, replace(BASE, zero=ZeroConfig(offload="optimizer")))
    zero = section["zero_optimization"]
    assert isinstance(zero, dict)
    assert zero["offload_optimizer"] == {"device": "cpu", "pin_memory": False, "fast_init": True}


def zero(**options: object) -> dict[str, object]:
    return {"zero_optimization": options}


@pytest.mark.parametrize(
    ("own", "changes", "names"),
    [
        ({"train_batch_size": 16}, {}, ("train_batch_size", "8", "16", "--global-batch-size 16")),
        ({"train_micro_batch_size_per_gpu": 4}, {}, ("train_micro_batch_size_per_gpu", "--microbatch-size 4")),
        ({"gradient_accumulation_steps": 4}, {}, ("gradient_accumulation_steps", "2", "4", "--microbatch-size")),
        ({"gradient_clipping": 1.0}, {}, ("gradient_clipping", "0.5", "1.0", "--max-grad-norm 1.0")),
        ({"gradient_clipping": 0}, {}, ("gradient_clipping", "0.5", "--max-grad-norm None")),
        ({"gradient_clipping": 1.0}, {"max_grad_norm": None}, ("gradient_clipping", "--max-grad-norm 1.0")),
        (zero(stage=3), {}, ("zero_optimization.stage", "2", "3", "--strategy zero3")),
        (zero(stage=0), {}, ("zero_optimization.stage", "--strategy ddp")),
        ({"bf16": {"enabled": True}}, {}, ("bf16", "--precision fp32", "--precision bf16")),
        ({"fp16": {"enabled": True}}, {"precision": "bf16"}, ("fp16", "--precision bf16", "--precision fp16")),
        ({"fp16": {"enabled": True, "loss_scale": 8}}, {"precision": "fp16"}, ("fp16", "loss_scale")),
        ({"torch_autocast": {"enabled": True}}, {}, ("torch_autocast", "--precision bf16")),
        ({"torch_autocast": {"lower_precision_safe_modules": []}}, {}, ("torch_autocast", "--precision fp32")),
        ({"optimizer": {"type": "Adam"}}, {}, ('"optimizer"', "Adam", "--optim.name")),
        ({"scheduler": {"type": "WarmupLR"}}, {}, ('"scheduler"', "WarmupLR", "--schedule.name")),
        ({"amp": {"enabled": True}}, {}, ('"amp"', "--precision")),
        ({"checkpoint": {"tag_validation": "Warn"}}, {}, ('"checkpoint"', "--checkpoint.save-every")),
        ({"elasticity": {"enabled": True}}, {}, ('"elasticity"', "leave")),
        ({"activation_checkpointing": {"partition_activations": True}}, {},
         ('"activation_checkpointing"', "--activation-checkpointing.mode full")),
        ({"csv_monitor": {"enabled": True}}, {}, ('"csv_monitor"', "behind the run's back")),
        ({"gradient_cliping": 1.0}, {}, ('"gradient_cliping" is not taken', '"gradient_clipping"')),
        ({"zero_allow_untested_optimizer": False}, {}, ("zero_allow_untested_optimizer", "True", "False")),
        ({"tensor_parallel": {"autotp_size": 2}}, {}, ('"tensor_parallel"', "leave")),
        (zero(zero_hpz_partition_size=2), {}, ("zero_hpz_partition_size", "leave")),
        (zero(mics_shard_size=4), {}, ("mics_shard_size", "leave")),
        (zero(cpu_offload=True), {}, ("cpu_offload", "leave")),
        (zero(offload_optimizer={"device": "cpu"}), {}, ("offload_optimizer", "--zero.offload optimizer")),
        (zero(offload_optimizer={"device": "nvme"}), {}, ("offload_optimizer", "nvme", "cpu or none")),
        (zero(offload_optimizer={"device": "none"}), {"zero": ZeroConfig(offload="optimizer")},
         ("offload_optimizer", "--zero.offload none")),
        (zero(offload_optimizer={"device": "cpu", "ratio": 0.5}), {"zero": ZeroConfig(offload="optimizer")},
         ("offload_optimizer", "ratio")),
        (zero(offload_param={"device": "cpu"}), {"strategy": "zero3"},
         ("offload_param", "--zero.offload parameters")),
        (zero(stage3_param_persistence_threshold=10), {"strategy": "zero3", "ema_decay": 0.9},
         ("stage3_param_persistence_threshold", "--ema-decay")),
        ({"zero_optimization": 2}, {}, ("zero_optimization", "not a section")),
        ([], {}, ("JSON object", "list")),
        ("{", {}, ("cannot be read", "a JSON file")),
    ],
)  # fmt: skip
def test_what_contradicts_is_named(
    own: object, changes: dict[str, object], names: tuple[str, ...], tmp_path: Path
) -> None:
    with pytest.raises(ConfigError) as caught:
        told(tmp_path, own, replace(BASE, **changes))  # type: ignore[arg-type]
    message = str(caught.value)
    assert f"--zero.config {tmp_path / 'ds.json'}" in message
    for name in names:
        assert name in message, message


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    config = replace(BASE, zero=ZeroConfig(config=tmp_path / "no.json"))
    with pytest.raises(ConfigError, match=r"no\.json"):
        deepspeed_config(config, split_batch(config, 2), 2, 1000, pinned=False)


@pytest.mark.parametrize("missing", ["deepspeed", "transformers"])
def test_what_is_not_installed_is_named(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "find_spec", lambda name: None if name == missing else ModuleSpec(name, None))
    with pytest.raises(ConfigError, match=rf"zero2 needs {missing}(?s:.*)distkit\[deepspeed\]"):
        engine.require_installed("zero2")
