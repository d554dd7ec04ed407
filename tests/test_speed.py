"""What makes the run fast must not change what it computes: attention back ends, compiled blocks, chosen positions, the
clock that is read now and then, ranks that share Newton-Schulz. And the benchmarks run."""
import json
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import REPOSITORY, TINY, environment, make_run, random_model, run_process, tiny_config

import train_gpt
from train_gpt import BACK_ENDS, Evaluator, attend_by_products, causal_mask, sliding_windows

# ---- Attention


def attention_by_loops(q, k, v):
    """One query at a time, over the keys up to it."""
    y = torch.zeros_like(q)
    group = q.size(2) // k.size(2)
    for batch in range(q.size(0)):
        for head in range(q.size(2)):
            for i in range(q.size(1)):
                keys, values = k[batch, : i + 1, head // group], v[batch, : i + 1, head // group]
                y[batch, i, head] = (keys @ q[batch, i, head] * q.size(-1) ** -0.5).softmax(0) @ values
    return y


@pytest.mark.parametrize("length, heads, kv_heads", [(1, 2, 1), (7, 4, 2), (40, 2, 2), (130, 3, 1)])
def test_written_out_attention_equals_a_loop_over_queries(length, heads, kv_heads):
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, length, n, 8) for n in (heads, kv_heads, kv_heads))
    mask = causal_mask(train_gpt.Config(train_seq_len=length, compute_dtype="float32"))
    torch.testing.assert_close(attend_by_products(q, k, v, mask), attention_by_loops(q, k, v), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("length", [32, 256, 300, 1100])  # one block, two, a cut one, more than eight rows of 128
@pytest.mark.parametrize("dtype, tolerance", [("float32", 1e-5), ("bfloat16", 0.01)])
def test_back_ends_agree_forwards_and_backwards(length, dtype, tolerance):
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, length, n, 16, dtype=train_gpt.DTYPES[dtype], requires_grad=True) for n in (4, 2, 2))
    mask = causal_mask(train_gpt.Config(train_seq_len=length, compute_dtype=dtype))
    gradient, results = torch.randn_like(q), {}
    for name in ("products", "flash"):
        y = BACK_ENDS[name](q, k, v, mask)
        results[name] = [y, *torch.autograd.grad(y, (q, k, v), gradient)]
    for a, b in zip(results["products"], results["flash"], strict=True):
        assert (a - b).norm() < tolerance * b.norm()


def test_no_key_after_a_query_has_any_weight(dataset):
    """Not a small one: values of 1e30 there must not be felt."""
    q, k, v = (torch.randn(1, 300, n, 16) for n in (4, 2, 2))
    mask = causal_mask(train_gpt.Config(train_seq_len=300, compute_dtype="float32"))
    before = attend_by_products(q, k, v, mask)
    for t in (1, 127, 128, 129, 299):
        k2, v2 = k.clone(), v.clone()
        k2[:, t:], v2[:, t:] = 1e4, 1e30
        assert torch.equal(attend_by_products(q, k2, v2, mask)[:, :t], before[:, :t])


def test_positions_asked_for_alone_get_what_they_get_among_all(dataset):
    config = tiny_config(dataset)
    model, tokens = random_model(config), torch.randint(config.vocab_size, (3, 32))
    at = torch.tensor([[0, 1, 2, 3], [5, 9, 30, 31], [28, 29, 30, 31]])
    targets = torch.randint(config.vocab_size, (3, 32))
    with torch.no_grad():
        among_all = train_gpt.token_nll(model, tokens, targets).gather(1, at)
        alone = train_gpt.token_nll(model, tokens, targets.gather(1, at), at)
    torch.testing.assert_close(alone, among_all, atol=1e-5, rtol=1e-5)


def test_positions_not_asked_for_cost_no_mlp_and_no_head(dataset):
    """Rows that reach the last block's MLP and the head, counted."""
    config = tiny_config(dataset)
    model, rows = random_model(config), {}
    for name, module in (("first mlp", model.blocks[0].mlp), ("last mlp", model.blocks[-1].mlp),
                         ("last queries", model.blocks[-1].attn.c_q), ("last keys", model.blocks[-1].attn.c_k)):
        module.register_forward_hook(lambda _, inputs, output, name=name: rows.__setitem__(name, inputs[0].size(1)))
    run = make_run(config, model)
    tokens = np.arange(1000) % config.vocab_size
    evaluator = Evaluator(run, tokens, type("Bytes", (), {"count": lambda self, t: np.ones(len(t) - 1, int)})())
    evaluator.score(sliding_windows(evaluator.num_targets, 32, 8)[:6], 4, 8)
    assert rows == {"first mlp": 32, "last mlp": 8, "last queries": 8, "last keys": 32}


