"""Training: the loop, its one step, and what is measured on the way.

Nothing here depends on how many processes train, except the time it takes: data order, losses, gradients and validation
are those of the whole batch.
"""

import logging
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field, PositiveFloat, PositiveInt, model_validator
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from gpt2.data.order import MicroBatches, TrainOrder
from gpt2.hellaswag.items import Benchmark
from gpt2.hellaswag.scoring import evaluate_benchmark
from gpt2.model.dist import Dist, Precision, autocast
from gpt2.model.evaluate import mean_loss
from gpt2.model.gpt import GPT
from gpt2.pipeline.files import UserError
from gpt2.pipeline.interrupt import Interrupt
from gpt2.train import checkpoint
from gpt2.train.curves import TABLES, RowFiles, Rows, read_rows
from gpt2.train.heartbeat import Heartbeat
from gpt2.train.layer_norms import activation_norms, gradient_norms
from gpt2.train.optim import OptimConfig, Optimizer, build_optimizer, lr_at
from gpt2.train.stability import DivergenceWatch

# Validation windows on which activations are measured.
ACTIVATION_WINDOWS = 8
KINDS_OF_TIME = ("start", "step", "data", "eval", "save")
# Weights of the last evaluation, in scratch.
EVALUATED = "evaluated.safetensors"
log = logging.getLogger(__name__)


class TrainConfig(OptimConfig):
    """Section `train`."""

    # Weights to load in place of training (see pretrained.py): a Hugging Face folder or hub id; null trains.
    init_from: str | None = Field(default=None, min_length=1)
    # Length of the run: optimizer steps, or epochs of the training split. One is given, the other null.
    max_steps: PositiveInt | None  # type: ignore[assignment]  # of a run given in epochs, None until `in_steps`
    epochs: PositiveFloat | None
    seed: int
    # Tokens of one optimizer step, over all processes and micro-batches.
    tokens_per_step: PositiveInt
    # Windows of one forward pass in one process: set by memory, without effect on the result beyond rounding.
    micro_batch: PositiveInt
    precision: Precision
    # fp8 products: none, or those of the output matrix in training (bfloat16 on a GPU of compute capability 8.9).
    fp8: Literal["none", "head"] = "none"
    # torch.compile the training step (GPU).
    compile: bool
    # Only kernels that give the same bits every time (GPU; a CPU has no others).
    deterministic: bool
    # Steps between validations, between checkpoints and between lines of the log.
    eval_interval: PositiveInt
    checkpoint_interval: PositiveInt
    log_interval: PositiveInt
    # Validation: this many tokens, and this many benchmark items, whatever the number of processes.
    eval_tokens: PositiveInt
    eval_items: PositiveInt

    @model_validator(mode="after")
    def _consistent(self) -> "TrainConfig":
        if (self.max_steps is None) == (self.epochs is None):
            raise ValueError(f"max_steps={self.max_steps} and epochs={self.epochs}: give one and set the other to null")
        if self.fp8 != "none" and self.precision != "bfloat16":
            raise ValueError(f"fp8={self.fp8} needs precision=bfloat16, not {self.precision}; change one of the two")
        return self

    def in_steps(self, order: TrainOrder) -> "TrainConfig":
        """The same run with its length in steps. Raises UserError if the schedule does not fit that length."""
        if self.init_from:
            return self.model_copy(update={"max_steps": 0, "epochs": None})
        if self.epochs is None:
            return self
        steps = max(1, round(self.epochs * order.windows_per_epoch / order.batch_windows))
        if self.warmup_steps >= steps:
            raise UserError(
                f"train.warmup_steps = {self.warmup_steps} must be less than the {steps} steps of train.epochs = "
                f"{self.epochs:g}; shorten the warm-up or train for longer"
            )
        return self.model_copy(update={"max_steps": steps, "epochs": None})

    @property
    def steps(self) -> int:
        """Optimizer steps of the run; a length in epochs has to be put `in_steps` before."""
        assert self.max_steps is not None
        return self.max_steps

    def batch_windows(self, block_size: int) -> int:
        """Windows of one step; of loaded weights, for which none is taken, one."""
        return 1 if self.init_from else self.tokens_per_step // block_size

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

    def measure_activations(self, model: GPT, dist: Dist) -> list[float]:
        """Norms of the first validation windows, layer by layer; see `activation_norms`."""
        with autocast(dist.device, self.precision):
            return activation_norms(model, self.windows[:ACTIVATION_WINDOWS, :-1].to(dist.device))


