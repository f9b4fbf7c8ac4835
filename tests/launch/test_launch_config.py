"""What an accelerate config file decides, through real `accelerate launch`: done as it says, or refused by name."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml
from support.harness import ROOT, Ended
from support.launching import TINY, environment, run, write_text

pytestmark = [pytest.mark.slow, pytest.mark.distributed]
SETTINGS = {"compute_environment": "LOCAL_MACHINE", "num_machines": 1, "machine_rank": 0, "num_processes": 2}
ALONE = {"distributed_type": "NO", "num_processes": 1}
SHORT = ["--num-steps", "3", "--report-every", "1"]


def launch(folder: Path, settings: Mapping[str, object], *flags: str) -> Ended:
    """`recipes/gpt.py` with an accelerate config file; `ds.json` may lie in the folder."""
    (folder / "config.yaml").write_text(yaml.safe_dump({**SETTINGS, **settings}))
    port = [] if settings["distributed_type"] == "NO" else ["--main_process_port", "0"]
    recipe = [str(ROOT / "recipes" / "gpt.py"), "--text", str(write_text(folder)), "--run-dir", "run", *TINY, *SHORT]
    env = environment({"ACCELERATE_USE_CPU": "true", "DS_ACCELERATOR": "cpu"})
    return run(["accelerate", "launch", "--config_file", "config.yaml", *port, *recipe, *flags], folder, env)


def read(folder: Path, name: str) -> dict[str, object]:
    return json.loads((folder / "run" / f"{name}.json").read_text())  # type: ignore[no-any-return]


def test_fsdp_units_recomputation_and_compilation(tmp_path: Path) -> None:
    fsdp = {
        "fsdp_version": 2,
        "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
        "fsdp_transformer_layer_cls_to_wrap": "Block",
        "fsdp_activation_checkpointing": True,
        "fsdp_reshard_after_forward": False,
    }
    dynamo = {"dynamo_backend": "AOT_EAGER", "dynamo_use_regional_compilation": True}
    settings = {"distributed_type": "FSDP", "mixed_precision": "bf16", "fsdp_config": fsdp, "dynamo_config": dynamo}
    done = launch(tmp_path, settings)
    assert done.returncode == 0, done.stderr[-4000:]
    config = read(tmp_path, "config")
    assert (config["strategy"], config["precision"]) == ("fsdp", "bf16")
    chosen = config["fsdp"]
    assert isinstance(chosen, dict)
    assert (chosen["wrap"], chosen["reshard_after_forward"]) == (["Block"], False)
    assert config["activation_checkpointing"] == {"mode": "blocks", "blocks": ["Block"], "every": None}
    assert (config["compile"], config["compile_backend"], config["compile_scope"]) == (True, "aot_eager", "blocks")


def test_deepspeed_clipping_and_accumulation(tmp_path: Path) -> None:
    section = {"zero_stage": 2, "gradient_clipping": 0.01, "gradient_accumulation_steps": 2}
    done = launch(tmp_path, {"distributed_type": "DEEPSPEED", "deepspeed_config": section})
    assert done.returncode == 0, done.stderr[-4000:]
    config = read(tmp_path, "config")
    assert (config["strategy"], config["max_grad_norm"], config["microbatch_size"]) == ("zero2", 0.01, 1)
    assert "x 2 microbatches" in str(read(tmp_path, "summary")["global_batch"])
    assert "grad_norm" in (tmp_path / "run" / "metrics.jsonl").read_text()


def test_a_deepspeed_file(tmp_path: Path) -> None:
    zero = {"stage": 3, "offload_optimizer": {"device": "none"}, "reduce_bucket_size": "auto"}
    said = {"zero_optimization": zero, "gradient_clipping": 0.25, "train_batch_size": "auto", "fp16": {"enabled": True}}
    (tmp_path / "ds.json").write_text(json.dumps(said))
    section = {"deepspeed_config_file": "ds.json", "zero3_init_flag": True}
    done = launch(tmp_path, {"distributed_type": "DEEPSPEED", "deepspeed_config": section})
    assert done.returncode == 0, done.stderr[-4000:]
    config = read(tmp_path, "config")
    assert (config["strategy"], config["max_grad_norm"], config["precision"]) == ("zero3", 0.25, "fp16")
    assert config["zero"] == {"config": "ds.json", "offload": "none"}


class Refused(NamedTuple):
    settings: dict[str, object]
    says: tuple[str, ...]
    flags: tuple[str, ...] = ()
    file: dict[str, object] | None = None


ZERO2: dict[str, object] = {"stage": 2}
REFUSED = {
    "precision and a flag": Refused(
        {"distributed_type": "MULTI_GPU", "mixed_precision": "fp16"},
        ("--precision bf16", "ACCELERATE_MIXED_PRECISION=fp16"),
        ("--precision", "bf16"),
    ),
    "a class that the model has not": Refused(
        {"distributed_type": "FSDP", "fsdp_config": {"fsdp_transformer_layer_cls_to_wrap": "LlamaDecoderLayer"}},
        ("LlamaDecoderLayer", "Block"),
    ),
    "clipping and a flag": Refused(
        {"distributed_type": "DEEPSPEED", "deepspeed_config": {"zero_stage": 1, "gradient_clipping": 1.0}},
        ("--max-grad-norm 0.5", "ACCELERATE_GRADIENT_CLIPPING=1.0"),
        ("--max-grad-norm", "0.5"),
    ),
    "accumulation that does not divide": Refused(
        {"distributed_type": "DEEPSPEED", "deepspeed_config": {"gradient_accumulation_steps": 3}},
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS=3", "--global-batch-size 4"),
    ),
    "a DeepSpeed file with another batch": Refused(
        {"distributed_type": "DEEPSPEED", "deepspeed_config": {"deepspeed_config_file": "ds.json"}},
        ("ds.json", "train_batch_size", "--global-batch-size 64"),
        file={"zero_optimization": ZERO2, "train_batch_size": 64},
    ),
    "a compiler": Refused(
        {**ALONE, "dynamo_config": {"dynamo_backend": "TVM"}},
        ("ACCELERATE_DYNAMO_BACKEND=TVM", "--dynamo_backend inductor"),
    ),
    "checks that are not there": Refused({**ALONE, "debug": True}, ("ACCELERATE_DEBUG_MODE=true", "debug: false")),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_done_is_refused_once_with_2(tmp_path: Path, name: str) -> None:
    settings, says, flags, file = REFUSED[name]
    if file is not None:
        (tmp_path / "ds.json").write_text(json.dumps(file))
    done = launch(tmp_path, settings, *flags)
    # accelerate turns every exit code into 1, and tells the ranks' own below its traceback
    assert done.returncode == 1
    assert "exitcode  : 2 " in done.stderr or "exit status 2" in done.stderr
    assert done.stderr.count("distkit: error") == 1
    ours, *launchers = done.stderr.split("Traceback")
    assert len(launchers) == 1, done.stderr
    message = ours[ours.index("distkit: error") :]
    for part in says:
        assert part in message
    assert done.stdout == ""
    assert not (tmp_path / "run").exists()
