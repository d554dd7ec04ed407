"""Run the real train_gpt.py, whole, at a size for two CPU cores, and say what came out beside xz and zstd.

    make demo                         environment, corpus, then this
    python benchmarks/demo.py         this alone; any setting of train_gpt.py in the environment overrides DEMO
    python benchmarks/demo.py --check exit status 1 if the result is incomplete or outside the bounds below (.ci/run)

On a machine with a GPU the same command uses it.
"""
import argparse
import json
import lzma
import math
import os
import queue
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import zstandard

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))
import train_gpt  # noqa: E402

# All 11 layers and every technique, small dimensions. Found by short runs on this corpus.
DEMO = dict(
    DATA_PATH="data/datasets/pydocs_sp1024", TOKENIZER_PATH="data/tokenizers/pydocs_1024_bpe.model", EVAL_PLAIN=1,
    MODEL_DIM=96, NUM_HEADS=2, NUM_KV_HEADS=1, BIGRAM_VOCAB_SIZE=131072, BIGRAM_DIM=32,
    TRAIN_SEQ_LEN=256, TRAIN_BATCH_TOKENS=2048, MAX_WALLCLOCK_SECONDS=150, WARMUP_STEPS=2, VAL_LOSS_EVERY=0,
    VAL_BATCH_SIZE=4096, TRAIN_LOG_EVERY=10, MUON_MOMENTUM=0.95, MUON_MOMENTUM_WARMUP_START=0.85,
    SWA_START_FRAC=0.03, SWA_EVERY=2, EVAL_STRIDE=128, EVAL_BATCH_SEQS=2, TTT_CHUNK_TOKENS=256, TTT_LR=0.004,
    EVAL_MAX_SECONDS=160, MAX_ARTIFACT_BYTES=1_600_000,  # a quarter less than the finest steps take: the solver works
)
HEARTBEAT_SECONDS = 3.0

# What --check accepts. Never seconds: machines are shared. A slow one may adapt on fewer chunks than it scores.
MIN_TARGETS, MIN_CHUNKS, MAX_FINAL_BPB = 100_000, 30, 2.25
# int5/int6 costs about 0.003, the window's context gains more: together about -0.01 in README.md's runs.
QUANTISED_MOVES = (-0.15, 0.03)
TTT_MOVES = (-0.20, 0.005)  # adaptation may fail to help, but must not hurt


