"""Validation of the whole params.yaml: every section of every scale, all faults at once."""

from collections.abc import Callable
from typing import Any

from gpt2.generate import GenerateConfig
from gpt2.heads.similarity import HeadsConfig
from gpt2.hellaswag.benchmark import BenchmarkConfig
from gpt2.hellaswag.scoring import HellaswagConfig
from gpt2.model.config import GPTConfig, Norm
from gpt2.norm_study.study import NormStudyConfig
from gpt2.pipeline.files import UserError
from gpt2.pipeline.hardware import HardwareConfig
from gpt2.pipeline.params import PARAMS_FILE, REMEDY, SCALES, Config, active_scale, build, load
from gpt2.prepare.prepare import PrepareConfig
from gpt2.prune.remove import PruneConfig
from gpt2.replicates.study import ReplicatesConfig
from gpt2.tokenizer.bpe import VocabularyConfig
from gpt2.tokenizer.encodings import GPT2, GPT2_VOCAB_SIZE, load_encoding
from gpt2.tokenizer.tokenize import TokenizeConfig
from gpt2.tokenizer_study.runs import VocabularyRunsConfig, count_steps
from gpt2.tokenizer_study.study import TokenizerStudyConfig
from gpt2.train.loop import TrainConfig

SECTIONS: dict[str, type[Config]] = {
    "hardware": HardwareConfig,
    "prepare": PrepareConfig,
    "benchmark": BenchmarkConfig,
    "vocabulary": VocabularyConfig,
    "tokenize": TokenizeConfig,
    "tokenizer_study": TokenizerStudyConfig,
    "vocabulary_runs": VocabularyRunsConfig,
    "model": GPTConfig,
    "norm_study": NormStudyConfig,
    "train": TrainConfig,
    "hellaswag": HellaswagConfig,
    "generate": GenerateConfig,
    "heads": HeadsConfig,
    "prune": PruneConfig,
    "replicates": ReplicatesConfig,
}
# Fields of a section that come from elsewhere, with values that are always valid.
KNOWN: dict[str, dict[str, object]] = {"model": {"norm": "preln", "vocab_size": 1}}


class Top(Config):
    """The keys above the scale blocks."""

    norm: Norm


def find_faults(values: dict[str, Any]) -> list[str]:
    """Every fault of params.yaml as parsed, each with key, value, rule and remedy."""
    faults = []
    if unknown := sorted(values.keys() - {"norm", "scale", *SCALES}):
        faults.append(f"{', '.join(unknown)}: not a key of {PARAMS_FILE}; known: norm, scale, {', '.join(SCALES)}")
    faults += _fault(lambda: build(Top, {key: values[key] for key in values.keys() & {"norm"}}, "", REMEDY))
    faults += _fault(lambda: active_scale(values))
    for scale in SCALES:
        faults += _scale_faults(values, scale)
    return faults


def _scale_faults(values: dict[str, Any], scale: str) -> list[str]:
    block = values.get(scale)
    if not isinstance(block, dict):
        return [f"{scale} must be a block with the sections {', '.join(SECTIONS)}"]
    faults = []
    if unknown := sorted(block.keys() - SECTIONS):
        faults.append(f"{scale}.{', '.join(unknown)}: not a section; known: {', '.join(SECTIONS)}")
    configs: dict[str, Any] = {}
    for section, cls in SECTIONS.items():
        try:
            configs[section] = load(section, cls, {**values, "scale": scale}, **KNOWN.get(section, {}))
        except UserError as error:
            faults += str(error).splitlines()
    return faults + [f"{scale}: {fault}" for fault in _joint_faults(values.get("norm"), configs)]


def _joint_faults(norm: object, configs: dict[str, Any]) -> list[str]:
    """Faults that span sections, looked for in the sections that are valid themselves."""
    faults = []
    if "tokenize" in configs and configs["tokenize"].encoding == GPT2:
        faults += _fault(load_encoding)
    if {"tokenizer_study", "vocabulary_runs"} <= configs.keys():
        runs = configs["vocabulary_runs"]
        # GPT-2's own vocabulary is one of those that are tried.
        largest = max(*configs["tokenizer_study"].vocab_sizes, GPT2_VOCAB_SIZE)
        faults += _fault(lambda: count_steps(runs.budgets[0], runs, largest))
    train = configs.get("train")
    if train and train.init_from:
        if norm != "preln":
            faults.append(
                f"train.init_from = {train.init_from!r} are weights of a Pre-LN model, norm = {norm!r}; "
                "set norm to preln or train.init_from to null"
            )
    elif train and {"model", "hardware"} <= configs.keys():
        hardware = configs["hardware"]
        # `gpu` is a number only on the machine that trains.
        processes = hardware.nnodes * (1 if hardware.nproc == "gpu" else hardware.nproc)
        faults += _fault(lambda: train.accumulation(configs["model"].block_size, processes))
    return faults


def _fault(action: Callable[[], object]) -> list[str]:
    """The message with which `action` is refused, if it is."""
    try:
        action()
    except UserError as error:
        return [str(error)]
    return []
