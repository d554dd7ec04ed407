"""Pictures of finished runs, from what they logged: python records/plot.py logs/A [logs/B ...] --out FOLDER

    training.png    training and validation loss by step and by seconds
    stages.png      BPB after training, averaging, quantisation, adaptation
    running.png     BPB of all targets scored so far along the validation text, with and without adaptation
    bits.png        bits a parameter takes in the artifact, by group of parameters
    position.png    loss by position in the window, sequences side by side

Runs are told apart by seed. records/package.py puts them into a submission. Where a run left nothing to show (no second
pass without adaptation, for example) the picture shows the rest.
"""
import sys
from collections import defaultdict
from pathlib import Path

import matplotlib
import numpy as np
from runs import FinishedRun, UserError, load_script

matplotlib.use("Agg")  # no screen
import matplotlib.pyplot as plt  # noqa: E402

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "data"))
from dataset_files import ArgumentParser, run_tool  # noqa: E402

# Okabe and Ito's colours, which most kinds of colour blindness tell apart; lines differ in style too.
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"]
STYLES = ["-", "--", ":", "-."]
READABLE_AT_HALF_WIDTH = {"font.size": 15, "lines.linewidth": 2.2, "figure.dpi": 100, "axes.grid": True,
                          "grid.alpha": 0.3, "legend.fontsize": 13, "axes.spines.top": False,
                          "axes.spines.right": False}
STAGES = [("val", "after training"), ("swa", "after averaging"), ("final_quantized_exact", "int5/int6, window"),
          ("final_ttt_exact", "submitted")]


def style(index: int) -> dict:
    return dict(color=COLOURS[index % len(COLOURS)], linestyle=STYLES[index % len(STYLES)])


def smoothed(values: np.ndarray, window: int) -> np.ndarray:
    """The mean of each value and up to window - 1 before it."""
    total = np.concatenate(([0.0], np.cumsum(values)))
    index = np.arange(1, len(values) + 1)
    first = np.maximum(index - window, 0)
    return (total[index] - total[first]) / (index - first)


