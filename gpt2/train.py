"""Training: the loop, its one step, and what is measured on the way.

Nothing here depends on how many processes train, except the time it takes: data order, losses, gradients and validation
are those of the whole batch.
"""

import csv
import logging
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import torch
from pydantic import PositiveInt
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from gpt2 import checkpoint
from gpt2.data import TrainOrder
from gpt2.dist import Dist, Precision, autocast
from gpt2.evaluate import mean_loss
from gpt2.files import UserError
from gpt2.hellaswag import evaluate_benchmark
from gpt2.items import Benchmark
from gpt2.model import GPT
from gpt2.optim import OptimConfig, build_optimizer, lr_at
from gpt2.stability import DivergenceWatch

TRAIN_COLUMNS = ("step", "tokens", "loss", "lr", "grad_norm")
EVAL_COLUMNS = ("step", "tokens", "val_loss", "hellaswag_acc", "hellaswag_acc_norm")
log = logging.getLogger(__name__)


class TrainConfig(OptimConfig):
    """Section `train`."""

    seed: int
    # Tokens of one optimizer step, over all processes and micro-batches.
    tokens_per_step: PositiveInt
    # Windows of one forward pass in one process: set by memory, without effect on the result beyond rounding.
    micro_batch: PositiveInt
    precision: Precision
    # torch.compile the training step (GPU).
    compile: bool
    # Steps between validations, between checkpoints and between lines of the log.
    eval_interval: PositiveInt
    checkpoint_interval: PositiveInt
    log_interval: PositiveInt
    # Validation: this many tokens, and this many benchmark items, whatever the number of processes.
    eval_tokens: PositiveInt
    eval_items: PositiveInt

    def batch_windows(self, block_size: int) -> int:
        """Windows of one step. Raises UserError if tokens_per_step is not a multiple of block_size."""
        if self.tokens_per_step % block_size:
            raise _indivisible("train.tokens_per_step", self.tokens_per_step, "model.block_size", block_size)
        return self.tokens_per_step // block_size

    def accumulation(self, block_size: int, world_size: int) -> int:
        """Micro-batches of one step in one process. Raises UserError if the step does not divide into them."""
        unit = block_size * self.micro_batch * world_size
        if self.tokens_per_step % unit:
            rule = (
                f"model.block_size × train.micro_batch × processes = {block_size} × {self.micro_batch} × {world_size}"
            )
            raise _indivisible("train.tokens_per_step", self.tokens_per_step, rule, unit)
        return self.tokens_per_step // unit


