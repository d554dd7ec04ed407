"""Is this machine any good? In seconds: what decides the time of a step, beside the reference tables of README.md.

    torchrun --standalone --nproc_per_node=8 benchmarks/pod.py        the record configuration on 8 GPUs
    python benchmarks/pod.py                                          one GPU, or a CPU
    DEVICE=cpu torchrun --standalone --nproc_per_node=2 benchmarks/pod.py
    MODEL_DIM=256 NUM_HEADS=8 python benchmarks/pod.py                any setting of train_gpt.py

Without settings: the record model with 98,304 tokens a rank on GPUs, a small one on a CPU (timing.py), there not
compiled. Of each reading the slowest rank is shown, since the others wait for it. What is more than 10 % worse than
the reference gets a line with its usual cause. Exit status 1 if something that decides the step time (matrix products,
memory, all-reduce, the step itself, a loader that cannot keep up) is below 70 % of the reference, otherwise 0;
torchrun adds that a process failed. With other settings than the reference's, what depends on them is measured and not
compared.
"""
import argparse
import importlib.util
import itertools
import math
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import timing
import torch
import torch.nn.functional as F
from timing import REPOSITORY, train_gpt
from torch import distributed

TOLERATED, DECISIVE = 0.9, 0.7  # shares of the reference: below the one a line, below the other exit status 1
MOST_MICRO_BATCHES = 4  # of a step are timed, the rest is projected
STEP_SETTINGS = """vocab_size num_layers model_dim num_heads num_kv_heads mlp_mult bigram_vocab_size bigram_dim
    train_seq_len train_batch_tokens muon_backend_steps compute_dtype attention compile micro_batch_tokens
    deterministic""".split()  # those that change the time of a step
TEXTS = ("attention", "throttling")  # readings that are as the reference or not
# Bits of nvidia-smi's reasons for a lower clock. A busy H100 also gives its power limit (4), be that the full 700 W.
THROTTLING = {0x08: "hardware slowdown", 0x20: "heat (driver)", 0x40: "heat (hardware)", 0x80: "power brake"}
Values = dict[str, float | str]


@dataclass(frozen=True)
class Reading:
    unit: str
    digits: int
    gpu: str  # the usual cause of a worse value, on GPUs
    cpu: str = ""
    lower: bool = False  # is better
    decisive: bool = False  # for the time of a step
    own: bool = False  # the machine's: other settings, and other numbers of GPUs, leave it as it is


BUSY = "other processes, a container's quota, or fewer threads (OMP_NUM_THREADS)"
QUOTA = "a container's quota (cpu.max) or taskset"
DISK = "a network file system under DATA_PATH (copy the shards to a local disk), or too few cores"
READINGS = {  # README.md's tables have these names
    "matrix products, large square": Reading(
        "TFLOP/s", 3, "a power cap, heat, another tenant, or another card (H100 PCIe)",
        BUSY + ", or a CPU without bf16", decisive=True, own=True),
    "matrix products, model's shapes": Reading(
        "TFLOP/s", 3, "as for the large square; if that is good, an old torch or cuBLAS", BUSY, decisive=True),
    "memory bandwidth": Reading(
        "GB/s", 1, "HBM2e (H100 PCIe, A100), MIG, or another tenant", BUSY, decisive=True, own=True),
    "all-reduce, gradient": Reading(
        "GB/s", 2, "no NVLink or NVSwitch, NCCL over PCIe or sockets (NCCL_P2P_DISABLE, NCCL_SHM_DISABLE), or MIG",
        BUSY + ", or a network between the ranks", decisive=True),
    "all-reduce, one number": Reading("us", 0, "no NVLink, a busy host, or ranks on several hosts", BUSY, lower=True),
    "host cores a rank": Reading("", 1, QUOTA, QUOTA, own=True),
    "idle host cores": Reading("", 1, "other processes on the host", "other processes: see top", own=True),
    "loader": Reading("Mtokens/s", 1, DISK, DISK),
    "loader, times what a step needs": Reading("", 0, DISK, DISK, decisive=True),
    "attention": Reading("", 0, "FlashAttention 3 (flash_attn_interface) missing or failing", "an older torch"),
    "free memory": Reading("GB", 1, "another tenant, MIG, or a smaller card", "other processes: see top", own=True),
    "other processes on the GPU": Reading(
        "", 0, "another tenant, or a run left over: see nvidia-smi", lower=True, own=True),
    "power limit": Reading("W", 0, "the provider's power cap, or another card", own=True),
    "SM clock under load": Reading("MHz", 0, "a power cap, heat, or locked clocks", own=True),
    "throttling": Reading("", 0, "the host's cooling or power supply: take another pod", own=True),
    "micro-batch": Reading("ms", 1, "as for matrix products, memory, attention", BUSY, lower=True),
    "all-reduce, clipping, optimiser": Reading("ms", 1, "as for all-reduce, or a busy host", BUSY, lower=True),
    "step": Reading("ms", 1, "what else is listed; if nothing is, COMPILE or the versions of torch and CUDA",
                    "what else is listed; if nothing is, " + BUSY, lower=True, decisive=True),
}

