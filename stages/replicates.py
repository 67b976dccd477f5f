"""replicates: further models of the main line with other seeds, measured in the same way."""

from pathlib import Path

from gpt2.data.shards import TokenSet
from gpt2.heads.similarity import HeadsConfig
from gpt2.hellaswag.scoring import HellaswagConfig
from gpt2.model.config import GPTConfig
from gpt2.pipeline.files import read_json, write_csv, write_json
from gpt2.pipeline.hardware import HardwareConfig
from gpt2.pipeline.scratch import drop
from gpt2.pipeline.stage import Stage
from gpt2.prune.remove import PruneConfig
from gpt2.replicates.study import (
    MainLine,
    ReplicatesConfig,
    measure_replicates,
    name_figures,
    scratch_of,
    summarise_models,
    tabulate_models,
)
from gpt2.train.loop import TrainConfig

TOKENS = Path("data/tokens")
# Figures of the main model.
TRAINED = Path("metrics/train.json")
SCORED = Path("metrics/hellaswag.json")
COMPARED = Path("metrics/heads.json")
PRUNED = Path("metrics/prune.json")
MODELS = Path("plots/replicates/models.csv")
METRICS = Path("metrics/replicates.json")


def main() -> None:
    with Stage("replicates") as stage:
        config, train = stage.load("replicates", ReplicatesConfig), stage.load("train", TrainConfig)
        vocabulary = TokenSet(TOKENS, "train").vocabulary
        line = MainLine(
            stage.load("model", GPTConfig, norm=stage.top("norm"), vocab_size=vocabulary.vocab_size),
            train,
            stage.load("hellaswag", HellaswagConfig).batch_tokens,
            stage.load("heads", HeadsConfig),
            stage.load("prune", PruneConfig),
            TOKENS,
        )
        measured = {path.stem: read_json(path) for path in (TRAINED, SCORED, COMPARED, PRUNED)}
        # Loaded weights have no seed to change.
        seeds = [] if train.init_from else [seed for seed in config.seeds if seed != train.seed]
        models = measure_replicates(line, seeds, stage.load("hardware", HardwareConfig))
        table = tabulate_models([name_figures(measured, train.seed), *models])
        write_csv(MODELS, list(table.columns), table.to_numpy(object).tolist())
        write_json(METRICS, summarise_models(table))
    for seed in seeds:
        drop(scratch_of(line, seed))


if __name__ == "__main__":
    main()
