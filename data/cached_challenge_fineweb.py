"""Download the challenge's published token shards, every one checked. A rerun goes on where the last one stopped.

    python data/cached_challenge_fineweb.py --variant sp1024                      80 training shards, all of validation
    python data/cached_challenge_fineweb.py --variant sp1024 --train-shards 10    the first 10
    python data/cached_challenge_fineweb.py --variant sp1024 --with-docs          and the documents themselves, 48 GB

Options, environment variables and local layout are those of the challenge's own downloader: shards go to
data/datasets/fineweb10B_VARIANT/, tokenizers to data/tokenizers/, the publisher's list to data/manifest.json. Beside
the shards it leaves a manifest.json of its own, for data/verify.py: where they came from, bytes and SHA-256 of each.

A file is fetched in ranges to a hidden .part beside its place, compared with the hub's size and digest, checked as a
shard, and only then renamed. Run it again after a kill at any moment. MATCHED_FINEWEB_REPO_ID and
MATCHED_FINEWEB_REMOTE_ROOT_PREFIX choose another export; HF_TOKEN, HF_ENDPOINT and so on are huggingface_hub's.
"""
import argparse
import concurrent.futures
import fcntl
import hashlib
import os
import re
import shlex
import shutil
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from dataset_files import (
    DATA,
    PROGRESS_SECONDS,
    ArgumentParser,
    Progress,
    UserError,
    check_range,
    count_shard_tokens,
    file_entry,
    listed_name,
    listed_path,
    load_json,
    load_model,
    read_manifest,
    run_tool,
    write_manifest,
)
from huggingface_hub import HfApi, constants, hf_hub_url
from huggingface_hub.utils import HfHubHTTPError, build_hf_headers, get_session, hf_raise_for_status

DEFAULT_TRAIN_SHARDS = 80
DOCUMENTS = ("docs_selected.jsonl", "docs_selected.source_manifest.json")
# Held in memory by each thread, and lost at most by each when killed. Ranges grow from the first to the second size
# while each takes less than a second: few requests on a fast line, progress and a quick stop on a slow one.
RANGE_BYTES = (1_000_000, 32_000_000)
LISTING_PATHS = 500  # that the hub is asked about at once
RETRY_SECONDS = (1, 2, 4, 8, 16)
TRANSIENT_STATUS = {408, 429, 500, 502, 503, 504}
# The base class of all errors of the HTTP library that the installed huggingface_hub uses (requests, httpx or httpx2).
TransportError = [base for base in HfHubHTTPError.__mro__ if base.__module__ != "builtins"][-1]


class ShortAnswer(Exception):
    """The server sent fewer bytes than it was asked for."""


class Export(NamedTuple):
    """A published export, at one revision, and where its files go."""
    repo_id: str
    prefix: str  # folder of the export in the repository, "" for its root
    folder: Path  # "data" of this repository

    def remote(self, relative: str) -> str:
        return f"{self.prefix}/{relative}" if self.prefix else relative

    def __str__(self) -> str:
        return f"{self.repo_id} on {constants.ENDPOINT}"


class Item(NamedTuple):
    """A file to fetch."""
    relative: str  # to the export, and to the local folder
    path: Path
    size: int  # bytes
    algorithm: str  # "sha256" of a large file, "git" (SHA-1 with git's header) of a small one
    digest: str

    @property
    def part(self) -> Path:
        """Named after the content: what was fetched of another version is never gone on with."""
        return self.path.with_name(f".{self.path.name}.{self.digest[:16]}.part")

    def is_content_of(self, path: Path) -> bool:
        if not path.is_file() or path.stat().st_size != self.size:
            return False
        with open(path, "rb") as file:
            if self.algorithm == "sha256":
                return hashlib.file_digest(file, "sha256").hexdigest() == self.digest
            return hashlib.sha1(b"blob %d\0" % self.size + file.read()).hexdigest() == self.digest


# ---- The hub ----

