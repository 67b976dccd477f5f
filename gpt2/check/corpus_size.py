"""How much text `prepare` will keep, told from sizes without reading it."""

import re
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from gpt2.pipeline.files import UserError
from gpt2.prepare.docstrings import package_version
from gpt2.prepare.prepare import PrepareConfig
from gpt2.prepare.sources import find_files

# Sizes of text, measured on the documentation that the tiny scale reads, and on 150 MB of English books and web pages.
DOCSTRING_SHARE = 0.18  # of the bytes of Python source
DOCS_DOCUMENT_BYTES, PROSE_DOCUMENT_BYTES = 1_000, 4_500
DOCS_BYTES_PER_TOKEN, PROSE_BYTES_PER_TOKEN = 3.0, 4.5
DOCS_ZSTD, PROSE_ZSTD = 0.30, 0.46  # Parquet files of the corpus, to the bytes of their text
GZIP = 3.0  # text to .jsonl.gz
WORD_BYTES = 7
# FineWeb-Edu names its samples by billions of tokens: sample/10BT. Taken where the name does not tell.
HUB_BILLION_TOKENS = 10
# Of its files, to the bytes of their text: the 14 of sample/10BT have 28.5 GB.
HUB_DOWNLOAD = 0.63


@dataclass(frozen=True)
class Volume:
    """The text of all splits together: UTF-8 bytes, documents, bytes of a token, and how these are known."""

    n_bytes: float
    documents: float
    bytes_per_token: float
    basis: str

    @property
    def tokens(self) -> float:
        return self.n_bytes / self.bytes_per_token


def estimate_volume(config: PrepareConfig) -> Volume:
    """The text that `prepare` will keep. Raises UserError if the source is not there."""
    volume = {"docs": _docs_volume, "files": _files_volume, "fineweb_edu": _hub_volume}[config.source](config)
    found = {"max_documents": volume.documents, "max_bytes": volume.n_bytes}
    limits = {key: getattr(config, key) for key in found if getattr(config, key) is not None}
    shares = {key: limit / found[key] for key, limit in limits.items() if limit < found[key]}
    if not shares:
        return volume
    key = min(shares, key=shares.get)
    n_bytes, documents = shares[key] * volume.n_bytes, shares[key] * volume.documents
    return replace(volume, n_bytes=n_bytes, documents=documents, basis=f"{volume.basis}, cut to {key}")


def _docs_volume(config: PrepareConfig) -> Volume:
    versions = [f"{package} {package_version(package)}" for package in config.packages]
    files = [file for package in config.packages for file in metadata.files(package) or []]
    sizes = [file.size or 0 for file in files if file.suffix == ".py" and "tests" not in file.parts]
    n_bytes = DOCSTRING_SHARE * sum(sizes)
    basis = f"{DOCSTRING_SHARE:.0%} of the source of {', '.join(versions)}"
    return Volume(n_bytes, n_bytes / DOCS_DOCUMENT_BYTES, DOCS_BYTES_PER_TOKEN, basis)


def _files_volume(config: PrepareConfig) -> Volume:
    files = [path for _, path in find_files(config.path).files]
    sizes = [_text_size(file, config.text_column) for file in files]
    basis = f"{len(files)} files in {config.path}"
    return Volume(sum(size for size, _ in sizes), sum(rows for _, rows in sizes), PROSE_BYTES_PER_TOKEN, basis)


def _text_size(file: Path, text_column: str) -> tuple[float, float]:
    """Bytes of text and documents of one file: for Parquet from its footer, for JSONL from its size."""
    if file.suffix != ".parquet":
        n_bytes = file.stat().st_size * (GZIP if file.suffix == ".gz" else 1)
        return n_bytes, n_bytes / PROSE_DOCUMENT_BYTES
    try:
        footer = pq.read_metadata(file)
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{file} cannot be read ({error}); replace it or remove it from prepare.path") from error
    groups = [footer.row_group(i) for i in range(footer.num_row_groups)]
    columns = [group.column(i) for group in groups for i in range(group.num_columns)]
    return (
        sum(column.total_uncompressed_size for column in columns if column.path_in_schema == text_column),
        footer.num_rows,
    )


def _hub_volume(config: PrepareConfig) -> Volume:
    named = re.search(r"(\d+)BT/", config.files)
    tokens = 1e9 * int(named[1] if named else HUB_BILLION_TOKENS)
    n_bytes = tokens * PROSE_BYTES_PER_TOKEN
    known = config.files if named else f"{HUB_BILLION_TOKENS} billion tokens assumed"
    basis = f"{known}, {PROSE_BYTES_PER_TOKEN} bytes a token assumed"
    return Volume(n_bytes, n_bytes / PROSE_DOCUMENT_BYTES, PROSE_BYTES_PER_TOKEN, basis)


# Stands in where the source is not there yet.
UNKNOWN = Volume(1e9, 1e9 / PROSE_DOCUMENT_BYTES, PROSE_BYTES_PER_TOKEN, "1 GB of text assumed")
