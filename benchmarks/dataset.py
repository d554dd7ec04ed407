"""How fast data/build_dataset.py is beside plain SentencePiece batch encoding, and whether its memory grows.

    python benchmarks/dataset.py --source corpus.jsonl                any source of build_dataset.py; default: docs
    python benchmarks/dataset.py --source corpus.jsonl --workers 1 2 4 --repeats 5

Plain encoding is one process that holds all documents in memory and does nothing but SentencePieceProcessor.encode, in
batches, on one thread; beside several workers, in as many processes at once. Building is everything from reading the
source to the manifest's last byte, with the same tokenizer. Both are measured in turn, so that the ratio of each pair
is of the same minute. Memory is that of the largest process, for a quarter of the source's text and for all of it.
"""
import argparse
import contextlib
import io
import json
import multiprocessing
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import sentencepiece as spm

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY / "data"))
import build_dataset  # noqa: E402
import sources  # noqa: E402

BATCH_DOCS = 1024  # as in the challenge's own export


def write_corpus(source: str, megabytes: float, folder: Path) -> list[str]:
    """Copies up to so much of a source's text to folder/all.jsonl, a quarter to folder/quarter.jsonl; returns all."""
    texts, size = [], 0
    for unit in sources.open_source("--source", source, REPOSITORY / "requirements.txt").units():
        for document in unit.reader(*unit.arguments, Counter()):
            if size < 1e6 * megabytes and document.text.strip():
                texts.append(document.text)
                size += len(document.text.encode())
    for name, count in (("all", len(texts)), ("quarter", len(texts) // 4)):
        with open(folder / f"{name}.jsonl", "w") as file:
            file.writelines(json.dumps({"text": text}) + "\n" for text in texts[:count])
    return texts


def build_command(folder: Path, corpus: str, tokenizer: Path, workers: int) -> list[str]:
    return ["--source", str(folder / f"{corpus}.jsonl"), "--out", str(folder / "out"), "--workers", str(workers),
            "--tokenizer", str(tokenizer)]


def seconds_to_build(folder: Path, tokenizer: Path, workers: int) -> float:
    shutil.rmtree(folder / "out", ignore_errors=True)  # or there would be nothing to do
    start = time.perf_counter()
    with contextlib.redirect_stdout(io.StringIO()):
        assert build_dataset.main(build_command(folder, "all", tokenizer, workers)) == 0
    return time.perf_counter() - start


def encode(texts: list[str], tokenizer: Path) -> float:
    model = spm.SentencePieceProcessor(model_file=str(tokenizer))
    start = time.perf_counter()
    for first in range(0, len(texts), BATCH_DOCS):
        model.encode(texts[first:first + BATCH_DOCS], num_threads=1)
    return time.perf_counter() - start


def seconds_to_encode(texts: list[str], tokenizer: Path, processes: int) -> float:
    """Of the slowest of so many processes, each of which encodes all texts."""
    context = multiprocessing.get_context("fork")  # they share the texts
    results = context.SimpleQueue()
    started = [context.Process(target=lambda: results.put(encode(texts, tokenizer))) for _ in range(processes)]
    for process in started:
        process.start()
    seconds = [results.get() for _ in started]
    for process in started:
        process.join()
    return max(seconds)


def peak_megabytes(folder: Path, corpus: str, tokenizer: Path, workers: int) -> float:
    """Resident memory of the largest process of a build, the command itself or a worker."""
    shutil.rmtree(folder / "out", ignore_errors=True)
    # By way of a small process: a direct child would begin with this one's memory as its peak.
    measure = ("import resource, subprocess, sys; subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL);"
               " print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)")
    command = [sys.executable, str(REPOSITORY / "data" / "build_dataset.py")]
    command += build_command(folder, corpus, tokenizer, workers)
    return int(subprocess.run([sys.executable, "-c", measure, *command], check=True, capture_output=True).stdout) / 1000


def spread(values: list[float]) -> str:
    return f"{statistics.median(values):8.2f}  ({min(values):.2f} to {max(values):.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", default="docs", help="as build_dataset.py takes it; best 100 MB of text or more")
    parser.add_argument("--megabytes", type=float, default=1e6, help="of the source's text; default: all of it")
    parser.add_argument("--workers", type=int, nargs="+", default=sorted({1, len(os.sched_getaffinity(0))}),
                        help="numbers of cores to compare; default: one, and all")
    parser.add_argument("--vocab-size", type=int, default=1024, help="of the tokenizer that both use; default 1024")
    parser.add_argument("--repeats", type=int, default=5, help="rounds; default 5")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        texts = write_corpus(arguments.source, arguments.megabytes, folder)
        megabytes = sum(len(text.encode()) for text in texts) / 1e6
        tokenizer = folder / "tokenizer.model"
        tokenizer.write_bytes(build_dataset.train_tokenizer(iter(texts[:20_000]), arguments.vocab_size))
        print(f"{arguments.source}: {len(texts):,} documents, {megabytes:.1f} MB of text; median (least to most) of"
              f" {arguments.repeats} rounds")
        plain, built = {count: [] for count in arguments.workers}, {count: [] for count in arguments.workers}
        for _ in range(arguments.repeats):
            for count in arguments.workers:
                plain[count].append(megabytes / seconds_to_encode(texts, tokenizer, count))
                built[count].append(megabytes / seconds_to_build(folder, tokenizer, count) / count)
        for count in arguments.workers:
            ratios = [ours / theirs for ours, theirs in zip(built[count], plain[count])]
            print(f"  on {count} cores: plain encoding, MB/s a core        {spread(plain[count])}")
            print(f"              building, MB/s a core              {spread(built[count])}")
            print(f"              building over plain, pair by pair  {spread(ratios)}")
        if megabytes < 100:
            print("  under 100 MB, starting up and settling down weigh on these figures")
        for corpus, share in (("quarter", 0.25), ("all", 1.0)):
            peak = peak_megabytes(folder, corpus, tokenizer, max(arguments.workers))
            print(f"  memory of the largest process, {share * megabytes:6.1f} MB of text   {peak:8.0f} MB")


if __name__ == "__main__":
    main()
