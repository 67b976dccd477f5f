"""Hugging Face's GPT-2 with the weights of one of our models, as an independent implementation to compare with."""

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from gpt2.model.gpt import GPT


def is_transposed(name: str) -> bool:
    """Whether transformers stores this weight of ours as (in, out), which its Conv1D does."""
    return name.endswith("weight") and ("attn.c_" in name or "mlp.c_" in name)


def make_reference(model: GPT) -> GPT2LMHeadModel:
    """The same Pre-LN model in transformers, in evaluation mode."""
    config = model.config
    reference = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=config.vocab_size,
            n_positions=config.block_size,
            n_embd=config.n_embd,
            n_layer=config.n_layer,
            n_head=config.n_head,
            attn_implementation="eager",  # type: ignore[call-arg]  # an argument of its base class
        )
    )
    state: dict[str, torch.Tensor] = {
        f"transformer.{name}": tensor.t() if is_transposed(name) else tensor
        for name, tensor in model.state_dict().items()
    }
    state["transformer.wte.weight"] = state["lm_head.weight"] = model.wte.weight[: config.vocab_size]
    reference.load_state_dict(state)
    return reference.eval()
