"""The real script, run as people run it: in processes of its own, on one and two ranks, and on bad input."""
import concurrent.futures
import dataclasses
import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import sentencepiece as spm
import torch
from conftest import REPOSITORY, TINY, make_run, random_model, run_process, tiny_config
from test_units import write_shard

import train_gpt

GOLDEN = Path(__file__).with_name("golden.json")
GOLDEN_TOLERANCE = 2e-3  # nats; other CPUs, BLAS and torch versions add in another order

# ---- Ranks


@pytest.fixture(scope="module")
def one_and_two_ranks(dataset, tmp_path_factory):
    """The same run in one process, and under torchrun on two, with other micro-batches."""
    settings = TINY | dataset | dict(EVAL_PLAIN=1)
    with concurrent.futures.ThreadPoolExecutor() as pool:
        one = pool.submit(run_process, tmp_path_factory.mktemp("one"), settings | dict(RUN_ID="one"))
        two = pool.submit(run_process, tmp_path_factory.mktemp("two"),
                          settings | dict(RUN_ID="two", MICRO_BATCH_TOKENS=64), ranks=2)
        runs = one.result(), two.result()
    for run in runs:
        assert run.code == 0, run.output
    return runs


def test_one_and_two_ranks_give_the_same_losses_and_score(one_and_two_ranks):
    one, two = one_and_two_ranks
    assert len(one.losses) == TINY["ITERATIONS"]
    np.testing.assert_allclose(one.losses, two.losses, atol=2e-4)
    assert one.losses[-1] < one.losses[0] - 0.5  # it learns
    for event in ("val", "swa", "final_ttt_exact", "final_quantized_exact"):
        ones, twos = one.events(event), two.events(event)
        assert len(ones) == len(twos) == (2 if event == "val" else 1)
        assert ones[-1]["val_bpb"] == pytest.approx(twos[-1]["val_bpb"], abs=1e-3)


def test_ranks_hold_the_same_weights_after_training_and_adapting(one_and_two_ranks):
    _, two = one_and_two_ranks
    for stage in ("training", "final_ttt_exact", "final_quantized_exact"):
        assert re.search(f"weights_sha256 after {stage}: [0-9a-f]{{64}} on 2 ranks", two.output)  # it ends if they differ
    told = {record["when"]: record["sha256"] for record in two.events("weights")}
    stored = told["before final_ttt_exact"]
    assert stored == told["before final_quantized_exact"] == told["after final_quantized_exact"]
    assert len({told["after training"], stored, told["after final_ttt_exact"]}) == 3  # adapting does change them


def test_a_run_leaves_what_it_promises(one_and_two_ranks):
    one, _ = one_and_two_ranks
    assert {path.name for path in one.folder.iterdir()} == {
        "train.log", "metrics.jsonl", "train_gpt.py", "artifact.bin", "submission.json", "checkpoints"}
    code = (REPOSITORY / "train_gpt.py").read_bytes()
    assert (one.folder / "train_gpt.py").read_bytes() == code
    assert (one.folder / "train.log").read_text().startswith(code.decode())
    sizes = one.events("artifact")[0]
    assert sizes["artifact_bytes"] == (one.folder / "artifact.bin").stat().st_size and sizes["code_bytes"] == len(code)
    assert f"artifact_bytes:{sizes['artifact_bytes']} code_bytes:{len(code)} total_bytes:" in one.output
    for line in (r"^step:1/12 train_loss:[\d.]+ train_time:\d+ms step_avg:[\d.]+ms$",
                 r"^step:12/12 val_loss:[\d.]+ val_bpb:[\d.]+ train_time:\d+ms$",
                 r"^final_quantized_exact val_loss:[\d.]+ val_bpb:[\d.]+ ",
                 r"^final_ttt_exact val_loss:[\d.]+ val_bpb:[\d.]+ "):
        assert re.search(line, one.output, re.MULTILINE), line
    assert one.submission["targets"] == TINY["MAX_VAL_TOKENS"] < one.submission["full_targets"]


