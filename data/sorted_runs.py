"""The external sort of data/build_dataset.py: documents of any number, sorted and without duplicates, in little memory.

Worker processes write runs: files of some tens of megabytes of text whose documents are sorted by key. Afterwards the
range of keys is cut into buckets of a few megabytes; a bucket's documents are a stretch of every run, which one task
reads and merges. The key is a hash of the text (shuffled order) or the position in the sources (their own order), so
neither the number of workers nor the cut decides where a document ends up.
"""
import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from dataset_files import UserError
from sources import MAX_DOCUMENT_BYTES, Document, Unit

RUN_BYTES = 64_000_000  # of text that a worker holds before it writes a run
DOCUMENT_OVERHEAD_BYTES = 500  # that Python takes beside a document's text
BUCKET_BYTES = 8_000_000  # of text that one task encodes
SAMPLES_PER_BUCKET = 32  # keys that are looked at, to cut buckets of about that size
GROUP_DOCS = 2_000_000  # documents whose digests are compared at once
VAL_POOL, MAIN_POOL = 0, 1  # documents of --val-source, and all others
ORDINAL_BITS = 40  # a position is the number of the unit, then that of the document in the unit
END_OF_KEYS = 2**64

# A document in a run. The digest (high and low half) is that of seed and text: equal digests are equal texts. The key
# is the digest's high half or the position; documents with equal keys lie in the same bucket, sorted by the low half.
ROW = np.dtype([("key", "<u8"), ("high", "<u8"), ("low", "<u8"), ("position", "<u8"), ("offset", "<u8"),
                ("bytes", "<u4"), ("origin", "<u4"), ("keep", "u1")])


class Run(NamedTuple):
    """Sorted documents of one pool. PATH.text holds their texts, PATH.rows their rows, PATH.origins the names that the
    rows number, and PATH.keys the rows' keys once more, so that finding one reads little."""
    path: Path
    pool: int
    documents: int
    text_bytes: int

    @classmethod
    def write(cls, path: Path, pool: int, texts: list[bytes], rows: list[tuple], origins: list[str]) -> "Run":
        table = np.array(rows, ROW)
        sorting = np.lexsort((table["low"], table["key"]))
        table = table[sorting]
        table["offset"][1:] = np.cumsum(table["bytes"][:-1], dtype=np.uint64)
        with open(path.with_suffix(".text"), "wb") as file:
            file.writelines(texts[index] for index in sorting)
        path.with_suffix(".rows").write_bytes(table.tobytes())
        path.with_suffix(".keys").write_bytes(table["key"].tobytes())
        path.with_suffix(".origins").write_text(json.dumps(origins))
        return cls(path, pool, len(table), int(table["bytes"].sum()))

    def rows(self, first: int = 0, count: int = -1) -> np.ndarray:
        return np.fromfile(self.path.with_suffix(".rows"), ROW, count, offset=first * ROW.itemsize)

    def rows_of_keys(self, first_key: int, end_key: int) -> np.ndarray:
        """Rows with first_key <= key < end_key."""
        keys = np.memmap(self.path.with_suffix(".keys"), "<u8", "r")
        first, end = (self.documents if key == END_OF_KEYS else int(np.searchsorted(keys, np.uint64(key)))
                      for key in (first_key, end_key))
        return self.rows(first, end - first) if end > first else np.empty(0, ROW)

    def text(self, start: int, end: int) -> bytes:
        with open(self.path.with_suffix(".text"), "rb") as file:
            file.seek(start)
            return file.read(end - start)

    def origins(self) -> list[str]:
        return json.loads(self.path.with_suffix(".origins").read_text())


class Collected(NamedTuple):
    """What came of a unit."""
    runs: list[Run]
    skipped: Counter
    records: int  # documents, those left out included


class Collector(NamedTuple):
    """Turns units into runs, in worker processes."""
    folder: Path
    seed: int
    order: str  # "shuffled" or "source"

    def __call__(self, task: tuple[int, int, Unit]) -> Collected:
        """The unit of a task (number of the unit, pool, unit). Raises UserError."""
        number, pool, unit = task
        collected, texts, rows, origins, held = Collected([], Counter(), 0), [], [], {}, 0

        def write_run() -> None:
            path = self.folder / f"{number:08d}_{len(collected.runs):06d}"
            collected.runs.append(Run.write(path, pool, texts, rows, list(origins)))

        records = 0
        for ordinal, document in enumerate(unit.reader(*unit.arguments, collected.skipped)):
            records += 1
            if not document.encodable.strip():
                collected.skipped["empty_documents"] += 1
                continue
            text = document.text.encode()
            if len(text) > MAX_DOCUMENT_BYTES:
                raise UserError(f"a document of {document.origin} has {len(text):,} bytes, more than"
                                f" {MAX_DOCUMENT_BYTES:,}: cut it up or leave it out")
            digest = hashlib.blake2b(b"%d\n%b" % (self.seed, text), digest_size=16).digest()
            high, low = int.from_bytes(digest[:8]), int.from_bytes(digest[8:])
            position = number << ORDINAL_BITS | ordinal
            rows.append((high if self.order == "shuffled" else position, high, low, position, 0, len(text),
                         origins.setdefault(document.origin, len(origins)), 1))
            texts.append(text)
            held += len(text) + DOCUMENT_OVERHEAD_BYTES
            if held >= RUN_BYTES:
                write_run()
                texts, rows, origins, held = [], [], {}, 0
        if rows:
            write_run()
        return collected._replace(records=records)


