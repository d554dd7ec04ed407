"""Build a data set for train_gpt.py: documents -> SentencePiece BPE tokenizer -> token shards. Nothing is downloaded.

    python data/build_dataset.py                       documentation of the packages in requirements.txt
    python data/build_dataset.py --source corpus.jsonl files or folders of .txt, .jsonl, .jsonl.gz, .jsonl.xz,
                                                       .jsonl.zst or .parquet with a "text" string in every line or row
    python data/build_dataset.py --source docs_selected.jsonl --order source --val-docs 50000 --vocab-size 4096
                                                       the challenge's documents, split as it splits them

A folder's .txt files are a document each; a .txt given by itself is cut at blank lines. Documents that are empty or
appear twice are dropped, and so is every training document that reads like one of validation once it is encoded. A
"source" string beside "text" says what the manifest counts a document under; otherwise that is its file's name.

Writes fineweb_train_*.bin and fineweb_val_*.bin (the field's names, whatever the text), the tokenizer and, last, a
manifest.json with counts and checksums. The same sources, arguments and library versions give the same shards and
tokenizer, whatever the number of workers. A data set that an earlier build left in the same place is kept if it is the
one asked for, and replaced if not; one of other origin is an error. Memory does not grow with the corpus beyond a byte
a document; the disk holds the text once more meanwhile.
"""
import concurrent.futures
import contextlib
import fcntl
import hashlib
import importlib.metadata
import io
import itertools
import os
import platform
import re
import shlex
import shutil
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import sentencepiece as spm
import sorted_runs
from dataset_files import (
    DATA,
    PROGRESS_SECONDS,
    ArgumentParser,
    Progress,
    UserError,
    add_workers_option,
    check_range,
    file_entries,
    file_entry,
    in_order,
    listed_name,
    listed_path,
    load_model,
    read_manifest,
    run_tool,
    shard_header,
    write_aside,
    write_manifest,
)
from sorted_runs import (
    END_OF_KEYS,
    MAIN_POOL,
    VAL_POOL,
    Bucket,
    Collector,
    Run,
    cut_at,
    cut_into_buckets,
    drop_duplicates,
    key_of_kept,
    key_of_record,
)
from sources import Source, open_source

from train_gpt import Config, TokenBytes

MANIFEST_FORMAT = 3  # raise it when the same source and arguments would give other bytes
# Validation is one document in 55, which is about 125,000 tokens of the default source with a vocabulary of 1024, and
# never more than the challenge's own 50,000 documents.
VAL_DOCS_FRACTION, VAL_DOCS_MAX = 1 / 55, 50_000
# Four MB of the default source instead of all 16 cost 0.03 % more tokens, one MB 0.3 %; 16 MB train in 3 s.
TOKENIZER_SAMPLE_BYTES = 32_000_000
ENCODE_BATCH_DOCS = 64
MAX_ORIGINS = 1000  # counted one by one in the manifest; more are counted together
OTHER_ORIGINS = "(others)"


class Settings(NamedTuple):
    arguments: dict  # the command line's, as recorded in the manifest: all that decides the bytes
    workers: int
    sources: dict[int, list[Source]]  # VAL_POOL: those of --val-source; MAIN_POOL: those of --source
    tokenizer_model: bytes | None  # None: train one
    out: Path
    tokenizer: Path

    @property
    def partial(self) -> Path:
        """Where everything is written until all is complete. A folder of this name is ours."""
        return self.out / ".build_dataset"


# ---- Collecting and splitting

def collect(settings: Settings, skipped: Counter) -> tuple[list[Run], list[int]]:
    """Every document of the sources in runs on disk, and the number of records in each unit. Raises UserError, for the
    first problem in the order of units."""
    folder = settings.partial / "runs"
    folder.mkdir()
    units = [(pool, unit) for pool in (VAL_POOL, MAIN_POOL) for source in settings.sources[pool]
             for unit in source.units()]
    tasks = ((number, pool, unit) for number, (pool, unit) in enumerate(units))
    collector = Collector(folder, settings.arguments["seed"], settings.arguments["order"])
    runs, records, documents, text_bytes, progress = [], [], 0, 0, Progress("collecting")
    for collected in in_order(collector, tasks, settings.workers):
        runs += collected.runs
        records.append(collected.records)
        skipped.update(collected.skipped)
        documents += sum(run.documents for run in collected.runs)
        text_bytes += sum(run.text_bytes for run in collected.runs)
        progress.update(f"{len(records)} of {len(units)} parts, {documents:,} documents", text_bytes)
    progress.done(f"{documents:,} documents, {text_bytes / 1e6:.1f} MB")
    return runs, records


