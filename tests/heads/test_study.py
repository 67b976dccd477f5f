"""The study of one model and the stage that writes it."""

import numpy as np
import pandas as pd
import pytest

from gpt2.data.shards import TokenSet
from gpt2.data.windows import spread_windows
from gpt2.heads.similarity import Head, HeadsConfig
from gpt2.heads.study import compare_with_nulls, study_heads, summarise_heads
from gpt2.model.config import GPTConfig
from gpt2.model.gpt import GPT
from gpt2.pipeline.files import UserError, read_json
from stages import head_similarity
from tests.analysed import BLOCK_SIZE, SECTIONS, make_model, prepare_folder, read_outputs, slice_head

CONFIG = HeadsConfig(**SECTIONS["heads"])


@pytest.fixture
def tokens(tmp_path, monkeypatch) -> TokenSet:
    monkeypatch.chdir(tmp_path)
    prepare_folder(tmp_path, make_model())
    return TokenSet(tmp_path / "data" / "tokens", "val")


def test_studies_the_windows_of_the_tokens(tokens):
    model = make_model()
    study = study_heads(model, tokens, CONFIG)
    idx = spread_windows(tokens, BLOCK_SIZE, CONFIG.n_tokens)[:, :-1]
    matrices = compare_with_nulls(model, idx, CONFIG)
    tables, figures = summarise_heads(model.config, matrices, CONFIG)
    assert study.figures == {**figures, "tokens": 200 // BLOCK_SIZE * BLOCK_SIZE}
    assert set(study.matrices) == set(matrices)
    for name, table in study.tables.items():
        pd.testing.assert_frame_equal(table, tables[name])
    assert list(study.tables["matrix"])[:2] == ["head", "l0h0"]
    np.testing.assert_allclose(study.tables["matrix"].set_index("head"), matrices["pattern"], rtol=0, atol=1e-6)


def test_heads_with_the_uniform_pattern_are_counted(tokens):
    model = make_model()
    assert study_heads(model, tokens, CONFIG).figures["uniform_heads_percent"] == 0
    for index in (0, 2, 3):
        rows, biases, _ = slice_head(model, Head(1, index))
        rows[0], biases[0] = 0, 0
    figures = study_heads(model, tokens, CONFIG).figures
    assert (figures["uniform_heads_percent"], figures["untrained_uniform_heads_percent"]) == (25, 100)


def test_an_untrained_model_is_no_more_alike_than_its_null_when_centred(tokens):
    figures = study_heads(GPT(make_model().config, seed=1), tokens, CONFIG).figures
    # Every pair is redundant by raw cosines, in the null model too.
    assert figures["redundant_pairs"] == figures["untrained_redundant_pairs"] == figures["same_layer_pairs"]
    assert abs(figures["mean_centred_similarity"] - figures["untrained_mean_centred_similarity"]) < 0.2


def test_refuses_tokens_of_another_vocabulary(tokens):
    shape = GPTConfig(**{**make_model().config.model_dump(), "vocab_size": 50})
    with pytest.raises(UserError, match="vocab_size=50"):
        study_heads(GPT(shape), tokens, CONFIG)


def test_stage_is_reproducible_bit_for_bit(tokens, tmp_path):
    head_similarity.main()
    first = read_outputs(tmp_path)
    head_similarity.main()
    assert read_outputs(tmp_path) == first
    figures = read_json(tmp_path / "metrics" / "heads.json")
    assert (figures["heads"], figures["threshold"]) == (12, 0.85)
    tables = {path.stem: pd.read_csv(path) for path in (tmp_path / "plots/head_similarity").iterdir()}
    assert {name: len(table) for name, table in tables.items()} == {"matrix": 12, "layers": 3, "pairs": 18}
    assert (np.diagonal(tables["matrix"].set_index("head")) == 1).all()


def test_stage_refuses_too_few_tokens(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    prepare_folder(tmp_path, make_model(), heads={"n_tokens": 10_000})
    with pytest.raises(SystemExit, match=r"head-similarity: data/tokens/val has 500 tokens, 20 windows of 24; 10000 "):
        head_similarity.main()
    assert not (tmp_path / "metrics" / "heads.json").exists()
