"""Write records/README.md, the table of every run recorded here: python records/index.py [--check]

Made from each folder's submission.json; --check writes nothing and ends with status 1 if the file is not up to date.
"""
import json
import sys
from pathlib import Path

RECORDS = Path(__file__).resolve().parent
sys.path.insert(0, str(RECORDS.parent / "data"))
from dataset_files import ArgumentParser, UserError, run_tool  # noqa: E402

HEAD = """# Recorded runs

Made by `python records/index.py` from the folders. `python records/package.py` makes a folder of finished runs, `python
records/check_validity.py FOLDER` checks one; README.md of the repository shows how.

| date | name | track | hardware | data | seeds | BPB ± std | bytes | training, s | evaluation, s |
|---|---|---|---|---|---|---|---|---|---|
"""


def row(folder: Path) -> str:
    try:
        run = json.loads((folder / "submission.json").read_text())
        spread = f" ± {run['val_bpb_std']:.4f}" if run["val_bpb_std"] is not None else ""
        return (f"| {run['date']} | [{run['name']}]({folder.relative_to(RECORDS)}/README.md) | {run['track']} | "
                f"{run['hardware']} | {run['data']} | {', '.join(map(str, run['seeds']))} | "
                f"{run['mean_val_bpb']:.4f}{spread} | {run['total_bytes']:,} | {run['train_seconds']:.1f} | "
                f"{run['eval_seconds']:.1f} |\n")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder}/submission.json: {error!r:.60}: make the folder with records/package.py") from error


def index() -> str:
    folders = sorted(RECORDS.glob("track_*/*"), key=lambda folder: (folder.name, folder.parent.name))
    return HEAD + "".join(row(folder) for folder in folders)


def run(argv: list[str]) -> int:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="only say whether it is up to date")
    check, path = parser.parse_args(argv).check, RECORDS / "README.md"
    if check and (not path.is_file() or path.read_text(encoding="utf-8") != index()):
        raise UserError(f"{path}: not what the folders say: run python records/index.py")
    if not check:
        path.write_text(index(), encoding="utf-8")
    return 0


def main(argv: list[str]) -> int:
    """Exit status: 0, or 1 if the table is not up to date, or cannot be."""
    return run_tool(lambda: run(argv))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
