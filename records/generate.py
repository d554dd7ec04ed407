"""Let a stored model continue a text, token by token as they come.

    python records/generate.py logs/RUN_ID/artifact.bin --prompt "The function returns"
        [--tokenizer FILE.model] [--tokens 200] [--temperature 0.8] [--top-k 40] [--seed 1]

The artifact says how large the model is; the tokenizer is the one it was trained with, by default TOKENIZER_PATH, else
the one that logs/RUN_ID/metrics.jsonl names. Temperature 0 always takes the likeliest token. Without --prompt it starts
as a document does. It is a model of a few MB, trained for minutes: expect the sound of its data, no sense.
"""
import os
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
from runs import FinishedRun, UserError  # noqa: E402

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "data"))
from dataset_files import ArgumentParser, check_range, load_model, run_tool  # noqa: E402

from train_gpt import GPT, decode_artifact, plain  # noqa: E402


def find_tokenizer(given: Path | None, artifact: Path) -> Path:
    if given or os.environ.get("TOKENIZER_PATH"):
        return given or Path(os.environ["TOKENIZER_PATH"])
    try:
        return Path(FinishedRun.from_logs(artifact.parent).settings["tokenizer_path"])
    except UserError as error:
        raise UserError(f"{artifact}: no run beside it names its tokenizer: give --tokenizer FILE.model") from error


@torch.no_grad()
def continuation(model: GPT, tokens: list[int], count: int, temperature: float, top_k: int, seed: int):
    """Yields `count` token ids that follow; each sees at most the model's sequence length."""
    generator, length = torch.Generator().manual_seed(seed), model.config.train_seq_len
    for _ in range(count):
        context = torch.tensor([tokens[-length:]])
        last = torch.tensor([[context.size(1) - 1]])
        logits = model.logits(model.hidden(context, last))[0, 0]  # of the last position alone
        if temperature == 0:
            token = int(logits.argmax())
        else:
            kept = logits.topk(min(top_k or len(logits), len(logits)))
            choice = torch.multinomial((kept.values / temperature).softmax(0), 1, generator=generator)
            token = int(kept.indices[choice])
        tokens = tokens + [token]
        yield token


def run(argv: list[str]) -> int:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("artifact", type=Path, help="artifact.bin of a run, or artifact_seed*.bin of a record")
    parser.add_argument("--prompt", default="", help="the text to continue; default: the start of a document")
    parser.add_argument("--tokenizer", type=Path, help="SentencePiece model; see above")
    parser.add_argument("--tokens", type=int, default=200, help="how many to add, default 200")
    parser.add_argument("--temperature", type=float, default=0.8, help="default 0.8; 0: the likeliest token")
    parser.add_argument("--top-k", type=int, default=40, help="choose among so many, default 40; 0: all")
    parser.add_argument("--seed", type=int, default=1, help="another seed, another text; default 1")
    arguments = parser.parse_args(argv)
    check_range("--tokens", arguments.tokens, 1_000_000)
    check_range("--top-k", arguments.top_k, 1 << 20, 0)
    check_range("--seed", arguments.seed, 2**63 - 1, 0)
    if arguments.temperature and not 0.001 <= arguments.temperature < 1000:
        raise UserError(f"--temperature {arguments.temperature}: must be 0, or from 0.001 on, below 1000")
    path = find_tokenizer(arguments.tokenizer, arguments.artifact)
    tokenizer = load_model(path)
    if tokenizer is None:
        raise UserError(f"{path}: no SentencePiece model there: give --tokenizer FILE.model")
    config, weights = decode_artifact(plain(arguments.artifact).read_bytes())
    if tokenizer.vocab_size() != config.vocab_size:
        raise UserError(f"{path} has {tokenizer.vocab_size()} tokens, the artifact's model {config.vocab_size}: give"
                        " the tokenizer it was trained with")
    model = GPT(config).eval()
    model.load_state_dict(weights)
    start = [tokenizer.bos_id()] if tokenizer.bos_id() >= 0 else [0]
    tokens = start + tokenizer.encode(arguments.prompt)
    print(arguments.prompt, end="", flush=True)
    shown = tokenizer.decode(tokens)
    choice = arguments.temperature, arguments.top_k, arguments.seed
    for token in continuation(model, tokens[:], arguments.tokens, *choice):
        tokens.append(token)
        if token == tokenizer.bos_id():  # the model begins another document
            print("\n\n---\n", flush=True)
            tokens, shown = tokens[-1:], ""
            continue
        text = tokenizer.decode(tokens)
        if not text.endswith("\ufffd"):  # bytes of a character that is not complete yet
            print(text[len(shown):], end="", flush=True)
            shown = text
    print()
    return 0


def main(argv: list[str]) -> int:
    """Exit status: 0, or 1 for what a person can mend."""
    return run_tool(lambda: run(argv))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
