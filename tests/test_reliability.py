"""Runs that are killed, starved, fed badly: nothing is lost, and what went wrong is said in one line.

Faults are real: signals, processes that stop, full file systems, files cut short under the run (tests/faults.py). What
takes longer is in tests/soak.py (`make soak`).
"""
import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import sentencepiece as spm
import torch
from conftest import REPOSITORY, TINY, environment, make_run, run_process, tiny_config
from test_units import write_shard

import train_gpt

# Checkpoints every other step and chunk; no clock decides anything, so that bits can be compared.
SAVING = TINY | dict(ITERATIONS=20, VAL_LOSS_EVERY=8, CHECKPOINT_EVERY_STEPS=2, TTT_CHUNK_TOKENS=128, OMP_NUM_THREADS=1)
FAULTS = Path("tests/faults.py")


def outcome(folder: Path) -> dict:
    """What a run must end with, however often it was interrupted: artifact, score, every target's nats, the records."""
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    told = [(r["event"], r.get("step"), r.get("train_loss"), r.get("val_bpb"), r.get("chunk"), r.get("running_bpb"))
            for r in records if r["event"] in ("train", "val", "swa", "score", "adapt", "final_ttt_exact")]
    submission = json.loads((folder / "submission.json").read_text())
    return dict(artifact=(folder / "artifact.bin").read_bytes(), nats=(folder / "nats.npy").read_bytes(), records=told,
                score=(submission["val_loss"], submission["val_bpb"], submission["chunks_adapted"]))


def run_with(folder: Path, settings: dict, fault: str = "", ranks: int = 1, *torchrun: str):
    """The script in a process of its own, with a fault; the nats go where outcome looks for them."""
    settings = SAVING | dict(RUN_ID="run", VAL_NLL_PATH=f"logs/{settings.get('RUN_ID', 'run')}/nats.npy") | settings
    (folder / settings["VAL_NLL_PATH"]).parent.mkdir(parents=True, exist_ok=True)
    return run_process(folder, settings | dict(FAULT=fault), ranks, FAULTS, *torchrun)


