"""Scores equal those of one ending at a time, however rows are batched, cut or shared among processes."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from gpt2.hellaswag.items import ACCURACIES, PROTOCOLS, TokenizedItems, tokenize_items
from gpt2.hellaswag.scoring import (
    accuracy,
    cut_items,
    evaluate_benchmark,
    lay_out,
    predictions,
    score_model,
    score_rows,
)
from gpt2.model.config import GPTConfig
from gpt2.model.dist import Dist
from gpt2.model.gpt import GPT
from gpt2.pipeline.files import UserError
from gpt2.tokenizer.encodings import load_encoding
from tests.analysed import BLOCK_SIZE, VOCAB_SIZE, make_benchmark, make_model
from tests.hellaswag.test_items import make_item

N_ITEMS = 7
# Enough for random scores to come close to ties.
N_MANY = 1000


def make_rows(lengths: list[int], ending_tokens: list[int], seed: int = 0) -> TokenizedItems:
    """Rows of random ids below VOCAB_SIZE; an ending has three characters a token, and one more in every other row."""
    tokens = np.random.default_rng(seed).integers(0, VOCAB_SIZE, sum(lengths)).astype(np.uint16)
    chars = 3 * np.array(ending_tokens) + np.arange(len(lengths)) % 2
    return TokenizedItems(tokens, np.cumsum([0, *lengths]), np.array(ending_tokens), chars)


def share(rows: TokenizedItems, shared: list[int]) -> TokenizedItems:
    """The rows after copying the first shared[i] tokens of each item's first row into its other rows."""
    tokens = rows.tokens.copy()
    for item, count in enumerate(shared):
        first, *others = rows.offsets[4 * item : 4 * item + 4]
        for other in others:
            tokens[other : other + count] = tokens[first : first + count]
    return TokenizedItems(tokens, rows.offsets, rows.ending_tokens, rows.ending_chars)


@pytest.fixture
def rows() -> TokenizedItems:
    """Rows of many lengths that share nothing; a quarter of them are longer than the context."""
    rng = np.random.default_rng(1)
    endings = rng.integers(1, 8, 4 * N_ITEMS)
    lengths = endings + rng.integers(1, BLOCK_SIZE + 8, 4 * N_ITEMS)
    lengths[3] = BLOCK_SIZE + 1
    lengths[4] = BLOCK_SIZE + 2
    assert 4 < (lengths > BLOCK_SIZE + 1).sum() < 2 * N_ITEMS
    return make_rows(lengths.tolist(), endings.tolist())


@torch.no_grad()
def score_one_by_one(model: GPT, rows: TokenizedItems) -> np.ndarray:
    """The plain reading of both protocols: one row a pass, all logits, the last tokens that fit."""
    scores = []
    for row, n_ending in enumerate(rows.ending_tokens):
        ids = rows.tokens[rows.offsets[row] : rows.offsets[row + 1]].tolist()[-(model.config.block_size + 1) :]
        log_probabilities = model(torch.tensor([ids[:-1]]))[0].double().log_softmax(-1)
        picked = [log_probabilities[t, ids[t + 1]].item() for t in range(len(ids) - 1)]
        scores.append(sum(picked[-n_ending:]))
    return np.array(scores).reshape(-1, 4)


@pytest.mark.parametrize("norm", ["preln", "postln"])
@pytest.mark.parametrize("batch_tokens", [1, 60, 10_000])
def test_scores_equal_those_of_one_row_at_a_time(rows, norm, batch_tokens):
    model = make_model(norm)
    found = score_rows(model, rows, batch_tokens)
    assert (found.shape, found.dtype) == ((N_ITEMS, 4), np.float64)
    # Sums of up to seven fp32 losses of order five.
    np.testing.assert_allclose(found, score_one_by_one(model, rows), rtol=0, atol=2e-5)


