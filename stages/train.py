"""train: a GPT-2 from scratch on the tokens, in one process or under torchrun."""

import logging
from contextlib import nullcontext
from pathlib import Path

from gpt2 import checkpoint
from gpt2.data import TrainOrder, eval_windows
from gpt2.dist import Dist, distributed, make_deterministic
from gpt2.files import write_csv, write_json
from gpt2.hardware import HardwareConfig
from gpt2.interrupt import ending_torchrun
from gpt2.items import load_benchmark
from gpt2.model import GPT, GPTConfig
from gpt2.rows import TABLES
from gpt2.scoring import HellaswagConfig
from gpt2.shards import TokenSet
from gpt2.stage import Stage
from gpt2.train import Evaluation, TrainConfig, fit
from gpt2.train_results import SOURCES, describe_length, run_figures, run_identity, run_speed
from gpt2.weights import save_model

TOKENS = Path("data/tokens")
MODEL = Path("models/gpt2")
CURVES = Path("plots/train")
METRICS = Path("metrics/train.json")
log = logging.getLogger(__name__)


def train(stage: Stage, dist: Dist) -> Path:
    """Train in this process and, in the main one, write the outputs. Return the folder of the resume state."""
    config = stage.load("train", TrainConfig)
    if config.deterministic:
        make_deterministic()
    tokens, val = TokenSet(TOKENS, "train"), TokenSet(TOKENS, "val")
    shape = stage.load("model", GPTConfig, norm=stage.top("norm"), vocab_size=tokens.vocabulary.vocab_size)
    config.accumulation(shape.block_size, dist.world_size)
    order = TrainOrder(tokens, shape.block_size, config.batch_windows(shape.block_size), config.seed)
    config = config.in_steps(order)
    log.info("%s", describe_length(config, order))
    evaluation = Evaluation(
        eval_windows(val, shape.block_size, config.eval_tokens),
        load_benchmark(TOKENS / "hellaswag.npz").first(config.eval_items),
        config.micro_batch,
        stage.load("hellaswag", HellaswagConfig).batch_tokens,
        config.precision,
    )
    model = GPT(shape, config.seed).to(dist.device)
    scratch = checkpoint.scratch_folder("train", run_identity(shape, config, tokens), SOURCES)
    checkpoint.require_agreement(scratch, dist)
    with checkpoint.locked(scratch) if dist.is_main else nullcontext():
        result = fit(model, config, order, evaluation, dist, scratch)
        if dist.is_main:
            for table, columns in TABLES.items():
                write_csv(CURVES / f"{table}.csv", columns, result.rows[table])
            n_items = len(evaluation.benchmark.labels)
            write_json(METRICS, run_figures(result, config, model, tokens, val, order.windows_per_epoch, n_items))
            save_model(model, MODEL)
            stage.timed |= run_speed(result, config, shape, dist)
    return scratch


def main() -> None:
    with (
        ending_torchrun(),
        Stage("train") as stage,
        distributed(stage.load("hardware", HardwareConfig)) as dist,
    ):
        if not dist.is_main:
            stage.silence()
        scratch = train(stage, dist)
    # Only now: the stage may still have refused its result, and a second try goes on from here.
    if dist.is_main:
        checkpoint.drop(scratch)


if __name__ == "__main__":
    main()
