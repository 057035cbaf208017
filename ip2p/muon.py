"""Muon: momentum whose update for each weight matrix is made orthogonal (Jordan et al. 2024).

It trains the miniature's small networks in a fraction of AdamW's steps. The paper's own fine-tuning uses AdamW.
"""
import torch
from torch import Tensor


def orthogonalize(m: Tensor, steps: int = 5) -> Tensor:
    """The nearest matrix with all singular values near 1 (0.7 to 1.2), by a quintic Newton-Schulz iteration.

    m: (rows, columns) float32; a row is what feeds one output. Computed in bfloat16, which is enough for a direction.
    """
    a, b, c = 3.4445, -4.7750, 2.0315                        # Jordan's coefficients: steepest at zero
    wide = m if m.shape[0] <= m.shape[1] else m.mT
    x = (wide / (wide.norm() + 1e-7)).bfloat16()
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x if m.shape[0] <= m.shape[1] else x.mT).to(m.dtype)


class Muon(torch.optim.Optimizer):
    """SGD with Nesterov momentum, each update orthogonalised and scaled by sqrt(max(1, rows / columns)).

    params: tensors of two or more dimensions; a convolution counts as a matrix of (out, in * height * width).
    """

    def __init__(self, params, lr=0.02, momentum=0.95, weight_decay=0.0):
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["momentum"] = torch.zeros_like(p)
                momentum = state["momentum"].lerp_(p.grad, 1 - group["momentum"])
                update = p.grad.lerp(momentum, group["momentum"]).flatten(1)
                rows, columns = update.shape
                update = orthogonalize(update) * max(1, rows / columns) ** 0.5
                p.mul_(1 - group["lr"] * group["weight_decay"]).add_(update.view_as(p), alpha=-group["lr"])
