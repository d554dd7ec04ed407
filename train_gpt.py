"""Train a small language model in ten minutes, store it in 16 MB, score it in bits per byte - validly.

    torchrun --standalone --nproc_per_node=8 train_gpt.py  # the record setting: 8xH100, 600 s, FineWeb
    ARTIFACT=logs/RUN_ID/artifact.bin torchrun ...  # evaluate only
    make demo  # two CPU cores or one GPU, no download

Settings are environment variables, see Config; a run writes logs/RUN_ID/. The file reads in the order data flows.
Model and recipe are openai/parameter-golf PR #264's; departures say why.
Shapes: B sequences, T positions, D model_dim, H query heads, K key/value heads, E head_dim, V vocabulary,
L sequence length, S stride of the W scoring windows, C targets in a chunk, N targets in all.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
import struct
import sys
import sysconfig
import time
import timeit
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import sentencepiece as spm
import torch
import torch.nn.functional as F
import zstandard
from torch import Tensor, distributed, nn, optim

# ---- Settings
# Parsed strictly: a typo that trained the default model would cost eight GPUs twenty minutes.

class UserError(Exception):
  """What the user can fix: one line naming the thing, its value and the remedy."""

@dataclass(frozen=True)
class Config:
  """The record configuration."""
  # Data and run
  data_path: str = "data/datasets/fineweb10B_sp1024"
  tokenizer_path: str = "data/tokenizers/fineweb_1024_bpe.model"
  run_id: str = ""  # folder in logs/; empty: start time and seed
  seed: int = 1337
  # Model (26,666,073 parameters)
  vocab_size: int = 1024
  num_layers: int = 11
  model_dim: int = 512
  num_heads: int = 8
  num_kv_heads: int = 4
  mlp_mult: float = 3.0  # hidden width over model_dim
  bigram_vocab_size: int = 2048
  bigram_dim: int = 64
  qk_gain_init: float = 1.5  # initial gain of queries, by head
  logit_softcap: float = 30.0
  rope_base: float = 10000.0
  # Training
  train_seq_len: int = 2048  # L
  train_batch_tokens: int = 786_432  # a step, over all ranks
  iterations: int = 20_000  # steps at most
  max_wallclock_seconds: float = 600.0  # of training at most; 0: no limit
  warmup_steps: int = 20  # compile, then restore
  warmdown_iters: int = 3000  # at most 58 % of the budget
  val_loss_every: int = 1000  # steps; 0: only at the end
  val_batch_size: int = 524_288  # tokens, over all ranks
  train_log_every: int = 50
  # Optimiser
  matrix_lr: float = 0.02  # Muon: matrices in the model
  scalar_lr: float = 0.02  # AdamW: the rest
  tied_embed_lr: float = 0.03  # AdamW: both tables
  muon_momentum: float = 0.99
  muon_momentum_warmup_start: float = 0.92
  muon_momentum_warmup_steps: int = 1500  # 29 % of the budget at most
  muon_backend_steps: int = 5  # Newton-Schulz iterations
  weight_decay: float = 0.04  # decoupled
  grad_clip_norm: float = 0.3  # 0: off
  # Averaging (swa)
  swa_enabled: bool = True
  swa_start_frac: float = 0.5  # average while lr_factor is below
  swa_every: int = 50
  # Artifact
  embed_bits: int = 6  # of both tables; 16: fp16
  gptq_batches: int = 16  # training steps; 0: no GPTQ
  max_artifact_bytes: int = 16_000_000  # of artifact + script
  # Evaluation (ttt: test-time training)
  artifact: str = ""  # evaluate this instead of training
  eval_stride: int = 64  # S: targets a window scores
  eval_batch_seqs: int = 32  # windows a rank scores at once
  max_val_tokens: int = 0  # score only so many; 0: all
  val_nll_path: str = ""  # .npy file for each target's nats
  eval_plain: bool = False  # also a pass without adaptation
  eval_max_seconds: float = 600.0  # adaptation stops in time; 0: no limit
  ttt_enabled: bool = True
  ttt_lr: float = 0.002  # cosine to zero over the chunks
  ttt_momentum: float = 0.9
  ttt_epochs: int = 3  # SGD steps on a chunk
  ttt_chunk_tokens: int = 32_768  # C
  ttt_grad_clip: float = 1.0  # 0: off
  ttt_max_chunks: int = -1  # to replay a stopped run; -1: all
  # Machine ("auto", 0: see settle)
  device: str = "auto"
  compute_dtype: str = "auto"
  attention: str = "auto"
  compile: str = "auto"  # torch.compile; 1: one graph, blocks: each block
  micro_batch_tokens: int = 0  # tokens a rank processes at once
  deterministic: bool = False  # the same bits on each CUDA run

  @classmethod
  def from_env(cls, env: Mapping[str, str]) -> Config:
    known = {name.upper(): type(default) for name, default in vars(cls()).items()}
    values, problems = {}, []
    for name, text in env.items():
      if name in known:
        try:
          values[name.lower()] = PARSERS[known[name]](text)
        except (ValueError, KeyError):
          problems.append(f"{name}={text!r}: must be {ACCEPTED[known[name]]}")
      elif near := [setting for setting in known if within_edits(name, setting, 2)]:
        problems.append(f"{name}={text!r} is no setting, did you mean {near[0]}? (else unset it)")
    config = cls(**values)
    if problems := problems + ([] if config.artifact else config.problems()):  # else main does
      raise UserError("; ".join(problems))
    return config

  def problems(self) -> list[str]:
    value = vars(self)
    rules = [(name, 0 < x < 2**31, "must be positive, below 2**31") if name in MUST_BE_POSITIVE else
             (name, (-1 if name == "ttt_max_chunks" else 0) <= x < 2**31, "must be from 0 on, below 2**31")
             for name, x in value.items() if isinstance(x, (int, float))]
    if all(holds for _, holds, _ in rules):  # the rest divides by these
      length, nll = self.train_seq_len, Path(self.val_nll_path)
      rules += [(name, value[name] % length == 0, f"must be a multiple of TRAIN_SEQ_LEN={length}")
                for name in ("train_batch_tokens", "micro_batch_tokens", "ttt_chunk_tokens")]
      rules += [(name, value[name] < 1, "must be below 1")
                for name in ("muon_momentum", "muon_momentum_warmup_start", "ttt_momentum")]
      rules += [(name, str(value[name]) in known.split(), f"must be one of {known}")
                for name, known in CHOICES.items()]
      rules += [
          ("vocab_size", self.vocab_size <= 65536, "must be at most 65536, for uint16"),
          ("train_seq_len", length <= 16384, "must be at most 16384, for its mask"),
          ("model_dim", self.model_dim % (2 * self.num_heads) == 0, "must be an even multiple of NUM_HEADS"),
          ("num_heads", self.num_heads % self.num_kv_heads == 0, "must be a multiple of NUM_KV_HEADS"),
          ("mlp_mult", self.mlp_mult * self.model_dim >= 1, "leaves the MLP empty"),
          ("bigram_vocab_size", self.bigram_vocab_size >= 2, "must be at least 2"),
          ("eval_stride", length % self.eval_stride == 0, f"must divide TRAIN_SEQ_LEN={length}"),
          ("max_val_tokens", not 0 < self.max_val_tokens < length, f"must be 0 or at least {length}"),
          ("run_id", re.fullmatch(r"(\w[\w.+-]*)?", self.run_id), "needs letters, digits, _ . + -; no .+- first"),
          ("val_nll_path", not nll.name or nll.suffix == ".npy" and nll.parent.is_dir(), "needs .npy, a folder"),
      ]
    return [f"{name.upper()}={value[name]}: {rule}" for name, holds, rule in rules if not holds]

PARSERS = {str: str, int: int, float: float, bool: {"0": False, "1": True}.__getitem__}
ACCEPTED = {int: "a whole number", float: "a number", bool: "0 or 1"}
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
CHOICES = dict(device="auto cuda cpu", attention="auto fa3 cudnn flash products", compile="auto 0 1 blocks",
               compute_dtype="auto bfloat16 float32", embed_bits="6 8 16")
MUST_BE_POSITIVE = """vocab_size num_layers model_dim num_heads num_kv_heads mlp_mult bigram_dim logit_softcap rope_base
    train_seq_len train_batch_tokens iterations val_batch_size train_log_every muon_backend_steps swa_every
    max_artifact_bytes eval_stride eval_batch_seqs ttt_chunk_tokens""".split()

def within_edits(a: str, b: str, edits: int) -> bool:
  """Whether so many insertions, deletions, substitutions turn a into b."""
  while a and b and a[0] == b[0]:
    a, b = a[1:], b[1:]
  tries = (a[1:], b[1:]), (a[1:], b), (a, b[1:])
  return a == b or edits > 0 and any(within_edits(*pair, edits - 1) for pair in tries)

# ---- Ranks and log
# All communication. The ranks always hold the same weights; they share work, gradients and rank 0's clock.

class Dist:
  """This rank, its device, the collectives."""
  def __init__(self, device: str = "cpu", env: Mapping[str, str] = {}):
    names = (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0), ("LOCAL_WORLD_SIZE", 1))
    self.rank, self.world_size, local_rank, local_size = (int(env.get(*name)) for name in names)
    self.is_master = self.rank == 0
    on_gpu = device == "cuda" or (device == "auto" and torch.cuda.is_available())
    if on_gpu and max(local_size, local_rank + 1) > (gpus := torch.cuda.device_count()):
      raise UserError(f"{local_size} processes on {gpus} GPUs: lower --nproc_per_node, or set DEVICE=cpu")
    self.device = torch.device(f"cuda:{local_rank}" if on_gpu else "cpu")
    if on_gpu:
      torch.cuda.set_device(self.device)
    elif local_size > 1:  # torchrun's OMP_NUM_THREADS=1 leaves cores idle
      torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // local_size))
    if self.world_size > 1:  # gloo beside nccl: hosts' decisions bypass GPUs
      distributed.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo")

  def mine(self, items):
    return items[self.rank :: self.world_size]

  def sum_(self, tensor: Tensor) -> Tensor:
    if self.world_size > 1:
      distributed.all_reduce(tensor)
    return tensor

  def start_gathering(self, part: Tensor) -> tuple[Tensor, Callable[[], None]]:
    """All ranks' parts in order, and what waits for them."""
    if self.world_size == 1:
      return part, lambda: None
    whole = part.new_empty(self.world_size * len(part), *part.shape[1:])
    return whole, distributed.all_gather_into_tensor(whole, part, async_op=True).wait

  def from_master(self, value):
    box = [value]
    if self.world_size > 1:
      distributed.broadcast_object_list(box, device=torch.device("cpu"))
    return box[0]

  def now(self) -> float:
    """Rank 0's clock, s, after the device's work."""
    if self.device.type == "cuda":
      torch.cuda.synchronize()
    return self.from_master(time.perf_counter())

  def weight_digests(self, model: nn.Module) -> str:
    """Start of the SHA-256 of each rank's weights; RuntimeError unless equal."""
    weights = b"".join(p.detach().cpu().numpy().tobytes() for p in model.parameters())
    digests = [hashlib.sha256(weights).hexdigest()[:16]] * self.world_size
    if self.world_size > 1:
      distributed.all_gather_object(digests, digests[0])
    if len(set(digests)) > 1:
      raise RuntimeError(f"the ranks hold different weights: {digests}")
    return " ".join(digests)