def plot_training(runs: list[FinishedRun]) -> plt.Figure:
    figure, axes = plt.subplots(1, 2, figsize=(12, 5), sharey=True)
    for axis, key, label in zip(axes, ("step", "train_s"), ("step", "seconds of training")):
        for index, run in enumerate(runs):
            train = [r for r in run.records if r["event"] == "train" and r["train_loss"] is not None]
            losses = smoothed(np.array([r["train_loss"] for r in train]), max(1, len(train) // 50))
            axis.plot([r[key] for r in train], losses, **style(index), label=f"training, seed {run.seed}")
            val = [r for r in run.records if r["event"] == "val"]
            axis.plot([r[key] for r in val], [r["val_loss"] for r in val], "o", markersize=9, markeredgecolor="black",
                      color=style(index)["color"], label=f"validation, seed {run.seed}")
        axis.set_xlabel(label)
    axes[0].set_ylabel("nats a token")
    final = [r["val_loss"] for run in runs for r in run.records if r["event"] == "val"]
    axes[0].set_ylim(min(final) - 0.3, min(final) + 2.5)
    axes[1].legend()
    return figure


def plot_stages(runs: list[FinishedRun]) -> plt.Figure:
    figure, axis = plt.subplots(figsize=(9, 5))
    for index, run in enumerate(runs):
        present = [(place, run.last[event]["val_bpb"]) for place, (event, _) in enumerate(STAGES) if event in run.last]
        axis.plot(*zip(*present), marker="o", markersize=9, **style(index), label=f"seed {run.seed}")
        axis.annotate(f"{present[-1][1]:.4f}", present[-1], textcoords="offset points", xytext=(6, 8))
    axis.set_xticks(range(len(STAGES)), [name.replace(" ", "\n", 1) for _, name in STAGES])
    axis.set_xlim(-0.3, len(STAGES) - 0.4)
    axis.set_ylabel("bits per byte")
    axis.legend()
    return figure


def plot_running(runs: list[FinishedRun]) -> plt.Figure:
    figure, (above, below) = plt.subplots(2, 1, figsize=(9, 8), sharex=True)
    for index, run in enumerate(runs):
        adapted = run.scores
        plain = [r for r in run.records if r["event"] == "score" and not r.get("submitted")]
        plain = plain if len(plain) == len(adapted) else []  # ended in the middle
        targets = np.array([r["end"] for r in adapted]) / 1e6
        above.plot(targets, [r["running_bpb"] for r in adapted], **style(index), label=f"adapting, seed {run.seed}")
        if plain:
            without = np.array([r["running_bpb"] for r in plain])
            above.plot(targets, without, color=style(index)["color"], linewidth=0.9, label="without")
            below.plot(targets, without - [r["running_bpb"] for r in adapted], **style(index), label=f"seed {run.seed}")
    above.set_ylabel("bits per byte so far")
    below.set_ylabel("gained by adaptation")
    below.set_xlabel("millions of targets scored")
    below.axhline(0, color="black", linewidth=0.8)
    above.legend()
    return figure


def bits_by_group(run: FinishedRun) -> dict[str, float]:
    """Bits a parameter: the entropy of a matrix's values and its rows' steps; 16 for what is stored as fp16."""
    script = load_script(run.script)
    _, stored, values = script.unpack_artifact(run.artifact.read_bytes())
    bits, weights = defaultdict(float), defaultdict(int)
    for name, tensor in stored.items():
        group = "scales, gates"
        if name in values:
            group = ("MLP" if ".mlp." in name else "attention" if ".attn." in name else
                     "token table" if name.startswith("tok_emb") else "bigram")
        bits[group] += 16 * tensor.numel()
        weights[group] += values[name].numel() if name in values else tensor.numel()
        if name in values:
            counts = np.unique(values[name].numpy(), return_counts=True)[1]
            bits[group] -= (counts * np.log2(counts / counts.sum())).sum()
    return {group: bits[group] / weights[group] for group in bits}


def plot_bits(runs: list[FinishedRun]) -> plt.Figure | None:
    stored = [run for run in runs if run.artifact.is_file()]
    if not stored:
        return None
    figure, axis = plt.subplots(figsize=(9, 5))
    width = 0.8 / len(stored)
    for index, run in enumerate(stored):
        groups = bits_by_group(run)
        bars = axis.bar(np.arange(len(groups)) + index * width, groups.values(), 0.92 * width, label=f"seed {run.seed}",
                        color=COLOURS[index % len(COLOURS)], hatch=["", "//", ".."][index % 3], edgecolor="white")
        if len(stored) < 4:
            axis.bar_label(bars, fmt="%.2f", fontsize=10)
    axis.set_xticks(np.arange(len(groups)) + 0.4 - width / 2, [name.replace(" ", "\n", 1) for name in groups])
    axis.set_ylabel("bits a parameter")
    axis.legend()
    return figure


def plot_position(runs: list[FinishedRun]) -> plt.Figure:
    figure, axis = plt.subplots(figsize=(9, 5))
    for index, run in enumerate(runs):
        means, length = run.last["swa"]["by_position"], run.settings["train_seq_len"]
        middles = (np.arange(len(means)) + 0.5) * length / len(means)
        axis.plot(middles, means, marker="o", **style(index), label=f"seed {run.seed}")
    axis.set_xlabel("position in the sequence")
    axis.set_ylabel("nats a token")
    axis.legend()
    return figure


def save_all(runs: list[FinishedRun], out: Path) -> list[str]:
    """Writes the pictures that can be drawn; their names."""
    out.mkdir(parents=True, exist_ok=True)
    names = []
    with plt.rc_context(READABLE_AT_HALF_WIDTH):
        for name, plot in dict(training=plot_training, stages=plot_stages, running=plot_running, bits=plot_bits,
                               position=plot_position).items():
            if figure := plot(runs):
                figure.tight_layout()
                figure.savefig(out / f"{name}.png", metadata={"Software": None})
                plt.close(figure)
                names.append(f"{name}.png")
    return names


def run(argv: list[str]) -> int:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("runs", type=Path, nargs="+", help="folders logs/RUN_ID of runs that have finished")
    parser.add_argument("--out", type=Path, help="where the pictures go; default: figures/ in the first run's folder")
    arguments = parser.parse_args(argv)
    runs = [FinishedRun.from_logs(folder) for folder in arguments.runs]
    if not all(run.trained for run in runs):
        raise UserError("runs with ARTIFACT= did not train: give runs that did")
    out = arguments.out or arguments.runs[0] / "figures"
    print(" ".join(str(out / name) for name in save_all(runs, out)))
    return 0


def main(argv: list[str]) -> int:
    """Exit status: 0, or 1 if there is nothing to draw."""
    return run_tool(lambda: run(argv))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
