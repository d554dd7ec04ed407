"""Make a submission out of finished runs, and say which of the challenge's rules they keep.

    python records/package.py logs/A logs/B logs/C --name "Valid adaptation" --author "A. Person" --github-id aperson
        --baseline-bpb 1.1194 [--data DIR] [--tokenizer FILE.model]

Writes records/TRACK/DATE_Name/, ready to be copied into a pull request: README.md with tables, pictures and the
commands that reproduce it, submission.json, VALIDITY.md, train_gpt.py, requirements.txt, and of each seed
train_seed<S>.log and metrics_seed<S>.jsonl; of the first run also artifact_seed<S>.bin, for records/check_validity.py.

Nothing is written if the runs do not belong together, are not complete, contradict themselves, or if an artifact,
scored again from the folder with its script on the first --chunks chunks, does not give the score of the run. If they
are sound but break a rule of the record track (bytes, seconds, machine, split, seeds, beating the baseline by 0.005
nats a token at p < 0.01) the folder goes to the non-record track, and its README.md says which.

The test: Student's t, one sample, one-sided. Rejected must be that the seeds' mean val_loss is not lower than the
baseline's by 0.005 nats a token. A baseline in BPB is converted with this split's bytes per token.
"""
import json
import math
import re
import shlex
import shutil
import statistics
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import plot
from runs import (
    BPB_TOLERANCE,
    NOT_THE_RECIPE,
    REPOSITORY,
    RULES,
    FinishedRun,
    UserError,
    artifact_digest,
    chain_problems,
    find,
    load_script,
    score_again,
)
from scipy import stats

sys.path.insert(0, str(REPOSITORY / "data"))
from dataset_files import ArgumentParser, check_range, run_tool  # noqa: E402

RECORD, NON_RECORD = "track_10min_16mb", "track_non_record_16mb"
PICTURES = {
    "training.png": "training and validation loss by step and by seconds", "stages.png": "BPB by stage",
    "running.png": "BPB of what is scored so far, with and without adaptation",
    "bits.png": "bits a parameter takes in the artifact", "position.png": "loss by position in the window",
}


class Finding(NamedTuple):
    """A rule and what was found. `sound`: without it there is no submission at all, not even in the other track."""

    rule: str
    found: str
    holds: bool
    sound: bool = False


def baseline_nats(bpb: float | None, nats: float | None, run: FinishedRun) -> float | None:
    """A baseline's nats a token."""
    if bpb is None:
        return nats
    return bpb * math.log(2) * run.result["bytes"] / run.result["targets"]


def p_value(losses: list[float], baseline: float) -> float:
    """That so low a mean is chance if the true one is `baseline` less 0.005 or higher; nan for a single loss."""
    return float(stats.ttest_1samp(losses, baseline - RULES["nats"], alternative="less").pvalue)


def most(runs: list[FinishedRun], name: str) -> float:
    return max(getattr(run, name) if hasattr(run, name) else run.result[name] for run in runs)


def total_bytes(run: FinishedRun) -> int:
    return run.artifact.stat().st_size + run.script.stat().st_size


