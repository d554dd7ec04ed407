"""README.md says what is true: its line references, its settings, its commands."""
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
