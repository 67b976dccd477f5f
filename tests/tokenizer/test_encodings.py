"""The encoding is GPT-2's to the token, comes from an installed package, and is never downloaded."""

import importlib.util
import shutil
import socket
import tempfile
from pathlib import Path

import pytest
from tiktoken.load import load_tiktoken_bpe
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from gpt2.data.vocabulary import copy_vocabulary, find_vocabulary
from gpt2.pipeline.files import UserError
from gpt2.tokenizer import encodings as tokenizer
from gpt2.tokenizer.encodings import END_OF_TEXT, encoding_of, load_encoding, make_encoding, write_encoding

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


def test_an_encoding_without_a_file_of_its_own_is_refused_by_its_name():
    with pytest.raises(UserError, match=r"encoding 'cl100k_base': only gpt2 can be loaded by its name$"):
        load_encoding("cl100k_base")
    with pytest.raises(UserError, match=r"'bpe_8192': .*; bpe_8192 is read from a folder of tokens or of a model"):
        load_encoding("bpe_8192")


# Trained vocabularies as files


TOKENS = [bytes([byte]) for byte in range(256)] + [b"an", b"\xe6\xbc", b" an", b"\n\n"]


@pytest.fixture
def trained(tmp_path) -> Path:
    """A folder with a vocabulary."""
    write_encoding(make_encoding("bpe_261", TOKENS), tmp_path)
    return tmp_path


@pytest.mark.parametrize("text", [*ODD_TEXTS, "banana an ant\n\n"])
def test_a_vocabulary_is_read_as_it_was_written(trained, text):
    encoding, expected = encoding_of(trained), make_encoding("bpe_261", TOKENS)
    assert (encoding.name, encoding.n_vocab, encoding.eot_token) == ("bpe_261", 261, 260)
    assert encoding.encode_ordinary(text) == expected.encode_ordinary(text)
    assert encoding.decode(encoding.encode_ordinary(text)) == text


def test_a_vocabulary_file_is_one_of_tiktokens(trained):
    ranks = load_tiktoken_bpe(str(trained / "bpe_261.tiktoken"))
    assert ranks == {token: rank for rank, token in enumerate(TOKENS)}


def test_a_folder_without_a_vocabulary_has_gpt2s(tmp_path):
    assert encoding_of(tmp_path) is load_encoding()
    write_encoding(load_encoding(), tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (lambda text: text.replace("YW4= 256", "YW4= 257"), "260 lines that are not the tokens of bpe_261"),
        (lambda text: text.replace("AA== 0\n", ""), "259 lines"),
        (lambda text: text[: len(text) // 2], "no vocabulary|lines that are not"),
        (lambda text: text.replace("YW4=", "AA=="), "260 lines that are not"),
        (lambda text: "naïve", "is no vocabulary in tiktoken's format"),
        (lambda text: "a b c", "is no vocabulary in tiktoken's format"),
    ],
    ids=["rank", "line", "half", "twice", "letters", "columns"],
)
def test_a_damaged_vocabulary_is_refused(trained, damage, told):
    path = trained / "bpe_261.tiktoken"
    path.write_text(damage(path.read_text()))
    with pytest.raises(UserError, match=rf"bpe_261\.tiktoken .*({told}).*run the stage that made it"):
        encoding_of(trained)


def test_a_copied_vocabulary_replaces_the_one_that_was_there(trained, tmp_path):
    model, bare = tmp_path / "model", tmp_path / "bare"
    bare.mkdir()
    copy_vocabulary(trained, model)
    assert find_vocabulary(model).read_bytes() == find_vocabulary(trained).read_bytes()
    write_encoding(make_encoding("bpe_260", TOKENS[:-1]), model)
    with pytest.raises(
        UserError, match=r"the vocabularies bpe_260\.tiktoken, bpe_261\.tiktoken, of which one is its own"
    ):
        encoding_of(model)
    copy_vocabulary(trained, model)
    assert [path.name for path in model.iterdir()] == ["bpe_261.tiktoken"]
    copy_vocabulary(bare, model)
    assert list(model.iterdir()) == []
