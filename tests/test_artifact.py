"""The artifact: exact round trip, bounds of the quantiser, and damage that is noticed."""
import dataclasses
import hashlib
import json
import math
import os
import random
import time
import tracemalloc

import numpy as np
import pytest
import torch
import zstandard
from conftest import REPOSITORY, make_run, random_model, run_process, tiny_config
from hypothesis import given, settings
from hypothesis import strategies as st

import train_gpt
from train_gpt import UserError, decode_artifact, encode_artifact, quantize, unpack_artifact

MUTATIONS = int(os.environ.get("MUTATIONS", 400))  # of artifacts; MUTATIONS=10000 for README.md's figure


@pytest.fixture(scope="module")
def config(dataset):
    return tiny_config(dataset)


@pytest.fixture(scope="module")
def artifact(config):
    return encode_artifact(random_model(config).state_dict(), config)


# ---- The quantiser


def span(matrix, bits):
    """Steps that just reach the largest weight of each row."""
    return matrix.abs().amax(dim=1) / (2 ** (bits - 1) - 1)


def choices(matrix, bits):
    return torch.linspace(0.85, 1.15, train_gpt.STEP_CHOICES)[:, None] * span(matrix, bits)


def rounding_error(matrix, values, steps):
    return values.float() * steps.float()[:, None] - matrix


@pytest.mark.parametrize("bits", [5, 6, 8])
def test_quantisation_bounds(bits):
    torch.manual_seed(0)
    matrix = torch.randn(50, 40) * torch.logspace(-2, 3, 50)[:, None]
    matrix[7] = 0
    values, steps = quantize(matrix, choices(matrix, bits), bits)
    lowest, highest = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    assert values.dtype == torch.int8 and values.min() >= lowest and values.max() <= highest
    assert steps.dtype == torch.float16 and steps.shape == (50,)
    error, step = rounding_error(matrix, values, steps), steps.float()[:, None]
    inside = (matrix >= step * (lowest - 0.5)) & (matrix <= step * (highest + 0.5))
    assert (error.abs() <= step * 0.5001)[inside].all() and inside.float().mean() > 0.9
    assert not values[7].any() and steps[7] == 0
    alone = [rounding_error(matrix, *quantize(matrix, choice[None], bits)).square().sum(1)
             for choice in choices(matrix, bits)]
    assert torch.equal(error.square().sum(1), torch.stack(alone).amin(0))  # the best of its steps, row by row
    assert len(set((step[:, 0] / span(matrix, bits)).nan_to_num().mul(50).round().tolist())) > 3, "rows choose alike"


@pytest.mark.parametrize("scale", [1e-9, 1e-7, 1e5, 1e9, 1e38])
def test_weights_of_any_size_give_a_finite_model(config, scale):
    state = {name: tensor if tensor.ndim < 2 or not name.endswith(".weight") else scale * tensor
             for name, tensor in random_model(config).state_dict().items()}
    stored = decode_artifact(encode_artifact(state, config))[1]
    assert all(torch.isfinite(tensor).all() for tensor in stored.values())
    if 1e-6 < scale < 1e6:
        name = "blocks.0.attn.c_q.weight"
        assert (stored[name] - state[name]).norm() < 0.05 * state[name].norm()


def correlated_inputs(dim):
    """[4096, dim], mixed as activations are."""
    torch.manual_seed(0)
    return torch.randn(4096, dim) @ (torch.randn(dim, dim) * torch.logspace(0, -2, dim)).T


@pytest.mark.parametrize("dim", [64, 200])  # within a block of 128 columns, and across two
def test_gptq_makes_up_for_rounding_in_what_the_matrix_does_to_its_inputs(dim):
    inputs, matrix = correlated_inputs(dim), torch.randn(48, dim)
    moment, steps = inputs.T @ inputs, span(matrix, 5)[None]

    def loss(values, steps):
        return (rounding_error(matrix, values, steps) @ inputs.T).square().sum(1)

    nearest, compensated = quantize(matrix, steps, 5), quantize(matrix, steps, 5, moment)
    assert compensated[0].min() >= -16 and compensated[0].max() <= 15
    assert loss(*compensated).sum() < 0.5 * loss(*nearest).sum()
    searched = quantize(matrix, choices(matrix, 5), 5, moment)
    assert loss(*searched).sum() < 0.9 * loss(*compensated).sum()
    uncorrelated = quantize(matrix, steps, 5, torch.eye(dim))  # nothing to make up with
    assert torch.equal(uncorrelated[0], nearest[0]) and torch.equal(uncorrelated[1], nearest[1])


