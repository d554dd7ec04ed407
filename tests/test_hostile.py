"""Hostile files: whatever a stranger's shard, tokenizer, artifact, checkpoint or manifest holds, loading it ends soon,
in little memory, either in the project's one-line error or in an object of the declared shape. It runs nothing.

A crash in C++ ends the process, so inputs are tried in child processes, which note each number before they begin. An
input depends on its kind and number only. To try one again, N being the number in the message of a failed test:
    FUZZ_FIRST=N FUZZ_INPUTS=1 python -m pytest tests/test_hostile.py -k "declared and shard"
"""
import contextlib
import copy
import ctypes
import dataclasses
import faulthandler
import io
import json
import math
import multiprocessing
import os
import pickle
import random
import re
import resource
import signal
import struct
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import build_dataset
import dataset_files
import numpy as np
import pytest
import torch
import verify
from conftest import make_run, random_model, text, tiny_config
from test_artifact import HEAD, checked, header_of, rebuilt, with_header

import train_gpt
from train_gpt import UserError

FIRST = int(os.environ.get("FUZZ_FIRST", 0))
INPUTS = int(os.environ.get("FUZZ_INPUTS", 400))  # of each kind; FUZZ_INPUTS=100000 in the soak
BATCH = 1000  # inputs to a process: what it leaks by then would show
SECONDS = 10.0  # for one input
MEGABYTES = 160  # more than a good file took; a body of an artifact may unpack to 64
CEILING = 2 << 30  # bytes a child can allocate at all, so that what would exhaust the machine ends as MemoryError
FORBIDDEN = {"pickle.find_class", "os.system", "os.exec", "os.posix_spawn", "subprocess.Popen", "socket.connect"}


# ---- The harness


@dataclasses.dataclass
class Kind:
    """A kind of file, and how it is loaded."""
    name: str
    path: str  # in a folder
    good: bytes
    result: str  # what load returns for a good one
    load: Callable[[Path], str]  # from that folder; raises unless what it loaded is of the declared shape
    make: Callable[[random.Random, int], bytes]  # hostile input N
    prepare: Callable[[Path], None] = Path.touch  # makes what else is in the folder

    def write(self, path: Path, number: int) -> None:
        put(path, self.make(random.Random(f"{self.name} {number}"), number))


def put(path: Path, data: bytes) -> None:
    """A new file, also where there was a link or a pipe."""
    path.unlink(missing_ok=True)
    path.write_bytes(data)


def attempt(kind: Kind, folder: Path) -> str:
    """How loading ended: "error", the kind's result, or a fault."""
    try:
        return kind.load(folder)
    except (UserError, OSError) as error:  # of both the script and the tools print just "error: " and this
        return "error" if str(error).isprintable() else f"FAULT not one printable line: {ascii(str(error))[:300]}"
    except Exception as error:  # of which no loader may let any through
        at = traceback.extract_tb(error.__traceback__)[-1]
        return f"FAULT {type(error).__name__}: {ascii(str(error))[:300]} in {at.name}, line {at.lineno}"


def peak_bytes() -> int:
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def forbid(event: str, arguments: tuple) -> None:
    writing = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
    if (event in FORBIDDEN or writing) and watching:
        faults.append(f"FAULT {event}{ascii(arguments)[:200]}")


watching, faults = False, []  # of forbid, in a child


