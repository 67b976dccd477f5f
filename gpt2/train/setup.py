"""The parts of a training run, made from its parameters: for the stage train and for the replicates."""

from dataclasses import dataclass
from pathlib import Path

import torch

from gpt2.data.order import TrainOrder
from gpt2.data.shards import TokenSet
from gpt2.data.windows import eval_windows
from gpt2.hellaswag.items import load_benchmark
from gpt2.model import fp8
from gpt2.model.config import GPTConfig
from gpt2.model.dist import Dist, make_deterministic
from gpt2.model.gpt import GPT
from gpt2.pipeline.files import UserError
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
    into micro-batches, the schedule does not fit the length of the run, or the GPU has no fp8 products.
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
    model = GPT(shape, config.seed).to(dist.device)
    set_precision(model, config)
    return Run(config, model, tokens, val, order, evaluation, dist)


def set_precision(model: GPT, config: TrainConfig) -> None:
    """Set what autocast leaves open. Raises UserError if the GPU or the shape of the model has no fp8 products."""
    model.residual_in_fp32 = config.precision == "bfloat16_mixed"
    model.fp8_head = config.fp8 == "head"
    device = model.wte.weight.device
    if not model.fp8_head or device.type != "cuda":
        return
    name, capability = torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device)
    if capability < fp8.CAPABILITY:
        found, needed = (".".join(map(str, version)) for version in (capability, fp8.CAPABILITY))
        raise UserError(
            f"train.fp8 = {config.fp8} needs a GPU of compute capability {needed}, {name} has {found}; set it to none"
        )
    tokens = model.config.block_size * config.micro_batch
    for key, size in {"model.n_embd": model.config.n_embd, "model.block_size × train.micro_batch": tokens}.items():
        if size % fp8.MULTIPLE:
            raise UserError(
                f"train.fp8 = {config.fp8} needs {key} = {size} to be a multiple of {fp8.MULTIPLE}; change it"
            )