def test_gptq_is_the_published_recursion():
    """Against the plain form: each column rounded, the rest moved by the inverse of what is left of the moment."""
    inputs, matrix, step = correlated_inputs(12).double(), torch.randn(5, 12), 0.2
    moment = inputs.T @ inputs
    left, values = matrix.double(), torch.zeros(5, 12)
    remaining = moment.diagonal().argsort(descending=True).tolist()
    damped = moment + 0.01 * moment.diagonal().mean() * torch.eye(12)
    while remaining:
        inverse, column = torch.linalg.inv(damped[remaining][:, remaining]), remaining[0]
        values[:, column] = (left[:, column] / step).round().clamp(-32, 31)
        error = (left[:, column] - values[:, column] * step) / inverse[0, 0]
        left[:, remaining] -= error[:, None] * inverse[0]
        remaining = remaining[1:]
    steps = torch.full((1, 5), step)
    ours = quantize(matrix, steps, 6, moment.float())[0]
    assert (ours != values).float().mean() < 0.05  # fp32 and an fp16 step may decide a tie otherwise


@pytest.mark.parametrize("moment", [torch.zeros(64, 64), torch.full((64, 64), torch.nan), -torch.eye(64)])
def test_moments_that_are_no_use_never_lose_a_run(moment):
    matrix = torch.randn(48, 64)
    plain = quantize(matrix, choices(matrix, 6), 6)
    for one, other in zip(quantize(matrix, choices(matrix, 6), 6, moment), plain):
        assert torch.equal(one, other)


def test_moments_are_those_of_the_gradients(config, dataset):
    run = make_run(dataclasses.replace(config, gptq_batches=2, micro_batch_tokens=64))
    stream = train_gpt.TokenStream(run.config, "train")
    moments = train_gpt.error_moments(run, stream, first_step=3)
    assert set(moments) == {name for name, _, bits in train_gpt.tensor_table(config) if bits < 16}
    expected = {name: [0, 0] for name in moments}
    for step in (3, 4):
        for inputs, targets in stream.micro_batches(step, run.dist):
            loss = train_gpt.token_nll(run.model, inputs, targets).sum()
            gradients = torch.autograd.grad(loss, [run.model.get_parameter(name) for name in moments])
            for name, gradient in zip(moments, gradients):
                expected[name][0] += gradient.T @ gradient
                expected[name][1] += gradient.square().sum(1)
    for name in moments:
        for ours, plain in zip(moments[name], expected[name]):
            assert (ours - plain).norm() < 1e-4 * plain.norm(), name


def test_moments_take_no_more_time_than_there_is(config, dataset):
    run = make_run(config)
    stream = train_gpt.TokenStream(run.config, "train")
    for seconds in (-1.0, 0.0):
        assert train_gpt.error_moments(run, stream, first_step=0, seconds=seconds) == {}
    clock = iter(range(100))
    run.dist.now = lambda: next(clock)  # each batch takes a second
    used = []
    stream.micro_batches = lambda step, dist: used.append(step) or iter(())
    assert train_gpt.error_moments(run, stream, first_step=7, seconds=5.5) and used == [7, 8, 9, 10, 11]


def test_moments_that_are_not_finite_are_not_used(config):
    run = make_run(config)
    run.nll = lambda *batch: train_gpt.token_nll(*batch) * 1e30  # squares overflow
    assert train_gpt.error_moments(run, train_gpt.TokenStream(config, "train"), first_step=0) == {}


def test_matrices_without_gradients_are_stored_all_the_same(config):
    state = random_model(config).state_dict()
    moments = {name: (torch.zeros(shape[1], shape[1]), torch.zeros(shape[0]))
               for name, shape, bits in train_gpt.tensor_table(config) if bits < 16}
    assert encode_artifact(state, config, moments=moments) == encode_artifact(state, config)


