"""How the size of a BPE vocabulary changes the segmentation of words, the length of documents and the cost of training.

Vocabularies trained on the training split, and GPT-2's own, which was trained on WebText, are measured on held-out
text: the validation and test splits.
"""

import math
import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tiktoken
from pydantic import PositiveInt, model_validator

from gpt2.model.config import ModelShape
from gpt2.model.flops import training_flops_per_token
from gpt2.prepare.corpus import read_split
from gpt2.tokenizer.bpe import VocabularyConfig, read_training_text, take
from gpt2.tokenizer.encodings import MIN_VOCAB_SIZE, load_encoding
from gpt2.tokenizer_study.words import GROUPS, WordCounts, WordRules, band_words, count_words, group_words, words

# Best correlated with translation quality (Zouhar et al. 2023, "Tokenization and the noiseless channel").
RENYI_ALPHA = 2.5
# Shorter words are seldom cut.
EXAMPLE_MIN_LETTERS = 6
EXAMPLE_WAYS = 3
LOGIT_BYTES = 4
# Widths beyond this are not searched for the one at which a large vocabulary becomes cheaper.
MAX_N_EMBD = 100_000


class TokenizerStudyConfig(WordRules):
    """Vocabularies to train, held-out text, and the rules of the word groups."""

    # Tokens of each vocabulary, end-of-text included.
    vocab_sizes: tuple[int, ...]
    # Limit on the UTF-8 bytes of whole documents read from each of val and test.
    held_out_bytes: PositiveInt
    # Words in the table of examples, divided among the groups.
    n_examples: PositiveInt

    @model_validator(mode="after")
    def _sizes_fit(self) -> "TokenizerStudyConfig":
        sizes = self.vocab_sizes
        if not sizes or sorted(set(sizes)) != list(sizes):
            raise ValueError(f"vocab_sizes={list(sizes)} must be increasing, without repeats; sort the list")
        if sizes[0] < MIN_VOCAB_SIZE:
            raise ValueError(f"vocab_sizes={sizes[0]} must be at least {MIN_VOCAB_SIZE}: all bytes and end-of-text")
        return self


@dataclass(frozen=True)
class StudyText:
    """Documents of the three splits and their words.

    counts: of the words of the training documents, in the form of the rules. occurrences: of each written form in the
    held-out documents. groups: the same for each of GROUPS.
    """

    training: list[str]
    validation: list[str]
    test: list[str]
    counts: WordCounts
    occurrences: Counter[str]
    groups: dict[str, Counter[str]]

    @property
    def held_out(self) -> list[str]:
        return self.validation + self.test


@dataclass(frozen=True)
class Study:
    """Results: flat `metrics`, rows of `vocabularies` (one per vocabulary), of `bands` (one per vocabulary and band of
    frequency) and of `examples` (one per word), and the measured `speed`."""

    metrics: dict[str, float]
    vocabularies: list[dict[str, Any]]
    bands: list[dict[str, Any]]
    examples: list[dict[str, str]]
    speed: dict[str, float]


def read_study_text(config: TokenizerStudyConfig, vocabulary: VocabularyConfig, corpus: Path) -> StudyText:
    """Read the splits of `corpus` and sort the held-out words.

    Raises UserError if a split is absent or a word group empty.
    """
    training = read_training_text(corpus, vocabulary)
    key = "tokenizer_study.held_out_bytes"
    validation, test = (take(read_split(corpus, split), config.held_out_bytes, key) for split in ("val", "test"))
    counts = count_words(training)
    occurrences = Counter(word for text in validation + test for word in words(text))
    return StudyText(training, validation, test, counts, occurrences, group_words(occurrences, counts, config))


