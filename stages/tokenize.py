"""tokenize: corpus and benchmark items become token files, once for all later stages."""

from dataclasses import replace
from pathlib import Path

from gpt2.data.shards import TokenSet
from gpt2.hellaswag.items import read_items, save_benchmark, tokenize_items
from gpt2.pipeline.files import write_json
from gpt2.pipeline.hardware import HardwareConfig
from gpt2.pipeline.scratch import scratch_folder, staged
from gpt2.pipeline.stage import Stage
from gpt2.tokenizer.bpe import VocabularyConfig, encoding_for
from gpt2.tokenizer.contamination import items_in_training
from gpt2.tokenizer.encodings import write_encoding
from gpt2.tokenizer.tokenize import SOURCES, TokenizeConfig, token_identity, tokenize_corpus

CORPUS = Path("data/corpus")
ITEMS = Path("data/hellaswag.jsonl")
TOKENS = Path("data/tokens")
METRICS = Path("metrics/tokens.json")


def main() -> None:
    with Stage("tokenize") as stage:
        config = stage.load("tokenize", TokenizeConfig)
        workers = stage.load("hardware", HardwareConfig).workers
        encoding = encoding_for(config.encoding, CORPUS, stage.load("vocabulary", VocabularyConfig))
        identity = token_identity(CORPUS, encoding, config.shard_tokens, workers)
        scratch = scratch_folder("tokenize", identity, SOURCES)
        with staged(TOKENS, scratch) as folder:
            figures = tokenize_corpus(CORPUS, folder, encoding, config.shard_tokens, workers, records=scratch)
            benchmark = tokenize_items(list(read_items(ITEMS)), encoding)
            in_training = items_in_training(benchmark, TokenSet(folder, "train"), workers)
            save_benchmark(replace(benchmark, in_training=in_training), folder / "hellaswag.npz")
            write_encoding(encoding, folder)
            of_items = {"benchmark_items": len(in_training), "benchmark_items_in_train": int(in_training.sum())}
            write_json(METRICS, {**figures, "encoding": encoding.name, **of_items})


if __name__ == "__main__":
    main()
