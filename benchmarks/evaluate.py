"""Evaluation speed: targets a second of scoring alone and of score-then-adapt; settings compared in pairs.

    python benchmarks/evaluate.py                                 train_gpt.py as it is, and a loop over windows
    python benchmarks/evaluate.py "" COMPILE=0 loop               each argument an arm; "" is train_gpt.py's own choice
    EVAL_STRIDE=128 TTT_EPOCHS=1 python benchmarks/evaluate.py    settings of all arms

The word loop stands for the seed's scoring: not compiled, every position of every window pays for the whole model, and
Python picks each window's targets; it adapts as train_gpt.py does, not compiled. Models are new and data as in step.py:
neither changes what is timed. The projection for the challenge's split on 8 such devices is a lower bound: it leaves
out what ranks send each other, and divides what each of them does in full (clipping, SGD).
"""
import argparse
import statistics
from collections.abc import Callable

import numpy as np
import timing
import torch
from timing import spread, train_gpt

FULL_SPLIT = 62_021_632  # targets of the challenge's validation split


class LoopEvaluator(train_gpt.Evaluator):
    """Scores as the seed does."""

    @torch.no_grad()
    def score(self, windows: np.ndarray, rows: int, stride: int) -> np.ndarray:
        begin, nats = windows[0, 1], torch.zeros(windows[-1, 2] - windows[0, 1], device=self.tokens.device)
        for batch in (windows[i : i + rows] for i in range(0, len(windows), rows)):
            positions = torch.from_numpy(batch[:, :1]).to(self.tokens.device) + self.offsets
            nll = train_gpt.token_nll(self.run.model, self.tokens[positions], self.tokens[positions + 1])
            for row, (start, first, end) in zip(nll, batch, strict=True):
                nats[first - begin : end - begin] = row[first - start : end - start]
        return nats.cpu().numpy()


class Arm:
    """An evaluation of its own, and pieces of it to time."""

    def __init__(self, text: str, chunks: int):
        words, parts = set(text.split()), [part for part in text.split() if "=" in part]
        if unknown := words - set(parts) - {"loop"}:
            raise SystemExit(f"error: {' '.join(unknown)}: an arm is NAME=value settings and perhaps the word loop")
        settings = dict(part.split("=", 1) for part in parts)
        if "loop" in words:
            settings = dict(COMPILE="0", ATTENTION="flash") | settings
        self.name, self.run = text or "train_gpt.py", timing.make_run(settings)
        self.config, self.device = self.run.config, self.run.dist.device
        tokens = train_gpt.TokenStream(self.config, "val").read(0, (chunks + 2) * self.config.ttt_chunk_tokens + 1)
        kind = LoopEvaluator if "loop" in words else train_gpt.Evaluator
        self.evaluator = kind(self.run, tokens, timing.OneByteEach())
        self.windows = train_gpt.plan_chunks(self.evaluator.num_targets, self.config.train_seq_len,
                                             self.config.eval_stride, self.config.ttt_chunk_tokens)[1 : chunks + 1]
        if not self.windows:
            raise SystemExit(f"error: TTT_CHUNK_TOKENS={self.config.ttt_chunk_tokens}: not 2 chunks there, lower it")
        self.sgd = torch.optim.SGD(self.run.model.parameters(), lr=0.0, momentum=self.config.ttt_momentum, fused=True)
        self.targets = sum(int(windows[-1, 2] - windows[0, 1]) for windows in self.windows)

    def score(self) -> None:
        sizes = self.config.eval_batch_seqs, self.config.eval_stride
        self.nats = [self.evaluator.score(windows, *sizes) for windows in self.windows]

    def adapt(self) -> None:
        size = self.config.ttt_chunk_tokens
        for index in range(1, len(self.windows) + 1):
            for _ in range(self.evaluator.epochs):
                self.evaluator.adapt(index * size, (index + 1) * size, self.sgd)

    @torch.no_grad()
    def print_reasons(self, repeats: int) -> None:
        """What asking for scored positions alone gains, and what sharing between windows could gain, on one batch."""
        run, stride, block = self.run, self.config.eval_stride, self.run.model.blocks[0]
        starts = torch.from_numpy(self.windows[0][: self.config.eval_batch_seqs, :1]).to(self.device)
        tokens = self.evaluator.tokens[starts + self.evaluator.offsets]
        at = self.evaluator.offsets[-stride:].expand(len(tokens), -1).contiguous()
        targets = tokens[:, -stride:].contiguous()

        def shared() -> None:
            x = train_gpt.rms_norm(run.model.embed(tokens))
            for matrix in (block.attn.c_q, block.attn.c_k, block.attn.c_v):
                matrix(x)

        train_gpt.digest(run.model)
        (digests,) = timing.in_turn([lambda: train_gpt.digest(run.model)], repeats, self.device)
        print(f"\n{self.name}: the digest of the weights, once a chunk, takes {spread([1000 * s for s in digests])} ms",
              end="")
        works = [lambda: run.nll(run.model, tokens, tokens), lambda: run.nll(run.model, tokens, targets, at), shared]
        for work in works:  # compiles
            work()
        eight = [lambda work=work: [work() for _ in range(8)] for work in works]
        every, scored, alike = timing.in_turn(eight, repeats, self.device)
        print(f"\n{self.name}: asking for the scored positions alone is {timing.pairwise(every, scored)} times as fast "
              "as for all;\nwindows that overlap compute "
              f"{spread([100 * a / b for a, b in zip(alike, scored, strict=True)])} % of it alike: embedding, bigram, "
              "smear, first q, k and v")


