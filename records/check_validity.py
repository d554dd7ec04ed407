"""Check a packaged run as a sceptic would: run its script on its artifact, change the future, and compare the past.

    python records/check_validity.py records/TRACK/FOLDER --data data/datasets/fineweb10B_sp1024

Of each seed: do the records of its chunks say that every target was scored once, before it was trained on? Of each
artifact in the folder (or --artifact), on the first --chunks chunks of the validation split:
- weights: the artifact's have the digest that the first chunk was scored with;
- score: made again, it is that of the run at this chunk;
- sums: each target has one score, and they sum to the loss that is reported, so that none counts twice;
- bytes: as many as the text has that the tokenizer decodes;
- distribution: the probabilities of all tokens at one place sum to 1, so that no score knows its own target. For this
  the model, not adapted, reads one sequence as often as there are tokens, each time with another one there;
- past: after all tokens from some place on are replaced by others, every score before it is the same, bit for bit. It is
  done for --cuts places, the first in the first chunk, where no script may have learnt anything yet.
Prints a line for each, and ends with status 1 if one fails. A script that behaves otherwise when it is checked, or only
later than the chunks that are, is for a reader of train_gpt.py to find.
"""
import sys
import tempfile
from pathlib import Path

import numpy as np
from runs import (
    BPB_TOLERANCE,
    FinishedRun,
    UserError,
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


PROBABILITY_TOLERANCE = 1e-3  # bf16 rounds a sequence alike in whichever row of a batch it is; this is for others


def text_bytes(tokenizer, tokens: np.ndarray) -> int:
    """UTF-8 bytes of the text that tokens[1:] add, by decoding it: control tokens have none and hide the space of the
    token behind them; a byte token has one. Shares nothing with train_gpt.py's table of pieces."""
    ids, total, start = [int(token) for token in tokens], 0, 0

    def kind_of(token: int) -> str:
        silent = tokenizer.is_control(token) or tokenizer.is_unknown(token) or tokenizer.is_unused(token)
        return "silent" if silent else "byte" if tokenizer.is_byte(token) else "text"

    plain = next(i for i in range(tokenizer.vocab_size()) if tokenizer.id_to_piece(i).isascii()
                 and tokenizer.id_to_piece(i).isalpha())  # before a space, so that decoding keeps it
    while start < len(ids):
        kind, end = kind_of(ids[start]), start + 1
        while end < len(ids) and kind_of(ids[end]) == kind:
            end += 1
        if kind == "byte":
            total += end - start
        elif kind == "text":
            before = [] if start and kind_of(ids[start - 1]) == "silent" else [plain]
            total += len(tokenizer.decode(before + ids[start:end]).encode()) - len(tokenizer.decode(before).encode())
        start = end
    of_first = len(tokenizer.decode([plain, ids[0]]).encode()) - len(tokenizer.decode([plain]).encode())
    return total - dict(silent=0, byte=1, text=of_first)[kind_of(ids[0])]


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
    """Of all tokens as the one behind the first half of a sequence [L], read once with each of them there."""
    vocab_size, length = run.settings["vocab_size"], len(sequence)
    place = length // 2
    rows = np.tile(sequence, (vocab_size, 1))
    rows[:, place] = np.arange(vocab_size)
    data = data_set(folder / "all_tokens", np.append(rows, sequence[:1]))
    _, nats = score_again(run, artifact, data, tokenizer, folder, rows.size, eval_stride=length, ttt_enabled=False)
    return float(np.exp(-nats.astype(float).reshape(rows.shape)[:, place - 1]).sum())


def check_artifact(report: Report, run: FinishedRun, artifact: Path, data: Path, tokenizer: Path, chunks: int,
                   cuts: int) -> None:
    """Adds to the report what running the artifact shows."""
    script, tokens, model = load_script(run.script), read_validation(data), load_model(tokenizer)
    config, weights = script.decode_artifact(artifact.read_bytes())
    gpt = script.GPT(config)
    gpt.load_state_dict(weights)
    scores, size = run.scores, run.settings["ttt_chunk_tokens"]
    report(script.digest(gpt) == scores[0]["weights"], "weights: the artifact's are those of the first chunk",
           f"weights: {artifact} is not what the first chunk was scored with")
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
        report(abs(total - 1) < PROBABILITY_TOLERANCE, f"distribution: the probabilities of all tokens sum to {total:.6f}",
               f"distribution: the probabilities of all tokens sum to {total:.6f}: a score knows its own target")
        # In the middle of sequences and of windows, far from any edge; the last one in the last chunk.
        places = [int((i + 0.37) * targets / cuts) if i else int(0.63 * min(size, targets)) for i in range(cuts)]
        for place in places:
            other = data_set(folder / f"from_{place}", another_future(tokens, place + 1, run.settings["vocab_size"]))
            _, changed = score_again(run, artifact, other, tokenizer, folder, targets)
            same = nats[:place] == changed[:place]
            first = int(np.argmin(same))
            report(bool(same.all()), f"past: another future from target {place:,} on changes none of the {place:,} before",
                   f"past: another future from target {place:,} on changes {np.count_nonzero(~same):,} of the {place:,} "
                   f"before, the first is {first:,} by {abs(float(nats[first]) - float(changed[first])):.2g} nats")
            report(not np.array_equal(nats[place:], changed[place:]), "  and does change those after",
                   "past: nothing changes after another future either: the scores do not come from this data")


def check(folder: Path, data: Path | None, tokenizer: Path | None, artifact: Path | None, chunks: int, cuts: int) -> bool:
    """Prints the report; returns whether all holds."""
    report, runs = Report(), FinishedRun.all_of(folder)
    for run in runs:
        problems = chain_problems(run)
        report(not problems, f"seed {run.seed}: {run.result['targets']:,} targets in {len(run.scores):,} chunks, each scored"
               f" once and then trained on ({run.result['chunks_adapted']:,})", f"seed {run.seed}: {'; '.join(problems[:3])}")
    stored = [run for run in runs if artifact or run.artifact.is_file()]
    if not stored:
        raise UserError(f"{folder}: no artifact_seed*.bin there: give --artifact FILE")
    for run in stored[: 1 if artifact else None]:
        path = artifact or run.artifact
        print(f"{path}, on {find(run.settings['data_path'], '--data DIR', data).name}")
        check_artifact(report, run, path.resolve(), find(run.settings["data_path"], "--data DIR", data),
                       find(run.settings["tokenizer_path"], "--tokenizer FILE.model", tokenizer), chunks, cuts)
    print("valid, as far as this shows" if not report.failed else "NOT VALID: see the lines marked FAIL")
    return not report.failed


def run(argv: list[str]) -> int:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="what records/package.py made")
    parser.add_argument("--data", type=Path, help="the data set of the run; default: where the run had it")
    parser.add_argument("--tokenizer", type=Path, help="its SentencePiece model; default: where the run had it")
    parser.add_argument("--artifact", type=Path, help="another artifact than those in the folder, of its first seed")
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