@pytest.mark.parametrize("norm", ["preln", "postln", "deepnorm"])
@pytest.mark.parametrize("batch_tokens", [1, 100, 10_000])
def test_rows_that_begin_alike_are_scored_as_if_alone(norm, batch_tokens):
    model = make_model(norm)
    # In turn: nothing shared, the context, the context and part of the endings, a whole row, four equal rows.
    lengths = [9, 12, 10, 11, 20, 14, 25, 16, 15, 18, 16, 24, 10, 12, 14, 16, 17, 17, 17, 17]
    endings = [3, 6, 4, 5, 8, 2, 13, 4, 5, 8, 6, 14, 2, 4, 6, 8, 9, 9, 9, 9]
    rows = share(make_rows(lengths, endings), [0, 12, 13, 10, 17])
    expected = score_one_by_one(model, rows)
    np.testing.assert_allclose(score_rows(model, rows, batch_tokens), expected, rtol=0, atol=2e-5)
    assert np.ptp(expected[-1]) == 0 < np.ptp(expected[:-1], axis=1).min()


def test_what_the_rows_of_an_item_share_is_read_once(monkeypatch):
    model = make_model()
    read = []
    hidden = model.hidden
    monkeypatch.setattr(model, "hidden", lambda idx, *given: read.append(idx.shape) or hidden(idx, *given))
    score_rows(model, share(make_rows([21] * 8, [5] * 8), [16, 16]), 1000)
    # Of each item the 16 tokens of the context and four times the first four of five.
    assert read == [(2, 16 + 4 * 4)]


def test_the_layout_of_the_example_is_the_drawn_one():
    a, b, c, d, e, f, g, h, i = range(1, 10)
    tokens = np.array([*(a, b, c, d), *(a, b, c, e), *(a, b, f), *(a, b, g, h, i)], dtype=np.uint16)
    rows = TokenizedItems(tokens, np.array([0, 4, 8, 11, 16]), np.array([2, 2, 1, 3]), np.zeros(4))
    layout = lay_out(cut_items(rows, BLOCK_SIZE))
    assert layout.idx.tolist() == [[a, b, c, c, g, h, 0, 0]]
    assert layout.position.tolist() == [[0, 1, 2, 2, 2, 3, 0, 0]]
    assert layout.part.tolist() == [[0, 0, 1, 2, 4, 4, -1, -1]]
    assert layout.row.tolist() == [0, 0, 1, 1, 2, 3, 3, 3]
    assert layout.cell.tolist() == [1, 2, 1, 3, 1, 1, 4, 5]
    assert layout.target.tolist() == [c, d, c, e, f, g, h, i]


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_text_is_scored_as_by_hand_under_each_protocol(protocol):
    shape = {"n_layer": 1, "n_head": 2, "n_embd": 16, "block_size": 16, "vocab_size": 50257}
    model = GPT(GPTConfig(**shape, norm="preln"), seed=1).eval()
    with torch.no_grad():
        model.wte.weight *= 50
    contexts = ["The wind turns. " * i + "[step] The sail" for i in range(4)]
    endings = ["tears.", "fills again and pulls.", "[title] falls", "is taken in by the crew"]
    items = [{**make_item(i, "Sailing", contexts[i], "then", endings), "label": i} for i in range(4)]
    benchmark = tokenize_items(items, load_encoding())
    rows = benchmark.protocols[protocol]
    expected = score_one_by_one(model, rows)
    np.testing.assert_allclose(score_rows(model, rows, 64), expected, rtol=1e-5)
    figures, columns = evaluate_benchmark(model, benchmark, protocol, 64)
    length = {"completion": rows.ending_tokens, "harness": rows.ending_chars}[protocol].reshape(4, 4)
    chosen = {"acc": expected.argmax(1), "acc_norm": (expected / length).argmax(1)}
    assert {kind: columns[f"{protocol}_{kind}"] for kind in chosen} == {k: v.tolist() for k, v in chosen.items()}
    logprobs = np.transpose([columns[f"{protocol}_logprob_{ending}"] for ending in range(4)])
    np.testing.assert_allclose(logprobs, expected, rtol=1e-5)
    right = {kind: (choice == np.arange(4)).mean() for kind, choice in chosen.items()}
    assert (figures[f"{protocol}_acc"], figures[f"{protocol}_acc_norm"]) == (right["acc"], right["acc_norm"])
    assert figures.keys() == {f"{protocol}_{kind}{end}" for kind in right for end in ("", "_stderr")}


