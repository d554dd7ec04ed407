"""Runs train_gpt.py with one fault injected: FAULT="where count action [rank]".

At the count-th call of `where` (on that rank only, if one is given, and not after torchrun's restart) the action is
taken, then the call goes on. Run like the script itself, alone or under torchrun; the tests and `make soak` do.
"""
import os
import shutil
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train_gpt  # noqa: E402

PLACES = dict(
    step=(train_gpt, "train_step"), write=(os, "fsync"), gradients=(train_gpt.FlatGradients, "reduce_and_clip"),
    read=(train_gpt.TokenStream, "read"), quantize=(train_gpt, "quantize"),
    gather=(train_gpt.Dist, "gather"), score=(train_gpt.Evaluator, "score"), adapt=(train_gpt.Evaluator, "adapt"),
)


def send(number: signal.Signals):
    return lambda *args: os.kill(os.getpid(), number)


def first_shard() -> Path:
    return sorted(Path(os.environ["DATA_PATH"]).glob("fineweb_train_*.bin"))[0]


def fail(*args) -> None:
    raise ArithmeticError("this rank's own error")


def fill(*args) -> None:
    """Takes all but 50 kB of the file system."""
    Path("ballast").write_bytes(bytes(shutil.disk_usage(".").free - 50_000))


def spoil(gradients, *args) -> None:
    gradients.flat[7] = float("nan")


ACTIONS = dict(
    kill=send(signal.SIGKILL), term=send(signal.SIGTERM), int=send(signal.SIGINT), stop=send(signal.SIGSTOP),
    hang=lambda *args: time.sleep(1e6), pause=lambda *args: time.sleep(40), fail=fail, fill=fill, spoil=spoil,
    vanish=lambda *args: first_shard().unlink(), cut=lambda *args: os.truncate(first_shard(), 2000),
)


def inject(where: str, count: str, action: str, rank: str = "") -> None:
    """count "12": at the 12th call; "12-": from then on at each."""
    owner, name = PLACES[where]
    original, first, calls = getattr(owner, name), int(count.rstrip("-")), 0

    def wrapped(*args, **options):
        nonlocal calls
        calls += 1
        if calls == first or calls > first and count.endswith("-"):
            ACTIONS[action](*args)
        return original(*args, **options)

    if rank in ("", os.environ.get("RANK", "0")) and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":
        setattr(owner, name, wrapped)


if __name__ == "__main__":
    if os.environ.get("FAULT"):
        inject(*os.environ["FAULT"].split())
    script = Path(train_gpt.__file__).read_text()
    exec(script[script.index("if __name__ ==") :], vars(train_gpt) | {"__name__": "__main__"})