def findings_of(runs: list[FinishedRun], baseline: float | None) -> list[Finding]:
    """Every rule that the runs' own files can answer."""
    first, found = runs[0], []
    others = [run.script for run in runs if run.script.read_bytes() != first.script.read_bytes()]
    found.append(Finding("one script for all seeds", f"{len(others)} of {len(runs)} differ", not others, True))
    recipes = [{name: value for name, value in run.settings.items() if name not in NOT_THE_RECIPE}
               | {name: Path(run.settings[name]).name for name in ("data_path", "tokenizer_path")} for run in runs]
    changed = sorted({f"{name.upper()}={recipes[0].get(name)} and {recipe.get(name)}" for recipe in recipes
                      for name in recipes[0] | recipe if recipe.get(name) != recipes[0].get(name)})
    found.append(Finding("the same settings but for the seed", ", ".join(changed) or "the same", not changed, True))
    seeds = [run.seed for run in runs]
    starts = {next(r["sha256"] for r in run.records if r["event"] == "weights") for run in runs}
    found.append(Finding("another seed for each run, and other weights at its start",
                         f"seeds {', '.join(map(str, seeds))}, {len(starts)} of {len(runs)} starts differ",
                         len(set(seeds)) == len(starts) == len(runs), True))
    for run in runs:
        problems = chain_problems(run)
        found.append(Finding(f"seed {run.seed}: each target scored once, before it is trained on", "; ".join(
            problems[:3]) or f"{run.result['targets']:,} targets in {len(run.scores):,} chunks", not problems, True))
        logged = run.log.read_text().startswith(run.script.read_text())
        found.append(Finding(f"seed {run.seed}: train.log begins with the script that ran", "yes" if logged else "no",
                             logged, True))
        digest = artifact_digest(load_script(run.script), run.artifact) if run.artifact.is_file() else "no file"
        expected = run.scores[0]["weights"]
        found.append(Finding(f"seed {run.seed}: artifact.bin is what was scored first", f"weights {digest}, "
                             f"{expected} in the records", digest == expected, True))
    of_split = [(run.result["targets"], run.result["full_targets"], run.result["bytes"]) for run in runs]
    found.append(Finding("the whole split is scored, by all runs alike", "; ".join(
        f"{t:,} of {n:,} targets, {b:,} bytes" for t, n, b in dict.fromkeys(of_split)),
        len(set(of_split)) == 1 and of_split[0][0] == of_split[0][1], True))
    lines = len(first.script.read_text().splitlines())
    found.append(Finding(f"train_gpt.py under {RULES['lines']:,} lines", f"{lines:,}", lines < RULES["lines"]))

    if all(run.artifact.is_file() for run in runs):
        largest = max(map(total_bytes, runs))
        found.append(Finding(f"artifact and script under {RULES['total_bytes']:,} bytes", f"{largest:,}",
                             largest < RULES["total_bytes"]))
    trained, evaluated = most(runs, "train_seconds"), most(runs, "eval_seconds")
    found.append(Finding(f"trained at most {RULES['train_seconds']} s", f"{trained:.1f} s",
                         trained <= RULES["train_seconds"]))
    found.append(Finding(f"evaluated at most {RULES['eval_seconds']} s, compile time included", f"{evaluated:.1f} s",
                         evaluated <= RULES["eval_seconds"]))
    machines = sorted({run.hardware for run in runs})
    h100 = machines == ["8 x NVIDIA H100 80GB HBM3"]  # what torch calls an SXM
    found.append(Finding("on 8xH100 SXM", "; ".join(machines), h100))
    split = of_split[0][0], first.settings["vocab_size"], first.settings["train_seq_len"]
    found.append(Finding(f"FineWeb's split: {RULES['targets']:,} targets with 1,024 tokens at length 2,048; another "
                         "tokenizer's cannot be shown here", "{:,} with {:,} at {:,}".format(*split),
                         split == (RULES["targets"], 1024, 2048)))
    found.append(Finding(f"{RULES['seeds']} seeds", str(len(runs)), len(runs) >= RULES["seeds"]))
    if baseline is None:
        found.append(Finding("better than a baseline", "none given: --baseline-bpb or --baseline-nats", False))
    else:
        losses = [run.result["val_loss"] for run in runs]
        p = p_value(losses, baseline) if len(losses) > 1 else math.nan
        found.append(Finding(f"below the baseline's {baseline:.6f} nats by {RULES['nats']}, p < {RULES['p']}",
                             f"mean {statistics.fmean(losses):.6f}, p = {p:.2g}", p < RULES["p"]))
    return found


def score_from(folder: Path, run: FinishedRun, data: Path, tokenizer: Path, chunks: int) -> Finding:
    """Whether the folder's own script gives the run's artifact the run's score, on the first chunks."""
    chunks = min(chunks, len(run.scores))
    print(f"seed {run.seed}:")
    targets = min(chunks * run.settings["ttt_chunk_tokens"], run.result["targets"])
    packaged = FinishedRun(folder / "train_gpt.py", run.log, run.metrics, run.artifact)
    with tempfile.TemporaryDirectory() as temporary:
        again, _ = score_again(packaged, run.artifact.resolve(), data, tokenizer, Path(temporary), targets)
    bpb, told = again["val_bpb"], run.scores[chunks - 1]["running_bpb"]
    same = "the same bits" if bpb == told else f"tolerance {BPB_TOLERANCE}"
    return Finding(f"seed {run.seed}: scored again from this folder, {chunks} chunks",
                   f"{bpb:.6f} BPB, in the run {told:.6f} ({same})", abs(bpb - told) <= BPB_TOLERANCE, True)


# ---- What is written


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(map(str, row)) + " |" for row in [header, ["---"] * len(header), *rows]]
    return "\n".join(lines) + "\n"