def test_ranks_without_a_window_or_a_sequence_do_their_part(dataset, monkeypatch):
    """More ranks than windows and sequences: what all of them find adds up to what one does."""
    config = tiny_config(dataset, ttt_grad_clip=0.0)
    tokens = np.arange(1000) % config.vocab_size
    scores, gradients = [], []
    for world_size in (1, 5):
        for rank in range(world_size):
            run = make_run(config, random_model(config))
            run.dist.world_size, run.dist.rank = world_size, rank
            monkeypatch.setattr(run.dist, "sum_", lambda tensor: tensor)
            evaluator = Evaluator(run, tokens, type("Bytes", (), {"count": lambda self, t: np.ones(len(t) - 1, int)})())
            scores.append(evaluator.score(sliding_windows(evaluator.num_targets, 32, 8)[3:6], 2, 8))
            evaluator.adapt(0, 96, torch.optim.SGD(run.model.parameters(), lr=0.0))
            gradients.append(run.grads.flat.clone())
    np.testing.assert_allclose(sum(scores[1:]), scores[0], atol=1e-5)
    torch.testing.assert_close(sum(gradients[1:]), gradients[0], atol=1e-5, rtol=1e-4)
    assert not scores[-1].any() and not gradients[-1].any()


def test_windows_that_score_more_than_they_are_asked_for_are_an_error(dataset, val_tokens, token_bytes):
    config = tiny_config(dataset)
    evaluator = Evaluator(make_run(config), val_tokens, token_bytes)
    with pytest.raises(AssertionError):
        evaluator.score(sliding_windows(evaluator.num_targets, 32, 8), 8, 4)


def test_a_cpu_takes_the_written_out_attention_unless_told_otherwise(run_here):
    run = run_here(ITERATIONS=6, TTT_ENABLED=0)
    assert run.events("attention")[0]["choice"] == "products"
    other = run_here(ITERATIONS=6, TTT_ENABLED=0, ATTENTION="flash")
    assert other.events("attention")[0]["choice"] == "flash"
    assert other.losses == pytest.approx(run.losses, abs=1e-4)


def test_a_back_end_that_is_wrong_or_fails_is_not_chosen_however_fast(dataset, tmp_path, monkeypatch):
    """As on a GPU, which tries all of them."""
    faults = dict(flash=lambda y: y * float("nan"), cudnn=lambda y: 1.05 * y, fa3=lambda y: y / y.missing)
    for name, work in faults.items():
        monkeypatch.setitem(BACK_ENDS, name, lambda *args, work=work: work(attend_by_products(*args)))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    dist = train_gpt.Dist()
    dist.on_gpu = True
    choice = train_gpt.choose_attention(tiny_config(dataset), dist, train_gpt.Log(tmp_path))
    lines = (tmp_path / "train.log").read_text()
    assert choice == "products" and lines.count("other than products") == 2 and "AttributeError" in lines
    with pytest.raises(train_gpt.UserError, match="ATTENTION=flash fails"):
        train_gpt.choose_attention(tiny_config(dataset, attention="flash"), dist, train_gpt.Log(None))


# ---- Compiling


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """One compile cache for this module."""
    return str(tmp_path_factory.mktemp("compiled"))


COUNTING = """
import json, sys
import train_gpt
from torch._dynamo.utils import counters
counts = {}
def note(name):
    counts[name] = counters["stats"]["unique_graphs"]
train, store = train_gpt.train, train_gpt.evaluate_artifact
train_gpt.train = lambda *a: (note("warmed up"), train(*a), note("trained"))[1]
train_gpt.evaluate_artifact = lambda *a: (note("stored"), store(*a), note("evaluated"))[1]
train_gpt.main()
print("counts", json.dumps(counts))
"""


