"""Muon (Jordan et al. 2024): momentum with orthogonalised updates, for the matrices of the blocks.

The update is scaled to the root mean square of AdamW's (Liu et al. 2025, "Muon is scalable for LLM training", section
2.2), so that learning rate, schedule and weight decay mean the same for both.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

# Newton-Schulz iteration of the reference implementation: singular values end between about 0.7 and 1.2.
COEFFICIENTS, ITERATIONS, EPS = (3.4445, -4.7750, 2.0315), 5, 1e-7
# A GPU multiplies bfloat16 faster and the iteration tolerates it. Most CPUs have to emulate it.
PRECISION = {"cuda": torch.bfloat16, "cpu": torch.float32}


class Muon(torch.optim.Optimizer):
    """Muon for matrices, computed for all matrices of one shape together.

    The state of each matrix is `momentum_buffer`, as in torch.optim.Muon, whose steps these are but for rounding.
    """

    def __init__(self, matrices: Iterable[Tensor], lr: float, momentum: float, weight_decay: float):
        super().__init__(matrices, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]  # no closure
        for group in self.param_groups:
            matrices, lr, momentum = group["params"], group["lr"], group["momentum"]
            gradients = [matrix.grad for matrix in matrices]
            for matrix in matrices:
                if not self.state[matrix]:
                    self.state[matrix]["momentum_buffer"] = torch.zeros_like(matrix)
            buffers = [self.state[matrix]["momentum_buffer"] for matrix in matrices]
            torch._foreach_lerp_(buffers, gradients, 1 - momentum)
            # Nesterov: a look ahead along the new momentum.
            directions = torch._foreach_lerp(gradients, buffers, momentum)
            torch._foreach_mul_(matrices, 1 - lr * group["weight_decay"])
            for matrix, update in zip(matrices, orthogonalise_each(directions), strict=True):
                matrix.add_(update, alpha=-0.2 * math.sqrt(max(matrix.shape)) * lr)


def orthogonalise_each(matrices: Sequence[Tensor]) -> list[Tensor]:
    """`orthogonalise` for each matrix, those of one shape, or its transpose, as one batch; in the order given."""
    batches: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for place, matrix in enumerate(matrices):
        batches[tuple(sorted(matrix.shape))].append(place)
    found: list[Tensor] = list(matrices)
    for places in batches.values():
        wide = torch.stack([_wide(matrices[place]) for place in places])
        for place, result in zip(places, orthogonalise(wide), strict=True):
            found[place] = result if matrices[place].shape == result.shape else result.mT
    return found


def orthogonalise(matrices: Tensor) -> Tensor:
    """The nearest semi-orthogonal matrix to each of `matrices` (N, A, B) with A <= B, roughly, by Newton-Schulz."""
    a, b, c = COEFFICIENTS
    x = matrices.to(PRECISION[matrices.device.type])
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=EPS)
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.to(matrices.dtype)


def _wide(matrix: Tensor) -> Tensor:
    return matrix if matrix.shape[0] <= matrix.shape[1] else matrix.mT
