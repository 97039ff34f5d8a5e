"""Sizes in bytes as people write them: 2GB, 500MiB, 5e9."""

from __future__ import annotations

import re

UNITS = {
    "": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
    "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12,
    "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40,
}  # fmt: skip
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?(?:[eE]\d{1,2})?)\s*([A-Za-z]*)\s*")


def parse_size(size: str | int, name: str = "size") -> int:
    """``size`` in bytes. Raises ValueError, which names ``name``, for all but a number with a unit."""
    if isinstance(size, int) and not isinstance(size, bool):
        value = size
    else:
        match = _SIZE.fullmatch(size) if isinstance(size, str) else None
        if match is None or match[2].upper() not in UNITS:
            raise ValueError(
                f'{name} must be a size such as "2GB", "500MiB" or a number of bytes, got {size!r}'
            )
        value = int(float(match[1]) * UNITS[match[2].upper()])
    if value < 1:
        raise ValueError(f"{name} must be at least 1 byte, got {size!r}")
    return value