class Log:
  """Lines for people (console, train.log), records for programs (metrics.jsonl), if there is a folder."""
  def __init__(self, folder: Path | None):
    self.folder, self.start = folder, time.perf_counter()
    if folder:
      folder.mkdir(parents=True, exist_ok=True)
      self.text, self.records = (open(folder / name, "w", buffering=1) for name in ("train.log", "metrics.jsonl"))

  def __call__(self, line: str = "", *, console: bool = True, **record) -> None:
    if not self.folder:
      return
    if line:
      print(line, file=self.text)
    if line and console:
      print(line, flush=True)
    if record:
      print(json.dumps(record | dict(since_start_s=time.perf_counter() - self.start)), file=self.records)

# ---- Data
# Shards: 256 little-endian int32 (magic, version, token count, zeros), then uint16 tokens. What a step trains on
# depends on its number only. Sequences cross document boundaries, as in the challenge's baseline.
SHARD_MAGIC, SHARD_VERSION, SHARD_HEADER_INTS = 20240520, 1, 256
GET_DATA = "run 'python data/cached_challenge_fineweb.py' or 'python data/build_dataset.py', set what it prints"

def open_shard(path: Path, vocab_size: int) -> np.ndarray:
  """uint16 [tokens], memory-mapped; checks header, length, first million ids."""
  header, size, start = np.fromfile(path, "<i4", 3).tolist(), path.stat().st_size, 4 * SHARD_HEADER_INTS
  expected = [SHARD_MAGIC, SHARD_VERSION, (size - start) / 2]
  if size <= start or header != expected:
    raise UserError(f"{path}: {size} bytes, header {header}, not {expected}: delete it and {GET_DATA}")
  tokens = np.memmap(path, "<u2", "r", start)
  check_ids(tokens[: 1 << 20], vocab_size, path)
  return tokens

def check_ids(tokens: np.ndarray, vocab_size: int, source: Path) -> np.ndarray:
  if (highest := int(tokens.max())) >= vocab_size:
    raise UserError(f"{source}: token id {highest} >= VOCAB_SIZE={vocab_size}: set the tokenizer's")
  return tokens

class TokenStream:
  """A split's ("train", "val") tokens, shards in name order, without end."""
  def __init__(self, config: Config, split: str):
    self.config, self.folder = config, Path(config.data_path)
    self.shards = [open_shard(p, config.vocab_size) for p in sorted(self.folder.glob(f"fineweb_{split}_*.bin"))]
    self.starts = np.cumsum([0, *map(len, self.shards)])
    self.num_tokens = int(self.starts[-1])
    if self.num_tokens <= config.train_seq_len:
      raise UserError(f"DATA_PATH={self.folder}: {self.num_tokens} tokens in {len(self.shards)} fineweb_{split}_*"
                      f".bin, less than a sequence of {config.train_seq_len}: {GET_DATA}")

  def read(self, start: int, count: int) -> np.ndarray:
    """Tokens [start, start + count), uint16; the first follows the last."""
    parts = []
    while count > 0:
      position = start % self.num_tokens
      index = int(np.searchsorted(self.starts, position, side="right")) - 1
      parts.append(self.shards[index][position - self.starts[index] :][:count])
      start, count = start + len(parts[-1]), count - len(parts[-1])
    return check_ids(np.concatenate(parts), self.config.vocab_size, self.folder)

  def micro_batches(self, step: int, dist: Dist) -> Iterator[tuple[Tensor, Tensor]]:
    """Inputs and targets, int64 [micro_batch_tokens / L, L]: this rank's block of the step's train_batch_tokens."""
    length, size = self.config.train_seq_len, self.config.micro_batch_tokens
    share = self.config.train_batch_tokens // dist.world_size
    first = (step * dist.world_size + dist.rank) * share
    for start in range(first, first + share, size):
      tokens = torch.from_numpy(self.read(start, size + 1).astype(np.int64))
      if dist.device.type == "cuda":
        tokens = tokens.pin_memory().to(dist.device, non_blocking=True)
      yield tokens[:-1].view(-1, length), tokens[1:].view(-1, length)

class TokenBytes:
  """Bytes of text behind tokens: the score does not depend on the tokenizer."""
  def __init__(self, tokenizer: spm.SentencePieceProcessor):
    ids = list(range(tokenizer.vocab_size()))
    pieces = tokenizer.id_to_piece(ids)
    lengths = [len(piece.removeprefix("▁").replace("▁", " ").encode()) for piece in pieces]
    self.control = np.any([tokenizer.is_control(ids), tokenizer.is_unknown(ids), tokenizer.is_unused(ids)], axis=0)
    self.leading_space = np.array([piece.startswith("▁") for piece in pieces])
    self.base = np.where(self.control, 0, np.where(tokenizer.is_byte(ids), 1, lengths))

  def count(self, tokens: np.ndarray) -> np.ndarray:
    """Bytes of the targets tokens[1:], int64 [N]: UTF-8 bytes of a piece, 1 of a byte token, 0 of a control token
    and of the leading space behind it."""
    previous, target = tokens[:-1], tokens[1:]
    return self.base[target] + (self.leading_space[target] & ~self.control[previous])

def load_tokenizer(config: Config) -> spm.SentencePieceProcessor:
  """UserError if missing, damaged or of another size."""
  try:
    tokenizer = spm.SentencePieceProcessor(model_proto=Path(config.tokenizer_path).read_bytes())
  except (RuntimeError, OSError) as error:
    raise UserError(f"TOKENIZER_PATH={config.tokenizer_path}: no SentencePiece model there: {GET_DATA}") from error
  if (size := tokenizer.vocab_size()) != config.vocab_size:
    raise UserError(f"{config.tokenizer_path} has {size} tokens, VOCAB_SIZE={config.vocab_size}: make them equal")
  return tokenizer

# ---- Model
# Pre-norm, weightless RMSNorm, no biases. Weights are fp32, cast where used; activations are in compute_dtype.

def rms_norm(x: Tensor) -> Tensor:
  return F.rms_norm(x, (x.size(-1),))

class Linear(nn.Linear):
  """y = x W^T, the weight cast to the input's dtype."""
  def forward(self, x: Tensor) -> Tensor:
    return F.linear(x, self.weight.to(x.dtype))

class BigramHash(nn.Module):
  """What two tokens say together: a hashed table, projected to width D (PR #264)."""
  def __init__(self, config: Config):
    super().__init__()
    self.buckets = config.bigram_vocab_size - 1  # the last row: position 0
    self.embed = nn.Embedding(config.bigram_vocab_size, config.bigram_dim)
    self.proj = Linear(config.bigram_dim, config.model_dim, bias=False)
    self.scale = nn.Parameter(torch.tensor(0.05))

  def hash(self, tokens: Tensor) -> Tensor:
    """Rows of the table: int64 [B, T] -> int64 [B, T]."""
    bucket = ((36313 * tokens[:, 1:]) ^ (27191 * tokens[:, :-1])) % self.buckets
    return F.pad(bucket, (1, 0), value=self.buckets)

  def forward(self, tokens: Tensor, dtype: torch.dtype) -> Tensor:
    return self.proj(self.embed(self.hash(tokens)).to(dtype)) * self.scale.to(dtype)

class SmearGate(nn.Module):
  """Blends in the position before, by a learned share per dimension (modded-nanogpt; PR #264)."""
  def __init__(self, dim: int):
    super().__init__()
    self.gate = nn.Parameter(torch.zeros(dim))  # half and half

  def forward(self, x: Tensor) -> Tensor:
    gate = torch.sigmoid(self.gate).to(x.dtype)
    return (1 - gate) * x + gate * F.pad(x, (0, 0, 1, -1))  # zeros before position 0

