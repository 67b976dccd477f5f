"""A small model with distinct heads, and a folder in which the stages that analyse a trained model can run."""

import json
from pathlib import Path

import numpy as np
import torch

from gpt2.data.shards import Vocabulary, write_split
from gpt2.heads.similarity import Head
from gpt2.hellaswag.items import ENDINGS, PROTOCOLS, Benchmark, TokenizedItems, save_benchmark
from gpt2.model.config import GPTConfig
from gpt2.model.gpt import GPT
from gpt2.model.weights import save_model
from gpt2.prune.frontier import Evaluator
from gpt2.prune.repair import gather_calibration
from tests.settings import HARDWARE

VOCAB_SIZE, BLOCK_SIZE = 97, 24
NORMS = ("preln", "postln", "deepnorm")
# One head of the first of three layers, all four of the second, none of the third.
REMOVED = [Head(0, 2), *(Head(1, index) for index in range(4))]
SECTIONS = {
    "hardware": HARDWARE,
    "heads": {"n_tokens": 200, "batch_size": 3, "threshold": 0.85, "null_percentile": 95, "seed": 7},
    "prune": {
        "shares": [0.1, 0.5],
        "random_seeds": [0, 1],
        "random_sets": 3,
        "calibration_tokens": 300,
        "scoring_tokens": 100,
        "selection_tokens": 50,
        "eval_tokens": 200,
        "batch_size": 3,
        "ridge": 1e-3,
        "limit_percent": 5.0,
        "recovery_steps": 0,
        "recovery_max_lr": 1e-3,
        "recovery_seed": 1,
    },
    "hellaswag": {"batch_tokens": 200},
}


def make_model(norm: str = "preln", n_layer: int = 3, n_head: int = 4, heads: tuple[int, ...] | None = None) -> GPT:
    """A model whose attention is far from uniform and whose biases are not zero."""
    config = GPTConfig(
        n_layer=n_layer,
        n_head=n_head,
        n_embd=32,
        block_size=BLOCK_SIZE,
        vocab_size=VOCAB_SIZE,
        norm=norm,
        heads=heads,
    )
    model = GPT(config, seed=3).eval()
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for block in model.h:
            for linear in (block.attn.c_attn, block.attn.c_proj):
                linear.weight.normal_(std=0.3, generator=generator)
                linear.bias.normal_(std=0.1, generator=generator)
    return model


def slice_head(model: GPT, head: Head) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Views of the rows (3, D, C) and biases (3, D) of c_attn and of the columns (C, D) of c_proj of one head."""
    attn = model.h[head.layer].attn
    shape = (attn.n_head, attn.head_dim)
    return (
        attn.c_attn.weight.data.unflatten(0, (3, *shape))[:, head.index],
        attn.c_attn.bias.data.unflatten(0, (3, *shape))[:, head.index],
        attn.c_proj.weight.data.unflatten(1, shape)[:, head.index],
    )


def make_windows(n: int, seed: int = 5) -> torch.Tensor:
    """Random token ids (n, BLOCK_SIZE + 1)."""
    return torch.randint(VOCAB_SIZE, (n, BLOCK_SIZE + 1), generator=torch.Generator().manual_seed(seed))


def make_evaluator(model: GPT, windows: torch.Tensor) -> Evaluator:
    """An evaluator of sets of heads on windows (N, T + 1), which also calibrate the repairs."""
    return Evaluator(model, gather_calibration(model, windows, 5, 1e-3, np.eye(12)), windows, 5)


def make_benchmark(n_items: int, seed: int = 6) -> Benchmark:
    """Random items: a context of five tokens, with endings of three tokens and ten characters."""
    rng, n_rows = np.random.default_rng(seed), ENDINGS * n_items
    tokens = rng.integers(1, VOCAB_SIZE, (n_items, ENDINGS, 8)).astype(np.uint16)
    tokens[:, :, :5] = tokens[:, :1, :5]
    rows = TokenizedItems(tokens.ravel(), np.arange(0, 8 * n_rows + 1, 8), np.full(n_rows, 3), np.full(n_rows, 10))
    return Benchmark(rng.integers(0, ENDINGS, n_items), dict.fromkeys(PROTOCOLS, rows))


def prepare_folder(folder: Path, model: GPT, n_tokens: int = 500, **changed: dict) -> None:
    """Write the model, random tokens of all splits and items, and a params.yaml with `changed` keys of sections."""
    save_model(model, folder / "models" / "gpt2")
    vocabulary = Vocabulary(encoding="gpt2", vocab_size=VOCAB_SIZE, eot_token=0)
    for seed, split in enumerate(("val", "test", "train")):
        ids = np.random.default_rng(seed).integers(1, VOCAB_SIZE, n_tokens).astype(np.uint16)
        write_split(folder / "data" / "tokens", split, [(ids, 4 * n_tokens)], vocabulary, shard_tokens=200)
    save_benchmark(make_benchmark(20), folder / "data" / "tokens" / "hellaswag.npz")
    sections = {name: {**section, **changed.get(name, {})} for name, section in SECTIONS.items()}
    # JSON is YAML.
    (folder / "params.yaml").write_text(json.dumps({"norm": model.config.norm, "scale": "tiny", "tiny": sections}))


def read_outputs(folder: Path) -> dict[str, bytes]:
    """Bytes of every output that must be reproducible, by path."""
    paths = [path for root in ("data", "metrics", "models", "plots") for path in (folder / root).rglob("*")]
    timed = folder / "metrics" / "speed"
    return {str(path): path.read_bytes() for path in paths if path.is_file() and path.parent != timed}
