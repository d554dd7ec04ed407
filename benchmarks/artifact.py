"""What storing a model costs, in bytes, seconds and bits per byte, for each way to quantise and to code it.

    make demo && python benchmarks/artifact.py                     the demo's data and settings: trains, then compares
    MODEL_DIM=256 ... RUN_ID=large python benchmarks/artifact.py   any setting of train_gpt.py, as for the demo
    python benchmarks/artifact.py --full-size                      the coder alone, on random weights of the record size

Trains once with train_gpt.py's own functions and keeps the averaged fp32 weights in logs/RUN_ID/weights.npz; a rerun
with the same RUN_ID goes on from those. What it costs to store them is said in two ways: BPB lost on the validation
targets, which chance moves by 0.0001 or so, and KL divergence from the fp32 model in bits a byte, which it hardly
moves.
"""
import argparse
import math
import os
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
import zstandard

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "benchmarks")]
from demo import DEMO  # noqa: E402

import train_gpt  # noqa: E402

KL_SEQUENCES = 128  # of the validation split


# ---- A trained model


def set_up() -> tuple[train_gpt.Run, train_gpt.Evaluator]:
    """A run with the demo's settings and those of the environment, as train_gpt.main makes it."""
    os.chdir(REPOSITORY)
    environment = {name: str(value) for name, value in DEMO.items()} | {"RUN_ID": "artifact"} | dict(os.environ)
    dist = train_gpt.Dist(environment.get("DEVICE", "auto"))
    config = train_gpt.settle(train_gpt.Config.from_env(environment), dist)
    run = train_gpt.build_run(config, dist, train_gpt.Log(Path("logs") / config.run_id))
    val = train_gpt.TokenStream(config, "val")
    token_bytes = train_gpt.TokenBytes(train_gpt.load_tokenizer(config))
    return run, train_gpt.Evaluator(run, val.read(0, val.num_tokens), token_bytes)


def trained_weights(run: train_gpt.Run, evaluator: train_gpt.Evaluator) -> dict[str, torch.Tensor]:
    """Averaged fp32 weights at the end of training; from an earlier run of the same name, if there are any."""
    path = run.log.folder / "weights.npz"
    if not path.exists():
        stream = train_gpt.TokenStream(run.config, "train")
        optimizers = train_gpt.build_optimizers(run.model, run.config, run.dist)
        train_gpt.warm_up(run, stream, optimizers, evaluator)
        average, progress = train_gpt.train(run, stream, optimizers, lambda *progress: None)
        average.apply()
        run.log(f"trained {progress}")
        np.savez(path, **{name: tensor.cpu().numpy() for name, tensor in run.model.state_dict().items()})
    with np.load(path) as arrays:
        return {name: torch.from_numpy(arrays[name]).to(run.dist.device) for name in arrays.files}


def input_moments(run: train_gpt.Run, stream: train_gpt.TokenStream) -> dict:
    """X^T X of the inputs of each matrix, as in GPTQ's paper, in the place of train_gpt.error_moments' G^T G. The tied
    embedding is the head's matrix; the bigram table, which has no inputs, gets the identity."""
    state = {name: p for name, p in run.model.named_parameters() if name.endswith(".weight")}
    moments = {name: torch.zeros(p.size(1), p.size(1), device=p.device) for name, p in state.items()}
    moments["bigram.embed.weight"].fill_diagonal_(1.0)

    def add(name: str, x: torch.Tensor) -> None:
        x = x.detach().flatten(0, 1).float()
        moments[name].addmm_(x.T, x)

    hooks = [module.register_forward_pre_hook(lambda _, inputs, name=name: add(f"{name}.weight", inputs[0]))
             for name, module in run.model.named_modules() if isinstance(module, train_gpt.Linear)]
    hooks.append(run.model.blocks[-1].register_forward_hook(
        lambda _, inputs, output: add("tok_emb.weight", train_gpt.rms_norm(output))))
    with torch.no_grad():
        for step in range(run.config.gptq_batches):
            for inputs, _ in stream.micro_batches(step, run.dist):
                run.model(inputs)
    for hook in hooks:
        hook.remove()
    return {name: (moment, torch.ones(len(state[name]), device=moment.device)) for name, moment in moments.items()}


# ---- Steps to choose from: fp32 [choices, rows] of a matrix

GAUSSIAN_STEP = {5: 0.1881, 6: 0.1041, 8: 0.0308}  # of least error for 2**bits levels, in deviations (Max 1960)


def absmax_steps(matrix: torch.Tensor, bits: int) -> torch.Tensor:
    """The reference's: the step that just reaches the row's largest weight, [1, rows]."""
    return (matrix.abs().amax(1) / (2 ** (bits - 1) - 1))[None]