def assert_scored_alike(rows: TokenizedItems, scores: np.ndarray, expected: np.ndarray) -> None:
    """The same scores but for rounding, and the same choices."""
    np.testing.assert_allclose(scores, expected, rtol=0, atol=2e-5)
    for protocol in PROTOCOLS:
        found, wanted = (predictions(protocol, of, rows) for of in (scores, expected))
        assert all((found[kind] == wanted[kind]).all() for kind in wanted)


class Process(Dist):
    """One of several processes that are run one after another: its sums are its own part."""

    def sum(self, tensor):
        return tensor


@pytest.mark.parametrize("world_size", [1, 2, 5, 40])
def test_parts_of_all_processes_add_up_to_the_whole(rows, world_size):
    processes = [Process(rank, rank, world_size, torch.device("cpu")) for rank in range(world_size)]
    parts = [score_rows(make_model(), rows, 60, process) for process in processes]
    # Each row is scored by one process; batches of other rows round differently.
    assert (sum((part != 0).astype(int) for part in parts) == 1).all()
    assert_scored_alike(rows, sum(parts), score_rows(make_model(), rows, 60))


@pytest.fixture(scope="module")
def many() -> tuple[TokenizedItems, np.ndarray]:
    """Items with a shared context each, and their scores."""
    rng = np.random.default_rng(2)
    context = rng.integers(1, 5, N_MANY)
    endings = rng.integers(1, 4, 4 * N_MANY)
    rows = share(make_rows((np.repeat(context, 4) + endings).tolist(), endings.tolist()), context.tolist())
    return rows, score_rows(make_model(), rows, 4096)


@pytest.mark.parametrize("batch_tokens", [1, 64 * 16])
def test_items_alone_or_64_at_a_time_are_scored_alike(many, batch_tokens):
    rows, expected = many
    assert_scored_alike(rows, score_rows(make_model(), rows, batch_tokens), expected)


def test_the_order_of_the_items_changes_nothing(many):
    rows, expected = many
    backwards = np.arange(4 * N_MANY).reshape(N_MANY, 4)[::-1].ravel()
    pieces = np.split(rows.tokens, rows.offsets[1:-1])
    turned = TokenizedItems(
        np.concatenate([pieces[row] for row in backwards]),
        np.cumsum([0, *(len(pieces[row]) for row in backwards)]),
        rows.ending_tokens[backwards],
        rows.ending_chars[backwards],
    )
    assert_scored_alike(rows, score_rows(make_model(), turned, 4096)[::-1], expected)


def test_a_context_too_long_loses_tokens_on_the_left():
    model = make_model()
    long = make_rows([BLOCK_SIZE + 9] * 4, [5] * 4)
    kept = np.concatenate([row[-(BLOCK_SIZE + 1) :] for row in long.tokens.reshape(4, -1)])
    short = TokenizedItems(kept, np.arange(5) * (BLOCK_SIZE + 1), long.ending_tokens, long.ending_chars)
    assert (score_rows(model, long, 100) == score_rows(model, short, 100)).all()


def test_the_longest_ending_leaves_one_token_of_context():
    model = make_model()
    rows = make_rows([BLOCK_SIZE + 5] * 4, [BLOCK_SIZE] * 4)
    np.testing.assert_allclose(score_rows(model, rows, 100), score_one_by_one(model, rows), rtol=1e-6)