def patiently(call: Callable, stop: threading.Event):
    """call(), repeated with growing pauses while the trouble is of a kind that passes."""
    for seconds in (*RETRY_SECONDS, None):
        try:
            return call()
        except (TransportError, ShortAnswer) as problem:
            error = problem
            status = getattr(getattr(error, "response", None), "status_code", None)
            if seconds is None or stop.is_set() or status not in {None, *TRANSIENT_STATUS}:
                raise
        print(f"{type(error).__name__}{f' {status}' if status else ''}: trying again in {seconds} s", flush=True)
        stop.wait(seconds)


def remedy(export: Export, error: Exception) -> str:
    """What a failed request means, in one line."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    first_line = " ".join(str(error).split())[:200]
    if status in (401, 403, 404):
        return (f"{export}: no such dataset, or it is private ({status}): set MATCHED_FINEWEB_REPO_ID to a public one,"
                " or HF_TOKEN to a token that may read it")
    if status:
        return f"{export}: answers {status} again and again: run again later, it goes on from here"
    return (f"{export}: cannot be reached ({type(error).__name__}: {first_line}): check the network, HF_ENDPOINT and"
            " proxy, then run again, it goes on from here")


class Hub:
    """The files of an export at its newest revision."""

    def __init__(self, export: Export):
        self.export, self.stop, self.api = export, threading.Event(), HfApi()
        self.revision = self.ask(lambda: self.api.repo_info(export.repo_id, repo_type="dataset")).sha

    def ask(self, call: Callable):
        """A question to the hub's API. Raises UserError for an answer that is none."""
        try:
            return patiently(call, self.stop)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:  # of parsing anything else
            raise UserError(f"{self.export}: not a valid name of a dataset, or no hub answers there ({error!r}): check"
                            " MATCHED_FINEWEB_REPO_ID and HF_ENDPOINT") from None

    def items(self, relatives: list[str]) -> list[Item]:
        """Size and digest of files. Raises UserError if one is not there."""
        found = {}
        for start in range(0, len(relatives), LISTING_PATHS):
            paths = [self.export.remote(relative) for relative in relatives[start:start + LISTING_PATHS]]
            listing = self.ask(lambda paths=paths: self.api.get_paths_info(
                self.export.repo_id, paths, revision=self.revision, repo_type="dataset"))
            found.update((str(entry.path), entry) for entry in listing if hasattr(entry, "size"))  # a folder has none
        items = []
        for relative in relatives:
            remote = self.export.remote(relative)
            if remote not in found:
                raise UserError(f"{self.export} has no {remote}: ask for what it has (fewer --train-shards, another"
                                " --variant), or set MATCHED_FINEWEB_REMOTE_ROOT_PREFIX")
            entry = found[remote]
            algorithm, digest = ("sha256", entry.lfs.sha256) if entry.lfs else ("git", entry.blob_id)
            # The digest becomes part of a file's name, the size a loop's end.
            plain_size = type(entry.size) is int and 0 <= entry.size < 2**50
            if not plain_size or not re.fullmatch("[0-9a-f]{40,64}", str(digest)):
                raise UserError(f"{self.export}: lists {remote} with size {str(entry.size)[:20]} and digest"
                                f" {str(digest)[:20]}: tell its owner")
            items.append(Item(relative, self.export.folder / relative, entry.size, algorithm, digest))
        return items

    def read(self, item: Item, start: int, end: int) -> bytes:
        """Bytes [start, end) of a file."""
        def request() -> bytes:
            headers = {**build_hf_headers(), "Range": f"bytes={start}-{end - 1}", "Accept-Encoding": "identity"}
            response = get_session().get(url, headers=headers, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT)
            hf_raise_for_status(response)
            content = response.content if response.status_code == 206 else response.content[start:end]  # no ranges
            if len(content) != end - start:
                raise ShortAnswer(f"{len(content)} bytes of {item.relative} from {start} on, not {end - start}")
            return content

        url = hf_hub_url(self.export.repo_id, self.export.remote(item.relative), repo_type="dataset",
                         revision=self.revision)
        return patiently(request, self.stop)


# ---- Fetching ----