def _indivisible(key: str, value: int, rule: str, unit: int) -> UserError:
    near = sorted({max(unit, value // unit * unit), (value // unit + 1) * unit})
    return UserError(
        f"{key} = {value} must be a multiple of {unit} ({rule}); nearest values: {', '.join(map(str, near))}"
    )


@dataclass
class Evaluation:
    """What is measured during training: validation windows (N, T + 1) and benchmark items."""

    windows: Tensor
    benchmark: Benchmark
    batch_size: int
    batch_tokens: int
    precision: Precision

    def measure(self, model: GPT, dist: Dist) -> tuple[float, float, float]:
        """val_loss in nats, and the accuracies `completion_acc` and `completion_acc_norm`."""
        val_loss = mean_loss(model, self.windows, self.batch_size, self.precision, dist)
        figures, _ = evaluate_benchmark(model, self.benchmark, "completion", self.batch_tokens, dist)
        return val_loss, figures["completion_acc"], figures["completion_acc_norm"]


@dataclass
class TrainResult:
    """Rows as in TRAIN_COLUMNS and EVAL_COLUMNS, the step of divergence (-1 if none), and seconds spent by kind."""

    train_rows: list[list] = field(default_factory=list)
    eval_rows: list[list] = field(default_factory=list)
    diverged_at_step: int = -1
    seconds: dict[str, float] = field(default_factory=lambda: {"step": 0.0, "data": 0.0, "eval": 0.0, "save": 0.0})
    steps_timed: int = 0

    @contextmanager
    def timing(self, kind: str) -> Iterator[None]:
        """Add the time of the block to `seconds[kind]`."""
        started = time.perf_counter()
        yield
        self.seconds[kind] += time.perf_counter() - started


def fit(
    model: GPT, config: TrainConfig, order: TrainOrder, evaluation: Evaluation, dist: Dist, scratch: Path
) -> TrainResult:
    """Train `model` in place for config.max_steps steps, resuming from `scratch` if it holds a checkpoint.

    Stops early if the run diverges, which is a result and no error: the model then has the weights of the last row. On
    SIGTERM or SIGINT saves a checkpoint after the current step and exits with 128 + the signal.
    """
    optimizer = build_optimizer(model, config)
    stepper = Stepper(model, optimizer, config, order, dist)
    result, watch = TrainResult(), DivergenceWatch()
    state = checkpoint.load_checkpoint(scratch, model, optimizer)
    start = state["step"] if state else 0
    if state:
        result.train_rows, result.eval_rows = _read_rows(scratch, state)
        for row in result.train_rows:
            watch.update(row[2], row[4])
        log.info("resuming after step %d", start)
    with _log_files(scratch, state, dist) as (train_log, eval_log), _stop_signals() as stop:
        for step in range(start, config.max_steps):
            if step % config.eval_interval == 0:
                _evaluate(model, evaluation, config, step, result, eval_log, dist)
            with result.timing("step"):
                loss, grad_norm, stopping = stepper.backward(step, stop, result)
            if watch.update(loss, grad_norm):
                log.warning("diverged at step %d: loss %.4f, gradient norm %.4f", step, loss, grad_norm)
                result.diverged_at_step = step
                break
            with result.timing("step"):
                stepper.update(step)
            result.steps_timed += 1
            row = [step + 1, (step + 1) * config.tokens_per_step, loss, lr_at(step, config), grad_norm]
            _record(row, result.train_rows, train_log)
            if (step + 1) % config.log_interval == 0:
                _log_progress(row, config, result)
            if stopping or (step + 1) % config.checkpoint_interval == 0:
                with result.timing("save"):
                    _save(scratch, model, optimizer, step + 1, train_log, eval_log, dist)
            if stopping:
                # The signal may have reached another process only.
                raise SystemExit(128 + max(stop, default=signal.SIGTERM))
        _evaluate(model, evaluation, config, len(result.train_rows), result, eval_log, dist)
    return result


class Stepper:
    """One optimizer step: forward and backward over this process's share of the batch, clipping; then the update."""

    def __init__(
        self, model: GPT, optimizer: torch.optim.Optimizer, config: TrainConfig, order: TrainOrder, dist: Dist
    ):
        self.optimizer, self.config, self.order, self.dist = optimizer, config, order, dist
        self.parameters = list(model.parameters())
        self.accumulation = config.accumulation(order.block_size, dist.world_size)
        self.forward: nn.Module = torch.compile(model) if config.compile else model
        if dist.world_size > 1:
            self.forward = DistributedDataParallel(self.forward, gradient_as_bucket_view=True)

    def backward(self, step: int, stop: list[int], result: TrainResult) -> tuple[float, float, bool]:
        """Leave the clipped gradients of `step` in the parameters.

        Return the mean loss of the whole batch, the gradient norm before clipping, and whether a signal in `stop` of
        any process asks to end.
        """
        config, dist = self.config, self.dist
        # Loss and stop signal share one reduction: all processes leave at the same step.
        shared = torch.zeros(2, dtype=torch.float64, device=dist.device)
        for micro_step in range(self.accumulation):
            with result.timing("data"):
                first = (dist.rank * self.accumulation + micro_step) * config.micro_batch
                idx, targets = (
                    rows.to(dist.device, non_blocking=True)
                    for rows in self.order.batch(step, first, config.micro_batch)
                )
            last = micro_step == self.accumulation - 1
            with nullcontext() if last or dist.world_size == 1 else self.forward.no_sync():
                with autocast(dist.device, config.precision):
                    loss = self.forward(idx, targets) / self.accumulation
                loss.backward()
            shared[0] += loss.detach().double() / dist.world_size
        grad_norm = nn.utils.clip_grad_norm_(self.parameters, config.grad_clip).item()
        shared[1] = len(stop)
        loss, stopping = dist.sum(shared).tolist()
        return loss, grad_norm, stopping > 0

    def update(self, step: int) -> None:
        """Take the step that the gradients tell, and drop them."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr_at(step, self.config)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


def _evaluate(
    model: GPT, evaluation: Evaluation, config: TrainConfig, step: int, result: TrainResult, eval_log, dist: Dist
) -> None:
    if result.eval_rows and result.eval_rows[-1][0] == step:
        return
    with result.timing("eval"):
        measured = evaluation.measure(model, dist)
    _record([step, step * config.tokens_per_step, *measured], result.eval_rows, eval_log)
    log.info("step %d: val loss %.4f, benchmark acc %.4f, acc_norm %.4f", step, *measured)


def _log_progress(row: list, config: TrainConfig, result: TrainResult) -> None:
    step, _, loss, lr, grad_norm = row
    rate = result.steps_timed * config.tokens_per_step / result.seconds["step"]
    eta = (config.max_steps - step) * config.tokens_per_step / rate
    log.info(
        "step %d/%d: loss %.4f, lr %.2e, grad norm %.3f, %.0f tokens/s, %.0f s left",
        *(step, config.max_steps, loss, lr, grad_norm, rate, eta),
    )


@contextmanager
def _stop_signals() -> Iterator[list[int]]:
    """Collect SIGTERM and SIGINT in a list instead of dying of them."""
    received: list[int] = []
    handlers = {
        number: signal.signal(number, lambda signum, _: received.append(signum))
        for number in (signal.SIGTERM, signal.SIGINT)
    }
    try:
        yield received
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


# The rows of a run lie in scratch as CSV. A checkpoint records their length, to which a resumed run cuts them.


@contextmanager
def _log_files(scratch: Path, state: dict | None, dist: Dist) -> Iterator[tuple]:
    if not dist.is_main:
        yield None, None
        return
    files = []
    for name in ("train.csv", "eval.csv"):
        file = open(scratch / name, "a+", encoding="utf-8", newline="")  # noqa: SIM115
        file.truncate(state["log_bytes"][name] if state else 0)
        files.append(file)
    try:
        yield tuple(files)
    finally:
        for file in files:
            file.close()


def _record(row: list, rows: list[list], file) -> None:
    rows.append(row)
    if file:
        csv.writer(file, lineterminator="\n").writerow(row)


def _read_rows(scratch: Path, state: dict) -> tuple[list[list], list[list]]:
    tables = []
    for name in ("train.csv", "eval.csv"):
        text = (scratch / name).read_bytes()[: state["log_bytes"][name]].decode()
        tables.append([[int(a), int(b), *map(float, rest)] for a, b, *rest in csv.reader(text.splitlines())])
    return tables[0], tables[1]


def _save(scratch: Path, model: GPT, optimizer, step: int, train_log, eval_log, dist: Dist) -> None:
    if not dist.is_main:
        return
    sizes = {}
    for name, file in (("train.csv", train_log), ("eval.csv", eval_log)):
        file.flush()
        os.fsync(file.fileno())
        sizes[name] = file.tell()
    checkpoint.save_checkpoint(scratch, model, optimizer, {"step": step, "log_bytes": sizes})
