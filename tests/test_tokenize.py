"""Token files hold every document of the corpus in order, each behind an end-of-text token."""

import numpy as np
import pytest

from gpt2 import corpus, tokenize
from gpt2.corpus import Document, new_corpus
from gpt2.files import UserError
from gpt2.shards import TokenSet
from gpt2.tokenize import SPLITS, tokenize_corpus
from gpt2.tokenizer import load_encoding

TEXTS = {
    "train": [f"document {i} of many, naïve 漢字 🙂" + " and more" * (i % 7) for i in range(23)],
    "val": ["a single one"],
    "test": ["<|endoftext|> as text", "line\n\nends", "x"],
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A corpus of several Parquet files, read in batches smaller than a file."""
    monkeypatch.setattr(corpus, "FILE_DOCUMENTS", 10)
    monkeypatch.setattr(corpus, "ROW_GROUP_DOCUMENTS", 4)
    monkeypatch.setattr(tokenize, "BATCH", 3)
    with new_corpus(tmp_path / "corpus") as writers:
        for split, texts in TEXTS.items():
            for i, text in enumerate(texts):
                writers[split].add(Document(text, str(i)))
    return tmp_path


def test_each_document_stands_behind_an_end_of_text_token_in_the_order_of_the_corpus(folder):
    encoding = load_encoding()
    tokenize_corpus(folder / "corpus", folder / "tokens", encoding, shard_tokens=50, threads=2)
    for split in SPLITS:
        tokens = TokenSet(folder / "tokens", split)
        expected = [id_ for text in TEXTS[split] for id_ in (50256, *encoding.encode_ordinary(text))]
        assert tokens.read(0, tokens.n_tokens).tolist() == expected
        assert tokens.n_documents == len(TEXTS[split])
        assert tokens.n_bytes == sum(len(text.encode("utf-8")) for text in TEXTS[split])
        assert (tokens.vocabulary.encoding, tokens.vocabulary.vocab_size) == ("gpt2", 50257)
        assert tokens.vocabulary.eot_token == 50256


def test_figures_count_tokens_with_separators_and_bytes_of_text(folder):
    encoding = load_encoding()
    figures = tokenize_corpus(folder / "corpus", folder / "tokens", encoding, shard_tokens=50, threads=1)
    n_bytes = n_tokens = 0
    for split, texts in TEXTS.items():
        count = sum(1 + len(encoding.encode_ordinary(text)) for text in texts)
        assert figures.pop(f"tokens_{split}") == count
        assert figures.pop(f"documents_{split}") == len(texts)
        n_tokens += count
        n_bytes += sum(len(text.encode("utf-8")) for text in texts)
    assert figures == {"vocab_size": 50257, "bytes_per_token": pytest.approx(n_bytes / n_tokens, rel=1e-12)}


def test_the_number_of_threads_changes_nothing(folder):
    written = []
    for threads in (1, 2):
        out = folder / f"tokens_{threads}"
        figures = tokenize_corpus(folder / "corpus", out, load_encoding(), shard_tokens=50, threads=threads)
        written.append((figures, {path.name: path.read_bytes() for path in out.iterdir()}))
    assert written[0] == written[1]
    # Three manifests, and shards of 50 tokens.
    assert len(written[0][1]) == 3 + sum(int(np.ceil(written[0][0][f"tokens_{split}"] / 50)) for split in SPLITS)


def test_a_split_without_files_is_refused(folder):
    for file in (folder / "corpus" / "val").iterdir():
        file.unlink()
    with pytest.raises(UserError, match=r"corpus/val holds no Parquet file; run `dvc repro prepare`"):
        tokenize_corpus(folder / "corpus", folder / "tokens", load_encoding(), shard_tokens=50, threads=1)
