"""Token files: uint16 shards behind the 1 KiB header of llm.c, and the manifest of a split.

A folder holds for each split `<split>_00000.bin`, … and `<split>.json`, written last. The header is 256 int32: magic,
version, number of tokens, vocabulary size (zero in llm.c's own files), the rest zero.

Whoever opens a split has the number of tokens of every shard checked against header and file size. The SHA-256 is
checked at the first read from a shard. That a large one has passed is remembered in scratch, under what DVC too takes
for the identity of a file: device, inode, size and time of change. So the 20 GB of ten billion tokens are hashed once
for each copy of them and not by every process that reads them.
"""

import hashlib
import os
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from io import BufferedReader
from pathlib import Path

import numpy as np

from gpt2.pipeline.files import UserError, atomic_path, read_json, write_json
from gpt2.pipeline.scratch import scratch_root

MAGIC, VERSION = 20240520, 1
HEADER_BYTES = 4 * 256
MAX_VOCAB_SIZE = 2**16
# From this size on a checked file is remembered; a smaller one is hashed in less time than a tenth of a second.
REMEMBERED_BYTES = 2**26
# Tokens counted at a time, as int64.
COUNT_CHUNK = 2**18
REMEDY = "run `dvc repro -f tokenize`"


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
        """Open every shard and check its size. Raises UserError on an absent, cut, foreign or overlong file."""
        manifest = read_json(folder / f"{split}.json")
        self.vocabulary = Vocabulary(**manifest["vocabulary"])
        self.n_bytes: int = manifest["bytes"]
        self.n_documents: int = manifest["documents"]
        self.unigram_entropy: float = manifest["unigram_entropy"]
        counts = {name: shard["tokens"] for name, shard in manifest["shards"].items()}
        self._files = [_open_shard(folder / name, n, self.vocabulary) for name, n in counts.items()]
        self._unchecked = {number: shard["sha256"] for number, shard in enumerate(manifest["shards"].values())}
        self._ends = np.cumsum(list(counts.values()))
        self.n_tokens = int(self._ends[-1])
        self.path = folder / split

    def read(self, start: int, count: int) -> np.ndarray:
        """Tokens start … start + count - 1 as uint16, across shard ends.

        Raises UserError past the end, or if a shard has not the digest of the manifest.
        """
        if not 0 <= start <= start + count <= self.n_tokens:
            raise UserError(f"{self.path}: tokens {start} to {start + count} asked, it holds {self.n_tokens}")
        out = np.empty(count, dtype=np.uint16)
        filled = 0
        while filled < count:
            position = start + filled
            shard = int(np.searchsorted(self._ends, position, side="right"))
            if shard in self._unchecked:
                _check_digest(self._files[shard], self._unchecked[shard])
                del self._unchecked[shard]
            part = out[filled : filled + int(self._ends[shard]) - position]
            begin = int(self._ends[shard - 1]) if shard else 0
            # Positioned reads rather than a memory map: the resident set stays flat over many passes.
            os.preadv(self._files[shard].fileno(), [part.data], HEADER_BYTES + 2 * (position - begin))
            filled += len(part)
        return out


@dataclass(frozen=True)
class Piece:
    """Some documents in a row: their token ids, their number and the UTF-8 bytes of their text."""

    tokens: np.ndarray
    documents: int
    n_bytes: int


