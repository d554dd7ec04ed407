"""benchmarks/ablate.py: pairs of runs of the real script, in a fair order, going on where they were stopped."""
import json
import math
import os
import subprocess
import sys
import threading
import time

import ablate
import pytest
from conftest import TINY, environment
from scipy import stats


@pytest.fixture
def settings(dataset, monkeypatch):
    monkeypatch.setattr(os, "environ", environment(TINY | dataset))


def fake(calls: list, stop_after: int = 99):
    """run_once without the run; a better score for the larger learning rate, by another step in each seed."""
    def run(settings, seed, key, arm, jobs=1):
        if len(calls) == stop_after:
            raise KeyboardInterrupt
        calls.append((arm, seed))
        gain = dict(zip((1, 2, 3), (0.01, 0.02, 0.03)))[seed] if "0.5" in arm else 0.0
        return dict(key=key, arm=arm, seed=seed, val_bpb=2.0 - gain, after_swa=1.9, steps=100, artifact_bytes=1000)
    return run


def main(monkeypatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["ablate.py", *arguments])
    ablate.main()


def test_arms_take_turns_in_each_seed_and_stopped_runs_go_on(settings, monkeypatch, tmp_path, capsys):
    file, arms = str(tmp_path / "results.jsonl"), ["", "MATRIX_LR=0.5"]
    calls = []
    monkeypatch.setattr(ablate, "run_once", fake(calls, stop_after=4))
    with pytest.raises(KeyboardInterrupt):
        main(monkeypatch, *arms, "--seeds", "1", "2", "3", "--results", file)
    assert [seed for _, seed in calls] == [1, 1, 2, 2]
    with open(file, "a") as results:
        results.write('{"key": "cut sho')
    monkeypatch.setattr(ablate, "run_once", fake(calls))
    main(monkeypatch, *arms, "--seeds", "1", "2", "3", "--results", file)
    assert sorted(calls) == sorted((arm, seed) for arm in arms for seed in (1, 2, 3))  # none twice
    main(monkeypatch, *arms, "--seeds", "1", "2", "3", "--results", file)
    assert len(calls) == 6
    half = stats.t.ppf(0.975, 2) * 0.01 / math.sqrt(3)
    assert f"+0.0200 ± {half:.4f}" in capsys.readouterr().out


def test_the_order_in_a_seed_is_random(settings, monkeypatch, tmp_path):
    calls, arms = [], [f"MATRIX_LR=0.{i}" for i in range(1, 7)]
    monkeypatch.setattr(ablate, "run_once", fake(calls))
    main(monkeypatch, *arms, "--seeds", "1", "2", "3", "--results", str(tmp_path / "results.jsonl"))
    orders = {seed: [arm for arm, other in calls if other == seed] for seed in (1, 2, 3)}
    assert all(sorted(order) == arms for order in orders.values())
    assert orders[1] != orders[2] and arms not in orders.values()


def test_runs_at_once_share_the_cores_and_a_seed_ends_before_the_next(settings, monkeypatch, tmp_path):
    calls, together, file = [], threading.Barrier(2, timeout=60), tmp_path / "results.jsonl"

    def run(settings, seed, key, arm, jobs):
        together.wait()  # for good, were they not run at once
        return fake(calls)(settings, seed, key, arm, jobs)

    monkeypatch.setattr(ablate, "run_once", run)
    main(monkeypatch, "", "MATRIX_LR=0.5", "--seeds", "1", "2", "--results", str(file), "--jobs", "2")
    assert [seed for _, seed in calls] == [1, 1, 2, 2] and len(file.read_text().splitlines()) == 4


def test_after_a_failure_no_further_run_starts(settings, monkeypatch, tmp_path):
    calls = []

    def run(settings, seed, key, arm, jobs):
        calls.append(arm)
        if len(calls) > 1:  # a run that started before the first was seen to fail: there is time to cancel the rest
            time.sleep(1)
        raise SystemExit("error: as it must be")

    monkeypatch.setattr(ablate, "run_once", run)
    with pytest.raises(SystemExit, match="as it must be"):
        main(monkeypatch, *(f"SWA_EVERY={i}" for i in range(1, 9)), "--results", str(tmp_path / "results.jsonl"))
    assert len(calls) <= 2


def test_runs_at_once_get_their_share_of_the_cores(settings, monkeypatch):
    seen = []
    monkeypatch.setenv("OMP_NUM_THREADS", "3")

    def run(command, *, env, **options):
        seen.append(env.get("OMP_NUM_THREADS"))
        return subprocess.CompletedProcess(command, 1, "", "stopped here")

    monkeypatch.setattr(ablate.subprocess, "run", run)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    for jobs in (2, 8, 16, 1):
        with pytest.raises(SystemExit, match="stopped here"):
            ablate.run_once(ablate.shared_settings(), 1, "key", "", jobs)
    monkeypatch.delenv("OMP_NUM_THREADS")  # or the script would choose, for each arm
    with pytest.raises(SystemExit, match="stopped here"):
        ablate.run_once(ablate.shared_settings(), 1, "key", "", 1)
    assert seen == ["4", "1", "1", "3", "8"]
    with pytest.raises(SystemExit, match="--jobs 2 with 3 arms"):
        main(monkeypatch, "", "SEED=1", "SEED=2", "--results", "none", "--jobs", "2")


def test_settings_come_from_files(tmp_path):
    (tmp_path / "some.env").write_text("MATRIX_LR=0.5\nSWA_EVERY=3\n")
    assert ablate.settings_of(f"SEED=1 @{tmp_path}/some.env") == dict(SEED="1", MATRIX_LR="0.5", SWA_EVERY="3")
    with pytest.raises(SystemExit, match="error: @nowhere.env: No such file"):
        ablate.settings_of("@nowhere.env")


def test_a_run_is_the_same_if_settings_seed_and_script_are(settings):
    def key(arm: str = "", seed: int = 1, script: bytes = b"script", jobs: int = 1) -> str:
        return ablate.key_of(ablate.shared_settings() | ablate.settings_of(arm), seed, script, jobs)

    assert key() == key("RUN_ID=other") == key(f"MATRIX_LR={0.02}")  # the default, said
    assert len({key(), key("MATRIX_LR=0.03"), key(seed=2), key(script=b"other"), key(jobs=2)}) == 5


def test_one_difference_has_no_interval():
    assert ablate.interval([0.01]) == (0.01, math.inf)


def test_what_is_no_setting_is_one_line():
    with pytest.raises(SystemExit, match="error: faster: an arm is NAME=value"):
        ablate.settings_of("MATRIX_LR=1 faster")


def test_a_run_is_the_script_as_it_is(settings, monkeypatch, tmp_path, capsys):
    file = tmp_path / "results.jsonl"
    main(monkeypatch, "ITERATIONS=3", "--seeds", "7", "--results", str(file))
    (run,) = map(json.loads, file.read_text().splitlines())
    assert run["seed"] == 7 and run["steps"] == 3 and run["settings"] == {"ITERATIONS": "3"}
    assert 1 < run["val_bpb"] < 10 and abs(run["after_swa"] - run["val_bpb"]) < 1 and run["machine"]
    assert f"{run['val_bpb']:.4f}" in capsys.readouterr().out