# ---- What the host and nvidia-smi say


def host_cores() -> float:
    """Cores this process may use: affinity, and the container's quota."""
    cores = len(os.sched_getaffinity(0))
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
    except OSError:
        return cores
    return cores if quota == "max" else min(cores, int(quota) / int(period))


def idle_cores(seconds: float = 0.5) -> float:
    """Of the cores this process may use, those that nobody uses while it sleeps: unlike the load average, this leaves
    out what it did before."""
    mine = {f"cpu{index}" for index in os.sched_getaffinity(0)}

    def ticks() -> list[list[int]]:
        rows = [line.split() for line in Path("/proc/stat").read_text().splitlines()]
        return [[int(value) for value in values[:8]] for name, *values in rows if name in mine]

    before = ticks()
    time.sleep(seconds)
    passed = [[b - a for a, b in zip(*core)] for core in zip(before, ticks())]
    return sum((core[3] + core[4]) / max(1, sum(core)) for core in passed)  # idle, or waiting for a disk


def free_memory(device: torch.device) -> float:
    """GB."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info()[0] / 1e9
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 / 1e9 for line in lines if line.startswith("MemAvailable"))


def nvidia_smi(query: str, *options: str) -> list[list[str]]:
    """Rows of its answer; none if it is missing, does not know the query or may not say."""
    command = ["nvidia-smi", query, "--format=csv,noheader,nounits", *options]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    return [[cell.strip() for cell in line.split(",")] for line in done.stdout.splitlines()]


def number(text: str) -> float | str:
    """The number, or the text if it is none, as nvidia-smi's [N/A]."""
    try:
        return float(text.replace(",", ""))
    except ValueError:
        return text


def gpu_uuid(device: torch.device) -> str:
    return "GPU-" + str(torch.cuda.get_device_properties(device).uuid).removeprefix("GPU-")


def gpu_conditions(uuid: str) -> Values:
    """Power limit, clock and throttling, while the GPU computes what the caller has started."""
    found = {}
    for limit, clock in nvidia_smi("--query-gpu=power.limit,clocks.sm", "-i", uuid):
        found |= {"power limit": number(limit), "SM clock under load": number(clock)}
    for field in ("clocks_event_reasons.active", "clocks_throttle_reasons.active"):  # drivers from 535 on; older ones
        for (bits,) in nvidia_smi(f"--query-gpu={field}", "-i", uuid):
            if bits.startswith("0x"):
                names = [name for bit, name in THROTTLING.items() if int(bits, 16) & bit]
                found["throttling"] = " and ".join(names) or "none"
    return {name: value for name, value in found.items() if name == "throttling" or not isinstance(value, str)}

# ---- Measurements


def median_seconds(work: Callable[[], object], dist: train_gpt.Dist, budget_s: float = 1.0) -> float:
    """After one call to warm up, at least 3 times, and up to 15 if the budget allows. All ranks start together, as in
    a step, and repeat as often as rank 0 says, since the work may be a collective."""
    dist.sum_(torch.zeros(1, device=dist.device))
    timing.seconds_of(work, dist.device)
    seconds = [timing.seconds_of(work, dist.device)]
    repeats = dist.from_master(lambda: min(15, max(3, int(budget_s / seconds[0]))))
    seconds += [timing.seconds_of(work, dist.device) for _ in range(repeats - 1)]
    return statistics.median(seconds)