class ShardWriter:
    """Writes a split piece by piece in shards of `shard_tokens` tokens, each of them whole or not at all.

    A piece may span shards. With a `record`, a file outside the folder, a writer goes on after the shards that an
    earlier one finished before it was killed, as far as their content still has the recorded digests; the first
    `pieces` pieces of the sequence, which must be the same one, need not be added again. All else that an earlier
    writer left for the split goes first. The manifest comes last, so a folder cut off in the middle is not readable.

    A thread hashes and writes a shard while the next one fills, so memory holds two. Raises UserError if the ids do not
    fit uint16, no token arrives or the disk does not take a file.
    """

    def __init__(self, folder: Path, split: str, vocabulary: Vocabulary, shard_tokens: int, record: Path | None = None):
        if vocabulary.vocab_size > MAX_VOCAB_SIZE:
            raise UserError(
                f"encoding {vocabulary.encoding} has {vocabulary.vocab_size} ids; uint16 shards hold {MAX_VOCAB_SIZE}"
            )
        self._folder, self._split, self._vocabulary, self._record = folder, split, vocabulary, record
        self._counts = np.zeros(vocabulary.vocab_size, dtype=np.int64)
        # By name: tokens, digest, and where the writer stood behind the shard.
        self._finished: dict[str, dict] = {}
        folder.mkdir(parents=True, exist_ok=True)
        if record and record.is_file():
            self._take_up(read_json(record))
        for path in [folder / f"{split}.json", *folder.glob(f"{split}_*.bin")]:
            if path.name not in self._finished:
                path.unlink(missing_ok=True)
        behind = next(reversed(self._finished.values()), {"pieces": 0, "offset": 0, "documents": 0, "bytes": 0})
        self.pieces, self.documents, self.n_bytes = behind["pieces"], behind["documents"], behind["bytes"]
        # Tokens of the next piece that are in finished shards.
        self._offset: int = behind["offset"]
        self._shard, self._filled = np.empty(shard_tokens, dtype=np.uint16), 0
        self._thread = ThreadPoolExecutor(1)
        self._writing: Future | None = None

    @property
    def finished_shards(self) -> int:
        """Number of shards that need not be written again."""
        return len(self._finished)

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, *_) -> None:
        self._thread.shutdown()

    def add(self, piece: Piece) -> None:
        """Append the next piece."""
        while self._offset < len(piece.tokens):
            part = piece.tokens[self._offset : self._offset + len(self._shard) - self._filled]
            self._shard[self._filled : self._filled + len(part)] = part
            self._filled += len(part)
            self._offset += len(part)
            if self._filled == len(self._shard):
                self._finish_shard()
        self.pieces, self._offset = self.pieces + 1, 0
        self.documents += piece.documents
        self.n_bytes += piece.n_bytes

    def close(self) -> None:
        """Write the last shard and the manifest."""
        if self._filled:
            self._finish_shard()
        self._wait()
        if not self._finished:
            raise UserError(f"{self._folder}: the split {self._split} has no tokens; give prepare more documents")
        p = self._counts[self._counts > 0] / self._counts.sum()
        shards = {name: {key: shard[key] for key in ("tokens", "sha256")} for name, shard in self._finished.items()}
        manifest = {
            "documents": self.documents,
            "bytes": self.n_bytes,
            "unigram_entropy": float(-(p * np.log(p)).sum()),
            "shards": shards,
            "vocabulary": asdict(self._vocabulary),
        }
        write_json(self._folder / f"{self._split}.json", manifest)

    def _take_up(self, shards: dict[str, dict]) -> None:
        """Count the recorded shards up to the first that is not what it was."""
        for name, shard in shards.items():
            path = self._folder / name
            content = path.read_bytes() if path.is_file() else b""
            if hashlib.sha256(content).hexdigest() != shard["sha256"]:
                return
            self._count(np.frombuffer(content, dtype="<u2", offset=HEADER_BYTES))
            self._finished[name] = shard

    def _finish_shard(self) -> None:
        """Hand the shard to the thread, once it has written the one before."""
        self._wait()
        behind = {
            "pieces": self.pieces, "offset": self._offset, "documents": self.documents, "bytes": self.n_bytes
        }  # fmt: skip
        self._writing = self._thread.submit(self._write, self._shard[: self._filled], behind)
        self._shard, self._filled = np.empty_like(self._shard), 0

    def _wait(self) -> None:
        if self._writing:
            self._writing.result()

    def _write(self, tokens: np.ndarray, behind: dict[str, int]) -> None:
        path = self._folder / f"{self._split}_{len(self._finished):05d}.bin"
        try:
            digest = _write_shard(path, tokens, self._vocabulary.vocab_size)
            self._count(tokens)
            self._finished[path.name] = {"tokens": len(tokens), "sha256": digest, **behind}
            if self._record:
                write_json(self._record, self._finished)
        except OSError as error:
            raise UserError(
                f"{path} cannot be written ({error}); it needs {(HEADER_BYTES + tokens.nbytes) / 1e6:,.1f} MB: make "
                "room and run dvc repro, which goes on after the last whole shard"
            ) from error

    def _count(self, tokens: np.ndarray) -> None:
        for start in range(0, len(tokens), COUNT_CHUNK):
            self._counts += np.bincount(tokens[start : start + COUNT_CHUNK], minlength=len(self._counts))


