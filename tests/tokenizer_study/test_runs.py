"""Small models on equal computation: budgets kept, runs paired by seed, rates chosen on validation, tables and fits."""

import math
from collections import Counter

import numpy as np
import pandas as pd
import pytest
import torch

from gpt2.model.config import ModelShape
from gpt2.model.flops import training_flops_per_token
from gpt2.pipeline.files import UserError
from gpt2.pipeline.hardware import HardwareConfig
from gpt2.pipeline.params import build
from gpt2.tokenizer.bpe import train_encodings
from gpt2.tokenizer_study import runs as vocabulary_runs
from gpt2.tokenizer_study.held_out import encode_held_out
from gpt2.tokenizer_study.runs import (
    EVEN,
    PARTS,
    RunText,
    VocabularyRun,
    VocabularyRunsConfig,
    VocabularySetting,
    best_log_size,
    bootstrap_ratio,
    count_steps,
    encode_runs,
    fit_best_size,
    paired_windows,
    run_vocabularies,
    thin,
    train_vocabulary_run,
    vocabulary_run_figures,
    vocabulary_table,
)
from tests.settings import HARDWARE

SECTION = {
    **{"n_layer": 1, "n_head": 2, "n_embd": 8, "block_size": 16, "budgets": [2e8, 4e8], "seeds": [1, 2, 3]},
    **{"max_lrs": [1e-3, 1e-2], "search_seeds": 2, "min_lr_fraction": 0.1, "warmup_fraction": 0.1},
    **{"beta1": 0.9, "beta2": 0.98, "weight_decay": 0.1, "grad_clip": 1.0, "batch_windows": 4, "micro_batch": 2},
    **{"precision": "float32", "text_bytes": 50_000, "eval_bytes": 50_000},
}
TRAINING = [value.__doc__ for _, value in sorted(vars(np).items()) if isinstance(value.__doc__, str)][:300]
VALIDATION, TEST = TRAINING[:2], ["A naïve DataFrame of arrays.", "The dataframe isn't an array, naïve as it is."]
GROUPS = {
    "rare": Counter({" naïve": 2}),
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
def texts(encodings) -> dict[str, RunText]:
    return {e.name: encode_runs((TRAINING, VALIDATION, TEST), GROUPS, e, make_config()) for e in encodings}


def make_run(budget: float, name: str, seed: int, bits: float, **changed) -> VocabularyRun:
    """A run of which each part of the text has `bits` per byte, with rare words in two documents."""
    row = {"budget": budget, "name": name, "vocab_size": int(name[4:]), "max_lr": 1e-2, "seed": seed, "chosen": 1}
    row |= dict.fromkeys(("steps", "tokens", "bytes", "val_bits_per_byte"), 1) | {"diverged": 0}
    row |= dict.fromkeys((f"{part}bits_per_byte" for part in PARTS), bits) | dict.fromkeys(EVEN, 9.0)
    return VocabularyRun(
        row | changed, pd.DataFrame({"bits": [10 * bits, 20 * bits], "even": [24.0, 48.0], "bytes": [10, 20]})
    )


# Runs


def test_runs_of_a_seed_begin_each_window_at_the_same_place_in_every_vocabulary(encodings):
    # Every place is found by its text.
    documents = [" ".join(f"word{i}x{j}" for j in range(60)) for i in range(100)]
    whole, starts = "".join(documents), []
    for encoding in encodings:
        text = encode_runs((documents, VALIDATION, TEST), GROUPS, encoding, make_config())
        windows = [encoding.decode(window) for window in paired_windows(text, 80, 16, seed=3).tolist()]
        starts.append([whole.index(window.replace("<|endoftext|>", "")) for window in windows])
    small, large = np.array(starts)
    assert np.abs(small - large).max() < 20 and np.ptp(small) > len(whole) / 2
    # A longer run of the seed goes on where the shorter one ends, another seed has another order.
    assert (paired_windows(text, 50, 16, 3) == paired_windows(text, 90, 16, 3)[:50]).all()
    assert (paired_windows(text, 50, 16, 3) != paired_windows(text, 50, 16, 4)).any()


def test_a_run_keeps_to_its_budget_and_learns(texts):
    config = make_config()
    for name, text in texts.items():
        for budget in config.budgets:
            row = train_vocabulary_run(VocabularySetting(budget, name, 1e-2, 1), config, text, CPU).row
            step = training_flops_per_token(ModelShape(n_layer=1, n_head=2, n_embd=8, block_size=16), text.vocab_size)
            step *= 4 * 16
            assert row["flops"] == row["steps"] * step and abs(row["flops"] - budget) <= step / 2
            assert row["tokens"] == row["steps"] * 64
            assert row["epochs"] == pytest.approx(row["tokens"] / len(text.ids))
            assert row["bytes"] == pytest.approx(row["epochs"] * sum(len(t.encode()) for t in TRAINING), abs=1)
            assert row["bits_per_byte"] < row["even_bits_per_byte"] and row["diverged"] == 0


def test_the_seed_decides_a_run(texts):
    first, again, other = (
        train_vocabulary_run(VocabularySetting(2e8, "bpe_300", 1e-2, seed), make_config(), texts["bpe_300"], CPU).row
        for seed in (1, 1, 2)
    )
    assert first == again and first["bits_per_byte"] != other["bits_per_byte"]


def test_a_run_that_diverges_is_a_result_without_bits(texts):
    config = make_config(max_lrs=[1e30], seeds=[1], search_seeds=1, budgets=[2e8])
    runs = run_vocabularies(config, texts, build(HardwareConfig, HARDWARE, "hardware"))
    assert all(run.row["diverged"] == 1 and run.row["bits_per_byte"] == math.inf for run in runs)
    table = vocabulary_table(runs)
    assert table["rare_below_even"].tolist() == [0, 0]
    figures = vocabulary_run_figures(runs, table, texts)
    assert not any("bpe_300" in key or "runs_best" in key for key in figures)
    assert all(math.isfinite(value) for value in figures.values())


def test_the_rate_is_the_best_on_validation_and_judged_on_test(texts, monkeypatch):
    """Rates whose order on test is the opposite of that on validation, and noise between the seeds of the search."""
    best = {(2e8, "bpe_300"): 1e-3, (2e8, "bpe_1000"): 1e-2, (4e8, "bpe_300"): 1e-2, (4e8, "bpe_1000"): 1e-2}

    def train(setting: VocabularySetting, *_) -> VocabularyRun:
        chosen = best[setting.budget, setting.name] == setting.max_lr
        noise = 0.5 if setting.seed == (1 if chosen else 2) else 0.0  # Of one seed, less than the difference of means.
        values = {"max_lr": setting.max_lr, "chosen": 0, "val_bits_per_byte": (2.0 if chosen else 2.3) + noise}
        return make_run(setting.budget, setting.name, setting.seed, 4.0 if chosen else 3.0, **values)

    monkeypatch.setattr(vocabulary_runs, "train_vocabulary_run", train)
    runs = run_vocabularies(make_config(), texts, build(HardwareConfig, HARDWARE, "hardware"))
    order = [(budget, name) for budget in (2e8, 4e8) for name in texts]
    assert list(dict.fromkeys((run.row["budget"], run.row["name"]) for run in runs)) == order
    for key in order:
        rows = [run.row for run in runs if (run.row["budget"], run.row["name"]) == key]
        assert sorted(row["seed"] for row in rows if row["chosen"]) == [1, 2, 3]
        assert {row["max_lr"] for row in rows if row["chosen"]} == {best[key]}
        # The other rate is run with the seeds of the search alone.
        assert sorted(row["seed"] for row in rows if not row["chosen"]) == [1, 2]
    table = vocabulary_table(runs)
    assert table["bits_per_byte"].tolist() == [4.0] * 4 and table["seeds"].tolist() == [3] * 4
    assert table["max_lr"].tolist() == [best[key] for key in order]


# Tables and fits


def test_the_table_has_means_and_spreads_over_seeds_and_intervals_over_documents():
    runs = [
        make_run(budget, name, seed, (2.0 if name == best else 3.0) + seed / 10)
        for budget, best in ((1.0, "bpe_400"), (2.0, "bpe_300"))
        for name in ("bpe_400", "bpe_300")
        for seed in (1, 3)
    ]
    runs[0].rare["bits"] += [3.0, 0.0]
    table = vocabulary_table([*runs, make_run(2.0, "bpe_300", 5, 99, chosen=0)])
    assert table["name"].tolist() == ["bpe_400", "bpe_300"] * 2 and table["seeds"].tolist() == [2] * 4
    assert table.loc[0, ["bits_per_byte", "bits_per_byte_low", "bits_per_byte_high"]].tolist() == [2.2, 2.1, 2.3]
    # Mean bits over seeds of the first: 23.5 of 10 bytes and 44 of 20; of the others, alike in both documents.
    first = table.loc[0]
    assert first["rare_bits_per_byte_ci_low"] == pytest.approx(2.2)
    assert first["rare_bits_per_byte_ci_high"] == pytest.approx(2.35)
    # Alike costs 2.4 bits: above 2.2, the upper end 2.35 included, and below 3.2.
    assert table["rare_below_even"].tolist() == [1, 0, 0, 1]
    held_out = encode_held_out(TEST, GROUPS, train_encodings(TRAINING, [300])[0])
    text = RunText(300, np.zeros(1), np.zeros(1), np.zeros(1), held_out, held_out)
    figures = vocabulary_run_figures(runs, table, {"bpe_300": text})
    assert (figures["budget_1_best_vocab_size"], figures["budget_2_best_vocab_size"]) == (400, 300)
    assert figures["bpe_300_rare_bits_per_byte"] == pytest.approx(2.2)
    assert figures["runs_eval_bytes"] == sum(len(t.encode()) for t in TEST) and figures["runs_rare_bytes"] == 14


def test_the_interval_of_a_ratio_has_its_coverage():
    rng = np.random.default_rng(1)
    covered = 0
    for _ in range(200):
        n_bytes = rng.integers(5, 50, 40).astype(float)
        low, high = bootstrap_ratio(n_bytes * rng.normal(3.0, 1.0, 40), n_bytes)
        covered += low < 3.0 < high
    assert 176 <= covered <= 198
    assert bootstrap_ratio(np.ones(1), np.ones(1)) == (-math.inf, math.inf)


def test_the_optimum_of_an_exact_parabola_is_recovered():
    sizes = [1024, 2048, 4096, 8192, 16384, 32768]
    x = np.log2(sizes)
    assert best_log_size(list(x), list(0.3 * (x - 12.3) ** 2 + 2)) == pytest.approx(12.3)
    # A minimum outside, none, and a line through two points end at an end.
    assert best_log_size(list(x), list(0.3 * (x - 17) ** 2)) == 15
    assert best_log_size(list(x), list(-((x - 12) ** 2))) == 15
    assert best_log_size([10, 15], [2, 3]) == 10

    def fit(centres: list[float]) -> dict[str, int]:
        rows = [
            {"seed": seed, "vocab_size": size, "bits_per_byte": (math.log2(size) - centre) ** 2}
            for seed, centre in enumerate(centres)
            for size in sizes
        ]
        return fit_best_size(pd.DataFrame(rows))

    # Mean 12, standard error 1 / sqrt(3), t of 2 degrees of freedom 4.303.
    half = 4.302653 / math.sqrt(3)
    assert fit([11, 12, 13]) == {
        "runs_best_vocab_size": 4096,
        "runs_best_vocab_size_low": max(1024, round(2 ** (12 - half))),
        "runs_best_vocab_size_high": round(2 ** (12 + half)),
        "runs_best_at_edge": 0,
    }
    assert list(fit([12, 12]).values()) == [4096, 4096, 4096, 0]
    assert list(fit([12]).values()) == [4096, 1024, 32768, 0]
    assert list(fit([20, 20.5]).values()) == [32768, 32768, 32768, 1]


def test_thin_takes_documents_from_all_over():
    texts = [str(i % 10) for i in range(100)]
    assert thin(texts, 100) == texts
    assert thin(texts, 50) == texts[::2]
    assert thin(texts, 99) == texts[::2] and thin(texts, 5) == texts[::20]


# Refusals


@pytest.mark.parametrize(
    ("changed", "rule"),
    [
        ({"budgets": [2e8, 1e8]}, "budgets=.* must be increasing"),
        ({"seeds": [1, 1]}, "seeds=.* without repeats"),
        ({"max_lrs": [1e-2, 1e-3]}, "max_lrs=.* must be increasing"),
        ({"search_seeds": 4}, "search_seeds=4 must be at most the 3 seeds"),
        ({"budgets": []}, "budgets"),
        ({"warmup_fraction": 1.0}, "warmup_fraction"),
        ({"n_head": 3}, "n_embd=8 must be a multiple of n_head=3"),
    ],
)
def test_wrong_settings_are_refused(changed, rule):
    with pytest.raises(UserError, match=rf"tiny\.vocabulary_runs.*{rule}"):
        make_config(**changed)


def test_too_little_computation_or_text_is_refused(encodings):
    with pytest.raises(
        UserError, match=r"budgets=1000 pays for 0 steps with a vocabulary of 300, .*raise it to \S+ or"
    ):
        count_steps(1000, make_config(), 300)
    with pytest.raises(UserError, match=r"text_bytes leaves 2 tokens, less than a window"):
        encode_runs((["a"], VALIDATION, TEST), GROUPS, encodings[0], make_config())
    groups = {**GROUPS, "rare": {}, "compound": {}}
    with pytest.raises(UserError, match=r"eval_bytes leaves no rare, compound word"):
        encode_runs((TRAINING, VALIDATION, TEST), groups, encodings[0], make_config())
