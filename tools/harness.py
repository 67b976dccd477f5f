"""Is our HellaSwag score the one of EleutherAI's lm-evaluation-harness, item by item?

    python -m tools.harness [--model models/gpt2] [--items data/hellaswag.jsonl] [--first N]

Exports the model, lets the harness score it in transformers, scores it here, and compares: log-probabilities of all
endings, and which items are right by acc and acc_norm. Ends with an error if any item differs.
"""

import json
import os
import tempfile
from itertools import islice
from pathlib import Path
from typing import NamedTuple

# Before the import of what reads them.
os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}

import lm_eval
import numpy as np
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks._yaml_loader import load_yaml

from gpt2.export import export_model
from gpt2.hellaswag.items import ENDINGS, read_items, tokenize_items
from gpt2.hellaswag.scoring import evaluate_benchmark
from gpt2.model.weights import load_model
from gpt2.pipeline.command import Parser, reporting
from gpt2.tokenizer.encodings import encoding_of

# Sums of fp32 log-probabilities, one a token: the harness adds in fp32, and its products are batched otherwise.
RELATIVE_TOLERANCE = 1e-5


class Scores(NamedTuple):
    """Log-probabilities of the endings (N, 4) in nats, and whether the chosen ending is right (N,)."""

    logprobs: np.ndarray
    acc: np.ndarray
    acc_norm: np.ndarray


def score_by_harness(exported: Path, items: Path, batch_size: int = 16) -> Scores:
    """The harness's own task hellaswag, zero shots, its documents replaced by those of a JSONL file."""
    task = load_yaml(Path(lm_eval.__file__).parent / "tasks" / "hellaswag" / "hellaswag.yaml")
    del task["tag"]
    with tempfile.TemporaryDirectory() as cache:
        source = {"data_files": {"validation": str(items)}, "cache_dir": cache}
        task |= {"task": "local", "dataset_path": "json", "dataset_kwargs": source, "training_split": None}
        model = HFLM(pretrained=str(exported), device="cpu", dtype="float32", batch_size=batch_size)
        results = lm_eval.simple_evaluate(model=model, tasks=[task], log_samples=True, bootstrap_iters=0)
    samples = sorted(results["samples"]["local"], key=lambda sample: sample["doc_id"])
    return Scores(
        np.array([[float(logprob) for logprob, _ in sample["filtered_resps"]] for sample in samples]),
        *(np.array([bool(sample[kind]) for sample in samples]) for kind in ("acc", "acc_norm")),
    )


def score_here(folder: Path, items: Path, batch_tokens: int = 8192) -> Scores:
    """The protocol `harness` of this project."""
    benchmark = tokenize_items(list(read_items(items)), encoding_of(folder))
    _, columns = evaluate_benchmark(load_model(folder), benchmark, "harness", batch_tokens)
    return Scores(
        np.transpose([columns[f"harness_logprob_{ending}"] for ending in range(ENDINGS)]),
        *(np.array(columns[f"harness_{kind}"]) == benchmark.labels for kind in ("acc", "acc_norm")),
    )


def main(argv: list[str] | None = None) -> None:
    parser = Parser(prog="python -m tools.harness", description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=Path("models/gpt2"))
    parser.add_argument("--items", type=Path, default=Path("data/hellaswag.jsonl"))
    parser.add_argument("--first", type=int, help="score only the first N items")
    options = parser.parse_args(argv)
    with reporting("harness"), tempfile.TemporaryDirectory() as scratch:
        items = Path(scratch, "items.jsonl")
        items.write_text("".join(f"{json.dumps(item)}\n" for item in islice(read_items(options.items), options.first)))
        exported = export_model(options.model, Path(scratch, "exported"))
        theirs, ours = score_by_harness(exported, items), score_here(options.model, items)
    differing = {kind: int((getattr(ours, kind) != getattr(theirs, kind)).sum()) for kind in ("acc", "acc_norm")}
    relative = np.abs(ours.logprobs / theirs.logprobs - 1).max()
    print(f"{len(ours.acc):,} items, lm-evaluation-harness {lm_eval.__version__}")
    print(f"largest relative difference of a log-probability: {relative:.1e}")
    for kind, count in differing.items():
        print(
            f"{kind}: {getattr(ours, kind).mean():.4f} here, {getattr(theirs, kind).mean():.4f} there, {count} differ"
        )
    if any(differing.values()) or relative > RELATIVE_TOLERANCE:
        raise SystemExit("the scores are not the harness's")


if __name__ == "__main__":
    main()
