"""One row of the benchmark: a process that trains the tiny model, as many steps as each line of its input says."""

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

# The benchmark is of processors, and a GPU would be picked where there is one.
os.environ["CUDA_VISIBLE_DEVICES"] = ""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.baseline import import_nanogpt
from gpt2.data.order import TrainOrder
from gpt2.data.shards import TokenSet
from gpt2.model.config import GPTConfig
from gpt2.model.dist import Dist, distributed
from gpt2.model.flops import training_flops_per_token
from gpt2.model.gpt import GPT
from gpt2.pipeline.command import Parser, reporting
from gpt2.pipeline.hardware import HardwareConfig
from gpt2.pipeline.params import load, read
from gpt2.pipeline.stage import peak_memory_gib
from gpt2.train.loop import Stepper, TrainConfig
from gpt2.train.optim import Optimizer, build_optimizer, lr_at

Step = Callable[[int], float]
# Sizes (M, K, N) of the products that look for the machine's peak: a cube, and the classifier's own shapes.
PEAK_SHAPES = ((2048, 2048, 2048), (512, 128, 50304), (512, 50304, 128), (50304, 512, 128))


class Task:
    """The tiny model of params.yaml, its training and its tokens."""

    def __init__(self):
        self.values = {**read(), "scale": "tiny"}
        self.hardware = load("hardware", HardwareConfig, self.values)
        self.config = load("train", TrainConfig, self.values)
        tokens = TokenSet(Path("data/tokens"), "train")
        known = {"norm": "preln", "vocab_size": tokens.vocabulary.vocab_size}
        self.shape = load("model", GPTConfig, self.values, **known)
        self.windows = self.config.batch_windows(self.shape.block_size)
        self.order = TrainOrder(tokens, self.shape.block_size, self.windows, self.config.seed)


def train_ours(task: Task, dist: Dist) -> Step:
    """This project's own step, as the stage runs it."""
    model = GPT(task.shape, task.config.seed)
    stepper = Stepper(model, build_optimizer(model, task.config), task.config, task.order, dist)

    def take(step: int) -> float:
        loss, _ = stepper.backward(step)
        stepper.clip()
        stepper.update(step)
        return loss

    return take


def train_transformers(task: Task) -> Step:
    """GPT2LMHeadModel without dropout and without a cache, with the fused AdamW."""
    import transformers

    shape = task.shape
    config = transformers.GPT2Config(
        vocab_size=shape.vocab_size, n_positions=shape.block_size, n_embd=shape.n_embd, n_layer=shape.n_layer,
        n_head=shape.n_head, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, use_cache=False,
    )  # fmt: skip
    model = transformers.GPT2LMHeadModel(config).train()

    def loss_of(idx: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(model(idx).logits.flatten(0, 1), targets.flatten())

    return _plain_step(task, model, build_optimizer(model, task.config), loss_of)


def train_nanogpt(task: Task, checkout: Path, compiled: bool) -> Step:
    """nanoGPT's model with the optimizer that its configure_optimizers builds for a CPU."""
    nanogpt = import_nanogpt(checkout)
    shape, config = task.shape, task.config
    sizes = {"n_layer": shape.n_layer, "n_head": shape.n_head, "n_embd": shape.n_embd, "block_size": shape.block_size}
    # The padded vocabulary of its own train.py.
    model = nanogpt.GPT(nanogpt.GPTConfig(**sizes, vocab_size=shape.padded_vocab_size, dropout=0.0, bias=True))
    betas = (config.beta1, config.beta2)
    optimizer = model.configure_optimizers(config.weight_decay, config.max_lr, betas, "cpu")
    forward = torch.compile(model) if compiled else model
    return _plain_step(task, model, optimizer, lambda idx, targets: forward(idx, targets)[1])


def _plain_step(
    task: Task, model: nn.Module, optimizer: Optimizer, loss_of: Callable[[Tensor, Tensor], Tensor]
) -> Step:
    """The step of nanoGPT's train.py on a CPU, over the whole batch at once."""

    def run(step: int) -> float:
        for group in optimizer.param_groups:
            group["lr"] = lr_at(step, task.config)
        idx, targets = (rows.contiguous() for rows in task.order.batch(step, 0, task.windows))
        loss = loss_of(idx, targets)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), task.config.grad_clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return run


def serve(task: Task, run: Step, dist: Dist, answers) -> None:
    """For every number of steps read, train them and answer with rate, loss and memory as a line of JSON."""
    done = 0
    while steps := _next_count(dist):
        dist.barrier()
        started = time.perf_counter()
        for step in range(done, done + steps):
            loss = run(step)
        dist.barrier()
        seconds = time.perf_counter() - started
        done += steps
        memory = dist.sum(torch.tensor([peak_memory_gib()])).item()
        figures = {"tokens_per_s": steps * task.config.tokens_per_step / seconds, "loss": loss}
        if dist.is_main:
            answers.write(json.dumps({**figures, "peak_memory_gib": memory}) + "\n")
            answers.flush()


def _next_count(dist: Dist) -> int:
    """The next number on the standard input of process 0, 0 at its end, for all processes."""
    count = int(sys.stdin.readline() or 0) if dist.is_main else 0
    return int(dist.sum(torch.tensor([count])).item())


def measure_peak(task: Task) -> dict[str, float]:
    """The highest rate among PEAK_SHAPES, by either library that torch multiplies fp32 with."""
    best = 0.0
    for precision in ("highest", "medium"):
        torch.set_float32_matmul_precision(precision)
        for m, k, n in PEAK_SHAPES:
            a, b = torch.randn(m, k), torch.randn(k, n)
            for _ in range(10):
                started = time.perf_counter()
                a @ b
                best = max(best, 2e-9 * m * k * n / (time.perf_counter() - started))
    return {"gflops": best, "flops_per_token": training_flops_per_token(task.shape, task.shape.vocab_size)}


def main(argv: list[str]) -> None:
    parser = Parser(prog="python -m bench.train", description=__doc__.splitlines()[0])
    parser.add_argument("row", choices=("ours", "transformers", "nanogpt", "peak"))
    parser.add_argument("checkout", nargs="?", type=Path)
    parser.add_argument("--compile", action="store_true")
    arguments = parser.parse_args(argv)
    # What a model prints is no answer.
    answers, sys.stdout = sys.stdout, sys.stderr
    task = Task()
    with distributed(task.hardware) as dist:
        if arguments.row == "peak":
            answers.write(json.dumps(measure_peak(task)) + "\n")
            return
        build = {
            "ours": lambda: train_ours(task, dist),
            "transformers": lambda: train_transformers(task),
            "nanogpt": lambda: train_nanogpt(task, arguments.checkout, arguments.compile),
        }
        serve(task, build[arguments.row](), dist, answers)


if __name__ == "__main__":
    with reporting("bench.train"):
        main(sys.argv[1:])