def test_a_trace_of_the_submitted_pass_is_in_the_metrics(one_and_two_ranks):
    one, _ = one_and_two_ranks
    names = [record["event"] for record in one.records]
    submitted = one.records[names.index("artifact") : names.index("final_ttt_exact")]
    scored_until, adapted = 0, 0
    for record in submitted:
        if record["event"] == "score":
            assert record["first"] == scored_until
            scored_until = record["end"]
        elif record["event"] == "adapt":
            assert record["end"] <= scored_until and record["first"] == adapted
            adapted = record["end"]
    assert scored_until == TINY["MAX_VAL_TOKENS"] and adapted == TINY["MAX_VAL_TOKENS"] // 256 * 256


# ---- Repeatability


@pytest.mark.parametrize("recipe", ["default", "pr264"])
def test_golden_losses(run_here, request, recipe):
    """The losses of the first steps on a corpus written for the tests; renew with `make golden` after a change that
    is meant to alter them. Those of PR #264's recipe are of before any other existed: no change may alter them."""
    golden = json.loads(GOLDEN.read_text())
    losses = run_here(**pr264() if recipe == "pr264" else {}).losses
    if request.config.getoption("--renew-golden") and recipe == "default":
        GOLDEN.write_text(json.dumps(golden | dict(default=[round(loss, 5) for loss in losses])) + "\n")
    np.testing.assert_allclose(losses, json.loads(GOLDEN.read_text())[recipe], atol=GOLDEN_TOLERANCE)


def pr264() -> dict[str, str]:
    return dict(line.split("=") for line in (REPOSITORY / "benchmarks" / "pr264.env").read_text().split())


def test_the_seeds_recipe_is_a_file_of_settings_away():
    """PR #264's training settings and this script's adaptation, and no line that the defaults say already."""
    config, default = train_gpt.Config.from_env(pr264()), vars(train_gpt.Config())
    seeds = dict(
        vocab_size=1024, num_layers=11, model_dim=512, num_heads=8, num_kv_heads=4, mlp_mult=3.0, train_seq_len=2048,
        bigram_vocab_size=2048, bigram_dim=64, qk_gain_init=1.5, logit_softcap=30.0, rope_base=10000.0,
        train_batch_tokens=786_432, iterations=20_000, max_wallclock_seconds=600.0, warmup_steps=20,
        warmdown_iters=3000, matrix_lr=0.02, scalar_lr=0.02, tied_embed_lr=0.03, muon_momentum=0.99,
        muon_momentum_warmup_start=0.92, muon_momentum_warmup_steps=1500, muon_backend_steps=5, weight_decay=0.04,
        grad_clip_norm=0.3, swa_enabled=True, swa_start_frac=0.5, swa_every=50, eval_stride=64, ttt_lr=0.002,
        ttt_momentum=0.9, ttt_epochs=3, ttt_chunk_tokens=32_768, ttt_grad_clip=1.0,
        shuffle=False, relu_slope=0.0, xsa_last_n=0, muon_row_norm=False)  # what it does not have
    assert {name: getattr(config, name) for name in seeds} == seeds
    assert all(getattr(config, name.lower()) != default[name.lower()] for name in pr264())
    assert all(default[name] == seeds[name] for name in seeds if name.upper() not in pr264())
    with torch.device("meta"):
        assert sum(p.numel() for p in train_gpt.GPT(config).parameters()) == 26_666_073


def test_same_seed_same_bits_and_another_seed_another_model(run_here):
    first, again, other = run_here(), run_here(), run_here(SEED=7)
    assert first.losses == again.losses != other.losses
    assert (first.folder / "artifact.bin").read_bytes() == (again.folder / "artifact.bin").read_bytes()
    assert first.submission["val_bpb"] == again.submission["val_bpb"] != other.submission["val_bpb"]


