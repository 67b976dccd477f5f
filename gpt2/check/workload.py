"""What the stages of a run have to do: the work, the bytes written and the memory of each, by arithmetic alone.

C = n_embd, L = n_layer, T = block_size, M heads of all layers together.
"""

from dataclasses import dataclass, replace

from gpt2.check.corpus_size import DOCS_ZSTD, HUB_DOWNLOAD, PROSE_ZSTD, WORD_BYTES, Volume
from gpt2.check.machine import Machine
from gpt2.check.schema import SECTIONS
from gpt2.generate import GenerateConfig
from gpt2.heads.similarity import HeadsConfig
from gpt2.hellaswag.benchmark import BenchmarkConfig
from gpt2.hellaswag.items import ENDINGS, PROTOCOLS
from gpt2.hellaswag.scoring import HellaswagConfig
from gpt2.model.config import GPTConfig, ModelShape
from gpt2.model.flops import training_flops_per_token
from gpt2.model.loss import CHUNK_BYTES
from gpt2.norm_study.study import NormStudyConfig
from gpt2.pipeline.hardware import HardwareConfig
from gpt2.pipeline.params import load
from gpt2.pipeline.workers import AHEAD
from gpt2.prepare.corpus import ROW_GROUP_DOCUMENTS
from gpt2.prepare.prepare import PrepareConfig
from gpt2.prune.frontier import COLUMNS, STEPWISE
from gpt2.prune.remove import PruneConfig, claimed_count
from gpt2.prune.similarity_orders import SIMILAR_ORDERS
from gpt2.tokenizer.bpe import VocabularyConfig
from gpt2.tokenizer.encodings import GPT2_VOCAB_SIZE as VOCAB_SIZE
from gpt2.tokenizer.encodings import trained_size
from gpt2.tokenizer.tokenize import PROCESS_BYTES, TokenizeConfig
from gpt2.tokenizer_study.runs import VocabularyRunsConfig
from gpt2.tokenizer_study.study import TokenizerStudyConfig
from gpt2.train.checkpoint import KEPT
from gpt2.train.loop import TrainConfig

GIB = 2**30

# HellaSwag's validation split: items, bytes of one as JSON, tokens of a row (context and ending) and of its ending.
HELLASWAG_ITEMS, HELLASWAG_ITEM_BYTES, HELLASWAG_ROW, HELLASWAG_ENDING = 10_042, 1_090, 77, 29

# Resident bytes of a process with the libraries it imports: text, torch on a CPU, torch with a GPU.
TEXT_PROCESS, TORCH_PROCESS, GPU_PROCESS = 0.2 * GIB, 0.4 * GIB, 3 * GIB
# Reading and writing Parquet, and for each document seen its key in a table that may just double.
PARQUET_PROCESS, KEY_BYTES = 0.35 * GIB, 32
# Held for each byte of a token shard, one that fills and one that is written, and for each byte of text that
# vocabularies are trained on.
SHARD_COPIES, TEXT_COPIES = 2, 2.7
# Saved for the backward pass, in bytes for each token, channel and layer; and alive at once in a forward pass.
ACTIVATION_BYTES = {"float32": 64, "bfloat16": 40}
FORWARD_BYTES = 40
# fp32 weights, gradients and two moments; a checkpoint holds all but the gradients.
TRAINING_COPIES, CHECKPOINT_COPIES = 4, 3
# A line of a curve, of the table of benchmark scores and of the matrix of heads; pages of the report.
CSV_ROW, SCORE_ROW, HEADS_ROW, REPORT_BYTES, SMALL_FILE = 80, 14, 18, 1_400_000, 5_000