@dataclass
class TrainResult:
    """Rows as in rows.TABLES, the step of divergence (-1 if none), and seconds spent by kind.

    `start` is the first step of a process, in which kernels are compiled and memory is taken; it counts in no rate.
    """

    rows: Rows = field(default_factory=lambda: {table: [] for table in TABLES})
    diverged_at_step: int = -1
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(KINDS_OF_TIME, 0.0))
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
    """Train `model` in place for config.max_steps steps, resuming from `scratch` if the main process has a checkpoint.

    Stops early if the run diverges, which is a result and no error: the model then has the last weights whose
    validation loss is finite. On SIGTERM, SIGINT or the death of DVC or torchrun saves a checkpoint after the current
    step and exits with 128 + the signal.
    """
    run = _Run(model, config, order, evaluation, dist, scratch)
    sizes = run.resume()
    with RowFiles(scratch, sizes) if dist.is_main else nullcontext() as run.files, Interrupt() as interrupt:
        run.train(interrupt)
    return run.result


def measure_loaded(model: GPT, evaluation: Evaluation, dist: Dist) -> TrainResult:
    """The result of no step: an evaluation of loaded weights. Raises UserError if their loss is not finite."""
    result = TrainResult()
    with result.timing("eval"):
        measured = evaluation.measure(model, dist)
    if not math.isfinite(measured[0]):
        raise UserError(f"the weights of train.init_from have a validation loss of {measured[0]}; load others")
    log.info("loaded weights: val loss %.4f, benchmark acc %.4f, acc_norm %.4f", *measured)
    result.rows["eval"].append([0, 0, *measured])
    return result


