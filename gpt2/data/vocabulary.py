"""The vocabulary that goes with tokens and with models: a file in tiktoken's format beside them, none for GPT-2's.

The file is named after the encoding (`bpe_8192.tiktoken`). Each line holds a token in base64 and its rank.
"""

import shutil
from pathlib import Path

from gpt2.pipeline.files import UserError, atomic_path

SUFFIX = ".tiktoken"


def find_vocabulary(folder: Path) -> Path | None:
    """The vocabulary file of a folder of tokens or of a model. Raises UserError if there are several."""
    found = sorted(folder.glob(f"*{SUFFIX}"))
    if len(found) > 1:
        names = ", ".join(path.name for path in found)
        raise UserError(f"{folder} holds the vocabularies {names}, of which one is its own; run dvc repro on its stage")
    return found[0] if found else None


def copy_vocabulary(source: Path, folder: Path) -> None:
    """Give `folder` the vocabulary of `source` in place of any that it has."""
    for stale in folder.glob(f"*{SUFFIX}"):
        stale.unlink()
    if path := find_vocabulary(source):
        with atomic_path(folder / path.name) as temporary:
            shutil.copyfile(path, temporary)
