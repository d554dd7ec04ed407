"""Build a data set for train_gpt.py: documents -> SentencePiece BPE tokenizer -> token shards. Nothing is downloaded.

    python data/build_dataset.py                       documentation of the packages in requirements.txt
    python data/build_dataset.py --source corpus.txt   or a folder of .txt files, or .jsonl, .jsonl.gz, .jsonl.xz,
                                                       .jsonl.zst with a "text" string on every line

Writes fineweb_train_*.bin and fineweb_val_*.bin (the field's names, whatever the text), the tokenizer and, last, a
manifest.json with counts and checksums. The same source, arguments and library versions give the same bytes. A data set
that an earlier run left in the same place is kept if it is the one asked for, and replaced if not. Documents and tokens
are held in memory.
"""
import argparse
import ast
import concurrent.futures
import contextlib
import gc
import gzip
import hashlib
import importlib.metadata
import inspect
import io
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
import time
import warnings
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import sentencepiece as spm
import zstandard

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))
from train_gpt import SHARD_HEADER_INTS, SHARD_MAGIC, SHARD_VERSION, TokenBytes, UserError  # noqa: E402

MANIFEST_FORMAT = 1  # raise it when the same source and arguments would give other bytes
PROGRESS_SECONDS = 2.0
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
SPACE_MARK = "\u2581"  # SentencePiece's own sign for a space

class Document(NamedTuple):
    origin: str  # what the manifest counts it under: a package, or the source's file or folder name
    text: str

    @property
    def raw_bytes(self) -> int:
        return len(self.text.encode())

    @property
    def encodable(self) -> str:
        """The text for the tokenizer. U+2581 comes back as a space in any case, and several of them at the start of
        a document would be counted as bytes but not decoded, so they are spaces from the beginning."""
        return self.text.replace(SPACE_MARK, " ")


class Source(NamedTuple):
    name: str  # names the data set's folder and its tokenizer
    identity: dict  # JSON-ready; a rerun with an equal identity has nothing to do
    documents: Callable[[Counter], Iterator[Document]]  # counts what it skips, by reason, in its argument


class Settings(NamedTuple):
    arguments: dict  # the command line's, as recorded in the manifest
    source: Source
    out: Path
    tokenizer: Path

    @property
    def manifest(self) -> Path:
        return self.out / "manifest.json"

    @property
    def partial(self) -> Path:
        """Where shards are written until all are complete."""
        return self.out / ".partial"


class Progress:
    """Prints a line every PROGRESS_SECONDS, so that no phase looks hung."""

    def __init__(self, phase: str):
        self.phase, self.started = phase, time.monotonic()
        self.printed = self.started

    def update(self, message: str) -> None:
        now = time.monotonic()
        if now - self.printed >= PROGRESS_SECONDS:
            self.printed = now
            print(f"{self.phase}: {message} ({now - self.started:.0f} s)", flush=True)

    def done(self, message: str) -> None:
        print(f"{self.phase}: {message} in {time.monotonic() - self.started:.1f} s", flush=True)


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


def documentation(packages: list[str], skipped: Counter) -> Iterator[Document]:
    """Documents of the default source, in a fixed order whatever the number of worker processes."""
    files = documentation_files(packages)
    # Syntax trees have no reference cycles: looking for some would cost a quarter of the time.
    with concurrent.futures.ProcessPoolExecutor(min(8, os.cpu_count() or 1), initializer=gc.disable) as pool:
        results = pool.map(docstrings, [path for _, path in files], chunksize=16)
        for (origin, _), texts in zip(files, results, strict=True):
            skipped["unparseable_files"] += texts is None
            yield from (Document(origin, text) for text in texts or [])
    for _, text in sorted(pydoc_data.topics.topics.items()):
        if len(text) >= MIN_DOCSTRING_CHARS:
            yield Document("pydoc topics", text)


def read_text(path: Path) -> str:
    try:
        return path.read_bytes().decode()
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 at byte {error.start}: convert the file, for example with iconv") from None


