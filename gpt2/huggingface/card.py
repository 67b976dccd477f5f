"""The model card of an exported model: what it is, what it was trained on, and what was measured on it."""

import os
from collections.abc import Mapping
from pathlib import Path

from ruamel.yaml import YAML, YAMLError

from gpt2.model.gpt import GPT
from gpt2.pipeline.files import UserError, read_json
from gpt2.report.markdown import number, table

# Files of metrics describe the models that the pipeline writes, and these only: for each its figures.
FIGURES = {
    "gpt2": {
        "Validation loss (nats per token)": "train.val_loss",
        "Validation perplexity": "train.val_perplexity",
        "Validation bits per byte": "train.val_bits_per_byte",
        "Benchmark, `completion` protocol, accuracy": "hellaswag.completion_acc",
        "Benchmark, `completion` protocol, mean per token": "hellaswag.completion_acc_norm",
        "Benchmark, `harness` protocol, accuracy": "hellaswag.harness_acc",
        "Benchmark, `harness` protocol, by characters": "hellaswag.harness_acc_norm",
    },
    "pruned": {
        "Heads removed": "prune.pruned_heads",
        "Test perplexity": "prune.pruned_perplexity",
        "Test perplexity before heads were removed": "prune.baseline_perplexity",
    },
}
BENCHMARKS = {
    "heldout": "items of HellaSwag's form made from held-out documents of this corpus, not HellaSwag itself",
    "file": "HellaSwag items from a local file",
    "hub": "HellaSwag",
}
USE = """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model, tokenizer = (kind.from_pretrained("FOLDER") for kind in (AutoModelForCausalLM, AutoTokenizer))
prompt = tokenizer("Once upon a time", return_tensors="pt")
print(tokenizer.decode(model.generate(**prompt, max_new_tokens=50, do_sample=True)[0]))
```"""


def write_card(model: GPT, folder: Path, encoding: str = "gpt2") -> str:
    """README.md of the exported `model` of `folder`, with its metrics where folder is one of the pipeline's.

    A figure whose file or key is missing is left out.
    """
    place = Path(os.path.abspath(folder))
    ours = place.parent.name == "models" and place.name in FIGURES
    metrics = _read_metrics(place.parent.parent) if ours else {}
    recorded = _read_recorded(place.parent.parent) if ours else {}
    config = model.config
    origin = "GPT-2's" if encoding == "gpt2" else f"`{encoding}`, trained on the same corpus:"
    shape = [
        ("Parameters", number(model.n_params())),
        ("Layers", number(config.n_layer)),
        ("Heads of a layer", number(config.n_head)),
        ("Channels", number(config.n_embd)),
        ("Context (tokens)", number(config.block_size)),
        ("Vocabulary", f"{number(config.vocab_size)} ({origin} byte-level BPE)"),
        ("Layer norm", "before attention and MLP (Pre-LN)"),
    ]
    if config.heads is not None:
        left = ", ".join(map(str, config.heads))
        shape.append(("Heads left after pruning, by layer", f"{left}; the removed ones are zeros in these files"))
    sections = [
        _front_matter(metrics),
        "# GPT-2",
        "A base model: it continues text. It was not tuned to follow instructions or to converse.",
        table(("", ""), shape, "lr"),
        f"## Training\n\n{_tell_training(metrics, recorded)}",
        f"## Figures\n\n{_list_figures(metrics, recorded, place.name)}",
        f"## Use\n\n{USE}",
        "`<|endoftext|>` stood between the documents of the training and is begin and end of text. AutoTokenizer reads "
        "it as that token wherever a text spells it out; in the training texts it was plain characters.",
    ]
    return "\n\n".join(sections) + "\n"


def _read_metrics(root: Path) -> dict[str, Mapping]:
    """The files of metrics that there are, by name."""
    return {path.stem: read_json(path) for path in sorted((root / "metrics").glob("*.json"))}


def _read_recorded(root: Path) -> dict[str, Mapping]:
    """The parameters with which the stages ran, by section, from dvc.lock; params.yaml may have changed since."""
    try:
        stages = YAML(typ="safe", pure=True).load((root / "dvc.lock").read_text(encoding="utf-8"))["stages"]
        read = {stage: stages[stage]["params"]["params.yaml"] for stage in ("prepare", "benchmark") if stage in stages}
    except FileNotFoundError:
        return {}
    except (YAMLError, KeyError, TypeError) as error:
        raise UserError(f"{root / 'dvc.lock'} cannot be read ({error}); bring it back from Git") from error
    return {key.partition(".")[2]: values for params in read.values() for key, values in params.items()}


def _front_matter(metrics: Mapping[str, Mapping]) -> str:
    lines = ["library_name: transformers", "pipeline_tag: text-generation", "tags: [gpt2]"]
    if "init_commit" in (train := metrics.get("train", {})):
        lines.append(f"base_model: {train['init_from']}")
    return "\n".join(["---", *lines, "---"])


def _tell_training(metrics: Mapping[str, Mapping], recorded: Mapping[str, Mapping]) -> str:
    train = metrics.get("train")
    if train is None:
        return "Not recorded beside the model."
    if "init_from" in train:
        commit = f", commit `{train['init_commit']}`" if "init_commit" in train else ""
        return (
            f"None here: the weights are those of `{train['init_from']}`{commit} (sha256 `{train['init_sha256']}`, "
            "`metrics/train.json`)."
        )
    corpus = "a corpus that is not recorded beside the model"
    if prepare := recorded.get("prepare"):
        named = {key: prepare.get(key) for key in ("packages", "path", "dataset", "files", "revision")}
        given = ", ".join(f"{key} {_list(value)}" for key, value in named.items() if value)
        corpus = f"source `{prepare['source']}`" + (f" ({given})" if given else "") + " as in `dvc.lock`"
    diverged = f" The run diverged at step {number(train['diverged_at_step'])}." * (train["diverged_at_step"] >= 0)
    return (
        f"From scratch on {corpus}: {number(train['steps'])} steps, {number(train['tokens_seen'])} tokens, "
        f"{number(train['epochs'])} epochs (`metrics/train.json`).{diverged}"
    )


def _list(value: object) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def _list_figures(metrics: Mapping[str, Mapping], recorded: Mapping[str, Mapping], name: str) -> str:
    rows = []
    for label, key in FIGURES.get(name, {}).items():
        file, _, field = key.partition(".")
        values = metrics.get(file, {})
        if field in values:
            error = f" ± {number(values[f'{field}_stderr'])}" if f"{field}_stderr" in values else ""
            rows.append((label, f"{number(values[field])}{error}", f"`metrics/{file}.json: {field}`"))
    if not rows:
        return "None are recorded beside the model."
    told = table(("Figure", "Value", "From"), rows, "lrl")
    if "hellaswag" not in metrics or name != "gpt2":
        return told
    source = BENCHMARKS.get(recorded.get("benchmark", {}).get("source", ""), "not recorded beside the model")
    return f"{told}\n\nThe benchmark: {number(metrics['hellaswag']['items'])} items; {source}."
