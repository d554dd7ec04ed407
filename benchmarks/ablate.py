"""What changes of settings are worth: the real script, whole, once for each arm and seed, judged on the stored model.

    python benchmarks/ablate.py "" QK_GAIN_INIT=2 "MATRIX_LR=0.025 SCALAR_LR=0.025" --seeds 1 2 3 --results FILE.jsonl
    MAX_WALLCLOCK_SECONDS=300 python benchmarks/ablate.py ...       settings of all arms, from the environment
    python benchmarks/ablate.py @benchmarks/pr264.env "" --jobs 2   @FILE: the settings in it; two runs at once

Each argument is an arm; the first is what the others are compared with. Arms of one seed are run one after the other in
random order before the next seed's, so that a machine that slows down or warms up does so for all of them; with --jobs
some of them at once, on equal shares of the CPU's cores (not on a GPU). A run is
written to --results as it ends, with its settings, script and machine: the same command goes on where it was stopped,
and another with more arms or seeds adds to it. The figure is the submitted score (artifact from disk, sliding window,
adaptation if on). Shown are the differences to the first arm in the same seed: their mean and its 95 % confidence
interval (Student's t), which needs two seeds. On a CPU the model is small (SMALL below); what holds there need not at
full size.
"""
from __future__ import annotations

import argparse
import concurrent.futures
import hashlib
import json
import math
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import timing
from scipy import stats
from timing import REPOSITORY, train_gpt

# On a CPU, where the environment says nothing. The schedule keeps the record's shape by itself (shares of the budget);
# what counts steps is scaled to some 1,500. No adaptation: it hardly moves a model of this size, and takes long.
SMALL = timing.ON_CPU | dict(
    MAX_WALLCLOCK_SECONDS=600, SWA_EVERY=10, VAL_LOSS_EVERY=0, VAL_BATCH_SIZE=8192, WARMUP_STEPS=2,
    MAX_VAL_TOKENS=524_288, EVAL_MAX_SECONDS=0, TTT_ENABLED=0)
# Where a run finds its files, and what is no setting of the model or its training.
ELSEWHERE = {"data_path", "tokenizer_path", "run_id", "val_nll_path", "resume", "checkpoint_every_seconds",
             "checkpoint_every_steps", "preflight_only", "seed"}


def settings_of(arm: str) -> dict[str, str]:
    """An arm's own settings. Raises SystemExit for what is none."""
    parts = []
    for part in arm.split():
        try:
            parts += Path(part[1:]).read_text().split() if part.startswith("@") else [part]
        except OSError as error:
            raise SystemExit(f"error: {part}: {error.strerror}: @FILE is a file of NAME=value settings") from error
    if bad := [part for part in parts if "=" not in part]:
        raise SystemExit(f"error: {' '.join(bad)}: an arm is NAME=value settings, separated by spaces")
    return dict(part.split("=", 1) for part in parts)


def on_gpu() -> bool:
    return timing.torch.cuda.is_available() and os.environ.get("DEVICE") != "cpu"


def shared_settings() -> dict[str, str]:
    """Those of all arms: the defaults for this machine, then the environment."""
    known = {name.upper() for name in vars(train_gpt.Config())}
    defaults = timing.ON_GPU if on_gpu() else SMALL
    return {name: str(value) for name, value in defaults.items()} | {
        name: value for name, value in os.environ.items() if name in known}


def key_of(settings: dict[str, str], seed: int, script: bytes, jobs: int = 1) -> str:
    """What makes a run the same run: the values of all settings, the seed, the script and how many share the cores."""
    config = train_gpt.Config.from_env(settings)
    values = {name: value for name, value in vars(config).items() if name not in ELSEWHERE}
    data = dict(values=values, data=Path(config.data_path).name, seed=seed, script=hashlib.sha256(script).hexdigest(),
                jobs=jobs)
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()[:16]


def read_results(path: Path) -> list[dict]:
    """Runs that have ended. A last line that was cut short is a run that has not."""
    runs = []
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            runs.append(json.loads(line))
        except ValueError:
            print(f"{path}: a line that was cut short is left out")
    return runs