def text_file(path: Path) -> Iterator[Document]:
    """Runs of whole paragraphs of at least MIN_PARAGRAPH_CHARS; together they are the file, character for character."""
    text, start = read_text(path), 0
    for blank in re.finditer(r"\n[ \t\r]*\n\s*", text):
        if blank.end() - start >= MIN_PARAGRAPH_CHARS:
            yield Document(path.name, text[start:blank.end()])
            start = blank.end()
    yield Document(path.name, text[start:])


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


JSONL_OPENERS = {
    ".jsonl": lambda path: open(path, "rb"),
    ".jsonl.gz": gzip.open,
    ".jsonl.xz": lzma.open,
    ".jsonl.zst": lambda path: contextlib.closing(zstd_lines(path)),
}


def jsonl_file(path: Path, opener: Callable) -> Iterator[Document]:
    """One document a line; a blank line is an empty document. Raises UserError that names file:line."""
    number = 0
    try:
        with opener(path) as lines:
            for number, line in enumerate(lines, 1):
                text = json.loads(line)["text"] if line.strip() else ""
                text.encode()  # fails on a lone surrogate
                yield Document(path.name, text)
    except (KeyError, TypeError, AttributeError):
        raise UserError(f'{path}:{number}: no "text" string in {line[:60]!r}: every line needs one') from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}:{number}: malformed ({error}): repair or drop the line") from None
    except (EOFError, OSError, lzma.LZMAError, zlib.error, zstandard.ZstdError) as error:
        raise UserError(f"{path}:{number + 1}: cannot read on ({error}): get the file again") from None


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
        identity = {"python": platform.python_version(), "packages": versions}
        return Source("pydocs", identity, lambda skipped: documentation(packages, skipped))
    path = Path(argument).resolve()
    if path.is_dir():
        paths = sorted(path.rglob("*.txt"))
        if not paths:
            raise UserError(f"--source {argument}: the folder holds no .txt file")
        return Source(path.name, files_identity(paths), lambda _: (Document(path.name, read_text(p)) for p in paths))
    if not path.is_file():
        raise UserError(f"--source {argument}: no such file or folder; 'docs' is the default source")
    if path.suffix == ".txt":
        return Source(path.stem, files_identity([path]), lambda _: text_file(path))
    for ending, opener in JSONL_OPENERS.items():
        if path.name.endswith(ending):
            name = path.name.removesuffix(ending)
            return Source(name, files_identity([path]), lambda _: jsonl_file(path, opener))
    raise UserError(f"--source {argument}: accepted are docs, a folder of .txt, .txt, {', '.join(JSONL_OPENERS)}")


# ---- From documents to token shards ----

def distinct_documents(source: Source, seed: int, skipped: Counter) -> list[Document]:
    """The source's documents in seeded random order, without empty ones and exact duplicates.

    Random order is the order of a seeded hash of the text: it depends neither on the order of collection nor on a
    library's random generator, and a document keeps its place when others are added.
    """
    by_hash, progress = {}, Progress("collecting")
    for document in source.documents(skipped):
        progress.update(f"{len(by_hash):,} documents, now {document.origin}")
        if not document.encodable.strip():
            skipped["empty_documents"] += 1
            continue
        digest = hashlib.blake2b(f"{seed}\n{document.text}".encode(), digest_size=16).digest()
        skipped["duplicate_documents"] += digest in by_hash
        by_hash.setdefault(digest, document)
    documents = [by_hash[digest] for digest in sorted(by_hash)]
    progress.done(f"{len(documents):,} documents, {sum(document.raw_bytes for document in documents) / 1e6:.1f} MB")
    return documents


