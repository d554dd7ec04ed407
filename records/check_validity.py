"""Check a packaged run as a sceptic would: run its script on its artifact, change the future, and compare the past.

    python records/check_validity.py records/TRACK/FOLDER --data data/datasets/fineweb10B_sp1024

Of each seed: do the records of its chunks say that every target was scored once, before it was trained on? Are they all
the targets of the split, and the bytes those of its text? Does its log begin with the script, and submission.json say
what the records do? Of each artifact in the folder (or --artifact, of whichever seed), on the first --chunks chunks:
- weights: the artifact's have the digest that the first chunk was scored with;
- score: made again, it is that of the run at this chunk;
- sums: each target has one score, and they sum to the loss that is reported, so that none counts twice;
- bytes: as many as the text has that the tokenizer decodes;
- distribution: the probabilities of all tokens at one place sum to 1, so that no score knows its own target. For this
  the model, not adapted, reads one sequence as often as there are tokens, each time with another one there;
- past: after all tokens from some place on are replaced by others, every score before it is the same, bit for bit. It
  is done for --cuts places, the first in the first chunk, where no script may have learnt anything yet.
Prints a line for each, and ends with status 1 if one fails. Not found: a script that behaves otherwise when it is
checked, or only later than the chunks that are; and one that trains on the validation split before it stores the
artifact. These are for a reader of train_gpt.py.
"""
import json
import sys
import tempfile
from pathlib import Path

import numpy as np
from runs import (
    BPB_TOLERANCE,
    RULES,
    FinishedRun,
    UserError,
    artifact_digest,
    chain_problems,
    find,
    load_script,
    read_validation,
    score_again,
    shard_header,
)

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "data"))
from dataset_files import ArgumentParser, check_range, load_model, run_tool  # noqa: E402
from verify import Report  # noqa: E402

SPACE = "\u2581"  # SentencePiece's
PROBABILITY_TOLERANCE = 1e-3  # bf16 rounds a sequence alike in whichever row of a batch it is; this is for others


def text_bytes(tokenizer, tokens: np.ndarray) -> int:
    """UTF-8 bytes of the text that tokens[1:] add, by decoding it: control, unknown and unused tokens have none and
    hide the space of the token behind them; a byte token has one. Nothing of train_gpt.py's table of pieces is used."""
    ids = range(tokenizer.vocab_size())
    silent, byte = 0, 1
    kinds = np.array([silent if tokenizer.is_control(i) or tokenizer.is_unknown(i) or tokenizer.is_unused(i) else
                      byte if tokenizer.is_byte(i) else 2 for i in ids])
    texts = {i: tokenizer.id_to_piece(i) for i in ids if kinds[i] == 2}
    before = [next((i for i, piece in texts.items() if SPACE not in piece), 0)]  # a text in front keeps the space
    alone = len(tokenizer.decode(before).encode())
    spaced = [i for i, piece in texts.items() if piece[0] == SPACE and SPACE not in piece[1:] and piece != SPACE][:1]
    keeps_space = tokenizer.decode(spaced).startswith(" ")  # at the start of a text, too

    def bytes_of(part: list[int], behind_silent: bool) -> int:
        if not behind_silent:
            return len(tokenizer.decode(before + part).encode()) - alone
        hidden = keeps_space and tokenizer.id_to_piece(part[0]).startswith(SPACE)
        return len(tokenizer.decode(part).encode()) - hidden

    tokens = np.asarray(tokens, dtype=int)
    kind = kinds[tokens]
    starts = [0, *(np.flatnonzero(np.diff(kind)) + 1), len(tokens)]
    total = 0
    for start, end in zip(starts, starts[1:]):
        if kind[start] == byte:
            total += end - start
        elif kind[start] != silent:
            total += bytes_of(tokens[start:end].tolist(), bool(start and kind[start - 1] == silent))
    first = int(tokens[0])
    return int(total) - {silent: 0, byte: 1}.get(int(kinds[first]), bytes_of([first], False))


def another_future(tokens: np.ndarray, place: int, vocab_size: int) -> np.ndarray:
    """The tokens, all from `place` on replaced by others."""
    changed, rng = tokens.copy(), np.random.default_rng(place)
    changed[place:] = (changed[place:] + rng.integers(1, vocab_size, len(changed) - place)) % vocab_size
    return changed


def data_set(folder: Path, tokens: np.ndarray) -> Path:
    """A data set in this new folder whose validation split are these tokens."""
    folder.mkdir()
    with open(folder / "fineweb_val_000000.bin", "wb") as file:
        file.write(shard_header(len(tokens)))
        tokens.astype("<u2").tofile(file)
    return folder


