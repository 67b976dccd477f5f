"""The code of others that benchmarks compare ours with."""

import importlib.util
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType

import torch

from gpt2.data.order import TrainOrder
from gpt2.data.shards import TokenSet
from gpt2.model.config import GPTConfig
from gpt2.pipeline.command import Parser
from gpt2.train.loop import TrainConfig
from gpt2.train.optim import lr_at


def ask_for_nanogpt(program: str, description: str, argv: Sequence[str]) -> Path | None:
    """The value of --nanogpt on a command line, if given. Ends the program if it is no checkout."""
    parser = Parser(prog=program, description=description)
    parser.add_argument("--nanogpt", type=Path, metavar="DIR", help="a checkout of nanoGPT, whose model.py is measured")
    nanogpt = parser.parse_args(argv).nanogpt
    if nanogpt and not (nanogpt / "model.py").is_file():
        raise SystemExit(f"bench: {nanogpt}/model.py does not exist; give --nanogpt a checkout of nanoGPT")
    return nanogpt


def import_nanogpt(checkout: Path) -> ModuleType:
    """model.py of a checkout of nanoGPT."""
    spec = importlib.util.spec_from_file_location("nanogpt_model", checkout / "model.py")
    assert spec and spec.loader
    nanogpt = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = nanogpt
    spec.loader.exec_module(nanogpt)
    return nanogpt


def nanogpt_step(checkout: Path, config: TrainConfig, shape: GPTConfig, tokens: TokenSet) -> Callable[[int], float]:
    """The optimizer step of nanoGPT's train.py on a GPU, compiled, on our batches: its number to its mean loss."""
    nanogpt = import_nanogpt(checkout)
    order = TrainOrder(tokens, shape.block_size, config.batch_windows(shape.block_size), config.seed)
    torch.manual_seed(config.seed)
    # The padded vocabulary of its own train.py.
    model = nanogpt.GPT(nanogpt.GPTConfig(vocab_size=50304, dropout=0.0, bias=True)).cuda()
    optimizer = model.configure_optimizers(config.weight_decay, config.max_lr, (config.beta1, config.beta2), "cuda")
    forward = torch.compile(model)
    accumulation = config.accumulation(shape.block_size, 1)

    def step(number: int) -> float:
        for group in optimizer.param_groups:
            group["lr"] = lr_at(number, config)
        losses = []
        for micro_step in range(accumulation):
            batch = order.batch(number, micro_step * config.micro_batch, config.micro_batch)
            idx, targets = (rows.contiguous().pin_memory().cuda(non_blocking=True) for rows in batch)
            with torch.autocast("cuda", dtype=torch.bfloat16):
                loss = forward(idx, targets)[1] / accumulation
            loss.backward()
            losses.append(loss.detach())
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return sum(losses).item()

    return step