def measure_device(run: train_gpt.Run) -> Values:
    """Products of two large squares, those of a block's matrices with a micro-batch, and a large buffer copied."""
    dist, rows = run.dist, run.config.micro_batch_tokens
    device, on_gpu = dist.device, dist.device.type == "cuda"
    kind = dict(device=device, dtype=train_gpt.DTYPES[run.config.compute_dtype])
    square = torch.randn([8192 if on_gpu else 1024] * 2, **kind)
    weights = [torch.randn(m.weight.shape, **kind) for m in run.model.blocks[0].modules()
               if isinstance(m, torch.nn.Linear)]
    inputs = {width: torch.randn(rows, width, **kind) for width in {w.size(1) for w in weights}}
    weights_4 = 4 * weights  # several times, so that the start and the wait for the device do not count
    square_s = median_seconds(lambda: [square @ square for _ in range(4)], dist) / 4
    shapes_s = median_seconds(lambda: [F.linear(inputs[w.size(1)], w) for w in weights_4], dist) / 4
    source = torch.ones(2**28 if on_gpu else 2**26, device=device)  # 1 GiB, 256 MiB: more than caches hold
    target = torch.empty_like(source)
    copy_s = median_seconds(lambda: target.copy_(source), dist)
    found = {
        "matrix products, large square": 2 * len(square) ** 3 / square_s / 1e12,
        "matrix products, model's shapes": 2 * rows * sum(w.numel() for w in weights) / shapes_s / 1e12,
        "memory bandwidth": 2 * source.nbytes / copy_s / 1e9,  # read and written
    }
    if on_gpu:
        for _ in range(min(1000, int(3 / square_s))):  # 3 s at most, which the host does not wait for
            square @ square
        found |= gpu_conditions(gpu_uuid(device))
        torch.cuda.synchronize()
    return found


def measure_all_reduce(run: train_gpt.Run) -> Values:
    """Bus bandwidth as nccl-tests define it, with as many fp32 numbers as the gradient has: each rank sends and
    receives 2 (n - 1) / n of them. And the time that a single number takes."""
    ranks, gradient = run.dist.world_size, torch.zeros_like(run.grads.flat)
    if ranks == 1:
        return {}
    gradient_s, number_s = (median_seconds(lambda t=t: run.dist.sum_(t), run.dist) for t in (gradient, gradient[:1]))
    return {"all-reduce, gradient": gradient.nbytes * 2 * (ranks - 1) / ranks / gradient_s / 1e9,
            "all-reduce, one number": 1e6 * number_s}


def measure_step(run: train_gpt.Run) -> Values:
    """Real steps, each with its batch read as train_gpt.train reads it.

    A rank's share of a step is n micro-batches. Timed are a step with all of them, but at most MOST_MICRO_BATCHES, and
    one with none, which is all-reduce, clipping and optimiser. The difference over the number is a micro-batch, and

        step = the timed step + (n - micro-batches timed) x micro-batch

    By default nothing is left out, and the projection is a measurement."""
    config, dist = run.config, run.dist
    stream, numbers = train_gpt.TokenStream(config, "train"), itertools.count()
    optimizers = train_gpt.build_optimizers(run.model, config, dist)
    in_a_row = 3 if dist.device.type == "cuda" else 1  # there the host runs ahead of the device

    def read(count: int) -> list:
        return list(itertools.islice(stream.micro_batches(next(numbers), dist), count))

    def seconds_of_step(micro_batches: int) -> float:
        def work() -> None:
            for _ in range(in_a_row):
                train_gpt.train_step(run, read(micro_batches), optimizers, 1.0, config.muon_momentum_warmup_start)

        return median_seconds(work, dist, budget_s=5.0) / in_a_row

    share = config.train_batch_tokens // dist.world_size
    total = share // config.micro_batch_tokens
    timed = min(total, MOST_MICRO_BATCHES)
    timed_s, none_s = seconds_of_step(timed), seconds_of_step(0)
    micro_s = (timed_s - none_s) / timed
    step_s = timed_s + (total - timed) * micro_s
    rate = config.micro_batch_tokens / median_seconds(lambda: read(1), dist)
    return {"loader": rate / 1e6, "loader, times what a step needs": rate / (share / step_s), "step": 1000 * step_s,
            "micro-batch": 1000 * micro_s, "all-reduce, clipping, optimiser": 1000 * none_s}

# ---- Comparison


def count_of(ranks: int) -> str:
    return "1 rank" if ranks == 1 else f"{ranks} ranks"