def report(arms: list[Arm], seconds: list[list[float]]) -> None:
    for arm, mine in zip(arms, seconds, strict=True):
        rates = [arm.targets / s for s in mine]
        print(f"  {arm.name:<30} {spread(rates, 0):<40} {FULL_SPLIT / 8 / statistics.median(rates):>10,.0f} s", end="")
        print("" if arm is arms[0] else f"   {arms[0].name} is {timing.pairwise(mine, seconds[0])} times as fast")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("arms", nargs="*", default=["", "loop"])
    parser.add_argument("--chunks", type=int, default=1, help="chunks timed at once, of TTT_CHUNK_TOKENS targets")
    parser.add_argument("--repeats", type=int, default=7, help="rounds in which all arms are timed")
    args = parser.parse_args()
    arms = [Arm(text, args.chunks) for text in args.arms]
    config, device = arms[0].config, arms[0].device
    print(timing.machine())
    for arm in arms:
        seconds = timing.seconds_of(lambda arm=arm: (arm.score(), arm.adapt()), device)
        error = max(np.abs(a - b).max() for a, b in zip(arm.nats, arms[0].nats, strict=True))
        print(f"{arm.name}: {arm.config.compute_dtype}, ATTENTION={arm.config.attention}, "
              f"COMPILE={arm.config.compile}; warm-up {seconds:.1f} s; "
              f"scores within {error:.5f} nats of the first arm's", flush=True)

    def timed(work: Callable[[Arm], None]) -> list[list[float]]:
        return timing.in_turn([lambda arm=arm: work(arm) for arm in arms], args.repeats, device)

    scoring, adapting = timed(Arm.score), timed(Arm.adapt)
    print(f"\nTargets a second, windows of {config.train_seq_len}, stride {config.eval_stride}; "
          f"seconds for {FULL_SPLIT:,} targets on 8 of these")
    print(" scoring alone")
    report(arms, scoring)
    print(f" score, then adapt: {config.ttt_epochs} epochs, chunks of {config.ttt_chunk_tokens}")
    report(arms, [[a + b for a, b in zip(*both, strict=True)] for both in zip(scoring, adapting, strict=True)])
    arms[0].print_reasons(args.repeats)


if __name__ == "__main__":
    main()