class Attention(nn.Module):
  """Causal grouped-query attention (arXiv:2305.13245), normalised q and k, RoPE (arXiv:2104.09864), query gain."""
  def __init__(self, config: Config):
    super().__init__()
    self.heads, self.kv_heads, dim = config.num_heads, config.num_kv_heads, config.model_dim
    kv_dim = dim // self.heads * self.kv_heads
    self.c_q, self.c_k, self.c_v, self.proj = (Linear(dim, n, bias=False) for n in (dim, kv_dim, kv_dim, dim))
    self.q_gain = nn.Parameter(torch.full((self.heads, 1), config.qk_gain_init))
    self.back_end = BACK_ENDS.get(config.attention, attend_by_products)

  def forward(self, x: Tensor, rope: Tensor, mask: Tensor, at: Tensor | None) -> Tensor:
    asking, rope_q = (x, rope) if at is None else (x.take_along_dim(at[..., None], 1), rope[:, at])
    q = self.c_q(asking).unflatten(-1, (self.heads, -1))  # (B, S, H, E)
    k, v = (matrix(x).unflatten(-1, (self.kv_heads, -1)) for matrix in (self.c_k, self.c_v))  # (B, T, K, E)
    q, k = rotate(rms_norm(q), rope_q) * self.q_gain.to(x.dtype), rotate(rms_norm(k), rope)
    y = self.back_end(q, k, v, mask) if at is None else attend_by_products(q, k, v, mask[at][:, None, None])
    return self.proj(y.flatten(2))

def rotate(x: Tensor, rope: Tensor) -> Tensor:
  """Rotary embedding of x (B, T, heads, E): dimension i pairs with i + E/2. rope: cos, sin (2, [B,] T, 1, E/2)."""
  cos, sin = rope.to(x.dtype)
  first, second = x.chunk(2, dim=-1)
  return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)

