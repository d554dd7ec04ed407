"""Runs train_gpt.py's GPU path without a GPU, on fake CUDA tensors: shape, dtype and device, no numbers.

    python tests/fake_cuda.py

Ends with status 1 if an operation mixes devices or dtypes, or if the host waits for the device where it should not, as
in a training step. What it cannot see: numbers, kernels, nccl, compiled graphs, `main`. Needs g++ and a torch built
without CUDA (a test skips it otherwise); torch's fake tensors and hooks are not public interfaces, so another version
than the pinned one may need changes here.
"""
import ctypes
import importlib.util
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from traceback import extract_stack

# On fake tensors autograd still asks whether there is a GPU, and for its stream: the least that answers.
PRETEND = """
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
namespace at {
struct CUDAHooks : CUDAHooksInterface {
  CUDAHooks(CUDAHooksArgs) {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
};
using c10::Registerer;
REGISTER_CUDA_HOOKS(CUDAHooks)
}
namespace c10::impl {
struct Guard : NoOpDeviceGuardImpl<DeviceType::CUDA> {
  Stream getStream(Device) const noexcept override { return Stream(Stream::DEFAULT, {DeviceType::CUDA, 0}); }
};
C10_REGISTER_GUARD_IMPL(CUDA, Guard)
}
"""
TORCH = Path(importlib.util.find_spec("torch").origin).parent
if (TORCH / "lib/libtorch_cuda.so").exists():
    sys.exit("skipped: this torch has CUDA of its own")
with tempfile.TemporaryDirectory() as folder:
    command = f"g++ -xc++ - -shared -fPIC -std=c++20 -ltorch_cpu -lc10 -I{TORCH}/include -L{TORCH}/lib"
    subprocess.run([*command.split(), f"-Wl,-rpath,{TORCH}/lib", f"-o{folder}/pretend.so"], input=PRETEND, text=True,
                   check=True)
    ctypes.CDLL(f"{folder}/pretend.so")  # before torch, which asks once

import numpy as np  # noqa: E402
import torch  # noqa: E402
from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torch.utils._pytree import tree_leaves  # noqa: E402

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train_gpt  # noqa: E402

SIZES = dict(num_layers=2, model_dim=64, num_heads=4, num_kv_heads=2, bigram_vocab_size=64, bigram_dim=8,
             train_seq_len=64, micro_batch_tokens=128, gptq_batches=1, ttt_chunk_tokens=256, ttt_muon=0.1,
             compute_dtype="bfloat16")
READ = "aten::_local_scalar_dense"


class Waits(TorchDispatchMode):
    """Counts by function of train_gpt.py where the host waits: numbers read from the device, copies to and from it."""

    def __init__(self):
        super().__init__()
        self.found = Counter()

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if op is torch.ops.aten._fused_sgd_.default:
            return None  # the one operation here for which torch has no shape function
        reads = op is torch.ops.aten._local_scalar_dense.default
        result = True if reads else op(*args, **kwargs or {})
        tensors = [t for t in tree_leaves((args, kwargs, result))
                   if isinstance(t, torch.Tensor) and (reads or t.ndim)]
        if any(t.is_cuda for t in tensors) and (reads or len({t.device for t in tensors}) > 1):
            names = [frame.name for frame in extract_stack() if frame.filename == train_gpt.__file__]
            self.found[f"{names[-1]}: {op.name()}"] += 1
        return result


class OneByteEach:
    def count(self, tokens):
        return np.ones(len(tokens) - 1)


class Stream:
    """The same two micro-batches for ever."""

    def __init__(self, tokens):
        self.batch = [(tokens[:, :-1], tokens[:, 1:])] * 2

    def micro_batches(self, step, dist):
        return self.batch


def stages(cfg: train_gpt.Config):
    """Name, work and expected waits of each stage."""
    gpu, model, dist, length = torch.device("cuda:0"), train_gpt.GPT(cfg), train_gpt.Dist(), cfg.train_seq_len
    for module in model.modules():  # what model.to(gpu) does, for fakes
        for slots in (module._parameters, module._buffers):
            slots.update({name: t.detach().to(gpu).requires_grad_(t.requires_grad)
                          for name, t in slots.items() if t is not None})
    dist.on_gpu, dist.device = True, gpu
    run = train_gpt.Run(cfg, dist, train_gpt.Log(None), model, train_gpt.token_nll, train_gpt.FlatGradients(model))
    opts = train_gpt.build_optimizers(model, cfg, dist)
    stream = Stream(torch.zeros(2, length + 1, dtype=torch.int64, device=gpu))
    average, sgd = train_gpt.WeightAverage(model), torch.optim.SGD(model.parameters(), 0.1, 0.9, fused=True)
    scorer = train_gpt.Evaluator(run, np.zeros(20 * length + 1, np.uint16), OneByteEach())
    matrix, steps, moment = (torch.zeros(size, device=gpu) for size in ((96, 64), (16, 96), (64, 64)))
    yield "training", lambda: [train_gpt.train_step(run, stream.batch, opts, 1.0, 0.9) for _ in range(2)], {}
    yield "averaging", lambda: (average.add(), average.apply()), {}
    copies = {"score: aten::_to_copy": 2}  # windows there, nats back
    yield "scoring", lambda: scorer.score_first(8 * length, 4, 8), copies
    yield "adapting", lambda: scorer.adapt(0, 8 * length, sgd), {}
    yield "digest", lambda: train_gpt.digest(model), {f"digest: {READ}": 1}
    matrices = sum(bits < 16 for _, _, bits in train_gpt.tensor_table(cfg))
    finite = {f"error_moments: {READ}": matrices}, {f"quantize: {READ}": 1}  # are the sums, is the inverse?
    yield "moments", lambda: train_gpt.error_moments(run, stream, 0, 1e9), finite[0]
    yield "GPTQ", lambda: train_gpt.quantize(matrix, steps, 5, moment), finite[1]


if __name__ == "__main__":
    torch.cuda.synchronize = lambda *_: None
    torch.Tensor.numpy = lambda t: np.zeros(tuple(t.shape), str(t.dtype).removeprefix("torch."))
    with FakeTensorMode(allow_non_fake_inputs=False):
        for name, work, expected in stages(train_gpt.replace(train_gpt.Config(), **SIZES)):
            with Waits() as waits:
                work()
            print(f"{name}: the host waits at {dict(waits.found)}")
            if waits.found != expected:
                sys.exit(f"error: {name}: the host waits at {dict(waits.found)}, expected {expected}")
