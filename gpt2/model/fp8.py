"""Matrix products in fp8 (Micikevicius et al. 2022, "FP8 formats for deep learning"), with one scale for each matrix.

e4m3 (three bits of mantissa, up to 448) holds weights and activations, e5m2 (two bits, up to 57,344) gradients. A GPU
from compute capability 8.9 on multiplies them; elsewhere the products of the same rounded values are fp32.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
# Inner and outer sizes of a product must be multiples of this (cuBLAS).
MULTIPLE = 16
CAPABILITY = (8, 9)


@dataclass(frozen=True)
class Scaled:
    """A matrix as fp8 `values` times a positive fp32 `scale` ()."""

    values: Tensor
    scale: Tensor

    def t(self) -> "Scaled":
        """The transpose, as a view."""
        return Scaled(self.values.t(), self.scale)

    def rows(self, rows: slice) -> "Scaled":
        """Some of the rows, as a view."""
        return Scaled(self.values[rows], self.scale)

    def columns_first(self) -> "Scaled":
        """The same matrix, stored by columns."""
        return Scaled(self.values.t().contiguous().t(), self.scale)


def quantise(x: Tensor) -> Scaled:
    """`x` in e4m3, scaled so that its largest absolute value is the largest of the format."""
    scale = (x.abs().amax().float() / torch.finfo(E4M3).max).clamp(min=torch.finfo(torch.float32).tiny)
    return Scaled((x * scale.reciprocal()).to(E4M3), scale)


def matmul(a: Scaled, b: Scaled, *, fast: bool) -> Tensor:
    """a (M, K) stored by rows @ b (K, N) stored by columns, in bfloat16.

    `fast`: the tensor cores keep fewer bits of their sums.
    """
    if a.values.is_cuda:
        return torch._scaled_mm(a.values, b.values, a.scale, b.scale, out_dtype=torch.bfloat16, use_fast_accum=fast)
    return (a.values.float() @ b.values.float() * (a.scale * b.scale)).bfloat16()
