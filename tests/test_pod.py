"""benchmarks/pod.py: its tables are README.md's, a slow reading is named with its cause, and the projection is near a
measured step."""
import os
import re
import sys
import time

import pod
import pytest
import timing
import torch
from conftest import REPOSITORY, environment, run_process
from pod import READINGS, reference, shortfalls, worst_of

import train_gpt
from train_gpt import UserError

README = (REPOSITORY / "README.md").read_text()
SMALL = dict(NUM_LAYERS=2, MODEL_DIM=32, NUM_HEADS=2, NUM_KV_HEADS=1, TRAIN_SEQ_LEN=32, TRAIN_BATCH_TOKENS=2048,
             MICRO_BATCH_TOKENS=64, EVAL_STRIDE=8, TTT_CHUNK_TOKENS=64, COMPUTE_DTYPE="float32", DEVICE="cpu",
             COMPILE=0, OMP_NUM_THREADS=1)
GOOD = {"matrix products, large square": 720.0, "memory bandwidth": 2570.0, "all-reduce, gradient": 240.0,
        "all-reduce, one number": 30.0, "attention": "fa3", "throttling": "none", "other processes on the GPU": 0.0,
        "power limit": 700.0, "step": 115.5}
TABLE = "| reading on a GPU | 1 rank | 8 ranks | from |\n|---|---|---|---|\n"


@pytest.fixture
def small(monkeypatch):
    """A run of SMALL, with 32 micro-batches in a step."""
    monkeypatch.setattr(os, "environ", environment(SMALL))
    return timing.make_run({})


# ---- README.md's tables


@pytest.mark.parametrize("kind, ranks, on_gpus_only", [
    ("CPU", (1, 2), {"other processes on the GPU", "power limit", "SM clock under load", "throttling"}),
    ("GPU", (1, 8), set())])
def test_the_tables_have_a_row_for_every_reading_and_no_other(kind, ranks, on_gpus_only):
    table = README.partition(f"| reading on a {kind} |")[2].partition("\n\n")[0]
    assert re.findall(r"^\| ([^|-][^|]*) \|", table, re.MULTILINE) == [n for n in READINGS if n not in on_gpus_only]
    for count in ranks:
        assert set(reference(README, kind, count)) <= set(READINGS)
    assert reference(README, kind, ranks[1])["step"] > 0


def test_values_are_parsed_and_unknown_ones_left_out():
    rows = "| step | - | 115.5 | x |\n| memory bandwidth | 2,570 | - | |\n| attention | fa3 | fa3 | |\n"
    assert reference(TABLE + rows + "\n| more | 1 |", "GPU", 8) == {"step": 115.5, "attention": "fa3"}
    assert reference(TABLE + rows, "GPU", 1) == {"memory bandwidth": 2570.0, "attention": "fa3"}


def test_another_number_of_gpus_is_compared_in_what_each_has_by_itself():
    rows = "| step | 800 | 115.5 | |\n| memory bandwidth | 2,570 | 2,570 | |\n"
    assert reference(TABLE + rows, "GPU", 4) == {"memory bandwidth": 2570.0}
    assert reference(README, "CPU", 3) == {}


@pytest.mark.parametrize("readme, message", [
    ("nothing", "README.md has no table '| reading on a GPU |'"),
    (TABLE + "| speed | 1 | 1 | |\n", "speed | 1.0: no reading has this name"),
    (TABLE + "| step | 1 | 115 ms | |\n", "step | 115 ms: no reading has this name, or the value is neither")])
def test_a_table_that_cannot_be_read_is_an_error_in_one_line(readme, message):
    with pytest.raises(UserError) as caught:
        reference(readme, "GPU", 8)
    assert message in str(caught.value) and "\n" not in str(caught.value)


# ---- Complaints


def complaints(*ranks: dict, kind: str = "GPU") -> tuple[list[str], bool]:
    return shortfalls(worst_of(list(ranks), GOOD), GOOD, kind, len(ranks))


