"""How the size of a BPE vocabulary changes the segmentation of words, the length of documents and the cost of training.

Vocabularies are trained on the training split and measured on held-out text (validation and test splits), beside
GPT-2's own, which was trained on WebText.
"""

import json
import math
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import tiktoken
from pydantic import PositiveInt, model_validator

from gpt2.data.vocabulary import SUFFIX
from gpt2.model.config import ModelShape
from gpt2.model.flops import training_flops_per_token
from gpt2.pipeline.files import UserError
from gpt2.prepare.corpus import read_split
from gpt2.tokenizer.bpe import VocabularyConfig, read_training_text, take
from gpt2.tokenizer.encodings import MIN_VOCAB_SIZE, load_encoding, ranked_tokens, read_encoding
from gpt2.tokenizer_study.words import GROUPS, WordCounts, WordRules, band_words, count_words, group_words, words

# Best correlated with translation quality (Zouhar et al. 2023, "Tokenization and the noiseless channel").
RENYI_ALPHA = 2.5
# Shorter words are seldom cut.
EXAMPLE_MIN_LETTERS = 6
EXAMPLE_WAYS = 3
LOGIT_BYTES = 4


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
    """Documents that vocabularies are trained on and held-out ones, words of the former counted by the rules' forms, of
    the latter by written forms, and the groups of the latter."""

    training: list[str]
    held_out: list[str]
    counts: WordCounts
    occurrences: Counter[str]
    groups: dict[str, Counter[str]]


@dataclass(frozen=True)
class Study:
    """Results: flat `metrics`, a row of `vocabularies` for each vocabulary, of `bands` for each vocabulary and band of
    frequency, of `examples` for each word, and measured `speed`."""

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
    held_out = [
        text for split in ("val", "test") for text in take(read_split(corpus, split), config.held_out_bytes, key)
    ]
    counts = count_words(training)
    occurrences = Counter(word for text in held_out for word in words(text))
    return StudyText(training, held_out, counts, occurrences, group_words(occurrences, counts, config))


def train_apart(
    vocab_sizes: Sequence[int], vocabulary: VocabularyConfig, corpus: Path
) -> tuple[list[tiktoken.Encoding], dict[str, float]]:
    """Each vocabulary trained by itself, in a process of its own; and the seconds and the memory that it took.

    One would do, since a smaller vocabulary is the beginning of a larger one; that it is, is asserted. Raises UserError
    if the training text is too small for one of them.
    """
    encodings: list[tiktoken.Encoding] = []
    speed: dict[str, float] = {}
    with TemporaryDirectory() as folder:
        for size in vocab_sizes:
            name = f"bpe_{size}"
            options = {"corpus": corpus, "size": size, "train_bytes": vocabulary.train_bytes, "out": folder}
            told = _run("gpt2.tokenizer.bpe", *(f"--{key}={value}" for key, value in options.items()))
            speed |= {f"{name}_train_{key}": value for key, value in json.loads(told).items()}
            encodings.append(read_encoding(Path(folder, f"{name}{SUFFIX}")))
    largest = ranked_tokens(encodings[-1])
    assert all(ranked_tokens(encoding) == largest[: encoding.n_vocab - 1] for encoding in encodings), (
        "not its beginning"
    )
    return encodings, speed


def _run(module: str, *arguments: str) -> str:
    """What a module of this project writes, run by itself. Raises UserError with its last words if it fails."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-m", module, *arguments]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True)
    if ended.returncode:
        raise UserError(ended.stderr.strip().removeprefix(f"{module.rpartition('.')[2]}: "))
    return ended.stdout


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
    return Study(metrics, rows, bands, segment_examples(text.groups, encodings, config.n_examples), speed)


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
    """Mean tokens of a word over its occurrences and over distinct written forms (`type`), and the shares of the
    occurrences that are one token, and three or more.

    `occurrences` counts words as `words` returns them: the space before a word belongs to it.
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
    """Segmentations of `n_examples` words, an equal share of each group, as they stand after a space.

    A group's written forms of at least EXAMPLE_MIN_LETTERS are ordered by falling held-out count and taken at even
    distances: of those that the vocabularies cut in EXAMPLE_WAYS ways or more as long as these suffice, for the others
    show little. A form shown for one group is left out of the next.
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
    """The tokens of a word after a space, with bars between: `data|frame`; `|data` if the space is a token alone."""
    pieces = encoding.decode_tokens_bytes(encoding.encode_ordinary(" " + word))
    return "|".join(piece.decode("utf-8", errors="backslashreplace") for piece in pieces).removeprefix(" ")