def split_documents(documents: list[Document], val_docs: int | None) -> dict[str, list[Document]]:
    """{"train": ..., "val": ...}, by document; val_docs None: the default share. Raises UserError if one is empty."""
    if val_docs is None:
        val_docs = max(1, min(VAL_DOCS_MAX, round(len(documents) * VAL_DOCS_FRACTION)))
    if val_docs >= len(documents):
        raise UserError(f"the source gives {len(documents)} distinct documents: {val_docs} for validation leave none to"
                        " train on; give a larger source or a smaller --val-docs")
    return {"train": documents[val_docs:], "val": documents[:val_docs]}


def train_tokenizer(documents: list[Document], vocab_size: int) -> bytes:
    """A serialised SentencePiece model. Raises UserError if the text cannot fill the vocabulary or needs a larger one.

    The documents, already in random order, are used up to TOKENIZER_SAMPLE_BYTES. They go in whole: line breaks are
    ordinary characters to "nfkc" and find their way into pieces, which saves 4 % of the tokens.
    """
    sample, sample_bytes = [], 0
    for document in documents:
        if sample_bytes >= TOKENIZER_SAMPLE_BYTES:
            break
        sample.append(document.encodable)
        sample_bytes += len(sample[-1].encode())
    progress, model = Progress("tokenizer"), io.BytesIO()
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        training = pool.submit(
            spm.SentencePieceTrainer.train, sentence_iterator=iter(sample), model_writer=model, model_type="bpe",
            vocab_size=vocab_size, hard_vocab_limit=True, byte_fallback=True, split_digits=True,
            normalization_rule_name="nfkc", add_dummy_prefix=False, remove_extra_whitespaces=True,
            pad_id=0, bos_id=1, eos_id=2, unk_id=3, character_coverage=0.9995,
            max_sentence_length=2**30,  # longer documents would be left out
            num_threads=1, minloglevel=2)  # the number of threads is stored in the model, so it is fixed
        while not concurrent.futures.wait([training], timeout=PROGRESS_SECONDS).done:
            progress.update(f"training on {sample_bytes / 1e6:.1f} MB")
    try:
        training.result()
    except RuntimeError as error:
        largest = re.search(r"set it to a value <= (\d+)", str(error))
        smallest = re.search(r"smaller than required_chars\. \d+ vs (\d+)", str(error))
        remedy = (f"the text is too small for it: at most {largest[1]}, or give more text" if largest else
                  f"the characters of the text need at least {smallest[1]}" if smallest else str(error))
        raise UserError(f"--vocab-size {vocab_size}: {remedy}") from None
    progress.done(f"{vocab_size} pieces from {sample_bytes / 1e6:.1f} MB")
    return model.getvalue()


def check_byte_count(tokenizer: spm.SentencePieceProcessor, token_bytes: TokenBytes, tokens: np.ndarray) -> None:
    """Raise UserError unless the bytes counted for a document's tokens (bos first) are those of its decoded text."""
    decoded, counted = tokenizer.decode(tokens[1:].tolist()), int(token_bytes.count(tokens).sum())
    if counted != len(decoded.encode()):
        raise UserError(f"the document that begins {decoded[:40]!r} counts {counted} bytes but decodes to"
                        f" {len(decoded.encode())}, so its BPB would be wrong: leave it out of the source")


def encode_split(tokenizer: spm.SentencePieceProcessor, split: str, documents: list) -> tuple[np.ndarray, int]:
    """(uint16 tokens [N] of the documents with bos before each, their normalised bytes).

    Normalised bytes are the UTF-8 length of the text the tokens decode to, as train_gpt.py counts it. Raises UserError
    for a validation document that it counts otherwise.
    """
    token_bytes, progress = TokenBytes(tokenizer), Progress(f"encoding {split}")
    parts, normalised_bytes = [], 0
    for start in range(0, len(documents), ENCODE_BATCH_DOCS):
        batch = [document.encodable for document in documents[start:start + ENCODE_BATCH_DOCS]]
        for tokens in map(np.array, tokenizer.encode(batch, add_bos=True, num_threads=-1)):
            if split == "val":
                check_byte_count(tokenizer, token_bytes, tokens)
            normalised_bytes += int(token_bytes.count(tokens).sum())
            parts.append(tokens.astype("<u2"))
        progress.update(f"{start + len(batch):,} of {len(documents):,} documents")
    stream = np.concatenate(parts)
    progress.done(f"{len(documents):,} documents, {stream.size:,} tokens")
    return stream, normalised_bytes


