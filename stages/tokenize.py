"""tokenize: corpus and benchmark items become token files, once for all later stages."""

from pathlib import Path

from gpt2.bpe import VocabularyConfig, encoding_for
from gpt2.contamination import items_in_training
from gpt2.files import write_json
from gpt2.hardware import HardwareConfig
from gpt2.items import read_items, save_benchmark, tokenize_items
from gpt2.shards import TokenSet
from gpt2.stage import Stage
from gpt2.tokenize import TokenizeConfig, tokenize_corpus
from gpt2.tokenizer import write_encoding

CORPUS = Path("data/corpus")
ITEMS = Path("data/hellaswag.jsonl")
TOKENS = Path("data/tokens")
METRICS = Path("metrics/tokens.json")


def main() -> None:
    with Stage("tokenize") as stage:
        config = stage.load("tokenize", TokenizeConfig)
        hardware = stage.load("hardware", HardwareConfig)
        encoding = encoding_for(config.encoding, CORPUS, stage.load("vocabulary", VocabularyConfig))
        figures = tokenize_corpus(CORPUS, TOKENS, encoding, config.shard_tokens, hardware.workers)
        benchmark = tokenize_items(list(read_items(ITEMS)), encoding)
        save_benchmark(benchmark, TOKENS / "hellaswag.npz")
        write_encoding(encoding, TOKENS)
        found = items_in_training(benchmark, TokenSet(TOKENS, "train"))
        figures["encoding"] = encoding.name
        write_json(METRICS, {**figures, "benchmark_items": len(benchmark.labels), "benchmark_items_in_train": found})


if __name__ == "__main__":
    main()
