"""Triton kernels, one file per op, installed as ``pykernels.kernels``: none so far."""
