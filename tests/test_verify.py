"""data/verify.py: a good data set passes, and each way to spoil one is found and named."""
import hashlib
import json
import shutil
from pathlib import Path

import build_dataset
import numpy as np
import pytest
import sentencepiece as spm
import verify
from conftest import text

VOCAB_SIZE = 384
HEADER = 1024


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> Path:
    """Small shards, so that most documents cross the end of one."""
    folder = tmp_path_factory.mktemp("verify")
    source = folder / "corpus.jsonl"
    source.write_text("".join(json.dumps({"text": text(seed, 12)}) + "\n" for seed in range(40)))
    assert build_dataset.main(["--source", str(source), "--out", str(folder / "set"), "--vocab-size", str(VOCAB_SIZE),
                               "--val-docs", "6", "--shard-tokens", "700"]) == 0
    return folder / "set"


@pytest.fixture
def folder(original, tmp_path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "set"))


@pytest.fixture
def check(folder, capsys, monkeypatch):
    """Runs the tool; returns its status, and output and errors together."""
    monkeypatch.setenv("TRAIN_SEQ_LEN", "64")

    def run(*options: str) -> tuple[int, str]:
        capsys.readouterr()
        status = verify.main([str(folder), *options])
        captured = capsys.readouterr()
        return status, captured.out + captured.err
    return run


def stream(folder: Path, split: str) -> np.ndarray:
    return np.concatenate([np.fromfile(path, "<u2", offset=HEADER)
                           for path in sorted(folder.glob(f"fineweb_{split}_*.bin"))])


def rewrite(folder: Path, split: str, tokens: np.ndarray, size: int = 700) -> None:
    """The split anew, and the manifest's files and counts made to agree, so that only the content is wrong."""
    for path in folder.glob(f"fineweb_{split}_*.bin"):
        path.unlink()
    writer = build_dataset.ShardWriter(folder, split, size)
    writer.write(tokens.astype("<u2"))
    writer.finish()
    sign(folder)