def run_script(settings: dict[str, str]) -> Path:
    """Runs train_gpt.py, echoing its lines and, when it is silent, how long it has been; returns its log folder."""
    process = subprocess.Popen([sys.executable, "-u", str(REPOSITORY / "train_gpt.py")], cwd=REPOSITORY, text=True,
                               env=os.environ | settings, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    lines: queue.Queue[str | None] = queue.Queue()

    def read() -> None:
        for line in process.stdout:
            lines.put(line.rstrip("\n"))
        lines.put(None)

    threading.Thread(target=read, daemon=True).start()
    start = last = time.monotonic()
    while True:
        try:
            line = lines.get(timeout=HEARTBEAT_SECONDS)
        except queue.Empty:
            now = time.monotonic()
            print(f"  ... working, {now - last:.0f} s since the last line, {now - start:.0f} s in all", flush=True)
            continue
        if line is None:
            break
        print(line, flush=True)
        last = time.monotonic()
    if process.wait():
        sys.exit(f"error: train_gpt.py ended with status {process.returncode}; its last lines are above")
    return REPOSITORY / "logs" / settings["RUN_ID"]


def scored_text(settings: dict[str, str], targets: int) -> bytes:
    """The normalised text of the scored targets, as the tokenizer decodes it."""
    config = train_gpt.Config.from_env(os.environ | settings)
    tokens = train_gpt.TokenStream(config, "val").read(1, targets)
    return train_gpt.load_tokenizer(config).decode(tokens.tolist()).encode()


def summarise(folder: Path, settings: dict[str, str]) -> tuple[dict[str, float], dict[str, float]]:
    """Bits per byte by stage, and what the run took, from its metrics. Raises KeyError if a stage left nothing."""
    last = {}
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        last[record["event"]] = record
    submitted, plain = last["final_ttt_exact"], last["final_quantized_exact"]
    text = scored_text(settings, submitted["targets"])
    bpb = {
        "after training": last["val"]["val_bpb"],
        "after SWA": last["swa"]["val_bpb"],
        "int5/int6, sliding window": plain["val_bpb"],
        "int5/int6, sliding window, TTT (submitted)": submitted["val_bpb"],
        "xz -9e": 8 * len(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME)) / len(text),
        "zstd -22": 8 * len(zstandard.compress(text, level=22)) / len(text),
    }
    run = {
        "artifact bytes": last["artifact"]["artifact_bytes"],
        "script bytes": last["artifact"]["code_bytes"],
        "limit of the two": last["start"]["settings"]["max_artifact_bytes"],
        "targets scored": submitted["targets"],
        "bytes of text": submitted["bytes"],
        "chunks": -(-submitted["targets"] // int(settings["TTT_CHUNK_TOKENS"])),
        "chunks adapted on": submitted["chunks_adapted"],
        "training steps": last["val"]["step"],
        "seconds: start and warm-up": last["warm_up"]["since_start_s"],
        "seconds: training": last["val"]["train_s"],
        "seconds: validation, twice": last["val"]["seconds"] + last["swa"]["seconds"],
        "seconds: moments for GPTQ": last["moments"]["seconds"],
        "seconds: artifact": last["artifact"]["seconds"],
        "seconds: score, then adapt": submitted["eval_seconds"],
        "seconds: plain pass": plain["eval_seconds"],
    }
    return bpb, run


def print_table(bpb: dict[str, float], run: dict[str, float]) -> None:
    print("\nBits per byte of the validation text (lower is better)")
    for name, value in bpb.items():
        print(f"  {name:<44} {value:>12.4f}")
    print("\nThe run")
    for name, value in run.items():
        print(f"  {name:<44} {value:>12.1f}" if name.startswith("seconds") else f"  {name:<44} {value:>12,}")


def faults(bpb: dict[str, float], run: dict[str, float]) -> list[str]:
    """What is outside the bounds above."""
    final, quantised = bpb["int5/int6, sliding window, TTT (submitted)"], bpb["int5/int6, sliding window"]
    by_quantising, by_adapting = quantised - bpb["after SWA"], final - quantised
    checks = [
        (all(math.isfinite(value) for value in (bpb | run).values()), "a value is not finite"),
        (run["targets scored"] >= MIN_TARGETS, f"{run['targets scored']} targets, fewer than {MIN_TARGETS}"),
        (run["chunks"] >= MIN_CHUNKS, f"{run['chunks']} chunks, fewer than {MIN_CHUNKS}"),
        (run["artifact bytes"] + run["script bytes"] < run["limit of the two"], "artifact and script exceed the limit"),
        (final <= MAX_FINAL_BPB, f"final BPB {final:.4f} above {MAX_FINAL_BPB}"),
        (QUANTISED_MOVES[0] <= by_quantising <= QUANTISED_MOVES[1],
         f"quantisation and window move BPB by {by_quantising:+.4f}, outside {QUANTISED_MOVES}"),
        (TTT_MOVES[0] <= by_adapting <= TTT_MOVES[1], f"TTT moves BPB by {by_adapting:+.4f}, outside {TTT_MOVES}"),
    ]
    return [message for holds, message in checks if not holds]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="exit status 1 if the result is outside the bounds")
    check = parser.parse_args().check
    settings = {name: os.environ.get(name, str(value)) for name, value in DEMO.items()}
    settings["RUN_ID"] = os.environ.get("RUN_ID", f"demo_seed{os.environ.get('SEED', train_gpt.Config.seed)}")
    if os.environ.get("ARTIFACT") or settings["EVAL_PLAIN"] != "1":
        sys.exit("error: the demo's table needs a training run and EVAL_PLAIN=1: unset ARTIFACT and EVAL_PLAIN")
    os.chdir(REPOSITORY)
    if not os.environ.get("RESUME"):  # an interrupted demo starts anew, though train_gpt.py would rather keep it
        shutil.rmtree(Path("logs") / settings["RUN_ID"] / "checkpoints", ignore_errors=True)
    start = time.monotonic()
    folder = run_script(settings)
    seconds = time.monotonic() - start
    bpb, run = summarise(folder, settings)
    run["seconds: all of train_gpt.py"] = seconds
    print_table(bpb, run)
    found = faults(bpb, run)
    for message in found:
        print(f"outside the expected bounds: {message}")
    sys.exit(1 if check and found else 0)


if __name__ == "__main__":
    main()