class _Run:
    """One process's part in a run."""

    def __init__(
        self, model: GPT, config: TrainConfig, order: TrainOrder, evaluation: Evaluation, dist: Dist, scratch: Path
    ):
        self.model, self.config, self.order, self.evaluation = model, config, order, evaluation
        self.dist, self.scratch = dist, scratch
        self.optimizer = build_optimizer(model, config)
        self.result, self.watch = TrainResult(), DivergenceWatch()
        self.files: RowFiles | None = None
        self.heartbeat = Heartbeat(scratch) if dist.is_main else None
        self.start = 0
        self.saved: dict[str, float | None] = {"checkpoint_step": 0, "checkpoint_time": None}

    def resume(self) -> dict[str, int] | None:
        """Go on from the main process's newest sound checkpoint; return the sizes of its row files, None without one.

        The other processes get all of it from the main one: they may run on machines that have no scratch.
        """
        state, tensors, rows = self._read_newest() if self.dist.is_main else (None, {}, None)
        state, rows = self.dist.share([state, rows])
        if state is None:
            return None
        checkpoint.restore(self.model, self.optimizer, self.dist.share_tensors(tensors))
        self.result.rows, self.start = rows, state["step"]
        for _, _, loss, _, grad_norm in rows["train"]:
            self.watch.update(loss, grad_norm)
        self.saved["checkpoint_step"] = self.start
        log.info("resuming after step %d", self.start)
        return state["row_sizes"]

    def _read_newest(self) -> tuple[dict | None, dict[str, Tensor], Rows | None]:
        for state, tensors in checkpoint.read_checkpoints(self.scratch):
            try:
                return state, tensors, read_rows(self.scratch, state["row_sizes"])
            except ValueError as error:
                log.warning("the rows up to step %d are damaged (%s); falling back", state["step"], error)
        return None, {}, None

    def train(self, interrupt: Interrupt) -> None:
        """Take the remaining steps."""
        config, result = self.config, self.result
        stepper = Stepper(self.model, self.optimizer, config, self.order, self.dist)
        for step in range(self.start, config.steps):
            evaluating = step % config.eval_interval == 0
            if evaluating and not self._evaluate(step):
                result.diverged_at_step = step
                break
            timed = step > self.start
            with result.timing("step" if timed else "start"):
                loss, stopping = stepper.backward(step, result if timed else None, interrupt)
                gradients = gradient_norms(self.model) if evaluating else []
                grad_norm = stepper.clip()
            if self.watch.update(loss, grad_norm):
                log.warning("diverged at step %d: loss %.4f, gradient norm %.4f", step, loss, grad_norm)
                result.diverged_at_step = step
                break
            if evaluating:
                self._record_layers(step, gradients)
            with result.timing("step" if timed else "start"):
                stepper.update(step)
            result.steps_timed += timed
            self._record("train", [step + 1, self._tokens(step + 1), loss, lr_at(step, config), grad_norm])
            self._tell_progress()
            if stopping or (step + 1) % config.checkpoint_interval == 0:
                self._save(step + 1)
            if stopping:
                # A process that leaves ends torchrun, which would not let the main one save at leisure.
                self.dist.barrier()
                raise SystemExit(interrupt.exit_code)
        if not self._evaluate(len(result.rows["train"])) and result.rows["eval"]:
            self._return_to_evaluated()

    def _tokens(self, steps: int) -> int:
        return steps * self.config.tokens_per_step

    def _record(self, table: str, row: list) -> None:
        self.result.rows[table].append(row)
        if self.files:
            self.files.append(table, row)

    def _record_layers(self, step: int, gradients: list[float]) -> None:
        activations = self.evaluation.measure_activations(self.model, self.dist)
        for layer, norms in enumerate(zip(gradients, activations, strict=True), start=-1):
            self._record("layers", [step, layer, *norms])

    def _evaluate(self, step: int) -> bool:
        """Measure the weights after `step` steps and keep them; return whether their validation loss is finite."""
        evals = self.result.rows["eval"]
        if evals and evals[-1][0] == step:
            return True
        self._beat("evaluating")
        with self.result.timing("eval"):
            measured = self.evaluation.measure(self.model, self.dist)
            finite = math.isfinite(measured[0])
            if finite and self.dist.is_main:
                checkpoint.write_tensors(self.scratch / EVALUATED, self.model.state_dict())
        log.info("step %d: val loss %.4f, benchmark acc %.4f, acc_norm %.4f", step, *measured)
        if finite:
            self._record("eval", [step, self._tokens(step), *measured])
        return finite

    def _return_to_evaluated(self) -> None:
        """Put back the weights of the last row of `eval`."""
        tensors = checkpoint.read_tensors(self.scratch / EVALUATED)[1] if self.dist.is_main else {}
        self.model.load_state_dict(self.dist.share_tensors(tensors))

    def _tell_progress(self) -> None:
        step, _, loss, lr, grad_norm = self.result.rows["train"][-1]
        if step % self.config.log_interval == 0:
            log.info(
                "step %d/%d: loss %.4f, lr %.2e, grad norm %.3f, %.0f tokens/s, %.0f s left",
                *(step, self.config.max_steps, loss, lr, grad_norm, *self._rate()),
            )
        self._beat("training")

    def _rate(self) -> tuple[float, float]:
        """Tokens per second of this process's steps so far, and the seconds that the rest takes at that rate."""
        seconds, timed = self.result.seconds, self.result.steps_timed
        # The first step is slow, but all there is to go by until the second.
        rate = self._tokens(timed or 1) / max(seconds["step"] if timed else seconds["start"], 1e-9)
        return rate, self._tokens(self.config.steps - len(self.result.rows["train"])) / rate

    def _beat(self, doing: str) -> None:
        if not self.heartbeat or not self.heartbeat.due:
            return
        rows, seconds = self.result.rows, self.result.seconds
        rate, eta = self._rate() if seconds["start"] else (0.0, None)
        self.heartbeat.beat(
            {
                "doing": doing,
                "step": len(rows["train"]),
                "max_steps": self.config.max_steps,
                "loss": rows["train"][-1][2] if rows["train"] else None,
                "val_loss": rows["eval"][-1][2] if rows["eval"] else None,
                "tokens_per_s": rate,
                "eta_s": eta,
                "data_wait_percent": 100 * seconds["data"] / max(seconds["step"], 1e-9),
                **self.saved,
            }
        )

    def _save(self, step: int) -> None:
        self._beat("saving")
        with self.result.timing("save"):
            if self.files:
                state = {"step": step, "row_sizes": self.files.sync()}
                checkpoint.save_checkpoint(self.scratch, self.model, self.optimizer, state)
        self.saved = {"checkpoint_step": step, "checkpoint_time": time.time()}


