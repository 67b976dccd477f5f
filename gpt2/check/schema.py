"""The whole of params.yaml: every section of every scale, checked at once before a pipeline does any work."""

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
}


class Top(Config):
    """The keys above the scale blocks."""

    norm: Norm


def check(values: dict) -> None:
    """Check params.yaml as parsed. Raises UserError with a line for every fault of every scale."""
    faults: list[str] = []

    def attempt(action, *args, place: str = "", **kwargs):
        try:
            return action(*args, **kwargs)
        except UserError as error:
            faults.append(f"{place}{error}")
            return None

    if unknown := sorted(values.keys() - {"norm", "scale", *SCALES}):
        faults.append(f"{', '.join(unknown)}: not a key of {PARAMS_FILE}; known: norm, scale, {', '.join(SCALES)}")
    attempt(build, Top, {key: value for key, value in values.items() if key == "norm"}, "", REMEDY)
    attempt(active_scale, values)
    for scale in SCALES:
        block = values.get(scale)
        if not isinstance(block, dict):
            faults.append(f"{scale} must be a block with the sections {', '.join(SECTIONS)}")
            continue
        if unknown := sorted(block.keys() - SECTIONS):
            faults.append(f"{scale}.{', '.join(unknown)}: not a section; known: {', '.join(SECTIONS)}")
        known = {"model": {"norm": "preln", "vocab_size": 1}}
        scaled = {**values, "scale": scale}
        configs = {
            section: attempt(load, section, cls, scaled, **known.get(section, {})) for section, cls in SECTIONS.items()
        }
        _check_together(scale, values.get("norm"), configs, attempt)
    if faults:
        raise UserError("\n" + "\n".join(faults))


def _check_together(scale: str, norm: object, configs: dict[str, Config | None], attempt) -> None:
    """Rules that span sections, checked where the sections themselves are sound."""
    tokenize, train, model, hardware = (configs[name] for name in ("tokenize", "train", "model", "hardware"))
    if tokenize and tokenize.encoding == GPT2:
        attempt(load_encoding, tokenize.encoding, place=f"{scale}: ")
    study, runs = configs["tokenizer_study"], configs["vocabulary_runs"]
    if study and runs:
        # GPT-2's own vocabulary is among those that are tried.
        largest = max(*study.vocab_sizes, GPT2_VOCAB_SIZE)
        attempt(count_steps, runs.budgets[0], runs, largest, place=f"{scale}: ")
    if train and train.init_from:
        attempt(_require_preln, train, norm, place=f"{scale}: ")
    elif train and model and hardware:
        # `gpu` is a number only on the machine that trains.
        on_each = 1 if hardware.nproc == "gpu" else hardware.nproc
        attempt(train.accumulation, model.block_size, on_each * hardware.nnodes, place=f"{scale}: ")


def _require_preln(train: TrainConfig, norm: object) -> None:
    if norm != "preln":
        raise UserError(
            f"train.init_from = {train.init_from!r} are weights of a Pre-LN model, norm = {norm!r}; set norm to preln "
            "or train.init_from to null"
        )
