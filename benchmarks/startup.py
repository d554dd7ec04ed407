"""Seconds from launching train_gpt.py to its first training step, with the compile cache empty and filled.

    make demo && python benchmarks/startup.py      the demo's data
    python benchmarks/startup.py --shards 80       80 shards of 100 M tokens, validation of 62 M, as sparse files
    COMPILE=0 python benchmarks/startup.py         any setting of train_gpt.py

Each round launches the script twice, the first time with a new, empty compile cache, and stops it at its first step.
"""
import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import timing
from dataset_files import shard_header
from timing import REPOSITORY, spread

STAGES = {  # what a line begins with when the stage is over
    "imports, settings, data checked": "world_size:",
    "model, attention chosen": "model_params:",
    "first warm-up step": "warmup_step:1/",
    "warm-up: all graphs, GPTQ timed": "warm-up done",
    "first training step": "step:1/",
}


def launch(settings: dict[str, str]) -> list[float]:
    """Seconds from launch to the end of each stage."""
    start, ends = time.perf_counter(), []
    process = subprocess.Popen([sys.executable, "-u", str(REPOSITORY / "train_gpt.py")], text=True,
                               env=os.environ | settings, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    lines = []
    for line in process.stdout:
        lines.append(line)
        if line.startswith(list(STAGES.values())[len(ends)]):
            ends.append(time.perf_counter() - start)
            if len(ends) == len(STAGES):
                break
    process.kill()
    process.wait()
    if len(ends) < len(STAGES):
        sys.exit("error: train_gpt.py ended before its first step:\n" + "".join(lines[-5:]))
    return ends


def sparse_shards(folder: Path, count: int) -> None:
    """Files of the size of the published ones that take no room: every token is 0."""
    for name, tokens in [(f"train_{i:06}", 100_000_000) for i in range(count)] + [("val_000000", 62_021_846)]:
        with open(folder / f"fineweb_{name}.bin", "wb") as file:
            file.write(shard_header(tokens))
            file.truncate(len(shard_header(tokens)) + 2 * tokens)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, default=0, help="sparse training shards of 100 M tokens; 0: DATA_PATH")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    demo = dict(DATA_PATH=str(REPOSITORY / "data/datasets/pydocs_sp1024"),
                TOKENIZER_PATH=str(REPOSITORY / "data/tokenizers/pydocs_1024_bpe.model"))
    cold, warm, imports = [], [], []
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)  # logs/ goes there
        settings = timing.defaults() | demo | dict(VAL_LOSS_EVERY="0") | dict(os.environ)
        if settings.get("WARMUP_STEPS") == "0":
            sys.exit("error: WARMUP_STEPS=0: the first warm-up step is what is timed, set 1 or more")
        if args.shards:
            sparse_shards(Path(folder), args.shards)
            settings["DATA_PATH"] = folder
        for i in range(args.repeats):
            settings["TORCHINDUCTOR_CACHE_DIR"] = str(Path(folder) / f"cache{i}")
            cold.append(launch(settings))
            warm.append(launch(settings))
            start = time.perf_counter()
            subprocess.run([sys.executable, "-c", "import train_gpt"], check=True, cwd=REPOSITORY)
            imports.append(time.perf_counter() - start)
    print(timing.machine())
    print(f"{'import train_gpt, interpreter included':<42} {spread(imports)}")
    print(f"{'seconds since launch, at the end of':<42} {'empty compile cache':<26} filled")
    for index, stage in enumerate(STAGES):
        print(f"  {stage:<40} {spread([run[index] for run in cold]):<26} {spread([run[index] for run in warm])}")


if __name__ == "__main__":
    main()
