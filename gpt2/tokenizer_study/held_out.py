"""Held-out text as one vocabulary sees it, and the bits that a model needs for all of it and for its words.

With GPT-2's pattern the space before a word is part of it, so its tokens predict how it begins, and only the next token
shows that it has ended. The probability of a word w with tokens t_1 ... t_n in the context c includes its end
(Pimentel & Meister 2024, "How to compute the probability of a word"; Oh & Schuler 2024, "Leading whitespaces of
language models' subword vocabulary pose a confound for calculating word probabilities"):

    p(w | c) = p(t_1 ... t_n | c) * P(next token begins a piece | c t_1 ... t_n) / P(next token begins a piece | c)

A piece is a match of GPT-2's pattern: a word, a number, punctuation or spaces. These probabilities sum to one over all
pieces. Over a text the factors of neighbours cancel, so bits per byte of all text need no correction.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import regex
import tiktoken
import torch
from torch import Tensor

from gpt2.model.dist import Precision, autocast
from gpt2.model.gpt import GPT
from gpt2.model.loss import token_losses
from gpt2.tokenizer.encodings import PATTERN, ranked_tokens
from gpt2.tokenizer_study.study import count_bytes

# Kinds of characters that GPT-2's pattern keeps together, and the end of a document.
LETTER, NUMBER, SPACE, OTHER, END = range(5)
# Rows of logits at a time.
CHUNK = 256


@dataclass(frozen=True)
class HeldOut:
    """A split in one vocabulary.

    stream (M + 1,): token ids, an end-of-text token before, between and after documents; the targets are stream[1:].
    words: a row per word of a group, with its first target `start`, the target after its last `stop`, its `bytes` and
    `document`, and a column per group. begins (V, 5), ends (V,): as `find_boundaries` returns them.
    """

    n_bytes: int
    stream: Tensor
    words: pd.DataFrame
    begins: Tensor
    ends: Tensor


def find_boundaries(encoding: tiktoken.Encoding) -> tuple[Tensor, Tensor]:
    """Which tokens begin a piece after a character of each kind, (V, 5), 0 or 1; kind of their last characters, (V,).

    A token continues the piece before it if its first character is of the same kind as the last one there; a space with
    something after it always begins a piece, the rest of a character never does. Two cases depend on more than one
    character and are approximated: letters after a contraction, and spaces after spaces.
    """
    begins, ends = torch.ones(encoding.n_vocab, 5), torch.full((encoding.n_vocab,), END)
    for i, token in enumerate(ranked_tokens(encoding)):
        kinds = [_kind(character) for character in token.decode("utf-8", errors="replace")]
        ends[i] = kinds[-1]
        if kinds[0] != SPACE or set(kinds) == {SPACE}:
            begins[i, kinds[0]] = 0
        if 0x80 <= token[0] < 0xC0:
            begins[i, :END] = 0
    return begins, ends


def _kind(character: str) -> int:
    # U+FFFD is a part of a character; beyond ASCII most are letters.
    if character.isalpha() or character == "\ufffd":
        return LETTER
    return NUMBER if character.isnumeric() else SPACE if character.isspace() else OTHER


def encode_held_out(
    texts: Sequence[str], groups: Mapping[str, Mapping[str, int]], encoding: tiktoken.Encoding
) -> HeldOut:
    """Encode the documents of a split and find the words of `groups` in them."""
    stream, words = [encoding.eot_token], []
    for document, text in enumerate(texts):
        for piece in regex.findall(PATTERN, text):
            # No token spans two pieces, so the tokens of a word are its own.
            start, tokens = len(stream) - 1, encoding.encode_ordinary(piece)
            stream += tokens
            if any(belongs := [piece in members for members in groups.values()]):
                words.append((start, start + len(tokens), len(piece.encode("utf-8")), document, *belongs))
        stream.append(encoding.eot_token)
    table = pd.DataFrame(words, columns=["start", "stop", "bytes", "document", *groups])
    return HeldOut(count_bytes(texts), torch.tensor(stream), table, *find_boundaries(encoding))


@torch.no_grad()
def stream_hidden(model: GPT, stream: Tensor, batch_size: int) -> Tensor:
    """Last hidden states (M, D) that predict each token of `stream` (M + 1,) but the first.

    Windows overlap by half, so that every token but those of the first window is predicted from half a context or more:
    otherwise a vocabulary with more tokens per text would be predicted without context more often.
    """
    T = model.config.block_size
    stride, n_targets = -(-T // 2), len(stream) - 1
    count = 1 + max(0, -(-(n_targets - T) // stride))
    inputs = torch.nn.functional.pad(stream[:-1], (0, (count - 1) * stride + T - n_targets)).unfold(0, T, stride)
    hidden = torch.cat([model.hidden(batch.to(model.wte.weight.device)) for batch in inputs.split(batch_size)])
    return torch.cat([hidden[0, : T - stride], hidden[:, T - stride :].flatten(0, 1)])[:n_targets]


@torch.no_grad()
def boundary_losses(hidden: Tensor, weight: Tensor, kinds: Tensor, begins: Tensor) -> Tensor:
    """-log P(next token begins a piece) in nats, (N,) fp64 on the CPU, from hidden states (N, D).

    kinds (N,): of the last characters before. weight (V, D): the output matrix. begins (V, 5): see `find_boundaries`.
    """
    weight, begins = weight.to(hidden.dtype), begins.to(hidden.device)
    mass = [((rows @ weight.t()).float().softmax(1) @ begins).cpu() for rows in hidden.split(CHUNK)]
    return -torch.cat(mass).double().log().gather(1, kinds.unsqueeze(1)).squeeze(1)


@dataclass(frozen=True)
class Score:
    """Bits per byte of all text, key "", and of the words of each group, key `rare_` for example; and the words of the
    text with the `bits` of each."""

    bits_per_byte: dict[str, float]
    words: pd.DataFrame


def score_held_out(model: GPT, text: HeldOut, batch_size: int, precision: Precision) -> Score:
    """Judge a model by a held-out text."""
    weight, edges = model.wte.weight, _edges(text)
    device = weight.device
    with autocast(device, precision):
        hidden = stream_hidden(model, text.stream, batch_size)
        losses = token_losses(hidden, weight, text.stream[1:].to(device), model.config.vocab_size).cpu()
        kinds = text.ends[text.stream[edges]]
        at_edges = boundary_losses(hidden[edges.to(device)], weight[: model.config.vocab_size], kinds, text.begins)
    return _score(text, losses.double(), at_edges)


def score_even(text: HeldOut) -> Score:
    """The same if all tokens are equally likely: what a vocabulary achieves without a model."""
    losses = torch.full((len(text.stream) - 1,), math.log(len(text.ends)), dtype=torch.float64)
    return _score(text, losses, -text.begins.double().mean(0).log()[text.ends[text.stream[_edges(text)]]])


def _edges(text: HeldOut) -> Tensor:
    """The targets before which words begin, then those before which they have ended, (2 W,)."""
    return torch.from_numpy(text.words[["start", "stop"]].to_numpy(np.int64).T.flatten())


def _score(text: HeldOut, losses: Tensor, at_edges: Tensor) -> Score:
    """Add up token losses (M,) in nats and for words, by the formula above, boundary losses at their edges (2 W,)."""
    (before, after), (starts, stops) = (edges.numpy().reshape(2, -1) for edges in (at_edges, _edges(text)))
    up_to = np.concatenate([[0.0], losses.cumsum(0).numpy()])
    words = text.words.assign(bits=(up_to[stops] - up_to[starts] + after - before) / math.log(2))
    parts = {"": up_to[-1] / math.log(2) / text.n_bytes}
    for group in text.words.columns[4:]:
        parts[f"{group}_"] = words["bits"][words[group]].sum() / words["bytes"][words[group]].sum()
    return Score({part: float(bits) for part, bits in parts.items()}, words)
