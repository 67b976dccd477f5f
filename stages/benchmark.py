"""benchmark: HellaSwag, or items made from the test split of the corpus."""

import logging
from pathlib import Path

from gpt2.hellaswag.benchmark import BenchmarkConfig, make_items, write_items
from gpt2.pipeline.stage import Stage

CORPUS = Path("data/corpus")
ITEMS = Path("data/hellaswag.jsonl")
log = logging.getLogger(__name__)


def main() -> None:
    with Stage("benchmark") as stage:
        config = stage.load("benchmark", BenchmarkConfig)
        items = make_items(config, CORPUS)
        write_items(ITEMS, items)
        log.info("%d items from %s", len(items), config.source)


if __name__ == "__main__":
    main()
