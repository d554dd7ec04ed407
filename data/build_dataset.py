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
manifest.json with counts and checksums. The same sources, arguments and library versions give the same bytes, whatever
the number of workers. A data set that an earlier run left in the same place is kept if it is the one asked for, and
replaced if not. Memory does not grow with the corpus beyond a byte a document; the disk holds its text once, meanwhile.
"""
import ast
import codecs
import concurrent.futures
import contextlib
import gc
import gzip
import hashlib
import importlib.metadata
import inspect
import io
import itertools
import json
import lzma
import os
import platform
import pydoc_data.topics
import re
import shlex
import shutil
import sys
import sysconfig
import warnings
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import sentencepiece as spm
import zstandard
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
    read_manifest,
    run_tool,
    shard_header,
    shard_paths,
    write_aside,
    write_manifest,
)

from train_gpt import TokenBytes

MANIFEST_FORMAT = 2  # raise it when the same source and arguments would give other bytes
MIN_DOCSTRING_CHARS = 200
MIN_PARAGRAPH_CHARS = 2000  # a lone .txt is cut at blank lines into documents of at least this size
# Not in every Python of the same version (distributions move them to packages of their own), so left out everywhere.
STDLIB_LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "turtledemo"}
# Functions that attach a docstring to a function written in C: most of torch's and numpy's reference is in such calls.
DOCSTRING_CALLS = {"add_newdoc", "add_docstr", "_add_docstr", "add_docstr_all"}
# Validation is one document in 55, which is about 125,000 tokens of the default source with a vocabulary of 1024, and
# never more than the challenge's own 50,000 documents.
VAL_DOCS_FRACTION, VAL_DOCS_MAX = 1 / 55, 50_000
# Four MB of the default source instead of all 16 cost 0.03 % more tokens, one MB 0.3 %; 16 MB train in 3 s.
TOKENIZER_SAMPLE_BYTES = 32_000_000
ENCODE_BATCH_DOCS = 64
UNIT_BYTES = 64_000_000  # of input that one task reads
RUN_BYTES = 64_000_000  # of text that a worker holds before it writes a sorted run
BUCKET_BYTES = 8_000_000  # of text that one task encodes
GROUP_DOCS = 2_000_000  # documents whose digests are compared at once
MAX_ORIGINS = 1000  # counted one by one in the manifest; more are counted together
OTHER_ORIGINS = "(others)"
VAL_ONLY, OTHERS = 0, 1  # ranks: documents of --val-source come before all others
SPACE_MARK = "\u2581"  # SentencePiece's own sign for a space

class Document(NamedTuple):
    origin: str  # what the manifest counts it under: a package, the "source" given beside the text, or a file's name
    text: str

    @property
    def encodable(self) -> str:
        """The text for the tokenizer. U+2581 comes back as a space in any case, and several of them at the start of
        a document would be counted as bytes but not decoded, so they are spaces from the beginning."""
        return self.text.replace(SPACE_MARK, " ")


class Unit(NamedTuple):
    """A part of a source that one task reads: reader(*arguments, skipped) yields its documents in order and counts in
    `skipped`, by reason, what it leaves out."""
    reader: Callable[..., Iterator[Document]]
    arguments: tuple


class Source(NamedTuple):
    name: str  # names the data set's folder and its tokenizer
    identity: dict  # JSON-ready; a rerun with an equal identity has nothing to do
    units: Callable[[], list[Unit]]


class Settings(NamedTuple):
    arguments: dict  # the command line's, as recorded in the manifest: all that decides the bytes
    workers: int
    sources: dict[int, list[Source]]  # VAL_ONLY: those of --val-source; OTHERS: those of --source
    tokenizer_model: bytes | None  # None: train one
    out: Path
    tokenizer: Path

    @property
    def partial(self) -> Path:
        """Where everything is written until all is complete."""
        return self.out / ".partial"


# ---- Sources: where documents come from ----

def installed_versions(requirements: Path) -> dict[str, str | None]:
    """Name -> installed version (None: not installed) of the packages a requirements file names, sorted by name."""
    if not requirements.is_file():
        raise UserError(f"{requirements}: no such file: the default source reads package names there; give --source")
    versions = {}
    for line in requirements.read_text().splitlines():
        name = re.match(r"\s*([A-Za-z0-9][\w.-]*)", line)  # skips comments and options such as --index-url
        if name:
            try:
                versions[name[1]] = importlib.metadata.version(name[1])
            except importlib.metadata.PackageNotFoundError:
                versions[name[1]] = None
    return dict(sorted(versions.items(), key=lambda item: item[0].lower()))


def documentation_files(packages: list[str]) -> list[tuple[str, Path]]:
    """(origin, path) of each .py file of the standard library, then of each installed package, in a fixed order."""
    stdlib = Path(sysconfig.get_path("stdlib"))
    files = [("python", path) for path in sorted(stdlib.rglob("*.py"))
             if not STDLIB_LEFT_OUT.intersection(path.relative_to(stdlib).parts)]
    for package in packages:
        distribution = importlib.metadata.distribution(package)
        recorded = sorted(path for path in distribution.files or [] if path.suffix == ".py" and ".." not in path.parts)
        files += [(package, Path(distribution.locate_file(path))) for path in recorded]
    return files


def docstrings(path: Path) -> list[str] | None:
    """Cleaned docstrings of at least MIN_DOCSTRING_CHARS in a Python file, which is parsed, never imported.

    None if the file cannot be read or parsed (templates, code for another Python).
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # old escapes in other people's string literals
            tree = ast.parse(path.read_bytes())
    except (OSError, SyntaxError, ValueError, RecursionError):
        return None
    found = []
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            found.append(ast.get_docstring(node, clean=False) or "")
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", "")) in DOCSTRING_CALLS:
            parts = [part for argument in node.args for part in ast.walk(argument)]
            found += [part.value for part in parts if isinstance(part, ast.Constant) and isinstance(part.value, str)]
    # A lone surrogate ("\ud800" in a literal) has no UTF-8 form; it becomes "?".
    cleaned = (inspect.cleandoc(text).encode(errors="replace").decode() for text in found)
    return [text for text in cleaned if len(text) >= MIN_DOCSTRING_CHARS]


