"""A selection by magnitude, as kernels and references pass it on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import torch

KEEP_ALL_EQUALS = 2**62
"""``Cut.last`` of the tie rule "keep"."""


class Cut(NamedTuple):
    """A selection per model: element e is kept iff key_e > key, or key_e == key and e <= last.

    ``key``: bits of |delta| as an unsigned integer; ``last``: flat index of the last kept among the equals.
    Lists, or int64 tensors [n] where a device made them: then nothing here waits for the device.
    """

    key: list[int] | torch.Tensor
    last: list[int] | torch.Tensor

    def at(self, start: int) -> Cut:
        """The same selection seen from a tensor that begins at flat index ``start`` of the scope."""
        if isinstance(self.last, list):
            return Cut(self.key, [last - start for last in self.last])
        return Cut(self.key, self.last - start)

    def pick(self, models: Sequence[int]) -> Cut:
        """The cuts of some of the models."""
        if len(models) == len(self.key):
            return self
        if isinstance(self.key, list) and isinstance(self.last, list):
            return Cut([self.key[i] for i in models], [self.last[i] for i in models])
        from torch import as_tensor, stack

        key, last = as_tensor(self.key), as_tensor(self.last)
        return Cut(stack([key[i] for i in models]), stack([last[i] for i in models]))

    def keep_equals(self) -> Cut:
        """The cut of the tie rule "keep"; a model that keeps nothing still keeps nothing."""
        if isinstance(self.last, list):
            return Cut(self.key, [last if last < 0 else KEEP_ALL_EQUALS for last in self.last])
        return Cut(self.key, self.last.masked_fill(self.last >= 0, KEEP_ALL_EQUALS))
