"""data/build_dataset.py on small inputs made here: byte counting, shard layout, sources, splits, reruns, errors."""
import gzip
import hashlib
import json
import lzma
import os
import random
import re
import struct
import subprocess
import sys
import unicodedata
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import sentencepiece as spm
import zstandard

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "data")]
import build_dataset  # noqa: E402
import dataset_files  # noqa: E402
import sorted_runs  # noqa: E402
import sources  # noqa: E402

from train_gpt import TokenBytes  # noqa: E402

VOCAB_SIZE = 450
TRICKY = {
    "digits": "In 2024, 1234567890 + 3.14e-10 = ٣٤٥ ½ ²³",
    "emoji": "👍🏽 family 👩‍👩‍👧‍👦 flag 🇫🇷 😀😀",
    "cjk": "日本語のテキスト、中文字符。한국어",
    "control characters": "nul\x00 bell\x07 escape\x1b[0m delete\x7f c1\x80\x9f end",
    "format characters": "\ufeffzero\u200bwidth\u200d soft\u00adhyphen \u200emark",
    "full-width forms": "ＡＢＣ１２３　ｶﾞ ﬁ Å ™",
    "indentation": "def f(x):\n    if x:\n\t\treturn  [1,\n                2]\n",
    "tabs and newlines": "\ta\t\tb\r\nc\n\n\nd\x0be\x0cf\x85g\u2028h",
    "broken spacing": "  lead   inner \u00a0\u2003\u3000 mixed  , trail   ",
    "only spaces between newlines": "\n \n  \n   x",
    "lone U+2581": "\u2581",
    "U+2581 leading and inside": " \u2581\u2581 \u2581a\u2581\u2581b \u2581 c\u2581",
    "combining marks": "e\u0301 n\u0303o a\u0323\u0308 \u00b4 \u00a8x",
    "control tokens spelled out": "<s>a</s> <unk><pad><0x41> \u2047 ",
    "unassigned and private": "\ufffd \ue000 \U0010ffff",
    "mixed": "  \u2581Ｎｏ．１２\t👍\u3000\x00 e\u0301\n\n  日本  ",
}


def words(seed: int, count: int) -> str:
    """Text of made-up words, varied enough for VOCAB_SIZE pieces."""
    rng = random.Random(seed)
    return " ".join("".join(rng.choices("abcdefghij", k=rng.randint(1, 9))) for _ in range(count))


TEXTS = [f"document {number}\n\n    {words(number, 60)}\n" for number in range(40)]


def build(source, out: Path, *options: str) -> int:
    arguments = ["--source", str(source), "--out", str(out), "--vocab-size", str(VOCAB_SIZE), *options]
    return build_dataset.main(arguments, requirements=out.parent / "requirements.txt")


def jsonl(path: Path, texts: list[str], compress=lambda content: content) -> Path:
    path.write_bytes(compress("".join(json.dumps({"text": text, "id": 7}) + "\n" for text in texts).encode()))
    return path


def read_split(out: Path, split: str) -> list[int]:
    """Tokens of a split, read from the bytes alone."""
    tokens = []
    for path in sorted(out.glob(f"fineweb_{split}_*.bin")):
        content = path.read_bytes()
        magic, version, count, *zeros = struct.unpack("<256i", content[:1024])
        assert (magic, version, set(zeros)) == (20240520, 1, {0})
        assert len(content) == 1024 + 2 * count
        tokens += struct.unpack(f"<{count}H", content[1024:])
    return tokens


def load_tokenizer(out: Path) -> spm.SentencePieceProcessor:
    (model,) = out.glob("*_bpe.model")
    return spm.SentencePieceProcessor(model_file=str(model))


def decoded_documents(out: Path, split: str) -> list[str]:
    """The split's documents as text; bos (1) starts each."""
    documents = []
    for token in read_split(out, split):
        if token == 1:
            documents.append([])
        else:
            documents[-1].append(token)
    return load_tokenizer(out).decode(documents)


def normalised(text: str) -> str:
    """What the tokenizer makes of a text, without the tokenizer: NFKC, runs of spaces to one, none at the ends.

    SentencePiece's "nfkc" drops no character, and tabs and line breaks are not spaces to it. It composes marks but does
    not sort them: text with several marks on one letter, out of canonical order, is beyond this function.
    """
    return re.sub(" +", " ", unicodedata.normalize("NFKC", text.replace("\u2581", " "))).strip(" ")