def documentation(files: list[tuple[str, Path]], skipped: Counter) -> Iterator[Document]:
    gc.disable()  # syntax trees have no reference cycles: looking for some would cost a quarter of the time
    for origin, path in files:
        texts = docstrings(path)
        skipped["unparseable_files"] += texts is None
        yield from (Document(origin, text) for text in texts or [])
    gc.enable()


def pydoc_topics(skipped: Counter) -> Iterator[Document]:
    for _, text in sorted(pydoc_data.topics.topics.items()):
        if len(text) >= MIN_DOCSTRING_CHARS:
            yield Document("pydoc topics", text)


def decoded_blocks(path: Path) -> Iterator[str]:
    """A UTF-8 file as text, in blocks of at most a megabyte. Raises UserError that names the first bad byte."""
    decoder, read = codecs.getincrementaldecoder("utf-8")(), 0
    with open(path, "rb") as file:
        while True:
            block, pending = file.read(2**20), len(decoder.getstate()[0])
            try:
                yield decoder.decode(block, final=not block)
            except UnicodeDecodeError as error:
                raise UserError(f"{path}: not UTF-8 at byte {read - pending + error.start}: convert the file, for"
                                " example with iconv") from None
            read += len(block)
            if not block:
                return


def text_file(path: Path, skipped: Counter) -> Iterator[Document]:
    """Runs of whole paragraphs of at least MIN_PARAGRAPH_CHARS; together they are the file, character for character."""
    rest = ""
    for block in decoded_blocks(path):
        rest, start = rest + block, 0
        for blank in re.finditer(r"\n[ \t\r]*\n\s*(?=\S)", rest):  # whole: the next paragraph begins behind it
            if blank.end() - start >= MIN_PARAGRAPH_CHARS:
                yield Document(path.name, rest[start:blank.end()])
                start = blank.end()
        rest = rest[start:]
    yield Document(path.name, rest)


def text_files(paths: list[Path], origin: str, skipped: Counter) -> Iterator[Document]:
    """A document a file."""
    return (Document(origin, "".join(decoded_blocks(path))) for path in paths)