def test_moments_reduce_what_storing_costs(config):
    """On inputs the models were not calibrated with, all matrices stored."""
    config = dataclasses.replace(config, gptq_batches=8)
    stream, divergence = train_gpt.TokenStream(config, "train"), dict(plain=0.0, gptq=0.0)
    for seed in range(4):
        run = make_run(config, random_model(config, seed))
        state = {name: tensor.clone() for name, tensor in run.model.state_dict().items()}
        moments = train_gpt.error_moments(run, stream, first_step=0)
        (inputs, _), *_ = stream.micro_batches(50, run.dist)
        with torch.no_grad():
            exact = run.model(inputs).log_softmax(-1)
            for label, given in (("plain", {}), ("gptq", moments)):
                run.model.load_state_dict(decode_artifact(encode_artifact(state, config, moments=given))[1])
                divergence[label] += (exact.exp() * (exact - run.model(inputs).log_softmax(-1))).sum(-1).mean().item()
    assert divergence["gptq"] < 0.95 * divergence["plain"], divergence


# ---- The file


@pytest.mark.parametrize("embed_bits", [6, 8, 16])
def test_round_trip_is_exactly_the_quantised_weights(config, embed_bits):
    config = dataclasses.replace(config, embed_bits=embed_bits)
    state = random_model(config).state_dict()
    state["bigram.embed.weight"][3:9] = 0
    stored_config, stored = decode_artifact(encode_artifact(state, config))
    assert {name: getattr(stored_config, name) for name in train_gpt.MODEL_SETTINGS} == {
        name: getattr(config, name) for name in train_gpt.MODEL_SETTINGS}
    assert list(stored) == [name for name, _ in train_gpt.GPT(config).named_parameters()]
    for name, tensor in state.items():
        bits = 5 if ".mlp." in name else embed_bits if name in ("tok_emb.weight", "bigram.embed.weight") else 6
        if not name.endswith(".weight") or bits == 16:
            expected = tensor.half().float()
        else:
            values, steps = quantize(tensor, choices(tensor, bits), bits)
            expected = values.float() * steps.float()[:, None]
        assert stored[name].dtype == torch.float32 and torch.equal(stored[name], expected), name
    train_gpt.GPT(stored_config).load_state_dict(stored)


def test_packing_and_unpacking_are_inverse(artifact):
    assert train_gpt.pack_artifact(*unpack_artifact(artifact)) == artifact


def test_same_weights_same_bytes(config, artifact):
    assert encode_artifact(random_model(config).state_dict(), config) == artifact