@pytest.mark.parametrize(("length", "n_ending"), [(BLOCK_SIZE + 5, BLOCK_SIZE + 1), (6, 6)])
def test_an_ending_that_leaves_no_context_is_refused_with_its_item(length, n_ending):
    rows = make_rows([10] * 6 + [length] + [10], [3] * 6 + [n_ending] + [3])
    with pytest.raises(UserError, match=rf"hellaswag\.jsonl, line 2: ending 2 .*{n_ending}.*block_size={BLOCK_SIZE}"):
        score_rows(make_model(), rows, 100)


def test_normalisation_is_by_tokens_or_by_characters():
    rows = TokenizedItems(np.zeros(0), np.zeros(0), np.array([1, 2, 4, 4]), np.array([9, 6, 10, 40]))
    scores = np.array([[-5.0, -6.0, -8.0, -18.0]])
    # By token -5, -3, -2, -4.5; by character -0.56, -1, -0.8, -0.45.
    assert {name: found.tolist() for name, found in predictions("completion", scores, rows).items()} == {
        **{"acc": [0], "acc_norm": [2]}
    }
    assert predictions("harness", scores, rows)["acc_norm"].tolist() == [3]
    assert predictions("harness", scores, rows)["acc"].tolist() == [0]


def test_the_standard_error_is_clustered_by_document():
    rng = np.random.default_rng(3)
    right, documents = rng.random(50) < 0.3, 5 * rng.integers(0, 9, 50)
    p, error = accuracy(right, documents)
    # Miller 2024: the covariances of all pairs of items of one document.
    pairs = [(right[i] - p) * (right[j] - p) for i in range(50) for j in range(50) if documents[i] == documents[j]]
    assert (p, error) == pytest.approx((right.mean(), math.sqrt(sum(pairs)) / 50))
    # Items of their own documents: the standard error of a mean.
    p, single = accuracy(right, np.arange(50)[::-1])
    assert single == pytest.approx(math.sqrt(p * (1 - p) / 49)) == pytest.approx(np.std(right, ddof=1) / math.sqrt(50))
    # Four copies of an item say as much as one, and n - 1 becomes n.
    _, error = accuracy(np.repeat(right, 4), np.repeat(np.arange(50), 4))
    assert error == pytest.approx(single * math.sqrt(49 / 50))
    assert accuracy(right[:1], np.zeros(1)) == (right[0], 0.0)


def test_items_in_training_documents_are_scored_apart():
    model, n = make_model(), 40
    documents, in_training = np.arange(n) // 3, np.arange(n) % 4 == 1
    benchmark = replace(make_benchmark(n), documents=documents, in_training=in_training)
    figures, columns = score_model(model, benchmark, 200)
    assert (figures["items"], figures["documents"], figures["clean_items"]) == (n, 14, 30)
    assert figures.keys() == {"items", "documents", "clean_items"} | {
        f"{name}{clean}{stderr}" for name in ACCURACIES for clean in ("", "_clean") for stderr in ("", "_stderr")
    }
    assert (columns["item"], columns["label"]) == (list(range(n)), benchmark.labels.tolist())
    assert (columns["document"], columns["in_training"]) == (documents.tolist(), in_training.tolist())
    for protocol in PROTOCOLS:
        measured, of_items = evaluate_benchmark(model, benchmark, protocol, 200)
        assert {key: figures[key] for key in measured} == measured
        assert {key: columns[key] for key in of_items} == of_items
    for name in ACCURACIES:
        right = np.array(columns[name]) == benchmark.labels
        assert (figures[name], figures[f"{name}_stderr"]) == accuracy(right, documents)
        expected = accuracy(right[~in_training], documents[~in_training])
        assert (figures[f"{name}_clean"], figures[f"{name}_clean_stderr"]) == expected


def test_a_benchmark_of_training_documents_alone_has_no_clean_accuracy():
    benchmark = replace(make_benchmark(10), in_training=np.ones(10, dtype=bool))
    figures, _ = score_model(make_model(), benchmark, 200)
    assert figures["clean_items"] == 0 and not [key for key in figures if "_clean" in key]
