"""Each part against an independent reference written here."""
import dataclasses
import math
import struct

import numpy as np
import pytest
import torch
from conftest import TINY, make_run, random_model, tiny_config

import train_gpt
from train_gpt import GPT, Config, Muon, UserError, lr_factor, muon_momentum, newton_schulz, sliding_windows

# ---- Settings


def test_default_model_has_the_seeds_parameter_count():
    with torch.device("meta"):
        assert sum(p.numel() for p in GPT(Config()).parameters()) == 26_666_073


@pytest.mark.parametrize("env, message", [
    ({"SEEED": "1"}, "did you mean SEED"),
    ({"TTT_ENABLE": "1"}, "did you mean TTT_ENABLED"),
    ({"MATRX_LRR": "1"}, "did you mean MATRIX_LR"),
    ({"ITERATIONS": "1e3"}, "ITERATIONS='1e3': must be a whole number"),
    ({"MATRIX_LR": "fast"}, "MATRIX_LR='fast': must be a number"),
    ({"MATRIX_LR": "nan"}, "MATRIX_LR=nan"),
    ({"MAX_WALLCLOCK_SECONDS": "inf"}, "MAX_WALLCLOCK_SECONDS=inf"),
    ({"SWA_ENABLED": "yes"}, "SWA_ENABLED='yes': must be 0 or 1"),
    ({"NUM_LAYERS": "0"}, "NUM_LAYERS=0: must be positive"),
    ({"TTT_LR": "-1"}, "TTT_LR=-1.0: must be from 0 on"),
    ({"EVAL_STRIDE": "100"}, "EVAL_STRIDE=100: must divide TRAIN_SEQ_LEN=2048"),
    ({"TTT_CHUNK_TOKENS": "3000"}, "TTT_CHUNK_TOKENS=3000: must be a multiple of TRAIN_SEQ_LEN=2048"),
    ({"TRAIN_BATCH_TOKENS": "5000"}, "TRAIN_BATCH_TOKENS=5000: must be a multiple"),
    ({"NUM_HEADS": "3"}, "NUM_HEADS=3"),
    ({"TRAIN_SEQ_LEN": "32768"}, "TRAIN_SEQ_LEN=32768: must be at most 16384"),
    ({"EMBED_BITS": "7"}, "EMBED_BITS=7: must be one of 6 8 16"),
    ({"COMPUTE_DTYPE": "fp8"}, "COMPUTE_DTYPE=fp8"),
    ({"RUN_ID": "../x"}, "RUN_ID=../x"),
    ({"RUN_ID": ".."}, "RUN_ID=.."),
    ({"VAL_NLL_PATH": "nowhere/nll.npy"}, "VAL_NLL_PATH=nowhere/nll.npy: must be .npy in a folder"),
    ({"VAL_NLL_PATH": "nll"}, "VAL_NLL_PATH=nll: must be .npy"),
    ({"SEED": str(2**70)}, "SEED="),
    ({"MUON_MOMENTUM_WARMUP_START": "7"}, "MUON_MOMENTUM_WARMUP_START=7.0: must be below 1"),
    ({"MAX_VAL_TOKENS": "7"}, "MAX_VAL_TOKENS=7"),
])
def test_bad_settings_are_named(env, message):
    with pytest.raises(UserError) as caught:
        Config.from_env(env)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_all_bad_settings_are_reported_at_once_and_other_variables_ignored():
    with pytest.raises(UserError) as caught:
        Config.from_env({"SEEED": "1", "ITERATIONS": "x", "NUM_LAYERS": "0"})
    assert all(name in str(caught.value) for name in ("SEEED", "ITERATIONS", "NUM_LAYERS"))
    assert Config.from_env({"HOME": "/", "PATH": "/bin", "RANK": "0", "SEED": "7"}) == Config(seed=7)


def edits(a: str, b: str) -> int:
    """Levenshtein distance by its recursive definition."""
    if not a or not b:
        return len(a) + len(b)
    return min(edits(a[1:], b) + 1, edits(a, b[1:]) + 1, edits(a[1:], b[1:]) + (a[0] != b[0]))


