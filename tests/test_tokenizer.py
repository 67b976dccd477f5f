"""The encoding is GPT-2's to the token, comes from an installed package, and is never downloaded."""

import importlib.util
import shutil
import socket
import tempfile
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from gpt2 import tokenizer
from gpt2.files import UserError
from gpt2.tokenizer import END_OF_TEXT, load_encoding

ODD_TEXTS = [
    "",
    " ",
    "\n\n\t \r\n",
    "   three spaces  before  and after   ",
    "don't we'll I'M they've it's 'sd",
    "3.14159 1,000,000 x2y ½ Ⅻ ٣",
    "ünïcode naïve café ß ﬁ \uff46\uff55\uff4c\uff4c",
    "漢字かな交じり文 한국어 العربية עברית हिन्दी",
    "👩‍👩‍👧‍👦 🏳️‍🌈 e\u0301 \u200b\u00a0\u3000\ufeff",
    "\x00\x07\x1b control",
    "def f(x):\n    return {'a': [x**2, -x]}  # _private__name\n",
    END_OF_TEXT,
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa" * 20,
]


@pytest.fixture
def package() -> Path:
    """Folder of the package that ships the vocabulary files."""
    return Path(importlib.util.find_spec(tokenizer.VOCABULARY_PACKAGE).submodule_search_locations[0])


def load_afresh():
    """Load from the files, whatever was loaded before."""
    return load_encoding.__wrapped__("gpt2")


def test_known_tokens_of_gpt2():
    encoding = load_encoding()
    assert encoding.encode_ordinary("Hello world") == [15496, 995]
    assert encoding.encode_ordinary("Hello, I'm a language model,") == [15496, 11, 314, 1101, 257, 3303, 2746, 11]
    assert (encoding.n_vocab, encoding.eot_token) == (50257, 50256)
    assert encoding.decode([50256]) == END_OF_TEXT
    # A byte outside ASCII, the first merge, the last one.
    assert [encoding.decode_single_token_bytes(i) for i in (94, 256, 50255)] == [b"\xa1", b" t", b" gazed"]


@pytest.mark.parametrize("text", ODD_TEXTS)
def test_every_text_returns_as_it_was(text):
    assert load_encoding().decode(load_encoding().encode_ordinary(text)) == text


def test_the_end_of_text_marker_in_a_document_is_ordinary_text():
    encoding = load_encoding()
    assert encoding.eot_token not in encoding.encode_ordinary(f"a {END_OF_TEXT} b")


def test_tokens_equal_those_of_the_tokenizers_library(package):
    reference = Tokenizer(models.BPE.from_file(str(package / "data/encoder.json"), str(package / "data/vocab.bpe")))
    reference.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    reference.decoder = decoders.ByteLevel()
    page = Path(tokenizer.__file__).read_text(encoding="utf-8")
    encoding = load_encoding()
    for text in [page, *ODD_TEXTS, "\n".join(ODD_TEXTS)]:
        assert encoding.encode_ordinary(text) == reference.encode(text).ids


def test_loading_opens_no_connection_and_leaves_no_cache(monkeypatch, tmp_path):
    def refuse(*args, **kwargs):
        raise AssertionError("the network was asked")

    for name in ("socket", "create_connection", "getaddrinfo"):
        monkeypatch.setattr(socket, name, refuse)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.delenv("TIKTOKEN_CACHE_DIR", raising=False)
    assert load_afresh().encode_ordinary("Hello world") == [15496, 995]
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def copied(package, tmp_path, monkeypatch) -> Path:
    """The data folder of a copy of the package, from which the encoding is loaded."""
    shutil.copytree(package / "data", tmp_path / "copied_vocabulary" / "data")
    (tmp_path / "copied_vocabulary" / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(tokenizer, "VOCABULARY_PACKAGE", "copied_vocabulary")
    return tmp_path / "copied_vocabulary" / "data"


def test_the_place_of_the_files_does_not_matter(copied):
    assert load_afresh().encode_ordinary("Hello world") == [15496, 995]


@pytest.mark.parametrize("name", ["vocab.bpe", "encoder.json"])
def test_an_altered_vocabulary_is_refused(copied, name):
    content = (copied / name).read_bytes()
    (copied / name).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(UserError, match=rf"{name} has sha256 \w{{8}}…, GPT-2's has \w{{8}}…; .*make setup"):
        load_afresh()


@pytest.mark.parametrize("name", ["vocab.bpe", "encoder.json"])
def test_an_absent_vocabulary_is_named(copied, name):
    (copied / name).unlink()
    with pytest.raises(UserError, match=rf"{name} does not exist; .*make setup"):
        load_afresh()


@pytest.mark.parametrize("package_name", ["no_such_package", "socket"])
def test_a_package_that_is_not_there_or_has_no_files_is_named(monkeypatch, package_name):
    monkeypatch.setattr(tokenizer, "VOCABULARY_PACKAGE", package_name)
    with pytest.raises(UserError, match=rf"the package {package_name}, which ships vocab\.bpe, is not installed"):
        load_afresh()


def test_an_unknown_encoding_is_refused_by_its_key():
    with pytest.raises(UserError, match=r"tokenize\.encoding = 'cl100k_base' must be one of gpt2"):
        load_encoding("cl100k_base")