@dataclass(frozen=True)
class Plan:
    """The sections of one scale."""

    scale: str
    hardware: HardwareConfig
    prepare: PrepareConfig
    benchmark: BenchmarkConfig
    vocabulary: VocabularyConfig
    tokenize: TokenizeConfig
    tokenizer_study: TokenizerStudyConfig
    vocabulary_runs: VocabularyRunsConfig
    model: GPTConfig
    norm_study: NormStudyConfig
    train: TrainConfig
    hellaswag: HellaswagConfig
    generate: GenerateConfig
    heads: HeadsConfig
    prune: PruneConfig


def load_plan(values: dict, scale: str) -> Plan:
    """The plan of `scale` from params.yaml as parsed. Raises UserError at the first section with a fault."""
    scaled = {**values, "scale": scale}
    vocab_size = trained_size(load("tokenize", TokenizeConfig, scaled).encoding) or VOCAB_SIZE
    known = {"model": {"norm": values.get("norm"), "vocab_size": vocab_size}}
    return Plan(scale, **{name: load(name, cls, scaled, **known.get(name, {})) for name, cls in SECTIONS.items()})


@dataclass(frozen=True)
class Need:
    """What one stage takes.

    Its work is `text` UTF-8 bytes or `flops` operations, done by `parallel` workers or devices at once; a stage with
    neither takes about the same time at any scale. `written` are bytes of its outputs; `memory` and `gpu_memory` bytes
    on this machine, the latter on each GPU.
    """

    written: float
    memory: float
    text: float = 0.0
    flops: float = 0.0
    parallel: int = 1
    gpu_memory: float = 0.0

    @property
    def work(self) -> float:
        """Share of one worker or device, for ratios between runs of the same stage."""
        return (self.text or self.flops or 1.0) / self.parallel


def count_parameters(config: GPTConfig) -> int:
    """Parameters of a GPT, the padding of its vocabulary left out."""
    C, final_norm = config.n_embd, 2 * config.n_embd if config.norm == "preln" else 0
    embeddings = (config.vocab_size + config.block_size) * C
    return embeddings + config.n_layer * (12 * C**2 + 13 * C) + final_norm


def forward_flops(config: GPTConfig, tokens: float, predicted: float | None = None) -> float:
    """Operations of a forward pass over `tokens`, with logits for `predicted` of them (all if None)."""
    classifier = 2 * config.vocab_size * config.n_embd
    blocks = training_flops_per_token(config, config.vocab_size) / 3 - classifier
    return blocks * tokens + classifier * (tokens if predicted is None else predicted)