def attend_by_products(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
  """Attention of q (B, S, H, E) to k, v (B, T, K, E): (B, S, H, E). mask: causal_mask, or its rows for the queries
  (B, 1, 1, S, T). Blocks of queries leave out most later keys: on CPUs in bf16 2-3x as fast as PyTorch's kernel."""
  q = (q * q.size(-1) ** -0.5).unflatten(2, (k.size(2), -1)).permute(0, 2, 3, 1, 4)  # (B, K, H/K, S, E)
  k, v, size, parts = k.transpose(1, 2), v.transpose(1, 2), max(128, k.size(1) // 8), []
  for first, part in zip(range(0, q.size(3), size), q.split(size, dim=3)):
    end = k.size(2) if mask.ndim > 2 else first + size
    scores = (part.flatten(2, 3) @ k[:, :, :end].mT).unflatten(2, part.shape[2:4])  # (B, K, H/K, size, end)
    scores = scores + mask[..., first : first + size, :end]
    parts.append((scores.softmax(-1).flatten(2, 3) @ v[:, :, :end]).view(part.shape))
  return torch.cat(parts, 3).permute(0, 3, 1, 2, 4).flatten(2, 3)

def attend_by_sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
  q, k, v = (t.transpose(1, 2) for t in (q, k, v))
  return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)

def attend_by_fa3(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
  """The same with FlashAttention 3 (arXiv:2407.08608)."""
  from flash_attn_interface import flash_attn_func
  y = flash_attn_func(q, k, v, causal=True)
  return y[0] if isinstance(y, tuple) else y

BACK_ENDS = dict(fa3=attend_by_fa3, cudnn=attend_by_sdpa, flash=attend_by_sdpa, products=attend_by_products)

def causal_mask(config: Config) -> Tensor:
  """(L, L): 0, and -inf for keys after the query."""
  return torch.full([config.train_seq_len] * 2, -math.inf, dtype=DTYPES.get(config.compute_dtype)).triu(1)

def choose_attention(config: Config, dist: Dist, log: Log) -> str:
  """For "auto" the fastest of BACK_ENDS on this GPU, forwards and backwards, that agrees with attend_by_products; on
  CPUs that one (benchmarks/step.py)."""
  auto, seconds, expected = config.attention == "auto", {}, []
  names = list(reversed(BACK_ENDS))[: 2 if config.deterministic else 4]  # these repeat
  q, k, v = (torch.randn(8, config.train_seq_len, heads, config.model_dim // config.num_heads, device=dist.device,
                         dtype=DTYPES[config.compute_dtype], requires_grad=True)
             for heads in (config.num_heads, config.num_kv_heads, config.num_kv_heads))
  mask = causal_mask(config).to(dist.device)
  for name in names if auto and dist.device.type == "cuda" else ():
    allow_kernel(name)
    try:
      attend, times = compiled(BACK_ENDS[name]) if config.compile == "1" else BACK_ENDS[name], []
      for _ in range(8):
        torch.cuda.synchronize()
        start = time.perf_counter()
        y = attend(q, k, v, mask)
        found = [y, *torch.autograd.grad(y, (q, k, v), torch.ones_like(y))]
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
      expected = expected or found
      if any((a - b).norm() > 0.02 * b.norm() for a, b in zip(found, expected)):
        raise ArithmeticError("other results than products")
      seconds[name] = min(times)
    except Exception as reason:  # whatever they raise
      log(f"attention {name}: {reason!r:.100}")
  choice = dist.from_master(min(seconds, key=seconds.get, default="products")) if auto else config.attention
  allow_kernel(choice)
  log(f"attention:{choice} of {seconds}", event="attention", choice=choice, seconds=seconds)
  return choice

def compiled(function: Callable) -> Callable:
  return torch.compile(function, dynamic=False, fullgraph=True)

def allow_kernel(name: str) -> None:
  """Leaves attend_by_sdpa one kernel."""
  for kernel in ("flash", "cudnn", "mem_efficient", "math") if name in ("flash", "cudnn") else ():
    getattr(torch.backends.cuda, f"enable_{kernel}_sdp")(kernel == name)

class MLP(nn.Module):
  """proj(relu(fc(x))^2): squared ReLU (Primer, arXiv:2109.08668)."""
  def __init__(self, config: Config):
    super().__init__()
    dim, hidden = config.model_dim, int(config.mlp_mult * config.model_dim)
    self.fc, self.proj = Linear(dim, hidden, bias=False), Linear(hidden, dim, bias=False)

  def forward(self, x: Tensor) -> Tensor:
    return self.proj(F.relu(self.fc(x)).square())

class Block(nn.Module):
  """Mixes x with x0, adds attention and MLP, all scaled by dimension."""
  def __init__(self, config: Config):
    super().__init__()
    ones = torch.ones(config.model_dim)
    self.attn, self.mlp = Attention(config), MLP(config)
    self.attn_scale, self.mlp_scale = nn.Parameter(ones.clone()), nn.Parameter(ones.clone())
    self.resid_mix = nn.Parameter(torch.stack((ones, 0 * ones)))  # of x, x0

  def forward(self, x: Tensor, x0: Tensor, rope: Tensor, mask: Tensor, at: Tensor | None = None) -> Tensor:
    """(B, T, D) -> (B, T, D), or (B, S, D) for the positions at (B, S)."""
    mix = self.resid_mix.to(x.dtype)
    x = mix[0] * x + mix[1] * x0
    attended = self.attn(rms_norm(x), rope, mask, at)
    x = (x if at is None else x.take_along_dim(at[..., None], 1)) + self.attn_scale.to(x.dtype) * attended
    return x + self.mlp_scale.to(x.dtype) * self.mlp(rms_norm(x))

class GPT(nn.Module):
  """model(int64 [B, T]) -> logits fp32 [B, T, V], soft-capped; T <= L. U-Net skips join the first half of the blocks
  to the second, last to first. Input and output embedding are tied."""
  def __init__(self, config: Config):
    super().__init__()
    self.config, self.dtype = config, DTYPES.get(config.compute_dtype, torch.float32)
    self.tok_emb = nn.Embedding(config.vocab_size, config.model_dim)
    self.bigram, self.smear = BigramHash(config), SmearGate(config.model_dim)
    self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
    self.skip_weights = nn.Parameter(torch.ones(config.num_layers // 2, config.model_dim))
    half = config.model_dim // config.num_heads // 2
    frequency = config.rope_base ** (-torch.arange(half) / half)
    angle = torch.arange(config.train_seq_len)[:, None, None] * frequency  # (L, 1, E/2)
    self.register_buffer("rope", torch.stack((angle.cos(), angle.sin())), persistent=False)
    self.register_buffer("mask", causal_mask(config), persistent=False)
    self.init_weights()

  def init_weights(self) -> None:
    """Orthogonal matrices (arXiv:1312.6120), zero output projections. PR #264's 1/sqrt(2 * layers) for these only
    reaches the bigram projection; were that zero too, it and its table would never move."""
    nn.init.normal_(self.tok_emb.weight, std=0.005)
    nn.init.zeros_(self.bigram.embed.weight)
    nn.init.orthogonal_(self.bigram.proj.weight, gain=1 / math.sqrt(2 * self.config.num_layers))
    for block in self.blocks:
      for matrix in (block.attn.c_q, block.attn.c_k, block.attn.c_v, block.mlp.fc):
        nn.init.orthogonal_(matrix.weight)
      nn.init.zeros_(block.attn.proj.weight)
      nn.init.zeros_(block.mlp.proj.weight)

  def embed(self, tokens: Tensor) -> Tensor:
    """int64 [B, T] -> (B, T, D)."""
    return self.smear(rms_norm(self.tok_emb(tokens).to(self.dtype) + self.bigram(tokens, self.dtype)))

  def hidden(self, tokens: Tensor, at: Tensor | None) -> Tensor:
    """int64 [B, T] -> (B, T, D), or, the last block doing less, (B, S, D) for the positions at (B, S)."""
    x0, last, num_skips = self.embed(tokens), len(self.blocks) - 1, len(self.skip_weights)
    rope, mask = self.rope[:, : x0.size(1)], self.mask[: x0.size(1), : x0.size(1)]
    x, skips = x0.view_as(x0), []  # another object: one graph for all blocks
    for index, block in enumerate(self.blocks):
      if index >= num_skips and skips:
        x = x + self.skip_weights[index - num_skips].to(x.dtype) * skips.pop()
      x = block(x, x0, rope, mask, at if index == last else None)
      if index < num_skips:
        skips.append(x)
    return x

  def logits(self, x: Tensor) -> Tensor:
    logits = F.linear(rms_norm(x), self.tok_emb.weight.to(x.dtype)).float()
    return self.config.logit_softcap * torch.tanh(logits / self.config.logit_softcap)

  def nll(self, x: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(self.logits(x).flatten(0, 1), targets.flatten(), reduction="none").view(targets.shape)

  def forward(self, tokens: Tensor) -> Tensor:
    return self.logits(self.hidden(tokens, None))

def token_nll(model: GPT, tokens: Tensor, targets: Tensor, at: Tensor | None = None) -> Tensor:
  """Nats of each target, everywhere: int64 [B, T] and [B, S] -> fp32 [B, S]."""
  return model.nll(model.hidden(tokens, at), targets)

# ---- Optimiser
# Muon for matrices in the model, AdamW for embeddings and per-dimension parameters.

class FlatGradients:
  """One buffer for all gradients; each .grad is a view, which zero_grad() would drop."""
  def __init__(self, model: nn.Module):
    params = list(model.parameters())
    sizes = [p.numel() for p in params]
    self.flat = torch.zeros(sum(sizes), device=params[0].device)
    for p, view in zip(params, self.flat.split(sizes)):
      p.grad = view.view_as(p)

  def reduce_and_clip(self, dist: Dist, max_norm: float) -> None:
    """Sums over ranks, scales to a norm of at most max_norm (0: no limit)."""
    dist.sum_(self.flat)
    if max_norm > 0:
      self.flat.mul_((max_norm / (self.flat.norm() + 1e-6)).clamp(max=1.0))

def newton_schulz(matrices: Tensor, steps: int) -> Tensor:
  """[n, rows, cols] with singular values moved near 1 (0.7 to 1.2 in 5 steps): Muon's quintic iteration (Keller
  Jordan et al., kellerjordan.github.io/posts/muon)."""
  tall = matrices.size(-2) > matrices.size(-1)
  x = matrices.mT if tall else matrices  # for a small Gram matrix
  x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
  for _ in range(steps):
    gram = x @ x.mT
    polynomial = torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315)
    x = torch.baddbmm(x, polynomial, x, beta=3.4445)
  return x.mT if tall else x

class Muon(optim.Optimizer):
  """Nesterov momentum, orthogonalised; decoupled weight decay; for matrices only:
  W <- (1 - lr * weight_decay) * W - lr * sqrt(max(1, rows / cols)) * newton_schulz(g + momentum * buffer)."""
  def __init__(self, params, lr: float, momentum: float, weight_decay: float = 0.0, steps: int = 5, *, dist=None,
               dtype: torch.dtype = torch.float32):
    super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay, steps=steps))
    self.dist, self.dtype = dist or Dist(), dtype

  @torch.no_grad()
  def step(self, closure: None = None) -> None:
    for group in self.param_groups:
      params = [p for p in group["params"] if p.grad is not None]
      for p in params:
        if not self.state[p]:
          self.state[p]["momentum_buffer"] = torch.zeros_like(p)
      grads, buffers = [p.grad for p in params], [self.state[p]["momentum_buffer"] for p in params]
      torch._foreach_mul_(buffers, group["momentum"])
      torch._foreach_add_(buffers, grads)
      updates = self.orthogonalize(torch._foreach_add(grads, buffers, alpha=group["momentum"]), group["steps"])
      torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
      torch._foreach_add_(params, updates, alpha=-group["lr"])

  def orthogonalize(self, updates: list[Tensor], steps: int) -> list[Tensor]:
    """Orthogonal updates, fp32. Each rank computes its share of a shape; meanwhile the shapes before travel."""
    results, started = list(updates), []
    for rows, cols in dict.fromkeys(u.shape for u in updates):
      indices = [i for i, u in enumerate(updates) if u.shape == (rows, cols)]
      share = -(-len(indices) // self.dist.world_size)
      mine = indices[self.dist.rank * share :][:share]
      part = updates[0].new_zeros(share, rows, cols, dtype=self.dtype)
      if mine:
        part[: len(mine)] = newton_schulz(torch.stack([updates[i] for i in mine]).to(self.dtype), steps)
      started.append((indices, max(1.0, rows / cols) ** 0.5, *self.dist.start_gathering(part)))
    for indices, scale, whole, wait in started:
      wait()
      for index, matrix in zip(indices, scale * whole.float()):
        results[index] = matrix
    return results

def build_optimizers(model: GPT, config: Config, dist: Dist) -> list[optim.Optimizer]:
  matrices = [m.weight for m in model.modules() if isinstance(m, nn.Linear)]
  tables = [m.weight for m in model.modules() if isinstance(m, nn.Embedding)]
  controls = [p for name, p in model.named_parameters() if not name.endswith(".weight")]
  assert sorted(map(id, matrices + tables + controls)) == sorted(map(id, model.parameters()))
  decay, steps = config.weight_decay, config.muon_backend_steps
  muon = Muon(matrices, config.matrix_lr, config.muon_momentum, decay, steps, dist=dist, dtype=model.dtype)
  groups = [dict(params=tables, lr=config.tied_embed_lr), dict(params=controls, lr=config.scalar_lr)]
  adamw = optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-8, weight_decay=decay, fused=True)
  for group in muon.param_groups + adamw.param_groups:
    group["base_lr"] = group["lr"]
  return [muon, adamw]

# ---- Schedule
# The budget nearer its end decides, steps or seconds. On slower machines and in small runs these shares keep the shape
# of PR #264's run (3000 and 1500 of 5197 steps).
WARMDOWN_MAX_SHARE, MOMENTUM_WARMUP_MAX_SHARE = 0.58, 0.29

def lr_factor(step: int, elapsed_s: float, config: Config) -> float:
  """Share of the base learning rates: 1, then linear to 0 at the end of a budget."""
  factor, step_s = 1.0, elapsed_s / max(step, 1)
  for done, budget, per_step in ((step, config.iterations, 1), (elapsed_s, config.max_wallclock_seconds, step_s)):
    if budget > 0:
      warmdown = min(config.warmdown_iters * per_step, WARMDOWN_MAX_SHARE * budget)
      factor = min(factor, (budget - done) / max(warmdown, 1e-9))
  return max(factor, 0.0)

def muon_momentum(step: int, elapsed_s: float, config: Config) -> float:
  progress = step / max(config.muon_momentum_warmup_steps, 1e-9)
  for done, budget in ((step, config.iterations), (elapsed_s, config.max_wallclock_seconds)):
    if budget > 0:
      progress = max(progress, done / (MOMENTUM_WARMUP_MAX_SHARE * budget))
  start = config.muon_momentum_warmup_start
  return start + min(progress, 1.0) * (config.muon_momentum - start)

# ---- Training
CLOCK_STEPS = 10  # between readings

@dataclass
class Run:
  config: Config
  dist: Dist
  log: Log
  model: GPT
  nll: Callable[..., Tensor]  # token_nll, compiled or not
  grads: FlatGradients
  reserve_s: float = 0.0  # training time kept for error_moments

def train_step(run: Run, batch: list, optimizers: list, factor: float, momentum: float) -> Tensor:
  """One optimiser step; this rank's part of the mean loss, fp32 []. The host never waits for the device."""
  loss = torch.zeros((), device=run.dist.device)
  run.grads.flat.zero_()
  for inputs, targets in batch:
    part = run.nll(run.model, inputs, targets).sum() / run.config.train_batch_tokens
    part.backward()
    loss += part.detach()
  run.grads.reduce_and_clip(run.dist, run.config.grad_clip_norm)
  for optimizer in optimizers:
    for group in optimizer.param_groups:
      group.update(lr=group["base_lr"] * factor, momentum=momentum)  # AdamW ignores momentum
    optimizer.step()
  return loss

def train(run: Run, stream: TokenStream, optimizers: list, validate: Callable[..., None]) -> tuple[WeightAverage, dict]:
  """Trains until steps or seconds run out; returns the average of the weights and how far it came. The clock, for
  which the host waits, is read every CLOCK_STEPS steps, near the end at each, and estimated in between. No step
  starts that would end late at the slowest pace of the last 10 readings."""
  limit, average = run.config.max_wallclock_seconds - run.reserve_s, WeightAverage(run.model)
  config = replace(run.config, max_wallclock_seconds=limit)
  step, elapsed, looked, step_s, validating = 0, 0.0, (0, 0.0), [0.0], False
  start = run.dist.now()  # validation moves it
  batch = list(stream.micro_batches(0, run.dist))
  while step < config.iterations and not 0 < limit < elapsed + max(step_s):
    if validating:
      validate(title, event="val", **progress)
      start = run.dist.now() - elapsed
    factor, momentum = lr_factor(step, elapsed, config), muon_momentum(step, elapsed, config)
    loss = train_step(run, batch, optimizers, factor, momentum)
    batch = list(stream.micro_batches(step + 1, run.dist))  # on its way while the device works
    step, elapsed = step + 1, elapsed + step_s[-1]
    if config.swa_enabled and factor < config.swa_start_frac and step % config.swa_every == 0:
      average.add()
    logging = step <= 5 or step % config.train_log_every == 0 or step == config.iterations
    ahead, validating = step - looked[0], config.val_loss_every and step % config.val_loss_every == 0
    if logging or validating or ahead == CLOCK_STEPS or 0 < limit < elapsed + 10 * ahead * max(step_s):
      elapsed = run.dist.now() - start
      step_s, looked = step_s[-9:] + [(elapsed - looked[1]) / ahead], (step, elapsed)
    title, progress = f"step:{step}/{config.iterations}", dict(step=step, train_s=elapsed)
    if logging:
      loss = run.dist.sum_(loss).item()
      run.log(f"{title} train_loss:{loss:.4f} train_time:{1000 * elapsed:.0f}ms step_avg:"
              f"{1000 * elapsed / step:.2f}ms", event="train", step=step, train_loss=loss, train_s=elapsed,
              lr_factor=factor, muon_momentum=momentum)
  validate(title, event="val", **progress)
  return average, progress

def warm_up(run: Run, stream: TokenStream | None, optimizers: list, evaluator: Evaluator) -> None:
  """Compiles all that will run, times error_moments, restores weights and optimiser state bit for bit. Trains on
  training tokens, if any, scores and adapts on random ones: no validation token is seen."""
  config, saved = run.config, [p.detach().clone() for p in run.model.parameters()]
  if stream:
    for step in range(config.warmup_steps):
      batch = list(stream.micro_batches(step, run.dist))
      train_step(run, batch, optimizers, 1.0, config.muon_momentum_warmup_start)
      run.log(f"warmup_step:{step + 1}/{config.warmup_steps}")
    start, most = run.dist.now(), config.max_wallclock_seconds / 8
    error_moments(run, stream, first_step=0, seconds=most or math.inf)
    run.reserve_s = min(1.1 * (run.dist.now() - start), most)
  evaluator.warm_up(with_validation=stream is not None)
  with torch.no_grad():
    torch._foreach_copy_(list(run.model.parameters()), saved)
  for optimizer in optimizers:
    optimizer.state.clear()
  run.log("warm-up done, weights and optimiser restored", event="warm_up")

# ---- Averaging

class WeightAverage:
  """Mean of late weights (SWA, arXiv:1803.05407), in fp32: in bf16, as in PR #264, it loses more than it gains."""
  def __init__(self, model: nn.Module):
    self.params, self.count = list(model.parameters()), 0
    self.sums = [torch.zeros_like(p) for p in self.params]

  @torch.no_grad()
  def add(self) -> None:
    torch._foreach_add_(self.sums, self.params)
    self.count += 1

  @torch.no_grad()
  def apply(self) -> None:
    if self.count:
      torch._foreach_copy_(self.params, torch._foreach_div(self.sums, self.count))

# ---- Artifact
# Magic and version; SHA-256 of the rest; size (uint32) and zstd frame of JSON header (size, model settings, tensors),
# fp16 tensors and steps, classes, frequencies, states; entropy-coded values of matrices, tables included. It needs only
# this script and the tokenizer, executes nothing.
ARTIFACT_MAGIC = b"PGOLFGPT\x02"
MAX_STORED_VALUES = 2**26  # no file can ask for all memory
MODEL_SETTINGS = """vocab_size num_layers model_dim num_heads num_kv_heads mlp_mult bigram_vocab_size bigram_dim
    logit_softcap rope_base train_seq_len embed_bits""".split()
STEP_CHOICES = 16  # for a row, 0.85 to 1.15 of the first guess
FIT_SLACK = 10_000  # bytes that may stay unused
CODER_BITS = 14  # of the coder's frequencies

def tensor_table(config: Config) -> list[list]:
  """[name, shape, bits of a weight] of each tensor; 16: fp16, no matrix. Allocates nothing."""
  with torch.device("meta"):
    shapes = {name: list(p.shape) for name, p in GPT(config).named_parameters()}
  bits = {name: 5 if ".mlp." in name else 6 if name.endswith(".weight") else 16 for name in shapes}
  bits |= {"tok_emb.weight": config.embed_bits, "bigram.embed.weight": config.embed_bits}
  return [[name, shape, bits[name]] for name, shape in shapes.items()]

def error_moments(run: Run, stream: TokenStream, first_step: int, seconds: float = math.inf) -> dict:
  """What errors in a matrix cost: {name: (G^T G [cols, cols], row sums of G^2 [rows])}, fp32, the same on all ranks;
  G: loss gradients of the micro-batches of GPTQ_BATCHES steps, or what fits into seconds. G^T G is Shampoo's factor
  (arXiv:1802.09568): GPTQ's X^T X, weighed by how much each token's output matters."""
  matrices = {name: p for name, p in run.model.named_parameters() if name.endswith(".weight")}
  moments = {name: (p.new_zeros(p.size(1), p.size(1)), p.new_zeros(p.size(0))) for name, p in matrices.items()}
  start, elapsed, batches = run.dist.now(), 0.0, 0
  while batches < run.config.gptq_batches and elapsed / max(batches, 1) * (batches + 1) < seconds:
    for inputs, targets in stream.micro_batches(first_step + batches, run.dist):
      run.grads.flat.zero_()
      run.nll(run.model, inputs, targets).sum().backward()
      for matrix, (moment, power) in zip(matrices.values(), moments.values()):
        moment.addmm_(matrix.grad.T, matrix.grad)
        power.add_(matrix.grad.square().sum(1))
    elapsed, batches = run.dist.now() - start, batches + 1
  for tensor in sum(moments.values(), ()):
    run.dist.sum_(tensor)
  run.log(f"moments:{batches}_batches time:{1000 * elapsed:.0f}ms", event="moments", batches=batches, seconds=elapsed)
  return moments if batches and all(power.isfinite().all() for _, power in moments.values()) else {}

def quantize(matrix: Tensor, steps: Tensor, bits: int, moment: Tensor | None = None) -> tuple[Tensor, Tensor]:
  """Rounds fp32 [rows, cols] to whole numbers of steps, from -2**(bits-1) to 2**(bits-1) - 1: int8, and steps fp16
  [rows], 0 for zeros. Each row takes the one of its steps [choices, rows] of least error e: e^T moment e, or e^T e.
  With a moment, columns not yet rounded make up for the others' errors (GPTQ, arXiv:2210.17323: damped by 1 % of the
  mean, descending diagonal, blocks of 128)."""
  span, order, inverse = 2 ** (bits - 1), torch.arange(matrix.size(1)), None
  if moment is not None:
    by_power = moment.diagonal().argsort(descending=True)
    damping = 0.01 * moment.diagonal().mean() * torch.eye(len(order), device=moment.device)
    lower, failed = torch.linalg.cholesky_ex(moment[by_power][:, by_power] + damping)
    if not failed:
      upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)  # U^T U = inverse
    if not failed and torch.isfinite(upper).all():  # else: never lose a run over it
      order, inverse = by_power, upper
  steps = steps.clamp(max=65504).half().float()
  step = steps.flatten()
  divisor, error = step.where(step > 0, 1.0), torch.zeros_like(step)
  rest = matrix.T[order].repeat(1, len(steps))  # (col, choice and row)
  values = torch.empty_like(rest, dtype=torch.int8)
  for start in range(0, len(rest), 128):
    block = rest[start : start + 128]
    errors = torch.empty_like(block)
    for i, column in enumerate(block):
      value = (column / divisor).round_().clamp_(-span, span - 1)
      values[start + i], errors[i] = value, column - value * step
      if inverse is not None:
        factor = inverse[start + i, start + i : start + 128]
        block[i:].addr_(factor, errors[i].div_(factor[0]), alpha=-1)
    if inverse is not None:
      rest[start + 128 :] -= inverse[start : start + 128, start + 128 :].T @ errors
    error += errors.square_().sum(0)
  best, rows = error.view_as(steps).argmin(0), torch.arange(len(matrix), device=matrix.device)
  values = values.view(-1, *steps.shape)[:, best, rows][order.argsort()].T.contiguous()
  return values, steps[best, rows].half() * values.any(1)

def encode_artifact(state_dict: Mapping[str, Tensor], config: Config, *, moments: Mapping[str, tuple] = {},
                    limit: int | None = None, dist: Dist | None = None) -> bytes:
  """The artifact of fp32 weights, shorter than limit if possible; ranks share the work and all get it. moments:
  error_moments, for GPTQ. UserError if weights are not finite."""
  table, dist = tensor_table(config), dist or Dist()
  tensors = {name: state_dict[name].detach().float() for name, _, _ in table}
  rows = {}  # by matrix: step that just reaches the largest weight, cost of an error, bits
  for name, _, bits in table:
    w = tensors[name]
    if not torch.isfinite(w.half() if bits == 16 else w).all():
      raise UserError(f"weights of {name} are not finite: training diverged, lower the learning rates")
    if bits < 16:
      finest = w.abs().amax(1) / (2 ** (bits - 1) - 1)  # PR #264 floored it at 1/127
      cost = finest**-2
      if moments:  # mean: for what batches did not show
        cost = (moments[name][1] + moments[name][1].mean()) / w.size(1)
      rows[name] = finest, cost, bits

  def make(price: int) -> bytes:
    stored, values = {name: w.half() for name, w in tensors.items()}, {}
    for name, (finest, cost, bits) in rows.items():  # step**2 = 2**(price / 1024 - 100) / cost: bits pay alike
      guess = torch.fmax(finest, (2 ** (price / 1024 - 100) * (price > 0) / cost).sqrt())  # fmax: 0 / 0 is nan
      w = tensors[name] * (guess < 65504)[:, None]  # zero where fp16 ends
      values[name], stored[name] = torch.zeros_like(w, dtype=torch.int8), torch.zeros_like(guess).half()
      if name in dist.mine(list(rows)):
        steps = torch.linspace(0.85, 1.15, STEP_CHOICES, device=w.device)[:, None] * guess
        values[name], stored[name] = quantize(w, steps, bits, moments[name][0] if moments else None)
    for name in rows:
      dist.sum_(values[name])
      dist.sum_(stored[name])
    return dist.from_master(pack_artifact(config, stored, values) if dist.is_master else b"")

  return largest_below(limit, make)

def largest_below(limit: int | None, make: Callable[[int], bytes]) -> bytes:
  """make(0) if shorter than limit, else the longest make(price) found that is, within FIT_SLACK if possible; if none
  is, the highest price's. Prices trade quality for bytes."""
  low, high, best = 0, 200 * 1024, make(0)
  if limit is None or len(best) < limit:
    return best
  best = make(high)
  while high - low > 1 and limit - len(best) > FIT_SLACK:
    price = (low + high) // 2
    data = make(price)
    if len(data) < limit:
      high, best = price, max(best, data, key=len)
    else:
      low = price
  return best

def symbol_frequencies(symbols: np.ndarray) -> np.ndarray:
  """uint16 symbols [n], 256 * class + byte -> counts by class, scaled to sum 2**CODER_BITS: uint16 [64, 256]."""
  counts = np.bincount(symbols, minlength=64 * 256).reshape(64, 256)
  total, spare = counts.sum(1, keepdims=True), 2**CODER_BITS - np.count_nonzero(counts, axis=1)[:, None]
  frequencies = (counts > 0) + counts * spare // np.maximum(total, 1)
  frequencies[np.arange(64), counts.argmax(1)] += 2**CODER_BITS - frequencies.sum(1)
  return frequencies.astype("<u2")

def entropy_encode(symbols: np.ndarray, frequencies: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Symbols -> states uint32 [lanes], words uint16. rANS (Duda, arXiv:1311.2540), interleaved (Giesen,
  arXiv:1402.3392): symbol i is lane i % lanes', numpy does all lanes at once. A lane's state in [2**16, 2**32) takes
  up its symbols; before it overflows, its lower half becomes a word. Encoding runs backwards."""
  lanes, frequency = max(1, min(1024, len(symbols) // 2048)), frequencies.ravel().astype(np.uint64)
  below = (np.cumsum(frequency) - frequency) % 2**CODER_BITS  # in its class
  states, words = np.full(lanes, 2**16, np.uint64), [np.empty(0, "<u2")]
  for start in reversed(range(0, len(symbols), lanes)):
    symbol = symbols[start : start + lanes]
    state, share = states[: len(symbol)], frequency[symbol]
    full = state >= share << (32 - CODER_BITS)
    words.append(state[full].astype("<u2"))
    state = np.where(full, state >> 16, state)
    states[: len(symbol)] = (state // share << CODER_BITS) + state % share + below[symbol]
  return states.astype("<u4"), np.concatenate(words[::-1])

def entropy_decode(classes: np.ndarray, frequencies: np.ndarray, states: np.ndarray, words: np.ndarray) -> np.ndarray:
  """The symbols' bytes, uint8, given their classes; ValueError for what entropy_encode did not make."""
  wrong = (frequencies.sum(1) != 2**CODER_BITS).any() or classes.max(initial=0) > 63
  if wrong or len(states) != max(1, min(1024, len(classes) // 2048)):
    raise ValueError("impossible classes, frequencies or lanes")
  frequency = frequencies.ravel().astype(np.uint32)
  symbol = np.repeat(np.arange(64 * 256, dtype=np.uint16), frequency)  # of each slot, 2**CODER_BITS a class
  rest = (np.arange(len(symbol)) - (np.cumsum(frequency) - frequency)[symbol]).astype(np.uint32)
  first_slot = classes.astype(np.uint32) << CODER_BITS
  decoded, states, position = np.empty(len(classes), np.uint8), states.astype(np.uint32), 0
  for start in range(0, len(decoded), len(states)):
    state = states[: len(decoded) - start]
    slot = state % np.uint32(2**CODER_BITS) + first_slot[start : start + len(state)]
    decoded[start : start + len(state)] = found = symbol[slot]  # its lower byte
    state[:] = frequency[found] * (state >> CODER_BITS) + rest[slot]
    low = np.flatnonzero(state < 2**16)
    state[low] = state[low] << 16 | words[position : position + len(low)]  # if too few: see below
    position += len(low)
  if position != len(words) or (states != 2**16).any():
    raise ValueError("entropy-coded values that do not come out even")
  return decoded

def pack_artifact(config: Config, stored: dict[str, Tensor], values: dict[str, Tensor]) -> bytes:
  """values: int8 matrices; stored: fp16, a matrix's steps by row, or another tensor."""
  table = tensor_table(config)
  header = json.dumps(dict(config={name: getattr(config, name) for name in MODEL_SETTINGS}, tensors=table)).encode()
  flat, widths = np.concatenate([value.cpu().numpy().ravel() for value in values.values()]), row_widths(table)
  # Rows whose root mean square is within a quarter octave are a class, with its frequencies; 0: zeros, not coded.
  power = np.add.reduceat(np.square(flat, dtype=np.int32), np.cumsum(widths) - widths) / widths
  classes = np.clip(np.round(2 * np.log2(np.maximum(power, 1e-9))) + 32, power > 0, 63).astype(np.uint8)
  of_values = np.repeat(classes, widths)
  symbols = (of_values.astype(np.uint16) << 8 | flat.view(np.uint8))[of_values > 0]
  frequencies = symbol_frequencies(symbols)
  states, words = entropy_encode(symbols, frequencies)
  arrays = (*(stored[name].cpu().numpy() for name, _, _ in table), classes, frequencies, states)
  body = b"".join((struct.pack("<I", len(header)), header, *(array.tobytes() for array in arrays)))
  frame = zstandard.compress(body, level=22)
  payload = struct.pack("<I", len(frame)) + frame + words.tobytes()
  return ARTIFACT_MAGIC + hashlib.sha256(payload).digest() + payload

def row_widths(table: list[list]) -> np.ndarray:
  """Columns of each row of all matrices, int64 [rows]."""
  return np.concatenate([np.full(*shape) for _, shape, bits in table if bits < 16])

def unpack_artifact(data: bytes) -> tuple[Config, dict[str, Tensor], dict[str, Tensor]]:
  """What pack_artifact got; UserError, before it allocates much, if anything is off."""
  magic, checksum, payload = data[:9], data[9:41], data[41:]
  if magic != ARTIFACT_MAGIC:
    raise UserError(f"artifact begins with {magic!r}, not {ARTIFACT_MAGIC!r}: use the script beside it")
  if hashlib.sha256(payload).digest() != checksum:
    raise UserError(f"artifact of {len(data)} bytes fails its checksum: copy it again")
  try:
    end = 4 + struct.unpack_from("<I", payload)[0]
    frame, words = payload[4:end], np.frombuffer(payload[end:], "<u2")
    if not 0 <= (size := zstandard.frame_content_size(frame)) < 1 << 26:
      raise ValueError(f"a body of {size} bytes")
    body = zstandard.decompress(frame)
    offset = min(4 + struct.unpack_from("<I", body)[0], 1 << 20)
    header = json.loads(body[4:offset])
    settings = {name: type(getattr(Config, name))(header["config"][name]) for name in MODEL_SETTINGS}
    fitting = dict.fromkeys(("train_batch_tokens", "ttt_chunk_tokens", "eval_stride"), settings["train_seq_len"])
    if problems := (config := Config(**settings, **fitting)).problems():
      raise ValueError("; ".join(problems))
    if 300 * config.num_layers > offset or header["tensors"] != (table := tensor_table(config)):
      raise ValueError("other tensors than its settings imply")
    sizes = [math.prod(shape) for _, shape, bits in table if bits < 16]
    if sum(sizes) > MAX_STORED_VALUES:
      raise ValueError(f"{sum(sizes)} values")
    numbers = [math.prod(shape) if bits == 16 else shape[0] for _, shape, bits in table]
    stored = np.frombuffer(body, "<f2", sum(numbers), offset)
    if not np.isfinite(stored).all():
      raise ValueError("numbers that are not finite")
    widths = row_widths(table)
    classes = np.frombuffer(body, np.uint8, len(widths), offset := offset + stored.nbytes)
    frequencies = np.frombuffer(body, "<u2", 64 * 256, offset := offset + classes.nbytes).reshape(64, 256)
    states, of_values = np.frombuffer(body, "<u4", -1, offset + frequencies.nbytes), np.repeat(classes, widths)
    flat, coded = np.zeros(len(of_values), np.uint8), of_values > 0
    flat[coded] = entropy_decode(of_values[coded], frequencies, states, words)
  except (ArithmeticError, LookupError, RuntimeError, TypeError, ValueError, struct.error, zstandard.ZstdError) as e:
    raise UserError(f"artifact is inconsistent ({e!s:.200}): use the script that wrote it") from e
  parts = torch.tensor(stored).split(numbers)
  stored = {name: part.view(shape if bits == 16 else -1) for (name, shape, bits), part in zip(table, parts)}
  parts = iter(torch.from_numpy(flat.view(np.int8)).split(sizes))
  return config, stored, {name: next(parts).view(shape) for name, shape, bits in table if bits < 16}

def decode_artifact(data: bytes) -> tuple[Config, dict[str, Tensor]]:
  """Model settings, fp32 weights; UserError if anything is off."""
  config, stored, values = unpack_artifact(data)
  weights = {name: tensor.float() for name, tensor in stored.items()}
  return config, weights | {name: value * weights[name][:, None] for name, value in values.items()}

# ---- Evaluation
# Chunks of C targets in order (PR #549), each scored with weights that have seen nothing but the artifact and earlier
# chunks; only then may SGD train on it. So a token's distribution depends only on the artifact and on tokens before it,
# is normalised over the vocabulary, and is final before any update that uses it: the challenge's conditions
# (openai/parameter-golf issues #402, #677, #1017). PR #264 trained on it all first.

def sliding_windows(num_targets: int, seq_len: int, stride: int) -> np.ndarray:
  """Windows that score each target once, in order: int64 [W, 3] of start (inputs: tokens [start, start + seq_len)),
  first scored target, end of the scored. Target p is token p + 1. A window scores its last `stride` targets, the
  first one all."""
  starts = np.arange(0, max(num_targets - seq_len + stride, min(num_targets, 1)), stride)
  first = np.where(starts == 0, 0, starts + seq_len - stride)
  return np.stack((starts, first, np.minimum(starts + seq_len, num_targets)), axis=1)

def plan_chunks(num_targets: int, seq_len: int, stride: int, chunk_tokens: int) -> list[np.ndarray]:
  """The windows by chunk of their *first* scored target. By their last, what a straddling window scores before the
  edge would be trained on first."""
  windows = sliding_windows(num_targets, seq_len, stride)
  return np.split(windows, np.flatnonzero(np.diff(windows[:, 1] // chunk_tokens)) + 1)

class Evaluator:
  """Scores the split's tokens [> L], in whole sequences as in the baseline, with and without adaptation."""
  def __init__(self, run: Run, tokens: np.ndarray, token_bytes: TokenBytes):
    self.run, self.dist, self.config = run, run.dist, run.config
    self.length = length = run.config.train_seq_len
    self.full_targets = (len(tokens) - 1) // length * length
    self.num_targets = min((self.config.max_val_tokens or len(tokens)) // length * length, self.full_targets)
    tokens = tokens[: self.num_targets + 1]
    self.bytes_before = np.pad(token_bytes.count(tokens).cumsum(), (1, 0))  # [N + 1]
    padded = np.pad(tokens.astype(np.int32), (0, length))  # the last windows read past the end
    self.tokens = torch.from_numpy(padded).to(self.dist.device)
    self.offsets = torch.arange(length, device=self.dist.device)
    per_row = length * self.dist.world_size  # fixed, so graphs compile once
    val_rows = max(1, min(self.config.val_batch_size // per_row, -(-self.num_targets // per_row)))
    self.plain = val_rows, length  # rows and stride of validation
    self.adapt_rows = min(-(-self.config.ttt_chunk_tokens // per_row), self.config.micro_batch_tokens // length)
    self.epochs = self.config.ttt_epochs if self.config.ttt_enabled else 0

  def loss_and_bpb(self, nats: np.ndarray) -> tuple[float, float]:
    """Nats a token, bits a byte (nats / ln 2 / bytes) of the first len(nats) targets."""
    total = float(nats.sum(dtype=np.float64))
    return total / len(nats), total / math.log(2) / int(self.bytes_before[len(nats)])

  def tokens_at(self, positions: Tensor) -> Tensor:
    return self.tokens[positions].long()

  @torch.no_grad()
  def score(self, windows: np.ndarray, rows: int, stride: int) -> np.ndarray:
    """Nats of consecutive windows' targets, fp32, on every rank. Ranks share the windows, `rows` at a time, each
    asked for the `stride` positions it scores; the split's first one, which scores all, several times."""
    assert (windows[1:, 2] - windows[1:, 1] <= stride).all()  # none goes without
    (start, begin, end), count = windows[0], windows[-1, 2] - windows[0, 1]
    pieces = [(start, first, min(first + stride, end)) for first in range(begin, end, stride)]
    mine = self.dist.mine(np.concatenate((pieces, windows[1:])))
    padded = np.pad(mine, ((0, -len(mine) % rows), (0, 0)))  # windows that score nothing
    nats = torch.zeros(count + 1, device=self.dist.device)  # last slot: not scored
    for batch in torch.from_numpy(padded).to(self.dist.device).view(len(padded) // rows, rows, 3):
      start, first, end = batch.T[..., None]
      positions = first + self.offsets[:stride]
      at = None if stride == self.length else (positions - start).clamp(max=self.length - 1)
      nll = self.run.nll(self.run.model, self.tokens_at(start + self.offsets), self.tokens_at(positions + 1), at)
      nats.scatter_(0, torch.where(positions < end, positions - int(begin), count).flatten(), nll.flatten())
    return self.dist.sum_(nats[:count]).cpu().numpy()

  def adapt(self, first: int, end: int, optimizer: optim.Optimizer) -> None:
    """One SGD step on the mean loss of targets [first, end), all scored already."""
    mine = self.dist.mine(torch.arange(first, end, self.length, device=self.dist.device))
    self.run.grads.flat.zero_()
    for starts in mine.split(self.adapt_rows) if len(mine) else ():
      positions = F.pad(starts, (0, self.adapt_rows - len(starts)))[:, None] + self.offsets
      nll = self.run.nll(self.run.model, self.tokens_at(positions), self.tokens_at(positions + 1))
      ((nll * (positions < end))[: len(starts)].sum() / (end - first)).backward()
    self.run.grads.reduce_and_clip(self.dist, self.config.ttt_grad_clip)
    optimizer.step()

  def warm_up(self, with_validation: bool) -> None:
    """All that evaluation does, once, on random tokens; leaves gradients behind."""
    start, count, tokens = self.dist.now(), self.length * self.dist.world_size, self.tokens
    self.tokens = torch.randint(self.config.vocab_size, (2 * count + 1,), device=self.dist.device)
    for rows, stride in ((self.config.eval_batch_seqs, self.config.eval_stride), *with_validation * [self.plain]):
      self.score(sliding_windows(count, self.length, stride), rows, stride)
    if self.epochs:
      self.adapt(0, count, optim.SGD(self.run.model.parameters(), lr=0.0))
    self.tokens, self.warm_up_s = tokens, self.dist.now() - start  # counts as evaluation

  def score_then_adapt(self, epochs: int, start: float) -> tuple[np.ndarray, int]:
    """Scores each chunk, then takes `epochs` SGD steps on it, but not on the last: nats fp32 [N], number of chunks
    adapted on. Scoring is never cut; adaptation stops for good when one more and the rest of the scoring would end,
    as projected without one-off costs, later than EVAL_MAX_SECONDS after start."""
    config, log, size = self.config, self.run.log, self.config.ttt_chunk_tokens
    chunks = plan_chunks(self.num_targets, self.length, config.eval_stride, size)
    last_of_split = max(1, -(-self.full_targets // size) - 1)  # for prefixes too
    sgd = optim.SGD(self.run.model.parameters(), lr=config.ttt_lr, momentum=config.ttt_momentum, fused=True)
    nats, end, total, adapting = np.zeros(self.num_targets, np.float32), 0, 0.0, epochs > 0
    score_s, adapt_s, last = [], [], self.dist.now() - start
    for index, windows in enumerate(chunks):
      begin, end = end, int(windows[-1, 2])
      assert begin == windows[0, 1]  # each target once, in order
      nats[begin:end] = self.score(windows, config.eval_batch_seqs, config.eval_stride)
      now, left = self.dist.now() - start, len(chunks) - index - 1
      score_s.append(now - last)
      total += float(nats[begin:end].sum(dtype=np.float64))
      bpb = total / math.log(2) / int(self.bytes_before[end])
      log(f"eval_chunk:{index + 1}/{len(chunks)} running_bpb:{bpb:.4f} eval_time:{1000 * now:.0f}ms",
          event="score", chunk=index, first=begin, end=end, running_bpb=bpb, eval_s=now)
      adapting, last = adapting and left > 0, now
      projected = now + (max(adapt_s) + left * np.median(score_s) if index > 8 and adapt_s else 0.0)
      if adapting and (index == config.ttt_max_chunks or 0 < config.eval_max_seconds < projected):
        log(f"adaptation stops after {index} chunks ({projected:.0f} s projected); to replay it: "
            f"TTT_MAX_CHUNKS={index} EVAL_MAX_SECONDS=0", event="adapt_stop", chunk=index)
        adapting = False
      if adapting:
        first, edge = index * size, (index + 1) * size  # all scored: windows are left
        sgd.param_groups[0]["lr"] = lr = config.ttt_lr * (1 + math.cos(math.pi * index / last_of_split)) / 2
        for _ in range(epochs):
          self.adapt(first, edge, sgd)
        last = self.dist.now() - start
        adapt_s.append(last - now)
        log(event="adapt", chunk=index, first=first, end=edge, lr=lr, seconds=adapt_s[-1])
    return nats, len(adapt_s)

# ---- Main

def load_artifact(path: str | Path, dist: Dist) -> tuple[Config, dict[str, Tensor]]:
  """decode_artifact of rank 0's file, on all ranks."""
  if dist.is_master and not Path(path).is_file():
    raise UserError(f"ARTIFACT={path}: no such file, give a finished run's artifact.bin")
  return decode_artifact(dist.from_master(Path(path).read_bytes() if dist.is_master else b""))

def settle(config: Config, dist: Dist) -> Config:
  """Makes the automatic choices."""
  on_gpu, length = dist.device.type == "cuda", config.train_seq_len
  if (seqs := config.train_batch_tokens // length) % dist.world_size:
    raise UserError(f"{dist.world_size} ranks cannot share {seqs} sequences (TRAIN_BATCH_TOKENS / TRAIN_SEQ_LEN)")
  per_rank, wanted = seqs // dist.world_size, config.micro_batch_tokens // length
  if wanted and per_rank % wanted:
    raise UserError(f"MICRO_BATCH_TOKENS={config.micro_batch_tokens} must divide {per_rank * length}, one rank's")
  fitting = (98_304 if on_gpu else 2048) // length  # sequences; for memory, for cache
  micro = length * (wanted or max(n for n in range(1, max(fitting, 1) + 1) if per_rank % n == 0))
  if (dtype := config.compute_dtype) == "auto":  # bf16 is far slower on some CPUs
    squares = [torch.ones(256, 256, dtype=each) for each in DTYPES.values()]
    bf16_s, fp32_s = (min(timeit.repeat(lambda x=x: x @ x, number=1)) for x in squares)
    dtype = "bfloat16" if on_gpu or dist.from_master(1.5 * bf16_s < fp32_s) else "float32"
  if (mode := config.compile) == "auto":
    long = config.iterations >= 500 and (config.max_wallclock_seconds or 60) >= 60  # earns back half a minute
    able = shutil.which("g++") and Path(sysconfig.get_path("include"), "Python.h").exists()
    mode = "1" if on_gpu else "blocks" if long and able else "0"
  return replace(config, device=dist.device.type, compute_dtype=dtype, compile=mode, micro_batch_tokens=micro)

def describe(log: Log, config: Config, dist: Dist, code: bytes) -> None:
  """Logs source, versions, settings."""
  if log.folder:
    (log.folder / "train_gpt.py").write_bytes(code)
    for name in ["submission.json"] + ([] if config.artifact else ["artifact.bin"]):
      (log.folder / name).unlink(missing_ok=True)  # of an earlier run
  log(code.decode(), console=False)
  hardware = torch.cuda.get_device_name() if dist.device.type == "cuda" else os.uname().machine
  versions = {module.__name__: module.__version__ for module in (torch, np, spm, zstandard)}
  versions |= dict(python=sys.version.split()[0], cuda=torch.version.cuda)
  log(f"world_size:{dist.world_size} device:{hardware} cpu_threads:{torch.get_num_threads()} {versions}",
      event="start", world_size=dist.world_size, hardware=hardware, versions=versions, settings=vars(config))
  for name, value in vars(config).items():  # console: changes only
    log(f"  {name.upper()}={value}", console=value != getattr(Config, name))

def build_run(config: Config, dist: Dist, log: Log) -> Run:
  """The seeded model, compiled if asked for."""
  if config.deterministic:
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
  config = replace(config, attention=choose_attention(config, dist, log))
  torch.manual_seed(config.seed)
  model = GPT(config).to(dist.device)
  nll = compiled(token_nll) if config.compile == "1" else token_nll
  if config.compile == "blocks":  # they share a graph: compiles sooner
    model.embed, model.nll = compiled(model.embed), compiled(model.nll)
    for block in model.blocks:
      block.forward = compiled(block.forward)
  run = Run(config, dist, log, model, nll, FlatGradients(model))
  log(f"model_params:{run.grads.flat.numel()} weights_sha256 at the start, by rank: {dist.weight_digests(model)}")
  return run

def train_and_store(run: Run, stream: TokenStream, optimizers: list, evaluator: Evaluator, code: bytes) -> Path:
  """Returns the artifact's path, on rank 0."""
  def validate(title: str, **record) -> None:
    start = time.perf_counter()
    rows, length = evaluator.plain
    windows = sliding_windows(evaluator.num_targets, length, stride=length)
    loss, bpb = evaluator.loss_and_bpb(evaluator.score(windows, rows, length))
    run.log(f"{title} val_loss:{loss:.4f} val_bpb:{bpb:.4f} train_time:{1000 * record['train_s']:.0f}ms",
            **record, val_loss=loss, val_bpb=bpb, seconds=time.perf_counter() - start)

  average, progress = train(run, stream, optimizers, validate)
  average.apply()
  validate(f"swa:{average.count}_snapshots", event="swa", **progress)
  run.log(f"weights_sha256 after training, by rank: {run.dist.weight_digests(run.model)}")
  limit, left = run.config.max_artifact_bytes, (run.config.max_wallclock_seconds or math.inf) - progress["train_s"]
  moments, start = error_moments(run, stream, progress["step"], seconds=left), time.perf_counter()
  data = encode_artifact(run.model.state_dict(), run.config, moments=moments, limit=limit - len(code), dist=run.dist)
  if not run.dist.is_master:
    return Path()  # rank 0's file is read
  part = run.log.folder / "artifact.part"
  part.write_bytes(data)
  path = part.replace(part.with_suffix(".bin"))  # whole under this name
  warning = "" if (total := len(data) + len(code)) < limit else " TOO LARGE, cannot be submitted"
  run.log(f"artifact_bytes:{len(data)} code_bytes:{len(code)} total_bytes:{total} limit_bytes:{limit}{warning}",
          event="artifact", artifact_bytes=len(data), code_bytes=len(code), seconds=time.perf_counter() - start)
  return path

def evaluate_artifact(run: Run, path: str | Path, evaluator: Evaluator) -> None:
  """The submitted pass, then, if asked for, the plain one."""
  config, log = run.config, run.log
  for label in ("final_ttt_exact", "final_quantized_exact")[: 1 + config.eval_plain]:
    submitted = label == "final_ttt_exact"
    start = run.dist.now() - evaluator.warm_up_s * submitted  # compiling and reading count
    run.model.load_state_dict(load_artifact(path, run.dist)[1])
    nats, adapted = evaluator.score_then_adapt(evaluator.epochs if submitted else 0, start)
    loss, bpb = evaluator.loss_and_bpb(nats)
    if not math.isfinite(loss):
      raise UserError(f"{label} val_loss:{loss}: adaptation diverged, lower TTT_LR={config.ttt_lr}")
    result = dict(run_id=config.run_id, seed=config.seed, val_loss=loss, val_bpb=bpb, chunks_adapted=adapted,
                  targets=evaluator.num_targets, full_targets=evaluator.full_targets,
                  bytes=int(evaluator.bytes_before[-1]), eval_seconds=run.dist.now() - start)
    log(f"weights_sha256 after {label}, by rank: {run.dist.weight_digests(run.model)}")
    log(f"{label} val_loss:{loss:.8f} val_bpb:{bpb:.8f} eval_time:{1000 * result['eval_seconds']:.0f}ms targets:"
        f"{evaluator.num_targets}/{evaluator.full_targets} bytes:{result['bytes']} chunks_adapted:{adapted}",
        event=label, **result)
    if submitted and log.folder:
      (log.folder / "submission.json").write_text(json.dumps(result, indent=2) + "\n")
      if config.val_nll_path:
        np.save(config.val_nll_path, nats)

def main() -> None:
  """Check, warm up, train and store, evaluate."""
  code = Path(__file__).read_bytes()
  config = Config.from_env(os.environ)
  dist = Dist(config.device, os.environ)
  if config.artifact:  # it says what model it holds
    stored, _ = load_artifact(config.artifact, dist)
    config = replace(config, **{name: getattr(stored, name) for name in MODEL_SETTINGS})
    if problems := config.problems():
      raise UserError(f"ARTIFACT={config.artifact} with these settings: {'; '.join(problems)}")
  config = settle(config, dist)
  token_bytes = TokenBytes(load_tokenizer(config))
  val_stream = TokenStream(config, "val")
  train_stream = None if config.artifact else TokenStream(config, "train")
  config = replace(config, run_id=config.run_id or dist.from_master(time.strftime(f"%Y%m%d_%H%M%S_s{config.seed}")))
  log = Log(Path("logs") / config.run_id if dist.is_master else None)
  describe(log, config, dist, code)
  run = build_run(config, dist, log)
  evaluator = Evaluator(run, val_stream.read(0, val_stream.num_tokens), token_bytes)
  optimizers = [] if config.artifact else build_optimizers(run.model, config, dist)
  warm_up(run, train_stream, optimizers, evaluator)
  path = config.artifact or train_and_store(run, train_stream, optimizers, evaluator, code)
  evaluate_artifact(run, path, evaluator)
  if dist.world_size > 1:
    distributed.destroy_process_group()
    os._exit(0)  # else 1 run of 30 aborts in gloo's threads

if __name__ == "__main__":
  try:
    main()
  except UserError as problem:
    if os.environ.get("RANK", "0") != "0":
      time.sleep(2)  # rank 0 speaks; torchrun ends the others
    sys.exit(f"error: {problem}")