class Stepper:
    """One optimizer step: forward and backward over this process's share of the batch, clipping, and the update."""

    def __init__(
        self,
        model: GPT,
        optimizer: Optimizer,
        config: TrainConfig,
        order: TrainOrder,
        dist: Dist,
    ):
        self.optimizer, self.config, self.dist = optimizer, config, dist
        self.parameters = list(model.parameters())
        self.accumulation = config.accumulation(order.block_size, dist.world_size)
        first = dist.rank * self.accumulation * config.micro_batch
        self.batches = MicroBatches(order, first, config.micro_batch, self.accumulation, dist.device)
        self.forward: Any = torch.compile(model) if config.compile else model
        if dist.world_size > 1:
            self.forward = DistributedDataParallel(self.forward, gradient_as_bucket_view=True)
            # DDP orders its buckets anew after its first backward pass, and with them the sums over processes. By a
            # pass without effect all steps have the same order, the first one of a resumed run too.
            self._pass(0, 0).backward()
            optimizer.zero_grad(set_to_none=True)

    def backward(
        self, step: int, result: TrainResult | None = None, interrupt: Interrupt | None = None
    ) -> tuple[float, bool]:
        """Leave the gradients of the whole batch of `step` in the parameters.

        Return the mean loss of the whole batch, and whether `interrupt` of any process asks to stop. The wait for data
        goes into `result`.
        """
        dist = self.dist
        # Loss and stop share one reduction: all processes leave at the same step.
        shared = torch.zeros(2, dtype=torch.float64, device=dist.device)
        for micro_step in range(self.accumulation):
            last = micro_step == self.accumulation - 1
            with nullcontext() if last or dist.world_size == 1 else self.forward.no_sync():
                loss = self._pass(step, micro_step, result) / self.accumulation
                loss.backward()
            self.batches.read_ahead(step, micro_step)
            shared[0] += loss.detach().double() / dist.world_size
        shared[1] = interrupt is not None and interrupt.requested
        loss, stopping = dist.sum(shared).tolist()
        return loss, stopping > 0

    def _pass(self, step: int, micro_step: int, result: TrainResult | None = None) -> Tensor:
        """Mean loss of one micro-batch of this process."""
        with result.timing("data") if result else nullcontext():
            idx, targets = self.batches.get(step, micro_step)
        with autocast(self.dist.device, self.config.precision):
            return self.forward(idx, targets)

    def clip(self) -> float:
        """Scale the gradients down to the L2 norm of train.grad_clip; return the norm before."""
        return nn.utils.clip_grad_norm_(self.parameters, self.config.grad_clip).item()

    def update(self, step: int) -> None:
        """Apply the optimizer step and zero the gradients."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr_at(step, self.config)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