def test_readings_as_good_or_better_or_up_to_a_tenth_worse_give_no_line():
    assert complaints(GOOD) == ([], False)
    assert complaints(GOOD | {"step": 80.0, "memory bandwidth": 4000.0, "power limit": 701.0}) == ([], False)
    assert complaints(GOOD | {"step": 127.0, "memory bandwidth": 2320.0}) == ([], False)
    assert complaints({"attention": "fa3"}) == ([], False)  # the others not measured


@pytest.mark.parametrize("name, value, share, cause, decisive", [
    ("matrix products, large square", 500.0, "69%", "power cap", True),
    ("matrix products, large square", 520.0, "72%", "H100 PCIe", False),
    ("memory bandwidth", 1700.0, "66%", "HBM2e", True),
    ("all-reduce, gradient", 20.0, "8%", "NCCL_P2P_DISABLE", True),
    ("all-reduce, one number", 60.0, "50%", "NVLink", False),  # lower is better
    ("step", 150.0, "77%", "COMPILE", False),
    ("step", 170.0, "68%", "COMPILE", True),
    ("attention", "cudnn", "0%", "FlashAttention 3", False),
    ("other processes on the GPU", 1.0, "0%", "another tenant", False),
    ("power limit", 350.0, "50%", "provider's power cap", False),
    ("throttling", "heat (hardware)", "0%", "cooling", False)])
def test_a_worse_reading_is_named_with_share_and_cause(name, value, share, cause, decisive):
    (line,), bad = complaints(GOOD | {name: value})
    assert line.startswith(f"  {name}: ") and f"({share}); usually " in line and cause in line
    assert " on rank" not in line  # there is one
    assert bad == decisive


def test_the_slowest_rank_is_the_one_shown():
    ranks = [dict(GOOD) for _ in range(8)]
    ranks[3] |= {"memory bandwidth": 1000.0, "throttling": "power brake"}
    ranks[6] |= {"all-reduce, one number": 99.0, "memory bandwidth": 2000.0}
    lines, bad = complaints(*ranks)
    assert [re.search(r"^  (.*): .* on rank (\d)", line).groups() for line in lines] == [
        ("memory bandwidth", "3"), ("all-reduce, one number", "6"), ("throttling", "3")] and bad


def test_a_cpu_has_causes_of_its_own():
    (line,), _ = complaints(GOOD | {"matrix products, large square": 1.0}, kind="CPU")
    assert "OMP_NUM_THREADS" in line and "PCIe" not in line


# ---- Measurements


def test_the_projection_is_near_a_measured_step(small):
    """4 of the 32 micro-batches are timed: without the others it would be an eighth."""
    found = pod.measure_step(small)
    stream = train_gpt.TokenStream(small.config, "train")
    optimizers = train_gpt.build_optimizers(small.model, small.config, small.dist)

    def step() -> None:
        train_gpt.train_step(small, list(stream.micro_batches(0, small.dist)), optimizers, 1.0, 0.9)

    measured_ms = 1000 * min(timing.seconds_of(step, small.dist.device) for _ in range(5))
    assert measured_ms / 2.5 < found["step"] < 2.5 * measured_ms
    assert found["step"] == pytest.approx(32 * found["micro-batch"] + found["all-reduce, clipping, optimiser"])
    need = 2048 / (found["step"] / 1000)
    assert found["loader, times what a step needs"] == pytest.approx(1e6 * found["loader"] / need)


def test_seconds_are_the_median_after_a_warm_up():
    pauses = iter([0.3, 0.02, 0.3, 0.02])  # the first to warm up; the budget allows no more than the least, three
    seconds = pod.median_seconds(lambda: time.sleep(next(pauses)), train_gpt.Dist(), budget_s=0.0)
    assert 0.02 <= seconds < 0.2 and next(pauses, None) is None


def test_cores_are_those_of_the_quota_and_busy_ones_are_not_idle(monkeypatch):
    cores = len(os.sched_getaffinity(0))
    for text, expected in (("max 100000", cores), ("50000 100000", 0.5), ("9999900000 100000", cores)):
        monkeypatch.setattr(pod.Path, "read_text", lambda self, text=text: text)
        assert pod.host_cores() == expected
    tick = iter([10, 20])

    def stat(self):
        """One core busy, one for a quarter, and half of the time waiting for a disk, one that is not ours."""
        t = next(tick)
        return f"cpu  9 9 9\ncpu0 {t} 0 0 0 0 0 0 0 0 0\ncpu1 0 0 {t} {t} {2 * t} 0 0 0\ncpu2 {t} 0 0 {t} 0 0 0 0\n"

    monkeypatch.setattr(pod.Path, "read_text", stat)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1})
    assert pod.idle_cores(0.0) == 0.75


