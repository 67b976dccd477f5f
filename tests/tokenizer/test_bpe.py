"""Trained vocabularies: the same in both libraries, whatever the order, the threads and the size asked for."""

import os
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gpt2.pipeline.files import UserError
from gpt2.tokenizer.bpe import (
    VocabularyConfig,
    byte_of_character,
    encoding_for,
    take,
    train_encodings,
    train_tokenizer,
    trained_tokens,
)
from tests.closure import ROOT

SIZES = (300, 600, 2000)


@pytest.fixture(scope="module")
def texts() -> list[str]:
    """NumPy's docstrings, about 1 MB."""
    return [value.__doc__ for _, value in sorted(vars(np).items()) if isinstance(value.__doc__, str)]


@pytest.fixture(scope="module")
def encodings(texts):
    return train_encodings(texts[::2], SIZES)


def test_ids_are_bytes_then_merges_then_end_of_text(encodings):
    for size, encoding in zip(SIZES, encodings, strict=True):
        assert (encoding.name, encoding.n_vocab, encoding.eot_token) == (f"bpe_{size}", size, size - 1)
        assert {encoding.decode_single_token_bytes(i) for i in range(256)} == {bytes([b]) for b in range(256)}


@pytest.mark.parametrize(
    "text", ["", " ", "naïve 東京 🙂\r\n\t x_1  y", "it's  we'll\n\n\n", "\x00\x7f\xad a", "a" * 999]
)
def test_round_trip(encodings, text):
    for encoding in encodings:
        assert encoding.decode(encoding.encode_ordinary(text)) == text


def test_smaller_vocabulary_is_a_prefix_and_tiktoken_encodes_like_tokenizers(texts, encodings):
    for size, encoding in zip(SIZES, encodings, strict=True):
        alone = train_tokenizer(texts[::2], size - 1)
        assert trained_tokens(alone) == [encoding.decode_single_token_bytes(i) for i in range(size - 1)]
        for text in texts:
            assert encoding.encode_ordinary(text) == alone.encode(text).ids


def test_order_of_texts_does_not_matter(texts, encodings):
    (again,) = train_encodings(texts[::2][::-1], SIZES[-1:])
    assert again.token_byte_values() == encodings[-1].token_byte_values()
    assert again.encode_ordinary(texts[1]) == encodings[-1].encode_ordinary(texts[1])


def test_number_of_threads_does_not_matter():
    program = (
        "import hashlib, numpy as np\n"
        "from gpt2.tokenizer.bpe import train_tokenizer, trained_tokens\n"
        "texts = [v.__doc__ for _, v in sorted(vars(np).items()) if isinstance(v.__doc__, str)]\n"
        "print(hashlib.sha256(repr(trained_tokens(train_tokenizer(texts, 3000))).encode()).hexdigest())\n"
    )
    settings = [{"RAYON_NUM_THREADS": "1"}, {"RAYON_NUM_THREADS": "4"}, {"TOKENIZERS_PARALLELISM": "false"}]
    digests = {
        subprocess.run(
            [sys.executable, "-c", program], env={**os.environ, **extra}, cwd=ROOT, capture_output=True, check=True
        ).stdout
        for extra in settings
    }
    assert len(digests) == 1


def test_first_merge_is_the_most_frequent_pair():
    (encoding,) = train_encodings(["abab abab xyz"], [258])
    assert encoding.decode_single_token_bytes(256) == b"ab"


def test_byte_characters_are_those_of_gpt2s_file():
    characters = byte_of_character()
    assert sorted(characters.values()) == list(range(256))
    assert (characters["Ġ"], characters["Ċ"], characters["a"], characters["é"]) == (ord(" "), ord("\n"), ord("a"), 0xE9)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ([257, 300], r"300 tokens is more than the 25\d that 1 documents .*vocabulary\.train_bytes"),
        ([256], r"vocabulary of 256 tokens lacks some of the 256 bytes and end-of-text"),
    ],
)
def test_sizes_that_the_text_cannot_give_are_refused(sizes, message):
    with pytest.raises(UserError, match=message):
        train_encodings(["one two"], sizes)


def test_take_stops_before_the_limit():
    assert take(["é", "ab", "c"], 4, "key") == ["é", "ab"]
    with pytest.raises(UserError, match="key=1: the first document has more bytes"):
        take(["é"], 1, "key")


def test_a_vocabulary_by_name_is_that_of_the_study(texts, encodings, tmp_path):
    folder = tmp_path / "train"
    folder.mkdir()
    pq.write_table(pa.table({"text": texts[::2], "id": texts[::2]}), folder / "00000.parquet")
    config = VocabularyConfig(train_bytes=10**7)
    for expected in encodings:
        alone = encoding_for(expected.name, tmp_path, config)
        assert alone.name == expected.name and alone.token_byte_values() == expected.token_byte_values()
    assert encoding_for("gpt2", tmp_path, config).name == "gpt2"
    with pytest.raises(UserError, match=r"vocabulary\.train_bytes=1: the first document has more bytes"):
        encoding_for("bpe_300", tmp_path, VocabularyConfig(train_bytes=1))