def std_steps(matrix: torch.Tensor, bits: int) -> torch.Tensor:
    return (GAUSSIAN_STEP[bits] * matrix.std(dim=1))[None]


def searched_steps(matrix: torch.Tensor, bits: int) -> torch.Tensor:
    """Those that train_gpt.py tries, [choices, rows]."""
    shares = torch.linspace(0.85, 1.15, train_gpt.STEP_CHOICES, device=matrix.device)
    return shares[:, None] * absmax_steps(matrix, bits)


class Costs(NamedTuple):
    """What the parts of an artifact come to, in bytes and seconds."""
    zstd_bytes: int  # values as int8 in one zstd frame with the rest, as the reference does it
    zstd_s: float
    coded_bytes: int  # the artifact
    floor_bytes: float  # order-0 entropy of the values of each matrix + raw bytes of steps and small tensors
    encode_s: float
    decode_s: float


def costs(data: bytes) -> Costs:
    """Takes an artifact apart and codes its parts in both ways."""
    start = time.perf_counter()
    train_gpt.decode_artifact(data)
    decode_s = time.perf_counter() - start
    config, stored, values = train_gpt.unpack_artifact(data)
    start = time.perf_counter()
    assert train_gpt.pack_artifact(config, stored, values) == data
    encode_s = time.perf_counter() - start
    start = time.perf_counter()
    frame = zstandard.compress(b"".join(t.numpy().tobytes() for t in (*stored.values(), *values.values())), level=22)
    zstd_s = time.perf_counter() - start
    floor = sum(entropy_bytes(value.numpy()) for value in values.values()) + sum(2 * t.numel() for t in stored.values())
    return Costs(len(frame), zstd_s, len(data), floor, encode_s, decode_s)


def entropy_bytes(values: np.ndarray) -> float:
    counts = np.unique(values, return_counts=True)[1]
    return float(-(counts * np.log2(counts / values.size)).sum() / 8)


class Comparison:
    """Stores one trained model in several ways and says what each loses."""

    def __init__(self, run: train_gpt.Run, evaluator: train_gpt.Evaluator, weights: dict[str, torch.Tensor]):
        self.run, self.evaluator, self.weights, length = run, evaluator, weights, run.config.train_seq_len
        self.windows = train_gpt.sliding_windows(evaluator.num_targets, length, stride=length)
        tokens = evaluator.tokens[: min(KL_SEQUENCES * length, evaluator.num_targets)].long()
        self.inputs, self.text_bytes = tokens.view(-1, length), int(evaluator.bytes_before[len(tokens)])
        self.bpb, self.log_p = self.score(weights)
        self.reference_loss = math.nan

    @torch.no_grad()
    def score(self, state: dict[str, torch.Tensor]) -> tuple[float, torch.Tensor]:
        """BPB of all validation targets, sequences side by side, without adaptation; log p at the first ones."""
        self.run.model.load_state_dict(state)
        nats = self.evaluator.score(self.windows, *self.evaluator.plain)
        log_p = torch.cat([F.log_softmax(self.run.model(rows), dim=-1) for rows in self.inputs.split(4)])
        return self.evaluator.loss_and_bpb(nats)[1], log_p

    def report(self, label: str, data: bytes) -> Costs:
        """Prints the line of one artifact; the first is the reference."""
        each = costs(data)
        bpb, log_p = self.score(train_gpt.decode_artifact(data)[1])
        kl = float((self.log_p.exp() * (self.log_p - log_p)).sum(dtype=torch.float64)) / math.log(2) / self.text_bytes
        loss = bpb - self.bpb
        if math.isnan(self.reference_loss):
            self.reference_loss, self.reference_kl = loss, kl
        print(f"{label:<44} {each.zstd_bytes:>10,} {each.coded_bytes:>10,} {each.coded_bytes / each.floor_bytes:>7.4f}"
              f" {each.zstd_s:>7.2f} {each.encode_s:>7.2f} {each.decode_s:>7.2f}  {bpb:.5f} {loss:>8.5f}"
              f" {loss / self.reference_loss:>5.2f}  {kl:.5f} {kl / self.reference_kl:>5.2f}", flush=True)
        return each

    def one_factor(self, steps: Callable, moments: dict, limit: float) -> bytes:
        """All steps times one factor, from 1 on: the least with which the artifact is below the limit."""
        config, table = self.run.config, train_gpt.tensor_table(self.run.config)

        def make(price: int) -> bytes:
            stored, values = {}, {}
            for name, _, bits in table:
                if bits == 16:
                    stored[name] = self.weights[name].half()
                else:
                    tried = 2 ** (price / 10240) * steps(self.weights[name], bits)
                    moment = moments.get(name, (None,))[0]
                    values[name], stored[name] = train_gpt.quantize(self.weights[name], tried, bits, moment)
            return train_gpt.pack_artifact(config, stored, values)

        return train_gpt.largest_below(limit, make)

    def as_train_gpt(self, moments: dict, limit: float, embed_bits: int) -> bytes:
        config = replace(self.run.config, embed_bits=embed_bits)
        return train_gpt.encode_artifact(self.weights, config, moments=moments, limit=limit)