def zstd_lines(path: Path) -> Iterator[bytes]:
    """Lines of a .zst file, of all its frames. Unlike zstandard.open, raises EOFError where the file is cut short."""
    decompressor, frame, rest = zstandard.ZstdDecompressor(max_window_size=2**31), None, b""
    with open(path, "rb") as file:
        while chunk := file.read(2**20):
            while chunk:
                frame = frame or decompressor.decompressobj()
                rest += frame.decompress(chunk)
                chunk = frame.unused_data
                frame = None if frame.eof else frame
            *lines, rest = rest.split(b"\n")
            yield from lines
    if frame is not None:
        raise EOFError("the file ends inside a frame")
    yield rest


OPENERS = {  # of compressed .jsonl
    ".jsonl.gz": gzip.open,
    ".jsonl.xz": lzma.open,
    ".jsonl.zst": lambda path: contextlib.closing(zstd_lines(path)),
}
ENDINGS = (".txt", ".jsonl", *OPENERS, ".parquet")


def parse_line(line: bytes, origin: str) -> Document:
    """A line of JSON; a blank one is an empty document. Raises ValueError, KeyError or TypeError."""
    record = json.loads(line) if line.strip() else {"text": ""}
    text, source = record["text"], record.get("source")
    text.encode()  # fails on a lone surrogate, and on what is no string
    return Document(source if isinstance(source, str) and source else origin, text)


def jsonl_lines(path: Path, lines: Iterable[bytes], lines_before: Callable[[], int]) -> Iterator[Document]:
    """Documents of a file's lines. Raises UserError that names file:line."""
    number = 0
    try:
        for number, line in enumerate(lines, 1):
            yield parse_line(line, path.name)
    except (KeyError, TypeError, AttributeError):
        problem, line = f"no \"text\" string in {line[:60]!r}: every line needs one", number
    except (ValueError, RecursionError) as error:
        problem, line = f"malformed ({error}): repair or drop the line", number
    except (EOFError, OSError, lzma.LZMAError, zlib.error, zstandard.ZstdError) as error:
        problem, line = f"cannot read on ({error}): get the file again", number + 1
    else:
        return
    raise UserError(f"{path}:{lines_before() + line}: {problem}")


def jsonl_range(path: Path, start: int, end: int, skipped: Counter) -> Iterator[Document]:
    """Documents of the lines that begin in bytes [start, end) of a .jsonl."""
    def lines() -> Iterator[bytes]:
        file.seek(max(0, start - 1))
        if start:
            file.readline()  # the line before, which began before start
        while file.tell() < end and (line := file.readline()):
            yield line

    def lines_before() -> int:
        file.seek(0)
        return file.read(start).count(b"\n")

    with open(path, "rb") as file:
        yield from jsonl_lines(path, lines(), lines_before)


def jsonl_compressed(path: Path, skipped: Counter) -> Iterator[Document]:
    (opener,) = [opener for ending, opener in OPENERS.items() if path.name.endswith(ending)]
    with opener(path) as lines:
        yield from jsonl_lines(path, lines, lambda: 0)


def import_pyarrow(path: Path):
    try:
        import pyarrow.parquet
        return pyarrow
    except ImportError:
        raise UserError(f"{path}: .parquet needs pyarrow: pip install pyarrow") from None


def parquet_group(path: Path, group: int, skipped: Counter) -> Iterator[Document]:
    """Documents of one row group of a .parquet file. Raises UserError."""
    pyarrow = import_pyarrow(path)
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            columns = [name for name in ("text", "source") if name in file.schema_arrow.names]
            for batch in file.iter_batches(1024, row_groups=[group], columns=columns):
                for row in batch.to_pylist():
                    source = row.get("source")
                    yield Document(source if isinstance(source, str) and source else path.name, row["text"] or "")
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot read row group {group} ({error}): get the file again") from None


def parquet_units(path: Path) -> list[Unit]:
    """A unit for each row group of a .parquet file. Raises UserError if it has no column of text."""
    pyarrow = import_pyarrow(path)
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            schema, groups = file.schema_arrow, file.num_row_groups
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path}: no whole .parquet file ({error}): get the file again") from None
    kinds = [schema.field(index).type for index, name in enumerate(schema.names) if name == "text"]
    if len(kinds) != 1 or not (pyarrow.types.is_string(kinds[0]) or pyarrow.types.is_large_string(kinds[0])):
        raise UserError(f'{path}: no column "text" of strings among {schema.names}')
    return [Unit(parquet_group, (path, group)) for group in range(groups)]