def results_table(runs: list[FinishedRun]) -> str:
    stages = [(event, title) for event, title in plot.STAGES if all(event in run.last for run in runs)]
    rows = [[run.seed, run.last["swa"]["step"], *(f"{run.last[event]['val_bpb']:.4f}" for event, _ in stages),
             f"{run.result['val_loss']:.6f}", f"{total_bytes(run):,}", f"{run.train_seconds:.1f}",
             f"{run.result['eval_seconds']:.1f}"] for run in runs]
    columns = [[run.last[event]["val_bpb"] for run in runs] for event, _ in stages]
    columns.append([run.result["val_loss"] for run in runs])
    if len(runs) > 1:
        means = [f"{statistics.fmean(column):.4f} ± {statistics.stdev(column):.4f}" for column in columns]
        rows.append(["**mean ± std**", "", *means, "", "", ""])
    return table(["seed", "steps", *(f"{title}, BPB" for _, title in stages), "val_loss, nats", "bytes", "training, s",
                  "evaluation, s"], rows)


def commands(run: FinishedRun) -> str:
    """How to make the runs again, in this folder."""
    defaults = vars(load_script(run.script).Config())
    settled = {"device", "compute_dtype", "compile", "micro_batch_tokens"}  # if not set, by the machine: logged alike

    def text(*names: str) -> str:
        return " ".join(f"{name.upper()}={shlex.quote(str(int(value) if isinstance(value, bool) else value))}"
                        for name in names for value in [run.settings[name]])

    paths = "DATA_PATH=... TOKENIZER_PATH=... "  # the reader's own
    changed = [name for name, value in run.settings.items()
               if value != defaults[name] and name not in NOT_THE_RECIPE | settled]
    replay = f"TTT_MAX_CHUNKS={run.last['adapt_stop']['chunk']} EVAL_MAX_SECONDS=0 " if "adapt_stop" in run.last else ""
    ranks = run.last["start"]["world_size"]
    launch = "python" if ranks == 1 else f"torchrun --standalone --nproc_per_node={ranks}"
    lines = ["pip install -r requirements.txt  # or a torch from 2.9 to 2.14 of your own",
             f"# chosen by the machine, or set: {text(*sorted(settled))}",
             f"export {paths}{text(*changed)}".rstrip(), f"SEED={run.seed} {launch} train_gpt.py",
             f"{replay}SEED={run.seed} ARTIFACT=artifact_seed{run.seed}.bin {launch} train_gpt.py  # only evaluate"]
    return "```\n" + "\n".join(lines) + "\n```\n"


def readme(name: str, runs: list[FinishedRun], found: list[Finding], pictures: list[str], track: str,
           hardware: str) -> str:
    first, start = runs[0], runs[0].last["start"]
    bpbs = [run.result["val_bpb"] for run in runs]
    spread = f" ± {statistics.stdev(bpbs):.4f} (standard deviation of {len(bpbs)} seeds)" if len(bpbs) > 1 else ""
    broken = [finding for finding in found if not finding.holds]
    why = ("Every rule of the record track that this folder can show is kept." if not broken else
           "Not in the record track: " + "; ".join(f"{f.rule}: {f.found}" for f in broken) + ".")
    rules = table(["rule", "found", "kept"], [[f.rule, f.found, "yes" if f.holds else "**no**"] for f in found])
    shown = "\n".join(f'<img src="figures/{picture}" width="50%" alt="{PICTURES[picture]}">\n\n{PICTURES[picture]}\n'
                      for picture in pictures)
    how = ("Adaptation scores each chunk first and trains on it afterwards;" if first.result["chunks_adapted"] else
           "Nothing is adapted during the evaluation;")
    versions = ", ".join(f"{module} {version}" for module, version in start["versions"].items() if version)
    return f"""# {name}

**{statistics.fmean(bpbs):.4f} BPB**{spread}, {track}, on {hardware}. {why}

{results_table(runs)}
{how} VALIDITY.md has the record of every chunk, and

```
python records/check_validity.py FOLDER --data DATA_PATH
```

of the repository that train_gpt.py is from scores the artifact again and looks for anything of the future in the past.

## Rules

{rules}
The test is Student's t, one sample, one-sided: rejected is that the seeds' mean val_loss is not lower than the
baseline's by {RULES['nats']} nats a token.

## Again

{commands(first)}
{versions}. The seeds differ in nothing but SEED. The exported settings are those that are not train_gpt.py's defaults;
each train_seed<S>.log begins with the script, then has versions, machine and all settings, then the run.

## Pictures

{shown}"""