def test_every_flipped_bit_and_every_cut_is_noticed(artifact):
    positions = [*range(60), *range(60, len(artifact), len(artifact) // 150)]
    for position in positions:
        damaged = bytearray(artifact)
        damaged[position] ^= 1 << (position % 8)
        with pytest.raises(UserError):
            decode_artifact(bytes(damaged))
    for length in (0, 8, 9, 10, 40, 41, 42, 45, 46, len(artifact) // 2, len(artifact) - 1):
        with pytest.raises(UserError):
            decode_artifact(artifact[:length])
    with pytest.raises(UserError, match="checksum"):
        decode_artifact(artifact + b"x")


def unchanged(body):
    return body


HEAD = len(train_gpt.ARTIFACT_MAGIC) + 32  # magic and checksum


def checked(payload, magic=train_gpt.ARTIFACT_MAGIC):
    """An artifact of this payload, with a checksum that fits it."""
    return magic + hashlib.sha256(payload).digest() + payload


def parts(artifact):
    """Body and words of an artifact."""
    end = HEAD + 4 + int.from_bytes(artifact[HEAD : HEAD + 4], "little")
    return zstandard.decompress(artifact[HEAD + 4 : end]), artifact[end:]


def rebuilt(artifact, change=unchanged, change_words=unchanged):
    """The artifact with another body or other words, and a checksum that fits them."""
    body, words = parts(artifact)
    frame = zstandard.compress(change(body))
    return checked(len(frame).to_bytes(4, "little") + frame + change_words(words))


@pytest.mark.parametrize("case, message", [
    (dict(change=lambda body: body[:-1]), "inconsistent"),
    (dict(change=lambda body: body[:-4]), "inconsistent"),
    (dict(change=lambda body: body + bytes(4)), "inconsistent"),
    (dict(change=lambda body: body[:-4] + b"\xff\xff\xff\xff"), "inconsistent"),
    (dict(change_words=lambda words: words[:-2]), "inconsistent"),
    (dict(change_words=lambda words: words[:-1]), "inconsistent"),
    (dict(change_words=lambda words: words + b"\0\0"), "do not come out even"),
    (dict(change_words=lambda words: b""), "inconsistent"),
    (dict(change_words=lambda words: bytes([words[0] ^ 1]) + words[1:]), "inconsistent"),
    (dict(change=lambda body: body.replace(b'"num_layers": 3', b'"num_layers": 4')), "other tensors"),
    (dict(change=lambda body: body.replace(b'"num_layers": 3', b'"num_layers": 0')), "NUM_LAYERS=0"),
    (dict(change=lambda body: body.replace(b'"num_layers": 3', b'"num_layers": x')), "inconsistent"),
    (dict(change=lambda body: body.replace(b'"config"', b'"confog"')), "inconsistent"),
    (dict(change=lambda body: body.replace(b'"tok_emb.weight"', b'"tok_emb.weighs"')), "other tensors"),
    (dict(change=lambda body: b"\xff\xff\xff\x7f" + body[4:]), "inconsistent"),
])
def test_a_consistent_checksum_does_not_hide_an_inconsistent_file(artifact, case, message):
    assert decode_artifact(rebuilt(artifact))[0].num_layers == 3  # the tool itself makes valid files
    assert parts(rebuilt(artifact, **case)) != parts(artifact), "the case must change what it means to change"
    with pytest.raises(UserError, match=message) as caught:
        decode_artifact(rebuilt(artifact, **case))
    assert "\n" not in str(caught.value)


def test_a_length_whose_mask_would_take_all_memory_is_refused(artifact):
    with pytest.raises(UserError, match="TRAIN_SEQ_LEN=1048576"):
        decode_artifact(with_header(artifact, header_of(artifact, train_seq_len=2**20)))


def test_other_versions_and_frames_that_lie_about_their_size_are_refused(artifact):
    with pytest.raises(UserError, match="begins with"):
        decode_artifact(checked(artifact[HEAD:], magic=b"PGOLFGPT\x01"))
    writer = zstandard.ZstdCompressor(write_content_size=False)
    for frame in (zstandard.compress(bytes(1 << 26)), writer.compress(b"x" * 1000), b"no frame"):
        with pytest.raises(UserError, match="a body of|content size"):
            decode_artifact(checked(len(frame).to_bytes(4, "little") + frame))


# ---- The entropy coder


def draw(rng, kind, length, levels, skew):
    """Symbols of one class, 256 * class + byte, whose probabilities fall off by the factor skew."""
    weights = np.maximum(skew ** np.arange(levels), 1e-12)
    return (rng.choice(levels, length, p=weights / weights.sum()) + 256 * kind).astype(np.uint16)


def entropy_bits(symbols):
    counts = np.unique(symbols, return_counts=True)[1]
    return float(-(counts * np.log2(counts / len(symbols))).sum())


def coded(symbols):
    """What decoding what was encoded gives, and the words and lanes that took."""
    frequencies = train_gpt.symbol_frequencies(symbols)
    assert (frequencies.sum(1) == 2**14).all()
    assert (frequencies.ravel()[symbols] > 0).all()
    states, words = train_gpt.entropy_encode(symbols, frequencies)
    decoded = train_gpt.entropy_decode((symbols >> 8).astype(np.uint8), frequencies, states, words)
    assert decoded.dtype == np.uint8
    return decoded, len(words), len(states)


PARTS = st.tuples(st.integers(0, 63), st.integers(0, 9000), st.sampled_from([1, 2, 3, 32, 64, 255, 256]),
                  st.floats(1e-6, 1))  # class, length, levels, skew: smaller is more extreme


@settings(deadline=None, max_examples=150, derandomize=True)
@given(st.lists(PARTS, min_size=1, max_size=6), st.integers(0, 2**32), st.booleans())
def test_coder_gives_back_what_it_got_in_hardly_more_than_the_entropy(parts, seed, shuffled):
    rng = np.random.default_rng(seed)
    symbols = np.concatenate([draw(rng, *part) for part in parts])
    if shuffled:
        rng.shuffle(symbols)
    decoded, words, lanes = coded(symbols)
    assert np.array_equal(decoded, symbols & 255)
    bits = sum(entropy_bits(symbols[symbols >> 8 == kind]) for kind in np.unique(symbols >> 8))
    assert 16 * words <= 1.001 * bits + 0.01 * len(symbols) + 64 * lanes


@pytest.mark.parametrize("symbols, certain", [
    ([], True), ([0], True), ([255], True), ([63 * 256 + 255], True), ([7] * 5000, True), ([7, 256 + 9] * 4000, True),
    ([*range(256)] * 40, False), ([0] * 100_000 + [1], False), ([*range(1 << 14)], False)])
def test_coder_at_the_edges(symbols, certain):
    symbols = np.array(symbols, np.uint16)
    decoded, words, _ = coded(symbols)
    assert np.array_equal(decoded, symbols & 255)
    assert words == 0 if certain else words <= len(symbols) / 2  # what is certain costs nothing


def test_decoder_refuses_what_the_encoder_did_not_make():
    symbols = draw(np.random.default_rng(0), 1, 5000, 32, 0.8)
    frequencies, kinds = train_gpt.symbol_frequencies(symbols), np.ones(5000, np.uint8)
    states, words = train_gpt.entropy_encode(symbols, frequencies)
    wrong = frequencies.copy()
    wrong[1, 0] += 1
    for bad in ((kinds, wrong, states, words), (kinds + 1, frequencies, states, words),
                (kinds + 63, frequencies, states, words),
                (kinds, frequencies, states, words[:-1]), (kinds, frequencies, states, np.append(words, words[:1])),
                (kinds, frequencies, states[:-1], words), (kinds, frequencies, states[:0], words),
                (kinds[:-1], frequencies, states, words), (kinds, frequencies, states ^ 1, words)):
        with pytest.raises(ValueError):
            train_gpt.entropy_decode(*bad)


def floor_bytes(artifact):
    """Order-0 entropy of the values of each matrix, and the raw bytes of steps and small tensors."""
    _, stored, values = unpack_artifact(artifact)
    return sum(entropy_bits(value.numpy().ravel()) for value in values.values()) / 8 + sum(
        2 * tensor.numel() for tensor in stored.values())


def test_artifact_is_as_small_as_the_entropy_of_its_values(config):
    config = dataclasses.replace(config, model_dim=128)
    artifact = encode_artifact(random_model(config).state_dict(), config)
    assert len(artifact) <= 1.01 * floor_bytes(artifact)


def test_rows_of_different_sizes_take_less_than_the_entropy_of_their_matrix(config):
    """Rows whose steps are coarse beside their weights, and rows of zeros, do not cost what the others do."""
    config = dataclasses.replace(config, bigram_vocab_size=20_000, bigram_dim=32)
    state = random_model(config).state_dict()
    state["bigram.embed.weight"][1000:] = 0
    state["bigram.embed.weight"][:500, 1:] *= 0.1  # one large weight each, so most values are small
    artifact = encode_artifact(state, config)
    assert len(artifact) < 0.7 * floor_bytes(artifact)


# ---- The byte budget


@pytest.mark.parametrize("share", [1.5, 1.01, 0.9, 0.6, 0.3])
@pytest.mark.parametrize("weights", ["random", "outliers", "heavy tails", "constant", "one bit", "with moments",
                                     "one bit, with moments"])
def test_the_budget_is_kept_and_used(config, monkeypatch, share, weights):
    monkeypatch.setattr(train_gpt, "FIT_SLACK", 300)
    run = make_run(config)
    state = {name: tensor.clone() for name, tensor in run.model.state_dict().items()}
    for tensor in state.values():
        if weights == "outliers":
            tensor.view(-1)[::97] *= 20
        elif weights == "heavy tails":
            tensor.pow_(5)
        elif weights == "constant":
            tensor.fill_(0.01).view(-1)[::5] = -0.3
        elif weights.startswith("one bit"):
            tensor.sign_()
    moments = {}
    if weights.endswith("with moments"):
        moments = train_gpt.error_moments(run, train_gpt.TokenStream(config, "train"), first_step=0)
    free = encode_artifact(state, config, moments=moments)
    limit = int(share * len(free))
    fitted = encode_artifact(state, config, moments=moments, limit=limit)
    if share > 1:
        assert fitted == free, "bytes are left where finer steps would not help"
    else:
        assert len(fitted) < limit
        if weights not in ("constant", "one bit", "one bit, with moments"):  # whole matrices go cheap or dear at once
            assert len(fitted) >= limit - 300
    stored = decode_artifact(fitted)[1]
    assert all(torch.isfinite(tensor).all() for tensor in stored.values())


@pytest.mark.parametrize("scale", [1, 1e6])
def test_the_limit_itself_is_too_long(config, monkeypatch, scale):
    monkeypatch.setattr(train_gpt, "FIT_SLACK", 300)
    state = {name: scale * tensor if name.endswith(".weight") else tensor
             for name, tensor in random_model(config).state_dict().items()}
    free = encode_artifact(state, config)
    assert encode_artifact(state, config, limit=len(free) + 1) == free
    assert len(encode_artifact(state, config, limit=len(free))) < len(free)
    assert len(encode_artifact(state, config, limit=len(free) // 2)) < len(free) // 2


def test_what_cannot_fit_ends_with_the_smallest_file(config):
    state = random_model(config).state_dict()
    smallest = encode_artifact(state, config, limit=100)
    assert 100 < len(smallest) < 0.3 * len(encode_artifact(state, config))
    assert not decode_artifact(smallest)[1]["tok_emb.weight"].any()


def test_models_of_many_layers_can_be_read_again(config):
    config = dataclasses.replace(config, num_layers=300, model_dim=8)
    assert decode_artifact(encode_artifact(random_model(config).state_dict(), config))[0].num_layers == 300


RANKS = """
import os
from conftest import make_run, tiny_config
import train_gpt
settings = {name: os.environ[f"TEST_{name}"] for name in ("DATA_PATH", "TOKENIZER_PATH")}
config = tiny_config(settings, micro_batch_tokens=64)
run = make_run(config)
state = run.model.state_dict()
generator = train_gpt.torch.Generator().manual_seed(0)
moments = {}
for name, shape, bits in train_gpt.tensor_table(config):
    if bits < 16:
        inputs = train_gpt.torch.randn(200, shape[1], generator=generator)
        moments[name] = inputs.T @ inputs, train_gpt.torch.rand(shape[0], generator=generator)
dist = train_gpt.Dist("cpu", os.environ)
stream = train_gpt.TokenStream(config, "train")
of_one = train_gpt.error_moments(run, stream, first_step=0)
run.dist = dist
of_both = train_gpt.error_moments(run, stream, first_step=0)
same = all((a - b).norm() < 1e-4 * a.norm() for name in of_one for a, b in zip(of_one[name], of_both[name]))
limit = int(0.7 * len(train_gpt.encode_artifact(state, config, moments=moments)))
train_gpt.FIT_SLACK = 300
alone = train_gpt.encode_artifact(state, config, moments=moments, limit=limit)
shared = train_gpt.encode_artifact(state, config, moments=moments, limit=limit, dist=dist)
with open(f"rank{dist.rank}", "w") as file:
    print(dist.world_size, same, shared == alone, len(shared) < limit, file=file)
train_gpt.torch.distributed.destroy_process_group()
os._exit(0)
"""


def test_ranks_that_share_the_work_get_the_bytes_of_one(dataset, tmp_path):
    (tmp_path / "ranks.py").write_text(RANKS)
    paths = os.pathsep.join((str(REPOSITORY), str(REPOSITORY / "tests"), str(REPOSITORY / "data")))
    settings = {f"TEST_{name}": value for name, value in dataset.items()} | {"PYTHONPATH": paths}
    done = run_process(tmp_path, settings, ranks=2, script=tmp_path / "ranks.py")
    assert done.code == 0, done.output
    for rank in (0, 1):
        assert (tmp_path / f"rank{rank}").read_text() == "2 True True True\n"


def test_length_that_is_not_monotone_is_searched_all_the_same():
    prices = []

    def make(price):  # grows again now and then
        prices.append(price)
        octaves = max(0, price / 1024 - 100)
        return bytes(int(max(100, 200_000 - 12_500 * octaves + 4000 * math.sin(9 * octaves))))

    for limit in range(1_000, 200_000, 3_001):
        prices.clear()
        found = train_gpt.largest_below(limit, make)
        assert limit - train_gpt.FIT_SLACK <= len(found) < limit and len(prices) <= 20


# ---- Damage


def damaged(rng, data):
    """1 to 8 changes to random places: bits, bytes, cuts and repeats."""
    data = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 8))):
        kind, position = rng.randrange(4), rng.choice((rng.randrange(len(data) + 1), rng.randrange(400)))
        if kind == 0 and position < len(data):
            data[position] ^= 1 << rng.randrange(8)
        elif kind == 1:
            data[position : position + rng.randrange(9)] = rng.randbytes(rng.randrange(9))
        elif kind == 2:
            del data[position : position + rng.randrange(40)]
        else:
            data[position:position] = data[position : position + rng.randrange(40)]
    return bytes(data)


def test_mutated_artifacts_give_an_error_or_a_model_of_the_declared_shapes(config, artifact):
    """Half of them with a checksum that fits, so that the decoder sees the damage, and half of those damaged under the
    compression, so that it gets behind zstd's own checks; none takes long or much memory."""
    rng = random.Random(0)
    outcomes = {"error": 0, "model": 0}
    tracemalloc.start()
    decode_artifact(artifact)
    normal = tracemalloc.get_traced_memory()[1]
    for number in range(MUTATIONS):
        if number % 4 == 1:
            data = rebuilt(artifact, change=lambda body: damaged(rng, body))
        elif number % 4 == 3:
            data = checked(damaged(rng, artifact[HEAD:]))
        else:
            data = damaged(rng, artifact)
        tracemalloc.reset_peak()
        begin = time.perf_counter()
        try:
            stored_config, state = decode_artifact(data)
        except UserError as error:
            assert "\n" not in str(error)
            outcomes["error"] += 1
        else:
            shapes = {name: tuple(shape) for name, shape, _ in train_gpt.tensor_table(stored_config)}
            assert {name: tuple(tensor.shape) for name, tensor in state.items()} == shapes
            outcomes["model"] += 1
        assert time.perf_counter() - begin < 10
        assert tracemalloc.get_traced_memory()[1] < 2 * normal + 100_000
    tracemalloc.stop()
    assert outcomes["error"] > 0.9 * MUTATIONS and outcomes["model"] > 0


def with_header(artifact, header, tail=None):
    """The artifact with another header, and what follows it if that is given."""
    body, _ = parts(artifact)
    old = int.from_bytes(body[:4], "little")
    new = header if isinstance(header, bytes) else json.dumps(header).encode()
    tail = body[4 + old :] if tail is None else tail
    return rebuilt(artifact, lambda body: len(new).to_bytes(4, "little") + new + tail)


def header_of(artifact, **config):
    """The artifact's header for these settings of the model, with the table of tensors that they imply."""
    body, _ = parts(artifact)
    header = json.loads(body[4 : 4 + int.from_bytes(body[:4], "little")])
    header["config"] |= config
    return header | {"tensors": train_gpt.tensor_table(dataclasses.replace(train_gpt.Config(), **header["config"]))}


def certain_values(artifact, lanes, **config):
    """A model of which each value is certain, and so costs nothing: a small file may say it is large."""
    header = header_of(artifact, **config)
    numbers = sum(math.prod(shape) if bits == 16 else shape[0] for _, shape, bits in header["tensors"])
    rows = sum(shape[0] for _, shape, bits in header["tensors"] if bits < 16)
    frequencies = np.zeros((64, 256), "<u2")
    frequencies[:, 1] = 2**14
    arrays = np.ones(numbers, "<f2"), np.ones(rows, np.uint8), frequencies, np.full(lanes, 2**16, "<u4")
    header, payload = json.dumps(header).encode(), b"".join(array.tobytes() for array in arrays)
    frame = zstandard.compress(len(header).to_bytes(4, "little") + header + payload)
    return checked(len(frame).to_bytes(4, "little") + frame)


BIG = dict(model_dim=2048, num_heads=8, num_layers=4, mlp_mult=0.25)  # 60 million values


@pytest.mark.parametrize("case", ["values", "rows", "lanes", "one lane", "layers", "false length", "list", "nesting",
                                  "not finite"])
def test_a_small_file_cannot_ask_for_all_time_or_memory(artifact, case):
    if case == "values":
        hostile = certain_values(artifact, 1024, model_dim=4096, num_heads=8, num_layers=11)
    elif case == "rows":
        hostile = with_header(artifact, header_of(artifact, bigram_vocab_size=2**26 - 200_000, bigram_dim=1))
    elif case in ("lanes", "one lane"):
        hostile = certain_values(artifact, 10_000_000 if case == "lanes" else 1, **BIG)
    elif case == "layers":
        header = header_of(artifact) | {"tensors": [0] * 80_000}
        header["config"]["num_layers"] = 8000
        hostile = with_header(artifact, header)
    elif case == "false length":  # of the header: as many layers as it says there is room for
        header = json.dumps(header_of(artifact)).replace('"num_layers": 3', '"num_layers": 100000').encode()
        hostile = rebuilt(artifact, lambda body: b"\xff" * 4 + header)
    elif case == "list":
        hostile = with_header(artifact, b'{"tensors": [' + b"{}," * 10_000_000 + b"0]}")
    elif case == "nesting":
        hostile = with_header(artifact, b"[" * 60_000)
    else:
        body, _ = parts(artifact)
        start = 4 + int.from_bytes(body[:4], "little")
        hostile = with_header(artifact, header_of(artifact), b"\xff" * 20 + body[start + 20 :])
    tracemalloc.start()
    begin = time.perf_counter()
    with pytest.raises(UserError, match="inconsistent") as caught:
        decode_artifact(hostile)
    assert time.perf_counter() - begin < 10 and "\n" not in str(caught.value)
    assert tracemalloc.get_traced_memory()[1] < 500e6  # what a model of the largest size takes
    tracemalloc.stop()


def test_certain_values_do_make_a_model(config, artifact):
    lanes = sum(math.prod(shape) for _, shape, bits in train_gpt.tensor_table(config) if bits < 16) // 2048
    assert set(decode_artifact(certain_values(artifact, lanes))[1]["tok_emb.weight"].unique().tolist()) == {1.0}


def test_diverged_weights_are_not_stored(config):
    for value in (float("nan"), float("inf")):
        state = random_model(config).state_dict()
        state["blocks.1.mlp.fc.weight"][0, 0] = value
        with pytest.raises(UserError, match="blocks.1.mlp.fc.weight"):
            encode_artifact(state, config)


def test_every_tensor_is_stored_as_declared(config):
    kinds = {}
    for name, _, bits in train_gpt.tensor_table(dataclasses.replace(config, embed_bits=8)):
        kind = name.split(".", 2)[-1] if name.startswith("blocks") else name
        assert kinds.setdefault(kind, bits) == bits, name
    assert kinds == {
        "tok_emb.weight": 8, "bigram.embed.weight": 8, "bigram.proj.weight": 6, "mlp.fc.weight": 5, "mlp.proj.weight": 5,
        "attn.c_q.weight": 6, "attn.c_k.weight": 6, "attn.c_v.weight": 6, "attn.proj.weight": 6, "attn.q_gain": 16,
        "attn_scale": 16, "mlp_scale": 16, "resid_mix": 16, "skip_weights": 16, "smear.gate": 16, "bigram.scale": 16}
