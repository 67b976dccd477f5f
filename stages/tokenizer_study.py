"""Stage tokenizer-study: vocabularies of several sizes, and GPT-2's, on words and texts and in short trainings."""

from pathlib import Path
from typing import Any

from gpt2.model.config import ModelShape
from gpt2.pipeline.files import write_csv, write_json
from gpt2.pipeline.hardware import HardwareConfig
from gpt2.pipeline.stage import Stage
from gpt2.tokenizer.bpe import VocabularyConfig
from gpt2.tokenizer_study.runs import (
    VocabularyRunsConfig,
    encode_runs,
    run_vocabularies,
    thin,
    vocabulary_run_figures,
    vocabulary_table_rows,
)
from gpt2.tokenizer_study.study import TokenizerStudyConfig, read_study_text, study_vocabularies, train_apart, with_gpt2

CORPUS = Path("data/corpus")
METRICS = Path("metrics/tokenizer.json")
PLOTS = Path("plots/tokenizer")


def main() -> None:
    """Train and compare vocabularies of the corpus."""
    with Stage("tokenizer-study") as stage:
        config = stage.load("tokenizer_study", TokenizerStudyConfig)
        vocabulary = stage.load("vocabulary", VocabularyConfig)
        shape = stage.load("model", ModelShape)
        runs_config = stage.load("vocabulary_runs", VocabularyRunsConfig)
        text = read_study_text(config, vocabulary, CORPUS)
        trained, training_speed = train_apart(config.vocab_sizes, vocabulary, CORPUS)
        study = study_vocabularies(text, trained, config, shape)
        stage.timed |= {**training_speed, **study.speed}

        training, held_out = thin(text.training, runs_config.text_bytes), thin(text.held_out, runs_config.eval_bytes)
        run_texts = {
            encoding.name: encode_runs(training, held_out, text.groups, encoding, runs_config.block_size)
            for encoding in with_gpt2(trained)
        }
        runs = run_vocabularies(runs_config, run_texts, stage.load("hardware", HardwareConfig))
        table = vocabulary_table_rows(runs)
        tables: dict[str, list[dict[str, Any]]] = {
            "vocabularies": study.vocabularies, "bands": study.bands, "examples": study.examples,
            "runs": runs, "runs_table": table,
        }  # fmt: skip
        for name, rows in tables.items():
            write_csv(PLOTS / f"{name}.csv", list(rows[0]), [list(row.values()) for row in rows])
        write_json(METRICS, {**study.metrics, **vocabulary_run_figures(table, run_texts)})


if __name__ == "__main__":
    main()
