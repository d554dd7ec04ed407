"""From finished runs to a submission: what is packaged, what is refused, what the validity check finds.

The runs are real, of the script as it is or of copies that cheat; only hardware is told otherwise, where the record
track needs 8xH100.
"""
import io
import json
import math
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import check_validity
import generate
import index
import numpy as np
import package
import plot
import pytest
import runs
import sentencepiece as spm
import torch
from conftest import REPOSITORY, TINY, environment

import train_gpt

# The whole split, and a learning rate with which it matters whether a chunk was trained on.
SHORT = TINY | dict(EVAL_PLAIN=1, TTT_LR=0.05, TRAIN_LOG_EVERY=2, MAX_VAL_TOKENS=0)
SEEDS = 1, 2, 3


def run_script(folder: Path, dataset: dict, script: Path = REPOSITORY / "train_gpt.py", **settings) -> Path:
    settings = SHORT | dataset | dict(RUN_ID="run", OMP_NUM_THREADS=1) | settings
    done = subprocess.run([sys.executable, str(script)], cwd=folder, env=environment(settings), capture_output=True,
                          text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "logs" / settings["RUN_ID"]


@pytest.fixture(autouse=True)
def no_threads_given(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS")  # for the same bits the tools must take the runs'


@pytest.fixture(scope="module")
def finished(dataset, tmp_path_factory) -> list[Path]:
    folder = tmp_path_factory.mktemp("finished")
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(lambda seed: run_script(folder, dataset, RUN_ID=f"seed{seed}", SEED=seed), SEEDS))


def copies(finished: list[Path], folder: Path) -> list[Path]:
    return [Path(shutil.copytree(run, folder / run.name)) for run in finished]


def change_records(folder: Path, change) -> None:
    """Applies change(record) to every record; what is None is left out."""
    records = [change(json.loads(line)) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records if record))


def packaged(folders: list[Path], out: Path, *more: str) -> tuple[int, list[Path]]:
    out.mkdir(exist_ok=True)
    status = package.main([*map(str, folders), "--name", "A test!", "--author", "Nobody", "--github-id", "nobody",
                           "--out", str(out), *more])
    return status, [path for path in out.glob("*/*")]


# ---- Packaging


