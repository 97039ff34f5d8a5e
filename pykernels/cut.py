"""A selection by magnitude, as kernels and references pass it on."""

from __future__ import annotations

from typing import NamedTuple


class Cut(NamedTuple):
    """A selection per model: element e is kept iff key_e > key, or key_e == key and e <= last.

    ``key``: bits of |delta| as an unsigned integer; ``last``: flat index of the last kept among the equals.
    """

    key: list[int]
    last: list[int]

    def at(self, start: int) -> Cut:
        """The same selection seen from a tensor that begins at flat index ``start`` of the scope."""
        return Cut(self.key, [last - start for last in self.last])


KEEP_ALL_EQUALS = 2**62
"""``Cut.last`` of the tie rule "keep"."""
