"""Rates of reading and writing are measured in turns, of models with any number of heads."""

import pytest
import torch

from gpt2.prune import speed as pruned_speed
from gpt2.prune.remove import remove_heads
from gpt2.prune.speed import ROUNDS, compare_speed
from gpt2.sampling.cache import Cache
from tests.analysed import BLOCK_SIZE, NORMS, REMOVED, make_model, make_windows


def test_rates_of_every_model_phase_and_batch():
    model = make_model()
    figures = compare_speed({"whole": model, "pruned": remove_heads(model, REMOVED)}, make_windows(3))
    kinds = [f"{phase}_{batch}tokens_per_s" for batch in ("", "batch_") for phase in ("prefill", "decode")]
    assert sorted(figures) == sorted(f"{name}_{kind}" for name in ("whole", "pruned") for kind in kinds)
    assert all(rate > 0 for rate in figures.values())


def test_models_take_turns(monkeypatch):
    turns = []
    monkeypatch.setattr(pruned_speed, "_rates", lambda model, rows: turns.append((model, len(rows))) or (1.0, 1.0))
    models = {"whole": make_model(), "pruned": remove_heads(make_model(), REMOVED)}
    compare_speed(models, make_windows(3))
    one_round = [(model, rows) for model in models.values() for rows in (1, 3)]
    assert turns == one_round * (1 + ROUNDS)


@pytest.mark.parametrize("norm", NORMS)
def test_what_is_timed_is_greedy_generation_within_the_context(norm, monkeypatch):
    model, prompts, extended = make_model(norm), make_windows(2)[:, : BLOCK_SIZE // 2], []
    extend = Cache.extend
    monkeypatch.setattr(Cache, "extend", lambda self, idx: extended.append(idx) or extend(self, idx))
    with torch.no_grad():
        pruned_speed._rates(model, prompts)
        # The first two warm up.
        written, text = torch.cat(extended[2:], 1), prompts
        for _ in range(written.shape[1]):
            text = torch.cat([text, model(text)[:, -1:].argmax(-1)], 1)
    assert text.shape[1] == BLOCK_SIZE and torch.equal(text[:, BLOCK_SIZE // 2 :], written)