def write_split(
    folder: Path, split: str, documents: Iterable[tuple[np.ndarray, int]], vocabulary: Vocabulary, shard_tokens: int
) -> None:
    """Write documents, pairs of token ids and UTF-8 bytes of their text, in place of what stands there for the split.

    Raises UserError as ShardWriter does.
    """
    with ShardWriter(folder, split, vocabulary, shard_tokens) as writer:
        for tokens, n_bytes in documents:
            writer.add(Piece(tokens, 1, n_bytes))
        writer.close()


def _write_shard(path: Path, tokens: np.ndarray, vocab_size: int) -> str:
    """Write one shard; return the SHA-256 of its content."""
    header = np.zeros(HEADER_BYTES // 4, dtype="<i4")
    header[:4] = MAGIC, VERSION, len(tokens), vocab_size
    digest = hashlib.sha256()
    with atomic_path(path) as temporary, open(temporary, "wb") as out:
        for part in (header.data, tokens.astype("<u2", copy=False).data):
            digest.update(part)
            out.write(part)
    with open(path, "rb") as file:
        _remember(file, digest.hexdigest())
    return digest.hexdigest()


def _check_digest(file: BufferedReader, expected: str) -> None:
    """Compare the content with its digest, unless this file has passed before."""
    if _mark(file, expected).exists():
        return
    file.seek(0)
    if (found := hashlib.file_digest(file, "sha256").hexdigest()) != expected:
        raise UserError(
            f"{file.name} has sha256 {found[:8]}…, the manifest says {expected[:8]}…: it was altered or damaged; "
            f"{REMEDY}"
        )
    _remember(file, expected)


def _remember(file: BufferedReader, digest: str) -> None:
    """Note that the file has its digest."""
    mark = _mark(file, digest)
    if os.fstat(file.fileno()).st_size >= REMEMBERED_BYTES:
        # Where scratch cannot be written, the next reader checks again.
        with suppress(OSError):
            mark.parent.mkdir(parents=True, exist_ok=True)
            mark.touch()


def _mark(file: BufferedReader, digest: str) -> Path:
    """The empty file that stands for: this file, as it is now, has this digest."""
    stat = os.fstat(file.fileno())
    identity = f"{stat.st_dev} {stat.st_ino} {stat.st_size} {stat.st_mtime_ns} {digest}"
    return scratch_root() / "checked" / hashlib.sha256(identity.encode()).hexdigest()[:32]


def _open_shard(path: Path, n_tokens: int, vocabulary: Vocabulary) -> BufferedReader:
    if not path.is_file():
        raise UserError(f"{path} is listed in the manifest and absent; {REMEDY}")
    size = path.stat().st_size
    if size < HEADER_BYTES:
        raise UserError(f"{path} has {size} bytes, less than the header of {HEADER_BYTES}; {REMEDY}")
    file = open(path, "rb")  # noqa: SIM115 (kept open for positioned reads while the TokenSet lives)
    magic, version, count, vocab_size = np.frombuffer(file.read(16), dtype="<i4").tolist()
    if (magic, version) != (MAGIC, VERSION):
        raise UserError(
            f"{path} begins with {magic}, {version}; a token shard begins with {MAGIC}, {VERSION}; {REMEDY}"
        )
    if count != n_tokens or size != HEADER_BYTES + 2 * count:
        raise UserError(
            f"{path} holds {(size - HEADER_BYTES) // 2} tokens, its header says {count}, "
            f"the manifest {n_tokens}; {REMEDY}"
        )
    if vocab_size not in (0, vocabulary.vocab_size):
        raise UserError(f"{path} was written for {vocab_size} ids, the manifest says {vocabulary.vocab_size}; {REMEDY}")
    return file