@pytest.mark.parametrize("mode, graphs", [
    ("blocks", 5 + 4 + 4),  # blocks: train, validate, score, score the last, adapt; embedding and head: the first four
    ("1", 4),  # train, validate, score, adapt
])
def test_each_graph_is_compiled_once_in_the_warm_up(mode, graphs, dataset, tmp_path, cache):
    """Fixed sizes all differ here, so that no graph can stand in for another. Losses and scores are those of eager."""
    (tmp_path / "train_gpt_counting.py").write_text(COUNTING)
    sizes = dict(TRAIN_BATCH_TOKENS=192, MICRO_BATCH_TOKENS=96, VAL_BATCH_SIZE=160, EVAL_BATCH_SEQS=7,
                 TTT_CHUNK_TOKENS=64, ITERATIONS=6, VAL_LOSS_EVERY=3, MAX_VAL_TOKENS=320, EVAL_PLAIN=1, NUM_LAYERS=2)
    settings = TINY | dataset | sizes | dict(TORCHINDUCTOR_CACHE_DIR=cache, PYTHONPATH=str(REPOSITORY))
    eager = run_process(tmp_path, settings | dict(RUN_ID="eager"))
    compiled = run_process(tmp_path, settings | dict(RUN_ID="compiled", COMPILE=mode),
                           script=tmp_path / "train_gpt_counting.py")
    assert compiled.code == 0, compiled.output
    assert compiled.losses == pytest.approx(eager.losses, abs=2e-4)
    assert compiled.submission["val_loss"] == pytest.approx(eager.submission["val_loss"], abs=2e-3)
    (counts,) = re.findall(r"counts (.*)", compiled.output)
    assert json.loads(counts) == dict.fromkeys(("warmed up", "trained", "stored", "evaluated"), graphs)


@pytest.mark.parametrize("changes, expected", [
    (dict(), "blocks"), (dict(iterations=499), "0"), (dict(max_wallclock_seconds=59.0), "0"),
    (dict(max_wallclock_seconds=0.0), "blocks"), (dict(compile="1"), "1"), (dict(compile="0"), "0")])
def test_a_cpu_compiles_blocks_if_the_run_is_long_enough(dataset, changes, expected):
    config = tiny_config(dataset, compile="auto", iterations=500, max_wallclock_seconds=60.0)
    assert train_gpt.settle(train_gpt.replace(config, **changes), train_gpt.Dist()).compile == expected


@pytest.mark.parametrize("module, function, result", [("shutil", "which", None), ("sysconfig", "get_path", "nowhere")])
def test_without_a_compiler_or_pythons_headers_nothing_is_compiled(dataset, monkeypatch, module, function, result):
    monkeypatch.setattr(getattr(train_gpt, module), function, lambda name: result)
    config = tiny_config(dataset, compile="auto", iterations=500, max_wallclock_seconds=60.0)
    assert train_gpt.settle(config, train_gpt.Dist()).compile == "0"


@pytest.mark.parametrize("seconds, expected", [
    ({4: 1.0, 2: 1.7, 1: 3.2}, 4),  # nothing else runs
    ({4: 1.0, 2: 0.9, 1: 1.1}, 4),  # no clear gain: what is usual stays
    ({4: 3.0, 2: 1.7, 1: 3.2}, 2),
    ({4: 9.0, 2: 8.0, 1: 3.2}, 1),  # the cores are others'
])
def test_a_cpu_gets_fewer_threads_where_these_are_clearly_faster(dataset, monkeypatch, seconds, expected):
    """The rule alone, with a clock of our own: what it sees on a busy machine is in README.md."""
    now = [4]
    monkeypatch.setattr(torch, "get_num_threads", lambda: now[0])
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: now.__setitem__(0, threads))
    monkeypatch.setattr(train_gpt.timeit, "timeit", lambda work, number: (work(), number * seconds[now[0]])[1])
    config = tiny_config(dataset)  # OMP_NUM_THREADS is set here: it holds
    assert now == [4]
    monkeypatch.delenv("OMP_NUM_THREADS")
    train_gpt.settle(config, train_gpt.Dist())
    assert now == [expected]


# ---- The clock


class Clocked:
    """train() on a clock that only its steps move."""

    def __init__(self, dataset, monkeypatch, limit: float, seconds, **changes):
        self.now, self.reads, self.steps = 0.0, 0, 0
        config = tiny_config(dataset, max_wallclock_seconds=limit, val_loss_every=0, warmup_steps=0,
                             train_log_every=10_000, **(dict(iterations=10_000) | changes))
        run = make_run(config)

        def step(*arguments):
            self.now += seconds(self.steps)
            self.steps += 1
            return torch.zeros(())

        def read(dist):
            self.reads += 1
            return self.now

        monkeypatch.setattr(train_gpt, "train_step", step)
        monkeypatch.setattr(train_gpt.Dist, "now", read)
        _, self.progress = train_gpt.train(run, train_gpt.TokenStream(config, "train"), [], lambda *a, **b: None)


def test_the_clock_is_read_every_tenth_step_and_the_limit_holds(dataset, monkeypatch):
    run = Clocked(dataset, monkeypatch, 100.0, lambda step: 0.1)
    assert 999 <= run.steps <= 1000 and run.now <= 100.0
    assert run.progress == dict(step=run.steps, train_s=pytest.approx(run.now))
    assert run.reads < run.steps / 10 + 40


