"""The corpus as token files: every document behind an end-of-text token, in the order of the corpus.

Processes encode row groups, this one puts them in order and writes shards. A worker holds one row group and its tokens,
this process two shards and a few row groups of tokens a worker, however large the corpus is.
"""

import hashlib
import logging
import pickle
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from functools import partial
from itertools import islice
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import tiktoken
from pydantic import PositiveInt, field_validator
from tqdm import tqdm

from gpt2.data.shards import MAX_VOCAB_SIZE, Piece, ShardWriter, TokenSet, Vocabulary
from gpt2.pipeline.files import UserError
from gpt2.pipeline.interrupt import Interrupt
from gpt2.pipeline.params import Config
from gpt2.pipeline.quantities import show_size, show_time
from gpt2.pipeline.scratch import source_files
from gpt2.pipeline.workers import in_order
from gpt2.tokenizer.encode import REMEDY, RowGroup, encode_group
from gpt2.tokenizer.encodings import GPT2, MIN_VOCAB_SIZE, trained_size

SPLITS = ("train", "val", "test")
# The code that decides the token files: shards of other code are never taken up.
SOURCES = source_files("tokenizer", "data/shards.py", without=("tokenizer/contamination.py",))
# Text for which it pays to start a process: it is encoded in the time that the start takes.
PROCESS_BYTES = 2**23
LOG_SECONDS, CHECK_SECONDS = 30, 1
log = logging.getLogger(__name__)


class TokenizeConfig(Config):
    """Section `tokenize`."""

    # gpt2, or bpe_<size> of a vocabulary trained on the training split.
    encoding: str
    # Tokens of one shard file, two bytes each.
    shard_tokens: PositiveInt

    @field_validator("encoding")
    @classmethod
    def _known(cls, name: str) -> str:
        size = trained_size(name)
        if name != GPT2 and size is None:
            raise ValueError(f"must be {GPT2}, or bpe_N for a trained vocabulary of N tokens, such as bpe_8192")
        if size is not None and not MIN_VOCAB_SIZE <= size <= MAX_VOCAB_SIZE:
            raise ValueError(
                f"a vocabulary must have at least {MIN_VOCAB_SIZE} tokens, all bytes and end-of-text, and at most "
                f"{MAX_VOCAB_SIZE}, since token files are uint16"
            )
        return name


def token_identity(corpus: Path, encoding: tiktoken.Encoding, shard_tokens: int, threads: int) -> dict:
    """All that the token files depend on: two runs with the same identity write the same bytes.

    The files of the corpus count by their content, which `threads` threads hash, so a corpus that was copied or checked
    out again is known for what it is.
    """
    files = [file for split in SPLITS for file in _files(corpus / split)]
    log.info("hashing %d files, %s", len(files), show_size(sum(file.stat().st_size for file in files)))
    with ThreadPoolExecutor(threads) as pool:
        digests = dict(zip((str(file.relative_to(corpus)) for file in files), pool.map(_digest, files), strict=True))
    return {
        "corpus": digests,
        "encoding": hashlib.sha256(pickle.dumps(encoding)).hexdigest(),
        "tiktoken": tiktoken.__version__,
        "shard_tokens": shard_tokens,
    }


