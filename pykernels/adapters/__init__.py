"""PEFT checkpoints: what their files hold, which tensors of a base they change, and how they are written."""
