"""Test-time training never sees what it has yet to score.

Each check returns what it finds wrong, so that the same check is run on the real evaluation, where it must find
nothing, and on evaluations that cheat on purpose, where it must find something.
"""
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import make_run, random_model, tiny_config

import train_gpt
from train_gpt import Evaluator, sliding_windows

# L, S, C, N: windows that end on the chunks' edges, and windows that straddle them (start-up refuses those).
ALIGNED = (32, 8, 128, 736)
STRADDLING = (64, 24, 504, 4 * 504 + 64)


class Watched:
    """Tokens that tell which of them are read."""

    def __init__(self, tokens, note):
        self.tokens, self.note = tokens, note

    def __getitem__(self, positions):
        self.note(positions)
        return self.tokens[positions]


class Recorder(Evaluator):
    """The real evaluation, which also notes the logits behind each score and the order of scoring and training."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.logits = torch.zeros(self.num_targets, self.config.vocab_size)
        self.times_scored = np.zeros(self.num_targets + 1, int)
        self.trained_unscored = []
        self.batches = []
        plain = self.run.model.logits

        def recorded(x):
            self.batches.append(plain(x))
            return self.batches[-1]

        self.run.model.logits = recorded
        self.tokens = Watched(self.tokens, self.note)

    def score(self, windows, rows, stride):
        """The batches hold `stride` positions a window, as often as it takes for the first one."""
        self.batches.clear()
        nats = super().score(windows, rows, stride)
        pieces = [(f, min(f + stride, end)) for _, first, end in windows for f in range(first, end, stride)]
        for (first, end), logits in zip(pieces, torch.cat(self.batches).detach(), strict=False):
            self.logits[first:end] = logits[: end - first]
            self.times_scored[first:end] += 1
        return nats

    def adapt(self, first, end, optimizer):
        self.end = end
        super().adapt(first, end, optimizer)

    def note(self, positions):
        if torch.is_grad_enabled():  # inputs, then targets: position p + 1 holds target p; a target is no input yet
            trained = positions.numpy().ravel()
            trained = trained[trained < self.end]
            self.trained_unscored += trained[self.times_scored[trained] == 0].tolist()


class TrainsFirst(Recorder):
    """Cheats as the seed does: adapts on a chunk, then scores it."""

    def score(self, windows, rows, stride):
        sgd = torch.optim.SGD(self.run.model.parameters(), lr=self.config.ttt_lr)
        chunk = int(windows[0, 1]) // self.config.ttt_chunk_tokens
        with torch.enable_grad():
            self.adapt(chunk * self.config.ttt_chunk_tokens, int(windows[-1, 2]), sgd)
        return super().score(windows, rows, stride)


class OneTooLong(Recorder):
    """Trains one target beyond the chunk."""

    def adapt(self, first, end, optimizer):
        super().adapt(first + 1, end + 1, optimizer)


def by_last_target(num_targets, seq_len, stride, chunk_tokens):
    """plan_chunks with each window in the chunk of its last target instead of its first."""
    windows = sliding_windows(num_targets, seq_len, stride)
    return np.split(windows, np.flatnonzero(np.diff((windows[:, 2] - 1) // chunk_tokens)) + 1)


class Bench:
    """Evaluates one fixed model on given tokens, with one kind of evaluation and one geometry."""

    def __init__(self, dataset, token_bytes, kind=Recorder, geometry=ALIGNED, **changes):
        length, stride, chunk, self.num_targets = geometry
        self.config = tiny_config(dataset, train_seq_len=length, eval_stride=stride, ttt_chunk_tokens=chunk,
                                  max_val_tokens=0, ttt_lr=0.05, micro_batch_tokens=4 * length)
        self.config = replace(self.config, **changes)
        self.kind, self.token_bytes = kind, token_bytes

    def evaluate(self, tokens) -> tuple[np.ndarray, Recorder]:
        run = make_run(self.config, random_model(self.config))
        evaluator = self.kind(run, tokens[: self.num_targets + 1], self.token_bytes)
        nats, _ = evaluator.score_then_adapt(evaluator.epochs, run.dist.now())
        return nats, evaluator


def causality_faults(bench: Bench, tokens: np.ndarray, t: int) -> list[str]:
    """Changes every token from index t on. Targets p <= t - 2 lie before the change, and so does all that the
    distributions of targets p <= t - 1 may depend on: both must keep their bits."""
    changed = tokens.copy()
    changed[t:] = (changed[t:] + 1 + np.arange(len(changed) - t) % 300) % bench.config.vocab_size
    nats, recorder = bench.evaluate(tokens)
    nats_changed, recorder_changed = bench.evaluate(changed)
    assert not np.array_equal(nats[t - 1 :], nats_changed[t - 1 :]), "the change must matter afterwards"
    faults = []
    if not np.array_equal(nats[: t - 1], nats_changed[: t - 1]):
        faults.append(f"scores before the change at {t} moved")
    if not torch.equal(recorder.logits[:t], recorder_changed.logits[:t]):
        faults.append(f"distributions that may not know of the change at {t} moved")
    return faults


def trace_faults(bench: Bench, tokens: np.ndarray) -> list[str]:
    """Every target scored once, and each only trained on after it was."""
    _, recorder = bench.evaluate(tokens)
    faults = []
    if not (recorder.times_scored[:-1] == 1).all():
        faults.append("targets not scored exactly once")
    if recorder.trained_unscored:
        faults.append(f"{len(recorder.trained_unscored)} targets trained before they were scored")
    return faults


def change_points(geometry) -> list[int]:
    """Indices inside a chunk, around an edge, inside a window that straddles one, and in the last chunk."""
    length, stride, chunk, num_targets = geometry
    windows = sliding_windows(num_targets, length, stride)
    straddling = windows[(windows[:, 1] // chunk) != ((windows[:, 2] - 1) // chunk)]
    inside = [int(first) + 6 for _, first, _ in straddling[:2]]
    return [chunk + chunk // 3, 2 * chunk - 1, 2 * chunk, 2 * chunk + 1, num_targets - length // 2, *inside]


@pytest.fixture
def tokens(val_tokens):
    return val_tokens[: STRADDLING[-1] + 1]


both_steps = pytest.mark.parametrize("ttt_muon", [0.0, 0.3], ids=["sgd", "muon"])


@both_steps
@pytest.mark.parametrize("geometry", [ALIGNED, STRADDLING], ids=["aligned", "straddling"])
def test_nothing_before_a_change_moves(dataset, token_bytes, tokens, geometry, ttt_muon):
    bench = Bench(dataset, token_bytes, geometry=geometry, ttt_muon=ttt_muon)
    for t in change_points(geometry):
        assert causality_faults(bench, tokens, t) == []


@both_steps
@pytest.mark.parametrize("geometry", [ALIGNED, STRADDLING], ids=["aligned", "straddling"])
def test_each_target_is_scored_once_and_then_trained(dataset, token_bytes, tokens, geometry, ttt_muon):
    assert trace_faults(Bench(dataset, token_bytes, geometry=geometry, ttt_muon=ttt_muon), tokens) == []


@both_steps
@pytest.mark.parametrize("kind", [TrainsFirst, OneTooLong])
def test_cheating_changes_the_score_and_is_caught(dataset, token_bytes, tokens, kind, ttt_muon):
    honest, cheat = (Bench(dataset, token_bytes, each, ttt_muon=ttt_muon) for each in (Recorder, kind))
    assert not np.array_equal(honest.evaluate(tokens)[0], cheat.evaluate(tokens)[0])
    assert trace_faults(cheat, tokens)
    assert any(causality_faults(cheat, tokens, t) for t in change_points(ALIGNED))


def test_windows_placed_by_their_last_target_are_caught(dataset, token_bytes, tokens, monkeypatch):
    bench = Bench(dataset, token_bytes, geometry=STRADDLING)
    honest = bench.evaluate(tokens)[0]
    monkeypatch.setattr(train_gpt, "plan_chunks", by_last_target)
    assert not np.array_equal(honest, bench.evaluate(tokens)[0])
    assert trace_faults(bench, tokens)
    assert any(causality_faults(bench, tokens, t) for t in change_points(STRADDLING)[-2:])


def test_adaptation_carries_a_chunk_forward_and_nothing_else_does(dataset, token_bytes, tokens):
    """Tokens changed inside chunk c reach windows that do not hold them through the weights, so only with TTT."""
    length, _, chunk, _ = ALIGNED
    changed, c = tokens.copy(), 2
    changed[c * chunk + 1 : (c + 1) * chunk] = changed[c * chunk + 1 : (c + 1) * chunk][::-1]
    beyond = slice((c + 1) * chunk + length, None)  # first target whose window starts after the chunk
    for enabled in (True, False):
        bench = Bench(dataset, token_bytes, ttt_enabled=enabled)
        same = np.array_equal(bench.evaluate(tokens)[0][beyond], bench.evaluate(changed)[0][beyond])
        assert same is not enabled


def test_no_adaptation_is_the_same_driver_bit_for_bit(dataset, token_bytes, tokens):
    scores = [Bench(dataset, token_bytes, **changes).evaluate(tokens)[0]
              for changes in (dict(ttt_enabled=False), dict(ttt_lr=0.0), dict(ttt_epochs=0), dict(ttt_max_chunks=0),
                              dict(ttt_lr=0.0, ttt_muon=0.3), dict(ttt_epochs=0, ttt_muon=0.3))]
    assert all(np.array_equal(scores[0], other) for other in scores[1:])
    assert not np.array_equal(scores[0], Bench(dataset, token_bytes).evaluate(tokens)[0])


def test_scores_are_of_normalised_distributions_over_the_vocabulary(dataset, token_bytes, tokens):
    nats, recorder = Bench(dataset, token_bytes).evaluate(tokens)
    probability = recorder.logits.double().softmax(dim=1)
    assert probability.shape == (len(nats), recorder.config.vocab_size)
    targets = torch.from_numpy(tokens[1 : len(nats) + 1].astype(np.int64))[:, None]
    np.testing.assert_allclose(nats, -probability.gather(1, targets)[:, 0].log().numpy(), atol=2e-5)


def test_scores_equal_a_loop_over_windows(dataset, token_bytes, tokens):
    """An independent scorer: one window at a time, no batches, no padding, no adaptation."""
    length, stride, _, num_targets = ALIGNED
    bench = Bench(dataset, token_bytes, ttt_enabled=False)
    nats, recorder = bench.evaluate(tokens)
    expected = np.zeros(num_targets, np.float32)
    text = torch.from_numpy(tokens[: num_targets + 1].astype(np.int64))
    for target in range(num_targets):
        start = 0 if target < length else stride * ((target - length) // stride + 1)
        with torch.no_grad():
            logits = recorder.run.model(text[None, start : target + 1])[0, -1]
        expected[target] = -torch.log_softmax(logits, 0)[text[target + 1]]
    np.testing.assert_allclose(nats, expected, atol=2e-5)


@both_steps
def test_a_prefix_reproduces_the_full_run(dataset, token_bytes, tokens, ttt_muon):
    full = Bench(dataset, token_bytes, ttt_muon=ttt_muon).evaluate(tokens)[0]
    for prefix in (384, 416):  # at a chunk's end, and inside one
        nats = Bench(dataset, token_bytes, max_val_tokens=prefix, ttt_muon=ttt_muon).evaluate(tokens)[0]
        assert len(nats) == prefix
        assert np.array_equal(nats, full[:prefix])


@both_steps
def test_adaptation_learns(dataset, token_bytes, tokens, ttt_muon):
    """On text that repeats, adapting must help: the check that it trains on the chunk at all, and downhill."""
    repeated = np.resize(tokens[:129], ALIGNED[-1] + 1)
    adapted, plain = (Bench(dataset, token_bytes, ttt_enabled=on, ttt_muon=ttt_muon).evaluate(repeated)[0]
                      for on in (True, False))
    assert adapted[-128:].mean() < 0.9 * plain[-128:].mean()


def test_muons_step_is_the_gradient_made_orthogonal_for_matrices_and_plain_sgd_for_the_rest(dataset, token_bytes, tokens):
    config = tiny_config(dataset, ttt_muon=0.3)
    moves = []
    for factor in (0.0, 0.3):
        run = make_run(replace(config, ttt_muon=factor), random_model(config))
        before = [p.detach().clone() for p in run.model.parameters()]
        Evaluator(run, tokens, token_bytes).adapt(0, 128, torch.optim.SGD(run.model.parameters(), lr=0.1))
        moves.append([(b - p).detach() / 0.1 for b, p in zip(before, run.model.parameters(), strict=True)])
    matrices = {id(m.weight) for m in run.model.modules() if isinstance(m, torch.nn.Linear)}
    for p, gradient, move in zip(run.model.parameters(), *moves, strict=True):
        if id(p) in matrices:
            rows = torch.nn.functional.normalize(gradient, dim=-1)[None]
            gradient = 0.3 * max(1, p.size(0) / p.size(1)) ** 0.5 * train_gpt.newton_schulz(rows, 5)[0]
        torch.testing.assert_close(move, gradient, atol=2e-3, rtol=0.02)


def test_the_budget_stops_adaptation_and_can_be_replayed(dataset, token_bytes, tokens, monkeypatch, tmp_path):
    """On this clock reading the artifact takes 20 s, scoring a chunk 1 s and adapting on it 3 s. 23 chunks then need
    112 s with adaptation and 43 s without; in 75 s there is room to adapt on 10. The 20 s must not be taken for a
    cost of every chunk, which would stop adaptation at once."""
    geometry = (32, 8, 32, 736)
    bench = Bench(dataset, token_bytes, geometry=geometry, eval_max_seconds=75.0)
    seconds = [20.0]
    monkeypatch.setattr(train_gpt.Dist, "now", lambda self: seconds[0])
    score, adapt = Recorder.score, Recorder.adapt
    monkeypatch.setattr(Recorder, "score", lambda *a: (score(*a), seconds.__setitem__(0, seconds[0] + 1.0))[0])
    monkeypatch.setattr(Recorder, "adapt", lambda *a: (adapt(*a), seconds.__setitem__(0, seconds[0] + 1.0))[0])
    run = make_run(bench.config, random_model(bench.config), tmp_path)
    nats, adapted = Recorder(run, tokens[: bench.num_targets + 1], token_bytes).score_then_adapt(3, 0.0)
    assert adapted == 10 and seconds[0] == 20 + 23 + 3 * 10 <= 75
    assert "TTT_MAX_CHUNKS=10" in (tmp_path / "train.log").read_text()
    replay = Bench(dataset, token_bytes, geometry=geometry, eval_max_seconds=0.0, ttt_max_chunks=10).evaluate(tokens)[0]
    assert np.array_equal(nats, replay)


def test_warm_up_restores_everything_and_sees_no_validation_token(dataset, token_bytes, tokens):
    config = tiny_config(dataset)
    run = make_run(config)
    evaluator = Evaluator(run, tokens, token_bytes)
    evaluator.tokens = None  # any use of a validation token now fails
    optimizers = train_gpt.build_optimizers(run.model, config, run.dist)
    before = [p.detach().clone() for p in run.model.parameters()]
    train_gpt.warm_up(run, train_gpt.TokenStream(config, "train"), optimizers, evaluator)
    assert all(torch.equal(a, b) for a, b in zip(before, run.model.parameters(), strict=True))
    state = [slot for each in optimizers for slots in each.state.values() for slot in slots.values()]
    assert len(state) > len(before) and not any(slot.any() for slot in state)
    with pytest.raises(TypeError, match="subscriptable"):  # the trap works: scoring does need the tokens
        evaluator.score(sliding_windows(evaluator.num_targets, config.train_seq_len, config.eval_stride), 8, 8)