def write_shards(folder: Path, split: str, tokens: np.ndarray, shard_tokens: int) -> None:
    """Write uint16 tokens as fineweb_<split>_000000.bin and so on, shard_tokens in each but the last.

    A shard is a header of 256 little-endian int32 (magic, version, number of tokens, zeros), then uint16 tokens.
    """
    for number, start in enumerate(range(0, tokens.size, shard_tokens)):
        shard = tokens[start:start + shard_tokens]
        header = np.zeros(SHARD_HEADER_INTS, "<i4")
        header[:3] = SHARD_MAGIC, SHARD_VERSION, shard.size
        with open(folder / f"fineweb_{split}_{number:06d}.bin", "wb") as file:
            header.tofile(file)
            shard.tofile(file)


# ---- The data set as files ----

def file_entry(path: Path) -> dict:
    with open(path, "rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def requested(settings: Settings) -> dict:
    """The part of the manifest that is known before the build, and decides whether a rerun has anything to do."""
    return {"format": MANIFEST_FORMAT, "arguments": settings.arguments, "source": settings.source.identity}


def read_manifest(settings: Settings) -> dict | None:
    """The manifest of a complete data set made for this request; None if there is none, or its files have changed."""
    try:
        manifest = json.loads(settings.manifest.read_text())
        if any(manifest[key] != value for key, value in requested(settings).items()):
            return None
        # Shards by size, since hashing gigabytes on every call costs more than it tells; the small tokenizer by hash.
        same = all((settings.out / name).stat().st_size == entry["bytes"] for name, entry in manifest["files"].items())
        tokenizer = manifest["files"][os.path.relpath(settings.tokenizer, settings.out)]
        return manifest if same and file_entry(settings.tokenizer) == tokenizer else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def write_aside(path: Path, content: bytes) -> None:
    """Write under another name, then rename, so that path is never half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(path.name + ".partial")
    aside.write_bytes(content)
    aside.replace(path)


def publish(settings: Settings, model: bytes, manifest: dict) -> None:
    """Replace whatever data set is there by the finished one. Between the first and the last line there is none."""
    settings.manifest.unlink(missing_ok=True)
    for old in settings.out.glob("fineweb_*.bin"):
        old.unlink()
    for shard in sorted(settings.partial.iterdir()):
        shard.replace(settings.out / shard.name)
    write_aside(settings.tokenizer, model)
    paths = [settings.tokenizer, *sorted(settings.out.glob("fineweb_*.bin"))]
    manifest["files"] = {os.path.relpath(path, settings.out): file_entry(path) for path in paths}
    settings.partial.rmdir()
    write_aside(settings.manifest, json.dumps(manifest, indent=1).encode())


def build(settings: Settings) -> dict:
    """Build the data set, replacing what an earlier build left in its place, and return its manifest."""
    ours = any(path.exists() for path in (settings.manifest, settings.partial, settings.tokenizer))
    if not ours and any(settings.out.glob("fineweb_*.bin")):
        raise UserError(f"--out {settings.out}: holds shards this tool did not write; remove them or choose another")
    skipped = Counter(unparseable_files=0, empty_documents=0, duplicate_documents=0)
    documents = distinct_documents(settings.source, settings.arguments["seed"], skipped)
    splits = split_documents(documents, settings.arguments["val_docs"])
    model = train_tokenizer(splits["train"], settings.arguments["vocab_size"])
    tokenizer = spm.SentencePieceProcessor(model_proto=model)
    shutil.rmtree(settings.partial, ignore_errors=True)
    settings.partial.mkdir(parents=True)
    counts, origins = {}, {}
    for split, members in splits.items():
        tokens, normalised_bytes = encode_split(tokenizer, split, members)
        write_shards(settings.partial, split, tokens, settings.arguments["shard_tokens"])
        counts[split] = {"documents": len(members), "tokens": tokens.size, "normalised_bytes": normalised_bytes,
                         "raw_bytes": sum(document.raw_bytes for document in members)}
    for document in documents:
        origins.setdefault(document.origin, Counter()).update(documents=1, raw_bytes=document.raw_bytes)
    versions = {name: importlib.metadata.version(name) for name in ("sentencepiece", "numpy", "zstandard")}
    versions["python"] = platform.python_version()
    manifest = {**requested(settings), "versions": versions, "splits": counts, "skipped": skipped,
                "origins": dict(sorted(origins.items()))}
    publish(settings, model, manifest)
    return manifest


# ---- Command line ----

class ArgumentParser(argparse.ArgumentParser):
    def error(self, message: str):
        raise UserError(f"{message}; see --help")


def parse_arguments(argv: list[str], requirements: Path) -> Settings:
    """Settings of a command line, checked before anything is read. Raises UserError."""
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", default="docs", help="docs (default), a file or a folder; ./docs for a folder docs")
    parser.add_argument("--out", type=Path, help="folder for shards, manifest and tokenizer; default: shards in"
                        " data/datasets/NAME_spVOCAB, tokenizer data/tokenizers/NAME_VOCAB_bpe.model")
    parser.add_argument("--vocab-size", type=int, default=1024, help="pieces, at most 65536 (tokens are uint16)")
    parser.add_argument("--val-docs", type=int, help="documents for validation; default: one in 55, at most 50000")
    parser.add_argument("--seed", type=int, default=1337, help="of the order of documents, and so of the split")
    parser.add_argument("--shard-tokens", type=int, default=100_000_000, help="tokens in each shard but the last")
    arguments = vars(parser.parse_args(argv))
    for name, largest in (("vocab_size", 2**16), ("val_docs", 2**31 - 1), ("shard_tokens", 2**31 - 1)):
        value = arguments[name]
        if value is not None and not 1 <= value <= largest:
            raise UserError(f"--{name.replace('_', '-')} {value}: must be from 1 to {largest}")
    out, source = arguments.pop("out"), open_source(arguments["source"], requirements)
    data, vocab_size = REPOSITORY / "data", arguments["vocab_size"]
    # With --out the tokenizer lies beside the shards, so that two data sets never share, and overwrite, one.
    tokenizer = (out or data / "tokenizers") / f"{source.name}_{vocab_size}_bpe.model"
    out = out or data / "datasets" / f"{source.name}_sp{vocab_size}"
    return Settings(arguments, source, out.absolute(), tokenizer.absolute())


def main(argv: list[str], requirements: Path = REPOSITORY / "requirements.txt") -> int:
    """Exit status: 0, or 1 after one line on stderr."""
    try:
        settings = parse_arguments(argv, requirements)
        for package, version in settings.source.identity.get("packages", {}).items():
            if version is None:
                print(f"{package} of {requirements.name} is not installed: skipped, so the corpus is not the usual one")
        manifest = read_manifest(settings)
        print(f"{settings.out}: {'building' if manifest is None else 'already complete, nothing to do'}", flush=True)
        manifest = manifest or build(settings)
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for split, counts in manifest["splits"].items():
        print(f"{split}: " + ", ".join(f"{value:,} {name}" for name, value in counts.items()))
    print("skipped: " + ", ".join(f"{value:,} {name}" for name, value in manifest["skipped"].items()))
    paths = f"DATA_PATH={shlex.quote(str(settings.out))} TOKENIZER_PATH={shlex.quote(str(settings.tokenizer))}"
    print(f"{paths} VOCAB_SIZE={settings.arguments['vocab_size']}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