@pytest.mark.parametrize("seconds", [
    lambda step: 0.1 + 0.05 * (step % 7 == 0), lambda step: 0.1 if step < 500 else 0.2,
    lambda step: 3.0 if step == 0 else 0.1, lambda step: 5.0 if step == 600 else 0.1],
    ids=["unsteady", "slower from the middle on", "a slow first step", "one long stall"])
def test_the_limit_holds_when_steps_are_uneven(dataset, monkeypatch, seconds):
    run = Clocked(dataset, monkeypatch, 100.0, seconds)
    assert 97.0 < run.now <= 100.0


def test_the_seconds_at_the_end_are_read_not_estimated(dataset, monkeypatch):
    run = Clocked(dataset, monkeypatch, 0.0, lambda step: 0.1 if step < 15 else 0.7, iterations=17)
    assert run.steps == 17 and run.progress == dict(step=17, train_s=pytest.approx(run.now))


def test_seconds_of_validation_are_not_training(dataset, monkeypatch):
    """On the same clock: each validation takes 7 s, which neither count nor are taken for slow steps."""
    config = tiny_config(dataset, max_wallclock_seconds=20.0, iterations=10_000, val_loss_every=30,
                         train_log_every=10_000)
    state = dict(now=0.0, steps=0)

    def advance(seconds):
        state["now"] += seconds

    def step(*arguments):
        advance(0.1)
        state["steps"] += 1
        return torch.zeros(())

    monkeypatch.setattr(train_gpt, "train_step", step)
    monkeypatch.setattr(train_gpt.Dist, "now", lambda dist: state["now"])
    stream = train_gpt.TokenStream(config, "train")
    _, progress = train_gpt.train(make_run(config), stream, [], lambda *a, **b: advance(7.0))
    assert 198 <= state["steps"] <= 200 and progress["train_s"] == pytest.approx(0.1 * state["steps"])


# ---- Ranks that share Newton-Schulz

RANKS = """
import os
import torch
import train_gpt
torch.manual_seed(0)
shapes = [(8, 4)] * 4 + [(4, 8)] + [(6, 6)] * 7  # shares of 2 and 3, and shapes with fewer matrices than ranks
dist = train_gpt.Dist("cpu", os.environ)
same = True
for dtype in (torch.float32, torch.bfloat16):
    results = []
    for each in (train_gpt.Dist(), dist):
        torch.manual_seed(1)
        params = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
        muon = train_gpt.Muon(params, lr=0.1, momentum=0.9, dist=each, dtype=dtype)
        for _ in range(3):
            for p in params:
                p.grad = torch.randn_like(p)
            muon.step()
        results.append(params)
    same = same and all(torch.allclose(a, b, atol=1e-5 if dtype == torch.float32 else 0.02) for a, b in zip(*results))
with open(f"rank{dist.rank}", "w") as file:
    print(dist.world_size, same, file=file)
torch.distributed.destroy_process_group()
os._exit(0)
"""


def test_three_ranks_take_the_steps_of_one(tmp_path):
    (tmp_path / "ranks.py").write_text(RANKS)
    done = run_process(tmp_path, dict(PYTHONPATH=str(REPOSITORY)), ranks=3, script=tmp_path / "ranks.py")
    assert done.code == 0, done.output
    assert [(tmp_path / f"rank{rank}").read_text() for rank in range(3)] == ["3 True\n"] * 3


# ---- Benchmarks

SMALL = dict(NUM_LAYERS=2, MODEL_DIM=32, NUM_HEADS=2, NUM_KV_HEADS=1, TRAIN_SEQ_LEN=32, TRAIN_BATCH_TOKENS=128,
             EVAL_STRIDE=8, EVAL_BATCH_SEQS=4, TTT_CHUNK_TOKENS=64, VAL_BATCH_SIZE=128, MICRO_BATCH_TOKENS=64,
             COMPILE=0, DEVICE="cpu", COMPUTE_DTYPE="float32", WARMUP_STEPS=1, OMP_NUM_THREADS=1)