def study_vocabularies(
    text: StudyText, trained: Sequence[tiktoken.Encoding], config: TokenizerStudyConfig, shape: ModelShape
) -> Study:
    """Measure the trained vocabularies and GPT-2's on held-out text."""
    encodings = with_gpt2(trained)
    held_out_bytes = count_bytes(text.held_out)
    metrics: dict[str, float] = {"training_bytes": count_bytes(text.training), "held_out_bytes": held_out_bytes}
    metrics |= describe_words(text.occurrences, text.groups)
    in_bands = band_words(text.occurrences, text.counts)
    rows, bands = [], []
    speed: dict[str, float] = {}
    for encoding in encodings:
        documents, speed[f"{encoding.name}_encode_mb_per_s"] = encode(text.held_out, encoding)
        figures = measure_text(documents, held_out_bytes, encoding.n_vocab, shape)
        figures |= measure_words(text.occurrences, encoding)
        for name, members in text.groups.items():
            figures |= {f"{name}_{key}": value for key, value in measure_words(members, encoding).items()}
        rows.append({"name": encoding.name, **figures})
        metrics |= {f"{encoding.name}_{key}": value for key, value in figures.items()}
        for band, members in in_bands.items():
            sizes = {"words": members.total(), "word_types": len(members)}
            place = {"name": encoding.name, "vocab_size": encoding.n_vocab, "band": band}
            bands.append({**place, **sizes, **measure_words(members, encoding)})
    small, large = (next(row for row in rows if row["name"] == trained[i].name) for i in (0, -1))
    metrics["cheaper_above_n_embd"] = cheaper_above_n_embd(small, large, shape)
    return Study(metrics, rows, bands, segment_examples(text.groups, encodings, config.n_examples), speed)


def cheaper_above_n_embd(small: Mapping[str, Any], large: Mapping[str, Any], shape: ModelShape) -> int:
    """Smallest width at which a byte of text costs fewer training FLOPs with the vocabulary `large` than with `small`.

    Depth and context are those of `shape`; -1 if there is no such width up to MAX_N_EMBD. Both rows have `vocab_size`
    and `bytes_per_token`. FLOPs per byte over n_embd are linear in n_embd, and the blocks, the only part that grows,
    cost less with more bytes per token. So there is one crossing, which bisection finds.
    """

    def is_cheaper(n_embd: int) -> bool:
        wide = shape.model_copy(update={"n_embd": n_embd})
        costs = (training_flops_per_token(wide, row["vocab_size"]) / row["bytes_per_token"] for row in (small, large))
        return next(costs) > next(costs)

    widths = range(1, MAX_N_EMBD + 1)
    found = bisect_left(widths, True, key=is_cheaper)
    return widths[found] if found < len(widths) else -1


def with_gpt2(trained: Sequence[tiktoken.Encoding]) -> list[tiktoken.Encoding]:
    """The trained encodings and GPT-2's, smallest first."""
    return sorted([*trained, load_encoding()], key=lambda encoding: encoding.n_vocab)


def encode(texts: Sequence[str], encoding: tiktoken.Encoding) -> tuple[list[list[int]], float]:
    """Token ids of each text, and the measured speed on one thread in MB/s."""
    started = time.perf_counter()
    documents = [encoding.encode_ordinary(text) for text in texts]
    return documents, round(count_bytes(texts) / 1e6 / (time.perf_counter() - started), 2)


def count_bytes(texts: Iterable[str]) -> int:
    """UTF-8 bytes of all texts."""
    return sum(len(text.encode("utf-8")) for text in texts)


def measure_text(documents: Sequence[Sequence[int]], size: int, vocab_size: int, shape: ModelShape) -> dict[str, float]:
    """Figures of tokenized documents that have `size` UTF-8 bytes in all.

    documents_in_context_percent: documents of at most block_size tokens. flops_per_byte: to train on one byte of text.
    embedding_params: of the matrix that is both embedding and output layer. logits_bytes: fp32, of one full context.
    """
    lengths = np.array([len(document) for document in documents])
    counts = np.bincount(np.concatenate([np.asarray(document, dtype=np.int64) for document in documents]))
    bytes_per_token = size / int(lengths.sum())
    embedding = vocab_size * shape.n_embd
    blocks = shape.n_layer * (12 * shape.n_embd**2 + 13 * shape.n_embd)
    others = blocks + (shape.block_size + 2) * shape.n_embd
    return {
        "vocab_size": vocab_size,
        "bytes_per_token": bytes_per_token,
        "tokens_per_document": float(lengths.mean()),
        "documents_in_context_percent": 100 * float((lengths <= shape.block_size).mean()),
        "renyi_efficiency": renyi_efficiency(counts, vocab_size),
        "embedding_params": embedding,
        "embedding_params_percent": 100 * embedding / (embedding + others),
        "logits_bytes": LOGIT_BYTES * shape.block_size * vocab_size,
        "flops_per_byte": training_flops_per_token(shape, vocab_size) / bytes_per_token,
    }


