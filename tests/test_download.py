"""data/cached_challenge_fineweb.py, end to end, against a server on loopback that speaks the hub's protocol, and fails.
"""
import hashlib
import http.server
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
import urllib.parse
from pathlib import Path

import numpy as np
import pytest
from conftest import REPOSITORY

import train_gpt

REPO = "willdepueoai/parameter-golf"
REVISION = "0123456789abcdef0123456789abcdef01234567"
SHARDS = "datasets/fineweb10B_sp1024"
VAL, TRAIN = f"{SHARDS}/fineweb_val_000000.bin", [f"{SHARDS}/fineweb_train_{n:06d}.bin" for n in range(3)]
MODEL, VOCAB = "tokenizers/fineweb_1024_bpe.model", "tokenizers/fineweb_1024_bpe.vocab"


class Hub(http.server.ThreadingHTTPServer):
    """Repositories as the hub serves them: an API of revisions and listings, and files behind a redirect, in ranges.

    files: path in the repository -> content. faults: path -> list of what to do wrong at the next requests for it.
    """
    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.files, self.faults, self.lied, self.served, self.pause, self.listing_change = {}, {}, {}, [], 0.0, {}
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def fault(self, path: str) -> str:
        pending = self.faults.get(path, [])
        return pending[0] if pending[:1] == ["always"] else pending.pop(0) if pending else ""


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version, wbufsize, disable_nagle_algorithm = "HTTP/1.1", -1, True  # else 40 ms of waiting an answer

    def log_message(self, *arguments):
        pass

    def answer(self, status: int, body: bytes = b"", **headers):
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def do_POST(self):  # paths-info: a listing of the files asked for
        form = self.rfile.read(int(self.headers["Content-Length"])).decode()
        if self.failed("paths-info"):
            return
        asked = [each for name, each in urllib.parse.parse_qsl(form) if name == "paths"]
        listing = []
        for path in asked:
            if path in self.server.files:
                content = self.server.lied.get(path, self.server.files[path])
                entry = {"type": "file", "path": path, "size": len(content),
                         "oid": hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()}
                if not path.endswith((".json", ".vocab")):  # large files
                    entry["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 9}
                listing.append({key: value for key, value in (entry | self.server.listing_change).items()
                                if value is not None or key == "size"})
        self.answer(200, json.dumps(listing).encode(), Content_Type="application/json")

    def do_GET(self):
        if self.path.startswith("/api/"):
            if self.failed("api"):
                return
            if self.path != f"/api/datasets/{REPO}":
                return self.answer(401, X_Error_Code="RepoNotFound")
            return self.answer(200, json.dumps({"id": REPO, "sha": REVISION}).encode())
        if self.path.startswith("/cdn/"):
            return self.content(self.path.removeprefix("/cdn/"))
        path = self.path.removeprefix(f"/datasets/{REPO}/resolve/{REVISION}/")
        self.answer(302, Location=f"{self.server.url}/cdn/{path}")

    def failed(self, path: str) -> bool:
        fault = self.server.fault(path)
        if fault in ("404", "503", "429"):
            self.answer(int(fault))
        elif fault == "html":
            self.answer(200, b"<html>please log in</html>")
        elif fault == "hang up":
            self.close_connection = True
        return bool(fault)

    def content(self, path: str):
        if self.failed(path):
            return
        time.sleep(self.server.pause)
        fault, whole = self.server.faults.get(("body", path), []), self.server.files[path]
        fault = fault.pop(0) if fault else ""
        start, end = (int(each) for each in self.headers["Range"].removeprefix("bytes=").split("-"))
        body = whole[start:end + 1]
        self.server.served.append((path, start, len(body)))
        if fault == "no ranges":
            return self.answer(200, whole)
        if fault == "short":
            body = body[:-7]
        if fault == "corrupt":
            body = bytes([body[0] ^ 1]) + body[1:]
        if fault == "cut":
            self.send_response(206)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body[:len(body) // 2])
            self.close_connection = True
            return
        self.answer(206, body)


@pytest.fixture(scope="module")
def server():
    """The hub, and the tool bound to it: huggingface_hub reads HF_ENDPOINT when it is imported."""
    hub = Hub()
    assert "huggingface_hub" not in sys.modules, "another test has imported it already"
    os.environ |= {"HF_ENDPOINT": hub.url, "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
    import cached_challenge_fineweb
    hub.tool = cached_challenge_fineweb
    yield hub
    hub.shutdown()


def shard(tokens: np.ndarray) -> bytes:
    header = np.zeros(256, "<i4")
    header[:3] = 20240520, 1, len(tokens)
    return header.tobytes() + tokens.astype("<u2").tobytes()


@pytest.fixture
def hub(server, dataset, monkeypatch):
    """The server with a fresh export of three training shards, and small ranges and pauses."""
    rng = np.random.default_rng(0)
    manifest = {"datasets": [{"name": "fineweb10B_sp1024", "tokenizer_name": "sp_bpe_1024",
                              "stats": {"files_train": 3, "files_val": 1}},
                             {"name": "fineweb10B_byte260", "tokenizer_name": "none", "stats": {}}],
                "tokenizers": [{"name": "sp_bpe_1024", "model_path": MODEL, "vocab_path": VOCAB}]}
    export = {"manifest.json": json.dumps(manifest).encode(), MODEL: Path(dataset["TOKENIZER_PATH"]).read_bytes(),
              VOCAB: b"a\t0\n", "docs_selected.jsonl": b'{"text": "a"}\n' * 99,
              "docs_selected.source_manifest.json": b"{}",
              **{path: shard(rng.integers(0, 384, 5000)) for path in (VAL, *TRAIN)}}
    server.files = {f"datasets/{path}": content for path, content in export.items()}
    server.faults, server.lied, server.served, server.pause, server.listing_change = {}, {}, [], 0.0, {}
    monkeypatch.setattr(server.tool, "RANGE_BYTES", (3000, 3000))
    monkeypatch.setattr(server.tool, "RETRY_SECONDS", (0.01,) * 5)
    for name in ("MATCHED_FINEWEB_REPO_ID", "MATCHED_FINEWEB_REMOTE_ROOT_PREFIX"):
        monkeypatch.delenv(name, raising=False)
    return server


@pytest.fixture
def get(hub, tmp_path, capsys):
    """Runs the tool into a folder; returns its status, and output and errors together."""
    def run(*options: str, folder: Path = tmp_path / "data") -> tuple[int, str]:
        status = hub.tool.main(list(options), folder)
        captured = capsys.readouterr()
        if status:
            assert captured.err.startswith("error: ") and captured.err.count("\n") == 1, captured.err
        return status, captured.out + captured.err
    return run


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def expected(hub: Hub, *names: str) -> dict[str, bytes]:
    names = names or ("manifest.json", MODEL, VOCAB, VAL, *TRAIN)
    return {name: hub.files[f"datasets/{name}"] for name in names}


def left(folder: Path) -> dict[str, bytes]:
    """What is there under final names, without the tool's own manifest."""
    own = f"{SHARDS}/manifest.json"
    return {name: content for name, content in contents(folder).items()
            if name != own and not Path(name).name.startswith(".")}


# ---- What arrives


def test_layout_is_the_challenges_and_every_byte_arrives(hub, get, tmp_path):
    status, output = get("--variant", "sp1024")
    assert status == 0, output
    assert left(tmp_path / "data") == expected(hub)
    manifest = json.loads((tmp_path / "data" / SHARDS / "manifest.json").read_text())
    assert manifest["downloaded"] == {"endpoint": hub.url, "repo_id": REPO, "prefix": "datasets", "revision": REVISION}
    assert manifest["files"] == {os.path.relpath(name, SHARDS): {
        "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        for name, content in expected(hub, MODEL, VOCAB, VAL, *TRAIN).items()}
    assert f"DATA_PATH={tmp_path}/data/{SHARDS} TOKENIZER_PATH={tmp_path}/data/{MODEL} VOCAB_SIZE=384" in output


def test_train_gpt_reads_what_was_downloaded(get, tmp_path):
    assert get()[0] == 0
    config = train_gpt.Config(data_path=str(tmp_path / "data" / SHARDS), vocab_size=384, train_seq_len=64)
    assert train_gpt.TokenStream(config, "train").num_tokens == 15000
    assert train_gpt.TokenStream(config, "val").num_tokens == 5000


@pytest.mark.parametrize(("options", "names"), [
    (["--train-shards", "1"], [VAL, TRAIN[0]]),
    (["--train-shards", "0", "--with-docs"], [VAL, "docs_selected.jsonl", "docs_selected.source_manifest.json"]),
    (["2"], [VAL, *TRAIN[:2]]),
    (["--workers", "1"], [VAL, *TRAIN]),
])
def test_options_choose_files(hub, get, tmp_path, options, names):
    assert get(*options)[0] == 0
    assert left(tmp_path / "data") == expected(hub, "manifest.json", MODEL, VOCAB, *names)


def test_other_repository_and_prefix_of_the_environment(hub, get, tmp_path, monkeypatch):
    for prefix in ("my/export", ""):
        monkeypatch.setenv("MATCHED_FINEWEB_REMOTE_ROOT_PREFIX", prefix)
        files = dict(expected(hub))
        hub.files = {f"{prefix}/{name}".lstrip("/"): content for name, content in files.items()}
        assert get(folder=tmp_path / "data")[0] == 0
        assert left(tmp_path / "data") == files
        hub.files = {f"datasets/{name}": content for name, content in files.items()}
    monkeypatch.setenv("MATCHED_FINEWEB_REPO_ID", "nobody/nothing")
    status, output = get()
    assert status == 1 and f"nobody/nothing on {hub.url}: no such dataset, or it is private (401)" in output


# ---- Reruns


def test_rerun_asks_the_hub_for_nothing_until_more_is_wanted(hub, get, tmp_path):
    assert get("--train-shards", "1")[0] == 0
    hub.faults["api"] = ["always"]  # any request would fail
    status, output = get("--train-shards", "1")
    assert status == 0 and "complete, nothing to do" in output
    hub.faults, hub.served = {}, []
    assert get("--train-shards", "2")[0] == 0
    assert {path for path, _, _ in hub.served} == {f"datasets/{TRAIN[1]}"}
    (tmp_path / "data" / TRAIN[0]).write_bytes(b"cut short")
    assert get("--train-shards", "2")[0] == 0
    assert left(tmp_path / "data") == expected(hub, "manifest.json", MODEL, VOCAB, VAL, *TRAIN[:2])


def test_files_of_the_challenges_downloader_are_checked_and_kept(hub, get, tmp_path):
    for name, content in expected(hub).items():
        (tmp_path / "data" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "data" / name).write_bytes(content)
    damaged = bytearray(expected(hub)[TRAIN[1]])
    damaged[3000] ^= 1
    (tmp_path / "data" / TRAIN[1]).write_bytes(damaged)
    assert get()[0] == 0
    assert {path for path, _, _ in hub.served} == {f"datasets/{TRAIN[1]}"}
    assert left(tmp_path / "data") == expected(hub)


def test_skip_manifest_uses_the_local_one(hub, get, tmp_path):
    status, output = get("--skip-manifest")
    assert status == 1 and "--skip-manifest: no " in output
    assert get("--train-shards", "0")[0] == 0
    del hub.files["datasets/manifest.json"]
    assert get("--skip-manifest", "--train-shards", "1")[0] == 0
    assert get("--skip-manifest", "--variant", "sp9999")[0] == 1


def test_a_part_of_another_version_is_not_gone_on_with(hub, get, tmp_path):
    hub.faults[f"datasets/{TRAIN[0]}"] = ["", "", "404"]
    assert get("--workers", "1")[0] == 1
    (part,) = (tmp_path / "data" / SHARDS).glob(".fineweb_train_000000.bin.*.part")
    assert part.read_bytes() == hub.files[f"datasets/{TRAIN[0]}"][:6000]
    hub.faults = {}
    hub.files[f"datasets/{TRAIN[0]}"] = shard(np.arange(5000) % 300)
    assert get()[0] == 0
    assert left(tmp_path / "data") == expected(hub)
    assert not list((tmp_path / "data").rglob("*.part"))


# ---- Faults


@pytest.mark.parametrize("fault", ["cut", "short", "corrupt", "no ranges"])
@pytest.mark.parametrize("path", [VAL, TRAIN[2], MODEL, VOCAB, "manifest.json"])
def test_faults_in_a_body_are_repaired(hub, get, tmp_path, fault, path):
    hub.faults["body", f"datasets/{path}"] = ["", fault] if path in (VAL, TRAIN[2]) else [fault]
    status, output = get()
    assert status == 0, output
    assert left(tmp_path / "data") == expected(hub)


@pytest.mark.parametrize("fault", ["503", "429", "hang up"])
@pytest.mark.parametrize("path", ["api", "paths-info", f"datasets/{VAL}", f"datasets/{TRAIN[1]}"])
def test_trouble_that_passes_is_waited_for(hub, get, tmp_path, fault, path):
    hub.faults[path] = [fault] * 3
    status, output = get()
    assert status == 0, output
    assert left(tmp_path / "data") == expected(hub)


@pytest.mark.parametrize(("path", "fault", "message"), [
    ("api", "503", "answers 503 again and again: run again later, it goes on from here"),
    ("api", "html", "no hub answers there"),
    ("api", "hang up", "cannot be reached"),
    ("paths-info", "html", "no hub answers there"),
    (f"datasets/{TRAIN[1]}", "503", "answers 503 again and again"),
    (f"datasets/{TRAIN[1]}", "hang up", "check the network, HF_ENDPOINT"),
    (f"datasets/{TRAIN[1]}", "404", "(404)"),
])
def test_trouble_that_stays_is_an_error_and_the_next_run_goes_on(hub, get, tmp_path, path, fault, message):
    hub.faults[path] = [fault] * 6
    status, output = get()
    assert status == 1 and message in output
    assert all(expected(hub)[name] == content for name, content in left(tmp_path / "data").items())
    hub.faults = {}
    assert get()[0] == 0
    assert left(tmp_path / "data") == expected(hub)


def test_nobody_listening_is_an_error(hub, get, monkeypatch):
    monkeypatch.setattr(hub.tool, "HfApi", lambda: __import__("huggingface_hub").HfApi(endpoint="http://127.0.0.1:9"))
    status, output = get()
    assert status == 1 and "cannot be reached" in output


@pytest.mark.parametrize(("path", "content", "message"), [
    (TRAIN[0], None, f"has no datasets/{TRAIN[0]}: ask for what it has"),
    ("manifest.json", None, "has no datasets/manifest.json"),
    ("manifest.json", b"[]", "manifest.json of "),
    ("manifest.json", b"{" * 5000, "not as the challenge writes it"),
    (TRAIN[0], shard(np.arange(9))[:-2], "no whole shard"),
    (TRAIN[0], b"", "no whole shard"),
    (VAL, shard(np.arange(9)).replace(b"\x88", b"\x89", 1), "no whole shard"),
])
def test_what_is_not_there_or_no_shard_is_named(hub, get, tmp_path, path, content, message):
    if content is None:
        del hub.files[f"datasets/{path}"]
    else:
        hub.files[f"datasets/{path}"] = content
    status, output = get()
    assert status == 1 and message in output
    assert path == "manifest.json" or path not in left(tmp_path / "data")


def test_content_that_is_not_what_was_listed_never_gets_its_name(hub, get, tmp_path):
    hub.lied[f"datasets/{TRAIN[1]}"] = shard(np.arange(5000) % 7)
    status, output = get()
    assert status == 1 and "is not what it lists (sha256 " in output and "twice" in output
    assert TRAIN[1] not in left(tmp_path / "data")


@pytest.mark.parametrize("path", ["../../../stolen", "/tmp/stolen", "datasets/x.bin", "tokenizers",
                                  "tokenizers/../../x", "tokenizers/**", "tokenizers/a\0b", "tokenizers//x", 7])
def test_a_manifest_cannot_choose_where_to_write(hub, get, tmp_path, path):
    manifest = json.loads(hub.files["datasets/manifest.json"])
    manifest["tokenizers"][0]["model_path"] = path
    hub.files["datasets/manifest.json"] = json.dumps(manifest).encode()
    status, output = get()
    assert status == 1 and "is not a plain name under tokenizers/" in output
    assert set(left(tmp_path / "data")) == {"manifest.json"}


@pytest.mark.parametrize(("options", "message"), [
    (["--variant", "sp4096"], "--variant sp4096: willdepueoai/parameter-golf on {url} has byte260, sp1024: choose one"),
    (["--variant", "../x"], "--variant ../x: must be letters"),
    (["--train-shards", "4"], "has 3 training and 1 validation shards of sp1024: ask for at most 3"),
    (["--train-shards", "-1"], "--train-shards -1: must be from 0"),
    (["--workers", "0"], "--workers 0: must be from 1"),
    (["--train-shards", "many"], "invalid int value: 'many'"),
    (["--variant", "byte260"], "not as the challenge writes it (KeyError('files_train'))"),
])
def test_bad_arguments(hub, get, options, message):
    status, output = get(*options)
    assert status == 1 and message.format(url=hub.url) in output


@pytest.mark.parametrize("repo_id", ["no good", "a/b/c", "../.."])
def test_bad_repository_names(hub, get, monkeypatch, repo_id):
    monkeypatch.setenv("MATCHED_FINEWEB_REPO_ID", repo_id)
    status, output = get()
    assert status == 1 and repo_id in output


def test_too_little_space_is_said_before_the_download(hub, get, monkeypatch):
    monkeypatch.setattr(hub.tool.shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(10**6, 0, 12_000))
    status, output = get()
    assert status == 1 and "make room, link data/ to a larger disk, or ask for about " in output
    assert not any(path.endswith(f"{number:06d}.bin") for path, _, _ in hub.served for number in range(3))


# ---- Processes: kills, two at once, a full disk

RANGE_BYTES = 4000
SCRIPT = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import cached_challenge_fineweb as tool
tool.RANGE_BYTES = (int(sys.argv[3]), int(sys.argv[3]))
tool.PROGRESS_SECONDS = sys.modules["dataset_files"].PROGRESS_SECONDS = 0.2
sys.exit(tool.main(sys.argv[4:], Path(sys.argv[2])))
"""


def command(folder: Path, *options: str, range_bytes: int = RANGE_BYTES) -> list[str]:
    return [sys.executable, "-c", SCRIPT, str(REPOSITORY / "data"), str(folder), str(range_bytes), *options]


def test_killed_at_any_moment_it_goes_on_and_nothing_is_half_there(hub, tmp_path):
    hub.pause, kills = 0.02, 0
    for moment in (0.1, 0.4, 0.7, 1.0):
        before = len(hub.served)
        process = subprocess.Popen(command(tmp_path / "data", "--workers", "3"), stdout=subprocess.DEVNULL)
        while len(hub.served) == before and process.poll() is None:
            time.sleep(0.01)
        time.sleep(moment)
        kills += process.poll() is None
        process.kill()
        process.wait()
        there = left(tmp_path / "data")
        assert all(expected(hub)[name] == content for name, content in there.items())
    assert kills >= 3
    subprocess.run(command(tmp_path / "data", "--workers", "3"), check=True, stdout=subprocess.DEVNULL)
    assert left(tmp_path / "data") == expected(hub)
    assert not list((tmp_path / "data").rglob("*.part"))
    fetched = sum(count for path, _, count in hub.served if path.endswith(".bin"))
    whole = sum(len(hub.files[f"datasets/{name}"]) for name in (VAL, *TRAIN))
    assert fetched <= whole + kills * 3 * RANGE_BYTES, "more than the ranges under way was fetched again"


def test_a_file_that_was_finished_while_it_was_opened_is_left_alone(hub, get, tmp_path, monkeypatch):
    """Another process renames the part between our opening and our locking it: the lock is then on the final file."""
    path = tmp_path / "data" / TRAIN[0]
    flock, content = hub.tool.fcntl.flock, hub.files[f"datasets/{TRAIN[0]}"]

    def late_flock(part, how):
        if "train_000000" in part.name and not path.exists():
            Path(part.name).write_bytes(content)
            Path(part.name).rename(path)
        flock(part, how)

    monkeypatch.setattr(hub.tool.fcntl, "flock", late_flock)
    status, output = get()
    assert status == 1 and "another download is writing it" in output
    assert path.read_bytes() == content


def test_ranges_grow_on_a_fast_line(hub, get, monkeypatch):
    monkeypatch.setattr(hub.tool, "RANGE_BYTES", (100, 1600))
    assert get()[0] == 0
    sizes = [count for path, _, count in hub.served if path.endswith("val_000000.bin")]
    assert sizes[:6] == [100, 200, 400, 800, 1600, 1600]


@pytest.mark.parametrize(("change", "message"), [
    (dict(size="12"), "with size 12"), (dict(size=None), "with size None"), (dict(size=-1), "with size -1"),
    (dict(size=10**400), "with size 1000"), (dict(size=5000.0), "with size 5000.0"),
    (dict(oid="../../x", lfs=None), "digest ../../x"), (dict(path=[1]), "has no datasets/manifest.json"),
])
def test_a_strange_listing_is_an_error(hub, get, change, message):
    hub.listing_change = change
    status, output = get()
    assert status == 1 and message in output


def test_a_tokenizer_that_is_none_is_an_error(hub, get):
    hub.files[f"datasets/{MODEL}"] = b"no model"
    status, output = get()
    assert status == 1 and "is no SentencePiece model" in output


def test_behind_links_it_finds_its_files_again(hub, get, tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "datasets").symlink_to(tmp_path / "disk")
    assert get()[0] == 0
    assert "complete, nothing to do" in get()[1]
    assert (tmp_path / "disk" / "fineweb10B_sp1024" / "fineweb_val_000000.bin").exists()


def test_two_at_once_do_not_spoil_each_other(hub, tmp_path):
    hub.pause = 0.02
    one, two = (subprocess.Popen(command(tmp_path / "data"), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
                                 text=True) for _ in range(2))
    errors = [process.communicate()[1] for process in (one, two)]
    assert 0 in (one.returncode, two.returncode), errors  # both, if one started when the other was done
    for process, error in zip((one, two), errors):
        assert process.returncode == 0 or "another download is writing it: run again when" in error
    assert left(tmp_path / "data") == expected(hub)


def test_full_disk_is_one_line_and_the_next_run_goes_on(hub, tmp_path):
    """On a file system that fills up while the tool believes that there is room."""
    (tmp_path / "small").mkdir()
    script = SCRIPT.replace("tool.RANGE_BYTES", "tool.check_free_space = lambda *_: None\ntool.RANGE_BYTES")
    inner = ['mount -t tmpfs -o size=48k tmpfs "$0" && "$@"; echo "status $?"; find "$0" -name "*.bin";'
             ' mount -o remount,size=1m "$0" && "$@"; echo "status $?"; cd "$0" && cp -r . ../copy',
             str(tmp_path / "small"), *command(tmp_path / "small"), "--workers", "1"]
    inner[inner.index(SCRIPT)] = script
    done = subprocess.run(["unshare", "-rm", "sh", "-c", *inner], capture_output=True, text=True)
    if "mount:" in done.stderr or "status" not in done.stdout:
        pytest.skip("no mount namespaces here: " + done.stderr.strip())
    first, second = done.stdout.split("status ")[1:]
    assert first.startswith("1") and second.startswith("0"), done
    assert done.stderr.startswith("error: no space left for ") and done.stderr.count("\n") == 1
    assert left(tmp_path / "copy") == expected(hub)


def test_progress_shows_share_and_rate(hub, tmp_path):
    hub.pause = 0.02
    done = subprocess.run(command(tmp_path / "data"), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert re.search(r"downloading: \d of 6 files, \d+ % of 0 MB, \d+ s left, 0.\d MB/s", done.stdout)
    assert re.search(r"downloading: 6 files, 0.\d MB, 0.\d MB/s in", done.stdout)