@pytest.mark.parametrize("a", ["SEED", "SED", "SPEEDY", "DEES", "EED", ""])
def test_within_edits(a):
    for b in ("SEED", "SEEDS", "DEED", "X"):
        assert train_gpt.within_edits(a, b, 2) == (edits(a, b) <= 2), (a, b)


# ---- Data


def write_shard(path, tokens, magic=20240520, version=1, count=None):
    header = struct.pack("<256i", magic, version, len(tokens) if count is None else count, *[0] * 253)
    path.write_bytes(header + struct.pack(f"<{len(tokens)}H", *tokens))


@pytest.fixture
def stream(tmp_path):
    """Three shards of 40, 1 and 59 tokens that count 0, 1, 2 ... 99, in that order."""
    for number, (a, b) in enumerate(((0, 40), (40, 41), (41, 100))):
        write_shard(tmp_path / f"fineweb_train_{number:06d}.bin", range(a, b))
    config = Config(data_path=str(tmp_path), train_seq_len=4, train_batch_tokens=24, micro_batch_tokens=4,
                    vocab_size=100, shuffle=False)
    return train_gpt.TokenStream(config, "train")


@pytest.mark.parametrize("start, count", [(0, 100), (35, 10), (40, 1), (95, 30), (99, 1), (250, 3), (7, 350)])
def test_stream_reads_across_shards_and_wraps(stream, start, count):
    assert stream.read(start, count).tolist() == [(start + i) % 100 for i in range(count)]


def batch(stream, step, world_size, micro):
    """The inputs of a step, of all ranks, where every token's target is the next number."""
    stream.config = dataclasses.replace(stream.config, micro_batch_tokens=micro)
    rows = []
    for rank in range(world_size):
        dist = train_gpt.Dist()
        dist.rank, dist.world_size = rank, world_size
        for inputs, targets in stream.micro_batches(step, dist):
            assert inputs.numel() == micro and torch.equal((inputs + 1) % 100, targets)
            rows += inputs.tolist()
    return rows


SHARES = ((1, 4), (1, 24), (2, 4), (2, 12), (3, 8), (6, 4))  # ranks, micro-batch


def test_the_global_batch_does_not_depend_on_ranks_or_micro_batches(stream):
    for step in (0, 3, 4, 11):  # steps 4 and later wrap around the 100 tokens
        expected = [[(step * 24 + 4 * row + i) % 100 for i in range(4)] for row in range(6)]
        assert all(batch(stream, step, *share) == expected for share in SHARES)


def test_shuffled_each_window_comes_once_a_pass_whatever_the_ranks_and_in_another_order_with_another_seed(stream):
    def rows(seed):
        config = dataclasses.replace(stream.config, shuffle=True, seed=seed)
        shuffled = train_gpt.TokenStream(config, "train")
        steps = [batch(shuffled, step, 1, 24) for step in range(25)]
        assert all(batch(shuffled, step, *share) == steps[step] for share in SHARES for step in (0, 4, 11))
        return [row for step in steps for row in step]

    windows = [list(range(first, first + 4)) for first in range(0, 100, 4)]
    uneven = train_gpt.TokenStream(dataclasses.replace(stream.config, shuffle=True, train_seq_len=8), "train")
    assert sorted(uneven.order) == list(range(12))  # the last 4 of 100 tokens fill no window
    first, second = rows(1), rows(2)
    for start in range(0, 150, 25):  # six passes of 25 windows, which end within a step
        assert sorted(first[start : start + 25]) == windows
    assert first[:25] != windows and first[:25] != second[:25] and rows(1) == first


