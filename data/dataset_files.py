"""What the tools of this folder share: the data set as files, and how they talk to a person.

A data set is a folder of shards, fineweb_train_*.bin and fineweb_val_*.bin, and a manifest.json that says where it came
from and lists "files": their bytes and SHA-256, by path relative to the folder. The manifest is written last.
"""
import argparse
import concurrent.futures
import errno
import hashlib
import itertools
import json
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import sentencepiece as spm

DATA = Path(__file__).resolve().parent
sys.path.insert(0, str(DATA.parent))
from train_gpt import SHARD_HEADER_INTS, SHARD_MAGIC, SHARD_VERSION, UserError  # noqa: E402

PROGRESS_SECONDS = 2.0
MAX_MODEL_BYTES = 1 << 24  # 65536 pieces take a few MB; loaded, some can take ten times as many
MAX_JSON_BYTES = 1 << 22  # a manifest of 30,000 files; parsed, it can take twenty times as many
SHARD_HEADER_BYTES = 4 * SHARD_HEADER_INTS


class Progress:
    """Prints a line every PROGRESS_SECONDS, so that no phase looks hung. Bytes, where there are any, give the rate."""

    def __init__(self, phase: str, total_bytes: int = 0):
        self.phase, self.total_bytes, self.started = phase, total_bytes, time.monotonic()
        self.printed = self.started

    def update(self, message: str, done_bytes: int = 0) -> None:
        now = time.monotonic()
        if now - self.printed < PROGRESS_SECONDS:
            return
        self.printed, seconds = now, now - self.started
        if self.total_bytes:
            share = done_bytes / self.total_bytes
            left = f", {seconds * (1 - share) / share:,.0f} s left" if share else ""
            message += f", {100 * share:.0f} % of {self.total_bytes / 1e6:,.0f} MB{left}"
        rate = f", {done_bytes / 1e6 / seconds:,.1f} MB/s" if done_bytes else ""
        print(f"{self.phase}: {message}{rate} ({seconds:.0f} s)", flush=True)

    def done(self, message: str) -> None:
        print(f"{self.phase}: {message} in {time.monotonic() - self.started:.1f} s", flush=True)


class ArgumentParser(argparse.ArgumentParser):
    """Reports a bad command line as every other error: one line, status 1."""

    def __init__(self, **options):
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, **options)

    def error(self, message: str):
        raise UserError(f"{message}; see --help")


def run_tool(tool: Callable[[], int]) -> int:
    """The exit status of a tool's work; a problem that a person can solve becomes one line on stderr, and 1."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # names of files may not be printable
            stream.reconfigure(errors="backslashreplace")
    try:
        return tool()
    except UserError as error:
        problem = str(error)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            problem = f"no space left for {error.filename or 'a file'}: make room or use another disk, then run again"
        else:
            problem = str(error)
    except KeyboardInterrupt:
        problem = "interrupted"
    except concurrent.futures.BrokenExecutor:
        problem = "a worker process was killed, most likely for want of memory: run again with fewer --workers"
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in problem.replace("\n", " "))
    print(f"error: {shown}", file=sys.stderr)  # a stranger's file names may hold what commands a terminal
    return 1


def add_workers_option(parser: argparse.ArgumentParser) -> None:
    cores = len(os.sched_getaffinity(0))
    parser.add_argument("--workers", type=int, default=cores, help=f"processes, default {cores}, one a core; the result"
                        " does not depend on it")


def check_range(option: str, value: int | None, largest: int, smallest: int = 1) -> None:
    if value is not None and not smallest <= value <= largest:
        raise UserError(f"{option} {value}: must be from {smallest} to {largest}")


_function: Callable | None = None  # of a worker process, see in_order


def _adopt(function: Callable, parent: int) -> None:
    """Makes a worker process ready: the interrupt key is its parent's business, and without a parent it ends."""
    def end_with_parent() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    global _function
    _function = function
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=end_with_parent, daemon=True).start()


def _run(task):
    return _function(task)


def in_order(function: Callable, tasks: Iterable, workers: int) -> Iterator:
    """function(task) of every task, in order, from so many processes. They get the function once. Unlike Executor.map,
    which starts all tasks, this has few started, so that no more results than those are held in memory."""
    tasks, running = iter(tasks), deque()
    # Forked, also where Python would start workers otherwise: they share what is loaded, and are this one's children.
    with concurrent.futures.ProcessPoolExecutor(workers, multiprocessing.get_context("fork"), _adopt,
                                                (function, os.getpid())) as pool:
        try:
            while True:
                for task in itertools.islice(tasks, 2 * workers - len(running)):
                    running.append(pool.submit(_run, task))
                if not running:
                    return
                yield running.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)