def test_micro_batches_do_not_change_the_run(run_here):
    whole, pieces = run_here(MICRO_BATCH_TOKENS=256), run_here(MICRO_BATCH_TOKENS=32)
    np.testing.assert_allclose(whole.losses, pieces.losses, atol=2e-4)


# ---- Evaluation from disk


def test_an_artifact_alone_gives_the_same_scores(run_here, tmp_path, dataset):
    trained = run_here(VAL_NLL_PATH=str(tmp_path / "a.npy"))
    only_val = tmp_path / "val"
    only_val.mkdir()
    for shard in Path(dataset["DATA_PATH"]).glob("fineweb_val_*.bin"):
        shutil.copy(shard, only_val)
    # Only the artifact says how large the model is, and no training data is there.
    model = dict(NUM_LAYERS=11, MODEL_DIM=512, NUM_HEADS=8, NUM_KV_HEADS=4, BIGRAM_DIM=64, BIGRAM_VOCAB_SIZE=2048)
    evaluated = run_here(ARTIFACT=trained.folder / "artifact.bin", VAL_NLL_PATH=str(tmp_path / "b.npy"),
                         DATA_PATH=str(only_val), **model)
    assert not evaluated.losses and not (evaluated.folder / "artifact.bin").exists()
    nats, again = np.load(tmp_path / "a.npy"), np.load(tmp_path / "b.npy")
    assert nats.dtype == np.float32 and nats.shape == (TINY["MAX_VAL_TOKENS"],) and np.array_equal(nats, again)
    submission = evaluated.submission
    total = nats.sum(dtype=np.float64)
    assert submission["val_loss"] == pytest.approx(total / len(nats), rel=1e-9)
    assert submission["val_bpb"] == pytest.approx(total / math.log(2) / submission["bytes"], rel=1e-9)


def test_scored_bytes_are_those_of_the_text(run_here, dataset):
    tokenizer = spm.SentencePieceProcessor(model_file=dataset["TOKENIZER_PATH"])
    run = run_here(MAX_VAL_TOKENS=0, TTT_ENABLED=0, ITERATIONS=1)
    tokens = np.fromfile(next(Path(dataset["DATA_PATH"]).glob("fineweb_val_*.bin")), "<u2")[512:]
    targets = run.submission["targets"]
    assert targets == run.submission["full_targets"] == (len(tokens) - 1) // 32 * 32
    documents = np.split(tokens[: targets + 1], np.flatnonzero(tokens[: targets + 1] == 1))
    whole, cut = documents[:-1], documents[-1]
    text_bytes = sum(len(tokenizer.decode(document.tolist()).encode()) for document in whole)
    assert 0 <= run.submission["bytes"] - text_bytes <= 20 * len(cut)
    manifest = json.loads((Path(dataset["DATA_PATH"]) / "manifest.json").read_text())
    missing = len(tokens) - 1 - targets
    assert 0 <= manifest["splits"]["val"]["normalised_bytes"] - run.submission["bytes"] <= 20 * missing


def test_size_limit_is_reported(run_here):
    code = (REPOSITORY / "train_gpt.py").stat().st_size
    assert "TOO LARGE" in run_here(MAX_ARTIFACT_BYTES=code + 100, ITERATIONS=1, TTT_ENABLED=0).output
    with pytest.raises(train_gpt.UserError, match="the finest steps: make it smaller"):
        run_here(MAX_ARTIFACT_BYTES=1000)


def test_training_stops_before_the_limit(run_here):
    run = run_here(MAX_WALLCLOCK_SECONDS=2, ITERATIONS=100_000, TTT_ENABLED=0, TRAIN_LOG_EVERY=1, VAL_LOSS_EVERY=3,
                   WARMDOWN_ITERS=3000)
    last = run.events("train")[-1]
    assert len(run.events("val")) > 2, "validation must not count"
    # 1/8 is kept for GPTQ at most. From 1.75 s less the slowest of the last ten steps on none starts, so the last one
    # started less than two before; its learning rate fell over 0.58 of the limit.
    slowest = np.diff([0, *(r["train_s"] for r in run.events("train"))])[-10:].max()
    assert 1.75 - slowest < last["train_s"] <= 2.0 and last["lr_factor"] < 2 * slowest / (0.58 * 1.75)
    _, moments = run.events("moments")  # in the warm-up, and after training
    late = last["train_s"] + moments["seconds"] - 2.0  # the last batch may take twice what those before it foretold
    assert moments["batches"] > 1 and late <= moments["seconds"] / moments["batches"], "they are training time"


