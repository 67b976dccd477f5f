"""Small models on equal computation: budgets kept, bits per byte exact and comparable, the same rows every time."""

import math
from collections import Counter

import numpy as np
import pytest
import regex
import torch

from gpt2.model.config import GPTConfig, ModelShape
from gpt2.model.flops import training_flops_per_token
from gpt2.model.gpt import GPT
from gpt2.pipeline.files import UserError
from gpt2.pipeline.params import build
from gpt2.tokenizer.bpe import train_encodings
from gpt2.tokenizer.encodings import PATTERN
from gpt2.tokenizer_study import runs as vocabulary_runs
from gpt2.tokenizer_study.runs import (
    PARTS,
    VOCABULARY_RUN_COLUMNS,
    VOCABULARY_TABLE_COLUMNS,
    VocabularyRunsConfig,
    VocabularySetting,
    count_steps,
    encode_runs,
    stream_losses,
    thin,
    train_vocabulary_run,
    vocabulary_run_figures,
    vocabulary_table_rows,
)

SECTION = {
    **{"n_layer": 1, "n_head": 2, "n_embd": 8, "block_size": 16, "budgets": [2e8, 4e8], "seeds": [1, 2]},
    **{"max_lr": 1e-2, "min_lr_fraction": 0.1, "warmup_fraction": 0.1, "beta1": 0.9, "beta2": 0.98},
    **{"weight_decay": 0.1, "grad_clip": 1.0, "batch_windows": 4, "micro_batch": 2, "precision": "float32"},
    **{"text_bytes": 50_000, "eval_bytes": 50_000},
}
TRAINING = [value.__doc__ for _, value in sorted(vars(np).items()) if isinstance(value.__doc__, str)][:300]
HELD_OUT = ["A naïve DataFrame\n\n  of arrays: 漢字, 3.14.", "The dataframe isn't an array.", " x"]
GROUPS = {
    "rare": Counter({" naïve": 1}),
    "compound": Counter({" DataFrame": 1, " dataframe": 1}),
    "technical": Counter({" array": 1, " dataframe": 1}),
}
CPU = torch.device("cpu")


def make_config(**changed) -> VocabularyRunsConfig:
    return build(VocabularyRunsConfig, {**SECTION, **changed}, "tiny.vocabulary_runs")


@pytest.fixture(scope="module")
def encodings():
    return train_encodings(TRAINING, [300, 1000])


@pytest.fixture(scope="module")
def texts(encodings):
    return {e.name: encode_runs(TRAINING, HELD_OUT, GROUPS, e, SECTION["block_size"]) for e in encodings}


def test_the_stream_holds_every_document_between_end_of_text_tokens(texts, encodings):
    for encoding in encodings:
        text = texts[encoding.name]
        stream = text.stream.tolist()
        parts = [encoding.encode_ordinary(document) for document in HELD_OUT]
        assert stream == [encoding.eot_token] + [id_ for part in parts for id_ in (*part, encoding.eot_token)]
        assert text.sizes[""] == sum(len(document.encode()) for document in HELD_OUT)
        assert text.marks[""].tolist() == [True] * (len(stream) - 1)


def test_the_tokens_of_a_group_spell_its_words(texts, encodings):
    for encoding in encodings:
        text = texts[encoding.name]
        for group, members in GROUPS.items():
            mark = text.marks[f"{group}_"]
            spelled = encoding.decode(text.stream[1:][mark].tolist())
            expected = "".join(p for d in HELD_OUT for p in regex.findall(PATTERN, d) if p in members)
            assert spelled == expected
            assert text.sizes[f"{group}_"] == len(expected.encode())


def test_training_windows_overlap_by_their_last_target(texts, encodings):
    for encoding in encodings:
        windows = texts[encoding.name].windows
        assert (windows[:-1, -1] == windows[1:, 0]).all() and windows.shape[1] == SECTION["block_size"] + 1
        ids = [encoding.eot_token, *encoding.encode_ordinary(TRAINING[0])][: SECTION["block_size"]]
        assert windows[0, : len(ids)].tolist() == ids


@pytest.mark.parametrize("length", [2, 7, 16, 17, 18, 24, 25, 26, 200])
def test_every_token_is_judged_once_from_at_least_half_a_context(length):
    model = GPT(GPTConfig(n_layer=1, n_head=2, n_embd=8, block_size=16, vocab_size=50, norm="preln"), 1).eval()
    stream = torch.randint(50, (length,), generator=torch.Generator().manual_seed(length))
    losses = stream_losses(model, stream, 3, "float32")
    assert losses.shape == (length - 1,)
    for target in range(1, length):
        # The first window is whole; each later one adds the second half of its targets.
        start = 0 if target <= 16 else (target - 9) // 8 * 8
        assert target <= 16 or target - start > 8
        with torch.no_grad():
            logits = model(stream[None, start:target])[0, -1]
        expected = -torch.log_softmax(logits, 0)[stream[target]]
        assert losses[target - 1].item() == pytest.approx(expected.item(), abs=1e-5)