def split_documents(settings: Settings, runs: list[Run], records: list[int]) -> dict[str, list[Bucket]]:
    """{"val": ..., "train": ...}. Validation is the first --val-docs documents of --val-source (None: all), or else of
    the source (None: the default share). In the order of the source these are the first that many lines, rows or files,
    so that what is left out does not move the cut. Raises UserError if a split is empty."""
    wanted, has_val_source = settings.arguments["val_docs"], bool(settings.sources[VAL_POOL])
    kept = {pool: sum(int(np.count_nonzero(run.rows()["keep"])) for run in runs if run.pool == pool)
            for pool in (VAL_POOL, MAIN_POOL)}
    pool = VAL_POOL if has_val_source else MAIN_POOL
    if has_val_source and (wanted or 1) > kept[VAL_POOL]:
        raise UserError(f"--val-source gives {kept[VAL_POOL]} distinct documents, {wanted or 1} are wanted: give a"
                        " larger one or a smaller --val-docs")
    if not has_val_source:
        wanted = wanted or max(1, min(VAL_DOCS_MAX, round(kept[MAIN_POOL] * VAL_DOCS_FRACTION)))
        if kept[MAIN_POOL] <= wanted:
            raise UserError(f"the source gives {kept[MAIN_POOL]} distinct documents: {wanted} for validation leave none"
                            " to train on; give a larger source (a lone .txt is cut at blank lines only) or a smaller"
                            " --val-docs")
    elif not kept[MAIN_POOL]:
        raise UserError("every document of --source is in --val-source as well: give a larger --source")
    buckets = cut_into_buckets(runs, pool)
    if wanted is None:
        key = END_OF_KEYS
    elif settings.arguments["order"] == "source":
        key = key_of_record(records, wanted)
    else:
        key = key_of_kept(runs, buckets, wanted)
    val, others = cut_at(buckets, key)
    return {"val": val, "train": cut_into_buckets(runs, MAIN_POOL) if has_val_source else others}


# ---- Tokenizer

