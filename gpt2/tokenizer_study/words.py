"""Words of a text and the groups whose segmentation is studied: rare, compound and technical words.

A word is a run of letters that GPT-2's pattern keeps together, written with the space before it if there is one
(` DataFrame`, `keepdims`). BPE never joins two such pieces, so the tokens of a word do not depend on its surroundings;
`snake_case` and `dotted.names` are several words. (Where a quotation mark opens a line, GPT-2's rule for contractions
takes the first letter of `'mean'` or `'the'`; the rest counts as a word, as it does to the vocabularies.) Counts,
lengths and group membership go by the lower-case word without its space, so that ` DataFrame` and `dataframe` are one
word to the rules.
"""

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import regex
from pydantic import NonNegativeFloat, PositiveInt

from gpt2.pipeline.files import UserError
from gpt2.pipeline.params import Config
from gpt2.tokenizer.encodings import PATTERN

GROUPS = ("rare", "compound", "technical")
# Bands of frequency, from very frequent to words that occur once (hapax) and never: occurrences in the training text,
# at least so many.
BANDS = {
    "10,000 or more": 10_000,
    "1,000 to 9,999": 1_000,
    "100 to 999": 100,
    "10 to 99": 10,
    "2 to 9": 2,
    "once": 1,
    "never": 0,
}
# One and two letters are mostly names of variables (x, df).
TECHNICAL_MIN_LETTERS = 3
_PIECE = regex.compile(PATTERN)


class WordRules(Config):
    """Which words are rare, compound or technical. A word may belong to several groups.

    rare: occurs in the training text, at most rare_max_count times.
    compound: has at least compound_min_letters and is a chain of two or more words (`multi|index`), each of at least
    compound_part_min_letters and seen at least compound_part_min_count times in the training text. Koehn & Knight
    (2003, "Empirical methods for compound splitting") also keep whole what is more frequent than its parts; that
    would lose `dataframe`.
    technical: seen at least technical_min_count times, in so few documents that its residual inverse document
    frequency is at least technical_min_residual_idf bits; see `residual_idf`. The rule needs neither a list of general
    English nor markup. GPT-2's own vocabulary would tell general English too, but the study compares it.
    """

    rare_max_count: PositiveInt
    compound_min_letters: PositiveInt
    compound_part_min_letters: PositiveInt
    compound_part_min_count: PositiveInt
    technical_min_count: PositiveInt
    technical_min_residual_idf: NonNegativeFloat


@dataclass(frozen=True)
class WordCounts:
    """Occurrences of each lower-case word and the number of documents that hold it."""

    occurrences: Counter[str]
    documents: Counter[str]
    n_documents: int


def words(text: str) -> list[str]:
    """The words of a text in order, each with the space before it if there is one."""
    return [piece for piece in _PIECE.findall(text) if piece.lstrip(" ").isalpha()]


def plain(word: str) -> str:
    """The word as the rules see it: lower case, without the space before it."""
    return word.lstrip(" ").lower()


def count_words(texts: Iterable[str]) -> WordCounts:
    """Count the words of documents."""
    occurrences: Counter[str] = Counter()
    documents: Counter[str] = Counter()
    n_documents = 0
    for text in texts:
        here = Counter(map(plain, words(text)))
        occurrences.update(here)
        documents.update(here.keys())
        n_documents += 1
    return WordCounts(occurrences, documents, n_documents)


def residual_idf(word: str, counts: WordCounts) -> float:
    """Bits by which a word is found in fewer documents than if its occurrences fell at random.

    log2(N / documents with the word) - log2(1 / (1 - exp(-occurrences / N))), the second term being what a Poisson
    distribution predicts (Church & Gale 1995, "Inverse document frequency: a measure of deviations from Poisson").
    Function words fall evenly and stay near 0; terms of a subject gather in its documents. `word` must occur.
    """
    expected = -math.expm1(-counts.occurrences[word] / counts.n_documents)
    return math.log2(counts.n_documents * expected / counts.documents[word])


def split_compound(word: str, known: Mapping[str, int], rules: WordRules) -> tuple[str, ...]:
    """The two or more words that `word` is a chain of, longest first part preferred; () if it is no compound.

    `known` are the occurrences of words in the training text.
    """
    length, least = len(word), rules.compound_part_min_letters
    if length < rules.compound_min_letters:
        return ()
    # Parts of word[start:] for every start from which a chain reaches the end.
    chains: dict[int, tuple[str, ...]] = {length: ()}
    for start in range(length - least, -1, -1):
        for end in range(length if start else length - least, start + least - 1, -1):
            if end in chains and known.get(word[start:end], 0) >= rules.compound_part_min_count:
                chains[start] = (word[start:end], *chains[end])
                break
    return chains.get(0, ())


def is_rare(word: str, counts: WordCounts, rules: WordRules) -> bool:
    return 1 <= counts.occurrences[word] <= rules.rare_max_count


def is_compound(word: str, counts: WordCounts, rules: WordRules) -> bool:
    return bool(split_compound(word, counts.occurrences, rules))


def is_technical(word: str, counts: WordCounts, rules: WordRules) -> bool:
    return (
        len(word) >= TECHNICAL_MIN_LETTERS
        and counts.occurrences[word] >= rules.technical_min_count
        and residual_idf(word, counts) >= rules.technical_min_residual_idf
    )


def group_words(held_out: Counter[str], counts: WordCounts, rules: WordRules) -> dict[str, Counter[str]]:
    """Sort held-out words, with their occurrences, into GROUPS by their counts in the training text.

    Raises UserError if a group is empty: a mean over no words is no result.
    """
    tests = dict(zip(GROUPS, (is_rare, is_compound, is_technical), strict=True))
    groups = {
        name: Counter({word: n for word, n in held_out.items() if belongs(plain(word), counts, rules)})
        for name, belongs in tests.items()
    }
    for name, members in groups.items():
        if not members:
            given = ", ".join(f"{key}={value}" for key, value in rules if key.startswith(name))
            raise UserError(
                f"tokenizer_study: none of {len(held_out)} held-out words is {name} under {given}; "
                "loosen the rule in params.yaml or raise train_bytes and held_out_bytes"
            )
    return groups


def band_words(held_out: Counter[str], counts: WordCounts) -> dict[str, Counter[str]]:
    """Held-out words, with their occurrences, by BANDS of frequency in the training text; empty bands are left out."""
    bands: dict[str, Counter[str]] = {name: Counter() for name in BANDS}
    for word, n in held_out.items():
        seen = counts.occurrences[plain(word)]
        bands[next(name for name, least in BANDS.items() if seen >= least)][word] = n
    return {name: members for name, members in bands.items() if members}