@pytest.fixture(scope="module")
def uninterrupted(dataset, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    run = run_with(folder, dataset)
    assert run.code == 0, run.output
    return run


# ---- Killed, resumed


@pytest.mark.parametrize("fault, saved", [
    ("step 13 kill", "1_train"),  # in training: two of these are warm-up
    ("write 4 kill", "1_train"),  # the file is there, under its other name
    ("adapt 22 kill", "2_evaluate"),
])
def test_killed_and_resumed_ends_with_the_same_bits(uninterrupted, dataset, tmp_path, fault, saved):
    killed = run_with(tmp_path, dataset, fault)
    assert killed.code == -signal.SIGKILL, killed.output
    names = sorted(path.name for path in (killed.folder / "checkpoints").iterdir())
    assert "part" in names or not fault.startswith("write")
    assert {name[:7] for name in names if name != "part"} == {saved[:7]}, names
    resumed = run_with(tmp_path, dataset | dict(RESUME="auto"))
    assert resumed.code == 0 and "goes on from" in resumed.output, resumed.output
    assert outcome(resumed.folder) == outcome(uninterrupted.folder)


@pytest.mark.parametrize("fault", ["step 9 term", "adapt 16 int"])
def test_a_signal_ends_the_run_with_a_checkpoint_of_that_moment(uninterrupted, dataset, tmp_path, fault):
    # Nothing is saved by itself: what there is to resume is due to the signal.
    stopped = run_with(tmp_path, dataset | dict(CHECKPOINT_EVERY_STEPS=0, CHECKPOINT_EVERY_SECONDS=0), fault)
    assert stopped.code == 1
    (checkpoint,) = (stopped.folder / "checkpoints").glob("*.bin")
    name = "SIGTERM" if fault.endswith("term") else "SIGINT"
    last = f"stopped by {name}; RUN_ID=run RESUME=auto continues from logs/run/checkpoints/{checkpoint.name}"
    assert stopped.output.rstrip().endswith(f"error: {last}")
    assert (stopped.folder / "train.log").read_text().rstrip().endswith(last)
    resumed = run_with(tmp_path, dataset | dict(RESUME="auto"))
    assert resumed.code == 0, resumed.output
    assert outcome(resumed.folder) == outcome(uninterrupted.folder)


def test_a_finished_run_resumed_says_its_score_again(uninterrupted, dataset, tmp_path):
    shutil.copytree(uninterrupted.folder.parent, tmp_path / "logs")
    again = run_with(tmp_path, dataset | dict(RESUME="auto"))
    assert again.code == 0 and "step:1/" not in again.output and "eval_chunk:1/" not in again.output
    assert outcome(again.folder) == outcome(uninterrupted.folder)


def test_two_checkpoints_stay_and_none_is_written_when_off(run_here):
    run = run_here(CHECKPOINT_EVERY_STEPS=1)
    assert len(list((run.folder / "checkpoints").iterdir())) == 2
    events = run.events("checkpoint")
    assert len(events) == TINY["ITERATIONS"] + 1 + 6 and all(e["seconds"] < 1 for e in events)
    assert not (run_here(CHECKPOINT_EVERY_SECONDS=0).folder / "checkpoints").exists()


def test_elapsed_time_counts_across_parts(dataset, tmp_path):
    """The second part of a run of 3 seconds gets what the first has left."""
    settings = dataset | dict(MAX_WALLCLOCK_SECONDS=3, ITERATIONS=100_000, WARMDOWN_ITERS=3000, TTT_ENABLED=0)
    stopped = run_with(tmp_path, settings, "step 20 term")
    assert stopped.code == 1, stopped.output
    first = stopped.events("train")[-1]
    resumed = run_with(tmp_path, settings | dict(RESUME="auto"))
    assert resumed.code == 0, resumed.output
    train = resumed.events("train")
    assert [r["step"] for r in train] == sorted({r["step"] for r in train})  # none twice
    seconds = [r["train_s"] for r in train]
    assert seconds == sorted(seconds) and first["train_s"] < seconds[-1] <= 3.0
    assert train[-1]["lr_factor"] < 0.2 and train[-1]["step"] > first["step"] + 5


# ---- What must not be resumed


@pytest.fixture
def stopped_run(dataset, tmp_path, uninterrupted):
    """A folder with an unfinished run, as a kill in training leaves it."""
    shutil.copytree(uninterrupted.folder, tmp_path / "logs" / "run")
    (tmp_path / "logs" / "run" / "submission.json").unlink()
    return tmp_path


def refusal(folder: Path, settings: dict) -> str:
    """The one line with which the script refuses, before it builds a model."""
    run = run_with(folder, settings)
    assert run.code == 1 and "model_params" not in run.output and "Traceback" not in run.output, run.output
    (line,) = [line for line in run.output.splitlines() if line.startswith("error: ")]
    return line


def test_another_configuration_or_script_is_refused_with_the_difference(stopped_run, dataset, tmp_path):
    line = refusal(stopped_run, dataset | dict(RESUME="auto", MATRIX_LR=0.03, SEED=7))
    assert "SEED=1337 there, 7 here" in line and "MATRIX_LR=0.02 there, 0.03 here" in line
    copy = tmp_path / "copy"
    (copy / "tests").mkdir(parents=True)
    (copy / "train_gpt.py").write_text((REPOSITORY / "train_gpt.py").read_text() + "# another version\n")
    run = subprocess.run([sys.executable, str(copy / "train_gpt.py")], cwd=stopped_run, capture_output=True, text=True,
                         env=environment(SAVING | dataset | dict(RUN_ID="run", RESUME="auto")))
    assert run.returncode == 1 and re.search(r"script='\w+' there, '\w+' here", run.stderr), run.stderr


def test_another_number_of_training_tokens_is_refused(stopped_run, dataset, tmp_path):
    """The order of the windows, and so what was trained on already, depends on it."""
    more = tmp_path / "more"
    shutil.copytree(dataset["DATA_PATH"], more)
    (shard,) = more.glob("fineweb_train_*.bin")
    shutil.copy(shard, more / "fineweb_train_000009.bin")
    tokens = (shard.stat().st_size - 1024) // 2
    line = refusal(stopped_run, dataset | dict(RESUME="auto", DATA_PATH=more))
    assert f"tokens={tokens} there, {2 * tokens} here" in line


def test_other_validation_tokens_or_another_tokenizer_are_refused(stopped_run, dataset, tmp_path):
    """Half of a score on one text and half on another, or over the other's bytes, would be nobody's score."""
    other = tmp_path / "other"
    shutil.copytree(dataset["DATA_PATH"], other)
    (shard,) = other.glob("fineweb_val_*.bin")
    data = bytearray(shard.read_bytes())
    data[-2] ^= 1  # the last token: the same size, an id as large
    shard.write_bytes(data)
    line = refusal(stopped_run, dataset | dict(RESUME="auto", DATA_PATH=other))
    assert re.search(r"val_tokens='\w+' there, '\w+' here", line) and "token_bytes" not in line
    tokenizer = spm.SentencePieceProcessor(model_file=str(dataset["TOKENIZER_PATH"]))
    piece = next(p for p in map(tokenizer.id_to_piece, range(400)) if p.startswith("▁") and len(p) > 2)
    changed = tmp_path / "other.model"  # three bytes that count as text instead of a space that may not
    changed.write_bytes(tokenizer.serialized_model_proto().replace(piece.encode(), b"xyz" + piece[1:].encode(), 1))
    line = refusal(stopped_run, dataset | dict(RESUME="auto", TOKENIZER_PATH=changed))
    assert re.search(r"token_bytes='\w+' there, '\w+' here", line) and "val_tokens" not in line


def test_an_unfinished_run_is_not_overwritten(stopped_run, dataset):
    line = refusal(stopped_run, dataset)
    assert "unfinished run" in line and "RESUME=auto" in line
    assert len(list((stopped_run / "logs/run/checkpoints").glob("*.bin"))) == 2


def test_resuming_needs_the_name_of_the_run(dataset):
    with pytest.raises(train_gpt.UserError, match="must name the run"):
        train_gpt.Config.from_env({"RESUME": "auto"})
    restarts = {"TORCHELASTIC_MAX_RESTARTS": "1"}  # torchrun --max-restarts: asked for at once, not after the first death
    with pytest.raises(train_gpt.UserError, match="must name the run"):
        train_gpt.Config.from_env(restarts)
    assert train_gpt.Config.from_env(restarts | {"RUN_ID": "a"}).resume == "auto"


def damage(path: Path, how: str) -> None:
    content = bytearray(path.read_bytes())
    if how == "bit":
        content[len(content) // 2] ^= 1
    path.write_bytes(b"" if how == "empty" else content[:-100] if how == "cut" else content)


@pytest.mark.parametrize("how", ["bit", "cut", "empty"])
def test_a_damaged_checkpoint_gives_way_to_the_one_before(stopped_run, dataset, uninterrupted, how):
    before, newest = sorted((stopped_run / "logs/run/checkpoints").glob("*.bin"))
    damage(newest, how)
    if how == "bit":
        resumed = run_with(stopped_run, dataset | dict(RESUME="auto"))
        assert resumed.code == 0 and f"goes on from {before.relative_to(stopped_run)}" in resumed.output, resumed.output
        assert newest.name in resumed.output
        assert outcome(resumed.folder) == outcome(uninterrupted.folder)
    else:
        damage(before, how)
        line = refusal(stopped_run, dataset | dict(RESUME="auto"))
        assert before.name in line and newest.name in line


def test_another_artifact_is_evaluated_from_its_start(stopped_run, dataset, run_here):
    """Weights adapted from one artifact must not give another one its score."""
    other = run_here(SEED=5)
    shutil.copy(other.folder / "artifact.bin", stopped_run / "logs/run/artifact.bin")
    resumed = run_with(stopped_run, dataset | dict(RESUME="auto"))
    assert resumed.code == 0 and "eval_chunk:1/" in resumed.output, resumed.output


# ---- Ranks that die


def processes_of(mark: str) -> list[int]:
    """Processes whose environment has this mark, zombies' parents included."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if mark.encode() in (entry / "environ").read_bytes():
                found.append(int(entry.name))
        except OSError:
            continue
    return found


@pytest.mark.parametrize("fault, says", [("step 9 kill 1", "SIGKILL"), ("step 9 fail 1", "this rank's own error")])
def test_a_rank_that_dies_ends_the_job_and_a_restart_resumes_it(dataset, tmp_path, fault, says):
    start, mark = time.monotonic(), f"fault_mark_{os.getpid()}_{says[:4]}"
    dead = run_with(tmp_path, dataset | dict(MARK=mark), fault, ranks=2)
    assert dead.code != 0 and time.monotonic() - start < 60
    ending = dead.output[dead.output.rindex("Root Cause"):]
    assert re.search(r"rank\s*: 1 ", ending) and says in ending, dead.output  # the last thing printed is about that rank
    assert not processes_of(mark)
    restarted = run_with(tmp_path, dataset | dict(RUN_ID="again"), fault, 2, "--max-restarts=1")
    assert restarted.code == 0 and "goes on from" in restarted.output, restarted.output
    resumed = run_with(tmp_path, dataset | dict(RESUME="auto"), ranks=2)
    assert resumed.code == 0, resumed.output
    assert outcome(resumed.folder) == outcome(restarted.folder)


@pytest.mark.parametrize("number, to", [(signal.SIGTERM, "torchrun"), (signal.SIGINT, "all")])
def test_torchrun_told_to_stop_leaves_a_checkpoint(dataset, tmp_path, number, to):
    """As when a pod is preempted, and on Ctrl-C: the terminal signals all processes, and torchrun its own once more."""
    mark = f"fault_mark_{time.time_ns()}"
    settings = SAVING | dataset | dict(RUN_ID="run", MARK=mark, ITERATIONS=100_000, CHECKPOINT_EVERY_STEPS=0)
    process = subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
         str(REPOSITORY / "train_gpt.py")],
        cwd=tmp_path, env=environment(settings), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        start_new_session=True)
    for line in process.stdout:
        if line.startswith("step:20/"):
            break
    (os.killpg if to == "all" else os.kill)(process.pid, number)
    output = process.communicate(timeout=60)[0]
    assert process.returncode != 0 and f"stopped by {number.name}; RUN_ID=run RESUME=auto continues" in output, output
    (checkpoint,) = (tmp_path / "logs/run/checkpoints").glob("*.bin")
    assert checkpoint.name.startswith("1_train") and not processes_of(mark)


# ---- Disks and data that fail


@pytest.fixture
def small_disk(tmp_path):
    """A file system with room for little, where this machine allows to mount one."""
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip("needs the right to mount a tmpfs")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def fill(folder: Path, leave: int) -> Path:
    """Takes all but so many bytes of the file system."""
    ballast = folder / "ballast"
    ballast.write_bytes(bytes(shutil.disk_usage(folder).free - leave))
    return ballast


@pytest.mark.parametrize("every", [dict(), dict(CHECKPOINT_EVERY_STEPS=0, CHECKPOINT_EVERY_SECONDS=0.001)])
def test_a_full_disk_is_an_error_and_the_checkpoint_before_it_is_whole(uninterrupted, dataset, small_disk, every):
    # The check before the run wants room for three checkpoints; here something else fills the disk during the run.
    size = max(p.stat().st_size for p in (uninterrupted.folder / "checkpoints").iterdir())
    settings = dataset | dict(MAX_ARTIFACT_BYTES=200_000) | every
    full = run_with(small_disk, settings, "step 15 fill")
    assert full.code == 1 and "No space left on device" in full.output.splitlines()[-1], full.output
    assert "RESUME=auto continues from logs/run/checkpoints/1_train" in full.output.splitlines()[-1]
    (small_disk / "ballast").unlink()
    assert shutil.disk_usage(small_disk).free > 3 * size
    resumed = run_with(small_disk, settings | dict(RESUME="auto"))
    assert resumed.code == 0, resumed.output


def test_room_and_rights_are_checked_before_the_run(dataset, monkeypatch, tmp_path):
    config = dataclasses.replace(tiny_config(dataset), run_id="x")
    monkeypatch.chdir(tmp_path)
    assert "preflight" in train_gpt.preflight(config, train_gpt.Dist(), 1000)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=10_000_000))
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(train_gpt.UserError, match="0.01 GB free.*; .*cannot be written"):
        train_gpt.preflight(config, train_gpt.Dist(), 1000)


def test_a_file_where_the_logs_should_go_is_one_line(dataset, tmp_path):
    (tmp_path / "logs").write_text("")
    run = run_process(tmp_path, SAVING | dataset | dict(RUN_ID="run"))
    assert run.code == 1 and "Traceback" not in run.output and "logs" in run.output.splitlines()[-1]


@pytest.mark.parametrize("fault, says", [("step 9 vanish", "No such file"), ("step 9 cut", "has changed: put it back")])
def test_a_shard_lost_during_the_run_is_an_error_and_the_run_goes_on_when_it_is_back(
        uninterrupted, dataset, tmp_path, fault, says):
    data = tmp_path / "data"
    shutil.copytree(dataset["DATA_PATH"], data)
    lost = run_with(tmp_path, dataset | dict(DATA_PATH=data), fault)
    assert lost.code == 1 and says in lost.output.splitlines()[-1] and "fineweb_train" in lost.output.splitlines()[-1], lost.output
    assert "RESUME=auto continues from" in lost.output.splitlines()[-1]
    shutil.copytree(dataset["DATA_PATH"], data, dirs_exist_ok=True)
    resumed = run_with(tmp_path, dataset | dict(DATA_PATH=data, RESUME="auto"))
    assert resumed.code == 0, resumed.output
    assert outcome(resumed.folder) == outcome(uninterrupted.folder)


# ---- Gradients that are not finite


def test_a_step_without_finite_gradients_changes_nothing_but_its_count(dataset):
    config = tiny_config(dataset)
    run = make_run(config)
    optimizers = train_gpt.build_optimizers(run.model, config, run.dist)
    stream = train_gpt.TokenStream(config, "train")
    nll = run.nll

    def step(number: int, factor: float) -> None:
        run.nll = lambda *a, **b: nll(*a, **b) * factor
        train_gpt.train_step(run, list(stream.micro_batches(number, run.dist)), optimizers, 1.0, 0.95)

    def state() -> list[torch.Tensor]:
        return [tensor.clone() for tensor in train_gpt.state_of(run.model, optimizers)]

    step(0, 1.0)
    for clip in (0.3, 0.0):
        run.config = dataclasses.replace(config, grad_clip_norm=clip)
        for factor in (float("nan"), float("inf")):
            before = state()
            step(1, factor)
            assert all(torch.equal(a, b) for a, b in zip(before, state(), strict=True))
    assert run.grads.skipped.tolist() == [4, 4]
    step(1, 1.0)
    assert run.grads.skipped.tolist() == [4, 0]
    assert any(not torch.equal(a, b) for a, b in zip(before, state(), strict=True))


def test_a_step_with_finite_gradients_is_what_it_was_without_the_check(dataset):
    """Muon and AdamW get the same bits whether or not they are told that all is well."""
    results = []
    for told in (False, True):
        run = make_run(tiny_config(dataset))
        optimizers = train_gpt.build_optimizers(run.model, run.config, run.dist)
        for number in range(3):
            generator = torch.Generator().manual_seed(number)
            run.grads.flat.copy_(torch.randn(run.grads.flat.shape, generator=generator))
            for optimizer in optimizers:
                if told:
                    optimizer.found_inf = torch.zeros(())
                optimizer.step()
        results.append([p.detach().clone() for p in run.model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_many_such_steps_end_the_run_and_name_the_last_good_checkpoint(dataset, tmp_path):
    ended = run_with(tmp_path, dataset, "gradients 17- spoil")
    last = ended.output.splitlines()[-1]
    assert ended.code == 1 and re.search(r"no finite gradients in [5-9] steps", last), ended.output
    assert "RESUME=auto continues from logs/run/checkpoints/1_train" in last
    assert ended.events("train")[-1]["skipped"] >= 5


def test_a_single_such_step_is_skipped_and_counted(dataset, tmp_path):
    run = run_with(tmp_path, dataset, "gradients 18 spoil")  # six calls are warm-up's
    assert run.code == 0 and "skipped:1" in run.output, run.output
    assert [r["skipped"] for r in run.events("train")] == [0] * 11 + [1] * 9


# ---- Before the run


def test_preflight_only_reports_and_leaves_nothing(dataset, tmp_path):
    run = run_process(tmp_path, TINY | dataset | dict(PREFLIGHT_ONLY=1))
    assert run.code == 0 and run.output.startswith("preflight: "), run.output
    assert not list(tmp_path.iterdir())


def test_budgets_that_cannot_hold_are_refused_all_at_once(dataset):
    """The record configuration on a CPU, as when CUDA is not found: no step fits, nor does the evaluation."""
    config = train_gpt.settle(train_gpt.Config(device="cpu", compute_dtype="float32"), train_gpt.Dist())
    with pytest.raises(train_gpt.UserError, match="MAX_WALLCLOCK_SECONDS=600.0: .*nvidia-smi.*; EVAL_MAX_SECONDS=600.0: "):
        train_gpt.preflight(config, train_gpt.Dist(), 62_021_632)


def test_the_evaluation_is_projected_in_warm_up(run_here):
    run = run_here(EVAL_PLAIN=1)
    (projection,) = run.events("projection")
    taken = run.submission["eval_seconds"] - projection["warm_up_s"]
    assert 0.2 < (projection["score_s"] + projection["adapt_s"]) / taken < 5
    names = [record["event"] for record in run.records]
    assert names.index("projection") < names.index("train")
    with pytest.raises(train_gpt.UserError, match="EVAL_MAX_SECONDS=0.003: scoring would take"):
        run_here(EVAL_MAX_SECONDS=0.003)


def test_eighty_shards_are_checked_in_seconds(dataset, tmp_path):
    """As many and as large as the published ones, at the record's sequence length, as sparse files; the last one has a
    bad token in its middle."""
    for name in ["val_000000"] + [f"train_{i:06}" for i in range(80)]:
        path = tmp_path / f"fineweb_{name}.bin"
        write_shard(path, [], count=100_000_000)
        os.truncate(path, 1024 + 200_000_000)
    length = dict.fromkeys(("TRAIN_SEQ_LEN", "TRAIN_BATCH_TOKENS", "MICRO_BATCH_TOKENS", "TTT_CHUNK_TOKENS"), 2048)
    settings = TINY | dataset | length | dict(DATA_PATH=tmp_path, PREFLIGHT_ONLY=1, MAX_VAL_TOKENS=0, EVAL_MAX_SECONDS=0)
    start = time.monotonic()
    good = run_process(tmp_path, settings)
    assert good.code == 0 and time.monotonic() - start < 20, good.output
    with open(path, "r+b") as file:
        file.seek(1024 + 2 * (100_000_000 - 2**16) // 15 * 8)  # where one of 16 samples begins
        file.write(b"\xff\xff")
    bad = run_process(tmp_path, settings)
    assert bad.code == 1 and f"{path.name}: token id 65535" in bad.output, bad.output