def test_the_artifact_is_brought_below_the_limit(run_here):
    free, code = run_here(ITERATIONS=2), (REPOSITORY / "train_gpt.py").stat().st_size
    size = (free.folder / "artifact.bin").stat().st_size
    fitted = run_here(ITERATIONS=2, MAX_ARTIFACT_BYTES=code + int(0.7 * size))
    assert 0.3 * size < (fitted.folder / "artifact.bin").stat().st_size < 0.7 * size
    assert "TOO LARGE" not in fitted.output and fitted.submission["val_bpb"] != free.submission["val_bpb"]


def test_what_cannot_fit_is_a_valid_smaller_artifact_and_the_run_says_so(run_here):
    run = run_here(ITERATIONS=2, MAX_ARTIFACT_BYTES=(REPOSITORY / "train_gpt.py").stat().st_size + 100)
    assert "TOO LARGE" in run.output
    assert run.submission["targets"] == TINY["MAX_VAL_TOKENS"]  # what was stored is what was scored
    again = run_here(ARTIFACT=run.folder / "artifact.bin")
    assert again.submission["val_bpb"] == run.submission["val_bpb"]


def test_gptq_gets_what_training_leaves_of_the_time(run_here, monkeypatch):
    given, moments = [], train_gpt.error_moments

    def spy(run, stream, first_step, seconds):
        given.append((first_step, seconds))
        return moments(run, stream, first_step, seconds)

    monkeypatch.setattr(train_gpt, "error_moments", spy)
    run = run_here(ITERATIONS=5, MAX_WALLCLOCK_SECONDS=50)
    assert given == [(0, 50 / 8), (5, 50 - run.events("val")[-1]["train_s"])]  # in the warm-up it is measured
    given.clear()
    run_here(ITERATIONS=5)
    assert given == [(0, math.inf), (5, math.inf)]


@pytest.mark.parametrize("batches", [0, 3])
def test_gptq_batches_decide_what_the_encoder_gets(run_here, monkeypatch, batches):
    given, encode = [], train_gpt.encode_artifact
    monkeypatch.setattr(train_gpt, "encode_artifact", lambda *a, **b: given.append(b["moments"]) or encode(*a, **b))
    run = run_here(ITERATIONS=2, GPTQ_BATCHES=batches)
    assert bool(given[0]) == bool(batches)
    assert [record["batches"] for record in run.events("moments")] == [batches, batches]


# ---- Bad input: one line, a status that is not 0, nothing trained


