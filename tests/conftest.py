"""What the tests share: a tiny corpus, a tiny configuration, and ways to run the real script on them."""
import contextlib
import dataclasses
import io
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import build_dataset
import numpy as np
import pytest
import torch

import train_gpt

REPOSITORY = Path(__file__).resolve().parent.parent
# Otherwise the script chooses by timing, and bits depend on the number of threads.
os.environ.setdefault("OMP_NUM_THREADS", str(torch.get_num_threads()))
VOCAB_SIZE = 384
# Every technique at a size that trains in seconds: 3 layers, a skip, grouped heads, averaging, at least 4 TTT chunks.
TINY = dict(
    VOCAB_SIZE=VOCAB_SIZE, NUM_LAYERS=3, MODEL_DIM=32, NUM_HEADS=4, NUM_KV_HEADS=2, BIGRAM_VOCAB_SIZE=64, BIGRAM_DIM=8,
    TRAIN_SEQ_LEN=32, TRAIN_BATCH_TOKENS=256, ITERATIONS=12, MAX_WALLCLOCK_SECONDS=0, WARMUP_STEPS=2, WARMDOWN_ITERS=6,
    SWA_EVERY=2, VAL_LOSS_EVERY=6, VAL_BATCH_SIZE=512, TRAIN_LOG_EVERY=1, EVAL_STRIDE=8, EVAL_BATCH_SEQS=8,
    TTT_CHUNK_TOKENS=256, MAX_VAL_TOKENS=1408, DEVICE="cpu", COMPILE=0, COMPUTE_DTYPE="float32",
)


def text(seed: int, sentences: int) -> str:
    """Text with some structure to learn: sentences of a small made-up vocabulary, digits and rare characters."""
    rng = random.Random(seed)
    stems = ["".join(random.Random(i).choices("aeioulmnrst", k=2 + i % 5)) for i in range(120)]
    parts = []
    for _ in range(sentences):
        words = [rng.choice(stems[: rng.choice((10, 40, 120))]) for _ in range(rng.randint(3, 9))]
        parts.append(" ".join(words).capitalize() + rng.choice((".", "!", f" {rng.randint(0, 99)}.", " é日.")))
    return " ".join(parts)


@pytest.fixture(scope="session")
def dataset(tmp_path_factory) -> dict[str, str]:
    """Settings that point at a data set built by the real tool from text written here."""
    folder = tmp_path_factory.mktemp("data")
    source = folder / "corpus.jsonl"
    source.write_text("".join(json.dumps({"text": text(seed, 40)}) + "\n" for seed in range(60)))
    sizes = ["--vocab-size", str(VOCAB_SIZE), "--val-docs", "5"]
    assert build_dataset.main(["--source", str(source), "--out", str(folder / "set"), *sizes]) == 0
    (tokenizer,) = (folder / "set").glob("*.model")
    return dict(DATA_PATH=str(folder / "set"), TOKENIZER_PATH=str(tokenizer))


def environment(settings: dict) -> dict[str, str]:
    """This process's environment without any of the script's settings, plus these."""
    names = {name.upper() for name in vars(train_gpt.Config())}
    return {k: v for k, v in os.environ.items() if k not in names} | {k: str(v) for k, v in settings.items()}


class Finished:
    """A finished run of the script: its output, and what it left under logs/."""

    def __init__(self, folder: Path, output: str, code: int = 0):
        self.folder, self.output, self.code = folder, output, code

    @property
    def records(self) -> list[dict]:
        return [json.loads(line) for line in (self.folder / "metrics.jsonl").read_text().splitlines()]

    def events(self, name: str) -> list[dict]:
        return [record for record in self.records if record["event"] == name]

    @property
    def losses(self) -> list[float]:
        return [record["train_loss"] for record in self.events("train")]

    @property
    def submission(self) -> dict:
        return json.loads((self.folder / "submission.json").read_text())


@pytest.fixture
def run_here(dataset, tmp_path, monkeypatch):
    """Runs the script's main() in this process with TINY and the given settings, in a fresh folder."""

    def run(**settings) -> Finished:
        settings = dict(RUN_ID=f"run{len(list(tmp_path.glob('logs/*')))}") | settings
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(os, "environ", environment(TINY | dataset | settings))
        monkeypatch.setattr(train_gpt.Dist, "catch_signals", lambda self: None)  # they stay pytest's
        output = io.StringIO()
        with contextlib.redirect_stdout(output):
            train_gpt.main()
        return Finished(tmp_path / "logs" / settings["RUN_ID"], output.getvalue())

    return run


def run_process(folder: Path, settings: dict, ranks: int = 1, script: Path = Path("train_gpt.py"),
                *torchrun: str) -> Finished:
    """Runs the script as a person would, alone or under torchrun (with these options), in this folder."""
    launcher = [sys.executable]
    if ranks > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}", *torchrun]
    done = subprocess.run([*launcher, str(REPOSITORY / script)], cwd=folder, env=environment(settings),
                          capture_output=True, text=True, timeout=300)
    return Finished(folder / "logs" / settings.get("RUN_ID", ""), done.stdout + done.stderr, done.returncode)


def tiny_config(dataset: dict, **changes) -> train_gpt.Config:
    """TINY as a Config, without the checks when fields are changed (some tests need a geometry they refuse)."""
    config = train_gpt.Config.from_env({k: str(v) for k, v in (TINY | dataset).items()})
    config = train_gpt.settle(config, train_gpt.Dist())
    return dataclasses.replace(config, **changes)


def random_model(config: train_gpt.Config, seed: int = 0) -> train_gpt.GPT:
    """A model in which every parameter matters: a new one predicts next to nothing, its output projections are zero."""
    torch.manual_seed(seed)
    model = train_gpt.GPT(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * (0.3 if parameter.ndim < 2 else parameter.size(-1) ** -0.5))
    return model


def make_run(config: train_gpt.Config, model: train_gpt.GPT | None = None, folder: Path | None = None) -> train_gpt.Run:
    model = model or random_model(config)
    dist = train_gpt.Dist()
    return train_gpt.Run(config, dist, train_gpt.Log(folder), model, train_gpt.token_nll,
                         train_gpt.FlatGradients(model))


@pytest.fixture(scope="session")
def token_bytes(dataset) -> train_gpt.TokenBytes:
    return train_gpt.TokenBytes(train_gpt.load_tokenizer(tiny_config(dataset)))


@pytest.fixture(scope="session")
def val_tokens(dataset) -> np.ndarray:
    stream = train_gpt.TokenStream(tiny_config(dataset), "val")
    return stream.read(0, stream.num_tokens)


def pytest_addoption(parser):
    parser.addoption("--renew-golden", action="store_true", help="write tests/golden.json anew from this run")
