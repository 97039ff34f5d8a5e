"""Triton kernels, one file per op, installed as ``pykernels.kernels``.

``lanes`` reads, widens and rounds, ``table`` holds the rows that say which tensor a block works on,
``launch`` fills them, ``merge_loop`` is what all merges share, ``selection`` and ``rounds`` find the k-th
magnitude.
"""
