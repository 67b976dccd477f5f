"""Answers that stand in the training tokens are found, wherever they stand, and nothing else is."""

from collections.abc import Sequence

import numpy as np
import pytest

from gpt2.hellaswag.items import Benchmark, TokenizedItems
from gpt2.tokenizer import contamination
from gpt2.tokenizer.contamination import OF_ENDING, RUN, items_in_training

N_ITEMS, CONTEXT, ENDING = 5, 20, 9
LABELS = np.array([0, 3, 1, 2, 0])


def make_benchmark(context: int = CONTEXT, ending: int = ENDING) -> Benchmark:
    """Items of random ids: each context stands before four endings of its own."""
    rng = np.random.default_rng(0)
    contexts = np.repeat(rng.integers(1, 5000, (N_ITEMS, context)), 4, axis=0)
    rows = np.concatenate([contexts, rng.integers(1, 5000, (4 * N_ITEMS, ending))], axis=1)
    length = context + ending
    tokens = TokenizedItems(
        rows.astype(np.uint16).flatten(),
        np.arange(4 * N_ITEMS + 1) * length,
        np.full(4 * N_ITEMS, ending),
        np.full(4 * N_ITEMS, 3 * ending),
    )
    return Benchmark(LABELS, {"completion": tokens})


def row(benchmark: Benchmark, item: int, ending: int | None = None) -> np.ndarray:
    """Context and ending in one; the right ending unless another is asked."""
    rows = benchmark.protocols["completion"]
    number = 4 * item + (benchmark.labels[item] if ending is None else ending)
    return rows.tokens[rows.offsets[number] : rows.offsets[number + 1]]


def make_text(n: int, planted: Sequence[tuple[int, np.ndarray]] = ()) -> np.ndarray:
    """Random ids with runs of tokens put at positions."""
    ids = np.random.default_rng(1).integers(1, 5000, n).astype(np.uint16)
    for position, run in planted:
        ids[position : position + len(run)] = run
    return ids


def test_text_without_the_items_holds_none(write_tokens):
    assert items_in_training(make_benchmark(), write_tokens(make_text(5000))) == 0


@pytest.mark.parametrize("found", range(N_ITEMS + 1))
def test_planted_answers_are_counted_once_each(write_tokens, found):
    benchmark = make_benchmark()
    planted = [(100 * item + copy, row(benchmark, item)) for item in range(found) for copy in (0, 40)]
    assert items_in_training(benchmark, write_tokens(make_text(1000, planted))) == found


@pytest.mark.parametrize("chunk_tokens", [1, 7, RUN, 64, 10_000])
def test_an_answer_is_found_wherever_chunks_and_shards_end(write_tokens, monkeypatch, chunk_tokens):
    monkeypatch.setattr(contamination, "CHUNK_TOKENS", chunk_tokens)
    benchmark = make_benchmark()
    wanted = row(benchmark, 1)[CONTEXT + OF_ENDING - RUN : CONTEXT + OF_ENDING]
    for position in [0, 200 - RUN, *range(60, 68)]:
        assert items_in_training(benchmark, write_tokens(make_text(200, [(position, wanted)]))) == 1


def test_processes_find_what_one_finds(write_tokens, monkeypatch):
    monkeypatch.setattr(contamination, "PROCESS_TOKENS", 1)
    benchmark = make_benchmark()
    # The module of a process has its own TASK_TOKENS: one task for all.
    planted = [(100 * item, row(benchmark, item)) for item in range(3)]
    assert items_in_training(benchmark, write_tokens(make_text(1000, planted)), workers=2) == 3


@pytest.mark.parametrize("task_tokens", [1, 50, RUN])
def test_an_answer_is_found_wherever_tasks_end(write_tokens, monkeypatch, task_tokens):
    monkeypatch.setattr(contamination, "PROCESS_TOKENS", 1)
    monkeypatch.setattr(contamination, "TASK_TOKENS", task_tokens)
    # Here, where the settings above hold.
    monkeypatch.setattr(contamination, "in_order", lambda function, tasks, _: (function(task) for task in tasks))
    benchmark = make_benchmark()
    for position in range(40, 60):
        text = write_tokens(make_text(120, [(position, row(benchmark, 1))]))
        assert items_in_training(benchmark, text, workers=2) == 1


def test_the_hash_of_a_run_is_a_polynomial_of_its_tokens():
    tokens = make_text(40)
    expected = [
        sum((int(token) + 1) * contamination.BASE ** (RUN - 1 - i) for i, token in enumerate(tokens[start:][:RUN]))
        for start in range(40 - RUN + 1)
    ]
    assert contamination._hash_runs(tokens).tolist() == [value % 2**64 for value in expected]


def test_what_counts_is_the_run_across_the_start_of_the_right_ending(write_tokens):
    benchmark = make_benchmark()
    answer = row(benchmark, 2)
    run = answer[CONTEXT + OF_ENDING - RUN : CONTEXT + OF_ENDING]
    altered = [np.where(np.arange(RUN) == i, run + 1, run) for i in range(RUN)]
    absent = [
        *altered,
        row(benchmark, 2, ending=0),
        answer[:CONTEXT],
        answer[CONTEXT:],
        run[1:],
        np.sort(run),
    ]
    text = make_text(1000, [(45 * i, part) for i, part in enumerate(absent)])
    assert items_in_training(benchmark, write_tokens(text)) == 0
    assert items_in_training(benchmark, write_tokens(make_text(1000, [(500, run)]))) == 1


@pytest.mark.parametrize(("context", "ending"), [(10, 3), (7, 6), (12, 1)])
def test_a_short_ending_is_looked_for_with_more_of_its_context(write_tokens, context, ending):
    benchmark = make_benchmark(context, ending)
    text = make_text(300, [(100, row(benchmark, 0)), (200, row(benchmark, 1, ending=0))])
    assert items_in_training(benchmark, write_tokens(text)) == 1


def test_items_and_texts_too_short_for_a_run_are_passed_over(write_tokens):
    short = make_benchmark(context=RUN - 6, ending=5)
    assert items_in_training(short, write_tokens(make_text(300, [(100, row(short, 0))]))) == 0
    benchmark = make_benchmark()
    assert items_in_training(benchmark, write_tokens(row(benchmark, 0)[: RUN - 1])) == 0