def run_once(settings: dict[str, str], seed: int, key: str, arm: str, jobs: int = 1) -> dict:
    """Runs the script, on its share of the cores; what it scored and took. Raises SystemExit if it fails."""
    with tempfile.TemporaryDirectory(prefix="ablate_") as folder:
        shutil.copy(REPOSITORY / "train_gpt.py", folder)
        env = os.environ | settings | dict(SEED=str(seed), RUN_ID=key, VAL_NLL_PATH="", CHECKPOINT_EVERY_SECONDS="0")
        if jobs > 1 or "OMP_NUM_THREADS" not in env:  # else each run chooses for itself
            env["OMP_NUM_THREADS"] = str(max(1, len(os.sched_getaffinity(0)) // jobs))
        for name in ("DATA_PATH", "TOKENIZER_PATH"):
            env[name] = os.path.abspath(env.get(name, getattr(train_gpt.Config, name.lower())))
        done = subprocess.run([sys.executable, "train_gpt.py"], cwd=folder, env=env, capture_output=True, text=True)
        if done.returncode:
            said = (done.stdout + done.stderr).strip()[-500:]
            raise SystemExit(f"error: {arm or '(as it is)'}, seed {seed}: {said}")
        score = json.loads((Path(folder) / "logs" / key / "submission.json").read_text())
        last = {}
        for line in (Path(folder) / "logs" / key / "metrics.jsonl").read_text().splitlines():
            record = json.loads(line)
            last[record["event"]] = record
        return dict(key=key, arm=arm, seed=seed, settings=settings_of(arm), data=Path(env["DATA_PATH"]).name,
                    shared={n: v for n, v in shared_settings().items() if n.lower() not in ELSEWHERE},
                    machine=timing.machine(), jobs=jobs, val_bpb=score["val_bpb"], after_training=last["val"]["val_bpb"],
                    after_swa=last["swa"]["val_bpb"],
                    **{name: score[name] for name in ("steps", "train_seconds", "artifact_bytes")})


def interval(differences: list[float]) -> tuple[float, float]:
    """Mean, and half the width of its 95 % confidence interval (inf for one difference)."""
    mean, n = statistics.fmean(differences), len(differences)
    if n < 2:
        return mean, math.inf
    return mean, float(stats.t.ppf(0.975, n - 1)) * statistics.stdev(differences) / math.sqrt(n)


def print_table(arms: list[str], runs: dict[tuple[str, int], dict], seeds: list[int]) -> None:
    """runs: by arm and seed, those that there are."""
    print(f"\n{'arm':<44} {'seeds':>5} {'val_bpb':>8}  {'better than the first by':<24} {'before storing':>14} "
          f"{'steps':>7} {'bytes':>10}")
    for arm in arms:
        mine = [seed for seed in seeds if (arm, seed) in runs]
        if not mine:
            continue
        column = {name: statistics.fmean(runs[arm, seed][name] for seed in mine)
                  for name in ("val_bpb", "after_swa", "steps", "artifact_bytes")}
        paired = [seed for seed in mine if (arms[0], seed) in runs]
        gain = ""
        if arm != arms[0] and paired:
            mean, half = interval([runs[arms[0], seed]["val_bpb"] - runs[arm, seed]["val_bpb"] for seed in paired])
            gain = f"{mean:+.4f} ± {half:.4f}"
        print(f"{arm or '(as it is)':<44} {len(mine):>5} {column['val_bpb']:>8.4f}  {gain:<24} "
              f"{column['after_swa']:>14.4f} {column['steps']:>7,.0f} {column['artifact_bytes']:>10,.0f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("arms", nargs="+", help="NAME=value settings; the first is compared with")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1337, 2, 3])
    parser.add_argument("--results", type=Path, required=True, help="a file of JSON lines, added to")
    parser.add_argument("--jobs", type=int, default=1, help="runs at once")
    parser.add_argument("--order", type=int, default=0, help="seed of the order")
    args = parser.parse_args()
    script = (REPOSITORY / "train_gpt.py").read_bytes()
    arms = list(dict.fromkeys(args.arms))
    if args.jobs > 1 and (on_gpu() or len(arms) % args.jobs):
        raise SystemExit(f"error: --jobs {args.jobs} with {len(arms)} arms: on CPUs only, and so many of them that each "
                         "runs beside others; leave --jobs out")
    keys = {(arm, seed): key_of(shared_settings() | settings_of(arm), seed, script, args.jobs)
            for seed in args.seeds for arm in arms}
    done = {run["key"]: run for run in read_results(args.results)}
    order = random.Random(args.order)
    writing = threading.Lock()

    def run(arm: str, seed: int) -> None:
        key = keys[arm, seed]
        print(f"seed {seed}: {arm or '(as it is)'}\n", end="", flush=True)  # one write: others print too
        result = run_once(shared_settings() | settings_of(arm), seed, key, arm, args.jobs)
        with writing, open(args.results, "a+b") as file:
            done[key] = result
            cut = file.tell() and file.seek(-1, os.SEEK_END) >= 0 and file.read() != b"\n"
            file.write(b"\n" * cut + json.dumps(result).encode() + b"\n")

    for seed in args.seeds:
        left = {keys[arm, seed]: arm for arm in order.sample(arms, len(arms)) if keys[arm, seed] not in done}
        pool = concurrent.futures.ThreadPoolExecutor(args.jobs)
        try:
            for ended in [pool.submit(run, arm, seed) for arm in left.values()]:
                ended.result()
        finally:
            pool.shutdown(cancel_futures=True)  # a failure or Ctrl-C starts no further run
        print_table(arms, {pair: done[key] for pair, key in keys.items() if key in done}, args.seeds)


if __name__ == "__main__":
    main()