def validity(runs: list[FinishedRun]) -> str:
    """The record of every chunk: what it was scored with, what was trained on then."""
    text = ["# Validity: score first, then adapt\n",
            "Made from metrics_seed<S>.jsonl by records/package.py, checked by records/check_validity.py. Targets are "
            "numbered in the order of the split, target p is token p + 1; ranges end before their second number. A "
            "chunk's weights are a 64-bit digest of their bit patterns, taken on the device before it is scored: the "
            "same as the chunk's before it if nothing was trained on in between, another otherwise. After the last "
            "chunk there is no training.\n"]
    for run in runs:
        told = {record["when"]: record["sha256"] for record in run.records if record["event"] == "weights"}
        trained = {record["chunk"]: record for record in run.records if record["event"] == "adapt"}
        problems = chain_problems(run)
        text.append(f"## Seed {run.seed}\n")
        text.append(table(["", ""], [
            ["verdict of the records", "; ".join(problems) or "each target scored once, and before it is trained on"],
            ["targets scored", f"{run.result['targets']:,} of {run.result['full_targets']:,}"],
            ["bytes of text", f"{run.result['bytes']:,}"],
            ["chunks, trained on afterwards", f"{len(run.scores):,}, {len(trained):,}"],
            ["SHA-256 of the first chunk's weights (the artifact's)", told.get("before final_ttt_exact", "")],
            ["SHA-256 of the last chunk's weights", told.get("after final_ttt_exact", "")],
            ["val_loss, val_bpb", f"{run.result['val_loss']:.8f}, {run.result['val_bpb']:.8f}"],
        ]))
        rows = []
        for record in run.scores:
            then = trained.get(record["chunk"])
            rows.append([record["chunk"], f"{record['first']} to {record['end']}", record["weights"],
                         f"{record['running_bpb']:.6f}", f"{then['first']} to {then['end']}" if then else "nothing"])
        text.append(f"<details><summary>{len(rows):,} chunks</summary>\n")
        text.append(table(["chunk", "scored", "with weights", "BPB so far", "then trained on"], rows))
        text.append("</details>\n")
    return "\n".join(text)


def submission(runs: list[FinishedRun], name: str, author: str, github_id: str, track: str, date: str,
               hardware: str) -> dict:
    """The challenge's keys; mean_val_* and val_* are the same."""
    def summary(run: FinishedRun) -> dict:
        return dict(val_loss=run.result["val_loss"], val_bpb=run.result["val_bpb"], steps=run.last["swa"]["step"],
                    artifact_bytes=run.artifact.stat().st_size, total_bytes=total_bytes(run),
                    train_seconds=run.train_seconds, eval_seconds=run.result["eval_seconds"],
                    chunks_adapted=run.result["chunks_adapted"], targets=run.result["targets"],
                    bytes=run.result["bytes"])

    losses, bpbs = ([run.result[key] for run in runs] for key in ("val_loss", "val_bpb"))
    return dict(
        track=track.removeprefix("track_"), date=date, name=name, author=author, github_id=github_id,
        val_loss=statistics.fmean(losses), val_bpb=statistics.fmean(bpbs), mean_val_loss=statistics.fmean(losses),
        mean_val_bpb=statistics.fmean(bpbs), val_loss_std=statistics.stdev(losses) if len(runs) > 1 else None,
        val_bpb_std=statistics.stdev(bpbs) if len(runs) > 1 else None, seeds=[run.seed for run in runs],
        seed_results={str(run.seed): summary(run) for run in runs}, hardware=hardware,
        artifact_bytes=max(run.artifact.stat().st_size for run in runs), code_bytes=runs[0].script.stat().st_size,
        total_bytes=max(map(total_bytes, runs)), train_seconds=most(runs, "train_seconds"),
        eval_seconds=most(runs, "eval_seconds"), data=Path(runs[0].settings["data_path"]).name,
        versions=runs[0].last["start"]["versions"])


