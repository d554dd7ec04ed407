"""Train a language model in ten minutes, store it in 16 MB, score it in bits per byte - validly.

    torchrun --standalone --nproc_per_node=8 train_gpt.py  # the record setting: 8xH100, 600 s, FineWeb
    ARTIFACT=logs/RUN_ID/artifact.bin torchrun ...  # evaluate only

Settings: environment variables; results: logs/RUN_ID/. Model: openai/parameter-golf PR #264's; recipe: README.md.
Shapes: B sequences, T positions, D model_dim, H query heads, K key/value heads, E head_dim, V vocabulary,
L sequence length, S stride of the W scoring windows, C targets in a chunk, N targets in all.
"""

import faulthandler
import os
import re
import shutil
import signal
import sys
import sysconfig
import timeit
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from hashlib import sha256
from json import dumps, loads
from math import cos, inf, pi, prod
from pathlib import Path
from time import monotonic, sleep, strftime

import numpy as np
import sentencepiece as spm
import torch
import torch.nn.functional as F
import zstandard as zstd
from torch import distributed as comm, nn, optim
from torch.distributed.elastic.multiprocessing.errors import record
from torch.nn.attention import SDPBackend, sdpa_kernel

# ---- Settings

class UserError(ValueError):
  """What the user can fix: the thing, its value, the remedy."""

def refuse(wrong, why=""):
  if wrong:
    raise UserError(why or "; ".join(wrong))

@dataclass(frozen=True)
class Config:
  """The record's values: see README.md."""
  # Data and run
  data_path = "data/datasets/fineweb10B_sp1024"
  tokenizer_path = "data/tokenizers/fineweb_1024_bpe.model"
  run_id = ""
  val_nll_path = ""
  resume = ""
  checkpoint_every_seconds = 90.0
  checkpoint_every_steps = 0
  preflight_only = False
  seed = 1337  # fixed for RESUME from here: main's [8:]
  # Model
  vocab_size = 1024
  num_layers = 11
  model_dim = 512
  num_heads = 8
  num_kv_heads = 4
  mlp_mult = 3.0
  bigram_vocab_size = 2048
  bigram_dim = 64
  qk_gain_init = 4.0
  logit_softcap = 30.0
  rope_base = 10000.0
  relu_slope = 0.5
  xsa_last_n = 11
  # Training
  train_seq_len = 2048  # L
  train_batch_tokens = 786_432
  iterations = 20_000
  max_wallclock_seconds = 600.0
  shuffle = True
  warmup_steps = 20
  warmdown_iters = 3000
  val_loss_every = 1000
  val_batch_size = 524_288
  train_log_every = 50
  # Optimiser
  matrix_lr = 0.02
  scalar_lr = 0.02
  tied_embed_lr = 0.03
  muon_momentum = 0.97
  muon_momentum_warmup_start = 0.92
  muon_momentum_warmup_steps = 1500
  muon_backend_steps = 5
  muon_row_norm = True
  weight_decay = 0.04
  grad_clip_norm = 0.3
  # Averaging
  swa_enabled = True
  swa_start_frac = 0.2
  swa_every = 50
  # Artifact
  embed_bits = 6
  gptq_batches = 16
  max_artifact_bytes = 16_000_000
  # Evaluation; ttt: test-time training
  artifact = ""
  eval_stride = 64  # S
  eval_batch_seqs = 32
  max_val_tokens = 0
  eval_plain = False
  eval_max_seconds = 600.0
  ttt_enabled = True
  ttt_lr = 0.002
  ttt_momentum = 0.9
  ttt_muon = 0.0
  ttt_epochs = 3
  ttt_chunk_tokens = 32_768  # C
  ttt_grad_clip = 1.0
  ttt_max_chunks = -1
  # Machine: see settle
  device = "auto"
  compute_dtype = "auto"
  attention = "auto"
  compile = "auto"
  micro_batch_tokens = 0
  deterministic = False
  __annotations__ = {name: type(default) for name, default in vars().items() if name[0] != "_"}  # for dataclass

  @classmethod
  def from_env(cls, env):
    known = {name.upper(): kind for name, kind in cls.__annotations__.items()}
    values, problems = {}, []
    for name, text in env.items():
      if kind := known.get(name):
        try:
          values[name.lower()] = bool(["0", "1"].index(text)) if kind is bool else kind(text)
        except ValueError:
          problems.append(f"{name}={text!r}: must be {ACCEPTED[kind]}")
      elif near := [other for other in known if within_edits(name, other, 2)]:
        problems.append(f"{name}={text!r}: unset it, or did you mean {near[0]}?")
    if int(env.get("TORCHELASTIC_MAX_RESTARTS", 0)):
      values.setdefault("resume", "auto")
    cfg = cls(**values)
    refuse(problems + cfg.problems() * (not cfg.artifact))  # else in main
    return cfg

  def problems(self):
    """The broken rules."""
    value = vars(self)
    rules = [(name, 0 < value[name] < 2**31, "be positive, below 2**31") for name in POSITIVE]
    rules += [(name, -(name == "ttt_max_chunks") <= x < 2**31, "be from 0 on, below 2**31")
      for name, x in value.items() if name not in POSITIVE and not isinstance(x, str)]
    if all(holds for _, holds, _ in rules):  # the rest divides by these
      length, nll = self.train_seq_len, Path(self.val_nll_path)
      rules += [(name, value[name] % length == 0, f"be a multiple of TRAIN_SEQ_LEN={length}")
        for name in ("train_batch_tokens", "micro_batch_tokens", "ttt_chunk_tokens")]
      rules += [(name, x < 1, "be below 1") for name, x in value.items() if name.endswith(("momentum", "start"))]
      rules += [(name, str(value[name]) in known.split(), f"be one of {known}") for name, known in CHOICES.items()]
      rules += [
        ("vocab_size", self.vocab_size <= 65536, "be at most 65536: uint16"),
        ("train_seq_len", length <= 16384, "be at most 16384: its mask"),
        ("model_dim", self.model_dim % (2 * self.num_heads) == 0, "be an even multiple of NUM_HEADS"),
        ("num_heads", self.num_heads % self.num_kv_heads == 0, "be a multiple of NUM_KV_HEADS"),
        ("mlp_mult", self.mlp_mult * self.model_dim >= 1, "leave the MLP a width"),
        ("bigram_vocab_size", self.bigram_vocab_size >= 2, "be at least 2"),
        ("eval_stride", length % self.eval_stride == 0, f"divide TRAIN_SEQ_LEN={length}"),
        ("max_val_tokens", not 0 < self.max_val_tokens < length, f"be 0 or at least {length}"),
        ("run_id", self.run_id or not self.resume, "name the run that RESUME continues"),
        ("run_id", re.fullmatch(r"(\w[\w.+-]*)?", self.run_id), "be letters, digits, _.+-; no .+- first"),
        ("val_nll_path", not nll.name or nll.suffix == ".npy" and nll.parent.is_dir(), "be .npy in a folder"),
      ]
    return [f"{name.upper()}={value[name]}: must {rule}" for name, holds, rule in rules if not holds]

ACCEPTED = {int: "a whole number", float: "a number", bool: "0 or 1"}
DTYPES = dict(bfloat16=torch.bfloat16, float32=torch.float32)
CHOICES = dict(device="auto cuda cpu", attention="auto fa3 cudnn flash products", compile="auto 0 1 blocks",
  compute_dtype="auto bfloat16 float32", embed_bits="6 8 16")
MODEL_SETTINGS = """relu_slope xsa_last_n vocab_size num_layers model_dim num_heads num_kv_heads mlp_mult
  bigram_vocab_size bigram_dim logit_softcap rope_base train_seq_len embed_bits""".split()
POSITIVE = MODEL_SETTINGS[2:] + """train_batch_tokens iterations val_batch_size train_log_every muon_backend_steps
  swa_every max_artifact_bytes eval_stride eval_batch_seqs ttt_chunk_tokens""".split()

def within_edits(a, b, edits):
  """Whether so many edits of a character turn a into b."""
  while a and b and a[0] == b[0]:
    a, b = a[1:], b[1:]
  tries = (a[1:], b[1:]), (a[1:], b), (a, b[1:])
  return a == b or edits > 0 and any(within_edits(*pair, edits - 1) for pair in tries)

# ---- Ranks and log
# Ranks hold the same weights, share work, gradients and rank 0's clock.
watchdog = partial(faulthandler.dump_traceback_later, exit=True)

class Dist:
  """This rank, its device, all communication."""
  patience, worked, signal, stop = 0, 24.0, 0, 0
  def __init__(self, device="cpu", env={}):
    names = "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"
    self.rank, self.world_size, local_rank, local_size = (int(env.get(name, "SIZE" in name)) for name in names)
    self.is_master, self.since = self.rank == 0, monotonic()
    self.on_gpu = device == "cuda" or device == "auto" and torch.cuda.is_available()
    self.device = torch.device(f"cuda:{local_rank}" if self.on_gpu else "cpu")
    if self.on_gpu:
      gpus = torch.cuda.device_count()
      refuse(local_size > gpus, f"{local_size} processes on {gpus} GPUs: lower --nproc_per_node, or set DEVICE=cpu")
      torch.cuda.set_device(self.device)
      self.worked = 300.0  # caches differ by GPU: others may compile
    elif local_size > 1:  # torchrun's OMP_NUM_THREADS=1 leaves cores idle
      torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // local_size))
    if self.world_size > 1:  # gloo: hosts' decisions bypass GPUs
      faulthandler.register(signal.SIGTERM, chain=True)  # torchrun's to a rank that hangs
      store, rank, size = next(comm.rendezvous("env://"))
      comm.init_process_group("cpu:gloo,cuda:nccl" if self.on_gpu else "gloo", rank=rank, world_size=size,
        store=comm.PrefixStore(env.get("TORCHELASTIC_RESTART_COUNT", ""), store))  # else addresses of the dead

  def mine(self, items):
    return items[self.rank :: self.world_size]

  def expect(self, seconds=0):
    """Until the next call; a rank that hangs shows where and ends."""
    self.patience, self.worked, self.since = min(seconds, 1e9), 24.0, monotonic()
    watchdog(self.patience or 1e9)

  def meet(self, collective, *args):
    """Waits 5 s longer than expected, so that who hangs ends first; if nothing is, 24 s or as long as this rank
    worked alone: rank 0 names them."""
    self.worked = max(self.worked, monotonic() - self.since)
    watchdog((self.patience or self.worked) + 5)
    try:
      if self.world_size > 1 > self.patience:
        comm.group.WORLD.monitored_barrier(self.worked, True)
      collective(*args)
    except RuntimeError:
      sleep(min(self.rank + self.patience, 2))  # first who ended, or rank 0, which knows
      raise
    watchdog(self.patience or 1e9)
    self.since = monotonic()

  def sum_(self, tensor):
    if self.world_size > 1:
      self.meet(comm.all_reduce, tensor)
    return tensor

  def gather(self, part):
    """All ranks' parts in order, and what waits."""
    if self.world_size == 1:
      return part, lambda: None
    whole = part.new_empty(self.world_size * len(part), *part.shape[1:])
    return whole, partial(self.meet, comm.all_gather_into_tensor(whole, part, async_op=True).wait)

  def from_master(self, make):
    box = [make() if self.is_master else None]
    if self.world_size > 1:
      self.meet(comm.broadcast_object_list, box)
    return box[0]

  def now(self):
    """Rank 0's clock, s, after the device's work; also its signal."""
    if self.on_gpu:
      self.meet(torch.cuda.synchronize)
    seconds, self.stop = self.from_master(lambda: (monotonic(), self.signal))
    return seconds

  def catch_signals(self):
    for number in (signal.SIGTERM, signal.SIGINT):
      signal.signal(number, lambda number, _: setattr(self, "signal", number))