def total_probability(run: FinishedRun, artifact: Path, tokenizer: Path, sequence: np.ndarray, folder: Path) -> float:
    """Of all tokens as the one behind three quarters of a sequence [L], read once with each of them there. Windows
    advance by half a sequence: its second half is then scored as it is in a run, at the end of a window."""
    vocab_size, length = run.settings["vocab_size"], len(sequence)
    place, stride = 3 * length // 4, length // 2 if length % 2 == 0 else length
    rows = np.tile(sequence, (vocab_size, 1))
    rows[:, place] = np.arange(vocab_size)
    data = data_set(folder / "all_tokens", np.append(rows, sequence[:1]))
    _, nats = score_again(run, artifact, data, tokenizer, folder, rows.size, eval_stride=stride, ttt_enabled=False)
    return float(np.exp(-nats.astype(float).reshape(rows.shape)[:, place - 1]).sum())


def check_files(report: Report, folder: Path, runs: list[FinishedRun], tokens: np.ndarray, tokenizer) -> None:
    """Adds to the report whether the folder's files agree with each other, and with the data."""
    try:
        told = json.loads((folder / "submission.json").read_text())
        results = {int(seed): result for seed, result in told["seed_results"].items()}
        mean, total = float(told["val_bpb"]), int(told["total_bytes"])
        figures = {seed: (float(result["val_bpb"]), int(result["total_bytes"])) for seed, result in results.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{folder}/submission.json: {error!r:.80}: make the folder with records/package.py") from error
    found = {run.seed: run.result["val_bpb"] for run in runs}
    alike = found == {seed: bpb for seed, (bpb, _) in figures.items()}
    report(alike and np.isclose(mean, np.mean(list(found.values()))),
           f"submission.json: {mean:.6f} BPB, the mean of {len(found)} seeds, as in their records",
           f"submission.json: {mean} BPB, seeds {figures}; their records say {found}")
    script = runs[0].script.stat().st_size
    sizes = {run.seed: script + run.last["artifact"]["artifact_bytes"] for run in runs}
    alike = sizes == {seed: size for seed, (_, size) in figures.items()}
    report(alike and max(sizes.values()) == total < RULES["total_bytes"],
           f"submission.json: {total:,} bytes at most with the script, as in the records",
           f"submission.json: {total:,} bytes; the records and the script give {sizes}")
    targets = (len(tokens) - 1) // runs[0].settings["train_seq_len"] * runs[0].settings["train_seq_len"]
    counted = text_bytes(tokenizer, tokens[: targets + 1])
    for run in runs:
        problems = chain_problems(run)
        report(not problems, f"seed {run.seed}: {run.result['targets']:,} targets in {len(run.scores):,} chunks, each "
               f"scored once and then trained on ({run.result['chunks_adapted']:,})",
               f"seed {run.seed}: {'; '.join(problems[:3])}")
        report((run.result["targets"], run.result["bytes"]) == (targets, counted),
               f"seed {run.seed}: they are all of the split, of {counted:,} bytes",
               f"seed {run.seed}: {run.result['targets']:,} targets of {run.result['bytes']:,} bytes; the split has "
               f"{targets:,} of {counted:,}")
        report(run.log.read_text().startswith(run.script.read_text()),
               f"seed {run.seed}: its log begins with the script",
               f"seed {run.seed}: its log begins with another script")


def check_artifact(report: Report, run: FinishedRun, artifact: Path, data: Path, tokenizer: Path, tokens: np.ndarray,
                   model, chunks: int, cuts: int) -> None:
    """Adds to the report what running the artifact shows."""
    scores, size = run.scores, run.settings["ttt_chunk_tokens"]
    chunks = min(chunks, len(scores))
    targets = min(chunks * size, run.result["targets"])
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        again, nats = score_again(run, artifact, data, tokenizer, folder, targets)
        bpb, told = again["val_bpb"], scores[chunks - 1]["running_bpb"]
        report(abs(bpb - told) <= BPB_TOLERANCE, f"score: {bpb:.6f} BPB after {chunks} chunks, the run's {told:.6f}"
               + (" (the same bits)" if bpb == told else f" (tolerance {BPB_TOLERANCE})"),
               f"score: {bpb} BPB after {chunks} chunks, the run's is {told}")
        mean = nats.sum(dtype=float) / targets
        report(len(nats) == targets == again["targets"] and np.isclose(mean, again["val_loss"], rtol=1e-6),
               f"sums: {targets:,} targets, their mean is the loss reported, {mean:.6f} nats",
               f"sums: {targets:,} targets, {len(nats):,} scores of mean {mean:.6f}; reported {again['targets']:,} and"
               f" {again['val_loss']:.6f}")
        counted = text_bytes(model, tokens[: targets + 1])
        report(counted == again["bytes"], f"bytes: {counted:,} of text, as reported",
               f"bytes: the text of these targets has {counted:,}, {again['bytes']:,} are reported")
        total = total_probability(run, artifact, tokenizer, tokens[: run.settings["train_seq_len"]], folder)
        report(abs(total - 1) < PROBABILITY_TOLERANCE,
               f"distribution: the probabilities of all tokens sum to {total:.6f}",
               f"distribution: the probabilities of all tokens sum to {total:.6f}: a score knows its own target")
        # Far from the edges of sequences, windows and chunks; the first in the first chunk, the last in the last.
        first, last = int(0.63 * min(size, targets)), int(targets - 0.37 * min(size, targets))
        places = sorted({max(1, int(place)) for place in np.linspace(first, last, cuts)})
        for place in places:
            changed_tokens = another_future(tokens, place + 1, run.settings["vocab_size"])
            other = data_set(folder / f"from_{place}", changed_tokens)
            _, changed = score_again(run, artifact, other, tokenizer, folder, targets)
            same = nats[:place] == changed[:place]
            one = int(np.argmin(same))
            report(bool(same.all()),
                   f"past: another future from target {place:,} on changes none of the {place:,} before",
                   f"past: another future from target {place:,} on changes {np.count_nonzero(~same):,} of the "
                   f"{place:,} before, the first is {one:,}, by {abs(nats[one] - changed[one]):.2g} nats")
            report(not np.array_equal(nats[place:], changed[place:]), "  and does change those after",
                   "past: nothing changes after another future either: the scores do not come from this data")


def check(folder: Path, data: Path | None, tokenizer: Path | None, artifact: Path | None, chunks: int,
          cuts: int) -> bool:
    """Prints the report; returns whether all holds."""
    report, runs = Report(), FinishedRun.all_of(folder)
    data = find(runs[0].settings["data_path"], "--data DIR", data)
    tokenizer = find(runs[0].settings["tokenizer_path"], "--tokenizer FILE.model", tokenizer)
    model, tokens, script = load_model(tokenizer), read_validation(data), load_script(runs[0].script)
    if model is None:
        raise UserError(f"{tokenizer}: no SentencePiece model: give --tokenizer FILE.model")
    check_files(report, folder, runs, tokens, model)
    paths = [artifact] if artifact else [run.artifact for run in runs if run.artifact.is_file()]
    if not paths:
        raise UserError(f"{folder}: no artifact_seed*.bin there: give --artifact FILE")
    checked = set()
    for path in paths:
        digest = artifact_digest(script, path)
        of_artifact = [run for run in runs if run.scores[0]["weights"] == digest]
        report(bool(of_artifact), f"weights: {path.name} is what seed {of_artifact[0].seed if of_artifact else ''} was "
               "first scored with", f"weights: {path} is what no seed was first scored with")
        for run in of_artifact or [run for run in runs if run.artifact == path] or runs[:1]:
            check_artifact(report, run, path.resolve(), data, tokenizer, tokens, model, chunks, cuts)
            checked.add(run.seed)
    if rest := [str(run.seed) for run in runs if run.seed not in checked]:
        print(f"  note  of seed {', '.join(rest)} there is no artifact: only its records are checked")
    print("valid, as far as this shows" if not report.failed else "NOT VALID: see the lines marked FAIL")
    return not report.failed


def run(argv: list[str]) -> int:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="what records/package.py made")
    parser.add_argument("--data", type=Path, help="the data set of the run; default: where the run had it")
    parser.add_argument("--tokenizer", type=Path, help="its SentencePiece model; default: where the run had it")
    parser.add_argument("--artifact", type=Path, help="another artifact than those in the folder, of any of its seeds")
    parser.add_argument("--chunks", type=int, default=4, help="how many chunks to score again, default 4")
    parser.add_argument("--cuts", type=int, default=3, help="how many times to replace the future, default 3")
    arguments = parser.parse_args(argv)
    check_range("--chunks", arguments.chunks, 1 << 20)
    check_range("--cuts", arguments.cuts, 1000)
    return 0 if check(**vars(arguments)) else 1


def main(argv: list[str]) -> int:
    """Exit status: 0 if all holds, else 1."""
    return run_tool(lambda: run(argv))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
