"""Export a trained model as a Hugging Face folder that transformers, lm-eval and vLLM load.

python -m gpt2.export --model models/gpt2 --out exported
"""

import hashlib
import json
import math
import os
import shutil
import sys
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path

import safetensors.torch
import tiktoken
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from torch import Tensor

from gpt2.huggingface.card import write_card
from gpt2.huggingface.pretrained import CONFIG, MIN_PIN, PREFIX, SIZES, STOCK, WEIGHTS, is_transposed
from gpt2.model.config import GPTConfig
from gpt2.model.gpt import GPT
from gpt2.model.weights import load_model
from gpt2.pipeline.command import Parser, reporting
from gpt2.pipeline.files import UserError, write_json, write_text
from gpt2.tokenizer.bpe import byte_of_character
from gpt2.tokenizer.encodings import END_OF_TEXT, GPT2, encoding_of, ranked_tokens, vocabulary_file

# Names under which transformers looks for OpenAI's two files.
TOKENIZER_FILES = {"vocab.json": "encoder.json", "merges.txt": "vocab.bpe"}


def export_model(folder: Path | str, out: Path | str) -> Path:
    """Write the model of `folder` to the new folder `out`, and return that.

    `out` appears at the end, whole. Removed heads come back as zeros, which compute the same. Raises UserError if the
    norm is not preln or the vocabulary not that of the folder, and if `out` is in use.
    """
    folder, out = Path(folder), Path(out)
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise UserError(f"--out {out} is in use; name a new folder, or remove it first (rm -r {out})")
    model, encoding = load_model(folder), encoding_of(folder)
    _require_stock(model.config, encoding)
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        state = {f"{PREFIX}{name}": tensor for name, tensor in stock_weights(model).items()}
        safetensors.torch.save_file(state, temporary / WEIGHTS, metadata={"format": "pt"})
        _write_tokenizer(temporary, encoding, model.config.block_size)
        write_text(temporary / "README.md", write_card(model, folder, encoding.name))
        write_json(temporary / CONFIG, stock_config(model.config, encoding.eot_token))
        os.replace(temporary, out)
    except OSError as error:
        raise UserError(f"--out {out} cannot be written ({error}); make room, or name another folder") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return out


def _require_stock(config: GPTConfig, encoding: tiktoken.Encoding) -> None:
    """Raise UserError if the classes of transformers cannot express the model."""
    if config.norm != "preln":
        raise UserError(
            f"norm={config.norm} cannot be exported: GPT2LMHeadModel has its layer norms before attention and MLP "
            "(preln) and would compute something else; use this model with gpt2.model.weights.load_model, or export "
            "one trained with norm=preln"
        )
    if config.vocab_size != encoding.n_vocab:
        raise UserError(
            f"the model has vocab_size={config.vocab_size}, and the tokenizer to export with it, {encoding.name}, has "
            f"{encoding.n_vocab}; export a model that was trained on tokens of {encoding.name}"
        )


def stock_config(config: GPTConfig, eot_token: int) -> dict:
    """config.json of GPT2LMHeadModel. There is no dropout, as in the training here."""
    return {
        **STOCK,
        **{theirs: getattr(config, ours) for ours, theirs in SIZES.items()},
        **dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), 0.0),
        **dict.fromkeys(("bos_token_id", "eos_token_id"), eot_token),
        "architectures": ["GPT2LMHeadModel"],
        "torch_dtype": "float32",
    }