def grouped(items: list, sizes: list[int]) -> list[list]:
    """Runs of items of about UNIT_BYTES."""
    groups, group_bytes = [[]], 0
    for item, size in zip(items, sizes, strict=True):
        if groups[-1] and group_bytes + size > UNIT_BYTES:
            groups.append([])
            group_bytes = 0
        groups[-1].append(item)
        group_bytes += size
    return groups


def file_units(path: Path) -> list[Unit]:
    if path.name.endswith(".txt"):
        return [Unit(text_file, (path,))]
    if path.name.endswith(".parquet"):
        return parquet_units(path)
    if path.name.endswith(".jsonl"):
        size = path.stat().st_size
        return [Unit(jsonl_range, (path, start, min(start + UNIT_BYTES, size))) for start in range(0, size, UNIT_BYTES)]
    return [Unit(jsonl_compressed, (path,))]


def folder_units(folder: Path, paths: list[Path]) -> list[Unit]:
    texts = [path for path in paths if path.name.endswith(".txt")]
    groups = grouped(texts, [path.stat().st_size for path in texts]) if texts else []
    units = [Unit(text_files, (group, folder.name)) for group in groups]
    return units + [unit for path in paths if not path.name.endswith(".txt") for unit in file_units(path)]


def files_identity(paths: list[Path]) -> dict:
    """What tells one state of these files from another without reading them: names, sizes and times of change."""
    stats = [path.stat() for path in paths]
    listing = [(path.name, stat.st_size, stat.st_mtime_ns) for path, stat in zip(paths, stats, strict=True)]
    return {"files": len(paths), "bytes": sum(stat.st_size for stat in stats),
            "listing_sha256": hashlib.sha256(repr(listing).encode()).hexdigest()}


def open_source(argument: str, requirements: Path) -> Source:
    """The source a --source value stands for; nothing is read yet. Raises UserError if there is no such source."""
    if argument == "docs":
        versions = installed_versions(requirements)
        packages = [name for name, version in versions.items() if version is not None]

        def units() -> list[Unit]:
            files = documentation_files(packages)
            return [Unit(documentation, (files[start:start + 256],)) for start in range(0, len(files), 256)] + [
                Unit(pydoc_topics, ())]
        return Source("pydocs", {"python": platform.python_version(), "packages": versions}, units)
    path = Path(argument).resolve()
    if path.is_dir():
        paths = sorted(file for file in path.rglob("*") if file.name.endswith(ENDINGS) and file.is_file())
        if not paths:
            raise UserError(f"--source {argument}: the folder holds no {', '.join(ENDINGS)}")
        return Source(path.name, files_identity(paths), lambda: folder_units(path, paths))
    if not path.is_file():
        raise UserError(f"--source {argument}: no such file or folder; 'docs' is the default source")
    for ending in ENDINGS:
        if path.name.endswith(ending):
            return Source(path.name.removesuffix(ending), files_identity([path]), lambda: file_units(path))
    raise UserError(f"--source {argument}: accepted are docs and files or folders of {', '.join(ENDINGS)}")


# ---- Collecting: documents to sorted runs on disk, an external sort ----

# A row of a run. The digest is that of seed and text: equal digests are equal texts.
# The key orders the documents of a rank: the digest's high half (shuffled), or the position in the sources.
ROW = np.dtype([("key", "<u8"), ("high", "<u8"), ("low", "<u8"), ("position", "<u8"), ("offset", "<u8"),
                ("bytes", "<u4"), ("origin", "<u4"), ("keep", "u1")])
END_OF_KEYS = 2**64


