"""Parameters, FLOPs and bytes of a model by count, for training and for inference without some of its heads."""

from gpt2.model.config import GPTConfig, ModelShape

# Of the weights as they are saved, and of the keys and values as generation keeps them.
BYTES_PER_WEIGHT = 4


def params_per_head(config: GPTConfig) -> int:
    """Weights and biases of queries, keys and values, and the columns of c_proj."""
    return config.head_dim * (4 * config.n_embd + 3)


def flops_per_token(config: GPTConfig, n_heads: int) -> int:
    """Multiplications and additions of the forward pass for one token of a full sequence, with `n_heads` heads in all.

    Two for each weight of a product, the logits' included, and 4 D T for each head: q k' and the weighted sum of values
    over all T positions, as is usual (Chowdhery et al. 2022, appendix B). Norms, biases and GELU are left out.
    """
    C, D, T = config.n_embd, config.head_dim, config.block_size
    per_head = 2 * 4 * C * D + 4 * D * T
    return n_heads * per_head + config.n_layer * 2 * 8 * C * C + 2 * C * config.vocab_size


def kv_cache_bytes_per_token(n_heads: int, head_dim: int, bytes_per_value: int = 2) -> int:
    """Bytes of keys and values that generation keeps for each token; two bytes a value is bfloat16."""
    return 2 * n_heads * head_dim * bytes_per_value


def memory_bytes(config: GPTConfig, n_params: int, n_heads: int) -> int:
    """Weights and the keys and values of one sequence as long as the context, all in fp32."""
    cache = config.block_size * kv_cache_bytes_per_token(n_heads, config.head_dim, BYTES_PER_WEIGHT)
    return BYTES_PER_WEIGHT * n_params + cache


def training_flops_per_token(shape: ModelShape, vocab_size: int) -> int:
    """Operations of forward and backward pass: 6 per weight of a matrix product, 12 L C T for attention.

    12 L C^2 weights in the blocks and V C in the output layer (Chowdhery et al. 2022, "PaLM", appendix B).
    """
    weights = 12 * shape.n_layer * shape.n_embd**2 + vocab_size * shape.n_embd
    return 6 * weights + 12 * shape.n_layer * shape.n_embd * shape.block_size