def benchmark(name: str, *arguments: str, **settings) -> str:
    done = subprocess.run([sys.executable, str(REPOSITORY / "benchmarks" / name), *arguments], capture_output=True,
                          text=True, env=environment(SMALL | settings), timeout=200)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_step_benchmark_compares_arms_that_learn_alike(tmp_path):
    """And another version of the script, here one that learns faster."""
    script = (REPOSITORY / "train_gpt.py").read_text()
    (tmp_path / "other.py").write_text(script.replace("matrix_lr = 0.02", "matrix_lr = 0.05"))
    output = benchmark("step.py", "", "seed COMPILE=0", f"{tmp_path}/other.py", "--steps", "2", "--repeats", "2")
    assert len(re.findall(r"tokens/s +[\d,]+ \([\d,]+ to [\d,]+\)", output)) == 3
    assert len(re.findall(r"train_gpt.py against it: [\d.]+ \([\d.]+ to [\d.]+\) times as fast", output)) == 2
    ours, seeds, others = map(float, re.findall(r"mean loss of the last \d+ of \d+ steps: ([\d.]+)", output))
    assert abs(ours - seeds) < 0.02 and others != ours


@pytest.mark.parametrize("arm", ["seed other.py", "nowhere.py", "fast"])
def test_the_step_benchmark_names_an_arm_that_is_none(arm):
    with pytest.raises(AssertionError, match=arm.split()[-1]):
        benchmark("step.py", "", arm)


def test_the_evaluation_benchmark_compares_arms_that_score_alike():
    output = benchmark("evaluate.py", "--repeats", "2")
    assert re.search(r"loop: .* within 0\.000\d+ nats", output)
    assert len(re.findall(r"is [\d.]+ \([\d.]+ to [\d.]+\) times as fast", output)) == 3
    assert re.search(r"compute [\d.]+ \([\d.]+ to [\d.]+\) % of it alike", output)


def test_the_start_up_benchmark_reaches_the_first_step(dataset):
    output = benchmark("startup.py", "--repeats", "1", VOCAB_SIZE=384, **dataset)
    stages = [float(seconds) for seconds in re.findall(r"^  \w.* ([\d.]+) \([\d.]+ to [\d.]+\)$", output, re.MULTILINE)]
    assert len(stages) == 5 and stages == sorted(stages)


def test_importing_is_quick_because_nothing_is_compiled_or_read():
    """torch's compiler, which takes seconds to import, is not needed until something is compiled."""
    check = "import sys, train_gpt; print('torch._inductor' in sys.modules, 'torch._dynamo' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", check], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]


# ---- GPU


@pytest.mark.parametrize("ours, mutated, complaint", [
    ("", "", None),
    ("loss += part.detach()", "loss += part.item()", "training: the host waits"),
    ("self.mask = nn.Buffer(causal_mask(cfg), persistent=False)", "self.mask = causal_mask(cfg)", "device"),
])
def test_on_fake_cuda_tensors_no_devices_mix_and_the_step_waits_for_nothing(tmp_path, ours, mutated, complaint):
    """And it finds a script that does."""
    (tmp_path / "tests").mkdir()
    shutil.copy(REPOSITORY / "tests/fake_cuda.py", tmp_path / "tests")
    script = (REPOSITORY / "train_gpt.py").read_text()
    assert ours in script
    (tmp_path / "train_gpt.py").write_text(script.replace(ours, mutated) if ours else script)
    done = subprocess.run([sys.executable, "tests/fake_cuda.py"], cwd=tmp_path, capture_output=True, text=True)
    if done.stderr.startswith("skipped"):
        pytest.skip(done.stderr)
    assert complaint in done.stderr and done.returncode == 1 if complaint else done.returncode == 0, done.stderr


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
class TestGPU:
    def test_the_step_never_waits_for_the_device(self, dataset):
        config = tiny_config(dataset, device="cuda", compute_dtype="bfloat16")
        dist = train_gpt.Dist("cuda")
        run = train_gpt.build_run(config, dist, train_gpt.Log(None))
        optimizers = train_gpt.build_optimizers(run.model, run.config, dist)
        stream = train_gpt.TokenStream(config, "train")
        for step in range(3):
            batch = list(stream.micro_batches(step, dist))
            torch.cuda.set_sync_debug_mode("error" if step else "default")
            try:
                train_gpt.train_step(run, batch, optimizers, 1.0, 0.9)
            finally:
                torch.cuda.set_sync_debug_mode("default")

    def test_attention_is_chosen_from_what_works_and_agrees(self, dataset, tmp_path):
        config = tiny_config(dataset, device="cuda", compute_dtype="bfloat16", train_seq_len=1024, model_dim=256,
                             micro_batch_tokens=8192)
        log = train_gpt.Log(tmp_path)
        choice = train_gpt.choose_attention(config, train_gpt.Dist("cuda"), log)
        lines = (tmp_path / "train.log").read_text()
        assert choice in BACK_ENDS and "other than products" not in lines
        assert "attention products" not in lines and "attention flash" not in lines  # these two work on any GPU

