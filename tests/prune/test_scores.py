"""Benchmark scores of several models on the same items."""

import pytest

from gpt2.heads.similarity import Head
from gpt2.hellaswag.scoring import evaluate_benchmark
from gpt2.prune.remove import remove_heads
from gpt2.prune.scores import score_models
from tests.analysed import make_benchmark, make_model


def test_models_are_scored_and_compared_with_the_first():
    model, benchmark = make_model(), make_benchmark(30)
    pruned = remove_heads(model, [Head(0, 2), Head(1, 1), Head(1, 2), Head(2, 0)])
    figures = score_models({"whole": model, "pruned": pruned}, benchmark, 200)
    for name, scored in (("whole", model), ("pruned", pruned)):
        expected, _ = evaluate_benchmark(scored, benchmark, "completion", 200)
        assert figures[f"{name}_hellaswag_acc_norm"] == expected["completion_acc_norm"]
        assert figures[f"{name}_hellaswag_acc_norm_stderr"] == expected["completion_acc_norm_stderr"]
    difference = figures["pruned_hellaswag_acc_norm"] - figures["whole_hellaswag_acc_norm"]
    assert figures["pruned_hellaswag_acc_norm_difference"] == pytest.approx(difference)
    assert (
        0 < figures["pruned_hellaswag_acc_norm_p"] <= 1 and figures["pruned_hellaswag_acc_norm_difference_margin"] > 0
    )
    assert "whole_hellaswag_acc_norm_p" not in figures


def test_a_model_does_not_differ_from_itself():
    model = make_model()
    figures = score_models({"whole": model, "pruned": remove_heads(model, [])}, make_benchmark(10), 200)
    assert [figures[f"pruned_hellaswag_acc_norm_{end}"] for end in ("difference", "p")] == [0, 1]
