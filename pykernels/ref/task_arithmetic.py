"""Editing Models with Task Arithmetic (Ilharco et al., 2022, section 2): base plus weighted task vectors.

Lambda and divisor are folded into the weights by the caller, so it is :func:`linear_merge` on deltas.
"""

from __future__ import annotations

from pykernels.ref.linear_merge import linear_merge as task_arithmetic

__all__ = ["task_arithmetic"]
