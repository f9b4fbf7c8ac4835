"""`distkit drill`: passes where a recipe survives, and names what does not hold where it does not."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support.harness import ROOT
from support.launching import environment, marked, started

from distkit.commands import run
from distkit.commands.drill.cases import ALL, DEFAULT, PHASES, Case, Landmarks, parse_cases
from distkit.commands.drill.report import as_text, codes, what_to_do
from distkit.commands.drill.scheduler import UNDISTURBED, Drill, Outcome
from distkit.commands.trial import Ended, events
from distkit.errors import ConfigError

TINY = ROOT / "tests" / "support" / "tiny.py"
#: A recipe on top of the tiny one: what it does besides is told by its first argument.
OWN = """
import os
import sys
import time
from dataclasses import replace

sys.path.insert(0, {tests!r})
from support import tiny
from distkit import Recipe, main

{setting}


def compute_loss(config, model, batch):
    output = tiny.compute_loss(config, model, batch)
    {change}
    return output


def build_dataset(config, split):
    return tiny.build_dataset(config, split) if split == "train" or {tested} else None


recipe = Recipe("own", tiny.TinyConfig, tiny.build_model, build_dataset, compute_loss, presets={{"default": tiny.BASE}})
if __name__ == "__main__":
    main(recipe)
"""
COUNTER = {"setting": "calls = [0]", "change": "calls[0] += model.training; output = replace(output, "
           "loss=output.loss * (1 + calls[0] / 100))"}  # fmt: skip


def write_recipe(folder: Path, setting: str = "", change: str = "pass", tested: bool = True) -> str:
    recipe = folder / "own.py"
    recipe.write_text(OWN.format(tests=str(ROOT / "tests"), setting=setting, change=change, tested=tested))
    return str(recipe)


#: No run at all, but what a run leaves. Its last flags say how the disturbed attempt ends (exit code and state), and
#: how the next ones do.
STUB = """
import json, os, sys, time
from pathlib import Path

code, state, again = sys.argv[-5:-2]
run = Path(sys.argv[-1])
run.mkdir(exist_ok=True)
if again == "gpu" and "cpu" not in sys.argv:
    print("this machine shows 0 CUDA devices, and 2 of its processes want one", file=sys.stderr)
    sys.exit(2)
if again == "sleep":
    time.sleep(100)
if os.environ["DISTKIT_FAULT"]:
    (run / "status.json").write_text(json.dumps({"state": state, "step": 5}))
    sys.exit(int(code))
if run.name == "undisturbed" or again in ("0", "gpu"):
    lines = [{"event": "checkpoint", "step": 4}, *({"event": "train", "step": step} for step in range(13))]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + chr(10) for line in lines))
    (run / "summary.json").write_text(json.dumps({"state_digest": "the same"}))
    sys.exit(0)
print("no luck")
sys.exit(int(again))
"""


def left_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where temporary directories are made."""
    folder = tmp_path / "tmp"
    folder.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    return folder


