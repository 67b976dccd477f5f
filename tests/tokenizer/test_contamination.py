"""Items whose answers occur in the training tokens are found, wherever they occur, and no other item is."""

from collections.abc import Sequence

import numpy as np
import pytest

from gpt2.data.shards import TokenSet
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


def found_in(train: TokenSet, benchmark: Benchmark, workers: int = 1) -> list[int]:
    """Numbers of the items that are found."""
    flags = items_in_training(benchmark, train, workers)
    assert (flags.shape, flags.dtype) == (benchmark.labels.shape, bool)
    return np.flatnonzero(flags).tolist()


@pytest.mark.parametrize("planted", [[], [0], [4], [1, 3], [0, 1, 2, 3, 4]])
def test_exactly_the_planted_answers_are_found(write_tokens, planted):
    benchmark = make_benchmark()
    copies = [(100 * item + copy, row(benchmark, item)) for item in planted for copy in (0, 40)]
    assert found_in(write_tokens(make_text(1000, copies)), benchmark) == planted


@pytest.mark.parametrize("chunk_tokens", [1, 7, RUN, 64, 10_000])
def test_an_answer_is_found_wherever_chunks_and_shards_end(write_tokens, monkeypatch, chunk_tokens):
    monkeypatch.setattr(contamination, "CHUNK_TOKENS", chunk_tokens)
    benchmark = make_benchmark()
    wanted = row(benchmark, 1)[CONTEXT + OF_ENDING - RUN : CONTEXT + OF_ENDING]
    for position in [0, 200 - RUN, *range(60, 68)]:
        assert found_in(write_tokens(make_text(200, [(position, wanted)])), benchmark) == [1]


def test_processes_find_what_one_finds(write_tokens, monkeypatch):
    monkeypatch.setattr(contamination, "PROCESS_TOKENS", 1)
    benchmark = make_benchmark()
    # The module of a process has its own TASK_TOKENS: one task for all.
    planted = [(100 * item, row(benchmark, item)) for item in (0, 2, 3)]
    assert found_in(write_tokens(make_text(1000, planted)), benchmark, workers=2) == [0, 2, 3]


@pytest.mark.parametrize("task_tokens", [1, 50, RUN])
def test_an_answer_is_found_wherever_tasks_end(write_tokens, monkeypatch, task_tokens):
    monkeypatch.setattr(contamination, "PROCESS_TOKENS", 1)
    monkeypatch.setattr(contamination, "TASK_TOKENS", task_tokens)
    # Here, where the settings above hold.
    monkeypatch.setattr(contamination, "in_order", lambda function, tasks, _: (function(task) for task in tasks))
    benchmark = make_benchmark()
    for position in range(40, 60):
        text = write_tokens(make_text(120, [(position, row(benchmark, 1))]))
        assert found_in(text, benchmark, workers=2) == [1]


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
    assert found_in(write_tokens(text), benchmark) == []
    assert found_in(write_tokens(make_text(1000, [(500, run)])), benchmark) == [2]


@pytest.mark.parametrize(("context", "ending"), [(10, 3), (7, 6), (12, 1)])
def test_a_short_ending_is_looked_for_with_more_of_its_context(write_tokens, context, ending):
    benchmark = make_benchmark(context, ending)
    text = make_text(300, [(100, row(benchmark, 0)), (200, row(benchmark, 1, ending=0))])
    assert found_in(write_tokens(text), benchmark) == [0]


def test_items_and_texts_too_short_for_a_run_are_passed_over(write_tokens):
    short = make_benchmark(context=RUN - 6, ending=5)
    assert found_in(write_tokens(make_text(300, [(100, row(short, 0))])), short) == []
    benchmark = make_benchmark()
    assert found_in(write_tokens(row(benchmark, 0)[: RUN - 1]), benchmark) == []