def tokenizer_sample(runs: list[Run], buckets: list[Bucket]) -> Iterator[str]:
    """Up to TOKENIZER_SAMPLE_BYTES of training documents, from buckets at equal distances."""
    wanted, sample_bytes = -(-TOKENIZER_SAMPLE_BYTES // sorted_runs.BUCKET_BYTES), 0
    step = max(1, len(buckets) // wanted)
    for bucket in buckets[::step]:
        for document in bucket.documents(runs):
            if sample_bytes >= TOKENIZER_SAMPLE_BYTES:
                return
            yield document.encodable
            sample_bytes += len(document.encodable.encode())


def train_tokenizer(sample: Iterator[str], vocab_size: int) -> bytes:
    """A serialised SentencePiece model. Raises UserError if the text cannot fill the vocabulary or needs a larger one.

    Documents go in whole: line breaks are ordinary characters to "nfkc" and find their way into pieces, which saves
    4 % of the tokens.
    """
    progress, model = Progress("tokenizer"), io.BytesIO()
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        training = pool.submit(
            spm.SentencePieceTrainer.train, sentence_iterator=sample, model_writer=model, model_type="bpe",
            vocab_size=vocab_size, hard_vocab_limit=True, byte_fallback=True, split_digits=True,
            normalization_rule_name="nfkc", add_dummy_prefix=False, remove_extra_whitespaces=True,
            pad_id=0, bos_id=1, eos_id=2, unk_id=3, character_coverage=0.9995,
            max_sentence_length=2**30,  # longer documents would be left out
            num_threads=1, minloglevel=2)  # the number of threads is stored in the model, so it is fixed
        while not concurrent.futures.wait([training], timeout=PROGRESS_SECONDS).done:
            progress.update("training")
    try:
        training.result()
    except RuntimeError as error:
        largest = re.search(r"set it to a value <= (\d+)", str(error))
        smallest = re.search(r"smaller than required_chars\. \d+ vs (\d+)", str(error))
        remedy = (f"the text is too small for it: at most {largest[1]}, or give more text" if largest else
                  f"the characters of the text need at least {smallest[1]}" if smallest else str(error))
        raise UserError(f"--vocab-size {vocab_size}: {remedy}") from None
    progress.done(f"{vocab_size} pieces")
    return model.getvalue()


def read_tokenizer(path: str, vocab_size: int | None) -> bytes:
    """The SentencePiece model of --tokenizer, checked. Raises UserError."""
    tokenizer = load_model(Path(path))
    if tokenizer is None:
        raise UserError(f"--tokenizer {path}: no SentencePiece model there: give a .model file")
    pieces = tokenizer.vocab_size()
    if tokenizer.bos_id() < 0 or pieces > 2**16:
        raise UserError(f"--tokenizer {path}: bos id {tokenizer.bos_id()}, {pieces} pieces: shards need a bos piece and"
                        " at most 65536 pieces; train one with --vocab-size instead")
    if vocab_size not in (None, pieces):
        raise UserError(f"--vocab-size {vocab_size}: --tokenizer {path} has {pieces} pieces; give one of the two")
    return Path(path).read_bytes()


# ---- Encoding: buckets to shards

class Encoded(NamedTuple):
    """A bucket's documents as a stream of tokens, bos before each, and what to count of them."""
    tokens: np.ndarray  # uint16
    digests: list[bytes]  # of each validation document's tokens
    normalised_bytes: int  # UTF-8 length of the text that the tokens decode to, as train_gpt.py counts it
    origins: Counter  # (origin, "documents" or "raw_bytes") -> number, in order of appearance
    in_validation: int  # training documents left out


class Encoder:
    """Encodes buckets of one split, in worker processes."""

    def __init__(self, split: str, model: bytes, runs: list[Run], val_digests: frozenset[bytes]):
        self.split, self.runs, self.val_digests = split, runs, val_digests
        self.tokenizer = spm.SentencePieceProcessor(model_proto=model)
        self.token_bytes = TokenBytes(self.tokenizer)
        self.kind = "numpy"  # spares 7 % of the time
        try:
            self.tokenizer.encode([""], out_type=self.kind)
        except ValueError:  # an older sentencepiece
            self.kind = int

    def __call__(self, bucket: Bucket) -> Encoded:
        """Raises UserError for a validation document that train_gpt.py would count otherwise than it decodes."""
        parts, digests, normalised_bytes, origins, in_validation = [], [], 0, Counter(), 0
        documents = bucket.documents(self.runs)
        while batch := list(itertools.islice(documents, ENCODE_BATCH_DOCS)):
            texts = [document.encodable for document in batch]
            encoded = self.tokenizer.encode(texts, add_bos=True, num_threads=1, out_type=self.kind)
            for document, tokens in zip(batch, encoded, strict=True):
                tokens = np.asarray(tokens, "<u2")
                digest = hashlib.blake2b(tokens.tobytes(), digest_size=16).digest()
                if digest in self.val_digests:
                    in_validation += 1
                    continue
                counted = int(self.token_bytes.count(tokens).sum())
                if self.split == "val":
                    self.check_byte_count(tokens, counted)
                    digests.append(digest)
                normalised_bytes += counted
                origins[document.origin, "documents"] += 1
                origins[document.origin, "raw_bytes"] += len(document.text.encode())
                parts.append(tokens)
        return Encoded(np.concatenate(parts or [[]]).astype("<u2"), digests, normalised_bytes, origins, in_validation)

    def check_byte_count(self, tokens: np.ndarray, counted: int) -> None:
        decoded = self.tokenizer.decode(tokens[1:].tolist())
        if counted != len(decoded.encode()):
            unknown = " (it has pieces that the tokenizer does not know)" * bool(
                (tokens == self.tokenizer.unk_id()).any())
            raise UserError(f"the document that begins {decoded[:40]!r} counts {counted} bytes but decodes to"
                            f" {len(decoded.encode())}, so its BPB would be wrong{unknown}: leave it out of the source,"
                            " or use a tokenizer with byte fallback")


class ShardWriter:
    """Writes a stream of tokens as fineweb_<split>_000000.bin and so on, shard_tokens in each but the last."""

    def __init__(self, folder: Path, split: str, shard_tokens: int):
        self.folder, self.split, self.shard_tokens = folder, split, shard_tokens
        self.shards, self.in_shard, self.file = 0, 0, None

    def write(self, tokens: np.ndarray) -> None:
        while tokens.size:
            if self.file is None:
                self.file = open(self.folder / f"fineweb_{self.split}_{self.shards:06d}.bin", "wb")
                self.file.write(shard_header(0))
            part, tokens = np.split(tokens, [self.shard_tokens - self.in_shard])
            self.file.write(part.tobytes())
            self.in_shard += part.size
            if self.in_shard == self.shard_tokens:
                self.finish()

    def finish(self) -> None:
        """Completes the shard at hand, if there is one."""
        if self.file is not None:
            self.file.seek(0)
            self.file.write(shard_header(self.in_shard))
            self.file.close()
            self.shards, self.in_shard, self.file = self.shards + 1, 0, None


def encode_split(settings: Settings, encoder: Encoder, buckets: list[Bucket], origins: dict[str, Counter],
                 skipped: Counter) -> tuple[dict[str, int], frozenset[bytes]]:
    """Writes a split's shards; returns its counts and the digests of its documents, if it is validation. Adds to the
    counts of origins and to what was skipped."""
    counts, digests = dict(documents=0, tokens=0, normalised_bytes=0, raw_bytes=0), set()
    writer = ShardWriter(settings.partial, encoder.split, settings.arguments["shard_tokens"])
    progress = Progress(f"encoding {encoder.split}")
    for number, encoded in enumerate(in_order(encoder, buckets, settings.workers), 1):
        writer.write(encoded.tokens)
        digests.update(encoded.digests)
        skipped["training_documents_in_validation"] += encoded.in_validation
        counts["tokens"] += encoded.tokens.size
        counts["normalised_bytes"] += encoded.normalised_bytes
        for (origin, unit), amount in encoded.origins.items():
            counts[unit] += amount
            name = origin if origin in origins or len(origins) < MAX_ORIGINS else OTHER_ORIGINS
            origins.setdefault(name, Counter())[unit] += amount
        progress.update(f"{100 * number // len(buckets)} %, {counts['tokens']:,} tokens", counts["raw_bytes"])
    writer.finish()
    progress.done(f"{counts['documents']:,} documents, {counts['tokens']:,} tokens")
    return counts, frozenset(digests)


# ---- The data set as files

def requested(settings: Settings) -> dict:
    """The part of the manifest that is known before the build, and decides whether a rerun has anything to do."""
    sources = {option: [{"name": source.name} | source.identity for source in settings.sources[pool]]
               for option, pool in (("source", MAIN_POOL), ("val_source", VAL_POOL))}
    model = settings.tokenizer_model
    return {"format": MANIFEST_FORMAT, "arguments": settings.arguments, "sources": sources,
            "tokenizer_sha256": None if model is None else hashlib.sha256(model).hexdigest()}


def existing_manifest(settings: Settings) -> dict | None:
    """The manifest of a complete data set made for this request; None if there is none, or its files have changed."""
    manifest = read_manifest(settings.out)
    if manifest is None or any(manifest.get(key) != value for key, value in requested(settings).items()):
        return None
    listed = manifest["files"]
    shards = {path.name for path in settings.out.glob("fineweb_*.bin")}
    if shards != {name for name in listed if name.endswith(".bin")} or not shards:
        return None
    try:
        # Shards by size, since hashing gigabytes on every call costs more than it tells; the small tokenizer by hash.
        same = all(listed_path(settings.out, name).stat().st_size == entry["bytes"] for name, entry in listed.items())
        tokenizer = listed.get(listed_name(settings.out, settings.tokenizer))
        return manifest if same and file_entry(settings.tokenizer) == tokenizer else None
    except OSError:
        return None


def earlier_files(settings: Settings) -> list[Path]:
    """The files that a build in this place may replace: those of an earlier one, whole or cut short. Raises UserError
    if there are others: downloads of hours, or another data set's tokenizer, are not to be lost to a name."""
    manifest, found = read_manifest(settings.out), sorted(settings.out.glob("fineweb_*.bin"))
    found += [path for path in (settings.out / "manifest.json", settings.tokenizer) if path.exists()]
    if settings.partial.exists():  # a build that was killed, perhaps while it replaced files
        return found
    ours = manifest is not None and "format" in manifest and "arguments" in manifest
    listed = [listed_path(settings.out, name) for name in manifest["files"]] if ours else []
    strangers = [path for path in found if not ours or path.name != "manifest.json" and not any(
        path.exists() and other.exists() and path.samefile(other) for other in listed)]
    if strangers:
        raise UserError(f"{strangers[0]}: is there already, and not of a build in the same place: remove it, or give"
                        " another --out")
    return found + [path for path in listed if path.exists() and path.suffix == ".model"]


def publish(settings: Settings, model: bytes, manifest: dict, replaced: list[Path]) -> None:
    """Put the finished data set in the place of the files to be replaced. In between there is none, and
    settings.partial says that the files are ours."""
    aside = settings.partial / settings.tokenizer.name
    aside.write_bytes(model)
    shards = sorted(settings.partial.glob("fineweb_*.bin"))
    entries = file_entries([*shards, aside], settings.workers)
    final = {path: settings.tokenizer if path == aside else settings.out / path.name for path in entries}
    manifest["files"] = {listed_name(settings.out, final[path]): entry for path, entry in entries.items()}
    for path in sorted(replaced, key=lambda path: path.name != "manifest.json"):  # first what says that it is complete
        path.unlink(missing_ok=True)
    for shard in shards:
        shard.replace(settings.out / shard.name)
    write_aside(settings.tokenizer, model)
    write_manifest(settings.out, manifest)
    shutil.rmtree(settings.partial)


@contextlib.contextmanager
def exclusively(folder: Path) -> Iterator[None]:
    """Makes the folder and holds it for this process; a folder that is still empty at the end is removed. Raises
    UserError if another process holds it."""
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise UserError(f"{folder}: another build is writing there: wait for it, or give another --out") from None
    finally:
        os.close(handle)
        with contextlib.suppress(OSError):  # it holds something
            folder.rmdir()


def build(settings: Settings) -> dict:
    """Build the data set, replacing what an earlier build left in its place, and return its manifest."""
    replaced = earlier_files(settings)
    if any(path.name == "manifest.json" for path in replaced):
        print(f"{settings.out}: replacing the data set that was built there before", flush=True)
    shutil.rmtree(settings.partial / "runs", ignore_errors=True)
    killed_before = settings.partial.exists()
    settings.partial.mkdir(exist_ok=True)
    for path in settings.partial.iterdir():
        path.unlink()
    try:
        model, manifest = build_aside(settings)
    except BaseException:
        if killed_before:  # files of that build may be left in the folder: it goes on being ours
            shutil.rmtree(settings.partial / "runs", ignore_errors=True)  # the corpus's text may fill the disk
        else:
            shutil.rmtree(settings.partial)
        raise
    publish(settings, model, manifest, replaced)
    return manifest


def build_aside(settings: Settings) -> tuple[bytes, dict]:
    """Writes all shards to settings.partial; returns the tokenizer and the manifest, still without its files."""
    skipped = Counter(unparseable_files=0, empty_documents=0)
    runs, records = collect(settings, skipped)
    progress = Progress("sorting")
    skipped["duplicate_documents"] = drop_duplicates(runs)
    splits = split_documents(settings, runs, records)
    progress.done(f"{skipped['duplicate_documents']:,} duplicates")
    model = settings.tokenizer_model or train_tokenizer(tokenizer_sample(runs, splits["train"]),
                                                        settings.arguments["vocab_size"])
    counts, origins, val_digests = {}, {}, frozenset()
    for split in ("val", "train"):
        encoder = Encoder(split, model, runs, val_digests)
        counts[split], val_digests = encode_split(settings, encoder, splits[split], origins, skipped)
        if not counts[split]["documents"]:
            raise UserError(f"no document is left for {split}: those there are repeat others; give a larger source")
    versions = {name: importlib.metadata.version(name) for name in ("sentencepiece", "numpy", "zstandard")}
    versions["python"] = platform.python_version()
    return model, {**requested(settings), "versions": versions, "splits": counts, "skipped": skipped,
                   "origins": dict(sorted(origins.items()))}


# ---- Command line

def parse_arguments(argv: list[str], requirements: Path) -> Settings:
    """Settings of a command line, checked before anything is read. Raises UserError."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--source", nargs="+", default=["docs"], help="docs (default), files and folders; ./docs for a"
                        " folder docs")
    parser.add_argument("--val-source", nargs="+", default=[], help="files and folders for validation; what is in both"
                        " is left out of training")
    parser.add_argument("--order", choices=("shuffled", "source"), default="shuffled", help="of the documents; source:"
                        " as they come, validation first, as in the challenge's export")
    parser.add_argument("--out", type=Path, help="folder for shards, manifest and tokenizer; default: shards in"
                        " data/datasets/NAME_spVOCAB, tokenizer data/tokenizers/NAME_VOCAB_bpe.model")
    parser.add_argument("--tokenizer", help="SentencePiece model to use; default: train one")
    parser.add_argument("--vocab-size", type=int, help="pieces of the tokenizer to train, at most 65536 (tokens are"
                        " uint16); default 1024")
    parser.add_argument("--val-docs", type=int, help="documents for validation; default: all of --val-source, or else"
                        " one in 55, at most 50000")
    parser.add_argument("--seed", type=int, default=1337, help="of the order of documents, and so of the split")
    parser.add_argument("--shard-tokens", type=int, default=100_000_000, help="tokens in each shard but the last")
    add_workers_option(parser)
    arguments = vars(parser.parse_args(argv))
    workers, out, tokenizer = (arguments.pop(name) for name in ("workers", "out", "tokenizer"))
    for name, largest in (("vocab_size", 2**16), ("val_docs", 2**31 - 1), ("shard_tokens", 2**31 - 1)):
        check_range(f"--{name.replace('_', '-')}", arguments[name], largest)
    check_range("--workers", workers, 1024)
    model = read_tokenizer(tokenizer, arguments["vocab_size"]) if tokenizer else None
    vocab_size = arguments["vocab_size"] or 1024
    if model:
        vocab_size = spm.SentencePieceProcessor(model_proto=model).vocab_size()
    arguments["vocab_size"] = vocab_size
    sources = {pool: [open_source(option, argument, requirements)
                      for argument in arguments.pop(option.strip("-").replace("-", "_"))]
               for pool, option in ((MAIN_POOL, "--source"), (VAL_POOL, "--val-source"))}
    name = sources[MAIN_POOL][0].name
    # With --out the tokenizer lies beside the shards, so that two data sets never share, and overwrite, one.
    tokenizer = (out or DATA / "tokenizers") / f"{name}_{vocab_size}_bpe.model"
    out = out or DATA / "datasets" / f"{name}_sp{vocab_size}"
    return Settings(arguments, workers, sources, model, out.resolve(), tokenizer.resolve())


def main(argv: list[str], requirements: Path = DATA.parent / "requirements.txt") -> int:
    """Exit status: 0, or 1 after one line on stderr."""
    return run_tool(lambda: run(argv, requirements))


def run(argv: list[str], requirements: Path) -> int:
    settings = parse_arguments(argv, requirements)
    for package, version in settings.sources[MAIN_POOL][0].identity.get("packages", {}).items():
        if version is None:
            print(f"{package} of {requirements.name} is not installed: skipped, so the corpus is not the usual one")
    with exclusively(settings.out):
        manifest = existing_manifest(settings)
        print(f"{settings.out}: {'building' if manifest is None else 'already complete, nothing to do'}", flush=True)
        if manifest is None:
            manifest = build(settings)
        shutil.rmtree(settings.partial, ignore_errors=True)  # of a build that was killed after its last step but one
    for split, counts in manifest["splits"].items():
        print(f"{split}: " + ", ".join(f"{value:,} {name}" for name, value in counts.items()))
        if counts["tokens"] <= Config.train_seq_len:
            print(f"note: {split} has no sequence of {Config.train_seq_len} tokens: set TRAIN_SEQ_LEN below"
                  f" {counts['tokens']}, or build it larger")
    print("skipped: " + ", ".join(f"{value:,} {name}" for name, value in manifest["skipped"].items()))
    paths = f"DATA_PATH={shlex.quote(str(settings.out))} TOKENIZER_PATH={shlex.quote(str(settings.tokenizer))}"
    print(f"{paths} VOCAB_SIZE={settings.arguments['vocab_size']}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