class Run(NamedTuple):
    """About RUN_BYTES of documents in the order of their keys, as files PATH.text, PATH.rows and PATH.keys."""
    path: Path
    rank: int
    documents: int
    text_bytes: int
    origins: list[str]

    def read(self, kind: str, dtype: str | np.dtype, first: int = 0, count: int = -1) -> np.ndarray:
        path = self.path.with_suffix(f".{kind}")
        return np.fromfile(path, dtype, count, offset=first * np.dtype(dtype).itemsize)

    def rows(self, first_key: int, end_key: int) -> np.ndarray:
        """Rows with first_key <= key < end_key."""
        keys = np.memmap(self.path.with_suffix(".keys"), "<u8", "r")
        first, end = (self.documents if key == END_OF_KEYS else int(np.searchsorted(keys, np.uint64(key)))
                      for key in (first_key, end_key))
        return self.read("rows", ROW, first, end - first) if end > first else np.empty(0, ROW)


class Collector(NamedTuple):
    """Turns units into runs, in worker processes."""
    folder: Path
    seed: int
    order: str

    def __call__(self, task: tuple[int, int, Unit]) -> tuple[list[Run], Counter]:
        """Runs of (number of the unit, rank, unit), and what it skipped. Raises UserError."""
        number, rank, unit = task
        runs, skipped, texts, rows, origins, held = [], Counter(), [], [], {}, 0
        for ordinal, document in enumerate(unit.reader(*unit.arguments, skipped)):
            if not document.encodable.strip():
                skipped["empty_documents"] += 1
                continue
            text = document.text.encode()
            digest = hashlib.blake2b(b"%d\n%b" % (self.seed, text), digest_size=16).digest()
            high, low, position = int.from_bytes(digest[:8]), int.from_bytes(digest[8:]), number << 40 | ordinal
            rows.append((high if self.order == "shuffled" else position, high, low, position, 0, len(text),
                         origins.setdefault(document.origin, len(origins)), 1))
            texts.append(text)
            held += len(text)
            if held >= RUN_BYTES:
                runs.append(self.write(f"{number:08d}_{len(runs):06d}", rank, texts, rows, list(origins)))
                texts, rows, origins, held = [], [], {}, 0
        if rows:
            runs.append(self.write(f"{number:08d}_{len(runs):06d}", rank, texts, rows, list(origins)))
        return runs, skipped

    def write(self, name: str, rank: int, texts: list[bytes], rows: list[tuple], origins: list[str]) -> Run:
        table = np.array(rows, ROW)
        sorting = np.lexsort((table["low"], table["key"]))
        table = table[sorting]
        table["offset"][1:] = np.cumsum(table["bytes"][:-1], dtype=np.uint64)
        path = self.folder / name
        with open(path.with_suffix(".text"), "wb") as file:
            file.writelines(texts[index] for index in sorting)
        table.tofile(path.with_suffix(".rows"))
        table["key"].tofile(path.with_suffix(".keys"))
        return Run(path, rank, len(table), int(table["bytes"].sum()), origins)


def collect(settings: Settings, skipped: Counter) -> list[Run]:
    """Every document of the sources, in runs on disk. Raises UserError, for the first problem in the order of units."""
    folder = settings.partial / "runs"
    folder.mkdir()
    units = [(rank, unit) for rank in (VAL_ONLY, OTHERS) for source in settings.sources[rank]
             for unit in source.units()]
    tasks = ((number, rank, unit) for number, (rank, unit) in enumerate(units))
    collector = Collector(folder, settings.arguments["seed"], settings.arguments["order"])
    runs, documents, text_bytes, progress = [], 0, 0, Progress("collecting")
    for new_runs, new_skipped in in_order(collector, tasks, settings.workers):
        runs += new_runs
        skipped.update(new_skipped)
        documents += sum(run.documents for run in new_runs)
        text_bytes += sum(run.text_bytes for run in new_runs)
        progress.update(f"{documents:,} documents", text_bytes)
    progress.done(f"{documents:,} documents, {text_bytes / 1e6:.1f} MB")
    return runs


