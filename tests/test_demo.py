"""benchmarks/demo.py: the table holds what the run left, and the bounds of --check catch what they are for."""
import lzma
import os
from pathlib import Path

import demo
import pytest
from conftest import TINY, run_process

from train_gpt import Config


@pytest.fixture
def table(run_here):
    run = run_here(EVAL_PLAIN=1)
    settings = {name: os.environ[name] for name in ("DATA_PATH", "TOKENIZER_PATH", "TTT_CHUNK_TOKENS")}
    return run, settings, *demo.summarise(run.folder, settings)


def test_the_table_is_that_of_the_run(table):
    run, settings, bpb, took = table
    assert bpb["int5/int6, sliding window, TTT (submitted)"] == run.submission["val_bpb"]
    assert bpb["after training"] == run.events("val")[-1]["val_bpb"]
    assert took["targets scored"] == TINY["MAX_VAL_TOKENS"] and took["chunks"] == 6
    text = demo.scored_text(settings, took["targets scored"])
    assert bpb["xz -9e"] == 8 * len(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME)) / len(text)
    # The same text as was scored: a document cut in the middle of a character aside, the same number of bytes.
    assert abs(len(text) - took["bytes of text"]) <= 4


def test_the_bounds_catch_what_they_are_for(table):
    _, _, bpb, took = table
    good_bpb = bpb | {"after SWA": 2.05, "int5/int6, sliding window": 2.04,
                      "int5/int6, sliding window, TTT (submitted)": 2.02}
    good_run = took | {"targets scored": 123_136, "chunks": 241}
    assert demo.faults(good_bpb, good_run) == []
    for name, value, message in (("int5/int6, sliding window", 2.09, "quantisation"),
                                 ("int5/int6, sliding window, TTT (submitted)", 2.06, "TTT moves"),
                                 ("int5/int6, sliding window, TTT (submitted)", 2.26, "above 2.25"),
                                 ("after training", float("nan"), "not finite")):
        assert any(message in fault for fault in demo.faults(good_bpb | {name: value}, good_run)), message
    assert any("fewer than 100000" in fault for fault in demo.faults(good_bpb, good_run | {"targets scored": 99_999}))
    assert any("29 chunks" in fault for fault in demo.faults(good_bpb, good_run | {"chunks": 29}))


def test_its_settings_are_settings():
    config = Config.from_env({name: str(value) for name, value in demo.DEMO.items()} | {"DATA_PATH": "."})
    assert config.num_layers == 11 and config.swa_enabled and config.ttt_enabled and config.eval_plain


def test_a_run_that_fails_is_reported(tmp_path):
    done = run_process(tmp_path, dict(DATA_PATH="nowhere"), script=Path("benchmarks/demo.py"))
    assert done.code == 1 and "error: train_gpt.py ended" in done.output
    assert "python data/build_dataset.py" in done.output
