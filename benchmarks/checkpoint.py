"""What a checkpoint costs: steps with one being written beside steps without, in pairs.

    python benchmarks/checkpoint.py                  any setting of train_gpt.py
    MODEL_DIM=512 NUM_HEADS=8 NUM_KV_HEADS=4 TRAIN_BATCH_TOKENS=2048 python benchmarks/checkpoint.py --steps 20

The copy of the state stops training, writing and hashing it go on beside; both are in what is shown as its cost. The
share is that of CHECKPOINT_EVERY_SECONDS (90 by default): what training loses.
"""
import argparse
import os
import statistics
import tempfile
import time
from dataclasses import replace

import timing
from timing import in_turn, spread, train_gpt


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=5, help="in a pair's halves: longer than the writing takes")
    parser.add_argument("--repeats", type=int, default=7)
    args = parser.parse_args()
    run = timing.make_run({})
    every = run.config.checkpoint_every_seconds or train_gpt.Config.checkpoint_every_seconds
    optimizers = train_gpt.build_optimizers(run.model, run.config, run.dist)
    average, stream = train_gpt.WeightAverage(run.model), train_gpt.TokenStream(run.config, "train")
    batch = list(stream.micro_batches(0, run.dist))
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        config = replace(run.config, run_id="run", checkpoint_every_seconds=1e-9, checkpoint_every_steps=0)
        checkpoints = train_gpt.Checkpoints(config, run.dist)
        checkpoints.log = train_gpt.Log(checkpoints.folder)
        blocked, written = [], []

        def steps() -> None:
            for _ in range(args.steps):
                train_gpt.train_step(run, batch, optimizers, 1.0, 0.95)

        def steps_and_checkpoint() -> None:
            start = time.perf_counter()
            checkpoints.reached(0)
            blocked.append(time.perf_counter() - start)
            checkpoints.writing.add_done_callback(lambda _: written.append(time.perf_counter() - start))
            steps()

        steps()
        checkpoints.begin("1_train", train_gpt.state_of(run.model, optimizers, *average.means))
        steps_and_checkpoint()
        checkpoints.writing.result()
        without, with_one = in_turn((steps, steps_and_checkpoint), args.repeats, run.dist.device)
        (file,) = checkpoints.files()
        size = file.stat().st_size
        costs = [b - a for a, b in zip(without, with_one, strict=True)]
        print(timing.machine())
        print(f"checkpoint of {size / 1e6:,.1f} MB; {args.steps} steps without: {spread(without, 2)} s")
        print(f"training stands still  {spread([1000 * s for s in blocked[1:]])} ms")
        print(f"written after          {spread([1000 * s for s in written[1:]])} ms")
        print(f"cost, pair by pair     {spread([1000 * s for s in costs])} ms")
        print(f"share of {every:.0f} s          {statistics.median(costs) / every:.3%}, standing still alone "
              f"{statistics.median(blocked[1:]) / every:.3%}")


if __name__ == "__main__":
    main()
