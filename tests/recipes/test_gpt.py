"""The GPT recipe: its data, its parameter groups, a run from the command line, and text out of it."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.harness import ROOT, run_recipe_cli

from distkit.config import DataConfig, Muon
from distkit.errors import ConfigError, DataError
from distkit.load import module_of, read_recipe
from distkit.optim import default_param_groups

LINE = "To be, or not to be: that is the question.\n"
SMALL = ["--context-length", "16", "--num-layers", "1", "--dim", "32", "--global-batch-size", "8", "--eval-batch-size",
         "32", "--num-threads", "1", "--timeout-seconds", "60"]  # fmt: skip


gpt = module_of(read_recipe(ROOT / "recipes" / "gpt.py"))


@pytest.fixture
def config(tmp_path: Path):
    text = tmp_path / "text.txt"
    text.write_text(LINE * 100)
    return replace(
        gpt.PRESETS["tiny"],
        text=text,
        data=DataConfig(root=tmp_path / "data"),
        context_length=16,
        num_layers=2,
        dim=32,
    )


def test_tiny_keeps_to_its_budget() -> None:
    tiny = gpt.PRESETS["tiny"]
    model = gpt.GPT(tiny.model_config(65), gpt.chunked_cross_entropy)
    assert sum(p.numel() for p in model.parameters()) == 598_144 <= 850_000
    assert tiny.num_steps * tiny.global_batch_size * tiny.context_length == 1_536_000


def test_124m_is_gpt2_small_with_half_a_million_tokens_a_step() -> None:
    big = gpt.PRESETS["124m"]
    with torch.device("meta"):
        model = gpt.GPT(big.model_config(big.vocab_size), gpt.chunked_cross_entropy)
    assert sum(p.numel() for p in model.parameters()) == 123_568_128
    assert big.global_batch_size * big.context_length == 2**19
    assert big.optim.betas == (0.9, 0.95)


def test_a_text_is_encoded_once_and_again_when_it_changes(config) -> None:
    first = gpt.token_file(config)
    assert first.parent == config.data.root
    stamp = first.stat().st_mtime_ns
    assert gpt.token_file(config) == first
    assert first.stat().st_mtime_ns == stamp
    assert gpt.token_file(replace(config, level="byte")) != first
    config.text.write_text(LINE * 101)
    assert gpt.token_file(config) != first
    assert sorted(path.name for path in config.text.parent.iterdir()) == ["data", "text.txt"]


def test_the_splits_are_the_first_and_the_last_part_of_the_file(config) -> None:
    train, test = (gpt.build_dataset(config, split) for split in ("train", "test"))
    vocabulary = gpt.vocabulary_of(config)
    text, border = LINE * 100, int(len(LINE) * 100 * 0.9)
    for dataset, start, end in ((train, 0, border), (test, border, len(text))):
        assert len(dataset) == (end - start - 1) // 16
        tokens, targets = dataset.fetch(torch.arange(len(dataset)))
        assert vocabulary.decode(tokens.flatten().numpy()) == text[start : start + 16 * len(dataset)]
        assert vocabulary.decode(targets.flatten().numpy()) == text[start + 1 : start + 1 + 16 * len(dataset)]


def test_the_vocabulary_is_that_of_the_text_unless_padded(config) -> None:
    size = len(set(LINE))
    assert gpt.build_model(config).embedding.weight.shape == (size, 32)
    assert gpt.build_model(replace(config, vocab_size=64)).embedding.weight.shape == (64, 32)
    assert gpt.build_model(replace(config, level="byte")).embedding.weight.shape == (256, 32)
    with pytest.raises(ConfigError, match="--vocab-size None"):
        gpt.build_model(replace(config, vocab_size=size - 1))


def test_ready_made_tokens_need_a_vocabulary_size(config) -> None:
    tokens = gpt.token_file(config)
    with pytest.raises(ConfigError, match="--vocab-size 50304"):
        replace(config, tokens=tokens)
    made = replace(config, tokens=tokens, vocab_size=80)
    assert len(gpt.build_dataset(made, "train")) == len(gpt.build_dataset(config, "train"))
    assert gpt.build_model(made).embedding.weight.shape == (80, 32)
    with pytest.raises(DataError, match="--tokens"):
        gpt.sample(made, gpt.build_model(made))


def test_bad_input_says_what_to_type(config, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="--text FILE"):
        gpt.build_dataset(replace(config, text=tmp_path / "none.txt"), "train")
    with pytest.raises(ConfigError, match="--dim 130"):
        replace(config, num_heads=5, dim=128)
    with pytest.raises(ConfigError, match=r"--data\.source"):
        replace(config, data=DataConfig(source="synthetic"))
    with pytest.raises(ConfigError, match="--test-share"):
        replace(config, test_share=0.0)


def test_the_loss_is_the_mean_over_tokens(config) -> None:
    torch.manual_seed(0)
    model, dataset = gpt.build_model(config).double(), gpt.build_dataset(config, "train")
    tokens, targets = dataset.fetch(torch.arange(6))
    output = gpt.compute_loss(config, model, (tokens, targets))
    logits = model.logits(model(tokens))
    torch.testing.assert_close(output.loss, torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten()))
    halves = [gpt.compute_loss(config, model, (tokens[i : i + 3], targets[i : i + 3])).loss for i in (0, 3)]
    torch.testing.assert_close(sum(halves) / 2, output.loss)
    assert output.weight is None
    assert gpt.recipe.expected_initial_loss(config) == pytest.approx(output.loss.item(), abs=0.2)


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_muon_takes_every_matrix_but_the_embedding(config, decay: float) -> None:
    muon = replace(config, optim=Muon(lr=0.01, weight_decay=decay))
    model = gpt.build_model(muon)
    matrices, *rest = default_param_groups(model, muon.optim)
    assert matrices["kind"] == "muon"
    assert matrices["param_names"] == [name for name, _ in model.named_parameters() if "embedding" not in name]
    assert [name for group in rest for name in group["param_names"]] == ["embedding.weight"]


def test_samples_are_text_of_the_vocabulary(config) -> None:
    padded = replace(config, vocab_size=512)
    torch.manual_seed(0)
    model = gpt.build_model(padded)
    text = gpt.sample(padded, model, "To be", num_new=40, temperature=2.0, seed=3)
    assert text.startswith("To be")
    assert len(text) == 45
    assert set(text) <= set(LINE)
    assert gpt.sample(padded, model, "To be", num_new=40, temperature=2.0, seed=3) == text
    with pytest.raises(DataError, match="empty"):
        gpt.sample(padded, model, "")
    with pytest.raises(DataError, match="vocabulary"):
        gpt.sample(padded, model, "é")


def run(folder: Path, *argv: str, world_size: int = 1) -> dict[str, object]:
    """A run of tiny with `argv` in `folder`; its summary."""
    ended = run_recipe_cli([*SMALL, *argv, "--run-dir", "run"], folder, recipe=ROOT / "recipes" / "gpt.py",
                           world_size=world_size)  # fmt: skip
    assert [one.returncode for one in ended] == [0] * world_size, ended[0].stderr
    return json.loads((folder / "run" / "summary.json").read_text())


def test_a_run_learns_a_line_by_heart(config) -> None:
    folder = config.text.parent
    summary = run(folder, "--text", "text.txt", "--num-steps", "120", "--optim.lr", "0.01")
    assert summary["last"]["loss"] < 0.6
    events = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [event["samples"] for event in events if event["event"] == "eval"] == [(len(LINE) * 10 - 1) // 16]


def test_a_resume_on_another_text_is_refused(config) -> None:
    folder = config.text.parent
    run(folder, "--text", "text.txt", "--num-steps", "2")
    environment = json.loads((folder / "run" / "environment.json").read_text())
    assert environment["data"] == gpt.build_dataset(replace(config, context_length=32), "train").fingerprint
    config.text.write_text((LINE * 100).upper())
    argv = [*SMALL, "--text", "text.txt", "--num-steps", "4", "--run-dir", "run"]
    (ended,) = run_recipe_cli(argv, folder, recipe=ROOT / "recipes" / "gpt.py")
    assert ended.returncode == 2
    assert "was trained on different data" in ended.stderr


def test_debug_mode_finds_nothing_wrong(config) -> None:
    argv = [*SMALL, "--text", "text.txt", "--debug"]
    (ended,) = run_recipe_cli(argv, config.text.parent, recipe=ROOT / "recipes" / "gpt.py")
    assert ended.returncode == 0, ended.stderr
    assert "3 steps" in ended.stdout


@pytest.mark.distributed
def test_two_ranks_reach_the_loss_of_one(config) -> None:
    folder = config.text.parent
    argv = ["--text", str(folder / "text.txt"), "--precision", "fp32", "--num-steps", "10"]
    losses = []
    for world_size in (1, 2):
        (folder / str(world_size)).mkdir()
        losses.append(run(folder / str(world_size), *argv, world_size=world_size)["last"]["loss"])
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
