"""Cosines of a model's heads and of two null models: all matrices of the head similarity study.

An untrained model of the same shape has the causal mask and the first token, but has learned nothing. The trained model
on the same tokens in random order has all that it learned, but no text: what its heads still have in common is due to
positions and single tokens. Similarity that a null model also has is no evidence that heads learned the same. Compare
with a null model by centred patterns: the raw ones of an untrained model are all uniform, so that no model can exceed
their cosines.
"""

import numpy as np
import torch
from torch import Tensor

from gpt2.heads.circuits import compare_circuits
from gpt2.heads.similarity import HeadsConfig, compare_heads
from gpt2.model.gpt import GPT


def compare_with_nulls(model: GPT, idx: Tensor, config: HeadsConfig) -> dict[str, np.ndarray]:
    """Cosines between all heads over the token ids `idx` (N, T), each (M, M) float64.

    The SAVED_SIMILARITIES of the model under their own names, the PATTERNS of the null models with the prefixes
    untrained_ and shuffled_, and the circuits of the untrained model. `uniform` of all three is (M,): cosines with the
    uniform pattern. Raises UserError as compare_heads.
    """
    untrained = GPT(model.config, config.seed).to(model.wte.weight.device)
    shuffled = shuffle_tokens(idx, config.seed)
    matrices = compare_heads(model, idx, config.batch_size) | compare_circuits(model)
    nulls = {
        "untrained": compare_heads(untrained, idx, config.batch_size, outputs=False) | compare_circuits(untrained),
        "shuffled": compare_heads(model, shuffled, config.batch_size, outputs=False),
    }
    return matrices | {f"{null}_{name}": matrix for null, of in nulls.items() for name, matrix in of.items()}


def shuffle_tokens(idx: Tensor, seed: int) -> Tensor:
    """The token ids (N, T) with each row permuted at random and separately; the seed determines the permutations."""
    generator = torch.Generator().manual_seed(seed)
    return idx.gather(1, torch.rand(idx.shape, generator=generator, dtype=torch.float64).argsort(1))
