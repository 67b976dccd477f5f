"""train: a GPT-2 from scratch on the tokens, or pretrained weights as they are; in one process or under torchrun."""

import logging
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

from gpt2 import params
from gpt2.checkpoint import require_agreement
from gpt2.data import TrainOrder, eval_windows
from gpt2.dist import Dist, distributed, make_deterministic
from gpt2.evaluate import mean_loss
from gpt2.files import write_csv, write_json
from gpt2.hardware import HardwareConfig
from gpt2.interrupt import ending_torchrun
from gpt2.items import load_benchmark
from gpt2.model import GPT, GPTConfig
from gpt2.pretrained import load_pretrained
from gpt2.rows import TABLES
from gpt2.scoring import HellaswagConfig
from gpt2.scratch import drop, locked, scratch_folder
from gpt2.shards import TokenSet
from gpt2.stage import Stage
from gpt2.train import Evaluation, TrainConfig, TrainResult, fit, measure_loaded
from gpt2.train_results import SOURCES, describe_length, run_figures, run_identity, run_speed
from gpt2.vocabulary import copy_vocabulary
from gpt2.weights import save_model

TOKENS = Path("data/tokens")
MODEL = Path("models/gpt2")
CURVES = Path("plots/train")
METRICS = Path("metrics/train.json")
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Run:
    """What this process trains, or loads, and measures."""

    config: TrainConfig
    model: GPT
    tokens: TokenSet
    val: TokenSet
    order: TrainOrder
    evaluation: Evaluation
    dist: Dist


def set_up(stage: Stage, dist: Dist) -> Run:
    """Read parameters and tokens, and make the model."""
    config = stage.load("train", TrainConfig)
    if config.deterministic:
        make_deterministic()
    tokens, val = TokenSet(TOKENS, "train"), TokenSet(TOKENS, "val")
    shape = stage.load("model", GPTConfig, norm=stage.top("norm"), vocab_size=tokens.vocabulary.vocab_size)
    if not config.init_from:
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
    return Run(config, GPT(shape, config.seed).to(dist.device), tokens, val, order, evaluation, dist)


def train(stage: Stage, run: Run) -> Path:
    """Train in this process and, in the main one, write the outputs. Return the folder of the resume state."""
    scratch = scratch_folder("train", run_identity(run.model.config, run.config, run.tokens), SOURCES)
    require_agreement(scratch, run.dist)
    with locked(scratch) if run.dist.is_main else nullcontext():
        result = fit(run.model, run.config, run.order, run.evaluation, run.dist, scratch)
        write(stage, run, result)
    return scratch


def load(stage: Stage, run: Run) -> None:
    """Load the weights in the main process, share them, measure them and write the outputs."""
    weights, origin = {}, {}
    if run.dist.is_main:
        scale = params.active_scale(params.read())
        model, found = load_pretrained(run.config.init_from, run.model.config, scale)
        weights, origin = model.state_dict(), found.figures()
        log.info("loaded %s", ", ".join(f"{key} {value}" for key, value in origin.items()))
    run.model.load_state_dict(run.dist.share_tensors(weights))
    result = measure_loaded(run.model, run.evaluation, run.dist)
    # As many tokens of the training split as of the validation split.
    windows = eval_windows(run.tokens, run.order.block_size, run.config.eval_tokens)
    train_loss = mean_loss(run.model, windows, run.config.micro_batch, run.config.precision, run.dist)
    write(stage, run, result, train_loss=train_loss, **origin)


def write(stage: Stage, run: Run, result: TrainResult, **figures: float | str) -> None:
    """Write the outputs, in the main process; `figures` add to those of a training run or replace them."""
    if not run.dist.is_main:
        return
    for table, columns in TABLES.items():
        write_csv(CURVES / f"{table}.csv", columns, result.rows[table])
    n_items = len(run.evaluation.benchmark.labels)
    trained = run_figures(result, run.config, run.model, run.tokens, run.val, run.order.windows_per_epoch, n_items)
    write_json(METRICS, {**trained, **figures})
    copy_vocabulary(TOKENS, MODEL)
    save_model(run.model, MODEL)
    stage.timed |= run_speed(result, run.config, run.model.config, run.dist)


def main() -> None:
    with (
        ending_torchrun(),
        Stage("train") as stage,
        distributed(stage.load("hardware", HardwareConfig)) as dist,
    ):
        if not dist.is_main:
            stage.silence()
        run = set_up(stage, dist)
        scratch = load(stage, run) if run.config.init_from else train(stage, run)
    # Only now: the stage may still have refused its result, and a second try goes on from here.
    if dist.is_main and scratch:
        drop(scratch)


if __name__ == "__main__":
    main()
