"""HellaSwag: the ending of four that a model finds most likely. One scorer for training, stages and pruning.

The model reads each item once, as one sequence: the tokens that all four rows begin with, then each row's own tokens.
No row attends to the own tokens of another, and its positions continue those of the shared part, so every token is
predicted from the same history as in a row by itself (tree attention, Miao et al. 2024, section 4.1).
"""

import math
from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import PositiveInt
from torch import Tensor

from gpt2.hellaswag.items import ACCURACIES, ENDINGS, ITEMS, PROTOCOLS, Benchmark, TokenizedItems
from gpt2.model.dist import Dist
from gpt2.model.gpt import GPT
from gpt2.model.loss import token_losses
from gpt2.pipeline.files import UserError
from gpt2.pipeline.params import Config

# Widths of sequences are rounded up to this, which masks on a GPU need for their fast kernel.
WIDTH_MULTIPLE = 8


class HellaswagConfig(Config):
    """Section `hellaswag`: how the scoring is batched; the scores do not depend on it."""

    # Padded tokens of one forward pass.
    batch_tokens: PositiveInt


@torch.no_grad()
def score_rows(model: GPT, rows: TokenizedItems, batch_tokens: int, dist: Dist | None = None) -> np.ndarray:
    """Sum of log-probabilities of every ending, (N, 4) float64 nats, fp32 inside.

    Rows longer than the context lose tokens on the left, as in the harness. Raises UserError if an ending alone is
    longer.
    """
    device = model.wte.weight.device
    items = cut_items(rows, model.config.block_size)
    # Items of similar length share a batch, the longest first so that running out of memory shows at once.
    order = sorted(items, key=lambda item: -item.width)
    if dist is not None:
        order = order[dist.rank :: dist.world_size]
    scores = torch.zeros(len(items) * ENDINGS, dtype=torch.float64, device=device)
    while order:
        width = order[0].width
        count = max(1, batch_tokens // width)
        batch, order = order[:count], order[count:]
        layout = Layout(*(tensor.to(device, non_blocking=True) for tensor in lay_out(batch)))
        attend = partial(F.scaled_dot_product_attention, attn_mask=_visible(layout.part))
        hidden = model.hidden(layout.idx, layout.position, [attend] * model.config.n_layer).flatten(0, 1)
        losses = token_losses(hidden[layout.cell], model.wte.weight, layout.target, model.config.vocab_size)
        scores.index_add_(0, layout.row, -losses.double())
    if dist is not None:
        dist.sum(scores)
    return scores.view(-1, ENDINGS).cpu().numpy()


def _visible(part: Tensor) -> Tensor:
    """Which keys each query attends to, (B, 1, T, T): those before it of its own part (B, T) and of part 0."""
    query, key = part[:, :, None], part[:, None, :]
    return ((key == 0) | (key == query)).tril()[:, None]


class CutItem(NamedTuple):
    """The four rows of an item, cut to the context; a row's last token is predicted, not read.

    contexts: tokens of each row before its ending. shared: tokens that all rows begin with, of those that are read.
    """

    number: int
    rows: list[np.ndarray]
    contexts: list[int]
    shared: int

    @property
    def tokens(self) -> int:
        """Tokens that are read: the shared ones, and the own ones of each row."""
        return self.shared + sum(len(row) - 1 - self.shared for row in self.rows)

    @property
    def width(self) -> int:
        return -(-self.tokens // WIDTH_MULTIPLE) * WIDTH_MULTIPLE


def cut_items(rows: TokenizedItems, block_size: int) -> list[CutItem]:
    """All items, their rows cut on the left to the context. Raises UserError if an ending leaves no token of it."""
    items = []
    pieces = [rows.tokens[max(begin, end - block_size - 1) : end] for begin, end in pairwise(rows.offsets.tolist())]
    for first in range(0, len(pieces), ENDINGS):
        number, cut = first // ENDINGS, pieces[first : first + ENDINGS]
        scored = rows.ending_tokens[first : first + ENDINGS].tolist()
        contexts = [len(row) - n for row, n in zip(cut, scored, strict=True)]
        if min(contexts) < 1:
            ending = next(i for i, context in enumerate(contexts) if context < 1)
            raise UserError(
                f"{ITEMS}, line {number + 1}: ending {ending} has {scored[ending]} tokens, which leaves no context "
                f"within block_size={block_size}; remove the item or raise model.block_size"
            )
        read = min(map(len, cut)) - 1
        differs = (np.array([row[:read] for row in cut]) != cut[0][:read]).any(0)
        items.append(CutItem(number, cut, contexts, int(differs.argmax()) if differs.any() else read))
    return items


class Layout(NamedTuple):
    """A batch of items as sequences (B, T), and the S predicted tokens of all their endings.

    idx, position, part (B, T) int64: token ids, positions in the context, and parts: 0 shared, 1 to 4 own tokens of a
    row, -1 padding. cell, target, row (S,) int64: the index into B T of the token that the prediction is made from, the
    id of the predicted token, and the row of the benchmark (4 an item) whose ending it belongs to.
    """

    idx: Tensor
    position: Tensor
    part: Tensor
    cell: Tensor
    target: Tensor
    row: Tensor


def lay_out(items: Sequence[CutItem]) -> Layout:
    """Items, the widest first, as one sequence each. An item with the context "a b" and four endings:

        row 0   a b | c d     predicted: c from b, d from c
        row 1   a b | c e                c from b, e from c
        row 2   a b | f                  f from b
        row 3   a b | g h i              g from b, h from g, i from h

    All rows but their last tokens are read: "a b" once, then "c", "c", nothing, "g h":

        cell       0  1  2  3  4  5  6  7
        idx        a  b  c  c  g  h  .  .
        position   0  1  2  2  2  3  .  .
        part       0  0  1  2  4  4 -1 -1

        row        0  0  1  1  2  3  3  3
        cell       1  2  1  3  1  1  4  5
        target     c  d  c  e  f  g  h  i
    """
    width = items[0].width
    idx, position = np.zeros((2, len(items), width), dtype=np.int64)
    part = np.full((len(items), width), -1)
    cells, targets, numbers = [], [], []
    for i, item in enumerate(items):
        shared = np.arange(item.shared)
        idx[i, shared], position[i, shared], part[i, shared] = item.rows[0][shared], shared, 0
        begin = item.shared
        for ending, (row, context) in enumerate(zip(item.rows, item.contexts, strict=True)):
            own = np.arange(begin, begin + len(row) - 1 - item.shared)
            idx[i, own], part[i, own] = row[item.shared : -1], ending + 1
            position[i, own] = np.arange(item.shared, len(row) - 1)
            # The row reads the shared cells and then its own; each predicts the token after it.
            cells.append(i * width + np.concatenate([shared, own])[context - 1 :])
            targets.append(row[context:].astype(np.int64))
            numbers.append(np.full(len(row) - context, item.number * ENDINGS + ending))
            begin += len(own)
    arrays = idx, position, part, *map(np.concatenate, (cells, targets, numbers))
    return Layout(*map(torch.from_numpy, arrays))


def predictions(protocol: str, scores: np.ndarray, rows: TokenizedItems) -> dict[str, np.ndarray]:
    """Chosen ending (N,) by raw sum (`acc`) and by the protocol's normalised sum (`acc_norm`).

    completion divides by the tokens of the ending, harness by its characters.
    """
    length = rows.ending_tokens if protocol == "completion" else rows.ending_chars
    return {"acc": scores.argmax(1), "acc_norm": (scores / length.reshape(-1, ENDINGS)).argmax(1)}


def accuracy(right: np.ndarray, documents: np.ndarray) -> tuple[float, float]:
    """Share of items (N,) that are right, and its standard error.

    Items of one document are not independent, so the error is clustered by document (Miller 2024, "Adding Error Bars to
    Evals", arXiv 2411.00640): sqrt(sum over documents of (sum over its items of right - share)^2) / N. Where each item
    has a document of its own it is sqrt(p (1 - p) / (N - 1)), as in the harness. With one document for all items there
    is no estimate, and the error is 0.
    """
    n, p = len(right), float(right.mean())
    _, cluster = np.unique(documents, return_inverse=True)
    residuals = np.bincount(cluster, weights=right - p)
    if len(residuals) == n:
        return p, math.sqrt(p * (1 - p) / max(1, n - 1))
    return p, math.sqrt((residuals**2).sum()) / n


def evaluate_benchmark(
    model: GPT, benchmark: Benchmark, protocol: str, batch_tokens: int, dist: Dist | None = None
) -> tuple[dict[str, float], dict[str, list]]:
    """Figures of one protocol (`completion_acc`, `completion_acc_stderr`, …), and columns with an entry for each item.

    The columns are the log-probability of each ending (`completion_logprob_0`, … in nats) and the chosen endings
    (`completion_acc`, `completion_acc_norm`).
    """
    rows = benchmark.protocols[protocol]
    scores = score_rows(model, rows, batch_tokens, dist)
    columns = {f"{protocol}_logprob_{ending}": scores[:, ending].tolist() for ending in range(ENDINGS)}
    figures = {}
    for kind, choice in predictions(protocol, scores, rows).items():
        name = f"{protocol}_{kind}"
        figures[name], figures[f"{name}_stderr"] = accuracy(choice == benchmark.labels, benchmark.documents)
        columns[name] = choice.tolist()
    return figures, columns


def score_model(model: GPT, benchmark: Benchmark, batch_tokens: int) -> tuple[dict[str, float], dict[str, list]]:
    """Figures of metrics/hellaswag.json under all protocols, and columns with an entry for each item.

    `items` and `documents` count them. `clean_items` counts the items whose answer is not in the training documents;
    the accuracies of these alone end in `_clean` and `_clean_stderr`, and are absent where there is no such item.
    """
    labels, clean = benchmark.labels, ~benchmark.in_training
    figures: dict[str, float] = {
        "items": len(labels),
        "documents": len(np.unique(benchmark.documents)),
        "clean_items": int(clean.sum()),
    }
    columns = {
        "item": list(range(len(labels))),
        "label": labels.tolist(),
        "document": benchmark.documents.tolist(),
        "in_training": benchmark.in_training.astype(int).tolist(),
    }
    for protocol in PROTOCOLS:
        measured, of_items = evaluate_benchmark(model, benchmark, protocol, batch_tokens)
        figures |= measured
        columns |= of_items
    if clean.any():
        for name in ACCURACIES:
            right = (np.array(columns[name]) == labels)[clean]
            figures[f"{name}_clean"], figures[f"{name}_clean_stderr"] = accuracy(right, benchmark.documents[clean])
    return figures, columns
