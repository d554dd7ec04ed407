"""What takes too long for `make test`: run with `make soak`.

Killed at 20 random moments, inside eight checkpoints' writing, in quantisation and evaluation, and resumed: each time the
same bits. Ranks that hang or are frozen, restarts in a row. `make soak` then feeds every loader 100,000 hostile files
(tests/test_hostile.py).
"""
import json
import random
import re
import signal
import subprocess
import sys
import time

import pytest
from conftest import REPOSITORY, environment
from test_reliability import FAULTS, SAVING, outcome, processes_of, run_with

pytestmark = pytest.mark.soak
# Longer stages than SAVING's, so that random moments fall into all of them, the artifact too.
LONGER = dict(ITERATIONS=150, VAL_LOSS_EVERY=50, MODEL_DIM=64, TTT_CHUNK_TOKENS=64, TRAIN_LOG_EVERY=10, RUN_ID="run",
              VAL_NLL_PATH="logs/run/nats.npy")
KILLS = 20


def start(folder, settings: dict) -> subprocess.Popen:
    (folder / "logs/run").mkdir(parents=True, exist_ok=True)
    return subprocess.Popen([sys.executable, "-u", str(REPOSITORY / FAULTS)], cwd=folder, text=True,
                            env=environment(SAVING | LONGER | settings), stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT)


def test_killed_at_random_moments_again_and_again(dataset, tmp_path):
    """One uninterrupted run is the reference; another one is killed, resumed, killed ... until it ends by itself, and
    this over and over until there were enough kills: each ending must be the reference's, bit for bit."""
    (tmp_path / "whole").mkdir()
    process = start(tmp_path / "whole", dataset)
    begin, lines = time.monotonic(), []
    for line in process.stdout:
        lines.append((time.monotonic() - begin, line))
    assert process.wait() == 0, "".join(line for _, line in lines)
    expected, (first,) = outcome(tmp_path / "whole/logs/run"), [t for t, line in lines if line.startswith("step:1/")]
    seconds = lines[-1][0] - first
    kills, endings, stages, rng = 0, 0, {}, random.Random(0)
    while kills < KILLS:
        folder = tmp_path / f"run{endings}"
        folder.mkdir()
        code, settings = 1, dataset
        while code:
            process = start(folder, settings)
            output = ""
            for line in process.stdout:
                output += line
                if re.match("warm-up done", line):
                    break
            delay = rng.uniform(0, 1.2 * seconds)
            try:
                output += process.communicate(timeout=delay)[0]
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGKILL)
                output += process.communicate()[0]
            code = process.returncode
            assert code in (0, -signal.SIGKILL), output
            if code:
                kills += 1
                last = [line for line in output.splitlines() if ":" in line][-1]
                stage = ("evaluation" if "eval_chunk" in last else "training" if "step:" in last else
                         "artifact" if re.match("weights_sha256 after training|moments|swa", last) else "start, end")
                stages[stage] = stages.get(stage, 0) + 1
            settings = dataset | dict(RESUME="auto")
        assert outcome(folder / "logs/run") == expected
        endings += 1
    print(json.dumps(dict(kills=kills, runs=endings, by_stage=stages)))


@pytest.mark.parametrize("place", range(8))
def test_killed_while_a_checkpoint_is_written(dataset, tmp_path, place):
    """At the fsync of eight different checkpoints, of training and evaluation."""
    whole = run_with(tmp_path, dataset | dict(RUN_ID="whole"))
    killed = run_with(tmp_path, dataset, f"write {1 + 2 * place} kill")
    assert killed.code == -signal.SIGKILL and (killed.folder / "checkpoints/part").exists()
    resumed = run_with(tmp_path, dataset | dict(RESUME="auto" if place else ""))
    assert resumed.code == 0, resumed.output
    assert outcome(resumed.folder) == outcome(whole.folder)


@pytest.mark.parametrize("fault", [
    "quantize 3 kill", "quantize 15 kill", "score 7 kill", "score 20 kill", "adapt 9 kill"])
def test_killed_in_quantisation_and_evaluation(dataset, tmp_path, fault):
    whole = run_with(tmp_path, dataset | dict(RUN_ID="whole"))
    assert run_with(tmp_path, dataset, fault).code == -signal.SIGKILL
    resumed = run_with(tmp_path, dataset | dict(RESUME="auto"))
    assert resumed.code == 0, resumed.output
    assert outcome(resumed.folder) == outcome(whole.folder)


