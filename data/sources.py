"""Where the documents of data/build_dataset.py come from: docstrings, .txt, .jsonl (also compressed) and .parquet.

A source is listed as units, which worker processes read independently of each other. Nothing here holds more than one
document and one block of a file in memory.
"""
import ast
import codecs
import contextlib
import gc
import gzip
import hashlib
import importlib.metadata
import inspect
import json
import lzma
import platform
import pydoc_data.topics
import re
import sysconfig
import warnings
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import zstandard
from dataset_files import UserError

MIN_DOCSTRING_CHARS = 200
MIN_PARAGRAPH_CHARS = 2000  # a lone .txt is cut at blank lines into documents of at least this size
# Not in every Python of the same version (distributions move them to packages of their own), so left out everywhere.
STDLIB_LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "turtledemo"}
# Functions that attach a docstring to a function written in C: most of torch's and numpy's reference is in such calls.
DOCSTRING_CALLS = {"add_newdoc", "add_docstr", "_add_docstr", "add_docstr_all"}
MAX_DOCUMENT_BYTES = 64_000_000  # SentencePiece takes some 50 times a document's size in memory
UNIT_BYTES = 64_000_000  # of input that one task reads
BLANK_LINES = re.compile(r"\n[ \t\r]*+\n\s*+(?=\S)")  # and the white space up to the next paragraph
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
    """A part of a source that one task reads. reader(*arguments, skipped) yields its documents in order, and adds what
    it leaves out to the counter `skipped`, by reason."""
    reader: Callable[..., Iterator[Document]]
    arguments: tuple


class Source(NamedTuple):
    name: str  # names the data set's folder and its tokenizer
    identity: dict  # JSON-ready; a rerun with an equal identity has nothing to do
    units: Callable[[], list[Unit]]


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
    try:
        for origin, path in files:
            texts = docstrings(path)
            skipped["unparseable_files"] += texts is None
            yield from (Document(origin, text) for text in texts or [])
    finally:
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
    rest, scanned = "", 0  # no document ends in rest[:scanned]
    for block in decoded_blocks(path):
        rest, start = rest + block, 0
        end = len(rest.rstrip())  # the white space behind may go on in the next block
        for blank in BLANK_LINES.finditer(rest, scanned, end):
            if blank.end() - start >= MIN_PARAGRAPH_CHARS:
                yield Document(path.name, rest[start:blank.end()])
                start = blank.end()
        rest, scanned = rest[start:], max(0, end - start)
        if len(rest) > MAX_DOCUMENT_BYTES:
            raise UserError(f"{path}: {len(rest):,} characters without a blank line, where documents of a .txt end:"
                            " give a .jsonl, or a folder of .txt, one for each document")
    yield Document(path.name, rest)


def text_files(paths: list[Path], origin: str, skipped: Counter) -> Iterator[Document]:
    """A document a file."""
    for path in paths:
        if path.stat().st_size > MAX_DOCUMENT_BYTES:
            raise UserError(f"{path}: {path.stat().st_size:,} bytes are too many for one document: cut the file, or"
                            " give it by itself, not in a folder, to have it cut at blank lines")
        yield Document(origin, "".join(decoded_blocks(path)))


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
    if rest:
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
    with open(path, "rb") as file:
        file.seek(max(0, start - 1))
        if start:
            file.readline()  # ends the line before, which began before start
        first = file.tell()

        def lines() -> Iterator[bytes]:
            while file.tell() < end and (line := file.readline()):
                yield line

        def lines_before() -> int:
            file.seek(0)
            return sum(file.read(size).count(b"\n") for size in (*[2**20] * (first // 2**20), first % 2**20))

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
        raise UserError(f"{path}: .parquet needs pyarrow: run 'make env', or pip install pyarrow") from None


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
    kinds = [kind.value_type if pyarrow.types.is_dictionary(kind) else kind for kind in kinds]
    if len(kinds) != 1 or str(kinds[0]) not in ("string", "large_string", "string_view"):
        columns = ", ".join(f"{field.name} ({field.type})" for field in schema)
        raise UserError(f'{path}: needs one column "text" of strings, has {columns}: rename or convert it')
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


def open_source(option: str, argument: str, requirements: Path) -> Source:
    """The source that the value of an option stands for; nothing is read yet. Raises UserError if there is none."""
    if argument == "docs":
        versions = installed_versions(requirements)
        packages = [name for name, version in versions.items() if version is not None]

        def units() -> list[Unit]:
            files = documentation_files(packages)
            return [Unit(documentation, (files[start:start + 256],)) for start in range(0, len(files), 256)] + [
                Unit(pydoc_topics, ())]
        return Source("pydocs", {"python": platform.python_version(), "packages": versions}, units)
    path = Path(argument).absolute()  # not resolved: a link's own name says what the file is
    if path.is_dir():
        paths = sorted(file for file in path.rglob("*") if file.name.endswith(ENDINGS) and file.is_file())
        if not paths:
            raise UserError(f"{option} {argument}: the folder holds no {', '.join(ENDINGS)}")
        return Source(path.name, files_identity(paths), lambda: folder_units(path, paths))
    if not path.is_file():
        raise UserError(f"{option} {argument}: no such file or folder; 'docs' is the default source")
    for ending in ENDINGS:
        if path.name.endswith(ending):
            return Source(path.name.removesuffix(ending), files_identity([path]), lambda: file_units(path))
    raise UserError(f"{option} {argument}: accepted are docs and files or folders of {', '.join(ENDINGS)}")