def stock_weights(model: GPT) -> dict[str, Tensor]:
    """Weights in the layout of GPT2Model: Conv1D's (in, out), no rows that pad the vocabulary, all heads.

    Removed heads are zeros after those that are left. lm_head.weight is left out, as GPT2LMHeadModel does when it
    saves: it is wte.weight.
    """
    state = {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()}
    state["wte.weight"] = state["wte.weight"][: model.config.vocab_size]
    for layer, block in enumerate(model.h):
        n_head, removed = block.attn.n_head, model.config.n_head - block.attn.n_head
        # Heads are rows of c_attn, in each of queries, keys and values, and columns of c_proj.
        for name, dim, parts in (("c_attn.weight", 0, 3), ("c_attn.bias", 0, 3), ("c_proj.weight", 1, 1)):
            key = f"h.{layer}.attn.{name}"
            heads = state[key].unflatten(dim, (parts, n_head, model.config.head_dim))
            zeros = heads.new_zeros(*heads.shape[: dim + 1], removed, *heads.shape[dim + 2 :])
            state[key] = torch.cat([heads, zeros], dim + 1).flatten(dim, dim + 2)
    return {name: (tensor.t() if is_transposed(name) else tensor).contiguous() for name, tensor in state.items()}


def split_token(token: bytes, ranks: Mapping[bytes, int]) -> tuple[bytes, bytes]:
    """The two tokens that were merged into `token`: BPE of its bytes, up to the last merge."""
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        merged = [ranks.get(left + right, math.inf) for left, right in pairwise(parts)]
        first = merged.index(min(merged))
        parts[first : first + 2] = [parts[first] + parts[first + 1]]
    return parts[0], parts[1]


def _write_tokenizer(folder: Path, encoding: tiktoken.Encoding, block_size: int) -> None:
    """OpenAI's two files as they are, or a trained vocabulary in their form; tokenizer.json, which holds the same; and
    what else AutoTokenizer needs."""
    if encoding.name == GPT2:
        for name, original in TOKENIZER_FILES.items():
            shutil.copyfile(vocabulary_file(original), folder / name)
    else:
        _write_vocabulary(folder, encoding)
    tokenizer = Tokenizer(models.BPE.from_file(*(str(folder / name) for name in TOKENIZER_FILES)))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(END_OF_TEXT, special=True, normalized=False)])
    tokenizer.save(str(folder / "tokenizer.json"))
    special = dict.fromkeys(("bos_token", "eos_token", "unk_token"), END_OF_TEXT)
    write_json(folder / "special_tokens_map.json", special)
    settings = {"tokenizer_class": "GPT2Tokenizer", "model_max_length": block_size, "add_prefix_space": False}
    # Decoding gives back the text to the letter.
    settings["clean_up_tokenization_spaces"] = False
    write_json(folder / "tokenizer_config.json", {**special, **settings})
    ends = dict.fromkeys(("bos_token_id", "eos_token_id"), encoding.eot_token)
    write_json(folder / "generation_config.json", ends)


def _write_vocabulary(folder: Path, encoding: tiktoken.Encoding) -> None:
    """A trained vocabulary in the form of OpenAI's two files: ids of tokens, and pairs in the order of their merges."""
    ranks = {token: rank for rank, token in enumerate(ranked_tokens(encoding))}
    character_of = {byte: character for character, byte in byte_of_character().items()}

    def spell(token: bytes) -> str:
        return "".join(character_of[byte] for byte in token)

    ids = {**{spell(token): rank for token, rank in ranks.items()}, END_OF_TEXT: encoding.eot_token}
    # In the order of the ids, as OpenAI's file; write_json would sort by name.
    write_text(folder / "vocab.json", json.dumps(ids, ensure_ascii=False))
    merges = (" ".join(map(spell, split_token(token, ranks))) for token in ranks if len(token) > 1)
    write_text(folder / "merges.txt", "\n".join(["#version: 0.2", *merges, ""]))


def main(argv: list[str] | None = None) -> None:
    """The command line above; says where the model went and how to name its content."""
    parser = Parser(prog="python -m gpt2.export", description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=Path("models/gpt2"), help="folder of a trained model")
    parser.add_argument("--out", type=Path, required=True, help="folder to write; must not exist, or be empty")
    arguments = parser.parse_args(argv)
    with reporting("export"):
        out = export_model(arguments.model, arguments.out)
    pin = hashlib.sha256((out / WEIGHTS).read_bytes()).hexdigest()[: MIN_PIN + 4]
    sys.stdout.write(f"{out} holds the model; its content as a starting point is {out}@{pin}\n")


if __name__ == "__main__":
    main()