@pytest.fixture(scope="module")
def bad_inputs(dataset, tmp_path_factory) -> dict:
    """Name -> (settings, ranks, what the line must say); the files are damaged copies of the good ones."""
    folder = tmp_path_factory.mktemp("bad")
    good = Path(dataset["DATA_PATH"])
    train = (good / "fineweb_train_000000.bin").read_bytes()

    def with_train(name: str, content: bytes | None) -> dict:
        (folder / name).mkdir()
        for path in good.glob("*.bin"):
            shutil.copy(path, folder / name)
        (folder / name / "fineweb_train_000000.bin").write_bytes(content or b"")
        return dict(DATA_PATH=str(folder / name))

    other_tokenizer = folder / "other.model"
    other_tokenizer.write_bytes(b"not a model")
    tokens = np.frombuffer(train[1024:], "<u2").copy()
    tokens[len(tokens) // 2] = TINY["VOCAB_SIZE"]
    diverged = folder / "artifact.bin"
    diverged.write_bytes(b"PGOLFGPT" + bytes(100))
    return {
        "missing data": (dict(DATA_PATH=str(folder / "none")), 1, "python data/build_dataset.py"),
        "missing tokenizer": (dict(TOKENIZER_PATH=str(folder / "none")), 1, "python data/build_dataset.py"),
        "damaged tokenizer": (dict(TOKENIZER_PATH=str(other_tokenizer)), 1, "no SentencePiece model"),
        "wrong magic": (with_train("magic", b"\0" + train[1:]), 1, "delete it and"),
        "truncated shard": (with_train("cut", train[:-1]), 1, f"{len(train) - 1} bytes"),
        "header only": (with_train("header", train[:100]), 1, "delete it and"),
        "empty shard": (with_train("empty", None), 1, "delete it and"),
        "token id": (with_train("id", train[:1024] + tokens.tobytes()), 1, f"token id {TINY['VOCAB_SIZE']}"),
        "tokenizer of another size": (dict(VOCAB_SIZE=400), 1, "has 384 tokens, VOCAB_SIZE=400"),
        "misspelt setting": (dict(TTT_EPOCH=3), 1, "did you mean TTT_EPOCHS"),
        "malformed setting": (dict(TTT_EPOCHS="three"), 1, "TTT_EPOCHS='three'"),
        "sequence length": (dict(TRAIN_SEQ_LEN=48), 1, "must be a multiple of TRAIN_SEQ_LEN=48"),
        "micro-batch": (dict(MICRO_BATCH_TOKENS=96), 1, "MICRO_BATCH_TOKENS=96 must divide"),
        "world size": (dict(TRAIN_BATCH_TOKENS=96), 2, "2 ranks cannot share 3 sequences"),
        "missing artifact": (dict(ARTIFACT=str(folder / "none")), 1, "no such file"),
        "damaged artifact": (dict(ARTIFACT=str(diverged)), 1, "begins with"),
    }


@pytest.fixture(scope="module")
def refused(bad_inputs, dataset, tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("refused")
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        def start(name, settings, ranks):
            settings = TINY | dataset | settings | dict(RUN_ID=name.replace(" ", "_"))
            return pool.submit(run_process, folder, settings, ranks)

        runs = {name: start(name, settings, ranks) for name, (settings, ranks, _) in bad_inputs.items()}
        return {name: run.result() for name, run in runs.items()}


@pytest.mark.parametrize("name", [
    "missing data", "missing tokenizer", "damaged tokenizer", "wrong magic", "truncated shard", "header only",
    "empty shard", "token id", "tokenizer of another size", "misspelt setting", "malformed setting", "sequence length",
    "micro-batch", "world size", "missing artifact", "damaged artifact"])
def test_bad_input_is_one_line_before_any_training(name, refused, bad_inputs):
    run, (_, ranks, message) = refused[name], bad_inputs[name]
    lines = [line for line in run.output.splitlines() if line.startswith("error: ")]
    assert run.code != 0 and len(lines) == 1 and message in lines[0], run.output
    if ranks == 1:
        assert run.output.splitlines() == lines  # nothing else is said, no traceback
    assert not run.folder.exists()


def test_a_bad_token_beyond_the_start_up_sample_is_found_when_read(tmp_path):
    write_shard(tmp_path / "fineweb_train_000000.bin", [1] * 50 + [99] + [1] * 50)
    config = train_gpt.Config(data_path=str(tmp_path), train_seq_len=8, vocab_size=100)
    stream = train_gpt.TokenStream(config, "train")
    stream.config = dataclasses.replace(config, vocab_size=99)  # as if the sample had not reached it
    stream.read(0, 50)
    with pytest.raises(train_gpt.UserError, match="token id 99"):
        stream.read(45, 10)


# ---- The file itself


def test_the_file_is_short_and_needs_four_packages():
    code = (REPOSITORY / "train_gpt.py").read_text()
    assert len(code.splitlines()) <= 1490 and len(code.encode()) <= 75_000
    assert max(map(len, code.splitlines())) <= 120
    third_party = set(re.findall(r"^(?:import|from) (\w+)", code, re.MULTILINE)) - set(sys.stdlib_module_names)
    assert third_party == {"numpy", "sentencepiece", "torch", "zstandard"}


def test_importing_starts_nothing(tmp_path):
    """No environment read, no process group, no CUDA, no file: SEED=x would be an error if it were read."""
    check = ("import sys; sys.path.insert(0, sys.argv[1]); import train_gpt, torch, os; "
             "assert not torch.distributed.is_initialized() and not torch.cuda.is_initialized() and not os.listdir()")
    done = subprocess.run([sys.executable, "-B", "-c", check, str(REPOSITORY)], cwd=tmp_path, capture_output=True,
                          text=True, env=os.environ | {"SEED": "x", "RANK": "x", "WORLD_SIZE": "x"})
    assert done.returncode == 0, done.stderr


def test_a_failed_rerun_leaves_no_score_of_the_run_before(run_here):
    first = run_here(RUN_ID="same", ITERATIONS=1, TTT_ENABLED=0)
    assert first.submission
    with pytest.raises(train_gpt.UserError, match="not finite"):
        run_here(RUN_ID="same", ITERATIONS=2, SCALAR_LR=1e9)
    assert {path.name for path in first.folder.iterdir()} == {"train.log", "metrics.jsonl", "train_gpt.py", "checkpoints"}


def test_diverged_adaptation_is_an_error(run_here):
    with pytest.raises(train_gpt.UserError, match="TTT_LR"):
        run_here(ITERATIONS=2, TTT_LR=1e9, TTT_GRAD_CLIP=0)


def test_a_copy_runs_from_a_records_folder(run_here, tmp_path, dataset, monkeypatch):
    """The copy needs nothing of the repository: evaluate an artifact with it, elsewhere."""
    trained = run_here(ITERATIONS=2)
    monkeypatch.setattr("conftest.REPOSITORY", trained.folder)
    run = run_process(tmp_path, TINY | dataset | dict(ARTIFACT=trained.folder / "artifact.bin", RUN_ID="copy"))
    assert run.code == 0, run.output
    assert run.submission["val_bpb"] == trained.submission["val_bpb"]


# ---- GPU


needs_gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


@pytest.mark.parametrize("compiled", [False, True])
class TestGPU:
    pytestmark = needs_gpu

    def test_bf16_agrees_with_fp32_on_the_cpu(self, dataset, compiled):
        config = tiny_config(dataset)
        model, tokens = random_model(config), torch.randint(config.vocab_size, (4, 32))
        expected = train_gpt.token_nll(model, tokens, tokens)
        gpu_model = train_gpt.GPT(dataclasses.replace(config, compute_dtype="bfloat16"))
        gpu_model.load_state_dict(model.state_dict())
        nll = torch.compile(train_gpt.token_nll) if compiled else train_gpt.token_nll
        result = nll(gpu_model.cuda(), tokens.cuda(), tokens.cuda())
        assert (result.cpu() - expected).abs().mean() < 0.03 * expected.mean()

    def test_trains_and_evaluates(self, run_here, compiled):
        run = run_here(DEVICE="cuda", COMPILE=int(compiled), COMPUTE_DTYPE="auto", ITERATIONS=30, EVAL_PLAIN=1)
        assert run.losses[-1] < run.losses[0] - 0.5
        assert abs(run.submission["val_bpb"] - run.events("swa")[0]["val_bpb"]) < 0.3


def test_gpu_statistics_are_not_needed_without_one(dataset):
    """make_run and settle work on a machine without CUDA, and choose what such a machine can do."""
    config = train_gpt.settle(tiny_config(dataset, compute_dtype="auto", compile="auto", micro_batch_tokens=0),
                              make_run(tiny_config(dataset)).dist)
    assert (config.device, config.compile, config.micro_batch_tokens) == ("cpu", "0", 256)
    assert config.compute_dtype in ("float32", "bfloat16")