def tokenize_corpus(
    corpus: Path,
    folder: Path,
    encoding: tiktoken.Encoding,
    shard_tokens: int,
    workers: int,
    records: Path | None = None,
) -> dict[str, float]:
    """Write all splits of `corpus` to `folder`; return the figures of metrics/tokens.json.

    `bytes_per_token` is UTF-8 bytes of text over tokens, separators included, of all splits. The files do not depend on
    `workers`, the largest number of processes. With `records`, a folder, shards that a killed run of the same
    `token_identity` finished are kept. On SIGTERM, SIGINT or the death of DVC exits with 128 + the signal.
    """
    vocabulary = Vocabulary(encoding=encoding.name, vocab_size=encoding.n_vocab, eot_token=encoding.eot_token)
    with ExitStack() as stack:
        tasks: dict[str, list[RowGroup]] = {}
        writers: dict[str, ShardWriter] = {}
        for split in SPLITS:
            groups = _row_groups(corpus / split)
            record = records / f"{split}.json" if records else None
            writer = stack.enter_context(ShardWriter(folder, split, vocabulary, shard_tokens, record))
            if writer.finished_shards:
                log.info("%s: going on after %d finished shards", split, writer.finished_shards)
            writers[split], tasks[split] = writer, groups[writer.pieces :]
        every = [group for split in SPLITS for group in tasks[split]]
        processes = max(1, min(workers, sum(group.n_bytes for group in every) // PROCESS_BYTES))
        pieces = stack.enter_context(closing(in_order(partial(encode_group, encoding), every, processes)))
        watch = stack.enter_context(_Watch(sum(group.documents for group in every)))
        for split in SPLITS:
            for piece in islice(pieces, len(tasks[split])):
                writers[split].add(piece)
                watch.count(piece)
            writers[split].close()
    return _figures({split: TokenSet(folder, split) for split in SPLITS})


def _figures(splits: Mapping[str, TokenSet]) -> dict[str, float]:
    figures: dict[str, float] = {}
    for split, tokens in splits.items():
        figures["vocab_size"] = tokens.vocabulary.vocab_size
        figures[f"tokens_{split}"] = tokens.n_tokens
        figures[f"documents_{split}"] = tokens.n_documents
    n_tokens = sum(tokens.n_tokens for tokens in splits.values())
    figures["bytes_per_token"] = sum(tokens.n_bytes for tokens in splits.values()) / n_tokens
    return figures


def _files(folder: Path) -> list[Path]:
    """The files of a split in their order."""
    if files := sorted(folder.glob("*.parquet")):
        return files
    raise UserError(f"{folder} holds no Parquet file; run `dvc repro prepare`")


def _digest(file: Path) -> str:
    with open(file, "rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def _row_groups(folder: Path) -> list[RowGroup]:
    """All row groups of a split in their order."""
    found = []
    for file in _files(folder):
        try:
            footer = pq.read_metadata(file)
        except (pa.ArrowException, OSError) as error:
            raise UserError(f"{file} cannot be read ({error}); {REMEDY}") from error
        for number in range(footer.num_row_groups):
            group = footer.row_group(number)
            found.append(RowGroup(file, number, group.num_rows, group.total_byte_size))
    return found


class _Watch:
    """Context manager: a bar on a terminal, lines in the log, and an end on request."""

    def __init__(self, documents: int):
        self._total, self._documents, self._n_bytes = documents, 0, 0

    def __enter__(self) -> "_Watch":
        self._started = self._checked = self._logged = time.monotonic()
        self._interrupt = Interrupt().__enter__()
        # disable=None: no bar where stderr is not a terminal.
        self._bar = tqdm(total=self._total, unit=" documents", unit_scale=True, disable=None)
        return self

    def __exit__(self, *error) -> None:
        self._bar.close()
        self._interrupt.__exit__(*error)
        log.info("%s", self._describe())

    def count(self, piece: Piece) -> None:
        """Take note of a piece. Raises SystemExit after a request to stop."""
        self._documents += piece.documents
        self._n_bytes += piece.n_bytes
        self._bar.set_postfix_str(f"{self._rate():.1f} MB/s", refresh=False)
        self._bar.update(piece.documents)
        now = time.monotonic()
        if now - self._logged > LOG_SECONDS:
            self._logged = now
            left = (now - self._started) * (self._total - self._documents) / max(self._documents, 1)
            log.info("%s, %s left", self._describe(), show_time(left))
        if now - self._checked > CHECK_SECONDS:
            self._checked = now
            if self._interrupt.requested:
                log.warning("asked to stop; the next run goes on after the last finished shard")
                raise SystemExit(self._interrupt.exit_code)

    def _rate(self) -> float:
        return self._n_bytes / 1e6 / max(time.monotonic() - self._started, 1e-9)

    def _describe(self) -> str:
        return (
            f"{self._documents:,} of {self._total:,} documents, {self._n_bytes / 1e6:,.1f} MB of text, "
            f"{self._rate():.1f} MB/s"
        )