class Log:
  """Lines for people (console, train.log), records for programs (metrics.jsonl: `keep` bytes stay)."""
  def __init__(self, folder, keep=0):
    self.folder, self.start = folder, monotonic()
    if folder:
      folder.mkdir(parents=True, exist_ok=True)
      self.text, self.records = (open(folder / name, "a" if keep else "w", 1)
        for name in ("train.log", "metrics.jsonl"))
      self.records.truncate(min(keep, self.records.tell()))

  def __call__(self, line="", event="", *, console=True, **record):
    if line and self.folder:
      print(line, file=self.text)
      if console:
        print(line, flush=True)
    if event and self.folder:
      print(dumps(dict(event=event, since_start_s=monotonic() - self.start) | record), file=self.records)

# ---- Data
# Shards: 256 little-endian int32 (magic, version, token count, zeros), then uint16 tokens.
SHARD_MAGIC, SHARD_VERSION, SHARD_HEADER_INTS = 20240520, 1, 256
GET_DATA = "run python data/build_dataset.py or data/cached_challenge_fineweb.py, set what it prints"

def plain(path):
  path = Path(path)
  refuse(not path.is_file() or path.stat().st_size >> 33, f"{path}: no such file, or over 8 GiB")  # pipes have no end
  return path

def open_shard(path, vocab_size):
  """uint16 [tokens], memory-mapped; checks header, length, a million ids."""
  header, size, start = np.fromfile(plain(path), "<i4", 3).tolist(), path.stat().st_size, 4 * SHARD_HEADER_INTS
  expected = [SHARD_MAGIC, SHARD_VERSION, (size - start) / 2]
  refuse(size <= start or header != expected, f"{path}: {size} bytes, header {header}: delete it and {GET_DATA}")
  tokens = np.memmap(path, "<u2", "r", start)
  for first in np.linspace(0, max(len(tokens) - 2**16, 0), 16, dtype=int):
    check_ids(np.fromfile(path, "<u2", 2**16, offset=start + 2 * first), vocab_size, path)
  return tokens

def check_ids(tokens, vocab_size, source):
  highest = int(tokens.max())
  refuse(highest >= vocab_size, f"{source}: token id {highest} >= VOCAB_SIZE={vocab_size}: set the tokenizer's")
  return tokens