def drop_duplicates(runs: list[Run]) -> int:
    """Clears "keep" of every document whose text occurred at an earlier position; returns how many. The val pool comes
    before the main one.

    Digests are compared in groups, by their first 32 bits, so that a group fits in memory; "keep" is a byte a document.
    """
    total = sum(run.documents for run in runs)
    keep = [np.ones(run.documents, bool) for run in runs]
    groups = -(-total // GROUP_DOCS)
    for group in range(groups):
        parts, owners = [], []
        for number, run in enumerate(runs):
            rows = run.rows()
            group_of_row = (rows["high"] >> np.uint64(32)) * np.uint64(groups) >> np.uint64(32)  # scaled to 0..groups-1
            chosen = np.flatnonzero(group_of_row == group)
            parts.append(rows[["high", "low", "position"]][chosen])
            owners.append(np.stack([np.full(len(chosen), number), chosen]))
        rows, (numbers, indices) = np.concatenate(parts), np.concatenate(owners, axis=1)
        sorting = np.lexsort((rows["position"], rows["low"], rows["high"]))
        digests = rows[["high", "low"]][sorting]
        for later in sorting[1:][digests[1:] == digests[:-1]]:
            keep[numbers[later]][indices[later]] = False
    for run, kept in zip(runs, keep, strict=True):
        if not kept.all():
            rows = run.rows()
            rows["keep"] = kept
            run.path.with_suffix(".rows").write_bytes(rows.tobytes())
    return sum(int(np.count_nonzero(~kept)) for kept in keep)


class Bucket(NamedTuple):
    """The kept documents of a pool with first_key <= key < end_key: what one task encodes."""
    pool: int
    first_key: int
    end_key: int

    def rows(self, runs: list[Run]) -> list[tuple[Run, np.ndarray]]:
        """Each run's stretch of rows, kept and dropped."""
        stretches = [(run, run.rows_of_keys(self.first_key, self.end_key)) for run in runs if run.pool == self.pool]
        return [(run, rows) for run, rows in stretches if len(rows)]

    def keys(self, runs: list[Run]) -> np.ndarray:
        """Of the kept documents, in order."""
        return np.sort(np.concatenate([rows["key"][rows["keep"] == 1] for _, rows in self.rows(runs)] or [[]]))

    def documents(self, runs: list[Run]) -> Iterator[Document]:
        """In order."""
        stretches, texts = self.rows(runs), []
        for run, rows in stretches:
            start, end = int(rows["offset"][0]), int(rows["offset"][-1]) + int(rows["bytes"][-1])
            texts.append(run.text(start, end))
            rows["offset"] -= np.uint64(start)
        origins = [run.origins() for run, _ in stretches]
        owners = np.repeat(np.arange(len(stretches)), [len(rows) for _, rows in stretches])
        table = np.concatenate([rows for _, rows in stretches] or [np.empty(0, ROW)])
        for index in np.lexsort((table["low"], table["key"])):
            owner, row = owners[index], table[index]
            if row["keep"]:
                start, end = int(row["offset"]), int(row["offset"]) + int(row["bytes"])
                yield Document(origins[owner][row["origin"]], texts[owner][start:end].decode())


def cut_into_buckets(runs: list[Run], pool: int) -> list[Bucket]:
    """All documents of a pool, in buckets of about BUCKET_BYTES of text.

    A key is sampled each time that another BUCKET_BYTES / SAMPLES_PER_BUCKET of text have gone by, from run to run; of
    the sampled keys, sorted, each SAMPLES_PER_BUCKET-th is where a bucket ends.
    """
    step, before, samples = max(1, BUCKET_BYTES // SAMPLES_PER_BUCKET), 0, [np.empty(0, "<u8")]
    for run in runs:
        if run.pool == pool:
            rows = run.rows()
            at = np.arange(-before % step, run.text_bytes, step, dtype=np.uint64)
            samples.append(rows["key"][np.searchsorted(rows["offset"], at, side="right") - 1])
            before += run.text_bytes
    cuts = np.unique(np.sort(np.concatenate(samples))[SAMPLES_PER_BUCKET::SAMPLES_PER_BUCKET]).tolist()
    return [Bucket(pool, *keys) for keys in zip([0, *cuts], [*cuts, END_OF_KEYS])]


def key_of_kept(runs: list[Run], buckets: list[Bucket], number: int) -> int:
    """The key of the kept document with this number, in the order of the buckets; END_OF_KEYS if there are fewer."""
    for bucket in buckets:
        keys = bucket.keys(runs)
        if number < len(keys):
            return int(keys[number])
        number -= len(keys)
    return END_OF_KEYS


def key_of_record(records: list[int], number: int) -> int:
    """In the order of the source: the key of the record with this number, empty and repeated ones counted; records has
    the number of them in each unit. END_OF_KEYS if there are fewer."""
    for unit, count in enumerate(records):
        if number < count:
            return unit << ORDINAL_BITS | number
        number -= count
    return END_OF_KEYS


def cut_at(buckets: list[Bucket], key: int) -> tuple[list[Bucket], list[Bucket]]:
    """The documents before a key, and the others."""
    before = [bucket._replace(end_key=min(bucket.end_key, key)) for bucket in buckets if bucket.first_key < key]
    return before, [bucket._replace(first_key=max(bucket.first_key, key)) for bucket in buckets if bucket.end_key > key]
