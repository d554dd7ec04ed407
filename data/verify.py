"""Check a data set before money is spent on it: everything train_gpt.py checks at its start, and what it cannot afford.

    python data/verify.py data/datasets/fineweb10B_sp1024
    python data/verify.py FOLDER --tokenizer FILE.model      if the folder's manifest.json names none

Every file has the bytes and SHA-256 of the manifest; every shard is whole; every token id is of the tokenizer; a bos
token starts each document; tokens, documents and bytes are as many as the manifest says; a sample of documents decodes
to as many bytes as the score counts, and encodes to the same tokens again; no document of validation is in training.
Prints a line for each, and ends with status 1 if one fails.
"""
import hashlib
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from dataset_files import (
    SHARD_HEADER_BYTES,
    ArgumentParser,
    Progress,
    UserError,
    add_workers_option,
    check_range,
    count_shard_tokens,
    file_entries,
    in_order,
    listed_path,
    load_model,
    read_manifest,
    run_tool,
    shard_paths,
)

from train_gpt import Config, TokenBytes, TokenStream, load_tokenizer

SAMPLE_DOCUMENTS = 200  # decoded, of each shard
COUNT_TOKENS = 1 << 22  # at once


class Report:
    """Prints findings as they come, and remembers whether one was bad."""

    def __init__(self):
        self.failed = False

    def __call__(self, good: bool, text: str, otherwise: str, merely: bool = False) -> None:
        """Prints text if good, else otherwise, which fails the data set unless it is merely worth knowing."""
        self.failed |= not (good or merely)
        print(f"  {'ok  ' if good else 'note' if merely else 'FAIL'}  {text if good else otherwise}", flush=True)

    def succeeds(self, check: Callable[[], object], text: str) -> bool:
        """Whether a check raises no UserError; what it raises is a finding like others."""
        try:
            check()
        except UserError as error:
            self(False, text, str(error))
            return False
        self(True, text, "")
        return True


# ---- One shard, in a worker process

class Scan(NamedTuple):
    """What a shard holds. Its first document begins in the shard before, its last one may go on in the next."""
    tokens: int
    highest: int  # token id
    documents: int  # bos tokens
    empty: int  # of them, followed by another bos
    text_bytes: int  # as train_gpt.py counts them; 0 if an id is out of range
    sampled: int  # documents decoded
    miscounted: str  # an example of one that does not decode to what is counted, or ""
    recoded: int  # documents decoded that encode to the same tokens again
    head: bytes  # uint16 tokens before the first bos
    tail: bytes  # from the last bos on
    digests: list[bytes]  # of the documents from the first bos to the last, if this is validation
    in_validation: int  # of the documents from the first bos to the last, if this is training