def shard_paths(folder: Path, split: str) -> list[Path]:
    return sorted(folder.glob(f"fineweb_{split}_*.bin"))


def shard_header(tokens: int) -> bytes:
    """256 little-endian int32: magic, version, number of tokens, zeros. Then come that many little-endian uint16."""
    header = np.zeros(SHARD_HEADER_INTS, "<i4")
    header[:3] = SHARD_MAGIC, SHARD_VERSION, tokens
    return header.tobytes()


def count_shard_tokens(path: Path) -> int:
    """The number of tokens of a whole shard, from its header and size. Raises UserError for anything else."""
    if not path.is_file():  # a pipe would be waited for
        raise UserError(f"{path}: no file: get it again")
    with open(path, "rb") as file:
        header, size = file.read(SHARD_HEADER_BYTES), path.stat().st_size
    magic, version, tokens = np.frombuffer(header.ljust(SHARD_HEADER_BYTES, b"\0"), "<i4")[:3].tolist()
    if (magic, version) != (SHARD_MAGIC, SHARD_VERSION) or tokens < 1 or size != SHARD_HEADER_BYTES + 2 * tokens:
        raise UserError(f"{path}: {size} bytes, header {magic}, {version}, {tokens}: no whole shard (magic"
                        f" {SHARD_MAGIC}, version {SHARD_VERSION}, tokens = (bytes - 1024) / 2): get it again")
    return tokens


def file_entry(path: Path) -> dict:
    with open(path, "rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def file_entries(paths: list[Path], threads: int) -> dict[Path, dict]:
    """file_entry of each, hashed in threads."""
    progress, entries = Progress("hashing"), {}
    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        for path, entry in zip(paths, pool.map(file_entry, paths), strict=True):
            entries[path] = entry
            progress.update(f"{len(entries)} of {len(paths)} files", sum(each["bytes"] for each in entries.values()))
    return entries


def listed_name(folder: Path, path: Path) -> str:
    """How the folder's manifest names a file. Links on the way to either are followed, as the system will do."""
    return os.path.relpath(os.path.realpath(path), os.path.realpath(folder))


def listed_path(folder: Path, name: str) -> Path:
    """The file that the folder's manifest names."""
    return Path(os.path.normpath(os.path.join(os.path.realpath(folder), name)))


def write_aside(path: Path, content: bytes) -> None:
    """Write under another name, then rename, so that path is never half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(path.name + ".partial")
    aside.write_bytes(content)
    aside.replace(path)


def write_manifest(folder: Path, manifest: dict) -> None:
    write_aside(folder / "manifest.json", json.dumps(manifest, indent=1).encode())


def load_model(path: Path) -> spm.SentencePieceProcessor | None:
    """The SentencePiece model that is there, of pieces that are text, or None."""
    try:
        if not path.is_file() or not 0 < path.stat().st_size <= MAX_MODEL_BYTES:  # a pipe, a device: without end
            return None
        model = spm.SentencePieceProcessor(model_proto=path.read_bytes())
        model.id_to_piece(list(range(model.vocab_size())))
        return model
    except (OSError, RuntimeError, UnicodeError):  # the last also if an error quotes a piece that is no UTF-8
        return None


def load_json(path: Path) -> object:
    """What a file of JSON holds; None if it is none. Pipes and devices, which may have no end, are not read."""
    try:
        return json.loads(path.read_text()) if path.is_file() and path.stat().st_size <= MAX_JSON_BYTES else None
    except (OSError, ValueError, RecursionError):
        return None


def read_manifest(folder: Path) -> dict | None:
    """The manifest of a data set; None if there is none of ours, whatever else lies there."""
    try:
        manifest = load_json(folder / "manifest.json")
        whole = all(isinstance(entry["bytes"], int) and isinstance(entry["sha256"], str) and "\0" not in name
                    and len(os.fsencode(name)) < 4096 for name, entry in manifest["files"].items())
        return manifest if whole else None
    except (KeyError, TypeError, AttributeError, UnicodeError):
        return None