class TokenStream:
  def __init__(self, cfg, split):
    self.config, self.folder = cfg, Path(cfg.data_path)
    self.shards = [open_shard(p, cfg.vocab_size) for p in sorted(self.folder.glob(f"fineweb_{split}_*.bin"))]
    self.starts = np.cumsum([0, *map(len, self.shards)])
    self.num_tokens = int(self.starts[-1])
    refuse(self.num_tokens <= cfg.train_seq_len, f"DATA_PATH={self.folder}: {self.num_tokens} tokens in "
      f"{len(self.shards)} fineweb_{split}_*.bin, less than a sequence: {GET_DATA}")
    self.order = np.random.default_rng(cfg.seed).permutation(self.num_tokens // cfg.train_seq_len)

  def read(self, start, count):
    """Tokens [start, start + count), uint16; the first follows the last."""
    parts, end = [], start + count
    while start < end:
      position = start % self.num_tokens
      index = np.searchsorted(self.starts, position, "right") - 1
      shard = self.shards[index]
      changed = os.path.getsize(shard.filename) != shard.offset + shard.nbytes
      refuse(changed, f"{shard.filename} has changed: put it back")  # reading past its end kills
      parts.append(shard[position - self.starts[index] :][: end - start])
      start += len(parts[-1])
    return check_ids(np.hstack(parts), self.config.vocab_size, self.folder)

  def micro_batches(self, step, dist):
    """Inputs and targets, int64 [micro_batch_tokens / L, L], of this rank's share."""
    cfg, length = self.config, self.config.train_seq_len
    share = cfg.train_batch_tokens // length // dist.world_size
    first = (step * dist.world_size + dist.rank) * share
    for windows in np.arange(first, first + share).reshape(-1, cfg.micro_batch_tokens // length):
      if cfg.shuffle:
        windows = self.order.take(windows, mode="wrap")
      tokens = torch.from_numpy(np.stack([self.read(w * length, length + 1) for w in windows], dtype=int))
      if dist.on_gpu:
        tokens = tokens.pin_memory().to(dist.device, non_blocking=True)
      yield tokens[:, :-1], tokens[:, 1:]

class TokenBytes:
  """Bytes of text: the score does not depend on the tokenizer."""
  def __init__(self, tokenizer):
    ids = list(range(tokenizer.vocab_size()))
    pieces = tokenizer.id_to_piece(ids)
    lengths = [len(p.removeprefix("▁").replace("▁", " ").encode()) for p in pieces]
    self.control = np.any([tokenizer.is_control(ids), tokenizer.is_unknown(ids), tokenizer.is_unused(ids)], 0)
    self.leading_space = np.array([p.startswith("▁") for p in pieces])
    self.base = np.where(self.control, 0, np.where(tokenizer.is_byte(ids), 1, lengths))

  def count(self, tokens):
    """UTF-8 bytes of the targets tokens[1:], int64 [N]; none of control tokens or the leading space behind one."""
    target = tokens[1:]
    return self.base[target] + (self.leading_space[target] & ~self.control[tokens[:-1]])

def load_tokenizer(cfg):
  try:
    tokenizer = spm.SentencePieceProcessor(model_proto=plain(cfg.tokenizer_path).open("rb").read(1 << 24))
    size = tokenizer.vocab_size()
    tokenizer.id_to_piece(list(range(size)))  # all UTF-8?
  except (RuntimeError, OSError, ValueError) as error:
    raise UserError(f"TOKENIZER_PATH={cfg.tokenizer_path}: no SentencePiece model: {GET_DATA}") from error
  refuse(size != cfg.vocab_size, f"{cfg.tokenizer_path} has {size} tokens, VOCAB_SIZE={cfg.vocab_size}: make equal")
  return tokenizer

# ---- Model
# Pre-norm, weightless RMSNorm, no biases. Weights are fp32, cast where used. Gains act on norms' factors, scales on
# weights: their gradients read no activations.

def rms_norm(x, gain=1):
  power = x.float().square().mean(-1, keepdim=True)
  return (x * (gain * (power + 1.2e-7).rsqrt())).to(x.dtype)

class Linear(nn.Linear):
  def forward(self, x, scale=1):
    return F.linear(x, (self.weight.T * scale).T.to(x.dtype))

class BigramHash(nn.Module):
  """A hashed table of token pairs, projected to width D (PR #264)."""
  def __init__(self, cfg):
    super().__init__()
    self.last = cfg.bigram_vocab_size - 1  # row of position 0
    self.embed = nn.Embedding(cfg.bigram_vocab_size, cfg.bigram_dim)
    self.proj = Linear(cfg.bigram_dim, cfg.model_dim, bias=False)
    self.scale = nn.Parameter(torch.tensor(0.05))
  def forward(self, tokens, dtype):
    rows = ((36313 * tokens[:, 1:]) ^ (27191 * tokens[:, :-1])) % self.last
    return self.proj(self.embed(F.pad(rows, (1, 0), value=self.last)).to(dtype), self.scale)

class SmearGate(nn.Module):
  """Blends in the position before (modded-nanogpt; PR #264)."""
  def __init__(self, dim):
    super().__init__()
    self.gate = nn.Parameter(torch.zeros(dim))
  def forward(self, x):
    return x.lerp(F.pad(x, (0, 0, 1, -1)), self.gate.sigmoid().to(x.dtype))  # zeros before position 0

class Attention(nn.Module):
  """Causal grouped-query attention (arXiv:2305.13245), RoPE (arXiv:2104.09864), normalised q and k, query gain; XSA
  (PR #265): a head's output leaves out what points along the position's own value."""
  def __init__(self, cfg, layer):
    super().__init__()
    self.exclusive = layer >= cfg.num_layers - cfg.xsa_last_n
    dim = cfg.model_dim
    kv_dim = dim // cfg.num_heads * cfg.num_kv_heads
    self.c_q, self.c_k, self.c_v, self.proj = (Linear(dim, n, bias=False) for n in (dim, kv_dim, kv_dim, dim))
    self.q_gain = nn.Parameter(torch.full((cfg.num_heads, 1), cfg.qk_gain_init))
    self.back_end = BACK_ENDS.get(cfg.attention, attend_by_products)
  def forward(self, x, rope, mask, at, scale):
    if at is None:  # reads x once
      rope_q, weights = rope, (self.c_q.weight, self.c_k.weight, self.c_v.weight)
      qkv = F.linear(x, torch.cat(weights).to(x.dtype)).split([len(w) for w in weights], -1)
    else:
      rope_q, qkv = rope[:, at], (self.c_q(x.take_along_dim(at[..., None], 1)), self.c_k(x), self.c_v(x))
    q, k, v = (t.unflatten(-1, (-1, 2 * rope.size(-1))) for t in qkv)  # (B, S, H, E), (B, T, K, E)
    q, k = rotate(rms_norm(q, self.q_gain), rope_q), rotate(rms_norm(k), rope)
    y = self.back_end(q, k, v, mask) if at is None else attend_by_products(q, k, v, mask[at][:, None, None])
    if self.exclusive:
      own = v if at is None else v.take_along_dim(at[..., None, None], 1)
      own, y = F.normalize(own, dim=-1)[:, :, :, None], y.unflatten(2, (v.size(2), -1))  # (B, S, K, H/K, E)
      y = y - (y * own).sum(-1, keepdim=True) * own
    return self.proj(y.flatten(2), scale)

def rotate(x, rope):
  """x (B, T, heads, E): dimension i turns with i + E/2. rope: cos, sin (2, [B,] T, 1, E/2)."""
  cos, sin = rope.to(x.dtype)
  first, second = x.chunk(2, -1)
  return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)

def attend_by_products(q, k, v, mask):
  """q (B, S, H, E), k, v (B, T, K, E) -> (B, S, H, E). mask: causal_mask, or the queries' rows of it
  (B, 1, 1, S, T). Blocks of queries leave out most later keys: on CPUs faster than PyTorch's."""
  q = (q * q.size(-1) ** -0.5).unflatten(2, (k.size(2), -1)).permute(0, 2, 3, 1, 4)  # (B, K, H/K, S, E)
  k, v, size, parts = k.transpose(1, 2), v.transpose(1, 2), max(128, k.size(1) // 8), []
  for first, part in zip(range(0, q.size(3), size), q.split(size, 3)):
    end = k.size(2) if mask.ndim > 2 else first + size
    scores = (part.flatten(2, 3) @ k[:, :, :end].mT).unflatten(2, part.shape[2:4])  # (B, K, H/K, size, end)
    scores = scores + mask[..., first : first + size, :end]
    parts.append((scores.softmax(-1).flatten(2, 3) @ v[:, :, :end]).view(part.shape))
  return torch.cat(parts, 3).permute(0, 3, 1, 2, 4).flatten(2, 3)

def attend_by_sdpa(kernel, q, k, v, mask):
  q, k, v = (t.transpose(1, 2) for t in (q, k, v))
  with sdpa_kernel(kernel):
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)

def attend_by_fa3(q, k, v, mask):
  """FlashAttention 3 (arXiv:2407.08608)."""
  from flash_attn_interface import flash_attn_func
  y = flash_attn_func(q, k, v, causal=True)
  return y[0] if isinstance(y, tuple) else y

BACK_ENDS = dict(products=attend_by_products, flash=partial(attend_by_sdpa, SDPBackend.FLASH_ATTENTION),
  cudnn=partial(attend_by_sdpa, SDPBackend.CUDNN_ATTENTION), fa3=attend_by_fa3)

def causal_mask(cfg):
  """(L, L): 0, and -inf for keys after the query."""
  return torch.full([cfg.train_seq_len] * 2, -inf, dtype=DTYPES.get(cfg.compute_dtype)).triu(1)

def choose_attention(cfg, dist, log):
  """What is asked for, if it works; auto: products, on GPUs the fastest that agrees."""
  names, seconds, expected = [cfg.attention], {}, []
  if names == ["auto"]:
    names = list(BACK_ENDS)[: 1 + dist.on_gpu * (1 if cfg.deterministic else 3)]  # first 2 repeat bits
  mask = causal_mask(cfg).to(dist.device)
  q, k, v = (mask.new_empty(cfg.micro_batch_tokens // len(mask), len(mask), heads, cfg.model_dim // cfg.num_heads)
    .normal_().requires_grad_() for heads in (cfg.num_heads, cfg.num_kv_heads, cfg.num_kv_heads))
  for name in names:
    try:
      attend, found = compiled(BACK_ENDS[name]) if cfg.compile == "1" and dist.on_gpu else BACK_ENDS[name], []
      def work():
        y = attend(q, k, v, mask)
        found[:] = y, *torch.autograd.grad(y, (q, k, v), torch.ones_like(y))
        if dist.on_gpu:
          torch.cuda.synchronize()
      took = min(timeit.repeat(work, number=1, repeat=8))
      expected = expected or found
      refuse(not all((a - b).norm() <= 0.02 * b.norm() for a, b in zip(found, expected)), "other than products")
      seconds[name] = took
    except Exception as reason:
      log(f"attention {name}: {reason!r:.999}")
  refuse(not seconds, f"ATTENTION={cfg.attention} fails, see above")
  choice = dist.from_master(lambda: min(seconds, key=seconds.get))
  log(f"attention:{choice} of {seconds}", "attention", choice=choice, seconds=seconds)
  return choice

compiled = partial(torch.compile, dynamic=False, fullgraph=True)

class MLP(nn.Module):
  """Squared ReLU (Primer, arXiv:2109.08668), leaky as in PR #493."""
  def __init__(self, cfg):
    super().__init__()
    dim, hidden, self.slope = cfg.model_dim, int(cfg.mlp_mult * cfg.model_dim), cfg.relu_slope
    self.fc, self.proj = Linear(dim, hidden, bias=False), Linear(hidden, dim, bias=False)
  def forward(self, x, scale=1):
    return self.proj(F.leaky_relu(self.fc(x), self.slope).square(), scale)

class Block(nn.Module):
  def __init__(self, cfg, layer):
    super().__init__()
    ones = torch.ones(cfg.model_dim)
    self.attn, self.mlp = Attention(cfg, layer), MLP(cfg)
    self.attn_scale, self.mlp_scale = nn.Parameter(ones), nn.Parameter(ones.clone())
    self.resid_mix = nn.Parameter(torch.stack((ones, 0 * ones)))
  def forward(self, x, x0, rope, mask, at=None):
    """(B, T, D) -> (B, T, D), or (B, S, D) at positions (B, S)."""
    mix = self.resid_mix.to(x.dtype)
    x = mix[0] * x + mix[1] * x0
    attended = self.attn(rms_norm(x), rope, mask, at, self.attn_scale)
    x = (x if at is None else x.take_along_dim(at[..., None], 1)) + attended
    return x + self.mlp(rms_norm(x), self.mlp_scale)

class GPT(nn.Module):
  """int64 [B, T] -> logits fp32 [B, T, V], T <= L. U-Net skips join the halves of the blocks, last to first."""
  def __init__(self, cfg):
    super().__init__()
    self.config, self.dtype = cfg, DTYPES.get(cfg.compute_dtype, torch.float32)
    self.tok_emb = nn.Embedding(cfg.vocab_size, cfg.model_dim)
    self.bigram, self.smear = BigramHash(cfg), SmearGate(cfg.model_dim)
    self.blocks = nn.ModuleList(Block(cfg, layer) for layer in range(cfg.num_layers))
    self.skip_weights = nn.Parameter(torch.ones(cfg.num_layers // 2, cfg.model_dim))
    half = cfg.model_dim // cfg.num_heads // 2
    frequency = cfg.rope_base ** (-torch.arange(half) / half)
    angle = torch.arange(cfg.train_seq_len)[:, None, None] * frequency  # (L, 1, E/2)
    self.rope = nn.Buffer(torch.stack((angle.cos(), angle.sin())), persistent=False)
    self.mask = nn.Buffer(causal_mask(cfg), persistent=False)
    # Orthogonal matrices (arXiv:1312.6120), zero output projections, but the bigram's, which would never move: PR
    # #264's 1/sqrt(2 * layers).
    nn.init.normal_(self.tok_emb.weight, std=0.005)
    nn.init.zeros_(self.bigram.embed.weight)
    nn.init.orthogonal_(self.bigram.proj.weight, gain=(2 * cfg.num_layers) ** -0.5)
    for name, p in self.blocks.named_parameters():
      if ".weight" in name:
        (nn.init.zeros_ if ".proj." in name else nn.init.orthogonal_)(p)
  def embed(self, tokens):
    """int64 [B, T] -> (B, T, D)."""
    return self.smear(rms_norm(self.tok_emb(tokens).to(self.dtype) + self.bigram(tokens, self.dtype)))
  def hidden(self, tokens, at=None):
    """int64 [B, T] -> (B, T, D), or (B, S, D) at positions (B, S): the last block does less."""
    x0, num_skips, T = self.embed(tokens), len(self.skip_weights), tokens.size(1)
    rope, mask = self.rope[:, :T], self.mask[:T, :T]
    x, skips = x0.view_as(x0), []  # another object: one graph for all blocks
    for index, block in enumerate(self.blocks):
      if index >= num_skips and skips:
        x = x + self.skip_weights[index - num_skips].to(x.dtype) * skips.pop()
      x = block(x, x0, rope, mask, at if block is self.blocks[-1] else None)
      if index < num_skips:
        skips.append(x)
    return x
  def logits(self, x):
    cap = self.config.logit_softcap
    return cap * (F.linear(rms_norm(x), self.tok_emb.weight.to(x.dtype)).float() / cap).tanh()
  def nll(self, x, targets):
    return F.cross_entropy(self.logits(x).flatten(0, 1), targets.flatten(), reduction="none").view_as(targets)
  def forward(self, tokens):
    return self.logits(self.hidden(tokens))

def token_nll(model, tokens, targets, at=None):
  """Nats of each target: int64 [B, T] and [B, S] -> fp32 [B, S]."""
  return model.nll(model.hidden(tokens, at), targets)

# ---- Optimiser

class FlatGradients:
  """One buffer for all gradients; each .grad is a view, so no zero_grad()."""
  def __init__(self, model):
    params = list(model.parameters())
    self.flat = torch.zeros_like(nn.utils.parameters_to_vector(params))
    self.skipped = self.flat.new_zeros(2)  # steps in all, in a row
    for p, view in zip(params, self.flat.split([p.numel() for p in params])):
      p.grad = view.view_as(p)

  def reduce_and_clip(self, dist, max_norm):
    """Sums over ranks, limits the norm (0: no limit). Returns 0; 1 if not finite: all zero."""
    norm = dist.sum_(self.flat).norm()
    self.flat.mul_(((max_norm or inf) / (norm + 1e-6)).clamp(max=1.0)).nan_to_num_(0, 0, 0)
    return 1 - norm.isfinite().float()

def newton_schulz(x, steps):
  """[n, rows, cols], most singular values moved to 0.7 to 1.2 in 5 steps: Muon's iteration (Keller Jordan et al.,
  kellerjordan.github.io/posts/muon)."""
  tall = x.size(-2) > x.size(-1)
  x = x.mT if tall else x  # for a small Gram matrix
  x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
  for _ in range(steps):
    gram = x @ x.mT
    x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315), x, beta=3.4445)
  return x.mT if tall else x

class Muon(optim.Optimizer):
  """Nesterov momentum, orthogonalised; for matrices:
  W <- (1 - lr * weight_decay) * W - lr * sqrt(max(1, rows / cols)) * newton_schulz(g + momentum * buffer),
  its input's rows normalised if row_norm (PR #1260)."""
  def __init__(self, params, lr, momentum, weight_decay=0.0, steps=5, *, row_norm=False, dist=Dist(),
    dtype=torch.float32):
    super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay, steps=steps))
    self.row_norm, self.dist, self.dtype = row_norm, dist, dtype

  @torch.no_grad()
  def step(self):
    for group in self.param_groups:
      params = group["params"]
      for p in params:
        self.state[p] = self.state[p] or dict(buffer=torch.zeros_like(p))
      grads, buffers = [p.grad for p in params], [self.state[p]["buffer"] for p in params]
      keep = 1 - getattr(self, "found_inf", 0)  # AdamW's: 1 leaves all as it is, gradients being 0
      torch._foreach_mul_(buffers, group["momentum"] ** keep)
      torch._foreach_add_(buffers, grads)
      updates = self.orthogonalize(torch._foreach_add(grads, buffers, alpha=group["momentum"]), group["steps"], keep)
      torch._foreach_mul_(params, (1 - group["lr"] * group["weight_decay"]) ** keep)
      torch._foreach_add_(params, updates, alpha=-group["lr"])

  def orthogonalize(self, updates, steps, factor=1.0):
    """Makes updates orthogonal, times factor. Each rank does its share of a shape while others travel."""
    started = []
    for rows, cols in dict.fromkeys(u.shape for u in updates):
      alike = [u for u in updates if u.shape == (rows, cols)]
      share = -(-len(alike) // self.dist.world_size)
      mine = alike[self.dist.rank * share :][:share]
      part = updates[0].new_zeros(share, rows, cols, dtype=self.dtype)
      if mine:
        x = torch.stack(mine)
        x = F.normalize(x, dim=-1) if self.row_norm else x
        part[: len(mine)] = newton_schulz(x.to(self.dtype), steps)
      started.append((alike, max(1, rows / cols) ** 0.5, *self.dist.gather(part)))
    for alike, scale, whole, wait in started:
      wait()
      torch._foreach_copy_(alike, list(whole[: len(alike)]))
      torch._foreach_mul_(alike, factor * scale)
    return updates

def build_optimizers(model, cfg, dist):
  matrices, tables, controls = [], [], []
  for name, p in model.named_parameters():
    (tables if "emb" in name else matrices if ".weight" in name else controls).append(p)
  muon = Muon(matrices, cfg.matrix_lr, cfg.muon_momentum, cfg.weight_decay, cfg.muon_backend_steps,
    row_norm=cfg.muon_row_norm, dist=dist, dtype=model.dtype)
  adamw = optim.AdamW([dict(params=tables, lr=cfg.tied_embed_lr), dict(params=controls, lr=cfg.scalar_lr)],
    betas=(0.9, 0.95), weight_decay=cfg.weight_decay, fused=True)
  for group in muon.param_groups + adamw.param_groups:
    group["base_lr"] = group["lr"]
  return [muon, adamw]

# ---- Schedule
# The budget nearer its end decides, steps or seconds. Shares of it, 0.58 and 0.29, keep the shape of PR #264's run
# (3000 and 1500 of 5197 steps) on slower machines.

def lr_factor(step, elapsed_s, cfg):
  """Share of the base learning rates: 1, then linear to 0 at a budget's end."""
  factor = 1.0
  for done, budget in ((step, cfg.iterations), (elapsed_s, cfg.max_wallclock_seconds or inf)):
    warmdown = min(cfg.warmdown_iters * (done / max(step, 1)), 0.58 * budget)
    factor = min(factor, (budget - done) / max(warmdown, 1e-9))
  return max(factor, 0.0)

def muon_momentum(step, elapsed_s, cfg):
  steps = min(cfg.muon_momentum_warmup_steps, 0.29 * cfg.iterations)
  progress = max(step / max(steps, 1e-9), elapsed_s / (0.29 * (cfg.max_wallclock_seconds or inf)))
  start = cfg.muon_momentum_warmup_start
  return start + min(progress, 1.0) * (cfg.muon_momentum - start)

# ---- Checkpoints
# Magic, SHA-256 of the rest; size (uint32) of JSON header; header; tensors.
CHECKPOINT_MAGIC = b"PGOLFCKP\x01"

def due(step, every):
  return every and step % every == 0

def state_of(model, opts, *more):
  """All that a run goes on from, changed in place only; RNG, then fp64: aligned."""
  slots = [slot for opt in opts for slots in opt.state.values() for slot in slots.values()]
  return [torch.get_rng_state(), *map(torch.as_tensor, more), *model.state_dict().values(), *slots]

class Checkpoints:
  """A run's last two states, which rank 0 writes in a thread, aside until whole. facts must not change."""
  def __init__(self, cfg=Config(), dist=Dist(), facts={}):
    self.config, self.dist, self.facts, self.folder = cfg, dist, facts, Path("logs", cfg.run_id)
    self.header, self.log, self.saved, self.thread = {}, Log(None), monotonic(), ThreadPoolExecutor(1)
    self.writing = self.thread.submit(int)

  def files(self):
    return sorted(self.folder.glob("checkpoints/*.bin"))

  def find(self):
    """Header of what RESUME asks for (auto: the newest whole one) or {}."""
    resume, problems = self.config.resume, []
    for path in self.files()[::-1] if resume == "auto" else [Path(resume)] * bool(resume):
      try:
        text, state = split_sized(unseal(np.memmap(plain(path), mode="r"), CHECKPOINT_MAGIC))
        header = loads(bytes(text)) | dict(path=str(path), damaged=problems)
        others = [f"{name}={there!r:.40} there, {here!r} here" for name, here in self.facts.items()
          if (there := header["facts"].get(name)) != here]
        header["phase"].lower(), range(header["records"])
      except Exception as error:
        problems.append(f"{path}: {error!s:.200}")
        continue
      refuse(others, f"{path} is another run's, use its settings and script: {', '.join(others)}")
      self.data = state
      return header
    refuse(not resume and self.files() and not (self.folder / "submission.json").exists(),
      f"{self.folder} has an unfinished run: RESUME=auto continues it, another RUN_ID does not")
    refuse(problems)
    return {}

  def begin(self, phase, state):
    """What is saved from here on (phase "": never), set to what a checkpoint of this phase holds."""
    self.phase, self.state = phase, state
    if phase == self.header.get("phase"):
      data = self.dist.from_master(lambda: torch.tensor(self.data))
      try:
        for tensor, piece in zip(state, data.split([t.nbytes for t in state])):
          tensor.copy_(piece.view(tensor.dtype).view_as(tensor))
        torch.set_rng_state(state[0])
        clock = torch.cat([t.flatten() for t in state if t.dtype == torch.float64])
        refuse(not ((0 <= clock) & (clock < 2**31)).all() or clock[0] % 1, "an impossible clock")
      except (RuntimeError, UserError) as error:
        raise UserError(f"{self.header['path']}: {error!s:.100}: resume another") from error

  def reached(self, count, final=False):
    """Saves the state if it is time; ends after a signal."""
    cfg, dist, start = self.config, self.dist, monotonic()
    every_s, every, stop, patience = cfg.checkpoint_every_seconds, cfg.checkpoint_every_steps, dist.stop, dist.patience
    if waits := stop or final or due(count, every):  # for the disk
      dist.expect(600)
    late = self.writing.done() and 0 < every_s <= start - self.saved
    if (stop or late or waits and every_s + every) and self.phase and self.log.folder:
      self.writing.result()
      self.saved = start
      self.state[0] = torch.get_rng_state()
      parts = [t.to("cpu", copy=True).flatten().view(torch.uint8).numpy() for t in self.state]
      header = dumps(dict(facts=self.facts, phase=self.phase, records=self.log.records.tell())).encode()
      self.writing = self.thread.submit(self.write, f"{self.phase}_{count:08}.bin", [sized(header), *parts])
      self.log("", "checkpoint", count=count, seconds=monotonic() - start)
    if stop or final:
      self.writing.result()
    if waits:
      dist.now()
      dist.expect(patience)
    if stop:
      raise UserError(f"stopped by {signal.Signals(stop).name}")

  def write(self, name, parts):
    folder = self.folder / "checkpoints"
    folder.mkdir(exist_ok=True)
    checksum = sha256()
    for part in parts:
      checksum.update(part)
    write_whole(folder / name, [CHECKPOINT_MAGIC, checksum.digest(), *parts])
    for old in self.files()[:-2]:
      old.unlink()

def sized(data):
  return len(data).to_bytes(4, "little") + data

def split_sized(data, most=1 << 20):
  end = 4 + min(int.from_bytes(data[:4], "little"), most)
  return data[4:end], data[end:]

def write_whole(path, parts):
  """Nothing has this name before all of it is on the disk."""
  with open(path.with_name("part"), "wb") as file:
    file.writelines(parts)
    file.flush()
    os.fsync(file.fileno())
  os.replace(file.name, path)

# ---- Training
CLOCK_STEPS = 10

class Run:
  """nll: token_nll or that compiled; reserve_s: training time for error_moments."""
  def __init__(self, *parts):
    self.config, self.dist, self.log, self.model, self.nll, self.grads = parts
    self.reserve_s, self.checkpoints = 0.0, Checkpoints()

  def weights_sha256(self, when):
    weights = b"".join(p.numpy(force=True) for p in self.model.parameters())
    found = [sha256(weights).hexdigest()] * self.dist.world_size
    if len(found) > 1:
      self.dist.meet(comm.all_gather_object, found, found[0])
    assert len(set(found)) == 1, f"the ranks hold different weights: {found}"
    self.log(f"weights_sha256 {when}: {found[0]} on {len(found)} ranks", "weights", when=when, sha256=found[0])
    return found[0]

def train_step(run, batch, opts, factor, momentum):
  """One optimiser step, none if gradients are not finite; this rank's part of the mean loss. Never waits for GPUs."""
  loss = 0.0
  run.grads.flat.zero_()
  for inputs, targets in batch:
    part = run.nll(run.model, inputs, targets).sum() / run.config.train_batch_tokens
    part.backward()
    loss += part.detach()
  skip = run.grads.reduce_and_clip(run.dist, run.config.grad_clip_norm)
  run.grads.skipped.add_(skip)[1] *= skip
  for opt in opts:
    for group in opt.param_groups:
      group.update(lr=group["base_lr"] * factor, momentum=momentum)
    opt.found_inf = skip
    opt.step()
  return loss

def train(run, stream, opts, validate):
  """Until steps or seconds run out: the weights' average, how far it came. The clock, for which the host waits, is read
  every CLOCK_STEPS steps, or second, near the end at each. No step starts that would end late at the slowest recent
  pace."""
  limit, average = run.config.max_wallclock_seconds - run.reserve_s, WeightAverage(run.model)
  cfg, dist = replace(run.config, max_wallclock_seconds=limit), run.dist
  clock = np.zeros(13)  # as last read: steps, snapshots, s, s a step at the last 10 readings
  run.checkpoints.begin("1_train", state_of(run.model, opts, clock, run.grads.skipped, *average.means))
  step, average.count, elapsed, pace = int(clock[0]), int(clock[1]), clock[2], clock[3:]
  start = dist.now() - elapsed  # validation moves it
  batch = list(stream.micro_batches(step, dist))
  while step < cfg.iterations and not 0 < limit < elapsed + max(pace):
    if step and due(step, cfg.val_loss_every):
      validate("val", step, elapsed)
      start = dist.now() - elapsed
    factor, momentum = lr_factor(step, elapsed, cfg), muon_momentum(step, elapsed, cfg)
    loss = train_step(run, batch, opts, factor, momentum)
    batch = list(stream.micro_batches(step + 1, dist))  # travels while the device works
    step, elapsed = step + 1, elapsed + pace[-1]
    if cfg.swa_enabled and factor < cfg.swa_start_frac and due(step, cfg.swa_every):
      average.add()
    ahead = step - clock[0]
    logging = step <= 5 or due(step, cfg.train_log_every) or step == cfg.iterations
    marked = logging or due(step, cfg.val_loss_every) or due(step, cfg.checkpoint_every_steps)
    near = 0 < limit < elapsed + 10 * ahead * max(pace)
    if not (marked or near or ahead * pace[-1] > 1 or ahead == CLOCK_STEPS):
      continue
    elapsed = dist.now() - start
    clock[:] = step, average.count, elapsed, *pace[1:], (elapsed - clock[2]) / ahead
    dist.expect(20 + 3 * CLOCK_STEPS * max(pace))
    skipped, in_a_row = run.grads.skipped.int().tolist()
    if logging:
      loss = dist.sum_(loss).item()
      run.log(f"step:{step}/{cfg.iterations} train_loss:{loss:.4f} train_time:{1000 * elapsed:.0f}ms "
        f"step_avg:{1000 * elapsed / step:.2f}ms" + f" skipped:{skipped}" * (skipped > 0), "train", step=step,
        train_loss=loss if loss == loss else None, train_s=elapsed, lr_factor=factor, muon_momentum=momentum,
        skipped=skipped)
    refuse(in_a_row >= 5, f"step {step}: no finite gradients in {in_a_row} steps: lower the learning rates")
    run.checkpoints.reached(step)
  run.checkpoints.reached(step, final=True)
  validate("val", step, elapsed)
  return average, dict(step=step, train_s=elapsed)

def warm_up(run, stream, opts, scorer):
  """Compiles all that will run, without validation tokens; restores weights and state bit for bit."""
  cfg, saved = run.config, deepcopy(run.model.state_dict())
  if stream:
    for step in range(cfg.warmup_steps):
      train_step(run, stream.micro_batches(step, run.dist), opts, 1.0, cfg.muon_momentum_warmup_start)
      run.log(f"warmup_step:{step + 1}/{cfg.warmup_steps}")
    start, most = run.dist.now(), cfg.max_wallclock_seconds / 8
    error_moments(run, stream, 0, most or inf)
    run.reserve_s = min(1.1 * (run.dist.now() - start), most)
  scorer.warm_up(stream)
  for opt in opts:
    opt.step()  # makes its state if it took none
    for slots in opt.state.values():
      torch._foreach_zero_(list(slots.values()))
  run.model.load_state_dict(saved)
  run.grads.skipped.zero_()
  run.log("warm-up done", "warm_up")

# ---- Averaging

class WeightAverage:
  """Mean of late weights (SWA, arXiv:1803.05407)."""
  def __init__(self, model):
    self.params, self.count = list(model.state_dict().values()), 0
    self.means = [torch.zeros_like(p) for p in self.params]

  def add(self):
    self.count += 1
    torch._foreach_lerp_(self.means, self.params, 1 / self.count)

  def apply(self):
    if self.count:
      torch._foreach_copy_(self.params, self.means)

# ---- Artifact
# Magic, SHA-256 of the rest; size (uint32) and zstd frame of JSON header (size, model settings, tensors), fp16 tensors
# and steps, classes, frequencies, states; entropy-coded values.
ARTIFACT_MAGIC = b"PGOLFGPT\x03"
STEP_CHOICES = 16  # for a row, 0.85 to 1.15 of the first guess
FIT_SLACK = 10_000  # bytes left unused
SLOTS = 2**14  # a class's slots go to its bytes by frequency

def tensor_table(cfg):
  """[name, shape, bits a weight] of each tensor; 16: fp16. Allocates nothing."""
  with torch.device("meta"):
    parameters = GPT(cfg).named_parameters()
  return [[name, list(p.shape), 5 if ".mlp." in name else cfg.embed_bits if "emb" in name else
    6 if ".weight" in name else 16] for name, p in parameters]

def error_moments(run, stream, first_step, seconds=inf):
  """What errors in a matrix cost: {name: (G^T G [cols, cols], row sums of G^2 [rows])}; G: gradients of micro-batches
  of GPTQ_BATCHES steps, or what fits into seconds. G^T G is Shampoo's factor (arXiv:1802.09568): GPTQ's X^T X, weighed
  by how each output matters."""
  grads = {name: p.grad for name, p in run.model.named_parameters() if ".weight" in name}
  moments = {name: (g.new_zeros(g.size(1), g.size(1)), g.new_zeros(g.size(0))) for name, g in grads.items()}
  start, elapsed, batches = run.dist.now(), 0.0, 0
  while batches < run.config.gptq_batches and elapsed / max(batches, 1) * (batches + 1) < seconds:
    for inputs, targets in stream.micro_batches(first_step + batches, run.dist):
      run.grads.flat.zero_()
      run.nll(run.model, inputs, targets).sum().backward()
      for g, (moment, power) in zip(grads.values(), moments.values()):
        moment.addmm_(g.T, g)
        power.add_(g.square().sum(1))
    elapsed, batches = run.dist.now() - start, batches + 1
  for tensor in sum(moments.values(), ()):
    run.dist.sum_(tensor)
  run.log(f"moments:{batches}_batches time:{1000 * elapsed:.0f}ms", "moments", batches=batches, seconds=elapsed)
  return moments if batches and all(power.isfinite().all() for _, power in moments.values()) else {}

def quantize(matrix, steps, bits, moment=None):
  """Rounds fp32 [rows, cols] to whole numbers of steps, of `bits` with sign: int8, and steps fp16 [rows].
  A row takes that of its steps [choices, rows] with the least error e: e^T e, or e^T moment e, and columns not yet
  rounded make up for the others (GPTQ, arXiv:2210.17323: damped by 1 %, descending diagonal, blocks of 128)."""
  span, order, inverse = 2 ** (bits - 1), torch.arange(matrix.size(1)), None
  if moment is not None:
    by_power = moment.diagonal().argsort(descending=True)
    damping = 0.01 * moment.diagonal().mean() * torch.eye(len(order), device=moment.device)
    with suppress(torch.linalg.LinAlgError):  # never lose a run over it
      lower = torch.linalg.cholesky(moment[by_power][:, by_power] + damping)
      upper = torch.linalg.cholesky(torch.cholesky_inverse(lower), upper=True)  # U^T U = inverse
      if upper.isfinite().all():
        order, inverse = by_power, upper
  steps = steps.clamp(max=65504).half().float()
  step = steps.flatten()
  divisor, error = step.where(step > 0, 1.0), 0.0
  rest = matrix.T[order].repeat(1, len(steps))  # (col, choice and row)
  values = torch.empty_like(rest, dtype=torch.int8)
  for start, block in zip(range(0, len(rest), 128), rest.split(128)):
    end, errors = start + 128, torch.empty_like(block)
    for i, column in enumerate(block):
      value = (column / divisor).round_().clamp_(-span, span - 1)
      values[start + i], errors[i] = value, column - value * step
      if inverse is not None:
        factor = inverse[start + i, start + i : end]
        block[i:].addr_(factor, errors[i].div_(factor[0]), alpha=-1)
    if inverse is not None:
      rest[end:] -= inverse[start:end, end:].T @ errors
    error += errors.square_().sum(0)
  best, rows = error.view_as(steps).argmin(0), torch.arange(len(matrix), device=matrix.device)
  values = values.view(-1, *steps.shape)[:, best, rows][order.argsort()].T.contiguous()
  return values, steps[best, rows].half()

def encode_artifact(state_dict, cfg, *, moments={}, limit=inf, dist=Dist()):
  """Fp32 weights' artifact, shorter than limit if possible; ranks share the work, all get it."""
  tensors, rows = {}, {}  # rows, by matrix: step that just reaches the largest weight, cost of an error, bits
  for name, _, bits in tensor_table(cfg):
    tensors[name] = w = state_dict[name].detach().float()
    refuse(not (w.half() if bits == 16 else w).isfinite().all(), f"{name} is not finite: lower the learning rates")
    if bits < 16:
      finest = w.abs().amax(1) / (2 ** (bits - 1) - 1)
      cost = finest**-2
      if moments:  # mean: for what batches did not show
        cost = (moments[name][1] + moments[name][1].mean()) / w.size(1)
      rows[name] = finest, cost, bits

  def make(price):
    stored, values = {name: w.half() for name, w in tensors.items()}, {}
    for name, (finest, cost, bits) in rows.items():  # step**2 = 2**(price / 1024 - 100) / cost: bits pay alike
      guess = torch.fmax(finest, (2 ** (price / 1024 - 100) * (price > 0) / cost).sqrt())  # fmax: 0 / 0 is nan
      w = tensors[name] * (guess < 65504)[:, None]  # zero where fp16 ends
      values[name], stored[name] = torch.zeros_like(w).char(), torch.zeros_like(guess).half()
      if name in dist.mine(list(rows)):
        steps = torch.linspace(0.85, 1.15, STEP_CHOICES, device=w.device)[:, None] * guess
        values[name], stored[name] = quantize(w, steps, bits, moments[name][0] if moments else None)
    for name in rows:
      dist.sum_(values[name])
      dist.sum_(stored[name])
    return dist.from_master(lambda: pack_artifact(cfg, stored, values))

  return largest_below(limit, make)

def largest_below(limit, make):
  """make(0) if shorter than limit, else the longest make(price) that is, to FIT_SLACK if possible, or the shortest."""
  low, high, best = 0, 200 * 1024, make(0)
  if len(best) < limit:
    return best
  best = make(high)
  while high - low > 1 and limit - len(best) > FIT_SLACK:
    price = (low + high) // 2
    if len(data := make(price)) < limit:
      high, best = price, max(best, data, key=len)
    else:
      low = price
  return best

def symbol_frequencies(symbols):
  """uint16 symbols [n], 256 * class + byte -> counts by class, scaled to sum SLOTS: uint16 [64, 256]."""
  counts = np.bincount(symbols, minlength=64 * 256).reshape(64, 256)
  total, spare = counts.sum(1).clip(1), SLOTS - (counts > 0).sum(1)
  scaled = (counts > 0) + counts * spare[:, None] // total[:, None]
  scaled[np.arange(64), counts.argmax(1)] += SLOTS - scaled.sum(1)
  return scaled.astype("<u2")

def entropy_encode(symbols, freqs):
  """States uint32 [lanes], words uint16. rANS (Duda, arXiv:1311.2540), interleaved (Giesen, arXiv:1402.3392): symbol i
  is lane i % lanes'. A lane's state in [2**16, 2**32) takes up its symbols, backwards; before it overflows, its lower
  half becomes a word."""
  lanes, freq = max(1, min(1024, len(symbols) // 2048)), freqs.ravel().astype("<u8")
  below = (freq.cumsum() - freq) % SLOTS
  states, words = np.full(lanes, 2**16, "<u8"), [np.empty(0, "<u2")]
  for start in range(0, len(symbols), lanes)[::-1]:
    symbol = symbols[start : start + lanes]
    state, share = states[: len(symbol)], freq[symbol]
    full = state >= share * (2**32 // SLOTS)
    words.append(state[full].astype("<u2"))
    state[full] >>= 16
    state[:] = state // share * SLOTS + state % share + below[symbol]
  return states.astype("<u4"), np.hstack(words[::-1])

def entropy_decode(classes, freqs, states, words):
  """The symbols' bytes, uint8; ValueError for what entropy_encode did not make."""
  refuse((freqs.sum(1) != SLOTS).any() or classes.max(initial=0) > 63, "wrong tables")
  refuse(len(states) != max(1, min(1024, len(classes) // 2048)), "wrong lanes")
  freq = freqs.ravel().astype("<u4")
  symbol = np.repeat(np.arange(64 * 256, dtype="<u2"), freq)
  rest = (np.arange(len(symbol)) - (freq.cumsum() - freq)[symbol]).astype("<u4")
  slots, states, used = classes.astype("<u4") * SLOTS, states.copy(), 0
  for start in range(0, len(slots), len(states)):
    slot = slots[start : start + len(states)]
    state = states[: len(slot)]
    slot += state % SLOTS
    state[:] = freq[symbol[slot]] * (state // SLOTS) + rest[slot]
    low = np.flatnonzero(state < 2**16)
    state[low] = state[low] << 16 | words[used : used + len(low)]  # if too few: see below
    used += len(low)
  refuse(used != len(words) or (states != 2**16).any(), "values do not come out even")
  return symbol[slots].astype(np.uint8)

def pack_artifact(cfg, stored, values):
  """values: int8 matrices; stored: fp16, a matrix's steps by row, or another tensor."""
  header = dumps(dict(config={name: getattr(cfg, name) for name in MODEL_SETTINGS}, tensors=tensor_table(cfg))).encode()
  flat = np.hstack([value.cpu().numpy().ravel() for value in values.values()])
  widths = np.hstack([np.full(*value.shape) for value in values.values()])
  # Rows with root mean squares within a quarter octave share frequencies: a class.
  power = np.add.reduceat(np.square(flat, dtype="<i4"), np.cumsum(widths) - widths) / widths
  classes = np.clip(np.round(2 * np.log2(power.clip(1e-9))) + 32, 0, 63).astype(np.uint8)
  symbols = np.repeat(classes.astype("<u2") << 8, widths) | flat.view(np.uint8)
  freqs = symbol_frequencies(symbols)
  states, words = entropy_encode(symbols, freqs)
  body = b"".join((sized(header), *(tensor.cpu().numpy() for tensor in stored.values()), classes, freqs, states))
  payload = sized(zstd.compress(body, 22)) + words.tobytes()
  return ARTIFACT_MAGIC + sha256(payload).digest() + payload

def unseal(data, magic):
  """What follows magic and checksum, if these are right."""
  found = bytes(data[:9])
  refuse(found != magic, f"begins with {found!r}, not {magic!r}")
  refuse(sha256(data[41:]).digest() != bytes(data[9:41]), f"{len(data)} bytes, fails its checksum: copy it again")
  return data[41:]

def unpack_artifact(data):
  """What pack_artifact got; UserError, before much is allocated, if anything is off."""
  try:
    frame, words = split_sized(unseal(data, ARTIFACT_MAGIC), inf)
    size = zstd.frame_content_size(frame)
    refuse(not 0 <= size < 1 << 26, f"a body of {size} bytes")
    text, body = split_sized(memoryview(zstd.decompress(frame)))
    header = loads(bytes(text))
    settings = {name: type(getattr(Config, name))(header["config"][name]) for name in MODEL_SETTINGS}
    length = settings["train_seq_len"]
    cfg = Config(**settings, train_batch_tokens=length, ttt_chunk_tokens=length, eval_stride=length)
    refuse(cfg.problems())
    refuse(300 * cfg.num_layers > len(text) or header["tensors"] != (table := tensor_table(cfg)), "other tensors")
    matrices = {name: shape for name, shape, bits in table if bits < 16}
    size = sum(map(prod, matrices.values()))
    refuse(size > 1 << 26, f"{size} values")
    halves = {name: shape if bits == 16 else shape[:1] for name, shape, bits in table}
    stored = np.frombuffer(body, "<f2", sum(map(prod, halves.values())))
    refuse(not np.isfinite(stored).all(), "numbers not finite")
    widths = np.hstack([np.full(*shape) for shape in matrices.values()])
    cuts = np.cumsum([stored.nbytes, len(widths), 2 * 64 * 256])
    _, classes, freqs, states = np.split(np.frombuffer(body, np.uint8), cuts)
    freqs, states, words = freqs.view("<u2").reshape(64, 256), states.view("<u4"), np.frombuffer(words, "<u2")
    flat = entropy_decode(np.repeat(classes, widths), freqs, states, words)
  except Exception as e:
    raise UserError(f"artifact is inconsistent ({e!s:.200}): use the script that wrote it") from e
  return cfg, tensors_of(stored, halves), tensors_of(flat.view(np.int8), matrices)

def tensors_of(numbers, shapes):
  parts = torch.tensor(numbers).split([prod(shape) for shape in shapes.values()])
  return {name: part.view(shapes[name]) for name, part in zip(shapes, parts)}

def decode_artifact(data):
  """Model settings, fp32 weights."""
  cfg, stored, values = unpack_artifact(data)
  weights = {name: tensor.float() for name, tensor in stored.items()}
  return cfg, weights | {name: value * weights[name][:, None] for name, value in values.items()}

# ---- Evaluation
# Chunks of C targets in order (PR #549), each scored with weights that saw only the artifact and earlier chunks; only
# then SGD trains on it. So a token's distribution depends only on the artifact and tokens before it, is normalised and
# final before any update that uses it: the challenge's conditions (issues #402, #677, #1017). PR #264 trained first.

def sliding_windows(num_targets, seq_len, stride):
  """Windows that score each target once: int64 [W, 3] of start (of seq_len inputs), first and end of scored targets,
  the last `stride`, in the first window all. Target p is token p + 1."""
  starts = np.arange(0, max(num_targets - seq_len + stride, min(num_targets, 1)), stride)
  first = np.where(starts, starts + seq_len - stride, 0)
  return np.stack((starts, first, np.minimum(starts + seq_len, num_targets)), 1)

def plan_chunks(num_targets, seq_len, stride, chunk_tokens):
  """Windows by chunk of their first scored target; as S divides L and L divides C, none straddles an edge."""
  windows = sliding_windows(num_targets, seq_len, stride)
  return np.split(windows, np.flatnonzero(np.diff(windows[:, 1] // chunk_tokens)) + 1)

def digest(model):
  """64 bits: the weights' bit patterns, mixed with their places, summed where they are."""
  weights = torch.cat([p.detach().flatten() for p in model.parameters()])
  x, odd = F.pad(weights, (0, len(weights) % 2)).view(torch.int64), 6364136223846793005  # Knuth's, for MMIX
  x = x + torch.arange(len(x), device=x.device) * odd
  return f"{((x ^ x >> 32) * odd).sum().item() % 2**64:016x}"

class Evaluator:
  """Scores the split's tokens in whole sequences, as the baseline does."""
  def __init__(self, run, tokens, token_bytes):
    cfg, length = run.config, run.config.train_seq_len
    self.run, self.dist, self.config, self.length = run, run.dist, cfg, length
    self.full_targets = (len(tokens) - 1) // length * length
    self.num_targets = min((cfg.max_val_tokens or len(tokens)) // length * length, self.full_targets)
    tokens = tokens[: self.num_targets + 1]
    self.bytes_before = np.pad(token_bytes.count(tokens).cumsum(), (1, 0))  # [N + 1]
    # Last windows read past the end.
    self.tokens = torch.from_numpy(np.pad(tokens, (0, length)).astype(int)).to(self.dist.device)
    self.offsets = torch.arange(length, device=self.dist.device)
    per_row = length * self.dist.world_size  # fixed: one graph
    self.plain = max(1, min(cfg.val_batch_size // per_row, -(-self.num_targets // per_row))), length
    self.adapt_rows = min(-(-cfg.ttt_chunk_tokens // per_row), cfg.micro_batch_tokens // length)
    self.epochs = cfg.ttt_epochs * cfg.ttt_enabled
    self.muon = build_optimizers(run.model, cfg, run.dist)[0]

  def loss_and_bpb(self, nats):
    """Nats a token, bits a byte of the first len(nats) targets."""
    total = nats.sum(dtype=float)
    return total / len(nats), total / np.log(2) / self.bytes_before[len(nats)]

  @torch.no_grad()
  def score(self, windows, rows, stride):
    """Nats of consecutive windows' targets, fp32. Ranks share the windows, `rows` at a time, each asked for the
    `stride` positions it scores; the split's first, which scores all, several times."""
    assert (windows[1:, 2] - windows[1:, 1] <= stride).all()
    start, begin, end = windows[0]
    count = windows[-1, 2] - begin
    pieces = [(start, first, min(first + stride, end)) for first in range(begin, end, stride)]
    mine = self.dist.mine(np.vstack((pieces, windows[1:])))
    padded = np.pad(mine, ((0, -len(mine) % rows), (0, 0)))  # score nothing
    nats = torch.zeros(count + 1, device=self.dist.device)  # last: not scored
    for batch in torch.from_numpy(padded).to(self.dist.device).view(-1, rows, 3):
      start, first, end = batch.T[..., None]
      positions = first + self.offsets[:stride]
      at = None if stride == self.length else (positions - start).clamp(max=self.length - 1)
      nll = self.run.nll(self.run.model, self.tokens[start + self.offsets], self.tokens[positions + 1], at)
      nats[torch.where(positions < end, positions - int(begin), count)] = nll
    return self.dist.sum_(nats[:count]).cpu().numpy()

  def score_first(self, count, rows, stride):
    return self.score(sliding_windows(count, self.length, stride), rows, stride)

  def validate(self, event, step, train_s, title=""):
    """Logs the loss without overlap or adaptation."""
    self.dist.expect()
    start, title = monotonic(), title or f"step:{step}/{self.config.iterations}"
    nats = self.score_first(self.num_targets, *self.plain)
    loss, bpb = self.loss_and_bpb(nats)
    parts = np.array_split(nats.reshape(-1, self.length).mean(0, dtype=float), min(32, self.length))
    self.run.log(f"{title} val_loss:{loss:.4f} val_bpb:{bpb:.4f} train_time:{1000 * train_s:.0f}ms", event,
      step=step, train_s=train_s, val_loss=loss, val_bpb=bpb, seconds=monotonic() - start,
      by_position=[part.mean() for part in parts])

  def adapt(self, first, end, opt):
    """One SGD step on the mean loss of targets [first, end), all scored already."""
    mine = self.dist.mine(torch.arange(first, end, self.length, device=self.dist.device))
    self.run.grads.flat.zero_()
    for starts in mine.split(self.adapt_rows):
      positions = F.pad(starts, (0, self.adapt_rows - len(starts)))[:, None] + self.offsets
      nll = self.run.nll(self.run.model, self.tokens[positions], self.tokens[positions + 1])
      ((nll * (positions < end))[: len(starts)].sum() / (end - first)).backward()
    self.run.grads.reduce_and_clip(self.dist, self.config.ttt_grad_clip)
    if self.config.ttt_muon:  # Orthogonal-SGDM, arXiv:2202.07052
      (group,) = self.muon.param_groups
      self.muon.orthogonalize([p.grad for p in group["params"]], group["steps"], self.config.ttt_muon)
    opt.step()

  def warm_up(self, with_validation):
    """All that evaluation does, on random tokens, and what it will take."""
    cfg, dist, tokens = self.config, self.dist, self.tokens
    rows, stride, most = cfg.eval_batch_seqs, cfg.eval_stride, cfg.eval_max_seconds
    count = self.length * dist.world_size
    self.tokens = torch.randint(cfg.vocab_size, (2 * count + 1,), device=dist.device)
    if with_validation:
      self.score_first(count, *self.plain)
    start, sgd, times = dist.now(), optim.SGD(self.run.model.parameters(), lr=0.0), self.num_targets / count
    def took(work):  # the first compiles, others may be disturbed
      return times * min(timeit.repeat(work, timer=dist.now, repeat=4, number=1))
    score_s = took(lambda: self.score_first(count, rows, stride)) * self.length / (stride * rows)
    score_s /= -(-self.length // stride // rows)
    adapt_s = took(lambda: self.adapt(0, count, sgd)) * self.epochs / self.adapt_rows if self.epochs else 0.0
    self.tokens, self.warm_up_s = tokens, dist.now() - start
    self.run.log(f"evaluation projected: scoring:{score_s:.0f}s adapting:{adapt_s:.0f}s", "projection",
      score_s=score_s, adapt_s=adapt_s, warm_up_s=self.warm_up_s)
    refuse(0 < most < 0.7 * score_s, f"EVAL_MAX_SECONDS={most}: scoring would take {score_s:.0f} s: set 0")

  def score_then_adapt(self, epochs, start, phase=""):
    """Scores each chunk, then takes `epochs` SGD steps on it, but not on the last: nats fp32 [N], chunks adapted on.
    Adaptation stops for good when one more and the rest of the scoring would end, as projected without one-off costs,
    later than EVAL_MAX_SECONDS after start."""
    run, dist, cfg, size = self.run, self.dist, self.config, self.config.ttt_chunk_tokens
    chunks = plan_chunks(self.num_targets, self.length, cfg.eval_stride, size)
    last_of_split = max(1, (self.full_targets - 1) // size)  # for prefixes too
    sgd = optim.SGD(run.model.parameters(), 0.0, cfg.ttt_momentum, fused=True)
    run.grads.flat.zero_()
    sgd.step()  # makes its state
    nats, seconds = np.zeros(self.num_targets, np.float32), np.zeros((2, len(chunks)))  # scoring, adapting
    clock = np.array([0.0, 0.0, 0.0, epochs > 0])  # chunks, s, nats, whether adapting
    run.checkpoints.begin(phase, state_of(run.model, [sgd], clock, seconds, nats))
    done, self.before_s, total, adapting = clock.tolist()
    start, end = start - self.before_s, 0
    last = dist.now() - start
    for index, windows in enumerate(chunks):
      begin, end = end, int(windows[-1, 2])
      assert begin == windows[0, 1]  # each target once, in order
      if index < done:
        continue
      weights = digest(run.model)
      nats[begin:end] = self.score(windows, cfg.eval_batch_seqs, cfg.eval_stride)
      now, left = dist.now() - start, len(chunks) - index - 1
      seconds[0, index] = now - last
      total += nats[begin:end].sum(dtype=float)
      bpb = total / np.log(2) / self.bytes_before[end]
      run.log(f"eval_chunk:{index + 1}/{len(chunks)} running_bpb:{bpb:.4f} eval_time:{1000 * now:.0f}ms",
        "score", chunk=index, first=begin, end=end, weights=weights, running_bpb=bpb, eval_s=now, submitted=bool(phase))
      adapting, last = adapting and left > 0, now
      projected = now + (seconds[1].max() + left * np.median(seconds[0, : index + 1]) if index > 8 else 0.0)
      if adapting and (index == cfg.ttt_max_chunks or 0 < cfg.eval_max_seconds < projected):
        run.log(f"adaptation stops, {projected:.0f} s projected; replay: TTT_MAX_CHUNKS={index} EVAL_MAX_SECONDS=0",
          "adapt_stop", chunk=index)
        adapting = False
      if adapting:
        first = index * size  # all scored: windows are left
        sgd.param_groups[0]["lr"] = lr = cfg.ttt_lr * (1 + cos(pi * index / last_of_split)) / 2
        for _ in range(epochs):
          self.adapt(first, first + size, sgd)
        last = dist.now() - start
        seconds[1, index] = last - now
        run.log("", "adapt", chunk=index, first=first, end=first + size, lr=lr, seconds=last - now)
      dist.expect(20 + 10 * seconds.max(1).sum())
      clock[:] = index + 1, last, total, adapting
      run.checkpoints.reached(index + 1, final=not left)
    dist.expect()
    return nats, int((seconds[1] > 0).sum())

# ---- Main

def preflight(cfg, dist, targets):
  """What sizes say of seconds and bytes; refuses what cannot work."""
  table = [(prod(shape), bits) for _, shape, bits in tensor_table(cfg)]
  size, limit, most = sum(n for n, _ in table), cfg.max_wallclock_seconds, cfg.eval_max_seconds
  best = dist.world_size * (3e15 if dist.on_gpu else 1e12 * torch.get_num_threads())
  token_s = 2 * (size - cfg.bigram_vocab_size * cfg.bigram_dim) / best
  step_s = 3 * token_s * cfg.train_batch_tokens
  score_s = 0.8 * token_s * targets * cfg.train_seq_len / cfg.eval_stride
  finest, most_bytes = sum(n * bits for n, bits in table) / 9, cfg.max_artifact_bytes
  at = Path("logs" if os.path.exists("logs") else ".").absolute()
  free, need = shutil.disk_usage(at).free / 1e9, (most_bytes + 48 * size + 12 * targets) / 1e9
  refuse([text for wrong, text in (
    (0 < limit < 10 * step_s and not cfg.artifact,
      f"MAX_WALLCLOCK_SECONDS={limit}: a step takes {step_s:.1f} s or more: no GPU (nvidia-smi)?"),
    (finest > 3 * most_bytes and not cfg.artifact,
      f"MAX_ARTIFACT_BYTES={most_bytes}: the model takes {finest:.0f} at the finest steps: make it smaller"),
    (0 < most < score_s, f"EVAL_MAX_SECONDS={most}: scoring takes {score_s:.0f} s: set 0"),
    (free < need and not cfg.resume, f"{at}: {free:.2f} GB free, {need:.2f} may be needed: make room"),
    (not os.access(at, os.W_OK), f"{at} cannot be written: start elsewhere")) if wrong])
  return f"preflight: {step_s:.2g} s a step, {score_s:.2g} scoring; disk {need:.2f} of {free:.2f} GB, {finest:.0f} B"

def load_artifact(path, dist):
  return decode_artifact(dist.from_master(lambda: plain(path).open("rb").read(1 << 26)))

def settle(cfg, dist):
  """Makes the automatic choices."""
  length, ranks = cfg.train_seq_len, dist.world_size
  share, seqs = cfg.train_batch_tokens // ranks, cfg.train_batch_tokens // length
  refuse(seqs % ranks, f"{ranks} ranks cannot share {seqs} sequences (TRAIN_BATCH_TOKENS / TRAIN_SEQ_LEN)")
  fitting = max(length, 98_304 if dist.on_gpu else 2048)
  micro = cfg.micro_batch_tokens or max(n for n in range(length, fitting + 1, length) if share % n == 0)
  refuse(share % micro, f"MICRO_BATCH_TOKENS={micro} must divide {share}, one rank's")
  if not dist.on_gpu and "OMP_NUM_THREADS" not in os.environ:  # fewer where others work: all await the last
    work, most = partial(MLP(cfg), torch.ones(2048, cfg.model_dim)), torch.get_num_threads()
    def seconds(threads):
      torch.set_num_threads(threads)
      return timeit.timeit(work, number=20) * 1.25 ** (threads < most)
    torch.set_num_threads(min((most >> i for i in range(most.bit_length())), key=seconds))
  if (dtype := cfg.compute_dtype) == "auto":  # bf16 is far slower on some CPUs
    squares = [torch.ones(256, 256, dtype=each) for each in DTYPES.values()]
    bf16_s, fp32_s = (min(timeit.repeat(lambda x=x: x @ x, number=1)) for x in squares)
    dtype = "bfloat16" if dist.on_gpu or dist.from_master(lambda: 1.5 * bf16_s < fp32_s) else "float32"
  if (mode := cfg.compile) == "auto":
    long = cfg.iterations >= 500 and (cfg.max_wallclock_seconds or 60) >= 60
    able = shutil.which("g++") and Path(sysconfig.get_path("include"), "Python.h").exists()
    mode = "1" if dist.on_gpu else "blocks" if long and able else "0"
  return replace(cfg, device=dist.device.type, compute_dtype=dtype, compile=mode, micro_batch_tokens=micro)

def describe(log, cfg, dist, code, fresh):
  """Logs what runs, and on what."""
  if log.folder and fresh:
    (log.folder / "train_gpt.py").write_bytes(code)
    shutil.rmtree(log.folder / "checkpoints", ignore_errors=True)
    for name in ("submission.json", "artifact.bin")[: 2 - bool(cfg.artifact)]:
      (log.folder / name).unlink(missing_ok=True)
    log(code.decode(), console=False)
  hardware = torch.cuda.get_device_name() if dist.on_gpu else os.uname().machine
  versions = dict(python=sys.version.split()[0], cuda=torch.version.cuda) | {
    m.__name__: m.__version__ for m in (torch, np, spm, zstd)}
  log(f"world_size:{dist.world_size} device:{hardware} cpu_threads:{torch.get_num_threads()} {versions}",
    "start", world_size=dist.world_size, hardware=hardware, versions=versions, settings=vars(cfg))
  for name, value in vars(cfg).items():
    log(f"  {name.upper()}={value}", console=value != getattr(Config, name))

def build_run(cfg, dist, log):
  """The seeded model, compiled if asked for."""
  if cfg.deterministic:
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
  cfg = replace(cfg, attention=choose_attention(cfg, dist, log))
  torch.manual_seed(cfg.seed)
  model = GPT(cfg).to(dist.device)
  nll = compiled(token_nll) if cfg.compile == "1" else token_nll
  if cfg.compile == "blocks":  # one graph: compiles sooner
    model.embed, model.nll = compiled(model.embed), compiled(model.nll)
    for block in model.blocks:
      block.forward = compiled(block.forward)
  run = Run(cfg, dist, log, model, nll, FlatGradients(model))
  log(f"model_params:{run.grads.flat.numel()}")
  run.weights_sha256("at the start")
  return run

def train_and_store(run, stream, opts, scorer, code):
  """Leaves artifact.bin."""
  average, progress = train(run, stream, opts, scorer.validate)
  average.apply()
  scorer.validate("swa", **progress, title=f"swa:{average.count}_snapshots")
  run.weights_sha256("after training")
  cfg = run.config
  limit, left = cfg.max_artifact_bytes, (cfg.max_wallclock_seconds or inf) - progress["train_s"]
  moments, start = error_moments(run, stream, progress["step"], left), monotonic()
  data = encode_artifact(run.model.state_dict(), cfg, moments=moments, limit=limit - len(code), dist=run.dist)
  if run.dist.is_master:
    write_whole(run.log.folder / "artifact.bin", [data])
  total = len(data) + len(code)
  run.log(f"artifact_bytes:{len(data)} code_bytes:{len(code)} total_bytes:{total} limit_bytes:{limit}"
    + " TOO LARGE" * (total >= limit),
    "artifact", artifact_bytes=len(data), code_bytes=len(code), seconds=monotonic() - start)

def evaluate_artifact(run, path, scorer):
  """The submitted pass, perhaps the plain one."""
  cfg, log = run.config, run.log
  for label in ("final_ttt_exact", "final_quantized_exact")[: 1 + cfg.eval_plain]:
    submitted = "ttt" in label
    start = run.dist.now() - scorer.warm_up_s * submitted  # compiling counts
    run.model.load_state_dict(load_artifact(path, run.dist)[1])
    phase = f"2_evaluate_{run.weights_sha256(f'before {label}')[:8]}" * submitted
    nats, adapted = scorer.score_then_adapt(scorer.epochs * submitted, start, phase)
    loss, bpb = scorer.loss_and_bpb(nats)
    refuse(not loss < inf, f"{label} val_loss:{loss}: adaptation diverged, lower TTT_LR={cfg.ttt_lr}")
    result = dict(seed=cfg.seed, val_loss=loss, val_bpb=bpb, chunks_adapted=adapted,
      targets=scorer.num_targets, full_targets=scorer.full_targets, bytes=int(scorer.bytes_before[-1]),
      eval_seconds=run.dist.now() - start + scorer.before_s)
    run.weights_sha256(f"after {label}")
    log(f"{label} val_loss:{loss:.8f} val_bpb:{bpb:.8f} eval_time:{1000 * result['eval_seconds']:.0f}ms targets:"
      f"{scorer.num_targets}/{scorer.full_targets} bytes:{result['bytes']} chunks_adapted:{adapted}", label, **result)
    if submitted and log.folder:
      told = {r["event"]: r for r in map(loads, open(log.records.name))}
      artifact, code = (os.path.getsize(p) for p in (path, log.folder / "train_gpt.py"))
      result |= dict(artifact_bytes=artifact, code_bytes=code, total_bytes=artifact + code)
      if last := told.get("swa"):
        result |= dict(steps=last["step"], train_seconds=last["train_s"] + told["moments"]["seconds"])
      (log.folder / "submission.json").write_text(dumps(result | dict(track=None, date=strftime("%Y-%m-%d"),
        name=cfg.run_id, author=None, github_id=None, hardware=told["start"]["hardware"], ranks=run.dist.world_size,
        mean_val_loss=loss, mean_val_bpb=bpb, seed_results={cfg.seed: result}), indent=2))
      if cfg.val_nll_path:
        np.save(cfg.val_nll_path, nats)

def main():
  """Check, warm up, train and store, evaluate."""
  code, cfg = Path(__file__).read_bytes(), Config.from_env(os.environ)
  dist = Dist(cfg.device, os.environ)
  if cfg.artifact:
    stored = load_artifact(cfg.artifact, dist)[0]
    cfg = replace(cfg, **{name: getattr(stored, name) for name in MODEL_SETTINGS})
    refuse(cfg.problems())
  facts = {name.upper(): x for name, x in [*vars(cfg).items()][8:]}
  cfg, token_bytes = settle(cfg, dist), TokenBytes(load_tokenizer(cfg))
  val = TokenStream(cfg, "val")
  stream, val_tokens = None if cfg.artifact else TokenStream(cfg, "train"), val.read(0, val.num_tokens)
  facts |= dict(ranks=dist.world_size, tokens=stream and stream.num_tokens)
  for name, x in dict(script=code, val_tokens=val_tokens, token_bytes=token_bytes.base).items():
    facts[name] = sha256(x).hexdigest()[:16]
  cfg = replace(cfg, run_id=cfg.run_id or dist.from_master(lambda: strftime(f"%Y%m%d_%H%M%S_s{cfg.seed}")))
  report = preflight(cfg, dist, min(cfg.max_val_tokens or inf, len(val_tokens)))
  saver = Checkpoints(cfg, dist, facts)
  found = saver.find()  # one error on all ranks
  header = saver.header = dist.from_master(lambda: found)
  if cfg.preflight_only:
    print(report * dist.is_master, flush=True)
    os._exit(0)
  log = saver.log = Log(saver.folder if dist.is_master else None, header.get("records", 0))
  describe(log, cfg, dist, code, fresh=not header)
  log(report)
  if header:
    log(f"goes on from {header['path']} (damaged: {header['damaged']})", "resume")
    stream = None if header["phase"].startswith("2") else stream
  run = build_run(cfg, dist, log)
  run.checkpoints, scorer = saver, Evaluator(run, val_tokens, token_bytes)
  opts = build_optimizers(run.model, cfg, dist) if stream else []
  try:
    warm_up(run, stream, opts, scorer)
    dist.catch_signals()
    if stream:
      train_and_store(run, stream, opts, scorer, code)
    evaluate_artifact(run, cfg.artifact or saver.folder / "artifact.bin", scorer)
  except Exception as problem:
    last = (f"RUN_ID={cfg.run_id} RESUME=auto continues from {path}" for path in saver.files()[-1:])
    text = "; ".join([str(problem), *last])
    with suppress(OSError):
      log(f"failed: {text}", console=False)
    if isinstance(problem, (UserError, OSError)):
      raise UserError(text) from problem
    raise
  if dist.world_size > 1:
    comm.destroy_process_group()
    os._exit(0)  # else 1 run in 30 aborts in gloo

if __name__ == "__main__":
  try:
    record(main)()
  except (UserError, OSError) as problem:
    sleep(2 * (os.environ.get("RANK", "0") != "0"))  # rank 0 speaks; torchrun ends others
    sys.exit(f"error: {problem}")
