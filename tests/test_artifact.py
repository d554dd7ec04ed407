"""The artifact: exact round trip, bounds of the quantiser, and damage that is noticed."""
import dataclasses
import hashlib

import pytest
import torch
import zstandard
from conftest import random_model, tiny_config

import train_gpt
from train_gpt import UserError, decode_artifact, encode_artifact, quantize


@pytest.fixture(scope="module")
def config(dataset):
    return tiny_config(dataset)


@pytest.fixture(scope="module")
def artifact(config):
    return encode_artifact(random_model(config).state_dict(), config)


@pytest.mark.parametrize("bits", [5, 6, 8])
def test_quantisation_bounds(bits):
    torch.manual_seed(0)
    matrix = torch.randn(50, 40) * torch.logspace(-2, 3, 50)[:, None]
    matrix[7] = 0
    values, scale = quantize(matrix, bits)
    assert values.dtype == torch.int8 and scale.dtype == torch.float16
    assert values.min() >= -(2 ** (bits - 1)) and values.max() <= 2 ** (bits - 1) - 1
    error = (values.float() * scale.float()[:, None] - matrix).abs()
    bound = 0.5 + 2 ** (bits - 1) * 2**-11  # half a step, and what fp16's rounding of the scale cuts off at the end
    assert (error <= scale.float()[:, None] * bound).all()
    largest = values.abs().amax(dim=1)[matrix.any(dim=1)]
    assert (largest >= 2 ** (bits - 1) - 2).all()  # no floor under the scale: small rows use all levels
    assert not values[7].any()


@pytest.mark.parametrize("embed_bits", [6, 8, 16])
def test_round_trip_is_exactly_the_quantised_weights(config, embed_bits):
    config = dataclasses.replace(config, embed_bits=embed_bits)
    state = random_model(config).state_dict()
    stored_config, stored = decode_artifact(encode_artifact(state, config))
    assert {name: getattr(stored_config, name) for name in train_gpt.MODEL_SETTINGS} == {
        name: getattr(config, name) for name in train_gpt.MODEL_SETTINGS}
    assert list(stored) == [name for name, _ in train_gpt.GPT(config).named_parameters()]
    for name, tensor in state.items():
        bits = 5 if ".mlp." in name else embed_bits if name in ("tok_emb.weight", "bigram.embed.weight") else 6
        if not name.endswith(".weight") or bits == 16:
            expected = tensor.half().float()
        else:
            values, scale = quantize(tensor, bits)
            expected = values.float() * scale.float()[:, None]
        assert stored[name].dtype == torch.float32 and torch.equal(stored[name], expected), name
    train_gpt.GPT(stored_config).load_state_dict(stored)


def test_same_weights_same_bytes(config, artifact):
    assert encode_artifact(random_model(config).state_dict(), config) == artifact


def test_every_flipped_bit_and_every_cut_is_noticed(artifact):
    positions = [*range(60), *range(60, len(artifact), len(artifact) // 150)]
    for position in positions:
        damaged = bytearray(artifact)
        damaged[position] ^= 1 << (position % 8)
        with pytest.raises(UserError):
            decode_artifact(bytes(damaged))
    for length in (0, 7, 8, 20, 51, 52, 53, len(artifact) // 2, len(artifact) - 1):
        with pytest.raises(UserError):
            decode_artifact(artifact[:length])
    with pytest.raises(UserError, match="checksum"):
        decode_artifact(artifact + b"x")


def unchanged(body):
    return body


def rebuilt(artifact, version=None, change=unchanged, size=None):
    """The artifact with another version or body and a checksum that fits it."""
    original = zstandard.decompress(artifact[train_gpt.ARTIFACT_HEAD.size + 32 :])
    body = change(original)
    assert (body != original) == (change is not unchanged), "the case must change what it means to change"
    frame = zstandard.compress(body)
    version = version or train_gpt.ARTIFACT_VERSION
    head = train_gpt.ARTIFACT_HEAD.pack(train_gpt.ARTIFACT_MAGIC, version, size or len(body))
    return head + hashlib.sha256(head + frame).digest() + frame


@pytest.mark.parametrize("case, message", [
    (dict(version=2), "artifact version 2"),
    (dict(size=1 << 40), "a body of"),
    (dict(change=lambda body: body[:-1]), "bytes where its tensors need"),
    (dict(change=lambda body: body.replace(b'"num_layers": 3', b'"num_layers": 4')), "other tensors"),
    (dict(change=lambda body: body.replace(b'"num_layers": 3', b'"num_layers": 0')), "NUM_LAYERS=0"),
    (dict(change=lambda body: body.replace(b'"num_layers": 3', b'"num_layers": x')), "inconsistent"),
    (dict(change=lambda body: body.replace(b'"config"', b'"confog"')), "inconsistent"),
    (dict(change=lambda body: body.replace(b'"tok_emb.weight"', b'"tok_emb.weighs"')), "other tensors"),
    (dict(change=lambda body: b"\xff\xff\xff\x7f" + body[4:]), "inconsistent"),
])
def test_a_consistent_checksum_does_not_hide_an_inconsistent_file(artifact, case, message):
    assert decode_artifact(rebuilt(artifact))[0].num_layers == 3  # the tool itself makes valid files
    with pytest.raises(UserError, match=message) as caught:
        decode_artifact(rebuilt(artifact, **case))
    assert "\n" not in str(caught.value)


def test_diverged_weights_are_not_stored(config):
    for value in (float("nan"), float("inf")):
        state = random_model(config).state_dict()
        state["blocks.1.mlp.fc.weight"][0, 0] = value
        with pytest.raises(UserError, match="blocks.1.mlp.fc.weight"):
            encode_artifact(state, config)


def test_every_tensor_has_exactly_one_storage_rule(config):
    assert {bits for _, _, bits in train_gpt.tensor_table(config)} == {5, 6, 16}
    with pytest.raises(ValueError):
        train_gpt.storage_bits("blocks.0.mlp.gate.weight", config)