class Scanner(NamedTuple):
    """Scans shards of training, or, while there are no digests of it yet, of validation."""
    config: Config
    val_digests: frozenset[bytes] | None

    def __call__(self, task: tuple[Path, int]) -> Scan:
        """Of (shard, last token before it)."""
        path, previous = task
        tokenizer = load_tokenizer(self.config)
        tokens = np.memmap(path, "<u2", "r", SHARD_HEADER_BYTES)
        highest, starts = int(tokens.max()), np.flatnonzero(tokens == tokenizer.bos_id()).tolist()
        documents = [tokens[start:end] for start, end in zip(starts[:-1], starts[1:])]
        text_bytes, sampled, miscounted, recoded = 0, 0, "", 0
        if highest < self.config.vocab_size:
            token_bytes = TokenBytes(tokenizer)
            for start in range(0, len(tokens), COUNT_TOKENS):
                part = np.concatenate(([previous], tokens[start:start + COUNT_TOKENS]))
                text_bytes, previous = text_bytes + int(token_bytes.count(part).sum()), part[-1]
            for document in documents[::max(1, len(documents) // SAMPLE_DOCUMENTS)]:
                text, counted = tokenizer.decode(document[1:].tolist()), int(token_bytes.count(document).sum())
                sampled += 1
                recoded += tokenizer.encode(text) == document[1:].tolist()
                if counted != len(text.encode()):
                    miscounted = f"{text[:40]!r} counts {counted} bytes but decodes to {len(text.encode())}"
        digests = [digest_of(document) for document in documents if len(document) > 1]
        is_val = self.val_digests is None
        head, tail = (tokens[:starts[0]], tokens[starts[-1]:]) if starts else (tokens, tokens[:0])
        return Scan(len(tokens), highest, len(starts), len(documents) - len(digests), text_bytes, sampled, miscounted,
                    recoded, head.tobytes(), tail.tobytes(),
                    digests if is_val else [], 0 if is_val else sum(each in self.val_digests for each in digests))


def digest_of(document: np.ndarray | bytes) -> bytes:
    """Of its uint16 tokens, bos included."""
    return hashlib.blake2b(document, digest_size=16).digest()


# ---- The data set

def check_files(report: Report, folder: Path, manifest: dict | None, workers: int) -> None:
    """Every file of the manifest is there as listed, and no shard is that is not listed."""
    if manifest is None:
        report(False, "", "manifest.json does not list files as our tools do: get or build the data set again"
               if (folder / "manifest.json").exists() else "no manifest.json: no SHA-256 to check",
               merely=not (folder / "manifest.json").exists())
        return
    paths = {name: listed_path(folder, name) for name in manifest["files"]}
    missing = [name for name, path in paths.items() if not path.is_file()]
    report(not missing, "no listed file is missing", f"missing: {shown(missing)}: get or build it again")
    # Only what has the listed bytes is read: a stranger's manifest can name any file of this machine.
    same_size = [path for name, path in paths.items()
                 if path.is_file() and path.stat().st_size == manifest["files"][name]["bytes"]]
    found = file_entries(same_size, workers)
    changed = [name for name, path in paths.items() if path.is_file() and found.get(path) != manifest["files"][name]]
    report(not changed, f"{len(found)} files have the bytes and SHA-256 listed",
           f"not as listed: {shown(changed)}: get or build it again")
    stray = [path.name for path in sorted(folder.glob("fineweb_*.bin")) if path not in paths.values()]
    report(not stray, "no shard is unlisted", f"unlisted, and yet train_gpt.py would read: {shown(stray)}")


def shown(names: list[str]) -> str:
    """The first few of names that may be a stranger's."""
    return ", ".join(ascii(name)[1:-1] for name in names[:5])


def check_shards(report: Report, split: str, config: Config) -> bool:
    """Whether the split can be read at all: each shard by itself, then as train_gpt.py's start-up opens them."""
    paths = shard_paths(Path(config.data_path), split)
    broken = [path for path in paths if not report_whole(report, path)]
    if broken:
        return False
    if not report.succeeds(lambda: TokenStream(config, split), f"{split}: train_gpt.py opens the {len(paths)} shards"):
        return bool(paths)
    expected = [f"fineweb_{split}_{number:06d}.bin" for number in range(len(paths))]
    report([path.name for path in paths] == expected, f"{split}: shards are numbered from 0 on without gaps",
           f"{split}: shards are numbered from {paths[0].name} to {paths[-1].name}, with gaps", merely=True)
    return True


def report_whole(report: Report, path: Path) -> bool:
    """Whether a shard is whole; only one that is not is reported."""
    try:
        count_shard_tokens(path)
    except (UserError, OSError) as error:
        report(False, "", str(error))
        return False
    return True


def check_split(report: Report, split: str, config: Config, val_digests: frozenset[bytes] | None, workers: int,
                ) -> tuple[dict[str, int], frozenset[bytes], int]:
    """Reports on a split; returns its counts, the digests of its documents if it is validation, and how many of them
    are in validation if it is training."""
    paths, bos = shard_paths(Path(config.data_path), split), load_tokenizer(config).bos_id()
    before = [bos, *(int(np.memmap(path, "<u2", "r", SHARD_HEADER_BYTES)[-1]) for path in paths[:-1])]
    counts = dict(documents=0, tokens=0, normalised_bytes=0)
    highest, sampled, recoded, miscounted, empty = 0, 0, 0, "", 0
    digests, in_validation, first, pending, progress = set(), 0, None, b"", Progress(f"reading {split}")

    def complete(document: bytes) -> None:  # one that crossed the end of a shard, or ended with the last one
        nonlocal in_validation, empty
        if len(document) > 2:
            digests.add(digest_of(document))
            in_validation += val_digests is not None and digest_of(document) in val_digests
        empty += len(document) == 2 and counts["documents"] > 0

    for scan in in_order(Scanner(config, val_digests), zip(paths, before), workers):
        first = scan.head[:2] if first is None else first
        if scan.documents:
            complete(pending + scan.head)
            pending = scan.tail
        else:
            pending += scan.head
        digests.update(scan.digests)
        in_validation += scan.in_validation
        counts["documents"] += scan.documents
        counts["tokens"] += scan.tokens
        counts["normalised_bytes"] += scan.text_bytes
        highest, sampled, empty = max(highest, scan.highest), sampled + scan.sampled, empty + scan.empty
        miscounted, recoded = miscounted or scan.miscounted, recoded + scan.recoded
        progress.update(f"{counts['tokens']:,} tokens")
    complete(pending)
    report(highest < config.vocab_size, f"{split}: every token id is below {config.vocab_size}", f"{split}: token id"
           f" {highest} is beyond the tokenizer's {config.vocab_size}: give the tokenizer the shards were made with")
    report(not first, f"{split}: {counts['documents']:,} documents, a bos ({bos}) before each, also before the first",
           f"{split}: does not start with bos ({bos}): the first shard is missing or of another tokenizer")
    report(not empty, f"{split}: no document is empty", f"{split}: {empty:,} documents are empty", merely=True)
    report(not miscounted, f"{split}: the bytes counted for {sampled:,} sampled documents are those they decode to",
           f"{split}: {miscounted}: its BPB would be wrong")
    report(2 * recoded >= sampled, f"{split}: {recoded:,} of them encode to the same tokens again",
           f"{split}: only {recoded:,} of them encode to the same tokens again: the tokenizer is another one")
    return counts, frozenset(digests), in_validation


def check_counts(report: Report, split: str, counts: dict[str, int], manifest: dict | None) -> None:
    found = (f"{split}: {counts['tokens']:,} tokens, {counts['normalised_bytes']:,} bytes of text,"
             f" {counts['normalised_bytes'] / counts['tokens']:.3f} bytes a token")
    if manifest is None or "splits" not in manifest:  # downloaded: the publisher has no such counts
        report(True, found, "")
        return
    splits = manifest["splits"]
    listed = splits.get(split) if isinstance(splits, dict) else None
    listed = listed if isinstance(listed, dict) else {}
    wrong = [f"{counts[name]:,} {name}, not {ascii(listed.get(name))[:20]}" for name in counts
             if counts[name] != listed.get(name)]
    report(not wrong, f"{found}, as the manifest says", f"{split}: {'; '.join(wrong)} as the manifest says")


def verify(folder: Path, tokenizer: Path | None, workers: int) -> bool:
    """Prints the report; returns whether the data set is good. Raises UserError if there is nothing to check."""
    manifest, report = read_manifest(folder), Report()
    models = sorted(name for name in (manifest or {}).get("files", {}) if name.endswith(".model"))
    if tokenizer is None and not models:
        raise UserError(f"{folder}: no manifest.json there that names a tokenizer: give --tokenizer FILE.model")
    tokenizer = tokenizer or listed_path(folder, models[0])
    lengths = {name: value for name, value in os.environ.items() if name == "TRAIN_SEQ_LEN"}  # as train_gpt.py will
    config = Config.from_env({"TRAIN_BATCH_TOKENS": lengths.get("TRAIN_SEQ_LEN", str(Config.train_batch_tokens)),
                              "TTT_CHUNK_TOKENS": lengths.get("TRAIN_SEQ_LEN", str(Config.ttt_chunk_tokens)),
                              "EVAL_STRIDE": lengths.get("TRAIN_SEQ_LEN", str(Config.eval_stride)), **lengths,
                              "DATA_PATH": os.path.realpath(folder), "TOKENIZER_PATH": str(tokenizer),
                              "VOCAB_SIZE": str(count_pieces(tokenizer))})
    print(f"{folder}, tokenizer {shown([str(tokenizer)])}")
    check_files(report, Path(config.data_path), manifest, workers)
    readable = [check_shards(report, split, config) for split in ("val", "train")]
    if all(readable):
        counts, val_digests, _ = check_split(report, "val", config, None, workers)
        check_counts(report, "val", counts, manifest)
        counts, _, in_validation = check_split(report, "train", config, val_digests, workers)
        check_counts(report, "train", counts, manifest)
        # What the challenge published is the official split, whatever is in it: to be known, not to be mended.
        report(not in_validation, f"no training document is one of the {len(val_digests):,} of validation",
               f"{in_validation:,} training documents are in validation, token for token",
               merely="downloaded" in (manifest or {}))
    print("good" if not report.failed else "NOT GOOD: see the lines marked FAIL")
    return not report.failed


def count_pieces(tokenizer: Path) -> int:
    """Of a SentencePiece model that has a bos. Raises UserError."""
    model = load_model(tokenizer)
    if model is None:
        raise UserError(f"{tokenizer}: no SentencePiece model there: give --tokenizer FILE.model")
    if model.bos_id() < 0:
        raise UserError(f"{tokenizer}: has no bos piece: give the tokenizer the shards were made with")
    return model.vocab_size()


def main(argv: list[str]) -> int:
    """Exit status: 0 if the data set is good, else 1."""
    return run_tool(lambda: run(argv))


def run(argv: list[str]) -> int:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="the data set: what DATA_PATH would be")
    parser.add_argument("--tokenizer", type=Path, help="its SentencePiece model; default: the manifest's")
    add_workers_option(parser)
    arguments = parser.parse_args(argv)
    check_range("--workers", arguments.workers, 1024)
    if not arguments.folder.is_dir():
        raise UserError(f"{arguments.folder}: no such folder: build or download a data set first")
    return 0 if verify(arguments.folder, arguments.tokenizer, arguments.workers) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
