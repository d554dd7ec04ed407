"""What the speed benchmarks share: arms made of settings, measurements in pairs, medians with their spread."""
from __future__ import annotations

import atexit
import importlib.util
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import torch

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "data")]
from dataset_files import shard_header  # noqa: E402

import train_gpt  # noqa: E402

# Where the environment says nothing: the record model with one of eight GPUs' share of the batch; on a CPU 11 layers of
# a size it can train.
ON_GPU = dict(TRAIN_BATCH_TOKENS=98_304)
ON_CPU = dict(MODEL_DIM=128, NUM_HEADS=4, NUM_KV_HEADS=2, TRAIN_SEQ_LEN=256, TRAIN_BATCH_TOKENS=8192,
              EVAL_BATCH_SEQS=8, TTT_CHUNK_TOKENS=4096)


def defaults() -> dict[str, str]:
    on_gpu = torch.cuda.is_available() and os.environ.get("DEVICE") != "cpu"
    return {name: str(value) for name, value in (ON_GPU if on_gpu else ON_CPU).items()}


def load_script(path: str) -> ModuleType:
    """Another train_gpt.py, beside this one."""
    if not Path(path).is_file():
        raise SystemExit(f"error: {path}: no such script")
    name = f"script_{len(sys.modules)}"
    spec = importlib.util.spec_from_file_location(name, path)
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def make_run(settings: dict[str, str], script: ModuleType = train_gpt) -> train_gpt.Run:
    """A run as the script's main makes it, from the defaults above, then the environment, then these settings. Without
    shards under DATA_PATH it gets random ones: what is timed does not depend on them."""
    config = script.Config.from_env(defaults() | dict(os.environ) | settings)
    if not any(Path(config.data_path).glob("fineweb_train_*.bin")):
        config = replace(config, data_path=random_shards(config.vocab_size))
    dist = script.Dist(config.device)
    return script.build_run(script.settle(config, dist), dist, script.Log(None))


def random_shards(vocab_size: int, tokens: int = 1 << 22, count: int = 1) -> str:
    """A folder, removed at the end, of so many training shards and one for validation, of uniform random tokens."""
    folder = Path(tempfile.mkdtemp(prefix="random_shards_"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    body = np.random.default_rng(0).integers(0, vocab_size, tokens).astype("<u2").tobytes()
    for name in ["val_000000"] + [f"train_{i:06}" for i in range(count)]:
        (folder / f"fineweb_{name}.bin").write_bytes(shard_header(tokens) + body)
    return str(folder)


class OneByteEach:
    """In the place of TokenBytes, which needs a tokenizer: bits per byte are not what is measured."""

    def count(self, tokens: np.ndarray) -> np.ndarray:
        return np.ones(len(tokens) - 1, np.int64)


def seconds_of(work: Callable[[], object], device: torch.device) -> float:
    """Seconds until the device is done with the work."""
    for when in ("before", "after"):
        if device.type == "cuda":
            torch.cuda.synchronize()
        if when == "before":
            start = time.perf_counter()
            work()
    return time.perf_counter() - start


def in_turn(works: Sequence[Callable[[], object]], repeats: int, device: torch.device) -> list[list[float]]:
    """Seconds [works][repeats]: every round times all of them, from the first on and from the last on in turn."""
    seconds = [[0.0] * repeats for _ in works]
    for i in range(repeats):
        for arm in range(len(works)) if i % 2 else reversed(range(len(works))):
            seconds[arm][i] = seconds_of(works[arm], device)
    return seconds


def spread(values: Sequence[float], digits: int = 1) -> str:
    """Median (least to most)."""
    return f"{statistics.median(values):,.{digits}f} ({min(values):,.{digits}f} to {max(values):,.{digits}f})"


def pairwise(a: Sequence[float], b: Sequence[float]) -> str:
    """How many times the second of each pair goes into the first."""
    return spread([x / y for x, y in zip(a, b, strict=True)], 2)


def peak_flops(dtype: torch.dtype, device: torch.device) -> float:
    """FLOP/s of the fastest square matrix product seen, on random data."""
    rates = []
    for size in (4096, 8192) if device.type == "cuda" else (512, 1024, 2048):
        a, b = torch.randn(2, size, size, device=device).to(dtype)
        rates += [2 * size**3 / seconds_of(lambda a=a, b=b: a @ b, device) for _ in range(8)]
    return max(rates)


def flops_per_token(config: train_gpt.Config) -> float:
    """Of the model's matrix products, forwards and backwards; half of attention's, since it is causal."""
    with torch.device("meta"):
        model = train_gpt.GPT(config)
    weights = [m.weight for m in model.modules() if isinstance(m, torch.nn.Linear)] + [model.tok_emb.weight]
    return 6 * sum(w.numel() for w in weights) + 6 * config.train_seq_len * config.model_dim * config.num_layers


def machine() -> str:
    """One line that says where and when."""
    if torch.cuda.is_available() and os.environ.get("DEVICE") != "cpu":
        name = torch.cuda.get_device_name()
    else:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "CPU")
        name += f", {torch.get_num_threads()} threads"
    return f"{name}, torch {torch.__version__}, {time.strftime('%Y-%m-%d')}"
