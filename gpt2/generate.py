"""Text from a trained model.

python -m gpt2.generate --model models/gpt2 --prompt "The array" --max_tokens 50 --num_seq 5
"""

import argparse
import sys
from pathlib import Path

import torch
from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor

from gpt2.files import UserError
from gpt2.model import GPT
from gpt2.params import Config, build
from gpt2.tokenizer import load_encoding
from gpt2.weights import load_model


class SamplingConfig(Config):
    """How the next token is drawn."""

    # New tokens of each sequence at most; an end-of-text token ends it earlier.
    max_tokens: PositiveInt = 50
    # Sequences drawn from one prompt.
    num_seq: PositiveInt = 1
    # Logits are divided by this; 0 takes the likeliest token.
    temperature: float = Field(default=0.8, ge=0)
    # Only the top_k likeliest tokens; 0 keeps all.
    top_k: NonNegativeInt = 50
    # Only the likeliest tokens that together have this probability.
    top_p: PositiveFloat = Field(default=1.0, le=1)
    seed: int = 1337


class GenerateConfig(SamplingConfig):
    """Section `generate`: the samples of the report."""

    prompts: tuple[str, ...] = Field(min_length=1)


@torch.no_grad()
def generate(model: GPT, prompt: Tensor, sampling: SamplingConfig, eot_token: int) -> list[list[int]]:
    """Continue `prompt` (T,) of token ids `num_seq` times; return the new ids of each, the end-of-text token left out.

    Beyond the context the window slides: the model sees the last block_size tokens. Ids that pad the vocabulary are
    never drawn. The same seed gives the same text.
    """
    generator = torch.Generator().manual_seed(sampling.seed)
    idx = prompt.expand(sampling.num_seq, -1).to(model.wte.weight.device)
    done = torch.zeros(sampling.num_seq, dtype=torch.bool)
    for _ in range(sampling.max_tokens):
        hidden = model.hidden(idx[:, -model.config.block_size :])[:, -1]
        logits = hidden @ model.wte.weight[: model.config.vocab_size].t()
        chosen = _draw(logits.float().cpu(), sampling, generator)
        idx = torch.cat([idx, chosen.to(idx.device)], dim=1)
        done |= chosen.squeeze(1) == eot_token
        if done.all():
            break
    return [_until(row, eot_token) for row in idx[:, len(prompt) :].tolist()]


def _draw(logits: Tensor, sampling: SamplingConfig, generator: torch.Generator) -> Tensor:
    """One token id for each row of logits (B, V), shape (B, 1)."""
    if sampling.temperature == 0:
        return logits.argmax(-1, keepdim=True)
    if sampling.top_k:
        kept = logits.topk(min(sampling.top_k, logits.shape[-1])).values
        logits = logits.masked_fill(logits < kept[:, -1:], -torch.inf)
    probabilities = torch.softmax(logits / sampling.temperature, -1)
    if sampling.top_p < 1:
        ordered, order = probabilities.sort(descending=True, stable=True)
        # A token goes if those before it already have the mass; the likeliest one always stays.
        ordered[ordered.cumsum(-1) - ordered >= sampling.top_p] = 0
        probabilities = torch.zeros_like(probabilities).scatter(-1, order, ordered)
    return torch.multinomial(probabilities, 1, generator=generator)


def _until(ids: list[int], eot_token: int) -> list[int]:
    return ids[: ids.index(eot_token)] if eot_token in ids else ids


def generate_text(model: GPT, prompt: str, sampling: SamplingConfig, encoding_name: str = "gpt2") -> list[str]:
    """Continuations of `prompt` as text. An empty prompt starts a document."""
    encoding = load_encoding(encoding_name)
    if encoding.n_vocab != model.config.vocab_size:
        raise UserError(
            f"the model has vocab_size={model.config.vocab_size}, encoding {encoding_name} has {encoding.n_vocab}; "
            "generate with the encoding it was trained with"
        )
    ids = torch.tensor(encoding.encode_ordinary(prompt) or [encoding.eot_token])
    return [encoding.decode(row) for row in generate(model, ids, sampling, encoding.eot_token)]


def main(argv: list[str] | None = None) -> None:
    """The command line above; prints prompt and continuation of each sequence."""
    parser = argparse.ArgumentParser(prog="python -m gpt2.generate", description="Continue a prompt.")
    parser.add_argument("--model", type=Path, default=Path("models/gpt2"), help="folder of a trained model")
    parser.add_argument("--prompt", default="", help="text to continue; none starts a document")
    for name, info in SamplingConfig.model_fields.items():
        parser.add_argument(f"--{name}", type=info.annotation, default=info.default, help="default: %(default)s")
    options = vars(parser.parse_args(argv))
    folder, prompt = options.pop("model"), options.pop("prompt")
    try:
        sampling = build(SamplingConfig, options, "generate")
        device = "cuda" if torch.cuda.is_available() else "cpu"
        for number, text in enumerate(generate_text(load_model(folder, device), prompt, sampling), start=1):
            sys.stdout.write(f"--- {number} ---\n{prompt}{text}\n")
    except UserError as error:
        raise SystemExit(f"generate: {error}") from error


if __name__ == "__main__":
    main()
