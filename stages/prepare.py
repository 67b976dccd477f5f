"""prepare: documents from the chosen source, split into train, val and test."""

import logging
from pathlib import Path

from gpt2.pipeline.files import write_json
from gpt2.pipeline.hardware import HardwareConfig
from gpt2.pipeline.stage import Stage
from gpt2.prepare.prepare import PrepareConfig, prepare, read_earlier

CORPUS = Path("data/corpus")
METRICS = Path("metrics/prepare.json")
log = logging.getLogger(__name__)


def main() -> None:
    with Stage("prepare") as stage:
        config = stage.load("prepare", PrepareConfig)
        workers = stage.load("hardware", HardwareConfig).workers
        figures = prepare(config, CORPUS, workers, read_earlier(METRICS))
        write_json(METRICS, figures)
        log.info("%d documents, %.1f MB", figures["documents"], figures["bytes"] / 1e6)


if __name__ == "__main__":
    main()