def test_bits_per_byte_are_all_nats_over_all_bytes(texts, encodings, monkeypatch):
    """A model that knows nothing costs log2(vocabulary) a token, the ends of documents included."""
    monkeypatch.setattr(
        vocabulary_runs, "stream_losses", lambda model, stream, *_: torch.full((len(stream) - 1,), math.log(1000))
    )
    text = texts["bpe_1000"]
    row = train_vocabulary_run(VocabularySetting(2e8, "bpe_1000", 1), make_config(), text, CPU)
    n_bytes = sum(len(document.encode()) for document in HELD_OUT)
    n_tokens = sum(len(encodings[1].encode_ordinary(document)) + 1 for document in HELD_OUT)
    assert row["bits_per_byte"] == pytest.approx(n_tokens * math.log2(1000) / n_bytes)
    rare = len(encodings[1].encode_ordinary(" naïve"))
    assert row["rare_bits_per_byte"] == pytest.approx(rare * math.log2(1000) / len(" naïve".encode()))
    for part in PARTS:
        assert row[f"{part}even_bits_per_byte"] == pytest.approx(row[f"{part}bits_per_byte"])


def test_a_run_keeps_to_its_budget_and_learns(texts):
    config = make_config()
    for name, text in texts.items():
        for budget in config.budgets:
            row = train_vocabulary_run(VocabularySetting(budget, name, 1), config, text, CPU)
            assert list(row) == list(VOCABULARY_RUN_COLUMNS)
            step = training_flops_per_token(ModelShape(n_layer=1, n_head=2, n_embd=8, block_size=16), text.vocab_size)
            step *= 4 * 16
            assert row["flops"] == row["steps"] * step and abs(row["flops"] - budget) <= step / 2
            assert row["tokens"] == row["steps"] * 64
            assert row["epochs"] == pytest.approx(row["tokens"] / text.windows[:, 1:].numel())
            assert row["bytes"] == round(row["tokens"] * text.bytes_per_token)
            assert row["bits_per_byte"] < row["even_bits_per_byte"] and row["diverged"] == 0


def test_the_seed_decides_a_run(texts):
    first, again, other = (
        train_vocabulary_run(VocabularySetting(2e8, "bpe_300", seed), make_config(), texts["bpe_300"], CPU)
        for seed in (1, 1, 2)
    )
    assert first == again and first["bits_per_byte"] != other["bits_per_byte"]


def test_a_run_that_diverges_is_a_result_without_bits(texts):
    config = make_config(max_lr=1e30, seeds=[1])
    row = train_vocabulary_run(VocabularySetting(2e8, "bpe_300", 1), config, texts["bpe_300"], CPU)
    assert row["diverged"] == 1 and row["bits_per_byte"] == math.inf
    table = vocabulary_table_rows([row])
    figures = vocabulary_run_figures(table, texts)
    assert not any("bpe_300" in key for key in figures) and all(math.isfinite(value) for value in figures.values())


def test_the_table_has_means_and_spreads_over_seeds():
    def make(budget: float, name: str, seed: int, bits: float) -> dict:
        values = dict.fromkeys(VOCABULARY_RUN_COLUMNS, 1)
        values |= {"budget": budget, "name": name, "vocab_size": int(name[4:]), "seed": seed, "diverged": 0}
        return values | {f"{part}bits_per_byte": bits for part in PARTS}

    runs = [
        make(budget, name, seed, bits + seed / 10)
        for budget, best in ((1.0, "bpe_300"), (2.0, "bpe_400"))
        for name in ("bpe_300", "bpe_400")
        for seed in (1, 3)
        for bits in (2.0 if name == best else 3.0,)
    ]
    table = vocabulary_table_rows(runs)
    assert all(list(row) == list(VOCABULARY_TABLE_COLUMNS) for row in table) and len(table) == 4
    assert [table[0][f"bits_per_byte{end}"] for end in ("", "_low", "_high")] == pytest.approx([2.2, 2.1, 2.3])
    assert table[0]["seeds"] == 2
    text = vocabulary_runs.RunText(300, 2.0, torch.zeros(1, 2), torch.zeros(2), {}, dict.fromkeys(PARTS, 9))
    figures = vocabulary_run_figures(table, {"bpe_300": text})
    assert (figures["budget_1_best_vocab_size"], figures["budget_2_best_vocab_size"]) == (300, 400)
    assert figures["bpe_300_rare_bits_per_byte"] == pytest.approx(3.2)


def test_thin_takes_documents_from_all_over():
    texts = [str(i % 10) for i in range(100)]
    assert thin(texts, 100) == texts
    assert thin(texts, 50) == texts[::2]
    assert thin(texts, 99) == texts[::2] and thin(texts, 5) == texts[::20]


# Refusals


def test_a_budget_for_no_training_is_refused():
    with pytest.raises(
        UserError, match=r"budgets=1000 pays for 0 steps with a vocabulary of 300, .*raise it to \S+ or"
    ):
        count_steps(1000, make_config(), 300)


@pytest.mark.parametrize(
    ("changed", "rule"),
    [
        ({"budgets": [2e8, 1e8]}, "budgets=.* must be increasing"),
        ({"seeds": [1, 1]}, "seeds=.* without repeats"),
        ({"budgets": []}, "budgets"),
        ({"warmup_fraction": 1.0}, "warmup_fraction"),
        ({"n_head": 3}, "n_embd=8 must be a multiple of n_head=3"),
    ],
)
def test_wrong_settings_are_refused(changed, rule):
    with pytest.raises(UserError, match=rf"tiny\.vocabulary_runs.*{rule}"):
        make_config(**changed)


def test_text_that_fills_no_window_or_lacks_a_group_is_refused(encodings):
    with pytest.raises(UserError, match=r"text_bytes leaves 2 tokens, less than a window"):
        encode_runs(["a"], HELD_OUT, GROUPS, encodings[0], 16)
    with pytest.raises(UserError, match=r"eval_bytes leaves no rare, compound word"):
        encode_runs(TRAINING, HELD_OUT, {**GROUPS, "rare": {}, "compound": {}}, encodings[0], 16)
