"""GPT-2's weights in the format of Hugging Face's transformers, read through transformers and checked name by name.

A source is written FOLDER, FOLDER@SHA256 (at least eight digits of the digest of its weights), ID or ID@REVISION.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch
from safetensors import SafetensorError
from torch import Tensor

from gpt2.model.config import GPTConfig
from gpt2.model.gpt import GPT
from gpt2.pipeline.files import UserError
from gpt2.pipeline.params import build

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
PREFIX, HEAD = "transformer.", "lm_head.weight"
# Our name of a size, and its name in config.json.
SIZES = {
    "n_layer": "n_layer",
    "n_head": "n_head",
    "n_embd": "n_embd",
    "block_size": "n_positions",
    "vocab_size": "vocab_size",
}
# What else config.json says of a GPT2LMHeadModel that computes what GPT computes.
STOCK = {
    "model_type": "gpt2",
    "n_inner": None,
    "activation_function": "gelu_new",
    "layer_norm_epsilon": 1e-5,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "tie_word_embeddings": True,
}
# Masks that old versions saved along with the weights.
BUFFERS = re.compile(r"h\.\d+\.attn\.(masked_)?bias$")
HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
MIN_PIN = 8


@dataclass(frozen=True)
class Origin:
    """Where weights come from: folder or hub id, the commit if from the hub, and the digest of the weight files."""

    source: str
    commit: str | None
    sha256: str

    def figures(self) -> dict[str, str]:
        """Entries for a file of metrics."""
        commit = {"init_commit": self.commit} if self.commit else {}
        return {"init_from": self.source, "init_sha256": self.sha256, **commit}


def is_transposed(name: str) -> bool:
    """Whether transformers keeps this weight of a GPT as (in, out), as its Conv1D does."""
    return name.endswith("weight") and ("attn.c_" in name or "mlp.c_" in name)


def load_pretrained(source: str, shape: GPTConfig | None = None, scale: str = "SCALE") -> tuple[GPT, Origin]:
    """The model of `source` in fp32, and where it came from; without `shape` in the shape that it has.

    `shape` must be its own, but for a block_size that may be smaller: positions beyond it are cut, which changes
    nothing else, since no token looks ahead. Raises UserError listing all that does not fit, first in the configuration
    (the remedy names parameters of `scale`), then in the weights.
    """
    name, pin = _split(source)
    local = Path(name).is_dir()
    folder = Path(name) if local else _download(name, pin or None)
    theirs = _read_config(folder, shape, scale)
    origin = Origin(name, None if local else folder.name, _digest(folder))
    if local and pin and not (len(pin) >= MIN_PIN and origin.sha256.startswith(pin)):
        raise UserError(
            f"train.init_from = '{source}' must end in {MIN_PIN} or more digits of the sha256 of its weights, which is "
            f"{origin.sha256}; set it to {name}@{origin.sha256[:12]} if you want these weights"
        )
    weights = _read_weights(folder, source)
    model = GPT(shape or theirs)
    for key, parameter in model.state_dict().items():
        tensor = weights[key].t() if is_transposed(key) else weights[key]
        # Rows that pad the vocabulary stay zero; positions beyond the context are left out.
        rows = min(len(parameter), len(tensor))
        parameter[:rows] = tensor[:rows]
    return model, origin


def check_source(source: str, shape: GPTConfig, scale: str) -> None:
    """Raise UserError if `source` is a folder whose configuration does not fit; weights and the hub are not read."""
    if (folder := Path(_split(source)[0])).is_dir():
        _read_config(folder, shape, scale)


def _transformers() -> ModuleType:
    """The library, which a run from scratch does not import. It logs nothing: our errors list what does not fit."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return transformers


def _split(source: str) -> tuple[str, str]:
    """A folder or the id of a model, and what follows its @: digits of a digest, or a revision."""
    if Path(source).is_dir():
        return str(Path(source)), ""
    folder, _, digits = source.rpartition("@")
    if folder and Path(folder).is_dir():
        return str(Path(folder)), digits
    name, _, revision = source.partition("@")
    if HUB_ID.fullmatch(name):
        return name, revision
    raise UserError(
        f"train.init_from = {source!r} is neither a folder here nor the id of a model on the hub; give a folder with "
        f"{CONFIG} and {WEIGHTS}, or an id such as openai-community/gpt2"
    )


