"""README.md says what is true: its line references, its settings, its commands."""
import contextlib
import io
import re

from conftest import REPOSITORY

from train_gpt import Config

README = (REPOSITORY / "README.md").read_text()
CODE = (REPOSITORY / "train_gpt.py").read_text().splitlines()


def test_line_references_point_at_what_they_name():
    references = re.findall(r"\[`(\w+)`\]\(train_gpt\.py#L(\d+)\)", README)
    assert len(references) >= 20
    for name, line in references:
        actual = [number for number, text in enumerate(CODE, 1) if re.match(rf"\s*(class|def) {name}\b", text)]
        assert int(line) in actual, f"{name} is at {actual}, README.md says {line}"


def test_every_setting_is_listed_with_its_default():
    for name, value in vars(Config()).items():
        shown = str(int(value)) if isinstance(value, bool) else f"{value:g}" if isinstance(value, float) else str(value)
        shown = shown or "(empty)"
        assert re.search(rf"^\| `{name.upper()}` \| {re.escape(shown)} \|", README, re.MULTILINE), (name, shown)


def test_the_two_commands_are_in_the_makefile():
    makefile = (REPOSITORY / "Makefile").read_text()
    for target in ("demo", "test", "golden", "clean"):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE)
    assert "make demo" in README and "make test" in README


def test_nothing_is_left_to_fill_in():
    assert not re.search(r"@[A-Z]+@|TODO|XXX", README)


def test_the_example_of_scores_by_document_does_what_it_says(run_here, dataset):
    run = run_here(VAL_NLL_PATH="nats.npy", MAX_VAL_TOKENS=0)
    (code,) = [block for block in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if "begins with bos" in block]
    for name, value in dataset.items():
        code = code.replace(name, value)
    with contextlib.redirect_stdout(io.StringIO()) as output:
        exec(code, {})
    lines = [line.split(maxsplit=1) for line in output.getvalue().splitlines()]
    bpb = [float(first) for first, *_ in lines if re.fullmatch(r"\d+\.\d{4}", first)]
    assert len(bpb) == 5  # the data set's documents
    assert min(bpb) < run.submission["val_bpb"] < max(bpb)
