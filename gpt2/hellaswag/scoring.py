"""HellaSwag: the ending of four that a model finds most likely. One scorer for training, stages and pruning.

The model reads each item once, as one sequence: the tokens that all four rows begin with, then each row's own tokens.
No row attends to the own tokens of another, and its positions continue those of the shared part, so every token is
predicted from the same history as in a row by itself (tree attention, Miao et al. 2024, section 4.1).
"""

import math
from functools import partial
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
# Items whose shared part is sought at a time, which bounds memory.
CHUNK_ITEMS = 1024


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
    items = ItemSequences(rows, model.config.block_size)
    # Items of like length share a batch, the longest first so that running out of memory shows at once.
    order = np.argsort(-items.width, kind="stable")
    if dist is not None:
        order = order[dist.rank :: dist.world_size]
    scores = torch.zeros(len(items.width) * ENDINGS, dtype=torch.float64, device=device)
    for batch in _batches(order, items.width, batch_tokens):
        layout = Layout(*(array.to(device, non_blocking=True) for array in items.lay_out(batch)))
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


def _batches(order: np.ndarray, width: np.ndarray, batch_tokens: int) -> list[np.ndarray]:
    """Cut items, widest first, into batches of at most `batch_tokens` padded tokens (at least one item each)."""
    batches, start = [], 0
    while start < len(order):
        count = max(1, batch_tokens // int(width[order[start]]))
        batches.append(order[start : start + count])
        start += count
    return batches


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


class ItemSequences:
    """Rows cut to the context, and the tokens that those of an item share. A row's last token is predicted, not read.

    Raises UserError if an ending leaves no context.
    """

    def __init__(self, rows: TokenizedItems, block_size: int):
        self.tokens = rows.tokens
        # (N, 4) each: first token, tokens read, and tokens of the ending.
        starts = np.maximum(rows.offsets[:-1], rows.offsets[1:] - (block_size + 1))
        self.starts = starts.reshape(-1, ENDINGS)
        self.read = (rows.offsets[1:] - starts - 1).reshape(-1, ENDINGS)
        self.scored = rows.ending_tokens.reshape(-1, ENDINGS)
        if (too_long := self.scored > self.read).any():
            item, ending = np.argwhere(too_long)[0]
            raise UserError(
                f"{ITEMS}, line {item + 1}: ending {ending} has {self.scored[item, ending]} tokens, which leaves no "
                f"context within block_size={block_size}; remove the item or raise model.block_size"
            )
        self.shared = self._shared_tokens()
        self.own = self.read - self.shared[:, None]
        # Of an item's one sequence, (N,).
        self.width = -(-(self.shared + self.own.sum(1)) // WIDTH_MULTIPLE) * WIDTH_MULTIPLE

    def _shared_tokens(self) -> np.ndarray:
        """Number of tokens with which all rows of an item begin, (N,)."""
        shared = []
        for first in range(0, len(self.starts), CHUNK_ITEMS):
            starts, limit = self.starts[first : first + CHUNK_ITEMS], self.read[first : first + CHUNK_ITEMS].min(1)
            position = np.arange(limit.max() + 1)
            # Positions beyond the shortest row are never compared, but must be somewhere in the tokens.
            begun = self.tokens[np.minimum(starts[..., None] + position, len(self.tokens) - 1)]
            differs = (begun != begun[:, :1]).any(1) | (position >= limit[:, None])
            shared.append(differs.argmax(1))
        return np.concatenate(shared)

    def lay_out(self, batch: np.ndarray) -> Layout:
        """The items of a batch, one sequence each. An item with the context "a b" and four endings:

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
        # Of the five parts of each item, the shared one first: the length, and the cell where it begins, (B, 5).
        lengths = np.column_stack([self.shared[batch], self.own[batch]])
        width = int(self.width[batch].max())
        cells = np.arange(len(batch))[:, None] * width + np.cumsum(lengths, axis=1) - lengths
        return Layout(*self._read_tokens(batch, width, lengths, cells), *self._predicted_tokens(batch, cells))

    def _read_tokens(
        self, batch: np.ndarray, width: int, lengths: np.ndarray, cells: np.ndarray
    ) -> tuple[Tensor, Tensor, Tensor]:
        """idx, position and part of a batch whose parts have `lengths` and begin at `cells`, (B, 5) each."""
        shared, starts = self.shared[batch], self.starts[batch]
        # Where the parts begin in the benchmark's tokens and in the context, (B, 5): own tokens follow shared ones.
        sources = np.column_stack([starts[:, 0], starts + shared[:, None]])
        positions = np.column_stack([np.zeros_like(shared), *[shared] * ENDINGS])
        parts = np.tile(np.arange(ENDINGS + 1), len(batch))
        filled = _ranges(cells, lengths)

        def fill(values: np.ndarray, padding: int) -> Tensor:
            array = np.full(len(batch) * width, padding, dtype=np.int64)
            array[filled] = values
            return torch.from_numpy(array).view(len(batch), width)

        return (
            fill(self.tokens[_ranges(sources, lengths)], 0),
            fill(_ranges(positions, lengths), 0),
            fill(np.repeat(parts, lengths.ravel()), -1),
        )

    def _predicted_tokens(self, batch: np.ndarray, cells: np.ndarray) -> tuple[Tensor, Tensor, Tensor]:
        """cell, target and row of a batch whose parts begin at `cells` (B, 5)."""
        shared, scored = self.shared[batch], self.scored[batch]
        # Of each predicted token, (S,): row and item within the batch, and the place in the row of the token before.
        row = np.repeat(np.arange(len(batch) * ENDINGS), scored.ravel())
        item = row // ENDINGS
        before = _ranges(self.read[batch] - scored, scored)
        in_shared_part = cells[item, 0] + before
        in_own_part = cells[:, 1:].ravel()[row] + before - shared[item]
        cell = np.where(before < shared[item], in_shared_part, in_own_part)
        target = self.tokens[self.starts[batch].ravel()[row] + before + 1].astype(np.int64)
        row_of_benchmark = batch[item] * ENDINGS + row % ENDINGS
        return torch.from_numpy(cell), torch.from_numpy(target), torch.from_numpy(row_of_benchmark)


def _ranges(starts: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """The ranges from starts[i] with counts[i] numbers each, laid end to end."""
    starts, counts = starts.ravel(), counts.ravel()
    skipped = np.cumsum(counts) - counts
    return np.repeat(starts - skipped, counts) + np.arange(counts.sum())


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