def file_bytes(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return jsonl(tmp_path_factory.mktemp("source") / "corpus.jsonl", TEXTS + list(TRICKY.values()))


@pytest.fixture(scope="module")
def built(source, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("built") / "out"
    assert build(source, out, "--val-docs", "20", "--shard-tokens", "1500") == 0
    return out


# ---- Byte counting ----

@pytest.mark.parametrize("name", TRICKY)
def test_counted_bytes_are_those_of_decoded_and_of_normalised_text(built, name):
    tokenizer = load_tokenizer(built)
    document = sources.Document("test", TRICKY[name])
    ids = tokenizer.encode(document.encodable)
    counted = TokenBytes(tokenizer).count(np.array([1, *ids])).sum()
    assert tokenizer.decode(ids) == normalised(TRICKY[name])
    assert counted == len(tokenizer.decode(ids).encode()) == len(normalised(TRICKY[name]).encode())


def test_tokenizer_drops_no_control_or_format_character(built):
    tokenizer = load_tokenizer(built)
    for character in map(chr, range(0x110000)):
        if unicodedata.category(character) in ("Cc", "Cf"):
            text = f"a{character}b"
            assert tokenizer.decode(tokenizer.encode(text)) == text


def test_tokenizer_settings(built):
    tokenizer = load_tokenizer(built)
    assert (tokenizer.pad_id(), tokenizer.bos_id(), tokenizer.eos_id(), tokenizer.unk_id()) == (0, 1, 2, 3)
    assert tokenizer.vocab_size() == VOCAB_SIZE
    assert sum(tokenizer.is_byte(token) for token in range(VOCAB_SIZE)) == 256
    assert not any(re.search(r"\d.|.\d", tokenizer.id_to_piece(token)) for token in range(260, VOCAB_SIZE))
    assert not tokenizer.encode_as_pieces("abc")[0].startswith("\u2581")


def test_build_stops_where_counted_bytes_are_not_the_decoded_ones(source, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(build_dataset.TokenBytes, "count", lambda self, tokens: np.ones(len(tokens) - 1, np.int64))
    assert build(source, tmp_path / "out") == 1
    assert "but decodes to" in capsys.readouterr().err
    assert not (tmp_path / "out" / "manifest.json").exists()


# ---- Shards, splits, manifest ----

def test_shards_hold_every_document_once_in_one_split(built):
    assert len(list(built.glob("fineweb_train_*.bin"))) > 1
    train, val = decoded_documents(built, "train"), decoded_documents(built, "val")
    assert len(val) == 20
    expected = sorted(normalised(text) for text in TEXTS + list(TRICKY.values()) if text != TRICKY["lone U+2581"])
    assert sorted(train + val) == expected
    assert not set(train) & set(val)


def test_byte_layout_is_the_fields(tmp_path):
    """Written out by hand from the published format, so that no constant of ours can be wrong on both sides."""
    writer = build_dataset.ShardWriter(tmp_path, "train", 3)
    writer.write(np.array([1, 258, 65535, 7], np.uint16))
    writer.finish()
    first, second = ((tmp_path / f"fineweb_train_00000{number}.bin").read_bytes() for number in range(2))
    assert first == b"\x88\xd8\x34\x01" b"\x01\0\0\0" b"\x03\0\0\0" + bytes(1012) + b"\x01\0\x02\x01\xff\xff"
    assert second == b"\x88\xd8\x34\x01" b"\x01\0\0\0" b"\x01\0\0\0" + bytes(1012) + b"\x07\0"


def test_all_shards_but_the_last_are_full(built):
    sizes = [(path.stat().st_size - 1024) // 2 for path in sorted(built.glob("fineweb_train_*.bin"))]
    assert set(sizes[:-1]) == {1500}
    assert 0 < sizes[-1] <= 1500


def test_manifest_matches_the_files(built):
    manifest = json.loads((built / "manifest.json").read_text())
    assert set(manifest["files"]) == {path.name for path in built.iterdir()} - {"manifest.json"}
    for name, entry in manifest["files"].items():
        content = (built / name).read_bytes()
        assert entry == {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    for split, counts in manifest["splits"].items():
        documents = decoded_documents(built, split)
        assert counts["documents"] == len(documents)
        assert counts["tokens"] == len(read_split(built, split))
        assert counts["normalised_bytes"] == sum(len(document.encode()) for document in documents)
    raw_bytes = sum(len(text.encode()) for text in TEXTS + list(TRICKY.values())) - len("\u2581".encode())
    assert sum(counts["raw_bytes"] for counts in manifest["splits"].values()) == raw_bytes
    assert manifest["origins"] == {"corpus.jsonl": {"documents": 55, "raw_bytes": raw_bytes}}
    assert manifest["skipped"] == {"unparseable_files": 0, "empty_documents": 1, "duplicate_documents": 0,
                                   "training_documents_in_validation": 0}


def test_duplicates_are_dropped_across_the_whole_source(tmp_path, capsys):
    source = jsonl(tmp_path / "twice.jsonl", [*TEXTS, "", " \n\t", *TEXTS, TEXTS[0] + "!"])
    assert build(source, tmp_path / "out") == 0
    documents = decoded_documents(tmp_path / "out", "train") + decoded_documents(tmp_path / "out", "val")
    assert sorted(documents) == sorted(normalised(text) for text in [*TEXTS, TEXTS[0] + "!"])
    assert "40 duplicate_documents" in capsys.readouterr().out


def test_same_seed_same_bytes_other_seed_other_split(source, built, tmp_path):
    assert build(source, tmp_path / "same", "--val-docs", "20", "--shard-tokens", "1500") == 0
    assert file_bytes(tmp_path / "same") == file_bytes(built)
    assert build(source, tmp_path / "other", "--val-docs", "20", "--seed", "1") == 0
    assert sorted(decoded_documents(tmp_path / "other", "val")) != sorted(decoded_documents(built, "val"))


def test_split_does_not_depend_on_the_order_of_the_source(built, tmp_path):
    source = jsonl(tmp_path / "corpus.jsonl", [*TRICKY.values(), *reversed(TEXTS)])
    assert build(source, tmp_path / "out", "--val-docs", "20") == 0
    assert read_split(tmp_path / "out", "train") == read_split(built, "train")


# ---- Scale: nothing depends on how the work is cut ----

@pytest.mark.parametrize("order", ["shuffled", "source"])
def test_workers_and_sizes_of_the_parts_do_not_change_a_byte(source, tmp_path, monkeypatch, order):
    twice = jsonl(tmp_path / "twice.jsonl", [*TEXTS[:9], *(text + "." for text in TEXTS)])
    options = ["--order", order, "--source", str(source), str(twice), "--val-docs", "20", "--shard-tokens", "999"]
    assert build(source, tmp_path / "whole", *options, "--workers", "1") == 0
    for module, name, size in ((sources, "UNIT_BYTES", 3000), (sorted_runs, "RUN_BYTES", 4000),
                               (sorted_runs, "BUCKET_BYTES", 1500), (sorted_runs, "GROUP_DOCS", 7),
                               (build_dataset, "ENCODE_BATCH_DOCS", 3)):
        monkeypatch.setattr(module, name, size)  # the worker processes are forks and see it
    for workers in (1, 3):
        out = tmp_path / f"{workers}_workers"
        assert build(source, out, *options, "--workers", str(workers)) == 0
        assert file_bytes(out) == file_bytes(tmp_path / "whole")
    assert json.loads((out / "manifest.json").read_text())["skipped"]["duplicate_documents"] == 9


@pytest.mark.parametrize("run_bytes", [600, 2000, 10**6])  # a document a run, a few, all
def test_runs_and_buckets_are_as_small_as_asked(source, tmp_path, monkeypatch, run_bytes):
    monkeypatch.setattr(sorted_runs, "RUN_BYTES", run_bytes)
    monkeypatch.setattr(sorted_runs, "BUCKET_BYTES", 1500)
    arguments = ["--source", str(source), "--out", str(tmp_path / "out")]
    settings = build_dataset.parse_arguments(arguments, Path("unused"))
    settings.partial.mkdir(parents=True)
    runs, records = build_dataset.collect(settings, Counter())
    assert records == [len(TEXTS) + len(TRICKY)]
    assert max(run.text_bytes + 500 * run.documents for run in runs) < run_bytes + 1500  # and one document
    buckets = sorted_runs.cut_into_buckets(runs, sorted_runs.MAIN_POOL)
    texts = [[document.text for document in bucket.documents(runs)] for bucket in buckets]
    assert len(buckets) > 5 and max(sum(map(len, bucket)) for bucket in texts) < 3 * 1500
    assert sorted(text for bucket in texts for text in bucket) == sorted(
        [*TEXTS, *(text for text in TRICKY.values() if text != TRICKY["lone U+2581"])])


def test_few_tasks_are_started_ahead():
    started = []

    def tasks():
        for number in range(50):
            started.append(number)
            yield number
    for result in dataset_files.in_order(lambda number: 10 * number, tasks(), 2):
        assert result // 10 < len(started) <= result // 10 + 4
    assert result == 490


def test_order_of_the_source_is_kept_and_validation_comes_first(tmp_path):
    source = jsonl(tmp_path / "corpus.jsonl", [TEXTS[3], *TEXTS, TEXTS[5] + "!"])
    assert build(source, tmp_path / "out", "--order", "source", "--val-docs", "4") == 0
    expected = [normalised(text) for text in [TEXTS[3], *TEXTS[:3], *TEXTS[4:], TEXTS[5] + "!"]]
    assert decoded_documents(tmp_path / "out", "val") == expected[:4]
    assert decoded_documents(tmp_path / "out", "train") == expected[4:]


def test_what_is_left_out_does_not_move_the_official_cut(tmp_path):
    source = jsonl(tmp_path / "corpus.jsonl", [TEXTS[0], TEXTS[0], "", *TEXTS[1:]])
    assert build(source, tmp_path / "out", "--order", "source", "--val-docs", "5") == 0
    assert decoded_documents(tmp_path / "out", "val") == [normalised(text) for text in TEXTS[:3]]
    assert decoded_documents(tmp_path / "out", "train") == [normalised(text) for text in TEXTS[3:]]


@pytest.mark.parametrize("order", ["shuffled", "source"])
def test_documents_of_both_inputs_are_in_validation_only(tmp_path, capsys, order):
    spaced = [text.replace(" ", "   ", 1) for text in TEXTS[5:8]]  # other bytes, the same tokens
    train, val = jsonl(tmp_path / "a.jsonl", [*TEXTS[3:], *spaced]), jsonl(tmp_path / "b.jsonl", [*TEXTS[:8], TEXTS[0]])
    assert build(train, tmp_path / "out", "--val-source", str(val), "--order", order) == 0
    expected = [normalised(text) for text in TEXTS]
    assert sorted(decoded_documents(tmp_path / "out", "val")) == sorted(expected[:8])
    assert sorted(decoded_documents(tmp_path / "out", "train")) == sorted(expected[8:])
    assert "6 duplicate_documents, 3 training_documents_in_validation" in capsys.readouterr().out
    assert build(train, tmp_path / "few", "--val-source", str(val), "--order", order, "--val-docs", "2") == 0
    val, train = (decoded_documents(tmp_path / "few", split) for split in ("val", "train"))
    assert len(val) == 2 and not set(val) & set(train) and set(expected[8:]) <= set(train)


def test_documents_and_bytes_are_counted_by_source(tmp_path, monkeypatch):
    lines = [{"text": text, "source": f"s{number % 3}"} for number, text in enumerate(TEXTS)] + [{"text": "no source"}]
    (tmp_path / "c.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert build(tmp_path / "c.jsonl", tmp_path / "out") == 0
    origins = json.loads((tmp_path / "out" / "manifest.json").read_text())["origins"]
    assert origins == {"c.jsonl": {"documents": 1, "raw_bytes": 9}} | {
        f"s{n}": {"documents": len(TEXTS[n::3]), "raw_bytes": sum(len(text) for text in TEXTS[n::3])} for n in range(3)}
    monkeypatch.setattr(build_dataset, "MAX_ORIGINS", 2)
    assert build(tmp_path / "c.jsonl", tmp_path / "two", "--order", "source") == 0
    origins = json.loads((tmp_path / "two" / "manifest.json").read_text())["origins"]
    assert {name: counts["documents"] for name, counts in origins.items()} == {"(others)": 14, "s0": 14, "s1": 13}


def test_tokenizer_is_reused(built, source, tmp_path, capsys):
    (model,) = built.glob("*.model")
    shards = [f"--shard-tokens={1500}", "--val-docs=20"]
    arguments = ["--source", str(source), "--tokenizer", str(model), "--out"]
    assert build_dataset.main([*arguments, str(tmp_path / "out"), *shards]) == 0
    same = {name: content for name, content in file_bytes(built).items() if name != "manifest.json"}
    assert same.items() <= file_bytes(tmp_path / "out").items()
    assert build_dataset.main([*arguments, str(tmp_path / "out"), *shards]) == 0
    assert "nothing to do" in capsys.readouterr().out
    assert build_dataset.main([*arguments, str(tmp_path / "other"), "--vocab-size", "500"]) == 1
    assert f"--vocab-size 500: --tokenizer {model} has 450 pieces" in capsys.readouterr().err


def test_disk_full_is_one_line_and_leaves_nothing(tmp_path):
    """On a file system of 64 KB, in a mount namespace of its own."""
    source = jsonl(tmp_path / "corpus.jsonl", [words(number, 60) for number in range(400)])
    (tmp_path / "small").mkdir()
    command = ['mount -t tmpfs -o size=64k tmpfs "$0" && "$@"; echo "status $?"; ls -A "$0"', str(tmp_path / "small"),
               sys.executable, str(REPOSITORY / "data" / "build_dataset.py"), "--source", str(source),
               "--vocab-size", "450", "--out", str(tmp_path / "small" / "out")]
    done = subprocess.run(["unshare", "-rm", "sh", "-c", *command], capture_output=True, text=True)
    if "status" not in done.stdout or "mount:" in done.stderr:
        pytest.skip("no mount namespaces here: " + done.stderr.strip())
    assert done.stderr.startswith("error: no space left for ") and done.stderr.count("\n") == 1
    assert done.stdout.endswith("status 1\n"), done.stdout


# ---- Sources ----

@pytest.mark.parametrize("row_group_size", [7, 1000])
def test_parquet_gives_the_same_shards(built, tmp_path, row_group_size):
    texts = TEXTS + list(TRICKY.values())
    column = pyarrow.array(texts).dictionary_encode() if row_group_size == 7 else texts
    table = pyarrow.table({"id": range(len(texts)), "text": column, "source": ["web", None, ""] * 18 + ["web", None]})
    pyarrow.parquet.write_table(table, tmp_path / "corpus.parquet", row_group_size=row_group_size)
    assert build(tmp_path / "corpus.parquet", tmp_path / "out", "--val-docs", "20", "--shard-tokens", "1500") == 0
    shards = {name: content for name, content in file_bytes(built).items() if name != "manifest.json"}
    assert shards.items() <= file_bytes(tmp_path / "out").items()
    origins = json.loads((tmp_path / "out" / "manifest.json").read_text())["origins"]
    assert {name: counts["documents"] for name, counts in origins.items()} == {"web": 19, "corpus.parquet": 36}


def test_bad_parquet_is_an_error(tmp_path, capsys):
    path = tmp_path / "corpus.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"body": TEXTS}), path)
    assert build(path, tmp_path / "out") == 1
    assert 'needs one column "text" of strings, has body (string): rename or convert it' in capsys.readouterr().err
    pyarrow.parquet.write_table(pyarrow.table({"text": TEXTS}), path)
    whole = path.read_bytes()
    for damaged in (whole[:-300], whole[:100] + bytes(400) + whole[500:]):
        path.write_bytes(damaged)
        assert build(path, tmp_path / "out") == 1
        error = capsys.readouterr().err
        assert "get the file again" in error and error.count("\n") == 1


def test_folder_may_hold_every_kind(tmp_path):
    folder = tmp_path / "mixed"
    folder.mkdir()
    jsonl(folder / "a.jsonl", TEXTS[:10])
    jsonl(folder / "b.jsonl.gz", TEXTS[10:20], gzip.compress)
    for number, text in enumerate(TEXTS[20:]):
        (folder / f"{number}.txt").write_text(text)
    assert build(folder, tmp_path / "out") == 0
    documents = decoded_documents(tmp_path / "out", "train") + decoded_documents(tmp_path / "out", "val")
    assert sorted(documents) == sorted(normalised(text) for text in TEXTS)


@pytest.mark.parametrize(("ending", "compress"), [
    (".jsonl.gz", gzip.compress),
    (".jsonl.xz", lzma.compress),
    (".jsonl.zst", zstandard.compress),
    (".jsonl.zst", lambda content: zstandard.compress(content[:5000]) + zstandard.compress(content[5000:])),
])
def test_compressed_jsonl_gives_the_same_shards(built, tmp_path, ending, compress):
    source = jsonl(tmp_path / f"corpus{ending}", TEXTS + list(TRICKY.values()), compress)
    assert build(source, tmp_path / "out", "--val-docs", "20", "--shard-tokens", "1500") == 0
    shards = {name: content for name, content in file_bytes(built).items() if name != "manifest.json"}
    assert shards.items() <= file_bytes(tmp_path / "out").items()


def test_folder_gives_one_document_a_file(tmp_path):
    folder = tmp_path / "texts"
    (folder / "deeper").mkdir(parents=True)
    for number, text in enumerate(TEXTS):
        (folder / ("deeper" if number % 2 else ".") / f"{number}.txt").write_text(text)
    (folder / "notes.md").write_text("not a document")
    assert build(folder, tmp_path / "out") == 0
    documents = decoded_documents(tmp_path / "out", "train") + decoded_documents(tmp_path / "out", "val")
    assert sorted(documents) == sorted(normalised(text) for text in TEXTS)


def test_text_file_is_cut_at_blank_lines_and_nothing_is_lost(tmp_path):
    content = "".join(f"{words(number, 90)}\r\n \r\n" for number in range(60)) + "日本語 end"
    (tmp_path / "book.txt").write_bytes(content.encode())
    documents = [document.text for document in sources.text_file(tmp_path / "book.txt", Counter())]
    assert "".join(documents) == content
    assert all(2000 <= len(text) < 3100 and text.endswith("\n") for text in documents[:-1])
    assert len(documents) > 10
    assert build(tmp_path / "book.txt", tmp_path / "out") == 0


PYTHON_FILE = f'''"""{words(1, 100)}"""
import this_is_never_imported

def short():
    """Too short."""

class Class:
    """First line, then an indented block.

        {words(2, 100)}
    Last line.
    """
    async def method(self):
        r"""\\raw {words(3, 100)}"""

add_docstr(short, """{words(4, 100)} {{input}}""".format(**arguments))
other_call("""{words(5, 100)}""")
surrogate = lambda: None
def broken():
    "\\ud800 {words(6, 100)}"
'''


@pytest.fixture
def docs(tmp_path, monkeypatch) -> Path:
    """A small standard library and a requirements file, for the default source. Returns the output folder."""
    stdlib = tmp_path / "stdlib"
    (stdlib / "test").mkdir(parents=True)
    (stdlib / "module.py").write_text(PYTHON_FILE)
    (stdlib / "template.py").write_text("class {{ name }}: pass")
    (stdlib / "test" / "left_out.py").write_text(f'"""{words(7, 100)}"""')
    monkeypatch.setattr(sources.sysconfig, "get_path", lambda name: str(stdlib))
    (tmp_path / "requirements.txt").write_text(
        "# pinned\n--index-url https://example.org\nMarkupSafe==3\ntyping_extensions==4 # c\nno-such-package==1\n")
    return tmp_path / "out"


def test_docstrings_are_found_cleaned_and_never_imported(docs):
    found = sources.docstrings(docs.parent / "stdlib" / "module.py")
    assert found[0] == words(1, 100)
    assert found[1] == f"First line, then an indented block.\n\n    {words(2, 100)}\nLast line."
    assert sorted(found[2:]) == sorted(
        ["\\raw " + words(3, 100), words(4, 100) + " {input}", "? " + words(6, 100)])
    assert sources.docstrings(docs.parent / "stdlib" / "template.py") is None


def test_default_source(docs, capsys):
    assert build("docs", docs) == 0
    out = capsys.readouterr().out
    assert "no-such-package of requirements.txt is not installed" in out
    assert re.search(r"DATA_PATH=\S+out TOKENIZER_PATH=\S+pydocs_450_bpe.model VOCAB_SIZE=450\n$", out)
    manifest = json.loads((docs / "manifest.json").read_text())
    assert set(manifest["origins"]) == {"python", "MarkupSafe", "typing_extensions", "pydoc topics"}
    assert manifest["origins"]["python"]["documents"] == 5
    assert manifest["sources"]["source"][0]["packages"]["no-such-package"] is None
    assert manifest["skipped"]["unparseable_files"] == 1


def test_default_places_follow_source_and_vocabulary(source):
    settings = build_dataset.parse_arguments(["--source", str(source)], Path("unused"))
    assert settings.out == REPOSITORY / "data/datasets/corpus_sp1024"
    assert settings.tokenizer == REPOSITORY / "data/tokenizers/corpus_1024_bpe.model"


# ---- Reruns ----

def test_rerun_does_nothing_until_something_changes(tmp_path, capsys):
    source, out = jsonl(tmp_path / "corpus.jsonl", TEXTS), tmp_path / "out"

    def rebuilt(*options: str) -> bool:
        assert build(source, out, *options) == 0
        return "nothing to do" not in capsys.readouterr().out

    assert rebuilt()
    assert not rebuilt()
    assert rebuilt("--seed", "2")
    assert rebuilt("--seed", "2", "--shard-tokens", "1000")
    assert rebuilt("--seed", "2") and len(list(out.glob("fineweb_train_*.bin"))) == 1, "old shards were left"
    for damaged in ("fineweb_val_000000.bin", "corpus_450_bpe.model"):
        (out / damaged).write_bytes(b"short")
        assert rebuilt("--seed", "2")
    jsonl(source, TEXTS[:-1])
    assert rebuilt("--seed", "2")
    for extra in ("fineweb_train_000007.bin", "fineweb_val_000001.bin"):
        (out / extra).write_bytes((out / "fineweb_train_000000.bin").read_bytes())
        assert build(source, out, "--seed", "2") == 1, "not ours"
        (out / extra).unlink()
    assert not rebuilt("--seed", "2")


def test_rerun_sees_every_change_of_what_is_asked_for(tmp_path, capsys):
    source, val = jsonl(tmp_path / "a.jsonl", TEXTS[5:]), jsonl(tmp_path / "b.jsonl", TEXTS[:5])
    out = tmp_path / "out"
    assert build(source, tmp_path / "first") == 0
    assert build(source, tmp_path / "second", "--seed", "3") == 0
    (model,), (other_model,) = (tmp_path.glob(f"{name}/*.model") for name in ("first", "second"))
    arguments = ["--source", str(source), "--out", str(out), "--val-source", str(val), "--tokenizer"]

    def rebuilt(tokenizer: Path) -> bool:
        assert build_dataset.main([*arguments, str(tokenizer)]) == 0
        return "nothing to do" not in capsys.readouterr().out

    assert rebuilt(model)
    assert not rebuilt(model)
    assert rebuilt(other_model), "another tokenizer of the same size"
    jsonl(val, TEXTS[:4])
    assert rebuilt(other_model), "another val source"
    content = source.read_bytes()
    source.write_bytes(content.replace(b"document 9", b"document 8"))
    os.utime(source, ns=(1, 1))
    assert rebuilt(other_model), "an edit that keeps the size"
    assert build_dataset.main([*[each.replace(str(source), os.path.relpath(source)) for each in arguments],
                               str(other_model)]) == 0
    assert "nothing to do" in capsys.readouterr().out, "the same file, spelled otherwise"


def test_interrupted_replacement_never_looks_complete(source, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    for module, name in ((build_dataset, "write_aside"), (build_dataset, "write_manifest")):
        assert build(source, out, "--seed", "1") == 0
        with monkeypatch.context() as patch:
            patch.setattr(module, name, lambda *arguments: (_ for _ in ()).throw(KeyboardInterrupt))
            assert build(source, out, "--seed", "2") == 1
        assert not (out / "manifest.json").exists()
        capsys.readouterr()
        assert build(source, out, "--seed", "1") == 0
        assert "nothing to do" not in capsys.readouterr().out
        assert not list(out.glob(".*"))


@pytest.mark.parametrize("content", ['{"mine": 1}', '{"downloaded": {}, "files": {}}', None])
def test_what_is_of_other_origin_is_not_replaced(source, tmp_path, capsys, content):
    out = tmp_path / "out"
    out.mkdir()
    if content:
        (out / "manifest.json").write_text(content)
    else:
        (out / "corpus_450_bpe.model").write_bytes(b"of another data set")
    (tmp_path / "out" / "notes").write_text("kept")
    before = file_bytes(out)
    assert build(source, out) == 1
    assert "is there already, and not of a build in the same place" in capsys.readouterr().err
    assert file_bytes(out) == before


def test_two_builds_in_one_place(source, tmp_path, capsys):
    with build_dataset.exclusively(tmp_path / "out"):
        assert build(source, tmp_path / "out") == 1
        assert "another build is writing there" in capsys.readouterr().err
    assert build(source, tmp_path / "out") == 0


def test_folders_behind_links(source, tmp_path, capsys):
    (tmp_path / "disk").mkdir()
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "link").symlink_to(tmp_path / "disk")
    (tmp_path / "source.jsonl").symlink_to(source)
    for message in ("building", "nothing to do"):
        assert build(tmp_path / "source.jsonl", tmp_path / "a" / "link" / "out") == 0
        assert message in capsys.readouterr().out


@pytest.mark.parametrize("step", [
    (build_dataset, "drop_duplicates"), (build_dataset, "encode_split"), (build_dataset, "publish"),
    (build_dataset, "write_aside"), (build_dataset, "file_entries"), (dataset_files, "write_aside")])
def test_interrupted_build_never_looks_complete_and_leaves_nothing_behind(source, tmp_path, monkeypatch, capsys, step):
    def interrupted(*arguments):
        raise KeyboardInterrupt

    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(*step, interrupted)
        assert build(source, out) == 1
    assert capsys.readouterr().err == "error: interrupted\n"
    assert not (out / "manifest.json").exists()
    assert out.exists() == (step[1] not in ("drop_duplicates", "encode_split")), "before publishing nothing is left"
    assert build(source, out) == 0
    assert not any(path.name.endswith(".partial") for path in out.iterdir())


def test_killed_build_is_redone_and_its_workers_end(source, tmp_path, built):
    script = ("import sys, time; sys.path.insert(0, 'data'); import build_dataset as b\n"
              "original = b.Encoder.__call__\n"
              "def slow(self, bucket):\n    print('encoding', flush=True); time.sleep(60)\n"
              "b.Encoder.__call__ = slow\nb.main(sys.argv[1:])")
    out = tmp_path / "out"
    arguments = ["--source", str(source), "--out", str(out), "--vocab-size", str(VOCAB_SIZE), "--val-docs", "20",
                 "--shard-tokens", "1500"]
    process = subprocess.Popen([sys.executable, "-c", script, *arguments], cwd=REPOSITORY, stdout=subprocess.PIPE,
                               text=True, start_new_session=True)
    while process.stdout.readline() != "encoding\n":
        assert process.poll() is None
    process.kill()
    process.wait()
    assert (out / ".build_dataset").exists() and not (out / "manifest.json").exists()
    process.stdout.read()  # ends when the last worker, which holds the pipe too, is gone
    assert build(source, out, "--val-docs", "20", "--shard-tokens", "1500") == 0
    assert file_bytes(out) == file_bytes(built)


# ---- Errors: one line on stderr, exit status 1 ----

def text_of(content: bytes):
    return lambda folder: (folder / "corpus.txt").write_bytes(content)


def jsonl_of(content: bytes, name: str = "corpus.jsonl"):
    return lambda folder: (folder / name).write_bytes(content)


GOOD_LINE = b'{"text": "good"}\n'
LONG = "\n".join(json.dumps({"text": text}) for text in TEXTS).encode()
ERRORS = [
    ("missing.jsonl", None, [], "missing.jsonl: no such file or folder"),
    ("docs", None, [], "requirements.txt: no such file"),
    (".", None, [], "the folder holds no .txt, .jsonl"),
    ("corpus.csv", jsonl_of(b"a,b", "corpus.csv"), [], "accepted are docs"),
    ("corpus.txt", text_of(b"abc \xff def"), [], "corpus.txt: not UTF-8 at byte 4"),
    ("corpus.txt", text_of(b"one paragraph"), [], "1 distinct documents"),
    ("corpus.txt", text_of(b" \n"), [], "0 distinct documents"),
    ("corpus.jsonl", jsonl_of(GOOD_LINE + b"{broken\n"), [], "corpus.jsonl:2: malformed"),
    ("corpus.jsonl", jsonl_of(GOOD_LINE * 2 + b'{"text": "\xff"}\n'), [], "corpus.jsonl:3: malformed"),
    ("corpus.jsonl", jsonl_of(b'{"text": "\\ud800"}\n'), [], "corpus.jsonl:1: malformed"),
    ("corpus.jsonl", jsonl_of(b"\n" + b'{"txt": "a"}\n'), [], 'corpus.jsonl:2: no "text" string'),
    ("corpus.jsonl", jsonl_of(GOOD_LINE + b'{"text": 5}\n'), [], 'corpus.jsonl:2: no "text" string'),
    ("corpus.jsonl", jsonl_of(b'["text"]\n'), [], 'corpus.jsonl:1: no "text" string'),
    ("c.jsonl.gz", jsonl_of(gzip.compress(LONG)[:-2000], "c.jsonl.gz"), [], "get the file again"),
    ("c.jsonl.xz", jsonl_of(lzma.compress(LONG)[:-2000], "c.jsonl.xz"), [], "get the file again"),
    ("c.jsonl.zst", jsonl_of(zstandard.compress(LONG)[:-2000], "c.jsonl.zst"), [], "ends inside a frame"),
    ("c.jsonl.zst", jsonl_of(GOOD_LINE, "c.jsonl.zst"), [], "c.jsonl.zst:1: cannot read on"),
    ("corpus.jsonl", jsonl_of(LONG), ["--val-docs", "40"], "40 for validation leave none"),
    ("corpus.jsonl", jsonl_of(LONG), ["--val-docs", "0"], "--val-docs 0: must be from 1"),
    ("corpus.jsonl", jsonl_of(LONG), ["--vocab-size", "65537"], "--vocab-size 65537: must be from 1 to 65536"),
    ("corpus.jsonl", jsonl_of(LONG), ["--vocab-size", "ten"], "--vocab-size: invalid int value: 'ten'"),
    ("corpus.jsonl", jsonl_of(LONG), ["--vocab-size", "60000"], "too small for it: at most "),
    ("corpus.jsonl", jsonl_of(LONG), ["--vocab-size", "200"], "need at least "),
    ("corpus.jsonl", jsonl_of(LONG), ["--shard-tokens", "0"], "--shard-tokens 0: must be from 1"),
    ("corpus.jsonl", jsonl_of(LONG), ["--workers", "0"], "--workers 0: must be from 1"),
    ("corpus.jsonl", jsonl_of(LONG), ["--tokenizer", "no.model"], "--tokenizer no.model: no SentencePiece model"),
    ("corpus.jsonl", jsonl_of(LONG), ["--tokenizer", __file__], "no SentencePiece model there"),
    ("corpus.jsonl", jsonl_of(LONG), ["--val-source", "none.txt"], "--val-source none.txt: no such file or folder"),
    ("corpus.jsonl", jsonl_of(LONG), ["--val-source", "docs", "--val-docs", "1"], "requirements.txt: no such file"),
    ("corpus.parquet", jsonl_of(GOOD_LINE, "corpus.parquet"), [], "corpus.parquet: no whole .parquet file"),
]


@pytest.mark.parametrize(("name", "write", "options", "message"), ERRORS)
def test_errors_are_one_line_and_leave_no_data_set(tmp_path, capsys, name, write, options, message):
    if write:
        write(tmp_path)
    source = name if name == "docs" else tmp_path / name
    assert build(source, tmp_path / "out", *options) == 1
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("error: ") and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_the_line_of_an_error_is_that_of_the_file(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sources, "UNIT_BYTES", 300)
    for broken in (1, 17, 40):
        lines = [json.dumps({"text": text}) for text in TEXTS]
        lines[broken - 1] = "{broken"
        (tmp_path / "corpus.jsonl").write_text("\n".join(lines))
        assert build(tmp_path / "corpus.jsonl", tmp_path / "out") == 1
        assert f"corpus.jsonl:{broken}: malformed" in capsys.readouterr().err


def test_documents_that_are_too_long(tmp_path, capsys, monkeypatch):
    for module in (sources, sorted_runs):
        monkeypatch.setattr(module, "MAX_DOCUMENT_BYTES", 3000)
    (tmp_path / "folder").mkdir()
    for name in ("one.txt", "folder/one.txt"):
        (tmp_path / name).write_text("word " * 1000)
    jsonl(tmp_path / "one.jsonl", ["word " * 1000])
    for name, message in (("one.txt", "characters without a blank line"), ("folder", "are too many for one document"),
                          ("one.jsonl", "a document of one.jsonl has 5,000 bytes, more than 3,000: cut it up")):
        assert build(tmp_path / name, tmp_path / "out") == 1
        assert message in capsys.readouterr().err


def test_vocabulary_that_the_error_proposes_works(tmp_path, capsys):
    source = jsonl(tmp_path / "corpus.jsonl", TEXTS[:4])
    assert build(source, tmp_path / "out", "--vocab-size", "60000") == 1
    largest = re.search(r"at most (\d+)", capsys.readouterr().err)[1]
    assert build(source, tmp_path / "out", "--vocab-size", largest) == 0


def test_shards_of_others_are_not_overwritten(source, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "fineweb_train_000000.bin").write_bytes(b"precious")
    assert build(source, tmp_path / "out") == 1
    assert "is there already, and not of a build in the same place" in capsys.readouterr().err
    assert file_bytes(tmp_path / "out") == {"fineweb_train_000000.bin": b"precious"}


def test_command_line_ends_without_a_traceback():
    command = [sys.executable, str(REPOSITORY / "data" / "build_dataset.py"), "--source", "no/such/file.jsonl"]
    run = subprocess.run(command, capture_output=True, text=True)
    assert (run.returncode, run.stdout) == (1, "")
    assert run.stderr == "error: --source no/such/file.jsonl: no such file or folder; 'docs' is the default source\n"