class Fetcher:
    """Fetches files, several at once, to their parts and then to their places."""

    def __init__(self, hub: Hub):
        self.hub, self.stop, self.lock, self.fetched = hub, hub.stop, threading.Lock(), 0

    def fetch(self, item: Item) -> None:
        """Raises UserError if what comes is not what the hub lists, or no shard."""
        item.path.parent.mkdir(parents=True, exist_ok=True)
        for old in item.path.parent.glob(f".{item.path.name}.*.part"):
            if old != item.part:
                old.unlink()
        with open(item.part, "ab") as part:
            try:
                fcntl.flock(part, fcntl.LOCK_EX | fcntl.LOCK_NB)
                others = not os.path.samestat(os.fstat(part.fileno()), os.stat(item.part))
            except (BlockingIOError, FileNotFoundError):
                others = True
            if others:  # or was, a moment ago: this may be the finished file, renamed since it was opened
                raise UserError(f"{item.path}: another download is writing it: run again when that one has ended")
            for attempt in range(2):
                self.append_rest(item, part)
                if self.stop.is_set():
                    return
                if item.is_content_of(item.part):
                    break
                part.truncate(0)
            else:
                raise UserError(f"{item.path.name}: what {self.hub.export} sends is not what it lists"
                                f" ({item.algorithm} {item.digest[:16]}…), twice: run again later, or tell its owner")
            if item.path.suffix == ".bin":
                count_shard_tokens(item.part)
            item.part.replace(item.path)

    def append_rest(self, item: Item, part) -> None:
        """Appends to the part what it lacks, until stop is set."""
        try:
            if part.tell() > item.size:
                part.truncate(0)
            position, (size, largest) = part.seek(0, os.SEEK_END), RANGE_BYTES
            while position < item.size:
                if self.stop.is_set():
                    return
                started = time.monotonic()
                content = self.hub.read(item, position, min(position + size, item.size))
                part.write(content)
                part.flush()
                with self.lock:
                    self.fetched += len(content)
                position += len(content)
                if time.monotonic() - started < 1:
                    size = min(2 * size, largest)
            os.fsync(part.fileno())
        except OSError as error:
            if error.filename is None:  # write and fsync do not name the file
                error.filename = item.part
            raise

    def fetch_all(self, items: list[Item], threads: int) -> None:
        """Fetches what is missing, with a line of progress now and then. Raises the first error, by order of items."""
        missing = sum(item.size - (item.part.stat().st_size if item.part.exists() else 0) for item in items)
        check_free_space(items, missing, self.hub.export.folder)
        progress = Progress("downloading", missing)
        pool = concurrent.futures.ThreadPoolExecutor(threads)
        running = [pool.submit(self.fetch, item) for item in items]
        try:
            while True:
                done, waiting = concurrent.futures.wait(running, PROGRESS_SECONDS, concurrent.futures.FIRST_EXCEPTION)
                if any(future.exception() for future in done) or not waiting:
                    break
                progress.update(f"{len(done)} of {len(items)} files", self.fetched)
        finally:
            self.stop.set()
            pool.shutdown(cancel_futures=True)
        for future in running:
            if not future.cancelled():
                future.result()
        seconds = max(1e-9, time.monotonic() - progress.started)
        progress.done(f"{len(items)} files, {missing / 1e6:,.1f} MB, {missing / 1e6 / seconds:,.1f} MB/s")