def package(folders: list[Path], name: str, author: str, github_id: str, baseline_bpb: float | None,
            baseline: float | None, data: Path | None, tokenizer: Path | None, chunks: int, out: Path,
            machine: str = "") -> Path | None:
    """Writes the folder and returns it; None if the runs are not sound."""
    runs = [FinishedRun.from_logs(folder) for folder in folders]
    for run, folder in zip(runs, folders):
        if not run.trained:
            raise UserError(f"{folder}: only evaluated an artifact: give the run that trained it")
    try:
        first, date = runs[0], json.loads((folders[-1] / "submission.json").read_text())["date"]
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{folders[-1]}/submission.json: {error!r:.60}: finish the run with RESUME=auto") from error
    slug = re.sub(r"[^A-Za-z0-9]+", "_", name).strip("_")
    targets = [out / track / f"{date}_{slug}" for track in (RECORD, NON_RECORD)]
    if there := [str(target) for target in targets if target.exists()]:
        raise UserError(f"{there[0]}: there already: give another --name, or remove it")
    found = findings_of(runs, baseline_nats(baseline_bpb, baseline, first))
    sound = all(finding.holds for finding in found if finding.sound)
    with tempfile.TemporaryDirectory(dir=out, prefix=".package_") as temporary:
        folder = Path(temporary) / "folder"
        folder.mkdir()
        shutil.copy(first.script, folder / "train_gpt.py")
        if sound:
            data = find(first.settings["data_path"], "--data DIR", data)
            tokenizer = find(first.settings["tokenizer_path"], "--tokenizer FILE.model", tokenizer)
            for run in runs:
                found.append(score_from(folder, run, data, tokenizer, chunks))
        for finding in found:
            mark = "ok  " if finding.holds else "FAIL" if finding.sound else "no  "
            print(f"  {mark}  {finding.rule}: {finding.found}")
        if not all(finding.holds for finding in found if finding.sound):
            print("nothing is written: the lines marked FAIL")
            return None
        track = RECORD if all(finding.holds for finding in found) else NON_RECORD
        for run in runs:
            shutil.copy(run.log, folder / f"train_seed{run.seed}.log")
            shutil.copy(run.metrics, folder / f"metrics_seed{run.seed}.jsonl")
        shutil.copy(first.artifact, folder / f"artifact_seed{first.seed}.bin")
        shutil.copy(REPOSITORY / "requirements.txt", folder / "requirements.txt")
        pictures = plot.save_all(runs, folder / "figures")
        hardware = first.hardware + f" ({machine})" * bool(machine)
        (folder / "README.md").write_text(encoding="utf-8", data=readme(name, runs, found, pictures, track, hardware))
        (folder / "VALIDITY.md").write_text(validity(runs), encoding="utf-8")
        result = submission(runs, name, author, github_id, track, date, hardware)
        (folder / "submission.json").write_text(json.dumps(result, indent=2) + "\n")
        target = targets[track == NON_RECORD]
        target.parent.mkdir(exist_ok=True)
        folder.rename(target)
    print(f"{target}" + ("" if track == RECORD else ": not in the record track, for the lines marked no"))
    return target


def run(argv: list[str]) -> int:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("runs", type=Path, nargs="+", help="folders logs/RUN_ID, one a seed")
    parser.add_argument("--name", required=True, help="of the submission; the folder is called after it")
    parser.add_argument("--author", required=True)
    parser.add_argument("--github-id", required=True)
    baseline = parser.add_mutually_exclusive_group()
    baseline.add_argument("--baseline-bpb", type=float, help="the score to beat, in bits per byte")
    baseline.add_argument("--baseline-nats", type=float, help="the same in nats a token")
    parser.add_argument("--machine", default="", help="what the log does not say of it: a CPU's name, the provider")
    parser.add_argument("--data", type=Path, help="the data set of the runs; default: where they had it")
    parser.add_argument("--tokenizer", type=Path, help="its SentencePiece model; default: where they had it")
    parser.add_argument("--chunks", type=int, default=4, help="how many chunks to score again, default 4")
    parser.add_argument("--out", type=Path, default=REPOSITORY / "records", help="default: this folder")
    given = parser.parse_args(argv)
    check_range("--chunks", given.chunks, 1 << 20)
    if not re.search(r"[A-Za-z0-9]", given.name) or re.search(r"[|\[\]\n<>]", given.name + given.machine):
        raise UserError(f"--name {given.name!r} --machine {given.machine!r}: need a letter or digit, none of |[]<>")
    if not given.out.is_dir():
        raise UserError(f"--out {given.out}: no such folder")
    target = package(given.runs, given.name, given.author, given.github_id, given.baseline_bpb, given.baseline_nats,
                     given.data, given.tokenizer, given.chunks, given.out, given.machine)
    return 0 if target else 1


def main(argv: list[str]) -> int:
    """Exit status: 0 if a folder was written, else 1."""
    return run_tool(lambda: run(argv))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
