"""Training speed: tokens a second, share of the arithmetic peak, milliseconds by part; settings compared in pairs.

    python benchmarks/step.py                                      train_gpt.py as it is, and the seed's design
    python benchmarks/step.py "" ATTENTION=flash COMPILE=0         each argument an arm; "" is train_gpt.py's own choice
    python benchmarks/step.py "" "seed COMPILE=0" --steps 10       the word seed: PR #264's design, see Seed below
    python benchmarks/step.py "" "/tmp/mine.py COMPILE=0"          a path: another version of the script
    MODEL_DIM=256 NUM_HEADS=8 python benchmarks/step.py            settings of all arms

Without settings: the record model with a batch of 98,304 tokens on a GPU, a small one on a CPU (timing.py). All arms
take the same steps on the same data, in turn, in rounds; the first arm is what the others are compared with, round by
round. With a data set under DATA_PATH the losses at the end say whether the arms learn alike.
"""
import argparse
import os
import statistics
from collections import defaultdict

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler's own chatter

import timing  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from timing import spread, train_gpt  # noqa: E402
from torch.autograd import DeviceType  # noqa: E402
from torch.profiler import ProfilerActivity, profile  # noqa: E402

# ---- The seed's design, written for this model: what it computes is the same


def rms_norm(x):
    return F.rms_norm(x, x.shape[-1:])


class SeedAttention(train_gpt.Attention):
    """A product each for q, k, v, heads before positions: they are transposed first, the result is copied back."""

    def forward(self, x, rope, mask, at, scale):
        B, T, D = x.shape
        E = 2 * rope.size(-1)
        q, k, v = (c(x).reshape(B, T, -1, E).transpose(1, 2) for c in (self.c_q, self.c_k, self.c_v))
        rope, group = rope.squeeze(2), q.size(1) // k.size(1)  # (2, T, E/2)
        q = train_gpt.rotate(rms_norm(q), rope) * self.q_gain.to(x.dtype)[:, None]
        k = train_gpt.rotate(rms_norm(k), rope)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=group > 1)
        if self.exclusive:  # the seed has no XSA; as PR #265 wrote it
            own = F.normalize(v.repeat_interleave(group, 1), dim=-1)
            y = y - (y * own).sum(-1, keepdim=True) * own
        return self.proj(y.transpose(1, 2).contiguous().reshape(B, T, D)) * scale.to(x.dtype)


class SeedBlock(train_gpt.Block):
    """Scales act on activations."""

    def forward(self, x, x0, rope, mask, at=None):
        mix = self.resid_mix.to(x.dtype)
        x = mix[0] * x + mix[1] * x0
        x = x + self.attn(rms_norm(x), rope, mask, at, self.attn_scale)
        return x + self.mlp_scale.to(x.dtype) * self.mlp(rms_norm(x))


class SeedMuon(train_gpt.Muon):
    """One matrix after the other."""

    newton_schulz = staticmethod(train_gpt.newton_schulz)

    def orthogonalize(self, updates, steps, factor=1.0):
        def one(u):
            x = F.normalize(u, dim=-1) if self.row_norm else u  # the seed does not
            orthogonal = self.newton_schulz(x.to(self.dtype)[None], steps)[0].float()
            return factor * orthogonal * max(1, u.size(0) / u.size(1)) ** 0.5

        return [one(u) for u in updates]


class Arm:
    """A run of its own, and steps on it."""

    def __init__(self, text: str):
        words, parts = text.split(), [part for part in text.split() if "=" in part]
        scripts = [part for part in words if part.endswith(".py") and part not in parts]
        self.name, self.seed = text or "train_gpt.py", "seed" in words
        if (unknown := set(words) - set(parts) - set(scripts) - {"seed"}) or len(scripts) + self.seed > 1:
            raise SystemExit(f"error: {' '.join(unknown) or text}: an arm is NAME=value settings and perhaps the word "
                             "seed or the path of a script")
        self.script = timing.load_script(scripts[0]) if scripts else train_gpt
        settings = dict(part.split("=", 1) for part in parts)
        if self.seed:  # it compiles the model as one graph, with the flash kernel
            settings = dict(ATTENTION="flash", COMPILE="1") | settings
        self.run = timing.make_run(settings, self.script)
        self.stream = self.script.TokenStream(self.run.config, "train")
        self.muon, self.adamw = self.script.build_optimizers(self.run.model, self.run.config, self.run.dist)
        if self.seed:
            for block in self.run.model.blocks:
                block.__class__, block.attn.__class__ = SeedBlock, SeedAttention
                if self.run.config.compile == "blocks":
                    block.forward = train_gpt.compiled(SeedBlock.forward.__get__(block))
            self.muon.__class__ = SeedMuon
            if self.run.config.compile == "1":
                self.muon.newton_schulz = torch.compile(train_gpt.newton_schulz)
        self.done, self.losses = 0, []

    def steps(self, count: int) -> None:
        """As train_gpt.train takes them."""
        for _ in range(count):
            batch = list(self.stream.micro_batches(self.done, self.run.dist))
            loss = self.script.train_step(self.run, batch, [self.muon, self.adamw], 1.0, 0.95)
            self.losses.append(loss)
            self.done += 1

    def parts(self) -> dict[str, float]:
        """Milliseconds of the parts of one step, the device waited for in between; Newton-Schulz is a part of Muon."""
        run, milliseconds = self.run, {}
        updates = [p.grad.clone() for p in self.muon.param_groups[0]["params"]]
        batch = list(self.stream.micro_batches(self.done, run.dist))

        def forwards_and_backwards() -> None:
            run.grads.flat.zero_()
            for inputs, targets in batch:
                (run.nll(run.model, inputs, targets).sum() / run.config.train_batch_tokens).backward()

        for name, work in {
            "next batch": lambda: list(self.stream.micro_batches(self.done, run.dist)),
            "forwards and backwards": forwards_and_backwards,
            "clip": lambda: run.grads.reduce_and_clip(run.dist, run.config.grad_clip_norm),
            "Muon": self.muon.step,
            "  of which Newton-Schulz": lambda: self.muon.orthogonalize(updates, run.config.muon_backend_steps),
            "AdamW": self.adamw.step,
        }.items():
            milliseconds[name] = 1000 * timing.seconds_of(work, run.dist.device)
        return milliseconds

    def kernels(self) -> dict[str, float]:
        """Milliseconds of one step by kind of kernel, from the profiler."""
        on_gpu = self.run.dist.device.type == "cuda"
        with profile(activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_gpu) as profiler:
            seconds = timing.seconds_of(lambda: self.steps(1), self.run.dist.device)
        milliseconds = defaultdict(float)
        for event in profiler.key_averages():
            if on_gpu and (event.device_type != DeviceType.CUDA or event.is_user_annotation):
                continue  # a call on the host, whose kernels are events too
            spent = event.self_device_time_total if on_gpu else event.self_cpu_time_total
            milliseconds[kind_of(event.key.lower())] += spent / 1000
        milliseconds["the device waits" if on_gpu else "Python and the rest"] = (
            1000 * seconds - sum(milliseconds.values()))
        return milliseconds


