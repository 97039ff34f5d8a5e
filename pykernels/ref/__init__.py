"""The truth: every op in plain PyTorch, float64 out, one file per op. ``blocks`` makes a backend of them."""