HEADER = (f"{'way':<44} {'zstd -22':>10} {'coded':>10} {'/floor':>7} {'zstd s':>7} {'enc. s':>7} {'dec. s':>7}"
          f"  {'BPB':<7} {'loss':>8} {'/ref.':>5}  {'KL':<7} {'/ref.':>5}")


def compare() -> None:
    """Quantisers at no more bytes than the reference; tables of 6, 8 and 16 bits; the solver at smaller limits."""
    run, evaluator = set_up()
    weights = trained_weights(run, evaluator)
    run.model.load_state_dict(weights)
    stream, start = train_gpt.TokenStream(run.config, "train"), time.perf_counter()
    fisher = train_gpt.error_moments(run, stream, first_step=0)
    seconds = time.perf_counter() - start
    inputs = input_moments(run, stream)
    comparison = Comparison(run, evaluator, weights)
    print(f"{sum(tensor.numel() for tensor in weights.values()):,} parameters, {evaluator.num_targets:,} targets; fp32:"
          f" {comparison.bpb:.5f} BPB; moments of {run.config.gptq_batches} batches: {seconds:.1f} s\n{HEADER}")
    reference = comparison.one_factor(absmax_steps, {}, math.inf)
    limit = comparison.report("absmax, nearest (the reference)", reference).zstd_bytes
    print(f"-- coded bytes at most the reference's {limit:,}")
    for steps, name in ((absmax_steps, "absmax"), (std_steps, "std"), (searched_steps, "searched")):
        for moments, rounding in (({}, "nearest"), (inputs, "GPTQ, X^T X"), (fisher, "GPTQ, G^T G")):
            comparison.report(f"{name}, {rounding}, one factor", comparison.one_factor(steps, moments, limit + 1))
    for embed_bits in (6, 8, 16):
        data = comparison.as_train_gpt(fisher, limit + 1, embed_bits)
        comparison.report(f"train_gpt.py, EMBED_BITS={embed_bits}", data)
    print("-- no limit")
    for embed_bits in (6, 8, 16):
        data = comparison.as_train_gpt(fisher, math.inf, embed_bits)
        comparison.report(f"train_gpt.py, EMBED_BITS={embed_bits}", data)
    for share in (0.9, 0.75, 0.6):
        print(f"-- coded bytes at most {share} of the reference's")
        bound = int(share * limit) + 1
        comparison.report("searched, GPTQ, G^T G, one factor", comparison.one_factor(searched_steps, fisher, bound))
        comparison.report("train_gpt.py, without moments", comparison.as_train_gpt({}, bound, 6))
        comparison.report("train_gpt.py", comparison.as_train_gpt(fisher, bound, 6))


def full_size(repeats: int) -> None:
    """The coder on Gaussian weights of the default configuration: bytes beside the floor, medians of the seconds."""
    config = train_gpt.Config()
    torch.manual_seed(0)
    weights = {name: 0.05 * torch.randn(shape) for name, shape, _ in train_gpt.tensor_table(config)}
    start = time.perf_counter()
    data = train_gpt.encode_artifact(weights, config)
    print(f"{sum(w.numel() for w in weights.values()):,} Gaussian weights; encode_artifact, rounding and the search of"
          f" steps included: {time.perf_counter() - start:.1f} s")
    rounds = [costs(data) for _ in range(repeats)]
    last = rounds[-1]
    print(f"coded {last.coded_bytes:,} bytes, {last.coded_bytes / last.floor_bytes:.5f} of the floor;"
          f" zstd -22 {last.zstd_bytes:,} bytes, {last.zstd_bytes / last.floor_bytes:.5f}")
    for name in ("encode_s", "decode_s", "zstd_s"):
        seconds = sorted(getattr(each, name) for each in rounds)
        print(f"{name}: median {seconds[len(seconds) // 2]:.2f}, {seconds[0]:.2f} to {seconds[-1]:.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full-size", action="store_true", help="the coder alone, on random weights")
    parser.add_argument("--repeats", type=int, default=5, help="of --full-size")
    arguments = parser.parse_args()
    if arguments.full_size:
        full_size(arguments.repeats)
    else:
        compare()


if __name__ == "__main__":
    main()