def drop_duplicates(runs: list[Run]) -> int:
    """Clears "keep" of every document whose text came before, by rank and position; returns how many.

    Digests are compared in groups by their first bits, so that a group fits in memory; "keep" is a byte a document.
    """
    total = sum(run.documents for run in runs)
    keep = [np.ones(run.documents, bool) for run in runs]
    groups = -(-total // GROUP_DOCS)
    for group in range(groups):
        parts, owners = [], []
        for number, run in enumerate(runs):
            rows = run.read("rows", ROW)
            chosen = np.flatnonzero((rows["high"] >> np.uint64(32)) * np.uint64(groups) >> np.uint64(32) == group)
            parts.append(rows[["high", "low", "position"]][chosen])
            owners.append(np.stack([np.full(len(chosen), number), np.full(len(chosen), run.rank), chosen]))
        rows, (numbers, ranks, indices) = np.concatenate(parts), np.concatenate(owners, axis=1)
        sorting = np.lexsort((rows["position"], ranks, rows["low"], rows["high"]))
        same = rows[["high", "low"]][sorting]
        for later in sorting[1:][same[1:] == same[:-1]]:
            keep[numbers[later]][indices[later]] = False
    for run, kept in zip(runs, keep, strict=True):
        if not kept.all():
            rows = run.read("rows", ROW)
            rows["keep"] = kept
            rows.tofile(run.path.with_suffix(".rows"))
    return sum(int(np.count_nonzero(~kept)) for kept in keep)


# ---- Splitting: buckets of documents that follow each other ----

class Bucket(NamedTuple):
    """The kept documents of a rank with first_key <= key < end_key: what one task encodes."""
    rank: int
    first_key: int
    end_key: int

    def rows(self, runs: list[Run]) -> list[tuple[Run, np.ndarray]]:
        """Each run's part."""
        parts = [(run, run.rows(self.first_key, self.end_key)) for run in runs if run.rank == self.rank]
        return [(run, rows) for run, rows in parts if len(rows)]

    def keys(self, runs: list[Run]) -> np.ndarray:
        """Of the kept documents, in order."""
        return np.sort(np.concatenate([rows["key"][rows["keep"] == 1] for _, rows in self.rows(runs)] or [[]]))

    def documents(self, runs: list[Run]) -> Iterator[Document]:
        """In order. A run's part is in one piece, and read at once."""
        parts, texts = self.rows(runs), []
        for run, rows in parts:
            start, end = int(rows["offset"][0]), int(rows["offset"][-1]) + int(rows["bytes"][-1])
            texts.append(run.read("text", "u1", start, end - start).tobytes())
            rows["offset"] -= np.uint64(start)
        owners = np.repeat(np.arange(len(parts)), [len(rows) for _, rows in parts])
        table = np.concatenate([rows for _, rows in parts] or [np.empty(0, ROW)])
        for index in np.lexsort((table["low"], table["key"])):
            owner, row = owners[index], table[index]
            if row["keep"]:
                start, end = int(row["offset"]), int(row["offset"]) + int(row["bytes"])
                yield Document(parts[owner][0].origins[row["origin"]], texts[owner][start:end].decode())


def cut_into_buckets(runs: list[Run], rank: int) -> list[Bucket]:
    """All documents of a rank, in buckets of about BUCKET_BYTES of text.

    Every run gives the keys at every 32nd of BUCKET_BYTES of its text; every 32nd of those keys, sorted, is a cut.
    """
    samples = [np.empty(0, "<u8")]
    for run in runs:
        if run.rank == rank:
            rows = run.read("rows", ROW)
            at = np.arange(BUCKET_BYTES // 64, run.text_bytes, max(1, BUCKET_BYTES // 32), dtype=np.uint64)
            samples.append(rows["key"][np.searchsorted(rows["offset"], at).clip(max=len(rows) - 1)])
    cuts = np.unique(np.sort(np.concatenate(samples))[32::32]).tolist()
    return [Bucket(rank, *keys) for keys in zip([0, *cuts], [*cuts, END_OF_KEYS])]


def split_documents(runs: list[Run], has_val_source: bool, val_docs: int | None) -> dict[str, list[Bucket]]:
    """{"val": ..., "train": ...}: validation is the first val_docs documents of --val-source (None: all), or else of
    the source (None: the default share). Raises UserError if a split is empty."""
    by_rank = {rank: cut_into_buckets(runs, rank) for rank in (VAL_ONLY, OTHERS)}
    kept = {rank: sum(int(np.count_nonzero(run.read("rows", ROW)["keep"])) for run in runs if run.rank == rank)
            for rank in by_rank}
    if has_val_source and not kept[VAL_ONLY]:
        raise UserError("--val-source gives no document: give another")
    val_rank = VAL_ONLY if has_val_source else OTHERS
    if val_docs is None:
        val_docs = kept[VAL_ONLY] or max(1, min(VAL_DOCS_MAX, round(kept[OTHERS] * VAL_DOCS_FRACTION)))
    if kept[OTHERS] <= (0 if has_val_source else val_docs):
        raise UserError(f"the source gives {kept[OTHERS]} distinct documents: {val_docs} for validation leave none to"
                        " train on; give a larger source or a smaller --val-docs")
    val, left = [], min(val_docs, kept[val_rank])
    for number, bucket in enumerate(by_rank[val_rank]):
        keys = bucket.keys(runs)
        if left < len(keys):  # the cut is in here
            cut = int(keys[left])
            val.append(bucket._replace(end_key=cut))
            rest = [bucket._replace(first_key=cut), *by_rank[val_rank][number + 1:]]
            break
        val.append(bucket)
        left -= len(keys)
    else:
        rest = []
    return {"val": val, "train": by_rank[OTHERS] if val_rank == VAL_ONLY else rest}


# ---- Tokenizer ----

def tokenizer_sample(runs: list[Run], buckets: list[Bucket]) -> Iterator[str]:
    """Up to TOKENIZER_SAMPLE_BYTES of training documents, from buckets at equal distances."""
    wanted, sample_bytes = -(-TOKENIZER_SAMPLE_BYTES // BUCKET_BYTES), 0
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
    try:
        model = Path(path).read_bytes()
        tokenizer = spm.SentencePieceProcessor(model_proto=model)
    except (OSError, RuntimeError):
        raise UserError(f"--tokenizer {path}: no SentencePiece model there: give a .model file") from None
    pieces = tokenizer.vocab_size()
    if tokenizer.bos_id() < 0 or pieces > 2**16:
        raise UserError(f"--tokenizer {path}: bos id {tokenizer.bos_id()}, {pieces} pieces: shards need a bos piece and"
                        " at most 65536 pieces; train one with --vocab-size instead")
    if vocab_size not in (None, pieces):
        raise UserError(f"--vocab-size {vocab_size}: --tokenizer {path} has {pieces} pieces; give one of the two")
    return model


# ---- Encoding: buckets to shards ----

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
            raise UserError(f"the document that begins {decoded[:40]!r} counts {counted} bytes but decodes to"
                            f" {len(decoded.encode())}, so its BPB would be wrong: leave it out of the source")


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


# ---- The data set as files ----

def requested(settings: Settings) -> dict:
    """The part of the manifest that is known before the build, and decides whether a rerun has anything to do."""
    sources = {option: [source.identity for source in settings.sources[rank]]
               for option, rank in (("source", OTHERS), ("val_source", VAL_ONLY))}
    model = settings.tokenizer_model
    return {"format": MANIFEST_FORMAT, "arguments": settings.arguments, "sources": sources,
            "tokenizer_sha256": None if model is None else hashlib.sha256(model).hexdigest()}


def existing_manifest(settings: Settings) -> dict | None:
    """The manifest of a complete data set made for this request; None if there is none, or its files have changed."""
    manifest = read_manifest(settings.out)
    try:
        if manifest is None or any(manifest.get(key) != value for key, value in requested(settings).items()):
            return None
        # Shards by size, since hashing gigabytes on every call costs more than it tells; the small tokenizer by hash.
        same = all((settings.out / name).stat().st_size == entry["bytes"] for name, entry in manifest["files"].items())
        tokenizer = manifest["files"].get(os.path.relpath(settings.tokenizer, settings.out))
        return manifest if same and file_entry(settings.tokenizer) == tokenizer else None
    except OSError:
        return None


def publish(settings: Settings, model: bytes, manifest: dict) -> None:
    """Replace whatever data set is there by the finished one. In between there is none, and settings.partial says that
    the files are ours."""
    (settings.out / "manifest.json").unlink(missing_ok=True)
    for old in settings.out.glob("fineweb_*.bin"):
        old.unlink()
    for shard in sorted(settings.partial.glob("*.bin")):
        shard.replace(settings.out / shard.name)
    write_aside(settings.tokenizer, model)
    paths = [settings.tokenizer, *shard_paths(settings.out, "train"), *shard_paths(settings.out, "val")]
    manifest["files"] = file_entries(paths, settings.out, settings.workers)
    write_manifest(settings.out, manifest)
    shutil.rmtree(settings.partial)


def build(settings: Settings) -> dict:
    """Build the data set, replacing what an earlier build left in its place, and return its manifest."""
    ours = any(path.exists() for path in (settings.out / "manifest.json", settings.partial, settings.tokenizer))
    if not ours and any(settings.out.glob("fineweb_*.bin")):
        raise UserError(f"--out {settings.out}: holds shards this tool did not write; remove them or choose another")
    shutil.rmtree(settings.partial, ignore_errors=True)
    settings.partial.mkdir(parents=True)
    try:
        model, manifest = build_aside(settings)
    except BaseException:  # the corpus's text may fill the disk
        shutil.rmtree(settings.partial)
        with contextlib.suppress(OSError):  # the folder holds something else
            settings.out.rmdir()
        raise
    publish(settings, model, manifest)
    return manifest


def build_aside(settings: Settings) -> tuple[bytes, dict]:
    """Writes all shards to settings.partial; returns the tokenizer and the manifest, still without its files."""
    skipped = Counter(unparseable_files=0, empty_documents=0)
    runs = collect(settings, skipped)
    skipped["duplicate_documents"] = drop_duplicates(runs)
    splits = split_documents(runs, bool(settings.sources[VAL_ONLY]), settings.arguments["val_docs"])
    model = settings.tokenizer_model or train_tokenizer(tokenizer_sample(runs, splits["train"]),
                                                        settings.arguments["vocab_size"])
    counts, origins, val_digests = {}, {}, frozenset()
    for split in ("val", "train"):
        encoder = Encoder(split, model, runs, val_digests)
        counts[split], val_digests = encode_split(settings, encoder, splits[split], origins, skipped)
    if not counts["train"]["documents"]:
        raise UserError("every document is in validation as well: give a larger source")
    versions = {name: importlib.metadata.version(name) for name in ("sentencepiece", "numpy", "zstandard")}
    versions["python"] = platform.python_version()
    return model, {**requested(settings), "versions": versions, "splits": counts, "skipped": skipped,
                   "origins": dict(sorted(origins.items()))}


# ---- Command line ----

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
    sources = {OTHERS: [open_source(argument, requirements) for argument in arguments["source"]],
               VAL_ONLY: [open_source(argument, requirements) for argument in arguments["val_source"]]}
    name = sources[OTHERS][0].name
    # With --out the tokenizer lies beside the shards, so that two data sets never share, and overwrite, one.
    tokenizer = (out or DATA / "tokenizers") / f"{name}_{vocab_size}_bpe.model"
    out = out or DATA / "datasets" / f"{name}_sp{vocab_size}"
    return Settings(arguments, workers, sources, model, out.absolute(), tokenizer.absolute())


def main(argv: list[str], requirements: Path = DATA.parent / "requirements.txt") -> int:
    """Exit status: 0, or 1 after one line on stderr."""
    return run_tool(lambda: run(argv, requirements))


def run(argv: list[str], requirements: Path) -> int:
    settings = parse_arguments(argv, requirements)
    for package, version in settings.sources[OTHERS][0].identity.get("packages", {}).items():
        if version is None:
            print(f"{package} of {requirements.name} is not installed: skipped, so the corpus is not the usual one")
    manifest = existing_manifest(settings)
    print(f"{settings.out}: {'building' if manifest is None else 'already complete, nothing to do'}", flush=True)
    manifest = manifest or build(settings)
    for split, counts in manifest["splits"].items():
        print(f"{split}: " + ", ".join(f"{value:,} {name}" for name, value in counts.items()))
    print("skipped: " + ", ".join(f"{value:,} {name}" for name, value in manifest["skipped"].items()))
    paths = f"DATA_PATH={shlex.quote(str(settings.out))} TOKENIZER_PATH={shlex.quote(str(settings.tokenizer))}"
    print(f"{paths} VOCAB_SIZE={settings.arguments['vocab_size']}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