@pytest.mark.distributed
def test_a_recipe_that_survives(temporary: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = tmp_path / "report.json"
    argv = ["drill", str(TINY), "--cases", "kill:save:1", "--json", str(report)]
    assert run([*argv, "--", "--dropout", "0.1", "--noise", "0.1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[2].split() == ["case", "rank", "step", "ended", "lost", "resumed"]
    row = lines[3].split()
    assert row[:8] == ["kill:save", "1", "6", "1", "SIGKILL,", "failed", "2", "steps,"]
    assert row[-4:] == ["same", "bits,", "same", "metrics"]
    assert lines[-1].startswith("1 of 1 cases")
    said = json.loads(report.read_text())
    assert (said["holds"], said["steps"], said["nproc"], said["left_out"]) == (True, 12, 2, [])
    (case,) = said["cases"]
    assert (case["case"], case["codes"], case["starts"], case["holds"]) == ("kill:save", [1, -9], 2, True)
    assert left_in(temporary) == []


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.timeout(600)
def test_each_signal_and_each_phase(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "runs"
    argv = ["drill", str(TINY), "--json", str(tmp_path / "report.json"), "--dir", str(folder)]
    code = run([*argv, "--", "--dropout", "0.1", "--noise", "0.1", "--ema-decay", "0.9"])
    assert code == 0, capsys.readouterr().out
    said = json.loads((tmp_path / "report.json").read_text())
    assert tuple(case["case"] for case in said["cases"]) == DEFAULT
    kills = [case["case"].startswith("kill") for case in said["cases"]]
    assert [case["steps_lost"] > 0 for case in said["cases"]] == kills
    assert [case["state"] for case in said["cases"]] == ["failed" if kill else "preempted" for kill in kills]
    assert {case["starts"] for case in said["cases"]} == {2}
    assert (folder / "stop-file" / "status.json").exists()


@pytest.mark.slow
@pytest.mark.distributed
def test_a_counter_outside_of_the_state_is_found(
    temporary: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["drill", write_recipe(tmp_path, **COUNTER), "--cases", "kill:step,kill:start-up"]) == 1
    out = capsys.readouterr().out
    assert "kill:step: step 9: the first metric line that differs (train)" in out
    assert "kill:start-up: " not in out  # there was nothing to count yet
    assert "1 of 2 cases" in out
    assert f"distkit verify-resume {tmp_path / 'own.py'} --nproc 2" in out
    (kept,) = temporary.iterdir()
    assert f"kept: {kept}" in out
    assert "kill-step-rank0" in left_in(kept)
    assert "kill-start-up-rank1" not in left_in(kept)


@pytest.mark.slow
@pytest.mark.distributed
def test_a_recipe_that_differs_by_itself_is_told_apart(
    temporary: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = write_recipe(tmp_path, change="output = replace(output, loss=output.loss * (1 + time.time() % 1))")
    assert run(["drill", recipe, "--nproc", "1", "--cases", "term:step"]) == 1
    out = capsys.readouterr().out
    assert "two undisturbed runs differ as well" in out
    assert "verify-resume" not in out


@pytest.mark.slow
@pytest.mark.distributed
def test_what_hangs_is_ended_and_said(temporary: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = write_recipe(tmp_path, change="time.sleep(600 if os.environ['DISTKIT_FAULT'] and model.training else 0)")
    argv = ["drill", recipe, "--nproc", "1", "--cases", "term:data", "--timeout-seconds", "20"]
    assert run(argv) == 1
    out = capsys.readouterr().out
    assert "term:data: hung: ranks [0] still ran after 20 s" in out
    assert "killed after --timeout-seconds" in out


@pytest.mark.slow
@pytest.mark.distributed
def test_what_ignores_a_stop_and_has_no_test_set(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    setting = "import signal\nfor name in ('TERM', 'INT'): signal.signal(getattr(signal, 'SIG' + name), signal.SIG_IGN)"
    recipe = write_recipe(tmp_path, setting=setting, tested=False)
    argv = ["drill", recipe, "--nproc", "1", "--cases", "term:step,int:evaluation", "--dir", str(tmp_path / "kept")]
    assert run(argv) == 1
    out = capsys.readouterr().out
    assert "term:step: went on to the end, as if nothing had happened in step 8" in out
    assert "int:evaluation is left out: the run has no evaluation" in out


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
@pytest.mark.parametrize("ready", [True, False])
def test_an_interrupted_drill_leaves_nothing(tmp_path: Path, number: signal.Signals, ready: bool) -> None:
    (tmp_path / "tmp").mkdir()
    env = environment({"TMPDIR": str(tmp_path / "tmp"), "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"})
    (tmp_path / "stub.py").write_text(STUB)
    command = [sys.executable, "-m", "distkit", "drill", "stub.py", "--", "75", "preempted", "sleep"]
    temporary = tmp_path / "tmp"
    with started(command, tmp_path, env, tmp_path / "run") as process:
        deadline = time.monotonic() + 60
        # when both ranks sleep; or when the first of them is being started
        while (len(marked(env["DISTKIT_TEST_MARK"])) < 3) if ready else not list(temporary.glob("*/*.log")):
            assert time.monotonic() < deadline
            assert process.poll() is None
        process.send_signal(number)
        code = process.wait(20)
    if number == signal.SIGKILL:
        assert code == -signal.SIGKILL
        return
    assert code == 128 + signal.SIGINT
    assert (tmp_path / "run.err").read_text().endswith("distkit: interrupted\n")
    assert left_in(temporary) == []


@pytest.mark.parametrize(("ending", "case", "code", "words"), [
    (["75", "preempted", "0"], "term:step", 0, "75, preempted"),
    (["1", "failed", "0"], "term:step", 1, "term:step: ended with exit codes 1, 1, and not with 75"),
    (["75", "running", "0"], "term:step", 1, 'term:step: status.json says "running", and not "preempted"'),
    (["1", "preempted", "0"], "kill:step", 1, 'kill:step: status.json says "preempted", and not "failed"'),
    (["75", "preempted", "9"], "term:step", 1, "term:step: not done after 4 starts: no luck"),
    (["0", "completed", "0"], "kill:step", 1, "kill:step: went on to the end, as if nothing had happened in step"),
])  # fmt: skip
def test_what_does_not_hold_is_said(
    ending: list[str], case: str, code: int, words: str, temporary: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    (tmp_path / "stub.py").write_text(STUB)
    assert run(["drill", str(tmp_path / "stub.py"), "--cases", case, "--", *ending]) == code
    out = capsys.readouterr().out
    assert words in out
    assert ("kept: " in out) == bool(code) == bool(left_in(temporary))


def test_fewer_gpus_than_ranks_are_no_reason_to_give_up(
    temporary: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "stub.py"
    recipe.write_text(STUB)
    assert run(["drill", str(recipe), "--cases", "term:step", "--", "75", "preempted", "gpu"]) == 0
    assert "on the CPU: this machine has fewer GPUs than ranks" in capsys.readouterr().out
    # what the user says counts
    argv = ["drill", str(recipe), "--cases", "term:step", "--", "--device", "cuda", "75", "preempted", "gpu"]
    assert run(argv) == 2
    assert "0 CUDA devices" in capsys.readouterr().err


@pytest.mark.parametrize(("argv", "words"), [
    (["nowhere.py"], "there is no recipe nowhere.py"),
    ([str(TINY), "--steps", "5"], "6 or more"),
    ([str(TINY), "--cases", "term:stap"], "--cases term:step"),
    ([str(TINY), "--cases", "term"], "SIGNAL:PHASE"),
    ([str(TINY), "--cases", "term:step:2"], "0 to 1"),
    ([str(TINY), "--cases", "kill:step:x"], "--cases kill:step:1"),
    ([str(TINY), "--cases", "kill:step", "--all"], "not allowed"),
    ([str(TINY), "--nproc", "0"], "--nproc"),
    ([str(TINY), "--timeout-seconds", "0"], "--timeout-seconds"),
    ([str(TINY), "--dir", "."], "a new directory"),
    ([str(TINY), "--json", "nowhere/report.json"], "--json report.json"),
    ([str(TINY), "--nproc", "1", "--", "--num-stepz", "3"], "--num-stepz"),
])  # fmt: skip
def test_bad_arguments(
    argv: list[str], words: str, temporary: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    assert run(["drill", *argv]) == 2
    told = capsys.readouterr().err
    assert words in told
    assert told.count("\n") < 10
    assert left_in(temporary) == []


def test_ranks_take_turns_unless_they_are_named() -> None:
    cases = parse_cases(["term:step", "kill:save", "hup:data:0", "usr1:step:1", "stop-file", "kill:save:1"], 2)
    assert [case.rank for case in cases] == [0, 1, 0, 1, 0]
    assert [case.name for case in cases][2:] == ["hup:data", "usr1:step", "stop-file"]
    assert len({case.folder for case in parse_cases(["kill:step:0", "kill:step:1", "kill:data:0"], 2)}) == 3
    assert len(ALL) == 5 * len(PHASES) + 1
    assert set(DEFAULT) < set(ALL)
    assert {case.phase for case in parse_cases(DEFAULT, 2)} == {*PHASES, ""}
    assert len({case.action for case in parse_cases(DEFAULT, 2)}) == 6
    with pytest.raises(ConfigError, match="0 to 2"):
        parse_cases(["term:step:3"], 3)


def test_a_case_comes_behind_the_first_save_and_before_the_end() -> None:
    landmarks = Landmarks(12, (6, 12), (4, 6, 8, 12))
    steps = {phase: landmarks.step_of(Case("kill", phase, 1)) for phase in PHASES}
    assert steps == {"start-up": 0, "data": 11, "step": 11, "evaluation": 6, "save": 6}
    assert landmarks.step_of(Case("stop-file", "", 0)) == 5
    # the only ones there are; none
    last = Landmarks(12, (), (12,))
    assert last.step_of(Case("term", "save", 0)) == 12
    assert last.step_of(Case("term", "evaluation", 0)) is None
    assert last.step_of(Case("term", "step", 0)) == 12
    assert Case("kill", "save", 1).fault(8) == "before_vote:1:8:kill"
    assert Case("term", "save", 1).fault(8) == "save:1:8:term"


def test_landmarks_are_read_from_the_metrics(tmp_path: Path) -> None:
    lines: list[dict[str, object]] = [
        {"event": "train", "step": 1}, {"event": "note", "step": 1, "message": ""}, {"event": "eval", "step": 2},
        {"event": "checkpoint", "step": 2}, {"event": "checkpoint", "step": 3, "error": "no"},
        {"event": "train", "step": 4}, {"event": "checkpoint", "step": 4},
    ]  # fmt: skip
    text = "".join(json.dumps(line) + "\n" for line in lines) + '{"event": "train", "st'
    (tmp_path / "metrics.jsonl").write_text(text)
    assert list(events(tmp_path)) == lines
    assert Landmarks.of(tmp_path) == Landmarks(4, [2], [2, 4])


def test_codes_are_said_once_where_they_are_the_same() -> None:
    assert codes([75, 75]) == "75"
    assert codes([1, -9]) == "1 SIGKILL"


def test_the_command_to_type_has_the_flags(tmp_path: Path) -> None:
    (tmp_path / UNDISTURBED).mkdir()
    (tmp_path / UNDISTURBED / "config.json").write_text('{"noise": 0.1}')
    drill = Drill(recipe=TINY, flags=["--noise", "0.1"], nproc=2, folder=tmp_path, num_steps=12, timeout_seconds=1,
                  on_cpu=True)  # fmt: skip
    outcome = Outcome(case=Case("kill", "step", 1), step=5, codes=(1, -9), failure="step 5: it differs", differs=True)
    advice = what_to_do(drill, [outcome], deterministic=True)
    assert f"  distkit verify-resume {TINY} --nproc 2 -- --noise 0.1 --device cpu" in advice
    text = as_text(drill, Ended([0, 0], 1.0, []), [outcome], [])
    assert "fewer GPUs than ranks" in text
    assert "kill:step: step 5: it differs" in text


def test_it_answers_without_torch() -> None:
    code = "import sys; from distkit.commands import run; run(['drill', '--help']); sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0
    assert "usage: distkit drill" in done.stdout