def try_inputs(kind: Kind, numbers: range, folder: Path, log: int) -> None:
    """In a child: notes "number ", then "outcome\n" of each; ends after a fault, so that the next starts afresh."""
    global watching
    torch.set_num_threads(1)  # a forked child has none of its parent's
    stack = open(folder.with_suffix(".stack"), "w")
    faulthandler.enable(stack)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # SentencePiece tells what it finds
    allocated = next(1024 * int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmData"))
    resource.setrlimit(resource.RLIMIT_DATA, (allocated + CEILING,) * 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    sys.addaudithook(forbid)
    try:
        put(folder / kind.path, kind.good)
        assert (found := attempt(kind, folder)) == kind.result, f"a good file: {found}"
        before = peak_bytes()
        for number in numbers:
            kind.write(folder / kind.path, number)
            os.write(log, b"%d " % number)
            watching = True
            outcome = attempt(kind, folder)
            watching = False
            if (more := peak_bytes() - before >> 20) > MEGABYTES:
                outcome = f"FAULT {more} MB"
            outcome = faults[0] if faults else outcome
            os.write(log, f"{outcome}\n".encode())
            if outcome.startswith("FAULT"):
                break
    except Exception:  # a fault of the test, not of what it tests
        os.write(log, f"? {ascii(traceback.format_exc()[-1000:])}\n".encode())
    os._exit(0)


def outcomes(kind: Kind, numbers: range, folder: Path, seconds: float = SECONDS) -> dict[int, str]:
    """How each numbered input ended; what ended the child, or had to be ended, is a fault too."""
    (folder / kind.path).parent.mkdir(parents=True)
    kind.prepare(folder)
    ended, at = {}, numbers.start
    log_path, stack_path = folder.with_suffix(".log"), folder.with_suffix(".stack")
    while at < numbers.stop:
        log = os.open(log_path, os.O_CREAT | os.O_TRUNC | os.O_RDWR)
        batch = range(at, min(at + BATCH, numbers.stop))
        child = multiprocessing.get_context("fork").Process(target=try_inputs, args=(kind, batch, folder, log))
        child.start()
        size, since, hung = 0, time.monotonic(), False
        while child.is_alive():
            child.join(0.1)
            if os.fstat(log).st_size > size:
                size, since = os.fstat(log).st_size, time.monotonic()
            elif time.monotonic() - since > (seconds if size else 60.0):  # to start, on a busy machine
                hung = True
                os.kill(child.pid, signal.SIGABRT)  # shows where it hangs
                child.join(2.0)
                child.kill()
                child.join()
        os.close(log)
        lines = [line.split(" ", 1) for line in log_path.read_text().splitlines()]
        if not lines or lines[-1][0] == "?":
            raise RuntimeError(f"{kind.name} inputs from {at} on cannot be tried (exit status {child.exitcode}, hung:"
                               f" {hung}): {lines[-1:]} {stack_path.read_text()}")
        ended |= {int(number): outcome for number, outcome in lines}
        at = 1 + int(lines[-1][0])
        if not ended[at - 1]:
            reason = f"more than {seconds} s" if hung else f"exit status {child.exitcode}"
            ended[at - 1] = f"FAULT {reason}: {ascii(stack_path.read_text()[:2000])}"
    return ended


def faults_of(ended: dict[int, str]) -> dict[int, str]:
    return {number: outcome for number, outcome in ended.items() if outcome.startswith("FAULT")}


# ---- Damage

NUMBERS = [0, 1, 2, 255, 1023, 2**15, 2**16 - 1, 2**20, 2**24, 2**31 - 1, 2**31, 2**32 - 2, 2**32 - 1]
NASTY = [None, True, False, 0, -1, 1, 2**31, 2**53, 2**63, 2**64, -2**63, 10**300, 10**4000, 0.5, 1e308, math.nan,
         math.inf, -math.inf, "", "0", "nan", "1e9", "9" * 5000, "\0", "\ud800", "line\nbreak", "\x1b[2J\x1b]0;x\7",
         "é" * 300, "x" * 100_000, "../" * 9, "/", "/dev/zero", "/proc/self/maps", "~", "%s%n", [], {}, [[]],
         [None] * 999, {"": {}}]


def damaged(rng: random.Random, data: bytes, head: int = 400) -> bytes:
    """Random bytes, or 1 to 8 changes, half of them in the first head bytes: bits, bytes, lengths, cuts, repeats."""
    if rng.random() < 0.03:
        return rng.randbytes(rng.choice((0, 1, 3, 9, 41, 45, 300, 3000)))
    data = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 8))):
        kind, at = rng.randrange(8), rng.randrange(min(len(data), rng.choice((head, 2**40))) + 1)
        if kind == 0:
            data[at : at + rng.randrange(9)] = rng.randbytes(rng.randrange(9))
        elif kind == 1:
            del data[at : at + rng.choice((1, 2, 40, 2**40))]
        elif kind == 2:
            data[at:at] = data[at : at + rng.randrange(400)] * rng.choice((1, 1, 9))
        elif kind == 3:
            number = rng.choice((*NUMBERS, len(data), max(0, len(data) - at - 4)))
            data[at : at + 4] = struct.pack(rng.choice("<>") + "I", number)
        elif kind == 4:
            other = rng.randrange(len(data) + 1)
            data[at : at + 40] = data[other : other + 40]
        elif at < len(data):
            data[at] ^= 1 << rng.randrange(8)
    return bytes(data)


def places(value: object) -> list[tuple]:
    """(container, key) of all that is in a JSON value."""
    keys = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    return [place for key in keys for place in ((value, key), *places(value[key]))]


