"""Triton kernels, one file per op; installed as ``pykernels.kernels``. The CPU part of the package has none yet."""
