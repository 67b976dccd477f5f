"""Token files: uint16 shards behind the 1 KiB header of llm.c, and the manifest of a split.

A folder holds for each split `<split>_00000.bin`, … and `<split>.json`, written last. The header is 256 int32: magic,
version, number of tokens, vocabulary size (zero in llm.c's own files), the rest zero.
"""

import hashlib
import os
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from gpt2.files import UserError, atomic_path, read_json, write_json

MAGIC, VERSION = 20240520, 1
HEADER_BYTES = 4 * 256
MAX_VOCAB_SIZE = 2**16


@dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """What the ids of a token file mean."""

    encoding: str
    vocab_size: int
    eot_token: int


class TokenSet:
    """One split of a token folder, read as one stream over its shards.

    `n_tokens` counts ids with the end-of-text separators, `n_bytes` the UTF-8 bytes of the text, `n_documents` the
    documents; `vocabulary` says what the ids mean; `unigram_entropy` is the entropy in nats of the token frequencies,
    the loss of a model that knows nothing but them.
    """

    def __init__(self, folder: Path, split: str):
        """Open and validate every shard. Raises UserError on an absent, cut, foreign or overlong file."""
        manifest = read_json(folder / f"{split}.json")
        self.vocabulary = Vocabulary(**manifest["vocabulary"])
        self.n_bytes: int = manifest["bytes"]
        self.n_documents: int = manifest["documents"]
        self.unigram_entropy: float = manifest["unigram_entropy"]
        counts = {name: shard["tokens"] for name, shard in manifest["shards"].items()}
        self._files = [_open_shard(folder / name, n, self.vocabulary) for name, n in counts.items()]
        self._ends = np.cumsum(list(counts.values()))
        self.n_tokens = int(self._ends[-1])
        self.path = folder / split

    def read(self, start: int, count: int) -> np.ndarray:
        """Tokens start … start + count - 1 as uint16, across shard ends. Raises UserError past the end."""
        if not 0 <= start <= start + count <= self.n_tokens:
            raise UserError(f"{self.path}: tokens {start} to {start + count} asked, it holds {self.n_tokens}")
        out = np.empty(count, dtype=np.uint16)
        filled = 0
        while filled < count:
            position = start + filled
            shard = int(np.searchsorted(self._ends, position, side="right"))
            part = out[filled : filled + int(self._ends[shard]) - position]
            begin = int(self._ends[shard - 1]) if shard else 0
            # Positioned reads rather than a memory map: the resident set stays flat over many passes.
            os.preadv(self._files[shard].fileno(), [part], HEADER_BYTES + 2 * (position - begin))
            filled += len(part)
        return out


def write_split(
    folder: Path, split: str, documents: Iterable[tuple[np.ndarray, int]], vocabulary: Vocabulary, shard_tokens: int
) -> None:
    """Write documents, pairs of token ids and UTF-8 bytes of their text, in shards of `shard_tokens` tokens.

    A document may span shards. What an earlier run left for the split goes first, the manifest comes last, so a folder
    cut off in the middle is not readable. Raises UserError if the ids do not fit uint16 or no token arrives.
    """
    if vocabulary.vocab_size > MAX_VOCAB_SIZE:
        raise UserError(
            f"encoding {vocabulary.encoding} has {vocabulary.vocab_size} ids; uint16 shards hold {MAX_VOCAB_SIZE}"
        )
    folder.mkdir(parents=True, exist_ok=True)
    for stale in [folder / f"{split}.json", *folder.glob(f"{split}_*.bin")]:
        stale.unlink(missing_ok=True)
    totals: dict[str, float] = {"documents": 0, "bytes": 0}

    def counted() -> Iterator[np.ndarray]:
        for tokens, n_bytes in documents:
            totals["documents"] += 1
            totals["bytes"] += n_bytes
            yield tokens

    shards: dict[str, dict] = {}
    counts = np.zeros(vocabulary.vocab_size, dtype=np.int64)
    for tokens in _regroup(counted(), shard_tokens):
        name = f"{split}_{len(shards):05d}.bin"
        digest = _write_shard(folder / name, tokens, vocabulary.vocab_size)
        shards[name] = {"tokens": len(tokens), "sha256": digest}
        counts += np.bincount(tokens, minlength=vocabulary.vocab_size)
    if not shards:
        raise UserError(f"{folder}: the split {split} has no tokens; give prepare more documents")
    p = counts[counts > 0] / counts.sum()
    totals["unigram_entropy"] = float(-(p * np.log(p)).sum())
    write_json(folder / f"{split}.json", {**totals, "shards": shards, "vocabulary": asdict(vocabulary)})


def _regroup(arrays: Iterable[np.ndarray], size: int) -> Iterator[np.ndarray]:
    """Concatenate arrays and cut the stream into pieces of `size`; the last one may be shorter."""
    waiting: list[np.ndarray] = []
    n_waiting = 0
    for array in arrays:
        waiting.append(array)
        n_waiting += len(array)
        if n_waiting >= size:
            stream = np.concatenate(waiting)
            whole = len(stream) // size * size
            yield from stream[:whole].reshape(-1, size)
            waiting, n_waiting = [stream[whole:]], len(stream) - whole
    if n_waiting:
        yield np.concatenate(waiting)


def _write_shard(path: Path, tokens: np.ndarray, vocab_size: int) -> str:
    """Write one shard; return the SHA-256 of its content."""
    header = np.zeros(HEADER_BYTES // 4, dtype="<i4")
    header[:4] = MAGIC, VERSION, len(tokens), vocab_size
    with atomic_path(path) as temporary, open(temporary, "wb") as out:
        content = header.tobytes() + tokens.astype("<u2").tobytes()
        out.write(content)
    return hashlib.sha256(content).hexdigest()


def _open_shard(path: Path, n_tokens: int, vocabulary: Vocabulary):
    remedy = "run `dvc repro -f tokenize`"
    if not path.is_file():
        raise UserError(f"{path} is listed in the manifest and absent; {remedy}")
    size = path.stat().st_size
    if size < HEADER_BYTES:
        raise UserError(f"{path} has {size} bytes, less than the header of {HEADER_BYTES}; {remedy}")
    file = open(path, "rb")  # noqa: SIM115 (kept open for positioned reads while the TokenSet lives)
    magic, version, count, vocab_size = np.frombuffer(file.read(16), dtype="<i4").tolist()
    if (magic, version) != (MAGIC, VERSION):
        raise UserError(
            f"{path} begins with {magic}, {version}; a token shard begins with {MAGIC}, {VERSION}; {remedy}"
        )
    if count != n_tokens or size != HEADER_BYTES + 2 * count:
        raise UserError(
            f"{path} holds {(size - HEADER_BYTES) // 2} tokens, its header says {count}, "
            f"the manifest {n_tokens}; {remedy}"
        )
    if vocab_size not in (0, vocabulary.vocab_size):
        raise UserError(f"{path} was written for {vocab_size} ids, the manifest says {vocabulary.vocab_size}; {remedy}")
    return file