def test_what_nvidia_smi_says_is_read_and_what_it_does_not_say_left_out(monkeypatch, tmp_path):
    assert pod.nvidia_smi("--query-gpu=power.limit") == [] or torch.cuda.is_available()
    program = tmp_path / "nvidia-smi"
    program.write_text('#!/bin/sh\ncase "$*" in *power.limit*) echo "[N/A], 1755";;\n'
                       '*throttle_reasons*) echo 0x00000000000000C4;; *) exit 2;; esac\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert pod.gpu_conditions("GPU-1") == {"SM clock under load": 1755.0,
                                           "throttling": "heat (hardware) and power brake"}


# ---- The tool


def test_two_ranks_measure_what_is_between_them(tmp_path):
    done = run_process(tmp_path, SMALL, ranks=2, script=REPOSITORY / "benchmarks/pod.py")
    rows = dict(re.findall(r"^([a-z][\w ,'-]+?) {2,}(\S.*?) {2,}.* rank [01]$", done.output, re.MULTILINE))
    alone = {"other processes on the GPU", "power limit", "SM clock under load", "throttling"}
    assert set(rows) == set(READINGS) - alone, done.output
    assert float(rows["all-reduce, gradient"].split()[0]) > 0 and rows["attention"] == "products"
    projection = r"^16 x [\d.,]+ \+ [\d.,]+ ms: [\d.,]+ ms/step, [\d,]+ steps in 600 s; reference unknown$"
    assert re.search(projection, done.output, re.MULTILINE)
    assert "not compared: what depends on NUM_LAYERS, MODEL_DIM, " in done.output
    assert done.code == ("exit status 1" in done.output)  # this machine may be slower than the reference


def test_a_reference_twice_as_good_is_a_complaint_and_exit_status_1(small, monkeypatch, capsys, tmp_path):
    measured = {"matrix products, large square": 0.1, "memory bandwidth": 40.0}
    monkeypatch.setattr(pod, "measure_device", lambda run: measured)
    monkeypatch.setattr(pod, "idle_cores", lambda: 2.0)
    monkeypatch.setattr(pod, "REPOSITORY", tmp_path)
    monkeypatch.setattr(sys, "argv", ["pod.py"])
    for factor, status in ((1, 0), (2, 1)):
        table = TABLE.replace("GPU", "CPU") + f"| memory bandwidth | {factor * 40} | - | |\n"
        (tmp_path / "README.md").write_text(table)
        assert pod.main() == status
    good, bad = capsys.readouterr().out.split("1 rank, ")[1:]
    assert "no reading below 90 % of the reference, 1 of" in good
    assert "\n  memory bandwidth: 40.0 GB/s, reference 80.0 GB/s (50%); usually other processes, " in bad


@pytest.mark.parametrize("settings, message", [
    (dict(DEVICE="tpu"), "DEVICE=tpu: must be one of"),
    (dict(TRAIN_BATCH_TOKENS="100"), "TRAIN_BATCH_TOKENS=100: must be a multiple")])
def test_bad_settings_are_an_error_in_one_line(monkeypatch, settings, message):
    monkeypatch.setattr(os, "environ", environment(SMALL | settings))
    monkeypatch.setattr(sys, "argv", ["pod.py"])
    with pytest.raises(UserError, match=message):
        pod.main()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_gpu_gives_every_reading_of_one_rank(tmp_path):
    settings = {name: value for name, value in SMALL.items() if name not in ("DEVICE", "COMPUTE_DTYPE")}
    done = run_process(tmp_path, settings, script=REPOSITORY / "benchmarks/pod.py")
    for name in ("matrix products, large square", "memory bandwidth", "free memory", "attention", "step"):
        assert re.search(rf"^{name}  ", done.output, re.MULTILINE), done.output
