"""Fits the polynomials of exp.h: ``python csrc/math/fit_exp.py`` prints the tables that stand there.

Minimax of the relative error by Lawson's reweighting on a grid (Rice and Usow, 1968). float32 coefficients
are rounded one at a time, lowest first, and the others fitted again after each.
"""

from __future__ import annotations

import re

import torch

WIDEST = 0.36
"""Largest |t|: ln(2)/2, widened by the rounding of log2(e) at the largest arguments (|x| = 1e6)."""


def grid(points: int = 4001) -> torch.Tensor:
    """Chebyshev points of the interval: float64 [points]."""
    angle = torch.linspace(0, torch.pi, points, dtype=torch.float64)
    return WIDEST * torch.cos(angle)


def minimax(basis: torch.Tensor, wanted: torch.Tensor, rounds: int = 400) -> torch.Tensor:
    """Coefficients [k] with the least largest |basis @ c - wanted|; basis [points, k], wanted [points]."""
    weight = torch.full_like(wanted, 1 / len(wanted))
    best, least = None, float("inf")
    for _ in range(rounds):
        root = weight.sqrt().unsqueeze(1)
        found = torch.linalg.lstsq(root * basis, root * wanted.unsqueeze(1)).solution.squeeze(1)
        error = (basis @ found - wanted).abs()
        if error.max() < least:
            best, least = found, float(error.max())
        weight = weight * error
        weight = weight / weight.sum()
    assert best is not None
    return best


def rounded(degree: int) -> list[float]:
    """float32 coefficients of e^t = 1 + c[0] t + ... + c[degree - 1] t^degree, relative error."""
    t = grid()
    fixed: list[float] = []
    for k in range(degree):
        known = sum((c * t**p for p, c in enumerate(fixed, 1)), torch.zeros_like(t))
        basis = torch.stack([t**p / t.exp() for p in range(k + 1, degree + 1)], dim=1)
        fixed.append(float(minimax(basis, (t.expm1() - known) / t.exp())[0].float()))
    return fixed


def minus_1(degree: int) -> list[float]:
    """float64 coefficients of e^t - 1 = t (c[0] + ... + c[degree] t^degree), relative error."""
    t = grid(4000)  # an even number: 0 is not among them
    wanted = t.expm1() / t
    basis = torch.stack([t**p / wanted for p in range(degree + 1)], dim=1)
    return minimax(basis, torch.ones_like(t)).tolist()


def table(kind: str, name: str, coefficients: list[float]) -> str:
    """One table of exp.h."""
    suffix = "f" if kind == "float" else ""
    numbers = ", ".join(re.sub(r"\.?0*p", "p", float.hex(c)) + suffix for c in coefficients)
    return f"constexpr {kind} {name}[] = {{{numbers}}};"


if __name__ == "__main__":
    print(table("float", "kExp6", rounded(6)))
    print(table("float", "kExp4", rounded(4)))
    print(table("double", "kMinus1", minus_1(7)))
