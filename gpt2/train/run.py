"""The stage train: GPT-2 from scratch on the tokens, or pretrained weights as they are, in one or several processes."""

import logging
from contextlib import nullcontext
from pathlib import Path

from gpt2.data.shards import TokenSet
from gpt2.data.vocabulary import copy_vocabulary
from gpt2.data.windows import eval_windows
from gpt2.hellaswag.scoring import HellaswagConfig
from gpt2.huggingface.pretrained import load_pretrained
from gpt2.model.config import GPTConfig
from gpt2.model.dist import Dist, distributed
from gpt2.model.evaluate import mean_loss
from gpt2.model.weights import save_model
from gpt2.pipeline import params
from gpt2.pipeline.files import write_csv, write_json
from gpt2.pipeline.hardware import HardwareConfig
from gpt2.pipeline.interrupt import ending_torchrun
from gpt2.pipeline.scratch import drop, locked, scratch_folder
from gpt2.pipeline.stage import Stage
from gpt2.train.checkpoint import require_agreement
from gpt2.train.curves import TABLES
from gpt2.train.loop import TrainConfig, TrainResult, fit, measure_loaded
from gpt2.train.results import SOURCES, run_figures, run_identity, run_speed
from gpt2.train.setup import Run, build_run

TOKENS = Path("data/tokens")
MODEL = Path("models/gpt2")
CURVES = Path("plots/train")
METRICS = Path("metrics/train.json")
log = logging.getLogger(__name__)


def prepare_run(stage: Stage, dist: Dist) -> Run:
    """Read the parameters of the stage and make its run."""
    config = stage.load("train", TrainConfig)
    vocabulary = TokenSet(TOKENS, "train").vocabulary
    shape = stage.load("model", GPTConfig, norm=stage.top("norm"), vocab_size=vocabulary.vocab_size)
    run = build_run(config, shape, stage.load("hellaswag", HellaswagConfig).batch_tokens, TOKENS, dist)
    epochs = run.config.steps * run.order.batch_windows / run.order.windows_per_epoch
    log.info(
        f"{run.config.steps:,} steps of {run.config.tokens_per_step:,} tokens, which are {epochs:.2f} epochs of "
        f"{run.order.windows_per_epoch:,} windows of {run.order.block_size} tokens"
    )
    return run


def train_from_scratch(stage: Stage, run: Run) -> Path:
    """Train in this process; in the main one, write the outputs. Returns the folder of the resume state."""
    scratch = scratch_folder("train", run_identity(run.model.config, run.config, run.tokens), SOURCES)
    require_agreement(scratch, run.dist)
    with locked(scratch) if run.dist.is_main else nullcontext():
        result = fit(run.model, run.config, run.order, run.evaluation, run.dist, scratch)
        write_outputs(stage, run, result)
    return scratch


def load_weights(stage: Stage, run: Run, source: str) -> None:
    """Load the weights in the main process, share them, measure them and write the outputs."""
    weights, origin = {}, {}
    if run.dist.is_main:
        scale = params.active_scale(params.read())
        model, found = load_pretrained(source, run.model.config, scale)
        weights, origin = model.state_dict(), found.figures()
        log.info("loaded %s", ", ".join(f"{key} {value}" for key, value in origin.items()))
    run.model.load_state_dict(run.dist.share_tensors(weights))
    result = measure_loaded(run.model, run.evaluation, run.dist)
    # As many tokens of the training split as of the validation split.
    windows = eval_windows(run.tokens, run.order.block_size, run.config.eval_tokens)
    train_loss = mean_loss(run.model, windows, run.config.micro_batch, run.config.precision, run.dist)
    write_outputs(stage, run, result, train_loss=train_loss, **origin)


def write_outputs(stage: Stage, run: Run, result: TrainResult, **figures: float | str) -> None:
    """Write the outputs, in the main process; `figures` are added to those of a training run, or replace them."""
    if not run.dist.is_main:
        return
    for table, columns in TABLES.items():
        write_csv(CURVES / f"{table}.csv", columns, result.rows[table])
    write_json(METRICS, {**run_figures(run, result), **figures})
    copy_vocabulary(TOKENS, MODEL)
    save_model(run.model, MODEL)
    stage.timed |= run_speed(run, result)


def run_stage() -> None:
    """Train or load, and write the outputs of the stage; every process calls this."""
    with (
        ending_torchrun(),
        Stage("train") as stage,
        distributed(stage.load("hardware", HardwareConfig)) as dist,
    ):
        if not dist.is_main:
            stage.silence()
        run = prepare_run(stage, dist)
        if run.config.init_from:
            load_weights(stage, run, run.config.init_from)
            return
        scratch = train_from_scratch(stage, run)
    # Only now: the stage may still have refused its result, and a second try resumes from here.
    if dist.is_main:
        drop(scratch)