def test_bytes_of_targets_are_those_of_the_decoded_text(dataset, token_bytes):
    tokenizer = train_gpt.load_tokenizer(tiny_config(dataset))
    for text in ("2024 is 3.14", "👍🏽 日本語 é", "\x00\x07 a", "ＡＢＣ　１２", "    in\n\tcode", " broken   space "):
        tokens = np.array([tokenizer.bos_id(), *tokenizer.encode(text)])
        assert token_bytes.count(tokens).sum() == len(tokenizer.decode(tokens.tolist()).encode())
    # By hand: control tokens are 0, a byte token 1, a leading space 1 unless a control token comes before it.
    space = next(i for i in range(tokenizer.vocab_size()) if tokenizer.id_to_piece(i) == "▁a")
    byte = tokenizer.piece_to_id("<0xF0>")
    assert token_bytes.count(np.array([1, space, space, byte, 1, 2])).tolist() == [1, 2, 1, 0, 0]


# ---- Model


def naive_forward(config: Config, state: dict, tokens: list[int]) -> torch.Tensor:
    """The model of system.md for one sequence, in loops over positions, heads and blocks, in fp64: logits [T, V]."""
    W = {name: tensor.double() for name, tensor in state.items()}
    T, D, H, K = len(tokens), config.model_dim, config.num_heads, config.num_kv_heads
    E = D // H

    def norm(x):
        return x / (x.square().mean(-1, keepdim=True) + torch.finfo(torch.float32).eps).sqrt()

    def rotated(vector, position):
        out = torch.zeros_like(vector)
        for i in range(E // 2):
            angle = torch.tensor(position * config.rope_base ** (-i / (E // 2)), dtype=torch.float64)
            a, b = vector[i], vector[i + E // 2]
            out[i], out[i + E // 2] = a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()
        return out

    def attention(x, p, exclusive):
        q, k, v = (torch.einsum("td,ed->te", x, W[f"{p}.{n}.weight"]) for n in ("c_q", "c_k", "c_v"))
        out = torch.zeros(T, D, dtype=torch.float64)
        for h in range(H):
            g = h // (H // K)
            gain = W[f"{p}.q_gain"].flatten()[h]
            qs = [gain * rotated(norm(q[t, h * E : (h + 1) * E]), t) for t in range(T)]
            ks = [rotated(norm(k[t, g * E : (g + 1) * E]), t) for t in range(T)]
            for t in range(T):
                weights = torch.stack([qs[t] @ ks[s] / math.sqrt(E) for s in range(t + 1)]).softmax(0)
                y = sum(weights[s] * v[s, g * E : (g + 1) * E] for s in range(t + 1))
                if exclusive:  # without its part along the position's own value
                    own = v[t, g * E : (g + 1) * E]
                    y = y - (y @ own) / (own @ own) * own
                out[t, h * E : (h + 1) * E] = y
        return torch.einsum("td,ed->te", out, W[f"{p}.proj.weight"])

    rows = []
    for i, token in enumerate(tokens):
        last = config.bigram_vocab_size - 1
        bucket = last if i == 0 else ((36313 * token) ^ (27191 * tokens[i - 1])) % last
        bigram = W["bigram.scale"] * (W["bigram.proj.weight"] @ W["bigram.embed.weight"][bucket])
        rows.append(norm(W["tok_emb.weight"][token] + bigram))
    gate = torch.sigmoid(W["smear.gate"])
    x = torch.stack([(1 - gate) * row + gate * (rows[i - 1] if i else 0 * row) for i, row in enumerate(rows)])
    x0, stack = x, []
    for index in range(config.num_layers):
        p, pushes = f"blocks.{index}", index < config.num_layers // 2
        if not pushes and stack:
            x = x + W["skip_weights"][index - config.num_layers // 2] * stack.pop()
        x = W[f"{p}.resid_mix"][0] * x + W[f"{p}.resid_mix"][1] * x0
        x = x + W[f"{p}.attn_scale"] * attention(
            norm(x), f"{p}.attn", index >= config.num_layers - config.xsa_last_n)
        hidden = torch.einsum("td,hd->th", norm(x), W[f"{p}.mlp.fc.weight"])
        hidden = torch.where(hidden > 0, hidden, config.relu_slope * hidden) ** 2
        x = x + W[f"{p}.mlp_scale"] * torch.einsum("th,dh->td", hidden, W[f"{p}.mlp.proj.weight"])
        if pushes:
            stack.append(x)
    logits = torch.einsum("td,vd->tv", norm(x), W["tok_emb.weight"])
    return config.logit_softcap * torch.tanh(logits / config.logit_softcap)


PLAIN = dict(relu_slope=0.0, xsa_last_n=0)


@pytest.mark.parametrize("layers, heads, kv_heads", [(3, 4, 2), (4, 2, 1), (1, 2, 2)])
@pytest.mark.parametrize("changes", [{}, PLAIN, PLAIN | dict(relu_slope=0.5), PLAIN | dict(xsa_last_n=2)],
                         ids=str)
def test_forward_equals_plain_loops(dataset, layers, heads, kv_heads, changes):
    config = tiny_config(dataset, num_layers=layers, num_heads=heads, num_kv_heads=kv_heads, logit_softcap=5.0,
                         **changes)
    model = random_model(config)
    tokens = [1, 7, 7, 300, 383, 0, 12, 7, 9]
    with torch.no_grad():
        logits = model(torch.tensor([tokens, tokens[::-1]]))
    assert logits.shape == (2, len(tokens), config.vocab_size) and logits.dtype == torch.float32
    expected = naive_forward(config, model.state_dict(), tokens)
    torch.testing.assert_close(logits[0].double(), expected, atol=2e-4, rtol=1e-4)


def test_bigram_hash_by_hand():
    bigram = train_gpt.BigramHash(Config())
    # (36313 * 3) XOR (27191 * 5) = 108939 ^ 135955 = 244376, and 244376 mod 2047 = 783.
    assert (36313 * 3, 27191 * 5, 108939 ^ 135955, 244376 % 2047) == (108939, 135955, 244376, 783)
    tokens = torch.tensor([[5, 3, 1023, 1023]])
    big = ((36313 * 1023) ^ (27191 * 1023)) % 2047
    rows = []
    bigram.embed.register_forward_hook(lambda _, inputs, output: rows.append(inputs[0].tolist()))
    bigram(tokens, torch.float32)
    assert rows == [[[2047, 783, ((36313 * 1023) ^ (27191 * 3)) % 2047, big]]]


def test_smear_gate_by_hand():
    smear = train_gpt.SmearGate(2)
    smear.gate.data = torch.tensor([0.0, math.log(3)])  # gates 1/2 and 3/4
    out = smear(torch.tensor([[[4.0, 4.0], [8.0, 8.0]]]))
    torch.testing.assert_close(out, torch.tensor([[[2.0, 1.0], [6.0, 5.0]]]))


def test_initialisation(dataset):
    model = GPT(tiny_config(dataset))
    for name, parameter in model.named_parameters():
        if name.endswith(("attn.proj.weight", "mlp.proj.weight")) or name == "bigram.embed.weight":
            assert not parameter.any(), name
        elif name.endswith("weight") and name != "tok_emb.weight":
            gain = 1 / math.sqrt(2 * 3) if name == "bigram.proj.weight" else 1.0
            torch.testing.assert_close(torch.linalg.svdvals(parameter), torch.full((min(parameter.shape),), gain))
    assert 0.004 < model.tok_emb.weight.std() < 0.006
    assert all(p.dtype == torch.float32 for p in model.parameters())


# ---- Optimiser


@pytest.mark.parametrize("shape", [(1, 64, 64), (1, 48, 96), (2, 96, 48), (5, 64, 32)])
def test_newton_schulz_singular_values(shape):
    torch.manual_seed(0)
    matrices = torch.randn(*shape) + 8 * torch.eye(*shape[-2:])  # no singular value near zero, those take more steps
    result = newton_schulz(matrices, 5)
    values = torch.linalg.svdvals(result)
    assert result.shape == matrices.shape and 0.6 < values.min() and values.max() < 1.25
    # The directions stay: U^T result V is diagonal.
    U, _, Vh = torch.linalg.svd(matrices, full_matrices=False)
    inner = U.mT @ result @ Vh.mT
    torch.testing.assert_close(inner, torch.diag_embed(inner.diagonal(dim1=-2, dim2=-1)), atol=2e-3, rtol=0)


@pytest.mark.parametrize("row_norm", [False, True])
def test_muon_steps_equal_the_formula(row_norm):
    """Two steps on matrices of mixed shapes against the update written out one matrix at a time."""
    torch.manual_seed(0)
    shapes = [(8, 4), (4, 8), (8, 4), (6, 6)]
    params = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
    expected, buffers = [p.detach().clone() for p in params], [torch.zeros(shape) for shape in shapes]
    muon = Muon(params, lr=0.1, momentum=0.9, weight_decay=0.5, **dict(row_norm=True) if row_norm else {})
    for _ in range(2):
        for i, p in enumerate(params):
            p.grad = torch.randn_like(p)
            buffers[i] = 0.9 * buffers[i] + p.grad
            update = p.grad + 0.9 * buffers[i]
            if row_norm:
                update = update / update.square().sum(1, keepdim=True).sqrt()
            update = newton_schulz(update[None], 5)[0] * max(1, p.size(0) / p.size(1)) ** 0.5
            expected[i] = expected[i] * (1 - 0.1 * 0.5) - 0.1 * update
        muon.step()
    for p, value in zip(params, expected, strict=True):
        torch.testing.assert_close(p.detach(), value, atol=1e-5, rtol=1e-5)


def test_every_parameter_has_one_group_and_moves_within_10_steps(dataset):
    config = tiny_config(dataset, weight_decay=0.0)  # decay alone would move them
    torch.manual_seed(0)
    run = make_run(config, GPT(config))
    optimizers = train_gpt.build_optimizers(run.model, config, run.dist)
    grouped = [p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]
    assert sorted(map(id, grouped)) == sorted(map(id, run.model.parameters()))
    assert [g["base_lr"] for o in optimizers for g in o.param_groups] == [0.02, 0.03, 0.02]
    before = {name: p.detach().clone() for name, p in run.model.named_parameters()}
    stream = train_gpt.TokenStream(config, "train")
    for step in range(10):
        train_gpt.train_step(run, list(stream.micro_batches(step, run.dist)), optimizers, 1.0, 0.9)
    assert [name for name, p in run.model.named_parameters() if torch.equal(p, before[name])] == []


def test_gradient_clipping(dataset):
    run = make_run(tiny_config(dataset))
    for norm, limit, expected in ((10.0, 0.3, 0.3), (0.1, 0.3, 0.1), (10.0, 0.0, 10.0)):
        run.grads.flat.normal_()
        run.grads.flat *= norm / run.grads.flat.norm()
        run.grads.reduce_and_clip(run.dist, limit)
        total = sum(p.grad.square().sum() for p in run.model.parameters()) ** 0.5
        assert total.item() == pytest.approx(expected, rel=1e-4)


# ---- Schedule


@pytest.mark.parametrize("step, elapsed, changes, expected", [
    # Seconds bind: 5000 steps of 0.12 s fill 600 s, the last 3000 (58 % at most: 348 s) ramp down.
    (0, 0.0, {}, 1.0),
    (2000, 240.0, {}, 1.0),
    (2500, 300.0, {}, 300 / 348),
    (4000, 480.0, {}, 120 / 348),
    (5000, 600.0, {}, 0.0),
    (5001, 601.0, {}, 0.0),
    # Faster steps: 3000 of 0.08 s are 240 s, less than 58 %.
    (4500, 360.0, {}, 1.0),
    (6000, 480.0, {}, 0.5),
    # One GPU: few steps, so the share of the budget binds.
    (300, 300.0, {}, 300 / 348),
    # Steps bind.
    (0, 0.0, dict(iterations=100, max_wallclock_seconds=0.0), 1.0),
    (42, 1e9, dict(iterations=100, max_wallclock_seconds=0.0), 1.0),
    (71, 1e9, dict(iterations=100, max_wallclock_seconds=0.0), 0.5),
    (99, 1e9, dict(iterations=100, max_wallclock_seconds=0.0), 1 / 58),
    (19_000, 1.0, dict(warmdown_iters=2000), 0.5),
    # Both set: the smaller factor holds.
    (71, 100.0, dict(iterations=100), 0.5),
    (50, 580.0, dict(iterations=100), 20 / 348),
    # No warm-down at all.
    (99, 599.0, dict(iterations=100, warmdown_iters=0), 1.0),
])
def test_learning_rate_table(step, elapsed, changes, expected):
    assert lr_factor(step, elapsed, Config(**changes)) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("step, elapsed, changes, expected", [
    (0, 0.0, {}, 0.92),
    (750, 60.0, {}, 0.945),
    (1500, 100.0, {}, 0.97),
    (9999, 599.0, {}, 0.97),
    (100, 87.0, {}, 0.945),  # 29 % of 600 s is 174 s
    (29, 0.0, dict(iterations=200, max_wallclock_seconds=0.0), 0.945),  # 29 % of 200 steps is 58
    (0, 0.0, dict(muon_momentum_warmup_steps=0), 0.92),
    (1, 0.1, dict(muon_momentum_warmup_steps=0), 0.97),
])
def test_momentum_table(step, elapsed, changes, expected):
    assert muon_momentum(step, elapsed, Config(**changes)) == pytest.approx(expected, abs=1e-9)


def test_average_is_the_fp32_mean(dataset):
    """Thirty snapshots whose differences bf16 could not even represent."""
    model = GPT(tiny_config(dataset))
    average, total = train_gpt.WeightAverage(model), 0
    for _ in range(30):
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn_like(p) * 1e-4)
        average.add()
        total = total + model.tok_emb.weight.detach().double()
    average.apply()
    torch.testing.assert_close(model.tok_emb.weight.detach().double(), total / 30, atol=1e-8, rtol=1e-6)


# ---- Windows


@pytest.mark.parametrize("length, stride", [(8, 2), (8, 8), (16, 4), (32, 1), (256, 96), (10, 3)])
def test_windows_score_each_target_once(length, stride):
    for num_targets in [*range(1, 3 * length + 2), 1000, 1001, 1023]:
        windows = sliding_windows(num_targets, length, stride)
        scored = np.zeros(num_targets, int)
        for start, first, end in windows:
            scored[first:end] += 1
            assert start % stride == 0 and start <= first < end <= min(start + length, num_targets)
            assert start == 0 or first - start == length - stride  # full context
        assert (scored == 1).all(), num_targets
        # The definition: starts are the multiples of S that are 0 or satisfy start + L - S < N.
        expected = [s for s in range(0, num_targets, stride) if s == 0 or s + length - stride < num_targets]
        assert windows[:, 0].tolist() == expected


def test_windows_of_the_challenge_and_of_nothing():
    windows = sliding_windows(62_021_632, 2048, 64)
    assert len(windows) == 969_057 and windows.dtype == np.int64
    assert windows[0].tolist() == [0, 0, 2048] and windows[-1, 2] == 62_021_632
    assert sliding_windows(0, 2048, 64).shape == (0, 3)


def test_chunks_hold_every_window_once_by_first_target():
    geometries = ((736, 32, 8, 128), (9000, 256, 96, 960), (128, 32, 8, 128), (40, 32, 8, 64))
    for num_targets, length, stride, chunk in geometries:
        chunks = train_gpt.plan_chunks(num_targets, length, stride, chunk)
        np.testing.assert_array_equal(np.concatenate(chunks), sliding_windows(num_targets, length, stride))
        for index, windows in enumerate(chunks):
            assert (windows[:, 1] // chunk == index).all()


def test_tiny_has_what_the_tests_rely_on():
    assert TINY["MAX_VAL_TOKENS"] // TINY["TTT_CHUNK_TOKENS"] >= 4
