"""Scores of the protocol `harness` equal those of lm-evaluation-harness on the exported model, item by item."""

import json
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
import pytest
import torch

from gpt2.export import export_model
from gpt2.model.config import GPTConfig
from gpt2.model.gpt import GPT
from gpt2.model.weights import save_model
from gpt2.tokenizer.encodings import load_encoding
from tests.hellaswag.test_items import ITEMS, make_item
from tools.harness import RELATIVE_TOLERANCE, main, score_by_harness, score_here

WORDS = " ".join(topics.values()).split()
N_ITEMS = 40


def cut_items() -> list[dict]:
    """Items of pieces of Python's manual; some are longer than the context, and some bear WikiHow's markers."""
    rng = np.random.default_rng(1)

    def words(most: int) -> str:
        start = rng.integers(len(WORDS) - most)
        return " ".join(WORDS[start : start + rng.integers(2, most)])

    items = []
    for ind in range(N_ITEMS):
        marker = ("", "[header] ", "[step]  ")[ind % 3]
        endings = [marker[: 7 * (i % 2)] + words(12) for i in range(4)]
        items.append(make_item(ind, words(4), f"{marker}{words(40)}", words(9), endings))
        items[-1] |= {"label": int(rng.integers(4)), "source_id": f"manual~{ind // 2}"}
    return items


def random_model() -> GPT:
    """Logits far apart, so that no two endings are near a tie."""
    shape = {"n_layer": 2, "n_head": 2, "n_embd": 32, "block_size": 64, "vocab_size": 50257, "norm": "preln"}
    model = GPT(GPTConfig(**shape), seed=5)
    with torch.no_grad():
        model.wte.weight *= 30
    return model


def trained_model() -> GPT:
    """Some steps on the manual: enough for endings to differ by more than their length."""
    model = GPT(random_model().config, seed=6)
    ids = torch.tensor(load_encoding().encode_ordinary(" ".join(WORDS[:20000])))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for batch in ids[: 20 * 8 * 65].view(20, 8, 65):
        loss = model(batch[:, :-1], batch[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 2
    return model


@pytest.fixture(scope="module")
def items(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("items") / "items.jsonl"
    path.write_text("".join(f"{json.dumps(item)}\n" for item in [*ITEMS, *cut_items()]))
    return path


@pytest.mark.parametrize("make", [random_model, trained_model])
def test_scores_are_those_of_the_harness_item_by_item(make, items, tmp_path):
    save_model(make(), tmp_path / "model")
    ours = score_here(tmp_path / "model", items, batch_tokens=512)
    theirs = score_by_harness(export_model(tmp_path / "model", tmp_path / "exported"), items)
    assert ours.logprobs.shape == (N_ITEMS + len(ITEMS), 4)
    np.testing.assert_allclose(ours.logprobs, theirs.logprobs, rtol=RELATIVE_TOLERANCE)
    for kind in ("acc", "acc_norm"):
        assert getattr(ours, kind).tolist() == getattr(theirs, kind).tolist()
        assert 0 < getattr(ours, kind).sum() < len(ours.acc)
    assert (ours.acc != ours.acc_norm).any()


def test_the_command_compares_and_says_what_it_found(items, tmp_path, capsys, monkeypatch):
    save_model(random_model(), tmp_path / "model")
    arguments = ["--model", str(tmp_path / "model"), "--items", str(items), "--first", "9"]
    main(arguments)
    printed = capsys.readouterr().out
    assert "9 items, lm-evaluation-harness 0.4.13" in printed and printed.count("0 differ") == 2
    # A protocol that is not the harness's is found out.
    monkeypatch.setattr(
        "gpt2.hellaswag.scoring.predictions",
        lambda protocol, scores, rows: dict.fromkeys(("acc", "acc_norm"), scores.argmin(1)),
    )
    with pytest.raises(SystemExit, match="not the harness's"):
        main(arguments)
