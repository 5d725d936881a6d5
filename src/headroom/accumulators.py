"""Sums over a stream of activations that lose no digits: moments by column, Gram matrices.

Shapes: N tokens of one batch, C columns in any shape.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Moments:
    """Mean and spread by column over the tokens seen so far, in float64."""

    count: int
    mean_C: Tensor
    squares_C: Tensor  # Σ_t (z − mean)²

    @classmethod
    def empty(cls, shape: tuple[int, ...], device: torch.device | str) -> "Moments":
        """Return the moments of no token."""
        zero_C = torch.zeros(shape, dtype=torch.float64, device=device)
        return cls(0, zero_C, zero_C)

    def merged(self, z_NC: Tensor) -> "Moments":
        """Return the moments of these and further tokens (Chan, Golub, LeVeque 1979).

        Means are subtracted before anything is squared, so that a large mean costs no digits.
        """
        z_NC = z_NC.double()
        count, mean_C = z_NC.shape[0], z_NC.mean(0)
        squares_C = (z_NC - mean_C).square().sum(0)
        total, step_C = self.count + count, mean_C - self.mean_C
        return Moments(
            total,
            self.mean_C + step_C * (count / total),
            self.squares_C + squares_C + step_C.square() * (self.count * count / total),
        )

    def scaled(self, scale_C: Tensor) -> "Moments":
        """Return the moments of scale · z."""
        squares_C = self.squares_C * scale_C.square()
        return Moments(self.count, self.mean_C * scale_C, squares_C)

    @property
    def energy_C(self) -> Tensor:
        """Σ_t z², by column."""
        return self.squares_C + self.count * self.mean_C.square()


def add_product(total_AC: Tensor, a_NA: Tensor, b_NC: Tensor) -> None:
    """Add AᵀB of one batch to a float64 sum, multiplied in the activations' own precision.

    float64 stays float64, everything else is multiplied as float32. What bfloat16 holds, TF32 holds
    too, so on a GPU its products may run on tensor cores and still be exact.
    """
    exact = {a_NA.dtype, b_NC.dtype} == {torch.bfloat16} and a_NA.device.type == "cuda"
    wide = torch.promote_types(torch.promote_types(a_NA.dtype, b_NC.dtype), torch.float32)
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = exact or before
    try:
        total_AC += a_NA.to(wide).T @ b_NC.to(wide)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