def check_free_space(items: list[Item], missing: int, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if missing > free:
        largest = max(item.size for item in items)
        raise UserError(f"{folder}: {missing / 1e9:.2f} GB to download, {free / 1e9:.2f} GB free: make room, link data/"
                        f" to a larger disk, or ask for about {-((free - missing) // largest)} --train-shards less")


# ---- What to fetch ----

class Plan(NamedTuple):
    """Files of a variant, by the publisher's manifest, relative to the export."""
    dataset: str  # folder under datasets/
    shards: list[str]
    tokenizer: list[str]
    documents: list[str]

    @property
    def files(self) -> list[str]:
        return [*self.tokenizer, *self.shards, *self.documents]


def make_plan(manifest: object, export: Export, arguments: argparse.Namespace) -> Plan:
    """Raises UserError if the manifest does not hold what is asked for, or is not what this tool can read."""
    name = f"fineweb10B_{arguments.variant}"
    try:
        datasets = {entry["name"]: entry for entry in manifest["datasets"]}
        if name not in datasets:
            known = ascii(", ".join(sorted(each.removeprefix("fineweb10B_") for each in datasets)))[1:-1]
            raise UserError(f"--variant {arguments.variant}: {export} has {known}: choose one, or set"
                            " MATCHED_FINEWEB_REPO_ID to a repository that has it")
        stats, tokenizer_name = datasets[name]["stats"], datasets[name]["tokenizer_name"]
        train, val = int(stats["files_train"]), int(stats["files_val"])
        (tokenizer,) = [entry for entry in manifest["tokenizers"] if entry["name"] == tokenizer_name]
        paths = [str(tokenizer[key]) for key in ("model_path", "vocab_path", "path") if tokenizer.get(key)]
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise UserError(f"manifest.json of {export}: not as the challenge writes it ({error!r}): set"
                        " MATCHED_FINEWEB_REPO_ID and MATCHED_FINEWEB_REMOTE_ROOT_PREFIX to an export") from None
    for path in paths:  # a stranger's list must not choose where on this disk we write
        if not re.fullmatch(r"tokenizers(/\w[\w.+-]*)+", path, re.ASCII):
            raise UserError(f"manifest.json of {export}: tokenizer file {path[:99]!r} is not a plain name under"
                            " tokenizers/: set MATCHED_FINEWEB_REPO_ID to another export")
    wanted = min(train, DEFAULT_TRAIN_SHARDS) if arguments.train_shards is None else arguments.train_shards
    if not 0 <= wanted <= train or not 0 < val < 10**6:
        raise UserError(f"--train-shards {wanted}: {export} has {train} training and {val} validation shards of"
                        f" {arguments.variant}: ask for at most {train}")
    shards = [f"datasets/{name}/fineweb_{split}_{number:06d}.bin"
              for split, count in (("val", val), ("train", wanted)) for number in range(count)]
    return Plan(name, shards, list(dict.fromkeys(paths)), list(DOCUMENTS) if arguments.with_docs else [])


def recorded_files(export: Export, dataset: str) -> dict[str, dict]:
    """What an earlier run checked and left: the "files" of its manifest, by absolute path, as far as they are there in
    full size."""
    folder = export.folder / "datasets" / dataset
    manifest = read_manifest(folder) or {}
    downloaded = manifest.get("downloaded")
    if not isinstance(downloaded, dict) or (downloaded.get("repo_id"), downloaded.get("prefix")) != export[:2]:
        return {}
    entries = {str(listed_path(folder, name)): entry for name, entry in manifest["files"].items()}
    return {path: entry for path, entry in entries.items()
            if os.path.isfile(path) and os.path.getsize(path) == entry["bytes"]}


def local_plan(export: Export, arguments: argparse.Namespace) -> Plan | None:
    """The plan by the publisher's manifest that is here already, if it is of use. Raises UserError if it has to be."""
    path = export.folder / "manifest.json"
    if arguments.skip_manifest and not path.is_file():
        raise UserError(f"--skip-manifest: no {path} here: run without it")
    try:
        return make_plan(load_json(path), export, arguments)
    except UserError:
        if arguments.skip_manifest:
            raise
        return None


def download(export: Export, arguments: argparse.Namespace) -> Plan:
    """Fetches what the arguments ask for and is not there yet. Raises UserError."""
    plan = local_plan(export, arguments)
    if plan:
        recorded = recorded_files(export, plan.dataset)
        if all(os.path.realpath(export.folder / relative) in recorded for relative in plan.files):
            print(f"{export.folder / 'datasets' / plan.dataset}: complete, nothing to do")
            return plan
    hub = Hub(export)
    if not arguments.skip_manifest:
        (item,) = hub.items(["manifest.json"])
        if not item.is_content_of(item.path):
            Fetcher(hub).fetch(item)
    plan = make_plan(load_json(export.folder / "manifest.json"), export, arguments)
    items, recorded = hub.items(plan.files), recorded_files(export, plan.dataset)
    missing, progress = [], Progress("checking files that are here")
    for item in items:
        here = recorded.get(os.path.realpath(item.path), {})
        if item.digest != here.get("sha256") and not item.is_content_of(item.path):
            missing.append(item)
        progress.update(item.relative)
    Fetcher(hub).fetch_all(missing, arguments.workers)
    record(hub, plan, items, recorded)
    return plan


def record(hub: Hub, plan: Plan, items: list[Item], recorded: dict[str, dict]) -> None:
    """Writes the data set's own manifest: what is there and where it came from."""
    export = hub.export
    folder = export.folder / "datasets" / plan.dataset
    entries = dict(recorded)
    for item in items:
        known = {"bytes": item.size, "sha256": item.digest} if item.algorithm == "sha256" else file_entry(item.path)
        entries[os.path.realpath(item.path)] = known
    files = {listed_name(folder, path): entry for path, entry in sorted(entries.items())}
    downloaded = {"endpoint": constants.ENDPOINT, "repo_id": export.repo_id, "prefix": export.prefix,
                  "revision": hub.revision}
    write_manifest(folder, {"downloaded": downloaded, "files": files})


# ---- Command line ----

def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("positional_train_shards", nargs="?", type=int, help=argparse.SUPPRESS)  # as the challenge's
    parser.add_argument("--variant", default="sp1024", help="tokenizer family, for example sp1024 (default), sp4096")
    parser.add_argument("--train-shards", type=int, help="training shards, from the first on; default"
                        f" {DEFAULT_TRAIN_SHARDS}, or all there are if fewer")
    parser.add_argument("--skip-manifest", action="store_true", help="use the data/manifest.json that is here")
    parser.add_argument("--with-docs", action="store_true", help="also the documents, to build other shards from")
    parser.add_argument("--workers", type=int, default=8, help="files fetched at once, default 8")
    arguments = parser.parse_args(argv)
    if arguments.positional_train_shards is not None:
        arguments.train_shards = arguments.positional_train_shards
    check_range("--train-shards", arguments.train_shards, 10**6, smallest=0)
    check_range("--workers", arguments.workers, 64)
    if not re.fullmatch(r"\w[\w.-]*", arguments.variant):
        raise UserError(f"--variant {arguments.variant}: must be letters, digits, _ . -, for example sp1024")
    return arguments


def run(argv: list[str], folder: Path) -> int:
    arguments = parse_arguments(argv)
    export = Export(os.environ.get("MATCHED_FINEWEB_REPO_ID", "willdepueoai/parameter-golf"),
                    os.environ.get("MATCHED_FINEWEB_REMOTE_ROOT_PREFIX", "datasets").strip("/"), folder)
    try:
        plan = download(export, arguments)
    except (TransportError, ShortAnswer) as error:
        raise UserError(remedy(export, error)) from None
    data_path = shlex.quote(str(folder / "datasets" / plan.dataset))
    print(f"{len(plan.shards)} shards; check them with: python data/verify.py {data_path}")
    models = [folder / file for file in plan.tokenizer if file.endswith(".model")]
    if models:
        model = load_model(models[0])
        if model is None:
            raise UserError(f"{models[0]}: what {export} has there is no SentencePiece model: tell its owner")
        print(f"DATA_PATH={data_path} TOKENIZER_PATH={shlex.quote(str(models[0]))} VOCAB_SIZE={model.vocab_size()}")
    else:
        print(f"note: {arguments.variant} has no SentencePiece model, which train_gpt.py needs")
    return 0


def main(argv: list[str], folder: Path = DATA) -> int:
    """Exit status: 0, or 1 after one line on stderr."""
    return run_tool(lambda: run(argv, folder))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
