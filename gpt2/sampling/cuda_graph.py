"""Functions of tensors as CUDA graphs: launching the kernels of a short step takes longer than running them."""

from collections.abc import Callable

import torch
from torch import Tensor


class CudaGraph:
    """`function` of tensors on a GPU: the first call runs it, the second records it, all later ones replay it.

    The first call lets libraries set themselves up. The function must do the same work on tensors of the same shapes
    each time, whatever their values. Nothing waits for the GPU. The result is one tensor, which the next call
    overwrites.
    """

    def __init__(self, function: Callable[..., Tensor]):
        self._function, self._has_run = function, False
        self._graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, *arguments: Tensor) -> Tensor:
        if not self._has_run:
            self._has_run = True
            return self._function(*arguments)
        graph = self._graph or self._record(arguments)
        for own, given in zip(self._arguments, arguments, strict=True):
            own.copy_(given)
        graph.replay()
        return self._result

    def _record(self, arguments: tuple[Tensor, ...]) -> torch.cuda.CUDAGraph:
        self._arguments = [argument.clone() for argument in arguments]
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._result = self._function(*self._arguments)
        self._graph = graph
        return graph