def _download(name: str, revision: str | None) -> Path:
    """The files of a model of the hub, in a folder of the cache that is named by their commit."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=[CONFIG, "model*.safetensors", INDEX]))
    except (OSError, ValueError) as error:
        raise UserError(
            f"train.init_from: {name}{f'@{revision}' if revision else ''} is no folder here and cannot be read from "
            f"the hub ({' '.join(str(error).split())}); correct the name or the revision, check the network, "
            "HF_ENDPOINT and HF_HUB_OFFLINE, log in (hf auth login) if it is private, or give a folder"
        ) from error


def _read_config(folder: Path, shape: GPTConfig | None, scale: str) -> GPTConfig:
    """The shape of the pretrained model. Raises UserError listing all that is not as in GPT or in `shape`."""
    from huggingface_hub.errors import StrictDataclassError

    path = folder / CONFIG
    try:
        given = json.loads(path.read_text(encoding="utf-8"))
        config = _transformers().GPT2Config.from_dict(given)
    except (OSError, ValueError, TypeError, AttributeError, StrictDataclassError) as error:
        raise UserError(
            f"train.init_from: {path} cannot be read as the configuration of a GPT-2 ({error}); give a folder or a "
            "model of the hub that transformers can load"
        ) from error
    sizes = {ours: getattr(config, key) for ours, key in SIZES.items()}
    theirs = build(GPTConfig, {**sizes, "norm": "preln"}, str(path))
    allowed: dict[str, tuple[object, ...]] = {key: (value,) for key, value in STOCK.items()}
    # Other values with the same meaning, and what must not be set.
    allowed["n_inner"] += (4 * theirs.n_embd,)
    allowed["activation_function"] += ("gelu_pytorch_tanh",)
    allowed |= {"add_cross_attention": (False,), "quantization_config": (None,)}
    values = {key: getattr(config, key, None) for key in allowed} | {"model_type": given.get("model_type")}
    faults = [
        f"{CONFIG}: {key} = {json.dumps(value)}, needed: {' or '.join(map(json.dumps, allowed[key]))}"
        for key, value in values.items()
        if value not in allowed[key]
    ]
    wanted = shape or theirs
    changes = {key: getattr(theirs, key) for key in ("norm", *SIZES) if getattr(wanted, key) != getattr(theirs, key)}
    if wanted.block_size < theirs.block_size:
        del changes["block_size"]
    faults += [f"{key} = {getattr(wanted, key)}, the weights have {value}" for key, value in changes.items()]
    if faults:
        keys = {key: key if key == "norm" else f"{scale}.model.{key}" for key in changes if key != "vocab_size"}
        settings = "".join(f" -S {name}={changes[key]}" for key, name in keys.items())
        remedy = f"take other weights{f', or set{settings}' if settings else ''}"
        raise UserError(f"train.init_from: {folder} does not fit:\n  " + "\n  ".join(faults) + f"\n{remedy}")
    return theirs


def _digest(folder: Path) -> str:
    """SHA-256 of the weights: one file, or the shards that the index names in the order of their names."""
    files = [folder / WEIGHTS]
    try:
        if not files[0].is_file() and (folder / INDEX).is_file():
            index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
            files = [folder / name for name in sorted(set(index["weight_map"].values()))]
        digest = hashlib.sha256()
        for file in files:
            with open(file, "rb") as content:
                hashlib.file_digest(content, lambda: digest)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"train.init_from: the weights of {folder} cannot be read ({type(error).__name__}: {error}); get "
            f"{WEIGHTS}, or {INDEX} and the shards that it names. A pytorch_model.bin is a pickle, which can run code, "
            "and is not read: where you trust it, let transformers load it and save_pretrained it to a folder"
        ) from error
    return digest.hexdigest()


def _read_weights(folder: Path, source: str) -> Mapping[str, Tensor]:
    """Weights of GPT2Model. Raises UserError listing all that are missing, unexpected, of another shape or not finite.

    Read without tying, so that a head of its own is compared with the embedding.
    """
    options = {"use_safetensors": True, "ignore_mismatched_sizes": True, "output_loading_info": True}
    kind = _transformers().GPT2LMHeadModel
    try:
        model, found = kind.from_pretrained(folder, dtype=torch.float32, tie_word_embeddings=False, **options)
    except (OSError, KeyError, SafetensorError) as error:
        raise UserError(f"train.init_from: the weights of {source} cannot be read ({error}); get them again") from error
    weights, head = model.transformer.state_dict(), model.lm_head.weight
    faults = [f"{key}: missing" for key in found["missing_keys"] - {HEAD}]
    faults += [f"{key}: not a weight of GPT-2" for key in found["unexpected_keys"] if not BUFFERS.search(key)]
    faults += [f"{key}: expected {(*ours,)}, found {(*theirs,)}" for key, theirs, ours in found["mismatched_keys"]]
    faults += [f"{PREFIX}{key}: not finite" for key, tensor in weights.items() if not tensor.isfinite().all()]
    if not faults and HEAD not in found["missing_keys"] and not head.equal(weights["wte.weight"]):
        faults = [f"{HEAD}: differs from {PREFIX}wte.weight, and GPT-2 has one matrix for both"]
    if faults:
        listed = "\n  ".join(sorted(faults))
        raise UserError(f"train.init_from: the weights of {source} are not those of a GPT-2:\n  {listed}")
    return weights
