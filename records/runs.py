"""What the tools of this folder share: a finished run as the files it left, its chain of chunks, and its script run
again.

A run is a folder logs/RUN_ID, or one seed of a packaged folder, where the same files are called train_seed<S>.log,
metrics_seed<S>.jsonl and artifact_seed<S>.bin (of one seed at least).
"""
import importlib.util
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY / "data"))
from dataset_files import UserError, shard_header, shard_paths  # noqa: E402

# What may differ between the seeds of one submission, and between a run and its check.
NOT_THE_RECIPE = {"seed", "run_id", "val_nll_path", "resume", "checkpoint_every_seconds", "checkpoint_every_steps",
                  "preflight_only", "data_path", "tokenizer_path"}
RULES = dict(total_bytes=16_000_000, train_seconds=600, eval_seconds=600, lines=1500, seeds=3, nats=0.005, p=0.01,
             targets=62_021_632)  # targets: of FineWeb's validation split with 1024 tokens at length 2048
LAUNCHER = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "RESUME", "PREFLIGHT_ONLY",
            "TORCHELASTIC_MAX_RESTARTS"}  # of a pod's environment, not for a process of its own
BPB_TOLERANCE = 1e-3  # of a score made again on another device or another number of ranks


class FinishedRun:
    """A run's files; .records are the lines of metrics.jsonl, .last the last one of each event."""

    def __init__(self, script: Path, log: Path, metrics: Path, artifact: Path):
        self.script, self.log, self.metrics, self.artifact = script, log, metrics, artifact
        for path in (script, log, metrics):
            if not path.is_file():
                raise UserError(f"{path}: not there: give the folder of a run that has finished, logs/RUN_ID")
        try:
            self.records = [json.loads(line) for line in metrics.read_text().splitlines()]
            self.last = {record["event"]: record for record in self.records}
            self.settings = self.last["start"]["settings"]
            self.result = self.last["final_ttt_exact"]
            self.seed = int(self.result["seed"])
            self.scores[0]["weights"], self.last["weights"]["sha256"]  # older scripts left neither
        except (ValueError, KeyError, TypeError, IndexError) as error:
            raise UserError(f"{metrics}: no finished run of this script ({error!r:.60}): finish it with RESUME=auto,"
                            " or run it again") from error

    @classmethod
    def from_logs(cls, folder: Path) -> "FinishedRun":
        return cls(*(folder / name for name in ("train_gpt.py", "train.log", "metrics.jsonl", "artifact.bin")))

    @classmethod
    def all_of(cls, record: Path) -> list["FinishedRun"]:
        """The runs of a packaged folder, by seed. Raises UserError if there are none."""
        metrics = sorted(record.glob("metrics_seed*.jsonl"), key=lambda path: (len(path.name), path.name))  # 7, 42
        if not metrics:
            raise UserError(f"{record}: no metrics_seed*.jsonl there: give a folder that records/package.py made")
        seeds = [path.stem.removeprefix("metrics_seed") for path in metrics]
        return [cls(record / "train_gpt.py", record / f"train_seed{seed}.log", path,
                    record / f"artifact_seed{seed}.bin") for seed, path in zip(seeds, metrics)]

    @property
    def scores(self) -> list[dict]:
        """Of the submitted pass, by chunk."""
        return [record for record in self.records if record["event"] == "score" and record.get("submitted")]

    @property
    def trained(self) -> bool:
        return "swa" in self.last and "artifact" in self.last

    @property
    def train_seconds(self) -> float:
        """Steps, and the gradients for GPTQ, which are taken from training data too."""
        return self.last["swa"]["train_s"] + self.last["moments"]["seconds"]

    @property
    def hardware(self) -> str:
        """All machines that had a part in it: a run can be resumed on another."""
        parts = [f"{record['world_size']} x {record['hardware']}" for record in self.records
                 if record["event"] == "start"]
        return ", then ".join(dict.fromkeys(parts))


