"""Items become tokens exactly as the two protocols' own programs make them, and return from disk as they were."""

import re
from dataclasses import replace
from functools import partial

import numpy as np
import pytest

from gpt2.hellaswag.items import ITEM_ARRAYS, PROTOCOLS, Benchmark, load_benchmark, save_benchmark, tokenize_items
from gpt2.pipeline.files import UserError
from gpt2.tokenizer.encodings import load_encoding


def make_item(ind: int, label: str, ctx_a: str, ctx_b: str, endings: list[str]) -> dict:
    contexts = {"ctx_a": ctx_a, "ctx_b": ctx_b, "ctx": f"{ctx_a} {ctx_b}" if ctx_b else ctx_a}
    return {"ind": ind, "activity_label": label, **contexts, "endings": endings, "label": 2}


CANOE = "Two women in a child are shown in a canoe while a man pulls the canoe."
CLEAN = "[header] How to clean [title] Get a brush. [step] It should be stiff [title] Scrub."
ITEMS = [
    make_item(
        *(0, "Canoeing", CANOE, "the Man"),
        ["is calm.", "and the women are paddling, naïvely 🙂.", "sings", "burns down, slowly  but surely."],
    ),
    make_item(
        *(1, "Home and Garden", CLEAN, ""),
        ["[step] Do it  twice.", "Rinse. [substeps] Use soap. [title] Dry.", " leading space", "x"],
    ),
    # What cleaning removes at the end of a context leaves a space, which belongs to the ending.
    make_item(2, "Pets", "Feed the cat. [title]", "", ["now.", "later.", "never.", "[step] twice a day."]),
    make_item(3, "Sports", "He runs and then [step]", "", ["stops.", "falls.", "wins.", "sleeps."]),
]


def clean(text: str) -> str:
    """`preprocess` of lm-evaluation-harness, lm_eval/tasks/hellaswag/utils.py."""
    text = text.strip()
    text = text.replace(" [title]", ". ")
    text = re.sub("\\[.*?\\]", "", text)
    return text.replace("  ", " ")


def harness_row(item: dict, ending: str) -> tuple[list[int], int, int]:
    """The harness's request for one ending: `process_docs`, and `_encode_pair` of lm_eval/api/model.py."""
    encode = load_encoding().encode_ordinary
    context = clean(item["activity_label"] + ": " + (item["ctx_a"] + " " + item["ctx_b"].capitalize()))
    continuation = " " + clean(ending)
    n_spaces = len(context) - len(context.rstrip())
    if n_spaces > 0:
        continuation = context[-n_spaces:] + continuation
        context = context[:-n_spaces]
    whole, context_ids = encode(context + continuation), encode(context)
    return whole, len(whole) - len(context_ids), len(clean(ending))


def completion_row(item: dict, ending: str) -> tuple[list[int], int, int]:
    """`render_example` of build-nanogpt's hellaswag.py."""
    encode = load_encoding().encode_ordinary
    context, ending_ids = encode(item["ctx"]), encode(" " + ending)
    return context + ending_ids, len(ending_ids), len(ending)


REFERENCES = {"completion": completion_row, "harness": harness_row}


@pytest.fixture
def benchmark():
    return tokenize_items(ITEMS, load_encoding())


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_rows_are_those_of_the_protocols_own_program(protocol, benchmark):
    rows = benchmark.protocols[protocol]
    assert benchmark.labels.tolist() == [2, 2, 2, 2]
    assert len(rows.offsets) == 4 * len(ITEMS) + 1
    expected = [REFERENCES[protocol](item, ending) for item in ITEMS for ending in item["endings"]]
    for row, (ids, n_tokens, n_chars) in enumerate(expected):
        found = rows.tokens[rows.offsets[row] : rows.offsets[row + 1]].tolist()
        assert (found, rows.ending_tokens[row], rows.ending_chars[row]) == (ids, n_tokens, n_chars)


def assert_equal(found: Benchmark, expected: Benchmark) -> None:
    def equal(one: np.ndarray, other: np.ndarray) -> bool:
        return one.dtype == other.dtype and np.array_equal(one, other)

    assert all(equal(getattr(found, name), getattr(expected, name)) for name in ITEM_ARRAYS)
    assert found.protocols.keys() == expected.protocols.keys()
    for name, rows in expected.protocols.items():
        assert all(equal(array, vars(rows)[field]) for field, array in vars(found.protocols[name]).items())


def test_items_of_one_source_are_of_one_document_and_others_of_their_own():
    sources = ["wikihow~9", None, "activitynet~a", "wikihow~9", None]
    items = [{**ITEMS[0], **({"source_id": source} if source else {})} for source in sources]
    benchmark = tokenize_items(items, load_encoding())
    assert benchmark.documents.tolist() == [0, 1, 2, 0, 3]
    assert benchmark.in_training.tolist() == [False] * 5


def test_a_benchmark_returns_as_it_was(tmp_path, benchmark):
    flagged = replace(benchmark, documents=np.array([0, 1, 0, 2]), in_training=np.array([True, False, False, True]))
    save_benchmark(flagged, tmp_path / "items.npz")
    assert_equal(load_benchmark(tmp_path / "items.npz"), flagged)


def test_the_same_items_give_the_same_bytes(tmp_path, benchmark):
    for name in ("one.npz", "two.npz"):
        save_benchmark(benchmark, tmp_path / name)
    assert (tmp_path / "one.npz").read_bytes() == (tmp_path / "two.npz").read_bytes()


@pytest.mark.parametrize("n", [1, 3, 4, 99])
def test_the_first_items_are_those_of_a_shorter_list(benchmark, n):
    assert_equal(benchmark.first(n), tokenize_items(ITEMS[:n], load_encoding()))


def cut(content: bytes, kept: int) -> bytes:
    return content[:kept]


def flip(content: bytes) -> bytes:
    """One other byte within the tokens of the protocol harness."""
    tokens = tokenize_items(ITEMS, load_encoding()).protocols["harness"].tokens.tobytes()
    place = content.index(tokens) + 7
    return content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]


@pytest.mark.parametrize(
    "damage",
    [*(partial(cut, kept=kept) for kept in (0, 3, 50, -5)), flip],
    ids=["empty", "stub", "head", "end", "byte"],
)
def test_a_damaged_file_is_refused(tmp_path, benchmark, damage):
    path = tmp_path / "items.npz"
    save_benchmark(benchmark, path)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(UserError, match=r"items\.npz .*dvc repro -f tokenize"):
        load_benchmark(path)


def test_an_absent_or_incomplete_file_is_refused(tmp_path, benchmark):
    with pytest.raises(UserError, match=r"items\.npz .*dvc repro -f tokenize"):
        load_benchmark(tmp_path / "items.npz")
    np.savez(tmp_path / "items.npz", labels=benchmark.labels)
    with pytest.raises(UserError, match="completion_tokens"):
        load_benchmark(tmp_path / "items.npz")