def sign(folder: Path) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    contents = {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "manifest.json"}
    manifest["files"] = {name: {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
                         for name, content in contents.items()}
    manifest.pop("splits", None)
    (folder / "manifest.json").write_text(json.dumps(manifest))


def documents(tokens: np.ndarray) -> list[np.ndarray]:
    return np.split(tokens, np.flatnonzero(tokens == 1)[1:])


# ---- Good


@pytest.mark.parametrize("workers", ["1", "3"])
def test_a_good_data_set_passes(check, folder, workers):
    status, output = check("--workers", workers)
    assert status == 0, output
    assert output.endswith("good\n") and "FAIL" not in output and "note" not in output
    assert len(list(folder.glob("fineweb_train_*.bin"))) > 5
    for split in ("train", "val"):
        counts = json.loads((folder / "manifest.json").read_text())["splits"][split]
        assert f"{split}: {counts['documents']:,} documents, a bos (1) before each" in output
        assert f"{counts['tokens']:,} tokens, {counts['normalised_bytes']:,} bytes of text, " in output


def test_a_set_without_a_manifest_is_checked_as_far_as_it_goes(check, folder):
    (folder / "manifest.json").unlink()
    status, output = check()
    assert status == 1 and "give --tokenizer FILE.model" in output
    (model,) = folder.glob("*.model")
    status, output = check("--tokenizer", str(model))
    assert status == 0 and "  note  no manifest.json: no SHA-256 to check" in output


@pytest.mark.parametrize("manifest", [
    "", "[]", "{}", '{"files": []}', '{"files": {"a": 1}}', '{"files": {"a": {}}}', "[" * 100_000,
    '{"files": {}, "splits": 3}', '{"files": {}, "splits": {"val": 3}}', '{"files": {}, "splits": []}',
    '{"files": {"./fineweb_val_000000.bin": {"bytes": 1, "sha256": ""}}}',
    '{"files": {"\\ud800": {"bytes": 1, "sha256": ""}}}', '{"files": {"a\\u0000": {"bytes": 1, "sha256": ""}}}',
    '{"files": {"%s": {"bytes": 1, "sha256": ""}}}' % ("../" * 9000)])
def test_a_malformed_manifest_crashes_nothing(check, folder, manifest):
    (folder / "manifest.json").write_text(manifest)
    (model,) = folder.glob("*.model")
    status, output = check("--tokenizer", str(model))
    assert status == 1 and output.endswith("NOT GOOD: see the lines marked FAIL\n")


# ---- Spoiled: files


def test_changed_missing_and_unlisted_files_are_found(check, folder):
    path = folder / "fineweb_train_000002.bin"
    content = bytearray(path.read_bytes())
    content[HEADER + 9 * 2] ^= 1
    path.write_bytes(content)
    assert "  FAIL  not as listed: fineweb_train_000002.bin" in check()[1]
    path.unlink()
    status, output = check()
    assert status == 1 and "  FAIL  missing: fineweb_train_000002.bin" in output
    assert "  note  train: shards are numbered from fineweb_train_000000.bin to " in output
    shutil.copy(folder / "fineweb_train_000003.bin", path.with_name("fineweb_train_000099.bin"))
    status, output = check()
    assert status == 1 and "  FAIL  unlisted, and yet train_gpt.py would read: fineweb_train_000099.bin" in output


@pytest.mark.parametrize(("change", "message"), [
    (lambda content: content[:-2], "no whole shard"),
    (lambda content: content + b"\0\0", "no whole shard"),
    (lambda content: content[:500], "no whole shard"),
    (lambda content: b"", "no whole shard"),
    (lambda content: b"\0" * 4 + content[4:], "no whole shard"),
    (lambda content: content[:4] + b"\2" + content[5:], "no whole shard"),
    (lambda content: content[:8] + b"\xff\xff\xff\xff" + content[12:], "no whole shard"),
])
def test_what_is_no_shard_is_named(check, folder, change, message):
    path = folder / "fineweb_train_000001.bin"
    path.write_bytes(change(path.read_bytes()))
    status, output = check()
    assert status == 1 and message in output and "fineweb_train_000001.bin" in output
    assert output.endswith("NOT GOOD: see the lines marked FAIL\n")


def test_a_split_too_short_to_train_on_is_found(check, monkeypatch):
    monkeypatch.setenv("TRAIN_SEQ_LEN", "16384")
    status, output = check()
    assert status == 1 and "  FAIL  DATA_PATH=" in output and "less than a sequence" in output


# ---- Spoiled: content


def test_ids_beyond_the_tokenizer_are_found_wherever_they_are(check, folder, monkeypatch):
    tokens = stream(folder, "train")
    tokens[-3] = VOCAB_SIZE
    rewrite(folder, "train", tokens)
    assert f"  FAIL  {folder}/fineweb_train_" in check()[1]
    monkeypatch.setattr(verify, "TokenStream", lambda *_: None)  # which looks at the first million tokens of a shard
    status, output = check()
    assert status == 1 and f"  FAIL  train: token id {VOCAB_SIZE} is beyond the tokenizer's {VOCAB_SIZE}" in output


def test_a_start_without_bos_is_found(check, folder):
    rewrite(folder, "val", stream(folder, "val")[1:])
    status, output = check()
    assert status == 1 and "  FAIL  val: does not start with bos (1)" in output


def test_empty_documents_are_worth_a_note(check, folder):
    rewrite(folder, "train", np.concatenate([[1, 1], stream(folder, "train"), [1]]))
    status, output = check()
    assert status == 0 and "  note  train: 3 documents are empty" in output


def test_another_tokenizer_of_the_same_size_is_found(check, folder, tmp_path):
    texts = [text(seed, 12).upper() for seed in range(40)]
    (tmp_path / "other.jsonl").write_text("".join(json.dumps({"text": each}) + "\n" for each in texts))
    assert build_dataset.main(["--source", str(tmp_path / "other.jsonl"), "--out", str(tmp_path / "other"),
                               "--vocab-size", str(VOCAB_SIZE)]) == 0
    (model,) = (tmp_path / "other").glob("*.model")
    rewrite(folder, "val", stream(folder, "val"), 10**6)  # whole documents in a shard: these are sampled
    status, output = check("--tokenizer", str(model))
    assert status == 1 and "encode to the same tokens again: the tokenizer is another one" in output


def test_documents_that_count_otherwise_than_they_decode_are_found(check, folder):
    unknown = spm.SentencePieceProcessor(model_file=str(next(folder.glob("*.model")))).unk_id()
    tokens = stream(folder, "val")
    tokens[5] = unknown
    rewrite(folder, "val", tokens)
    status, output = check()
    assert status == 1 and "bytes but decodes to" in output and "its BPB would be wrong" in output


def test_counts_that_the_manifest_denies_are_found(check, folder):
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["splits"]["val"]["normalised_bytes"] += 1
    (folder / "manifest.json").write_text(json.dumps(manifest))
    status, output = check()
    assert status == 1 and "  FAIL  val: " in output and " normalised_bytes, not " in output


@pytest.mark.parametrize("position", range(0, 40, 3))
@pytest.mark.parametrize("size", [97, 700, 10**6])
def test_a_validation_document_in_training_is_found_wherever_it_is(check, folder, position, size):
    """At every place among the documents, so also over the ends of one shard and, in small ones, of several."""
    train, val = documents(stream(folder, "train")), documents(stream(folder, "val"))
    train.insert(min(position, len(train)), val[position % len(val)])
    rewrite(folder, "train", np.concatenate(train), size)
    rewrite(folder, "val", np.concatenate(val), size)
    status, output = check("--workers", "1")
    assert status == 1 and "  FAIL  1 training documents are in validation, token for token" in output


def test_in_published_data_it_is_a_note(check, folder):
    train, val = documents(stream(folder, "train")), documents(stream(folder, "val"))
    rewrite(folder, "train", np.concatenate([*train, val[2], val[3], val[2]]))
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | {"downloaded": {}}))
    status, output = check()
    assert status == 0 and "  note  3 training documents are in validation, token for token" in output


@pytest.mark.parametrize(("arguments", "message"), [
    (["nowhere"], "nowhere: no such folder"),
    ([".", "--workers", "0"], "--workers 0: must be from 1"),
    ([], "the following arguments are required"),
])
def test_bad_arguments(capsys, arguments, message):
    assert verify.main(arguments) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and message in error


@pytest.mark.parametrize("content", [b"", b"no model", None])
def test_a_bad_tokenizer_is_named(check, folder, content):
    (model,) = folder.glob("*.model")
    model.unlink() if content is None else model.write_bytes(content)
    status, output = check()
    assert status == 1 and "no SentencePiece model there" in output