class Workload:
    """The needs of every stage of a plan on a machine."""

    def __init__(self, plan: Plan, volume: Volume, machine: Machine):
        self.plan, self.volume, self.machine = plan, volume, machine
        self._on_gpu = machine.device_type == "cuda"
        self._model_bytes = 4 * count_parameters(plan.model)

    @property
    def steps(self) -> int:
        """Optimizer steps of the training run."""
        train, prepare = self.plan.train, self.plan.prepare
        if train.init_from:
            return 0
        if train.epochs is None:
            return train.max_steps
        kept = 1 - (prepare.val_percent + prepare.test_percent) / 100
        return max(1, round(train.epochs * kept * self.volume.tokens / train.tokens_per_step))

    @property
    def processes(self) -> int:
        """Training processes on this machine; one where `gpu` asks for GPUs that are not there."""
        nproc = self.plan.hardware.nproc
        return max(1, len(self.machine.gpus)) if nproc == "gpu" else nproc

    @property
    def download_bytes(self) -> float:
        """What `prepare` fetches from the hub, roughly: files come whole."""
        return HUB_DOWNLOAD * self.volume.n_bytes if self.plan.prepare.source == "fineweb_edu" else 0.0

    @property
    def checkpoint_bytes(self) -> float:
        """Weights and optimizer state."""
        return CHECKPOINT_COPIES * self._model_bytes

    @property
    def scratch_bytes(self) -> float:
        """The checkpoints that are kept and the one being written, and likewise the weights last evaluated."""
        if not self.steps:
            return 0.0
        return (KEPT + 1) * self.checkpoint_bytes + 2 * self._model_bytes

    @property
    def checkpoints(self) -> int:
        """Checkpoints written in the course of the run."""
        return self.steps // self.plan.train.checkpoint_interval

    def needs(self) -> dict[str, Need]:
        """What each stage takes, in the order of the pipeline."""
        return {
            "prepare": self._prepare(),
            "benchmark": self._benchmark(),
            "tokenize": self._tokenize(),
            "tokenizer-study": self._tokenizer_study(),
            "norm-study": self._norm_study(),
            "train": self._train(),
            "hellaswag": self._hellaswag(),
            "generate": self._generate(),
            "head-similarity": self._head_similarity(),
            "prune": self._prune(),
            "report": Need(REPORT_BYTES, TEXT_PROCESS),
        }

    def _workers(self) -> int:
        return min(self.plan.hardware.workers, self.machine.cores)

    def _prepare(self) -> Need:
        n_bytes, documents = self.volume.n_bytes, self.volume.documents
        if self.plan.prepare.source == "docs":
            workers = self._workers()
            return Need(DOCS_ZSTD * n_bytes, (1 + workers) * TEXT_PROCESS, text=n_bytes, parallel=workers)
        return Need(PROSE_ZSTD * n_bytes, PARQUET_PROCESS + KEY_BYTES * documents, text=n_bytes)

    def _items(self) -> tuple[float, float, float]:
        """Benchmark items, tokens of each of their rows, and how many of these are of the ending."""
        config = self.plan.benchmark
        if config.source != "heldout":
            return config.items or HELLASWAG_ITEMS, HELLASWAG_ROW, HELLASWAG_ENDING
        words = config.context_words + config.ending_words
        test_bytes = self.volume.n_bytes * self.plan.prepare.test_percent / 100
        tokens_of_word = WORD_BYTES / self.volume.bytes_per_token
        items = min(config.items, test_bytes // (words * WORD_BYTES))
        return items, words * tokens_of_word, config.ending_words * tokens_of_word

    def _benchmark(self) -> Need:
        config, items = self.plan.benchmark, self._items()[0]
        if config.source != "heldout":
            return Need(items * HELLASWAG_ITEM_BYTES, PARQUET_PROCESS)
        # The context stands in two fields; names of the fields and numbers take about 120 bytes.
        item_bytes = (2 * config.context_words + ENDINGS * config.ending_words) * WORD_BYTES + 120
        return Need(items * item_bytes, TEXT_PROCESS)

    def _tokenize(self) -> Need:
        items, row_tokens, _ = self._items()
        # Of each row its uint16 tokens and three int64 numbers.
        benchmark = items * ENDINGS * len(PROTOCOLS) * (2 * row_tokens + 24)
        shard = 2 * min(self.plan.tokenize.shard_tokens, self.volume.tokens)
        processes = max(1, min(self._workers(), int(self.volume.n_bytes / PROCESS_BYTES)))
        memory = TEXT_PROCESS + SHARD_COPIES * shard
        if processes > 1:
            row_group = 2 * ROW_GROUP_DOCUMENTS * self.volume.tokens / self.volume.documents
            memory += processes * (TEXT_PROCESS + AHEAD * row_group)
        trained = self._vocabulary_memory() if trained_size(self.plan.tokenize.encoding) else 0.0
        memory = max(memory, TEXT_PROCESS + trained)
        return Need(2 * self.volume.tokens + benchmark, memory, text=self.volume.n_bytes, parallel=processes)

    def _vocabulary_memory(self) -> float:
        """What the training of vocabularies holds."""
        return TEXT_COPIES * min(self.plan.vocabulary.train_bytes, self.volume.n_bytes)

    def _tokenizer_study(self) -> Need:
        config = self.plan.vocabulary_runs
        shape = {key: getattr(config, key) for key in ModelShape.model_fields}
        sizes = [*self.plan.tokenizer_study.vocab_sizes, VOCAB_SIZE]
        models = [GPTConfig(**shape, vocab_size=size, norm="preln") for size in sizes]
        # Every held-out token passes the model twice.
        judged = 2 * config.eval_bytes / self.volume.bytes_per_token
        judging = len(config.budgets) * sum(forward_flops(model, judged) for model in models)
        runs = len(config.budgets) * len(config.seeds) * len(sizes)
        memory = self._training_memory(models[-1], config.micro_batch, config.precision)
        processes = 1 if self._on_gpu else min(runs, self.plan.hardware.threads)
        flops = len(config.seeds) * (sum(config.budgets) * len(sizes) + judging)
        need = self._model_need(4 * SMALL_FILE, memory, flops, processes=processes)
        # The text of the runs as int32 ids of every vocabulary.
        ids = 4 * len(sizes) * min(config.text_bytes, self.volume.n_bytes) / self.volume.bytes_per_token
        return replace(need, memory=need.memory + self._vocabulary_memory() + ids)

    def _norm_study(self) -> Need:
        config = self.plan.norm_study
        runs = len(config.norms) * len(config.max_lrs) * len(config.warmup_steps) * len(config.seeds)
        shape = {key: getattr(config, key) for key in ModelShape.model_fields}
        model = GPTConfig(**shape, vocab_size=config.vocab_size, norm="preln")
        tokens = config.max_steps * config.batch_windows * config.block_size
        flops = training_flops_per_token(model, model.vocab_size) * tokens + forward_flops(model, config.eval_tokens)
        memory = self._training_memory(model, config.micro_batch, config.precision)
        # On a CPU one process a thread, each with a run of its own.
        processes = 1 if self._on_gpu else min(runs, self.plan.hardware.threads)
        return self._model_need(runs * config.max_steps * CSV_ROW, memory, runs * flops, processes=processes)

    def _train(self) -> Need:
        config, model = self.plan.train, self.plan.model
        flops = training_flops_per_token(model, model.vocab_size) * self.steps * config.tokens_per_step
        evaluations = -(-self.steps // config.eval_interval) + 1
        evaluation = forward_flops(model, config.eval_tokens) + self._benchmark_flops(config.eval_items)
        memory = self._training_memory(model, config.micro_batch, config.precision)
        return self._model_need(
            self._model_bytes + self.steps * CSV_ROW,
            memory,
            flops + evaluations * evaluation,
            processes=self.processes,
            parallel=self.plan.hardware.nnodes * (self.processes if self._on_gpu else 1),
        )

    def _benchmark_flops(self, most_items: float = float("inf")) -> float:
        """One protocol over the items, four rows each; logits only for the endings."""
        items, row_tokens, ending_tokens = self._items()
        rows = ENDINGS * min(items, most_items)
        return forward_flops(self.plan.model, rows * row_tokens, rows * ending_tokens)

    def _hellaswag(self) -> Need:
        memory = self._forward_memory(self.plan.hellaswag.batch_tokens)
        return self._model_need(self._items()[0] * SCORE_ROW, memory, len(PROTOCOLS) * self._benchmark_flops())

    def _generate(self) -> Need:
        config, model = self.plan.generate, self.plan.model
        sequences = len(config.prompts) * config.num_seq
        # A new token passes the model once; beyond the context once more, without logits, when half of it is dropped.
        again = max(0, config.max_tokens - model.block_size)
        flops = sequences * (forward_flops(model, config.max_tokens) + forward_flops(model, again, 0))
        # Keys and values of all that a context holds, and what a pass over most of one computes.
        window = min(model.block_size, config.max_tokens)
        cache = 2 * 4 * config.num_seq * model.n_layer * window * model.n_embd
        return self._model_need(SMALL_FILE, cache + self._forward_memory(config.num_seq * window), flops)

    def _head_similarity(self) -> Need:
        config, model = self.plan.heads, self.plan.model
        C, T, n_heads = model.n_embd, model.block_size, model.n_layer * model.n_head
        # Products of all pairs of heads, for each token over half of T keys in each of three passes (the model, on
        # shuffled tokens, and an untrained one), and once over D channels of a head and C of the stream.
        patterns, outputs = n_heads**2 * T, 2 * n_heads**2 * (model.head_dim + C)
        flops = 3 * (forward_flops(model, config.n_tokens, 0) + patterns * config.n_tokens) + outputs * config.n_tokens
        # What compare_heads holds of one batch, or compare_circuits of the weights, beside two models.
        batch = model.n_layer * C * (16 * min(config.batch_size * T, config.n_tokens) + 24 * T)
        written = n_heads**2 * (8 * 8 + HEADS_ROW)
        return self._model_need(written, 2 * self._model_bytes + max(batch, 64 * model.n_layer * C**2), flops)

    def _prune(self) -> Need:
        config, model = self.plan.prune, self.plan.model
        n_heads = model.n_layer * model.n_head
        counts = {claimed_count(n_heads), *(round(share * n_heads) for share in config.shares)}
        # One order each but for random; the whole model is evaluated, each head's removal and the random sets.
        orders = sum(len(config.random_seeds) if column.criterion == "random" else 1 for column in COLUMNS)
        sets = 1 + n_heads + config.random_sets + len(counts) * (orders + len(SIMILAR_ORDERS))
        flops = sets * forward_flops(model, config.eval_tokens)
        # Taylor scores of the whole model, and again at each count but the last.
        flops += len(counts) * training_flops_per_token(model, model.vocab_size) * config.scoring_tokens
        # order_by_loss tries every head that is left, in half of the blocks on average.
        tries = max(counts) * (n_heads - max(counts) / 2)
        flops += tries * forward_flops(model, config.greedy_tokens / 2, config.greedy_tokens)
        flops += 3 * self._benchmark_flops()
        recovered = config.recovery_steps * config.batch_size * model.block_size
        flops += training_flops_per_token(model, model.vocab_size) * recovered
        # gather_moments passes the calibration tokens once, refit_stepwise three times for each of its sets; products
        # are taken of C channels there and of 2 C here.
        stepwise = len(counts) * len(STEPWISE)
        flops += (1 + 3 * stepwise) * forward_flops(model, config.calibration_tokens, 0)
        flops += (1 + 4 * stepwise) * 2 * model.n_layer * model.n_embd**2 * config.calibration_tokens
        sums = 8 * model.n_embd * (model.n_layer * model.n_embd + config.calibration_tokens)
        memory = self._training_memory(model, config.batch_size, "float32") + sums
        # The models whose speed is compared.
        memory += (len(counts) + 2) * self._model_bytes
        return self._model_need(self._model_bytes + SMALL_FILE, memory, flops)

    def _model_need(self, written: float, memory: float, flops: float, processes: int = 1, parallel: int = 1) -> Need:
        """`memory` is what one process takes beside its libraries, on the device where the model is."""
        if self._on_gpu:
            return Need(written, processes * GPU_PROCESS, flops=flops, parallel=parallel, gpu_memory=memory)
        return Need(written, processes * (TORCH_PROCESS + memory), flops=flops, parallel=parallel)

    def _training_memory(self, model: GPTConfig, micro_batch: int, precision: str) -> float:
        saved = ACTIVATION_BYTES[precision] * micro_batch * model.block_size * model.n_embd * model.n_layer
        return TRAINING_COPIES * 4 * count_parameters(model) + saved + self._loss_memory()

    def _forward_memory(self, tokens: float) -> float:
        return self._model_bytes + FORWARD_BYTES * tokens * self.plan.model.n_embd + self._loss_memory()

    def _loss_memory(self) -> float:
        """A chunk of logits and what is computed from it."""
        return 2 * CHUNK_BYTES[self.machine.device_type]