def reference(readme: str, kind: str, ranks: int) -> Values:
    """What README.md's table for this kind of device knows. If it has no such number of GPUs, what holds for each."""
    table = readme.partition(f"| reading on a {kind} |")[2].partition("\n\n")[0].splitlines()
    if not table:
        raise train_gpt.UserError(f"README.md has no table '| reading on a {kind} |': take the repository's README.md")
    columns, _, *rows = [[cell.strip() for cell in line.strip("| ").split("|")] for line in table]
    exact, values = count_of(ranks) in columns, {}
    if not exact and kind == "CPU":
        return {}  # there the ranks share the cores
    index = 1 + columns.index(count_of(ranks if exact else 1))
    for name, value in ((row[0], number(row[index])) for row in rows):
        if name not in READINGS or isinstance(value, str) and value != "-" and name not in TEXTS:
            raise train_gpt.UserError(f"README.md, reading on a {kind}: {name} | {value}: no reading has this name, or "
                                      f"the value is neither a number nor '-': correct the table")
        if value != "-" and (exact or READINGS[name].own):
            values[name] = value
    return values


def share_of(name: str, value: float | str, expected: float | str) -> float:
    """How good a value is, 1 being as good as expected."""
    if value == expected or isinstance(value, str):
        return float(value == expected)
    good, poor = (expected, value) if READINGS[name].lower else (value, expected)
    return good / poor if poor else math.inf


def worst_of(readings: list[Values], expected: Values) -> dict[str, tuple[float | str, int]]:
    """Each reading's worst value and the rank it is from."""
    worst = {}
    for name in READINGS:
        values = [(found[name], rank) for rank, found in enumerate(readings) if name in found]
        if values:
            measure = expected.get(name, values[0][0])
            worst[name] = min(values, key=lambda each: share_of(name, each[0], measure))
    return worst


def shown(name: str, value: float | str) -> str:
    text = value if isinstance(value, str) else f"{value:,.{READINGS[name].digits}f}"
    return f"{text} {READINGS[name].unit}".strip()


def shortfalls(worst: dict[str, tuple[float | str, int]], expected: Values, kind: str,
               ranks: int = 1) -> tuple[list[str], bool]:
    """A line for each reading more than 10 % worse than the reference; whether one is decisive and below 70 %."""
    lines, bad = [], False
    for name, (value, rank) in worst.items():
        share = share_of(name, value, expected.get(name, value))
        if share < TOLERATED:
            reading = READINGS[name]
            bad = bad or reading.decisive and share < DECISIVE
            lines.append(f"  {name}: {shown(name, value)}{f' on rank {rank}' * (ranks > 1)}, reference "
                         f"{shown(name, expected[name])} ({share:.0%}); usually "
                         f"{reading.gpu if kind == 'GPU' else reading.cpu}")
    return lines, bad


def report(run: train_gpt.Run, readings: list[Values], expected: Values, kind: str) -> int:
    """Prints everything; the exit status."""
    config, ranks, worst = run.config, run.dist.world_size, worst_of(readings, expected)
    fa3 = "" if importlib.util.find_spec("flash_attn_interface") else "no "
    print(f"{count_of(ranks)}, {timing.machine()}\n"
          f"{config.compute_dtype}, COMPILE={config.compile}, ATTENTION={config.attention}, {fa3}flash_attn_interface; "
          f"{run.grads.flat.numel():,} parameters,\nsteps of {config.train_batch_tokens:,} tokens, micro-batches of "
          f"{config.micro_batch_tokens:,}\n\n{'reading':<33} {'here':>15} {'reference':>15} {'share':>7}")
    for name, (value, rank) in worst.items():
        known, share = "-", "-"
        if name in expected:
            share = share_of(name, value, expected[name])
            known, share = shown(name, expected[name]), f"{share:.0%}" if share < 10 else "> 999%"
        print(f"{name:<33} {shown(name, value):>15} {known:>15} {share:>7}{f'  rank {rank}' * (ranks > 1)}")
    budget_s, total = config.max_wallclock_seconds or 600.0, config.train_batch_tokens // ranks
    micro_ms, rest_ms, step_ms = (worst[name][0] for name in ("micro-batch", "all-reduce, clipping, optimiser", "step"))
    print(f"\n{total // config.micro_batch_tokens} x {micro_ms:,.1f} + {rest_ms:,.1f} ms: {step_ms:,.1f} ms/step, "
          f"{1000 * budget_s / step_ms:,.0f} steps in {budget_s:,.0f} s; reference "
          + (f"{expected['step']:,.1f} ms/step, {1000 * budget_s / expected['step']:,.0f} steps" if "step" in expected
             else "unknown"))
    lines, bad = shortfalls(worst, expected, kind, ranks)
    print("\n".join(["below 90 % of the reference:", *lines]) if lines else
          f"no reading below 90 % of the reference, {len(set(worst) & set(expected))} of {len(worst)} compared")
    if bad:
        print(f"below {DECISIVE:.0%} in what decides the step time: exit status 1")
    return int(bad)