def chain_problems(run: FinishedRun) -> list[str]:
    """What in a run's own records contradicts "each target is scored once, by weights that never saw it".

    Scoring must advance without gap or overlap to the last target; what is trained on must be scored already; weights
    (their digests) must change exactly where a chunk was trained on; after the last chunk there is no training; and the
    result must be that of the last chunk."""
    problems, end, adapted, weights, changed = [], 0, 0, None, False
    for record in run.records:
        if record["event"] == "score" and record.get("submitted"):
            chunk = record["chunk"]
            if record["first"] != end:
                problems.append(f"chunk {chunk} scores from target {record['first']}, those before end at {end}")
            if weights is not None and (record["weights"] != weights) != changed:
                problems.append(f"chunk {chunk} is scored by {'the same' if changed else 'other'} weights as the one "
                                f"before, which {'was' if changed else 'was not'} trained on")
            end, weights, changed = record["end"], record["weights"], False
        elif record["event"] == "adapt":
            adapted, changed = adapted + 1, record["lr"] > 0
            if not 0 <= record["first"] < record["end"] <= end:
                problems.append(f"targets {record['first']} to {record['end']} are trained on when {end} are scored")
            if end >= run.result["targets"]:
                problems.append(f"trained on {record['first']} to {record['end']} after the last target was scored")
    result, scores = run.result, run.scores
    bits = result["val_loss"] * result["targets"] / math.log(2)
    for name, told, found in (("targets", result["targets"], end),
                              ("chunks adapted on", result["chunks_adapted"], adapted)):
        if told != found:
            problems.append(f"{told} {name} in the result, {found} in the records of the chunks")
    for name, bpb in (("the last chunk's", scores[-1]["running_bpb"]),
                      ("loss, targets and bytes give", bits / result["bytes"])):
        if not math.isclose(bpb, result["val_bpb"], rel_tol=1e-9):
            problems.append(f"val_bpb {result['val_bpb']}, {name} {bpb}")
    return problems


def artifact_digest(script: ModuleType, artifact: Path) -> str:
    """The digest that the first chunk is scored with if this artifact is. Raises UserError if it is none."""
    config, weights = script.decode_artifact(artifact.read_bytes())
    model = script.GPT(config)
    model.load_state_dict(weights)
    return script.digest(model)


def load_script(path: Path) -> ModuleType:
    """A run's own train_gpt.py as a module; importing it starts nothing."""
    spec = importlib.util.spec_from_file_location(f"train_gpt_{abs(hash(path))}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look there
    spec.loader.exec_module(module)
    return module


def find(path: str, option: str, given: Path | None) -> Path:
    """What is given, else what the run used, if it is still there."""
    found = (given or Path(path)).resolve()
    if not found.exists():
        raise UserError(f"{found}: not there: give {option}")
    return found


def score_again(run: FinishedRun, artifact: Path, data: Path, tokenizer: Path, folder: Path, targets: int,
                **settings) -> tuple[dict, np.ndarray]:
    """Runs the run's script on its artifact in `folder`, over the first `targets` targets of the split: what it
    reports, and nats fp32 [targets]. Settings and CPU threads are the run's, but for these settings and those of
    another machine (the environment's OMP_NUM_THREADS holds); on GPUs with DETERMINISTIC=1."""
    import torch

    again = {name: value for name, value in run.settings.items() if name not in NOT_THE_RECIPE}
    again |= dict(artifact=artifact, data_path=data, tokenizer_path=tokenizer, max_val_tokens=targets, eval_plain=False,
                  eval_max_seconds=0.0, run_id="again", val_nll_path=folder / "nats.npy", seed=run.seed,
                  checkpoint_every_seconds=0.0, checkpoint_every_steps=0)
    if "adapt_stop" in run.last:
        again["ttt_max_chunks"] = run.last["adapt_stop"]["chunk"]
    if again["device"] == "cuda" and torch.cuda.is_available():  # nothing is chosen by its speed, which varies
        again |= dict(deterministic=True, attention="flash" if again["attention"] == "auto" else again["attention"])
    elif again["device"] == "cuda":
        again |= dict(device="cpu", attention="products", compile="auto", micro_batch_tokens=0)
    names = {name.upper(): str(int(value)) if isinstance(value, bool) else str(value)
             for name, value in (again | settings).items()}
    print(f"  ... scoring {targets:,} targets with {run.script}", flush=True)
    (folder / "nats.npy").unlink(missing_ok=True)
    if threads := re.search(r"cpu_threads:(\d{1,4})\b", run.log.read_text(errors="replace")):  # else speed decides
        names["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS", threads[1])
    done = subprocess.run([sys.executable, str(run.script.resolve())], cwd=folder, capture_output=True, text=True,
                          env={name: value for name, value in os.environ.items() if name not in LAUNCHER} | names)
    if done.returncode:
        raise UserError(f"{run.script} does not score {artifact} again: {(done.stderr or done.stdout).strip()[-300:]}")
    result = json.loads((folder / "logs/again/submission.json").read_text())
    if not (folder / "nats.npy").exists():
        raise UserError(f"{run.script} ignores VAL_NLL_PATH: its scores cannot be checked target by target")
    return result, np.load(folder / "nats.npy", allow_pickle=False)


def read_validation(data: Path) -> np.ndarray:
    """The split's tokens, uint16."""
    shards = shard_paths(data, "val")
    if not shards:
        raise UserError(f"{data}: no fineweb_val_*.bin there: give --data with the data set of the run")
    return np.concatenate([np.fromfile(path, "<u2", offset=len(shard_header(0))) for path in shards])
