"""GPT-2 as Hugging Face's transformers stores it, read from a folder or from the hub and checked name by name.

A source is written FOLDER, FOLDER@SHA256 (at least eight digits of the digest of its weights), ID or ID@REVISION.
"""

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from gpt2.model.config import GPTConfig
from gpt2.model.gpt import GPT
from gpt2.pipeline.files import UserError
from gpt2.pipeline.params import build

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
PREFIX = "transformer."
# Our name of a size, its name in config.json, and its value where config.json does not give it.
SIZES = {
    "n_layer": ("n_layer", 12),
    "n_head": ("n_head", 12),
    "n_embd": ("n_embd", 768),
    "block_size": ("n_positions", 1024),
    "vocab_size": ("vocab_size", 50257),
}
# What else config.json must say for GPT2LMHeadModel to compute what GPT computes; the first value is the default.
REQUIRED = {
    "model_type": ("gpt2",),
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
    "layer_norm_epsilon": (1e-5,),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "add_cross_attention": (False,),
    "tie_word_embeddings": (True,),
}
# Masks that old versions saved along with the weights.
BUFFERS = re.compile(r"h\.\d+\.attn\.(masked_)?bias")
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
    place = _open(source)
    theirs = _read_config(place, shape, scale)
    files = _find_weights(place)
    digest = hashlib.sha256()
    for file in files:
        with open(file, "rb") as content:
            while chunk := content.read(2**24):
                digest.update(chunk)
    origin = Origin(place.name, place.commit, digest.hexdigest())
    place.require_pin(origin.sha256)
    model = GPT(shape or theirs)
    _copy_weights(model, _read_weights(files), theirs, source)
    return model, origin


def check_source(source: str, shape: GPTConfig, scale: str) -> None:
    """Raise UserError if `source` is a folder whose configuration does not fit; weights and the hub are not read."""
    if isinstance(place := _open(source), _Folder):
        _read_config(place, shape, scale)


class _Folder:
    """Files of a local folder."""

    commit = None
    unavailable = ""

    def __init__(self, path: Path, pin: str):
        self.name, self._path, self._pin = str(path), path, pin

    def find(self, file: str) -> Path | None:
        path = self._path / file
        return path if path.is_file() else None

    def require_pin(self, sha256: str) -> None:
        if self._pin and not (len(self._pin) >= MIN_PIN and sha256.startswith(self._pin)):
            raise UserError(
                f"train.init_from = '{self.name}@{self._pin}' must end in {MIN_PIN} or more digits of the sha256 of "
                f"its weights, which is {sha256}; set it to {self.name}@{sha256[:12]} if these are meant"
            )


class _Hub:
    """Files of a model repository of the hub, all of the commit of the first one."""

    def __init__(self, name: str, revision: str | None):
        self.name, self._revision = name, revision
        self.commit: str | None = None
        # Why the last file could not be looked for.
        self.unavailable = ""

    def find(self, file: str) -> Path | None:
        # Imported here: a run from scratch, or from a folder, needs no client.
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

        try:
            path = Path(hf_hub_download(self.name, file, revision=self.commit or self._revision))
        except LocalEntryNotFoundError as error:
            self.unavailable = (
                " in the cache, and the hub cannot be asked: unset HF_HUB_OFFLINE, or check the network and "
                f"HF_ENDPOINT ({_one_line(error)})"
            )
            return None
        except EntryNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise UserError(
                f"train.init_from: {self._named()} is no folder here and cannot be read from the hub "
                f"({_one_line(error)}); mend the name or the revision, log in (hf auth login) if the "
                "repository is private, or download it and give the folder"
            ) from error
        # …/snapshots/<commit>/<file>
        self.commit = path.parent.name
        return path

    def require_pin(self, sha256: str) -> None:
        """The hub was asked for the revision itself."""

    def _named(self) -> str:
        return f"{self.name}@{self._revision}" if self._revision else self.name


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()).rstrip(".")


def _open(source: str) -> _Folder | _Hub:
    if Path(source).is_dir():
        return _Folder(Path(source), "")
    folder, _, pin = source.rpartition("@")
    if folder and Path(folder).is_dir():
        return _Folder(Path(folder), pin)
    name, _, revision = source.partition("@")
    if not HUB_ID.fullmatch(name):
        raise UserError(
            f"train.init_from = {source!r} is neither a folder here nor the id of a model on the hub; give a folder "
            "with config.json and model.safetensors, or an id such as openai-community/gpt2"
        )
    return _Hub(name, revision or None)


def _read_json(path: Path) -> dict:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON ({error}); get it again") from error
    if not isinstance(values, dict):
        raise UserError(f"{path} must hold a JSON object; get it again")
    return values