def measure(config: train_gpt.Config, dist: train_gpt.Dist, processes: list[list[str]]) -> tuple[train_gpt.Run, Values]:
    """The run that was measured, and this rank's readings; processes: the GPUs of those that were there before."""
    found = {"free memory": free_memory(dist.device),
             "host cores a rank": host_cores() / int(os.environ.get("LOCAL_WORLD_SIZE", 1)),
             "idle host cores": dist.from_master(idle_cores)}
    if dist.device.type == "cuda" and shutil.which("nvidia-smi"):
        found["other processes on the GPU"] = processes.count([gpu_uuid(dist.device)])
    run = train_gpt.build_run(config, dist, train_gpt.Log(None))
    found["attention"] = run.config.attention
    if dist.world_size > 1:
        dist.expect(600)  # as in training: where nothing is expected, a barrier comes before each all-reduce
    try:
        return run, found | measure_device(run) | measure_all_reduce(run) | measure_step(run)
    except torch.OutOfMemoryError as error:
        raise train_gpt.UserError(f"MICRO_BATCH_TOKENS={run.config.micro_batch_tokens}: out of memory, "
                                  f"{found['free memory']:.1f} GB were free: lower it") from error


def main() -> int:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    kind = "GPU" if torch.cuda.is_available() and os.environ.get("DEVICE") != "cpu" else "CPU"
    processes = nvidia_smi("--query-compute-apps=gpu_uuid") if kind == "GPU" else []  # before there are our own
    ranks, path = int(os.environ.get("WORLD_SIZE", 1)), REPOSITORY / "README.md"
    usual = dict(COMPILE="0")  # on a CPU compiling would take longer than all the rest
    if kind == "GPU":
        usual = dict(TRAIN_BATCH_TOKENS=str(ranks * timing.ON_GPU["TRAIN_BATCH_TOKENS"]))
    usual = timing.defaults() | usual
    config, compared = train_gpt.Config.from_env(usual | dict(os.environ)), train_gpt.Config.from_env(usual)
    changed = [name for name in STEP_SETTINGS if getattr(config, name) != getattr(compared, name)]
    expected = reference(path.read_text() if path.is_file() else "", kind, ranks)
    if changed:
        expected = {name: value for name, value in expected.items() if READINGS[name].own}
        if "compute_dtype" in changed:
            expected.pop("matrix products, large square", None)
    dist, made = train_gpt.Dist(config.device, os.environ), None
    config = train_gpt.settle(config, dist)
    if not any(Path(config.data_path).glob("fineweb_train_*.bin")):
        made = timing.random_shards(config.vocab_size)  # each rank its own: other ranks may have other disks
    run, found = measure(replace(config, data_path=made or config.data_path), dist, processes)
    readings, status = [found] * ranks, 0
    if ranks > 1:
        distributed.all_gather_object(readings, found)
    if dist.is_master:
        status = report(run, readings, expected, kind)
        if not expected:
            print(f"not compared: README.md has no reference for {count_of(ranks)} on a {kind}")
        elif changed:
            print(f"not compared: what depends on {', '.join(name.upper() for name in changed)}")
        if made:
            print(f"DATA_PATH={config.data_path} has no shards: the loader read random tokens from a temporary folder")
    if ranks > 1:  # as train_gpt.main ends
        if made:
            shutil.rmtree(made)
        sys.stdout.flush()
        distributed.destroy_process_group()
        os._exit(status)
    return status


if __name__ == "__main__":
    try:
        sys.exit(main())
    except train_gpt.UserError as problem:
        if os.environ.get("RANK", "0") != "0":
            time.sleep(2)  # rank 0 speaks; torchrun ends the others
        sys.exit(f"error: {problem}")