def renyi_efficiency(counts: np.ndarray, vocab_size: int, alpha: float = RENYI_ALPHA) -> float:
    """Rényi entropy of order alpha of the token frequencies over that of a uniform vocabulary: 0 … 1.

    log(sum p^alpha) / (1 - alpha) / log(vocab_size), Zouhar et al. 2023. `counts` (V,) are occurrences of each token.
    """
    p = counts[counts > 0] / counts.sum()
    return math.log(float((p**alpha).sum())) / (1 - alpha) / math.log(vocab_size)


def measure_words(occurrences: Mapping[str, int], encoding: tiktoken.Encoding) -> dict[str, float]:
    """Mean tokens per word over occurrences and over distinct written forms (`type`), and the percentages of the
    occurrences that are one token, and three or more.

    `occurrences` counts words as `words` returns them: the space before a word is part of it.
    """
    lengths = np.array([len(encoding.encode_ordinary(word)) for word in occurrences])
    weights = np.array(list(occurrences.values()))
    return {
        "tokens_per_word": float(np.average(lengths, weights=weights)),
        "tokens_per_word_type": float(lengths.mean()),
        "words_kept_whole_percent": 100 * float(np.average(lengths == 1, weights=weights)),
        "words_in_three_or_more_percent": 100 * float(np.average(lengths >= 3, weights=weights)),
    }


def describe_words(occurrences: Counter[str], groups: Mapping[str, Counter[str]]) -> dict[str, int]:
    """Held-out occurrences and distinct written forms of all words and of each group."""
    sizes = {"words": occurrences.total(), "word_types": len(occurrences)}
    for name, members in groups.items():
        sizes |= {f"{name}_words": members.total(), f"{name}_word_types": len(members)}
    return sizes


def segment_examples(
    groups: Mapping[str, Counter[str]], encodings: Sequence[tiktoken.Encoding], n_examples: int
) -> list[dict[str, str]]:
    """Segmentations of `n_examples` words after a space, an equal share from each group.

    A group's written forms of at least EXAMPLE_MIN_LETTERS are sorted by falling held-out count and sampled at even
    distances, from those that the vocabularies cut in EXAMPLE_WAYS ways or more if these suffice. A form shown for one
    group is left out of the next.
    """
    shown: dict[str, tuple[str, list[str]]] = {}
    for i, name in enumerate(GROUPS):
        counts: Counter[str] = Counter()
        for word, n in groups[name].items():
            form = word.lstrip(" ")
            if len(form) >= EXAMPLE_MIN_LETTERS and form not in shown:
                counts[form] += n
        cuts = {form: [segment(form, encoding) for encoding in encodings] for form in counts}
        share = max(1, (n_examples + len(GROUPS) - 1 - i) // len(GROUPS))
        telling = [form for form in counts if len(set(cuts[form])) >= EXAMPLE_WAYS]
        candidates = sorted(telling if len(telling) >= share else counts, key=lambda form: (-counts[form], form))
        share = min(len(candidates), share)
        for form in (candidates[k * len(candidates) // share] for k in range(share)):
            shown[form] = name, cuts[form]
    names = [encoding.name for encoding in encodings]
    return [
        {"word": form, "group": group} | dict(zip(names, cuts, strict=True)) for form, (group, cuts) in shown.items()
    ]


def segment(word: str, encoding: tiktoken.Encoding) -> str:
    """The tokens of a word after a space, separated by bars: `data|frame`; `|data` if the space is its own token."""
    pieces = encoding.decode_tokens_bytes(encoding.encode_ordinary(" " + word))
    return "|".join(piece.decode("utf-8", errors="backslashreplace") for piece in pieces).removeprefix(" ")