@pytest.fixture(scope="module")
def record(finished, tmp_path_factory) -> Path:
    """A folder in the non-record track: a CPU is no 8xH100."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("OMP_NUM_THREADS")
        status, (folder,) = packaged(finished, tmp_path_factory.mktemp("records"), "--baseline-bpb", "9")
    assert status == 0
    return folder


def test_the_folder_is_complete_and_says_what_it_is(record, finished):
    assert record.parent.name == "track_non_record_16mb" and record.name.endswith("_A_test")
    names = {path.name for path in record.iterdir()}
    assert names == {"README.md", "VALIDITY.md", "submission.json", "train_gpt.py", "requirements.txt", "figures",
                     "artifact_seed1.bin", *(f"{kind}_seed{seed}.{end}" for seed in SEEDS
                                             for kind, end in (("train", "log"), ("metrics", "jsonl")))}
    assert (record / "train_gpt.py").read_bytes() == (REPOSITORY / "train_gpt.py").read_bytes()
    told = json.loads((record / "submission.json").read_text())
    scores = [json.loads((run / "submission.json").read_text()) for run in finished]
    assert told["mean_val_bpb"] == pytest.approx(np.mean([score["val_bpb"] for score in scores]), abs=1e-12)
    assert told["val_bpb_std"] == pytest.approx(np.std([score["val_bpb"] for score in scores], ddof=1))
    assert told["seeds"] == list(SEEDS) and set(told["seed_results"]) == {"1", "2", "3"}
    assert told["total_bytes"] == max(score["total_bytes"] for score in scores)
    assert (told["author"], told["github_id"], told["track"]) == ("Nobody", "nobody", "non_record_16mb")
    readme = (record / "README.md").read_text()
    assert "on 8xH100 SXM: 1 x " in readme and readme.count("| **no** |") == 2  # nor is it FineWeb
    assert "SEED=1 python train_gpt.py" in readme and "TTT_LR=0.05" in readme
    for picture in ("training", "stages", "running", "bits", "position"):
        assert f"figures/{picture}.png" in readme and (record / f"figures/{picture}.png").stat().st_size > 10_000


def test_validity_tells_every_chunk_of_every_seed(record, finished):
    text = (record / "VALIDITY.md").read_text()
    for run in map(runs.FinishedRun.from_logs, finished):
        for score in run.scores:
            row = f"| {score['chunk']} | {score['first']} to {score['end']} | {score['weights']} |"
            assert row in text
        assert f"| {score['chunk']} | {score['first']} to {score['end']} | {score['weights']} | " \
            f"{score['running_bpb']:.6f} | nothing |" in text  # the last one
        told = {r["when"]: r["sha256"] for r in run.records if r["event"] == "weights"}
        assert told["before final_ttt_exact"] in text and told["after final_ttt_exact"] in text


@pytest.fixture
def not_scored_again(monkeypatch):
    """It takes seconds, and other tests see to it."""
    monkeypatch.setattr(package, "score_from", lambda *arguments: package.Finding("scored again", "-", True, True))


def test_the_record_track_is_for_runs_that_keep_every_rule(finished, tmp_path, monkeypatch,
                                                                not_scored_again):
    folders = copies(finished, tmp_path)
    for folder in folders:
        def official(record):
            if record["event"] != "start":
                return record
            settings = record["settings"] | dict(vocab_size=1024, train_seq_len=2048)
            return record | dict(world_size=8, hardware="NVIDIA H100 80GB HBM3", settings=settings)
        change_records(folder, official)
    monkeypatch.setitem(runs.RULES, "targets", runs.FinishedRun.from_logs(folders[0]).result["targets"])
    status, (target,) = packaged(folders, tmp_path / "out", "--baseline-bpb", "9")
    assert status == 0 and target.parent.name == "track_10min_16mb"
    assert "**no**" not in (target / "README.md").read_text()
    # The same runs against a baseline that they do not beat, and two of them only: each by itself is a reason.
    loss = runs.FinishedRun.from_logs(folders[0]).result["val_loss"]
    status, (target,) = packaged(folders, tmp_path / "close", "--baseline-nats", str(loss))
    assert status == 0 and target.parent.name == "track_non_record_16mb"
    status, (target,) = packaged(folders[:2], tmp_path / "two", "--baseline-bpb", "9")
    assert status == 0 and target.parent.name == "track_non_record_16mb"
    assert "3 seeds: 2" in (target / "README.md").read_text()
    # One of them finished on another machine.
    change_records(folders[2], lambda r: r | (dict(hardware="NVIDIA H200") if r["event"] == "start" else {}))
    status, (target,) = packaged(folders, tmp_path / "mixed", "--baseline-bpb", "9")
    assert status == 0 and "8 x NVIDIA H200" in (target / "README.md").read_text()
    assert target.parent.name == "track_non_record_16mb"


def slow(record):
    return record | dict(train_s=601.0) if record["event"] == "swa" else record


def long_evaluation(record):
    return record | dict(eval_seconds=601.0) if record["event"] == "final_ttt_exact" else record


@pytest.mark.parametrize("change, rule", [(slow, "trained at most 600 s: 60"), (long_evaluation, "evaluated at most")])
def test_a_limit_that_does_not_hold_is_named_and_keeps_a_run_out_of_the_record_track(
        finished, tmp_path, not_scored_again, change, rule):
    folders = copies(finished, tmp_path)
    change_records(folders[1], change)
    status, (target,) = packaged(folders, tmp_path / "out", "--baseline-bpb", "9")
    assert status == 0 and target.parent.name == "track_non_record_16mb" and rule in (target / "README.md").read_text()


def spoil_settings(folder):
    change_records(folder, lambda r: r | (
        dict(settings=r["settings"] | dict(matrix_lr=0.5)) if r["event"] == "start" else {}))


def spoil_script(folder):
    with open(folder / "train_gpt.py", "a") as file:
        file.write("# another version\n")


def spoil_artifact(folder):
    shutil.copy(folder.parent / "seed2/artifact.bin", folder / "artifact.bin")


def spoil_seed(folder):
    """The first seed's run under another seed's number."""
    shutil.rmtree(folder)
    shutil.copytree(folder.parent / "seed1", folder)
    change_records(folder, lambda r: r | (dict(seed=3) if "seed" in r else {}))


def spoil_prefix(folder):
    change_records(folder, lambda r: r | dict(full_targets=10**6) if r["event"] == "final_ttt_exact" else r)


@pytest.mark.parametrize("spoil, says", [
    (spoil_settings, "FAIL  the same settings but for the seed: MATRIX_LR=0.02 and 0.5"),
    (spoil_script, "FAIL  one script for all seeds"),
    (spoil_artifact, "FAIL  seed 3: artifact.bin is what was scored first"),
    (spoil_seed, "FAIL  another seed for each run, and other weights at its start: seeds 1, 2, 3, 2 of 3"),
    (spoil_prefix, "FAIL  the whole split is scored"),
])
def test_runs_that_are_not_sound_are_packaged_nowhere(finished, tmp_path, capsys, spoil, says):
    folders = copies(finished, tmp_path)
    spoil(folders[-1])
    status, written = packaged(folders, tmp_path / "out", "--baseline-bpb", "9")
    assert status == 1 and not written and not list((tmp_path / "out").iterdir())
    assert says in capsys.readouterr().out


def test_a_score_that_the_artifact_does_not_have_is_packaged_nowhere(finished, tmp_path, capsys):
    """Every figure of the run a hundredth better: without contradiction, but not what is scored again."""
    folders = copies(finished[:1], tmp_path)
    change_records(folders[0], lambda r: {
        name: 0.99 * value if name in ("val_loss", "val_bpb", "running_bpb") else value for name, value in r.items()})
    status, written = packaged(folders, tmp_path / "out", "--baseline-bpb", "9")
    assert status == 1 and not written and "FAIL  seed 1: scored again from this folder" in capsys.readouterr().out


def test_a_run_that_has_not_finished_is_one_line(finished, tmp_path, capsys):
    folders = copies(finished, tmp_path)
    change_records(folders[0], lambda r: None if r["event"] == "final_ttt_exact" else r)
    status, written = packaged(folders, tmp_path / "out")
    error = capsys.readouterr().err
    assert status == 1 and not written and error.startswith("error: ") and error.count("\n") == 1
    assert "finish it with RESUME=auto" in error


def test_a_run_of_an_older_script_is_one_line(finished, tmp_path, capsys):
    """Without digests nothing shows what a chunk was scored with."""
    folders = copies(finished, tmp_path)
    change_records(folders[1], lambda r: {name: value for name, value in r.items() if name != "weights"})
    status, written = packaged(folders, tmp_path / "out")
    error = capsys.readouterr().err
    assert status == 1 and not written and "no finished run" in error and error.count("\n") == 1


def test_p_value_is_students():
    """With two degrees of freedom the distribution has a closed form."""
    losses, baseline = [1.880, 1.882, 1.881], 1.8900
    t = (np.mean(losses) - (baseline - 0.005)) / (np.std(losses, ddof=1) / math.sqrt(3))
    assert package.p_value(losses, baseline) == pytest.approx(0.5 + t / (2 * math.sqrt(2 + t * t)))
    assert package.p_value(losses, 1.8855) > 0.5  # better than the baseline, not by 0.005


def test_a_baseline_in_bpb_becomes_nats_with_this_splits_bytes(finished):
    run = runs.FinishedRun.from_logs(finished[0])
    assert package.baseline_nats(run.result["val_bpb"], None, run) == pytest.approx(run.result["val_loss"])


def test_submission_json_of_a_run_has_the_challenges_keys(finished):
    told = json.loads((finished[1] / "submission.json").read_text())
    assert told["track"] is told["author"] is told["github_id"] is None and told["name"] == "seed2"
    assert told["mean_val_bpb"] == told["val_bpb"] == told["seed_results"]["2"]["val_bpb"]
    assert told["artifact_bytes"] == (finished[1] / "artifact.bin").stat().st_size
    assert told["total_bytes"] == told["artifact_bytes"] + (finished[1] / "train_gpt.py").stat().st_size
    assert 0 < told["train_seconds"] < 60 and 0 < told["eval_seconds"] < 60 and told["hardware"] and told["date"]


# ---- What the records of a run say


def twice(r):
    return r | dict(end=r["end"] + 8) if r["event"] == "score" and r["chunk"] == 2 else r


def early(r):
    return r | dict(first=r["first"] + 256, end=r["end"] + 256) if r["event"] == "adapt" and r["chunk"] == 3 else r


def untold(r):
    return None if r["event"] == "adapt" and r["chunk"] == 1 else r


def idle(r):
    return r | dict(weights="0" * 16) if r["event"] == "score" and r["chunk"] in (4, 5) else r


def fewer_bytes(r):
    return r | dict(bytes=r["bytes"] + 100) if r["event"] == "final_ttt_exact" else r


@pytest.mark.parametrize("change, says", [
    (twice, "chunk 3 scores from target 768, those before end at 776"), (early, "trained on when 1024 are scored"),
    (untold, "chunk 2 is scored by other weights"), (idle, "chunk 5 is scored by the same weights"),
    (fewer_bytes, "loss, targets and bytes give"),
])
def test_records_that_contradict_score_first_are_found(finished, tmp_path, change, says):
    (folder,) = copies(finished[:1], tmp_path)
    assert runs.chain_problems(runs.FinishedRun.from_logs(folder)) == []
    change_records(folder, change)
    problems = runs.chain_problems(runs.FinishedRun.from_logs(folder))
    assert problems and any(says in problem for problem in problems), problems


def test_the_digest_depends_on_every_bit_and_place(dataset):
    from conftest import random_model, tiny_config
    model = random_model(tiny_config(dataset))
    weight, digests = model.blocks[0].attn.c_q.weight, [train_gpt.digest(model)]
    assert train_gpt.digest(model) == digests[0] and len(digests[0]) == 16
    with torch.no_grad():
        for change in (lambda: weight[3, 5].mul_(1 + 2**-23), lambda: weight[0].copy_(weight[0].flip(0)),
                       lambda: model.bigram.scale.neg_(), lambda: weight[1, 1].fill_(0.0),
                       lambda: weight[1, 1].fill_(-0.0)):
            change()
            digests.append(train_gpt.digest(model))
    assert len(set(digests)) == len(digests)


# ---- The validity check, on honest and on cheating scripts


def check(folder: Path, *more: str) -> int:
    return check_validity.main([str(folder), *more])


def as_record(run: Path, folder: Path) -> Path:
    """The run's files under a packaged folder's names, whatever records/package.py would say."""
    folder.mkdir()
    shutil.copy(run / "train_gpt.py", folder)
    for name, end in (("train", "log"), ("metrics", "jsonl"), ("artifact", "bin")):
        shutil.copy(run / f"{name}.{end}", folder / f"{name}_seed1337.{end}")
    told = package.submission([runs.FinishedRun.from_logs(run)], "", "", "", "", "", "")
    (folder / "submission.json").write_text(json.dumps(told))
    return folder


def test_an_honest_run_is_valid_bit_for_bit(record, capsys):
    assert check(record, "--cuts", "1") == 0
    output = capsys.readouterr().out
    assert "(the same bits)" in output and output.count("past: another future") == 1 and "FAIL" not in output


CHEATS = {
    # PR #264's own order: two epochs over all of the validation text, and only then the score.
    "all of it first": ('''    nats, adapted = scorer.score_then_adapt(''', '''    if submitted:
      first = optim.SGD(run.model.parameters(), lr=0.05, momentum=0.9)
      for _ in range(2):
        for begin in range(0, scorer.num_targets, cfg.train_seq_len):
          scorer.adapt(begin, begin + cfg.train_seq_len, first)
    nats, adapted = scorer.score_then_adapt('''),
    # Each chunk first, the digest as if not.
    "each chunk first": ('''      nats[begin:end] = self.score(windows, cfg.eval_batch_seqs, cfg.eval_stride)
''', '''      if adapting:
        sgd.param_groups[0]["lr"] = cfg.ttt_lr
        self.adapt(begin, end, sgd)
      nats[begin:end] = self.score(windows, cfg.eval_batch_seqs, cfg.eval_stride)
'''),
    # The sliding window's old mistake: what the last window scores counts once for each of its strides.
    "double-counted tail": ('''    total = nats.sum(dtype=float)
    return total / len(nats), ''', '''    tail = nats[-self.config.eval_stride :]
    total = nats.sum(dtype=float) + 3 * tail.sum(dtype=float)
    return total / (len(nats) + 3 * len(tail)), '''),
    # Every token has one byte more, as if each began with a space.
    "wrong bytes": ("    return self.base[target] + (self", "    return self.base[target] + 1 + 0 * (self"),
    # The score knows the next token: the model reads one place ahead.
    "looks ahead": ("  return model.nll(model.hidden(tokens, at), targets)",
                    "  return model.nll(model.hidden(tokens.roll(-1, 1), at), targets)"),
}


@pytest.mark.parametrize("cheats, says", [
    (["all of it first", "double-counted tail", "wrong bytes"], ["past", "weights", "sums", "bytes"]),
    (["each chunk first", "looks ahead"], ["past", "distribution"]),
])
def test_a_script_that_cheats_is_found(dataset, tmp_path, capsys, cheats, says):
    code = (REPOSITORY / "train_gpt.py").read_text()
    for old, new in map(CHEATS.get, cheats):
        assert code.count(old) == 1
        code = code.replace(old, new)
    script = tmp_path / "train_gpt.py"
    script.write_text(code)
    folder = as_record(run_script(tmp_path, dataset, script), tmp_path / "record")
    assert check(folder, "--cuts", "1") == 1
    failed = [line.split()[1].rstrip(":") for line in capsys.readouterr().out.splitlines() if line.startswith("  FAIL")]
    assert set(says) <= set(failed), failed


def better(told):
    return told | dict(val_bpb=told["val_bpb"] - 0.01)


def smaller(told):
    return told | dict(total_bytes=told["total_bytes"] - 1000)


@pytest.mark.parametrize("change, says", [(better, "FAIL  submission.json"), (smaller, "FAIL  submission.json")])
def test_figures_that_the_records_do_not_have_are_found(record, tmp_path, monkeypatch, capsys, change, says):
    monkeypatch.setattr(check_validity, "check_artifact", lambda *arguments: None)  # elsewhere
    folder = Path(shutil.copytree(record, tmp_path / "copy"))
    assert check(folder) == 0
    told = json.loads((folder / "submission.json").read_text())
    (folder / "submission.json").write_text(json.dumps(change(told)))
    assert check(folder) == 1 and says in capsys.readouterr().out


def test_a_part_of_the_split_is_not_the_split(record, dataset, tmp_path, monkeypatch, capsys):
    """The data has a sequence more than the records of the run say."""
    monkeypatch.setattr(check_validity, "check_artifact", lambda *arguments: None)
    tokens = runs.read_validation(Path(dataset["DATA_PATH"]))
    longer = check_validity.data_set(tmp_path / "longer", np.append(tokens, tokens[1:33]))
    assert check(record, "--data", str(longer)) == 1
    assert "the split has 2,848 of" in capsys.readouterr().out


@pytest.mark.parametrize("options", [
    dict(), dict(add_dummy_prefix=False), dict(add_dummy_prefix=False, remove_extra_whitespaces=False),
    dict(remove_extra_whitespaces=False), dict(treat_whitespace_as_suffix=True), dict(text="Привет, мир. " * 40)])
def test_bytes_of_other_tokenizers(tmp_path, options):
    """Both ways to count agree, whatever a tokenizer does with spaces, and without a letter of ASCII."""
    text = options.pop("text", "A text,  with two spaces. Another one 12 é日. ") * 5
    model = io.BytesIO()
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(text.split(". ")), model_writer=model, vocab_size=300, model_type="bpe",
        byte_fallback=True, hard_vocab_limit=False, minloglevel=2, **options)
    tokenizer = spm.SentencePieceProcessor(model_proto=model.getvalue())
    tokens = [token for part in text.split(". ") for token in (tokenizer.bos_id(), *tokenizer.encode(part + " ß"))]
    tokens = np.array(tokens, np.uint16)
    for part in (tokens, tokens[1:], tokens[3:]):
        assert check_validity.text_bytes(tokenizer, part) == train_gpt.TokenBytes(tokenizer).count(part).sum()


def test_bytes_are_those_of_the_text(dataset, val_tokens):
    tokenizer = train_gpt.load_tokenizer(train_gpt.Config.from_env({k: str(v) for k, v in (TINY | dataset).items()}))
    counted = train_gpt.TokenBytes(tokenizer)
    for first, last in ((0, len(val_tokens)), (1, 500), (7, 9), (123, 1234)):
        part = val_tokens[first:last]
        assert check_validity.text_bytes(tokenizer, part) == counted.count(part).sum()


# ---- Pictures, index, text


def test_pictures_of_one_run_without_a_second_pass(finished, tmp_path):
    (folder,) = copies(finished[:1], tmp_path)
    change_records(folder, lambda r: None if r["event"] == "final_quantized_exact"
                   or r.get("submitted") is False else r)
    assert plot.main([str(folder)]) == 0
    assert {path.name for path in (folder / "figures").iterdir()} == {
        "training.png", "stages.png", "running.png", "bits.png", "position.png"}


def test_bits_of_a_group_are_those_of_its_values(finished):
    run = runs.FinishedRun.from_logs(finished[0])
    bits = plot.bits_by_group(run)
    assert set(bits) == {"MLP", "attention", "token table", "bigram", "scales, gates"}
    assert bits["scales, gates"] == 16 and 3 < bits["MLP"] < 5.6 < bits["attention"] < 7  # 5 and 6 bits, and steps
    config, stored, values = train_gpt.unpack_artifact(run.artifact.read_bytes())
    table = values["tok_emb.weight"].numpy().ravel()
    share = np.bincount(table - table.min()) / len(table)
    entropy = -(share[share > 0] * np.log2(share[share > 0])).sum()
    assert bits["token table"] == pytest.approx(entropy + 16 / config.model_dim)


def test_the_index_is_up_to_date():
    assert index.main(["--check"]) == 0


def test_the_index_has_a_row_for_each_folder(record, monkeypatch, capsys):
    monkeypatch.setattr(index, "RECORDS", record.parent.parent)
    assert index.main([]) == 0
    text = (record.parent.parent / "README.md").read_text()
    told = json.loads((record / "submission.json").read_text())
    assert f"[A test!](track_non_record_16mb/{record.name}/README.md)" in text
    assert f"{told['mean_val_bpb']:.4f} ± {told['val_bpb_std']:.4f}" in text
    (record.parent.parent / "README.md").write_text(text + "more\n")
    assert index.main(["--check"]) == 1 and "run python records/index.py" in capsys.readouterr().err


def test_text_goes_on_as_the_seed_and_the_model_say(finished, capsys):
    def text(*more: str) -> str:
        assert generate.main([str(finished[0] / "artifact.bin"), "--tokens", "40", *more]) == 0
        return capsys.readouterr().out

    prompt = ["--prompt", "Ael nor"]
    assert text(*prompt).startswith("Ael nor") and text(*prompt) == text(*prompt) != text(*prompt, "--seed", "2")
    greedy = text(*prompt, "--temperature", "0")
    assert greedy == text(*prompt, "--top-k", "1") == text(*prompt, "--temperature", "0", "--seed", "5")
    # The likeliest tokens, from whole logits: longer than the model's sequence length, so that its context slides.
    run = runs.FinishedRun.from_logs(finished[0])
    config, weights = train_gpt.decode_artifact(run.artifact.read_bytes())
    model = train_gpt.GPT(config)
    model.load_state_dict(weights)
    tokenizer = train_gpt.load_tokenizer(train_gpt.Config(
        tokenizer_path=run.settings["tokenizer_path"], vocab_size=config.vocab_size))
    tokens = [tokenizer.bos_id(), *tokenizer.encode("Ael nor")]
    expected = list(tokens)
    for _ in range(40):
        expected.append(int(model(torch.tensor([expected[-config.train_seq_len:]]))[0, -1].argmax()))
    assert list(generate.continuation(model, tokens, 40, 0.0, 0, 0)) == expected[len(tokens):]


@pytest.mark.parametrize("more, says", [
    (["--temperature", "-1"], "--temperature"), (["--tokenizer", "nowhere.model"], "no SentencePiece model"),
    (["--top-k", "-3"], "--top-k"),
])
def test_what_cannot_be_generated_is_one_line(finished, capsys, more, says):
    assert generate.main([str(finished[0] / "artifact.bin"), *more]) == 1
    error = capsys.readouterr().err
    assert says in error and error.startswith("error: ") and error.count("\n") == 1
