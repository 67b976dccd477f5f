"""tokenizer-study: vocabularies of several sizes, and GPT-2's, on words and texts and in short trainings."""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gpt2.model.config import ModelShape
from gpt2.pipeline.files import write_csv, write_json
from gpt2.pipeline.hardware import HardwareConfig
from gpt2.pipeline.stage import Stage
from gpt2.tokenizer.bpe import VocabularyConfig, train_encodings
from gpt2.tokenizer_study.runs import (
    VocabularyRunsConfig,
    encode_runs,
    run_vocabularies,
    thin,
    vocabulary_run_figures,
    vocabulary_table,
)
from gpt2.tokenizer_study.study import TokenizerStudyConfig, read_study_text, study_vocabularies, with_gpt2

CORPUS = Path("data/corpus")
METRICS = Path("metrics/tokenizer.json")
PLOTS = Path("plots/tokenizer")


def main() -> None:
    with Stage("tokenizer-study") as stage:
        config = stage.load("tokenizer_study", TokenizerStudyConfig)
        shape = stage.load("model", ModelShape)
        runs_config = stage.load("vocabulary_runs", VocabularyRunsConfig)
        text = read_study_text(config, stage.load("vocabulary", VocabularyConfig), CORPUS)
        started = time.perf_counter()
        trained = train_encodings(text.training, config.vocab_sizes)
        stage.timed["bpe_train_seconds"] = round(time.perf_counter() - started, 3)
        study = study_vocabularies(text, trained, config, shape)
        stage.timed |= study.speed

        eval_bytes = runs_config.eval_bytes
        splits = (
            thin(text.training, runs_config.text_bytes),
            thin(text.validation, eval_bytes),
            thin(text.test, eval_bytes),
        )
        run_texts = {
            encoding.name: encode_runs(splits, text.groups, encoding, runs_config) for encoding in with_gpt2(trained)
        }
        runs = run_vocabularies(runs_config, run_texts, stage.load("hardware", HardwareConfig))
        table = vocabulary_table(runs)
        tables: dict[str, Sequence[Mapping[Any, Any]]] = {
            "vocabularies": study.vocabularies, "bands": study.bands, "examples": study.examples,
            "runs": [run.row for run in runs], "runs_table": table.to_dict("records"),
        }  # fmt: skip
        for name, rows in tables.items():
            write_csv(PLOTS / f"{name}.csv", list(rows[0]), [list(row.values()) for row in rows])
        write_json(METRICS, {**study.metrics, **vocabulary_run_figures(runs, table, run_texts)})


if __name__ == "__main__":
    main()
