"""Muon: momentum whose update for each weight matrix is made orthogonal (Jordan et al. 2024).

It trains the miniature's small networks in a fraction of AdamW's steps. The paper's own fine-tuning uses AdamW.
"""
import torch
from torch import Tensor

from .distributed import has_bf16


def orthogonalize(m: Tensor, steps: int = 5) -> Tensor:
    """The nearest matrices with all singular values near 1 (0.7 to 1.2), by a quintic Newton-Schulz iteration.

    m: (B, rows, columns) float32; a row is what feeds one output. Computed in bfloat16, which is enough for a direction, but
    on GPUs that lack it.
    """
    a, b, c = 3.4445, -4.7750, 2.0315                        # Jordan's coefficients: steepest at zero
    is_tall = m.shape[1] > m.shape[2]
    x = m.mT if is_tall else m
    x = (x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)).to(torch.bfloat16 if has_bf16(str(m.device)) else m.dtype)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)     # a x + (b gram + c gram^2) x
    return (x.mT if is_tall else x).to(m.dtype)


class Muon(torch.optim.Optimizer):
    """SGD with Nesterov momentum, each update orthogonalised and scaled by sqrt(max(1, rows / columns)).

    params: tensors of two or more dimensions; a convolution counts as a matrix of (out, in * height * width).
    """

    def __init__(self, params, lr=0.02, momentum=0.95):
        super().__init__(params, dict(lr=lr, momentum=momentum))

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            by_shape = {}                                    # matrices of one shape are made orthogonal together
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["momentum"] = torch.zeros_like(p)
                momentum = state["momentum"].lerp_(p.grad, 1 - group["momentum"])
                update = p.grad.lerp(momentum, group["momentum"]).flatten(1)
                by_shape.setdefault(update.shape, []).append((p, update))
            for (rows, columns), pairs in by_shape.items():
                size = group["lr"] * max(1, rows / columns) ** 0.5
                for (p, _), update in zip(pairs, orthogonalize(torch.stack([u for _, u in pairs]))):
                    p.add_(update.view_as(p), alpha=-size)
