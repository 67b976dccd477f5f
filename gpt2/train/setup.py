"""The parts of a training run, made from its parameters: for the stage train and for the replicates."""

from dataclasses import dataclass
from pathlib import Path

from gpt2.data.order import TrainOrder
from gpt2.data.shards import TokenSet
from gpt2.data.windows import eval_windows
from gpt2.hellaswag.items import load_benchmark
from gpt2.model.config import GPTConfig
from gpt2.model.dist import Dist, make_deterministic
from gpt2.model.gpt import GPT
from gpt2.train.loop import Evaluation, TrainConfig


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


def build_run(config: TrainConfig, shape: GPTConfig, batch_tokens: int, folder: Path, dist: Dist) -> Run:
    """Make the model and open the token sets in `folder`.

    batch_tokens: padded tokens of one forward pass over benchmark items. Raises UserError if the step does not divide
    into micro-batches or the schedule does not fit the length of the run.
    """
    if config.deterministic:
        make_deterministic()
    tokens, val = TokenSet(folder, "train"), TokenSet(folder, "val")
    if not config.init_from:
        config.accumulation(shape.block_size, dist.world_size)
    order = TrainOrder(tokens, shape.block_size, config.batch_windows(shape.block_size), config.seed)
    config = config.in_steps(order)
    evaluation = Evaluation(
        eval_windows(val, shape.block_size, config.eval_tokens),
        load_benchmark(folder / "hellaswag.npz").first(config.eval_items),
        config.micro_batch,
        batch_tokens,
        config.precision,
    )
    return Run(config, GPT(shape, config.seed).to(dist.device), tokens, val, order, evaluation, dist)
