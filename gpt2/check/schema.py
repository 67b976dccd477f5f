"""Validation of the whole params.yaml: every section of every scale, all faults at once."""

from collections.abc import Callable
from typing import Any

from gpt2.generate import GenerateConfig
from gpt2.heads.similarity import HeadsConfig
from gpt2.hellaswag.benchmark import BenchmarkConfig
from gpt2.hellaswag.scoring import HellaswagConfig
from gpt2.model.config import ModelShape, Norm
from gpt2.norm_study.study import NormStudyConfig
from gpt2.pipeline.files import UserError
from gpt2.pipeline.hardware import HardwareConfig
from gpt2.pipeline.params import REMEDY, Config, Scale, build
from gpt2.prepare.prepare import PrepareConfig
from gpt2.prune.remove import PruneConfig
from gpt2.replicates.study import ReplicatesConfig
from gpt2.tokenizer.bpe import VocabularyConfig
from gpt2.tokenizer.encodings import GPT2, GPT2_VOCAB_SIZE, load_encoding
from gpt2.tokenizer.tokenize import TokenizeConfig
from gpt2.tokenizer_study.runs import VocabularyRunsConfig, count_steps
from gpt2.tokenizer_study.study import TokenizerStudyConfig
from gpt2.train.loop import TrainConfig


class Sections(Config):
    """All sections of a scale."""

    hardware: HardwareConfig
    prepare: PrepareConfig
    benchmark: BenchmarkConfig
    vocabulary: VocabularyConfig
    tokenize: TokenizeConfig
    tokenizer_study: TokenizerStudyConfig
    vocabulary_runs: VocabularyRunsConfig
    model: ModelShape
    norm_study: NormStudyConfig
    train: TrainConfig
    hellaswag: HellaswagConfig
    generate: GenerateConfig
    heads: HeadsConfig
    prune: PruneConfig
    replicates: ReplicatesConfig


class Parameters(Config):
    """params.yaml."""

    norm: Norm
    scale: Scale
    tiny: Sections
    short: Sections
    full: Sections


def find_faults(values: dict[str, Any]) -> list[str]:
    """Every fault of params.yaml as parsed, each with key, value, rule and remedy.

    Rules that join sections are checked once each section is valid by itself.
    """
    try:
        parameters = build(Parameters, values, "", REMEDY)
    except UserError as error:
        return str(error).splitlines()
    blocks = {"tiny": parameters.tiny, "short": parameters.short, "full": parameters.full}
    return [f"{scale}: {fault}" for scale, block in blocks.items() for fault in _joint_faults(parameters.norm, block)]


def _joint_faults(norm: Norm, block: Sections) -> list[str]:
    runs, train, hardware = block.vocabulary_runs, block.train, block.hardware
    # The study adds GPT-2's own vocabulary.
    largest = max(*block.tokenizer_study.vocab_sizes, GPT2_VOCAB_SIZE)
    faults = _fault(lambda: count_steps(runs.budgets[0], runs, largest))
    if block.tokenize.encoding == GPT2:
        faults += _fault(load_encoding)
    if not train.init_from:
        # `gpu` is a number only on the machine that trains.
        processes = hardware.nnodes * (1 if hardware.nproc == "gpu" else int(hardware.nproc))
        faults += _fault(lambda: train.accumulation(block.model.block_size, processes))
    elif norm != "preln":
        faults.append(
            f"train.init_from = {train.init_from!r} loads a Pre-LN model, but norm = {norm!r}; "
            "set norm to preln or train.init_from to null"
        )
    return faults


def _fault(action: Callable[[], object]) -> list[str]:
    """The message of the UserError that `action` raises, if it raises one."""
    try:
        action()
    except UserError as error:
        return [str(error)]
    return []