def _read_config(place: _Folder | _Hub, shape: GPTConfig | None, scale: str) -> GPTConfig:
    """The shape of the pretrained model. Raises UserError listing all that is not as in GPT or in `shape`."""
    path = place.find(CONFIG)
    if path is None:
        raise UserError(
            f"train.init_from: {place.name} holds no {CONFIG}{place.unavailable}; give a folder or a model of the hub "
            "that transformers can load"
        )
    values = {key: allowed[0] for key, allowed in REQUIRED.items()} | {"model_type": None} | _read_json(path)
    sizes = {ours: values.get(theirs, default) for ours, (theirs, default) in SIZES.items()}
    theirs = build(GPTConfig, {**sizes, "norm": "preln"}, str(path))
    faults = [
        f"{CONFIG}: {key} = {json.dumps(values[key])}, needed: {' or '.join(map(json.dumps, allowed))}"
        for key, allowed in REQUIRED.items()
        if values[key] not in allowed
    ]
    if values.get("n_inner") not in (None, 4 * theirs.n_embd):
        faults.append(f"{CONFIG}: n_inner = {json.dumps(values['n_inner'])}, needed: null or {4 * theirs.n_embd}")
    changes = _list_changes(shape, theirs) if shape else {}
    faults += [f"{key} = {getattr(shape, key)}, the weights have {value}" for key, value in changes.items()]
    if faults:
        keys = {key: key if key == "norm" else f"{scale}.model.{key}" for key in changes.keys() - {"vocab_size"}}
        remedies = "".join(f" -S {keys[key]}={value}" for key, value in changes.items() if key in keys)
        remedy = f"take other weights{f', or set{remedies}' if remedies else ''}"
        raise UserError(f"train.init_from: {place.name} does not fit:\n  " + "\n  ".join(faults) + f"\n{remedy}")
    return theirs


def _list_changes(shape: GPTConfig, theirs: GPTConfig) -> dict[str, int | str]:
    """Fields of `shape` that the pretrained model has otherwise, with its values."""
    fields = {key: getattr(theirs, key) for key in ("norm", *SIZES)}
    if shape.block_size <= theirs.block_size:
        del fields["block_size"]
    return {key: value for key, value in fields.items() if getattr(shape, key) != value}


def _find_weights(place: _Folder | _Hub) -> list[Path]:
    """The weight files: one, or the shards that the index names."""
    if path := place.find(WEIGHTS):
        return [path]
    index = place.find(INDEX)
    if index is None:
        raise UserError(
            f"train.init_from: {place.name} holds neither {WEIGHTS} nor {INDEX}{place.unavailable}; weights in a "
            "pytorch_model.bin are a pickle, which can run code, and are not read: where you trust it, let "
            "transformers load it and save_pretrained it to a folder, and give that"
        )
    try:
        names = sorted(set(_read_json(index)["weight_map"].values()))
    except (KeyError, AttributeError, TypeError) as error:
        raise UserError(f"{index} has no weight_map of names to files; get it again") from error
    if strange := [name for name in names if Path(name).name != name]:
        raise UserError(f"{index} names {', '.join(strange)}, and shards must lie beside it; take other weights")
    found = {name: place.find(name) for name in names}
    if missing := [name for name, path in found.items() if path is None]:
        raise UserError(
            f"train.init_from: {place.name} lacks {', '.join(missing)}, which {INDEX} names{place.unavailable}; get "
            "them again"
        )
    return [path for path in found.values() if path]


def _read_weights(files: Sequence[Path]) -> dict[str, Tensor]:
    state: dict[str, Tensor] = {}
    for file in files:
        try:
            state |= safetensors.torch.load_file(file)
        except (OSError, SafetensorError) as error:
            raise UserError(f"{file} cannot be read ({error}); get it again") from error
    return state


@torch.no_grad()
def _copy_weights(model: GPT, state: dict[str, Tensor], theirs: GPTConfig, source: str) -> None:
    """Fill the model. Raises UserError listing every weight that is missing, unknown, or of another shape or kind."""
    found: dict[str, Tensor] = {}
    faults = []
    for name, tensor in state.items():
        short = name.removeprefix(PREFIX)
        if short in found:
            faults.append(f"{short}: found twice, with {PREFIX} and without")
        if not BUFFERS.fullmatch(short):
            found[short] = tensor
    head = found.pop("lm_head.weight", None)
    if head is not None and "wte.weight" in found and not torch.equal(head, found["wte.weight"]):
        faults.append("lm_head.weight: differs from wte.weight, and GPT-2 has one matrix for both")
    parameters = model.state_dict()
    for name in sorted(parameters.keys() | found.keys()):
        if fault := _find_fault(name, parameters.get(name), found.get(name), theirs):
            faults.append(f"{name}: {fault}")
    if faults:
        raise UserError(f"train.init_from: the weights of {source} are not those of a GPT-2:\n  " + "\n  ".join(faults))
    for name, parameter in parameters.items():
        tensor = found[name].t() if is_transposed(name) else found[name]
        # Rows that pad the vocabulary stay zero; positions beyond the context are left out.
        rows = min(len(parameter), len(tensor))
        parameter[:rows] = tensor[:rows]


def _find_fault(name: str, parameter: Tensor | None, tensor: Tensor | None, theirs: GPTConfig) -> str:
    """What is wrong with a weight `tensor` for our `parameter`, in words; "" if nothing is."""
    if parameter is None or tensor is None:
        return "missing" if tensor is None else f"not a weight of GPT-2, shape {tuple(tensor.shape)}"
    expected, shape = tuple(parameter.shape), tuple(tensor.shape)
    if is_transposed(name):
        expected = expected[::-1]
    elif name == "wte.weight":
        expected = (theirs.vocab_size, theirs.n_embd)
    elif name == "wpe.weight":
        expected = (theirs.block_size, theirs.n_embd)
    if shape != expected:
        return f"expected {expected}, found {shape}{', the transpose' * (shape == expected[::-1])}"
    if not tensor.is_floating_point():
        return f"expected floating point, found {tensor.dtype}"
    return "" if tensor.isfinite().all() else "holds values that are not finite"