def kind_of(kernel: str) -> str:
    if any(part in kernel for part in ("flash", "fmha", "scaled_dot", "cudnn_generated_fort")):
        return "attention kernels"
    if any(part in kernel for part in ("aten::bmm", "baddbmm")):  # on CPUs; on GPUs they are among the next
        return "batched products: attention written out, Newton-Schulz"
    if any(part in kernel for part in ("aten::mm", "addmm", "gemm", "cutlass", "nvjet", "xmma")):
        return "matrix products"
    return "elementwise, norms, softmax, copies"


def report(arms: list[Arm], seconds: list[list[float]], repeats: int) -> None:
    """seconds [arms][rounds] of a step."""
    charged = []  # an estimate: Newton-Schulz at 1/8, as eight ranks share it, what they send left out
    for arm, mine in zip(arms, seconds, strict=True):
        config, parts = arm.run.config, [arm.parts() for _ in range(repeats + 2)][2:]
        newton_schulz = statistics.median(part["  of which Newton-Schulz"] for part in parts) / 1000
        charged.append([s - 7 / 8 * newton_schulz for s in mine])
        peak = timing.peak_flops(train_gpt.DTYPES[config.compute_dtype], arm.run.dist.device)
        floor = config.train_batch_tokens * timing.flops_per_token(config) / peak
        print(f"\n{arm.name}: {config.compute_dtype}, ATTENTION={config.attention}, COMPILE={config.compile}, "
              f"micro-batches of {config.micro_batch_tokens}")
        print(f"  tokens/s                          {spread([config.train_batch_tokens / s for s in mine], 0)}")
        print(f"  the same, Newton-Schulz at 1/8    {spread([config.train_batch_tokens / s for s in charged[-1]], 0)}")
        print(f"  ms a step                         {spread([1000 * s for s in mine])}")
        print(f"  its arithmetic at the peak seen   {1000 * floor:,.1f} ms at {peak / 1e9:,.0f} GFLOP/s: "
              f"{floor / statistics.median(mine):.0%} of the step")
        if arm is not arms[0]:
            print(f"  {arms[0].name} against it: {timing.pairwise(mine, seconds[0])} times as fast, "
                  f"with Newton-Schulz at 1/8 {timing.pairwise(charged[-1], charged[0])}")
        for name in parts[0]:
            print(f"    {name:<31} {spread([part[name] for part in parts])} ms")
        for name, milliseconds in sorted(arm.kernels().items(), key=lambda item: -item[1]):
            print(f"    . {name:<66} {milliseconds:,.1f} ms")
        last = [float(loss) for loss in arm.losses[-20:]]
        print(f"  mean loss of the last {len(last)} of {arm.done} steps: {statistics.mean(last):.4f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("arms", nargs="*", default=["", "seed"])
    parser.add_argument("--steps", type=int, default=5, help="steps timed at once")
    parser.add_argument("--repeats", type=int, default=7, help="rounds in which all arms are timed")
    parser.add_argument("--warm-up", type=int, default=3, help="steps before")
    args = parser.parse_args()
    arms = [Arm(text) for text in args.arms]
    print(timing.machine())
    for arm in arms:
        seconds = timing.seconds_of(lambda arm=arm: arm.steps(args.warm_up), arm.run.dist.device)
        print(f"{arm.name}: {args.warm_up} steps of warm-up, {seconds:.1f} s", flush=True)
    works = [lambda arm=arm: arm.steps(args.steps) for arm in arms]
    seconds = timing.in_turn(works, args.repeats, arms[0].run.dist.device)
    report(arms, [[s / args.steps for s in mine] for mine in seconds], args.repeats)


if __name__ == "__main__":
    main()