def damaged_json(rng: random.Random, value: object, most: int = 1 << 20) -> bytes:
    """The value's text with 1 to 4 changes: wrong types, huge numbers, lost, renamed and swapped entries, deep nesting;
    or with bytes changed, or filled up to most bytes with what takes much memory."""
    value = [copy.deepcopy(value)]
    for _ in range(rng.choice((1, 1, 2, 4))):
        spots = places(value)
        if not spots:
            break
        container, key = rng.choice(spots)
        kind = rng.randrange(6)
        if kind == 0 and container is not value:
            del container[key]
        elif kind == 1 and isinstance(container, dict):
            name = rng.choice(("", "x", "../x", "/dev/zero", "\0", "\n", "\ud800", "\x1b[2J", 9 * key))
            container[name] = container[key]
        elif kind == 2:
            other, name = rng.choice(spots)
            container[key] = copy.deepcopy(other[name]) if name in range(len(other)) or name in other else None
        elif kind == 3:
            container[key] = rng.choice(([container[key]], {"x": container[key]}, str(container[key])))
        else:
            container[key] = copy.deepcopy(rng.choice(NASTY))
    data = json.dumps(*value).encode() if value else b""
    if rng.random() < 0.1:
        at = rng.choice([index for index, byte in enumerate(data) if byte in b":,"] or [0]) + 1
        if rng.random() < 0.05:
            return data[:at] + b"[" + b"{}," * ((most - len(data)) // 3 - 2) + b"0]," + data[at:]
        data = data[:at] + rng.choice((b"[" * 99_999, b'{"":' * 99_999, b"1e999,", b"9" * 5000, b"{},[]," * 999,
                                       b'"\xff\xfe"', b"NaN", b"\0")) + data[at:]
    return damaged(rng, data) if rng.random() < 0.1 else data


# ---- Shards


def shard_kind(dataset: dict) -> Kind:
    config = dataclasses.replace(tiny_config(dataset), train_batch_tokens=64, micro_batch_tokens=64)
    good = next(Path(config.data_path).glob("fineweb_val_*.bin")).read_bytes()[: 1024 + 2 * 700]
    good = dataset_files.shard_header(700) + good[1024:]

    def make(rng: random.Random, number: int) -> bytes:
        if number % 4 == 0:
            return damaged(rng, good, head=16)
        tokens = good[1024:]  # the header right, or wrong in one field, and token ids anywhere in 16 bits
        if number % 4 == 1:
            tokens = tokens[: rng.choice((0, 1, 2, 3, 63, 64, 65, 66, 701))]
        elif number % 4 == 2:
            tokens = damaged(rng, tokens)
        header = np.frombuffer(dataset_files.shard_header(len(tokens) // 2), "<i4").copy()
        if rng.random() < 0.5:
            header[rng.choice((0, 1, 2, 2, 2, 3, 255))] += rng.choice((-2**31, -1, 1, 2**31 - 1, 2**20))
        return header.tobytes() + tokens

    def load(folder: Path) -> str:
        stream = train_gpt.TokenStream(dataclasses.replace(config, data_path=str(folder)), "val")
        tokens = stream.read(0, stream.num_tokens)
        assert tokens.dtype == np.uint16 and tokens.shape == (stream.num_tokens,) and stream.num_tokens < 10_000
        assert tokens.max() < config.vocab_size
        (inputs, targets), = stream.micro_batches(10**9, train_gpt.Dist())
        assert inputs.shape == targets.shape == (2, 32)
        assert dataset_files.count_shard_tokens(folder / "fineweb_val_000000.bin") == stream.num_tokens
        return "tokens"
    return Kind("shard", "fineweb_val_000000.bin", good, "tokens", load, make)


# ---- Tokenizers: a protocol buffer, as (field, wire type, value); a value of wire type 2 may be a list of fields

PIECES, TRAINER, NORMALIZER, SELF_TEST, DENORMALIZER = 1, 2, 3, 4, 5


def varint(number: int) -> bytes:
    return b"" if number < 0 else bytes([number]) if number < 128 else bytes([number & 127 | 128]) + varint(number >> 7)


def read_varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while data[at] & 128:
        value, shift, at = value | (data[at] & 127) << shift, shift + 7, at + 1
    return value | data[at] << shift, at + 1


def fields(data: bytes, depth: int = 1) -> list[list]:
    found, at = [], 0
    while at < len(data):
        key, at = read_varint(data, at)
        if key & 7 == 0:
            value, at = read_varint(data, at)
        else:
            size, at = read_varint(data, at) if key & 7 == 2 else ({1: 8, 5: 4}[key & 7], at)
            value, at = data[at : at + size], at + size
            value = fields(value, depth - 1) if depth and key & 7 == 2 else value
        found.append([key >> 3, key & 7, value])
    return found


def message(found: list[list], lie: Callable[[int], int] = int) -> bytes:
    """The bytes of such fields; lie may change lengths."""
    parts = []
    for field, wire, value in found:
        value = message(value, lie) if isinstance(value, list) else value
        value = varint(value) if isinstance(value, int) else value
        parts += [varint(field << 3 | wire), varint(lie(len(value))) if wire == 2 else b"", value]
    return b"".join(parts)


def changed_piece(rng: random.Random, piece: bytes) -> bytes:
    space = "▁".encode()
    return rng.choice((b"", b"\0", piece + b"\0" + piece, b"\xff\xfe", piece[:-1], space[:2], space * 99,
                       b"\xed\xa0\x80", b"\x1b[2J\n", b"<0x41>", b"<0xZZ>", b"x" * 100_000, piece, b"<unk>", b"<s>"))


def changed_model(rng: random.Random, model: list[list]) -> bytes:
    """1 to 8 changes to a model's fields, each of which a program that writes protocol buffers could have made."""
    lie, big = int, (0, 1, 2, 3, 4, 5, 6, 7, 255, 2**31 - 1, 2**31, 2**32 - 1, 2**63, 2**64 - 1)
    for _ in range(rng.choice((1, 1, 2, 8))):
        if not model:
            break
        kind, at = rng.randrange(9), rng.randrange(len(model))
        inner = model[at][2] if isinstance(model[at][2], list) else []
        if kind == 0:
            model[at:at] = model[at : at + rng.choice((1, 5, 50))] * rng.choice((1, 2, 30))
        elif kind == 1:
            del model[at : at + rng.choice((1, 5, 300, 9999))]
        elif kind in (2, 3) and inner:
            for each in inner:
                if each[:2] == [PIECES, 2] and model[at][0] == PIECES:
                    each[2] = changed_piece(rng, each[2])
        elif kind == 4:  # settings of trainer and normaliser: ids of control pieces, kind of model, fallback, flags
            specs = [each for each in model if each[0] in (TRAINER, NORMALIZER, DENORMALIZER)] or [[TRAINER, 2, []]]
            spec = rng.choice(specs)
            numbers = [each for each in spec[2] if isinstance(each[2], int)]
            field = rng.choice((3, 4, 24, 35, 40, 41, 42, 43, rng.randrange(1, 60)))
            spec[2].append([rng.choice(numbers)[0] if numbers and rng.random() < 0.5 else field, 0, rng.choice(big)])
        elif kind == 5:  # the normaliser's compiled rules, or rules to compile
            for each in model:
                if each[0] in (NORMALIZER, DENORMALIZER) and isinstance(each[2], list):
                    rules = next((each for each in each[2] if each[:2] == [2, 2]), [2, 2, b""])
                    each[2][:] = [other for other in each[2] if other is not rules]
                    each[2].append([2, 2, damaged(rng, rules[2], rng.choice((8, 2000)))])
        elif kind == 6 and inner:
            each = rng.choice(inner)
            each[0] = rng.choice((each[0], rng.randrange(1, 60), 2**29 - 1))
            each[1] = rng.choice((each[1], 0, 1, 2, 5, 3, 7))
            each[2] = rng.choice((each[2], rng.choice(big), rng.randbytes(4), rng.randbytes(8)))
        elif kind == 7:
            wrong, amount = rng.randrange(400), rng.choice((-1, 1, 127, 2**31 - 1, 2**32, 2**63))
            count = iter(range(10**9))
            lie = lambda size: max(0, size + amount) if next(count) == wrong else size  # noqa: E731
        else:
            model[at] = [rng.choice((PIECES, TRAINER, NORMALIZER, SELF_TEST, DENORMALIZER, 6, 200)), 2, inner]
    while sum(len(each[2]) if isinstance(each[2], bytes) else 10 for each in model) > 10**7:
        del model[len(model) // 2 :]
    return message(model, lie)


def tokenizer_kind(dataset: dict) -> Kind:
    config = tiny_config(dataset)
    good = Path(config.tokenizer_path).read_bytes()
    model = fields(good)
    small = [each if each[0] != NORMALIZER else [NORMALIZER, 2, [part for part in each[2] if part[0] != 2]]
             for each in model]  # without rules, which are most of the bytes
    assert fields(message(model)) == model and message(model) == good, "the tool must read what there is"
    small_bytes = message(small)
    shard = next(Path(config.data_path).glob("fineweb_val_*.bin"))
    tokens = np.fromfile(shard, "<u2", 700, offset=1024)
    shard = shard.with_name("of_hostile_tokenizers")
    shard.write_bytes(dataset_files.shard_header(700) + tokens.tobytes())

    def make(rng: random.Random, number: int) -> bytes:
        if number % 4 == 0:
            return damaged(rng, rng.choice((good, small_bytes)), head=8000)
        return changed_model(rng, copy.deepcopy(model if number % 4 == 1 else small))

    def load(folder: Path) -> str:
        path = folder / "hostile.model"
        size = config.vocab_size
        with contextlib.suppress(UserError):  # the script is given it all the same
            size = verify.count_pieces(path)  # the stranger says what VOCAB_SIZE is to be
            build_dataset.read_tokenizer(str(path), None)
        declared = dataclasses.replace(config, vocab_size=size, tokenizer_path=str(path))
        if problems := declared.problems():
            raise UserError("; ".join(problems))
        tokenizer = train_gpt.load_tokenizer(declared)
        counts = train_gpt.TokenBytes(tokenizer)
        assert counts.base.shape == counts.leading_space.shape == counts.control.shape == (size,)
        assert counts.leading_space.dtype == counts.control.dtype == bool and (counts.base >= 0).all()
        tokens = np.arange(size + 1) % size
        assert counts.count(tokens).shape == (size,)
        assert counts.count(tokens).max() <= path.stat().st_size + 1
        scan = verify.Scanner(declared, None)((shard, tokenizer.bos_id()))  # which also decodes and encodes
        assert scan.tokens == 700 and scan.text_bytes >= 0 and scan.miscounted.isprintable()
        return "tokenizer"
    return Kind("tokenizer", "hostile.model", good, "tokenizer", load, make)


# ---- Artifacts


def artifact_kind(dataset: dict) -> Kind:
    config = tiny_config(dataset)
    good = train_gpt.encode_artifact(random_model(config).state_dict(), config)
    plain = header_of(good)

    def make(rng: random.Random, number: int) -> bytes:
        if number % 4 == 0:
            return damaged(rng, good)
        if number % 4 == 1:
            return checked(damaged(rng, good[HEAD:]))
        if number % 4 == 2:
            return rebuilt(good, change=lambda body: damaged(rng, body, 4000))
        if number % 8 == 3:
            return with_header(good, damaged_json(rng, plain))
        setting = rng.choice(list(plain["config"]))  # other settings, with the tensors that they imply if they can be
        value = rng.choice((rng.randrange(1, 64), 2 * plain["config"][setting], plain["config"][setting] / 2, *NASTY))
        header = dict(plain, config=plain["config"] | {setting: value})
        with contextlib.suppress(Exception):
            header = header_of(good, **{setting: int(value) % 4096})
        return with_header(good, header)

    def load(folder: Path) -> str:
        stored, weights = train_gpt.load_artifact(folder / "artifact.bin", train_gpt.Dist())
        table = train_gpt.tensor_table(stored)
        shapes = {name: list(tensor.shape) for name, tensor in weights.items()}
        assert shapes == {name: shape for name, shape, _ in table}
        assert all(tensor.dtype == torch.float32 for tensor in weights.values())
        assert all(type(getattr(stored, name)) is type(value) for name, value in vars(train_gpt.Config()).items())
        assert not stored.problems()
        return "model"
    return Kind("artifact", "artifact.bin", good, "model", load, make)


# ---- Checkpoints


@pytest.fixture(scope="module")
def trained(dataset, tmp_path_factory) -> tuple[train_gpt.Run, list, Path]:
    """A run with optimisers that hold state, and a checkpoint that its own writer made."""
    folder = tmp_path_factory.mktemp("trained")
    run = make_run(tiny_config(dataset, run_id="run"), folder=folder / "logs" / "run")
    optimizers = train_gpt.build_optimizers(run.model, run.config, run.dist)
    stream = train_gpt.TokenStream(run.config, "train")
    train_gpt.train_step(run, list(stream.micro_batches(0, run.dist)), optimizers, 1.0, 0.9)
    keeper = train_gpt.Checkpoints(run.config, run.dist, FACTS)
    keeper.folder, keeper.log = folder / "logs" / "run", run.log
    keeper.begin("1_train", state_of(run, optimizers))
    keeper.reached(1, final=True)
    return run, optimizers, keeper.files()[0]


CHECKPOINT = "logs/run/checkpoints/1_train_00000001.bin"
FACTS = dict(script="0123456789abcdef", ranks=1, SEED=1337, MUON_MOMENTUM=0.99, SWA_ENABLED=True, DEVICE="cpu")


def state_of(run: train_gpt.Run, optimizers: list) -> list[torch.Tensor]:
    """What train() saves and restores: its clock comes second."""
    clock = torch.tensor([1.0, 2.0, 0.0] + 10 * [0.1], dtype=torch.float64)
    average = train_gpt.WeightAverage(run.model)
    return train_gpt.state_of(run.model, optimizers, clock, run.grads.skipped, *average.means)


def sealed(payload: bytes) -> bytes:
    return checked(payload, magic=train_gpt.CHECKPOINT_MAGIC)


def checkpoint_kind(trained: tuple) -> Kind:
    run, optimizers, path = trained
    good = path.read_bytes()
    payload = good[HEAD:]
    end = 4 + int.from_bytes(payload[:4], "little")
    header, tensors = json.loads(payload[4:end]), payload[end:]
    state = state_of(run, optimizers)
    assert sum(tensor.nbytes for tensor in state) == len(tensors) and sealed(payload) == good

    def make(rng: random.Random, number: int) -> bytes:
        if number % 4 == 0:
            return damaged(rng, good)
        if number % 4 == 1:
            return sealed(damaged(rng, payload))
        if number % 4 == 2:
            new = damaged_json(rng, header)
            size = len(new) if rng.random() < 0.9 else rng.choice(NUMBERS)
            return sealed(struct.pack("<I", size) + new + tensors)
        # A header that fits, and tensors that may hold anything, in as many bytes as they should have.
        other = damaged(rng, tensors, rng.choice((6000, len(tensors))))[: len(tensors)]
        return sealed(payload[:end] + other.ljust(len(tensors), rng.choice((b"\0", b"\xff"))))

    def load(folder: Path) -> str:
        os.chdir(folder)
        way = "auto" if Path(CHECKPOINT).lstat().st_size % 2 else CHECKPOINT
        checkpoints = train_gpt.Checkpoints(dataclasses.replace(run.config, resume=way), run.dist, FACTS)
        found = checkpoints.header = checkpoints.find()
        assert type(found["phase"]) is str and isinstance(found["records"], int)
        f"goes on from {found['path']} (damaged: {found['damaged']})".encode()  # as main() logs it
        before = [(tensor.shape, tensor.dtype) for tensor in state]
        checkpoints.begin("1_train", state)
        assert [(tensor.shape, tensor.dtype) for tensor in state] == before
        clocks = [tensor for tensor in state if tensor.dtype == torch.float64]  # train() makes whole numbers of some
        if found["phase"] == "1_train":
            possible = [bool(((0 <= clock) & (clock < 2**31)).all()) for clock in clocks]
            assert all(possible) and clocks[0][0] % 1 == 0, "an impossible clock"
        torch.rand(2000)  # from the restored state of the generator
        return "state"
    return Kind("checkpoint", CHECKPOINT, good, "state", load, make)


@pytest.mark.parametrize(("phase", "place", "value"), [
    ("1_train", 0, math.nan), ("1_train", 0, -5.0), ("1_train", -1, math.nan), ("1_train", -1, 1e300),
    ("2_evaluate", 0, math.nan), ("2_evaluate", 0, 0.5), ("2_evaluate", 0, 1000.0), ("2_evaluate", 1, math.inf)])
def test_a_clock_that_lies_crashes_nothing(dataset, val_tokens, token_bytes, phase, place, value):
    """What is restored is what train and score_then_adapt count on, in both senses."""
    run = make_run(tiny_config(dataset))
    optimizers = train_gpt.build_optimizers(run.model, run.config, run.dist)
    evaluator = train_gpt.Evaluator(run, val_tokens[:1025], token_bytes)
    keeper = run.checkpoints = train_gpt.Checkpoints(run.config, run.dist)
    keeper.header = dict(path="hostile.bin", phase=phase)

    def lie(phase: str, state: list[torch.Tensor]) -> None:
        state[1][place] = value
        keeper.data = np.concatenate([tensor.detach().flatten().view(torch.uint8).numpy() for tensor in state])
        train_gpt.Checkpoints.begin(keeper, phase, state)

    keeper.begin = lie
    with contextlib.suppress(UserError):
        if phase == "1_train":
            stream = train_gpt.TokenStream(run.config, "train")
            train_gpt.train_step(run, list(stream.micro_batches(0, run.dist)), optimizers, 1.0, 0.9)
            train_gpt.train(run, stream, optimizers, lambda *_, **__: None)
        else:
            evaluator.score_then_adapt(1, run.dist.now(), phase)
    run.dist.expect()


# ---- Manifests


@pytest.fixture(scope="module")
def small_set(tmp_path_factory) -> Path:
    """A data set that data/verify.py reads in a few milliseconds."""
    folder = tmp_path_factory.mktemp("small")
    source = folder / "corpus.jsonl"
    source.write_text("".join(json.dumps({"text": text(seed, 3)}) + "\n" for seed in range(12)))
    assert build_dataset.main(["--source", str(source), "--out", str(folder / "set"), "--vocab-size", "300",
                               "--val-docs", "3"]) == 0
    return folder / "set"


def manifest_kind(small_set: Path) -> Kind:
    good = (small_set / "manifest.json").read_bytes()
    contents = {path.name: path.read_bytes() for path in small_set.iterdir() if path.name != "manifest.json"}
    entry = next(iter(json.loads(good)["files"].values()))
    elsewhere = ["../outside", "/etc/passwd", "/dev/zero", "/dev/stdin", "/proc/self/mem", "/proc/self/maps", "pipe",
                 "huge", "loop", "link", "../" * 99 + "dev/zero", "", ".", "..", "\n", "\x1b[2J", "//", "~", "C:\\x",
                 "zero.model", "aaa.model", "../a/../aa.model", "fineweb_val_000000.bin/x", "./fineweb_val_000000.bin"]

    def prepare(folder: Path) -> None:
        for name, content in contents.items():
            (folder / name).write_bytes(content)
        os.mkfifo(folder / "pipe")
        (folder / "huge").touch()
        os.truncate(folder / "huge", 1 << 36)  # takes no room on disk
        for name, target in (("loop", "loop"), ("link", "/proc/self/maps"), ("zero.model", "/dev/zero")):
            (folder / name).symlink_to(target)

    def make(rng: random.Random, number: int) -> bytes:
        if number % 4 == 0:
            return damaged(rng, good, head=2000)
        manifest = json.loads(good)
        for name in rng.sample(elsewhere, rng.choice((0, 1, 3)) if number % 4 > 1 else 0):
            manifest["files"][name] = dict(entry)
        if number % 4 == 2:
            return json.dumps(manifest).encode()
        return damaged_json(rng, manifest, dataset_files.MAX_JSON_BYTES)

    def load(folder: Path) -> str:
        os.environ["TRAIN_SEQ_LEN"] = "64"
        verify.in_order = lambda function, tasks, workers: map(function, tasks)  # without processes of its own
        output, errors = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
            status = verify.main([str(folder), "--workers", "1"])
        output, errors = output.getvalue(), errors.getvalue()
        assert (output + errors).replace("\n", "").isprintable(), (output + errors)[-300:]
        if errors:
            assert status == 1 and errors.startswith("error: ") and errors.count("\n") == 1 and errors.endswith("\n")
            return "error"
        first, *lines, last = output.splitlines()
        assert first.startswith(f"{folder}, tokenizer ")
        assert all(line.startswith(("  ok    ", "  note  ", "  FAIL  ")) for line in lines)
        assert (status, last) == ((1, "NOT GOOD: see the lines marked FAIL") if "  FAIL  " in output else (0, "good"))
        return "report"
    return Kind("manifest", "manifest.json", good, "report", load, make, prepare)


def list_kind() -> Kind:
    """The publisher's manifest.json, from which data/cached_challenge_fineweb.py plans what to fetch, and where to."""
    stats = {"files_train": 3, "files_val": 1}
    good = {"datasets": [{"name": "fineweb10B_sp1024", "tokenizer_name": "sp", "stats": stats},
                         {"name": "fineweb10B_byte260", "tokenizer_name": "none", "stats": {}}],
            "tokenizers": [{"name": "sp", "model_path": "tokenizers/sp.model", "vocab_path": "tokenizers/sp.vocab"}]}
    import cached_challenge_fineweb  # after tests/test_download.py, which binds it to a hub of its own
    arguments = cached_challenge_fineweb.parse_arguments([])

    def make(rng: random.Random, number: int) -> bytes:
        return damaged(rng, json.dumps(good).encode()) if number % 4 == 0 else damaged_json(
            rng, good, dataset_files.MAX_JSON_BYTES)

    def load(folder: Path) -> str:
        export = cached_challenge_fineweb.Export("owner/name", "datasets", folder)
        plan = cached_challenge_fineweb.make_plan(
            cached_challenge_fineweb.load_json(folder / "manifest.json"), export, arguments)
        assert plan.dataset == "fineweb10B_sp1024" and len(plan.shards) < 10**6 + 80
        for file in plan.files:  # none to be written outside the folder, whatever a stranger lists
            assert re.fullmatch(r"(datasets/fineweb10B_sp1024|tokenizers)(/\w[\w.-]*)+", file, re.ASCII), file
        return "plan"
    return Kind("list", "manifest.json", json.dumps(good).encode(), "plan", load, make)


# ---- The tests

KINDS = ["shard", "tokenizer", "artifact", "checkpoint", "manifest", "list"]


@pytest.fixture(scope="module")
def kinds(dataset, trained, small_set) -> dict[str, Kind]:
    made = (shard_kind(dataset), tokenizer_kind(dataset), artifact_kind(dataset), checkpoint_kind(trained),
            manifest_kind(small_set), list_kind())
    return {kind.name: kind for kind in made}


def check(kind: Kind, numbers: range, folder: Path) -> Counter:
    """Tries the inputs; all end well. Returns how many ended how."""
    ended = outcomes(kind, numbers, folder)
    assert sorted(ended) == list(numbers)
    found = faults_of(ended)
    assert not found, f"{len(found)} of {len(ended)} {kind.name} inputs:\n" + "\n".join(
        f"{number}: {fault}" for number, fault in list(found.items())[:40])
    return Counter(ended.values())


@pytest.mark.parametrize("name", KINDS)
def test_hostile_files_give_an_error_or_what_was_declared(kinds, tmp_path, name):
    counts = check(kinds[name], range(FIRST, FIRST + INPUTS), tmp_path / name)
    print(f"{name}: {dict(counts)}")
    assert set(counts) <= {"error", kinds[name].result}
    assert INPUTS < 100 or len(counts) == 2, "some must be refused, some get through"


@dataclasses.dataclass
class Special(Kind):
    """What a stranger's archive can hold in place of a file."""

    def write(self, path: Path, number: int) -> None:
        path.unlink(missing_ok=True)
        if SPECIAL[number] == "pipe":
            os.mkfifo(path)
        elif SPECIAL[number] == "huge":
            path.write_bytes(self.good)
            os.truncate(path, 1 << 36)  # takes no room on disk
        elif SPECIAL[number] == "folder":
            path.mkdir()
        else:
            path.symlink_to(path.name if SPECIAL[number] == "itself" else SPECIAL[number])


SPECIAL = ["pipe", "huge", "folder", "/dev/zero", "nowhere", "itself"]


@pytest.mark.parametrize("special", SPECIAL)
@pytest.mark.parametrize("name", KINDS)
def test_what_is_no_plain_file_is_refused_at_once(kinds, tmp_path, name, special):
    number = SPECIAL.index(special)
    assert set(check(Special(**vars(kinds[name])), range(number, number + 1), tmp_path / name)) == {"error"}


def test_the_harness_notices_crashes_exceptions_hangs_hogs_and_deeds(tmp_path):
    def load(folder: Path) -> str:
        number = int((folder / "number").read_text())
        if number == 3:
            ctypes.string_at(0)
        if number == 4:
            os.abort()
        if number == 6:
            raise ZeroDivisionError("no\none")
        if number == 7:
            raise UserError("two\nlines")
        if number == 8:
            time.sleep(100)
        if number == 10:
            bytearray(b"x") * (MEGABYTES + 60 << 20)
        if number == 11:
            np.zeros(1 << 36, np.uint8)
        if number == 12:
            pickle.loads(pickle.dumps(Kind))
        if number == 13:
            (folder / "deed").write_text("done")
        if number == 14:
            raise AssertionError("another shape")
        if number == 16:
            os._exit(0)
        if number % 5 == 0 and number:
            raise UserError("one line")
        return "fine"

    fake = Kind("fake", "number", b"0", "fine", load, lambda rng, number: b"%d" % number)
    begin = time.monotonic()
    ended = outcomes(fake, range(1, 20), tmp_path / "fake", seconds=4.0)
    assert time.monotonic() - begin < 40 and list(ended) == list(range(1, 20))
    expected = {3: "exit status -11: 'Fatal Python error: Segmentation fault",
                4: "exit status -6: 'Fatal Python error: Abort", 6: "ZeroDivisionError: 'no\\none'",
                7: "not one printable line", 8: "more than 4.0 s: 'Fatal Python error: Abort", 10: "2",
                11: "MemoryError", 12: "pickle.find_class", 13: "open(", 14: "AssertionError: 'another shape'",
                16: "exit status 0"}
    found = faults_of(ended)
    assert [*found] == [*expected]
    assert {outcome for number, outcome in ended.items() if number not in found} == {"fine", "error"}
    for number, message in expected.items():
        assert found[number].startswith(f"FAULT {message}"), found[number]
    assert MEGABYTES < int(found[10].split()[1]) < MEGABYTES + 100


def test_the_harness_says_so_when_it_cannot_try(tmp_path):
    kind = Kind("fake", "file", b"", "fine", lambda folder: "bad", lambda rng, number: b"")
    with pytest.raises(RuntimeError, match="a good file: bad"):
        outcomes(kind, range(3), tmp_path / "bad")
    kind = dataclasses.replace(kind, load=lambda folder: "fine", make=lambda rng, number: b"" if number < 2 else 1 / 0)
    with pytest.raises(RuntimeError, match="division by zero"):
        outcomes(kind, range(3), tmp_path / "fine")


class Payload:
    """Unpickled, it creates a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_a_pickle_executes_nothing_whatever_it_is_given_as(kinds, tmp_path):
    fired = tmp_path / "fired"
    pickled, saved, array = pickle.dumps(Payload(fired)), io.BytesIO(), io.BytesIO()
    torch.save(dict(model=Payload(fired)), saved)
    np.save(array, np.array([Payload(fired)], dtype=object), allow_pickle=True)
    for opened in (lambda: pickle.loads(pickled), lambda: torch.load(io.BytesIO(saved.getvalue()), weights_only=False),
                   lambda: np.load(io.BytesIO(array.getvalue()), allow_pickle=True)):
        opened()
        assert fired.exists(), "a payload that does nothing proves nothing"
        fired.unlink()
    disguises = [lambda data: data, checked, sealed, lambda data: checked(struct.pack("<I", len(data)) + data),
                 lambda data: sealed(struct.pack("<I", len(data)) + data),
                 lambda data: dataset_files.shard_header(len(data) // 2) + data[: len(data) // 2 * 2]]
    inputs = [disguise(data) for data in (pickled, saved.getvalue(), array.getvalue()) for disguise in disguises]
    for name, kind in kinds.items():
        disguised = dataclasses.replace(kind, make=lambda rng, number: inputs[number])
        assert check(disguised, range(len(inputs)), tmp_path / name)["error"] == len(inputs)
    assert not fired.exists()