@pytest.mark.parametrize("fault", [
    "step 9 hang 1", "step 9 stop 1", "step 9 hang 0", "adapt 14 hang 1", "step 9 stop 0"])
def test_a_rank_that_hangs_or_is_frozen_ends_the_job_within_a_minute(dataset, tmp_path, fault):
    """However seldom torchrun looks (by itself 10 times a second): a peer that ended at once would be named instead."""
    mark = f"fault_mark_{time.time_ns()}"
    begin = time.monotonic()
    hung = run_with(tmp_path, dataset | dict(MARK=mark), fault, 2, "--monitor-interval=1.5")
    seconds, rank = time.monotonic() - begin, fault[-1]
    print(f"{fault}: ended after {seconds:.0f} s, start included")
    assert hung.code != 0 and seconds < 70, hung.output  # some 10 s of it are the start
    ending = hung.output[hung.output.rindex("Root Cause"):]
    if "hang" in fault:  # a frozen one cannot speak: its peer does
        assert re.search(rf"rank\s*: {rank} ", ending), hung.output
        assert "in sleep" in hung.output or "faults.py" in hung.output
    assert not processes_of(mark)
    resumed = run_with(tmp_path, dataset | dict(RESUME="auto"), ranks=2)
    assert resumed.code == 0, resumed.output


@pytest.mark.parametrize("fault", [
    "read 1 hang 1", "step 1 hang 1", "gather 3 hang 1", "step 2 hang 0", "score 6 hang 1", "quantize 3 hang 1",
    "quantize 3 stop 0"])
def test_a_rank_that_hangs_where_nothing_is_expected_ends_the_job_within_a_minute(dataset, tmp_path, fault):
    """In the start, the warm-up, validation, and while the artifact is made: those who wait for it end, rank 0 says for
    whom it waited, and torchrun ends the rest."""
    mark = f"fault_mark_{time.time_ns()}"
    begin = time.monotonic()
    hung = run_with(tmp_path, dataset | dict(MARK=mark), fault, ranks=2)
    seconds = time.monotonic() - begin
    print(f"{fault}: ended after {seconds:.0f} s, start included")
    assert hung.code != 0 and seconds < 70, hung.output  # some 10 s of it are the start
    ending = hung.output[hung.output.rindex("Root Cause"):]
    if fault[-1] == "1":
        assert "Ranks 1 failed to pass monitoredBarrier" in ending, hung.output
    else:  # then nobody counts; those who wait for rank 0 show that they do
        assert "in meet" in hung.output and re.search(r"rank\s*: 1 ", ending), hung.output
    if fault[:4] in ("read", "step", "gath"):  # after the warm-up SIGTERM is for checkpoints
        assert "faults.py" in hung.output and "in wrapped" in hung.output  # where the other one hung
    assert not processes_of(mark)


def test_of_four_ranks_the_one_that_hangs_is_named(dataset, tmp_path):
    """The others lose their connections when rank 0 ends, and must not be quicker than it."""
    hung = run_with(tmp_path, dataset, "step 1 hang 3", ranks=4)
    assert hung.code != 0 and "Ranks 3 failed to pass monitoredBarrier" in hung.output[hung.output.rindex("Root Cause"):]


@pytest.mark.parametrize("fault", ["write 4 pause 0", "write 11 pause 0", "write 14 pause 0"])
def test_a_slow_disk_ends_nobody(dataset, tmp_path, fault):
    """In training, after it, in the evaluation: 40 s, longer than ranks wait for each other."""
    whole = run_with(tmp_path, dataset | dict(RUN_ID="whole"), ranks=2)
    slow = run_with(tmp_path, dataset, fault, ranks=2)
    assert slow.code == 0, slow.output
    assert outcome(slow.folder) == outcome(whole.folder)


def test_restarts_resume_again_and_again(dataset, tmp_path):
    """Gloo once read the addresses of the dead: 8 restarts in a row, and all of them must find each other."""
    for attempt in range(8):
        run = run_with(tmp_path, dataset | dict(RUN_ID=f"r{attempt}"), "step 9 fail 1", 2, "--max-restarts=1")
        assert run.code == 0, run.output
