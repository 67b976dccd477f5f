"""Stage tokenizer-study: vocabularies of several sizes, and GPT-2's, on rare, compound and technical words."""

from pathlib import Path

from gpt2.files import write_csv, write_json
from gpt2.shape import ModelShape
from gpt2.stage import Stage
from gpt2.tokenizer_study import TokenizerStudyConfig, study_vocabularies

CORPUS = Path("data/corpus")
METRICS = Path("metrics/tokenizer.json")
VOCABULARIES = Path("plots/tokenizer/vocabularies.csv")
EXAMPLES = Path("plots/tokenizer/examples.csv")


def main() -> None:
    """Train and compare vocabularies of the corpus."""
    with Stage("tokenizer-study") as stage:
        config = stage.load("tokenizer_study", TokenizerStudyConfig)
        shape = stage.load("model", ModelShape)
        study = study_vocabularies(config, shape, CORPUS)
        stage.timed |= study.speed
        write_json(METRICS, study.metrics)
        for path, rows in ((VOCABULARIES, study.vocabularies), (EXAMPLES, study.examples)):
            write_csv(path, list(rows[0]), [list(row.values()) for row in rows])


if __name__ == "__main__":
    main()
