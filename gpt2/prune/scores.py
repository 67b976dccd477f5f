"""Benchmark scores of pruned models, compared with the whole model."""

from collections.abc import Mapping

import numpy as np

from gpt2.hellaswag.items import Benchmark
from gpt2.hellaswag.mcnemar import count_items
from gpt2.hellaswag.scoring import evaluate_benchmark
from gpt2.model.gpt import GPT

PROTOCOL, KIND = "completion", "acc_norm"
ACCURACY = f"hellaswag_{KIND}"


def score_models(models: Mapping[str, GPT], benchmark: Benchmark, batch_tokens: int) -> dict[str, float]:
    """<name>_hellaswag_acc_norm of each model under the protocol `completion`, with its _stderr.

    Of all but the first also, against the first: _difference, _difference_margin (half its 95 % interval) and _p, by
    McNemar's exact test.
    """
    figures: dict[str, float] = {}
    first: np.ndarray | None = None
    for name, model in models.items():
        measured, columns = evaluate_benchmark(model, benchmark, PROTOCOL, batch_tokens)
        key = f"{name}_{ACCURACY}"
        figures |= {f"{key}{end}": measured[f"{PROTOCOL}_{KIND}{end}"] for end in ("", "_stderr")}
        right = np.array(columns[f"{PROTOCOL}_{KIND}"]) == benchmark.labels
        first = right if first is None else first
        if right is not first:
            comparison = count_items(first, right)
            figures[f"{key}_difference"], figures[f"{key}_difference_margin"] = comparison.difference
            figures[f"{key}_p"] = comparison.p_value
    return figures
