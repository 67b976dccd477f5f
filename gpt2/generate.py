"""Generate text from a trained model, with a cache of keys and values.

python -m gpt2.generate --model models/gpt2 --prompt "The array" --max_tokens 50 --num_seq 5

from gpt2.generate import generate
texts = generate("models/gpt2", "The array", max_tokens=50, num_seq=5)
"""

import codecs
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import tiktoken
import torch
from pydantic import Field

from gpt2.model.gpt import GPT
from gpt2.model.weights import load_model
from gpt2.pipeline.command import Parser, reporting
from gpt2.pipeline.files import UserError
from gpt2.pipeline.params import build
from gpt2.sampling.sampling import SamplingConfig, draw_tokens, window_start
from gpt2.tokenizer.encodings import encoding_of, load_encoding


class GenerateConfig(SamplingConfig):
    """Section `generate`: the samples of the report."""

    prompts: tuple[str, ...] = Field(min_length=1)


def stream(
    model: GPT | Path | str, prompt: str = "", encoding: tiktoken.Encoding | None = None, **sampling
) -> Iterator[tuple[int, str]]:
    """Yield (number of the sequence from 0, text) as the text is drawn; the texts of a number make its continuation.

    `model` is a model or the folder of one, which goes to the GPU if there is one; `encoding` is by default that of the
    folder, for a model GPT-2's; `sampling` are the fields of SamplingConfig. An empty prompt starts a document. No
    character is yielded before all its bytes are drawn; bytes that are not UTF-8, as at a cut by max_tokens, become
    U+FFFD. Raises UserError for an invalid setting, a folder without a model, or a model with another vocabulary than
    the encoding, before anything is drawn.
    """
    settings = build(SamplingConfig, sampling, "generate")
    if encoding is None:
        encoding = load_encoding() if isinstance(model, GPT) else encoding_of(Path(model))
    model = model if isinstance(model, GPT) else load_for_generation(Path(model))
    prompt_ids = torch.tensor(encode_prompt(model, prompt, encoding))
    return _decode(draw_tokens(model, prompt_ids, settings, encoding.eot_token), settings.num_seq, encoding)


def _decode(tokens: Iterator[dict[int, int]], num_seq: int, encoding: tiktoken.Encoding) -> Iterator[tuple[int, str]]:
    decoders = [codecs.getincrementaldecoder("utf-8")(errors="replace") for _ in range(num_seq)]
    for drawn in tokens:
        for number, token in drawn.items():
            if piece := decoders[number].decode(encoding.decode_single_token_bytes(token)):
                yield number, piece
    for number, decoder in enumerate(decoders):
        if piece := decoder.decode(b"", final=True):
            yield number, piece


def generate(
    model: GPT | Path | str, prompt: str = "", encoding: tiktoken.Encoding | None = None, **sampling
) -> list[str]:
    """The `num_seq` continuations of `prompt`, without it. Arguments and errors are those of `stream`."""
    texts = [""] * build(SamplingConfig, sampling, "generate").num_seq
    for number, piece in stream(model, prompt, encoding, **sampling):
        texts[number] += piece
    return texts


def load_for_generation(folder: Path) -> GPT:
    """The model of a folder, on a GPU if there is one."""
    return load_model(folder, "cuda" if torch.cuda.is_available() else "cpu")


def encode_prompt(model: GPT, prompt: str, encoding: tiktoken.Encoding) -> list[int]:
    """Token ids of `prompt`, an end-of-text token if it is empty.

    Raises UserError if the model has another vocabulary than the encoding.
    """
    if encoding.n_vocab != model.config.vocab_size:
        raise UserError(
            f"the model has vocab_size={model.config.vocab_size}, encoding {encoding.name} has {encoding.n_vocab}; "
            "generate with the encoding that the model was trained with, which lies in the folder of the model"
        )
    return encoding.encode_ordinary(prompt) or [encoding.eot_token]


def main(argv: list[str] | None = None) -> None:
    """The command line above: writes prompt and continuation of each sequence, the first one as it is drawn."""
    parser = Parser(prog="python -m gpt2.generate", description="Continue a prompt.")
    parser.add_argument("--model", type=Path, default=Path("models/gpt2"), help="folder of a trained model")
    parser.add_argument("--prompt", default="", help="text to continue; none starts a document")
    for name, info in SamplingConfig.model_fields.items():
        parser.add_argument(f"--{name}", type=type(info.default), default=info.default, help="default: %(default)s")
    options = vars(parser.parse_args(argv))
    folder, prompt = options.pop("model"), options.pop("prompt")
    try:
        with reporting("generate"):
            settings = build(SamplingConfig, options, "generate")
            model, encoding = load_for_generation(folder), encoding_of(folder)
            n_tokens, block_size = len(encode_prompt(model, prompt, encoding)), model.config.block_size
            if start := window_start(n_tokens, block_size):
                sys.stderr.write(
                    f"generate: the prompt has {n_tokens} tokens, the context block_size={block_size}; "
                    f"the model sees the last {n_tokens - start}\n"
                )
            _write(prompt, stream(model, prompt, encoding, **options), settings.num_seq)
    except BrokenPipeError:
        # The reader has gone; what the interpreter flushes at its end goes nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None


def _write(prompt: str, pieces: Iterator[tuple[int, str]], num_seq: int) -> None:
    """The first sequence as it is drawn, then the others, which were drawn at the same time."""
    others = [""] * num_seq
    print(f"--- 1 ---\n{prompt}", end="", flush=True)
    for number, piece in pieces:
        if number:
            others[number] += piece
        else:
            print(piece, end="", flush=True)
    print()
    for number in range(1, num_seq):
        print(f"--- {number + 1} ---\n{prompt}{others[number]}")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
