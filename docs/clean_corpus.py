"""Parquet files through filters of datatrove into Parquet files that `source: files` reads; see docs/datatrove.md.

python docs/clean_corpus.py SOURCE TARGET [TASKS]
"""

import os
import sys

from datatrove.executor import LocalPipelineExecutor
from datatrove.pipeline.filters import GopherQualityFilter, GopherRepetitionFilter
from datatrove.pipeline.readers import ParquetReader
from datatrove.pipeline.writers import ParquetWriter


def main(source: str, target: str, tasks: str = "4") -> None:
    """Each task reads its share of the source files and writes files of its own; finished tasks are not run again."""
    LocalPipelineExecutor(
        pipeline=[
            ParquetReader(source),
            GopherRepetitionFilter(),
            GopherQualityFilter(),
            # One column for each field of the metadata, so that prepare.min_score and the like find them.
            ParquetWriter(target, compression="zstd", expand_metadata=True),
        ],
        tasks=int(tasks),
        workers=os.cpu_count() or 1,
        logging_dir=f"{target}.log",
    ).run()


if __name__ == "__main__":
    main(*sys.argv[1:])
