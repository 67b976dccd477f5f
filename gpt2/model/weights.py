"""A finished model on disk: `model.safetensors` and `config.json`, padding cut off, names as in GPT-2."""

from pathlib import Path

import safetensors.torch
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor

from gpt2.model.config import GPTConfig
from gpt2.model.gpt import GPT
from gpt2.pipeline.files import UserError, atomic_path, read_json, write_json
from gpt2.pipeline.params import build

WEIGHTS, CONFIG = "model.safetensors", "config.json"


def save_model(model: GPT, folder: Path) -> None:
    """Write weights and configuration; the configuration comes last, so its presence means a whole model."""
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    state["wte.weight"] = state["wte.weight"][: model.config.vocab_size].contiguous()
    (folder / CONFIG).unlink(missing_ok=True)
    with atomic_path(folder / WEIGHTS) as temporary:
        safetensors.torch.save_file(state, temporary, metadata={"format": "pt"})
    write_json(folder / CONFIG, model.config.model_dump(mode="json", exclude_none=True))


def load_model(folder: Path, device: torch.device | str = "cpu") -> GPT:
    """Read a model, ready for evaluation. Raises UserError if it is absent, damaged or of another shape."""
    if not (folder / CONFIG).is_file():
        raise UserError(f"{folder} holds no model ({CONFIG} is missing); train one with `dvc repro train`")
    config = build(GPTConfig, read_json(folder / CONFIG), f"{folder / CONFIG}")
    try:
        state = safetensors.torch.load_file(folder / WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{folder / WEIGHTS} cannot be read ({error}); run `dvc repro train`") from error
    model = GPT(config)
    if faults := _differences(model, state):
        raise UserError(f"{folder / WEIGHTS} does not fit {CONFIG} beside it:\n  " + "\n  ".join(faults))
    padding = config.padded_vocab_size - config.vocab_size
    state["wte.weight"] = F.pad(state["wte.weight"], (0, 0, 0, padding))
    model.load_state_dict(state)
    return model.to(device).eval()


def _differences(model: GPT, state: dict[str, Tensor]) -> list[str]:
    """Every name or shape in which `state` is not this model's, in words."""
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    expected["wte.weight"] = (model.config.vocab_size, model.config.n_embd)
    found = {name: tuple(tensor.shape) for name, tensor in state.items()}
    names = sorted(expected.keys() | found.keys())
    return [
        f"{name}: expected {expected.get(name, 'nothing')}, found {found.get(name, 'nothing')}"
        for name in names
        if expected.get(name) != found.get(name)
    ]
