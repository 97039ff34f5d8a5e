"""Drop entries of one task vector at random and rescale the rest."""

from __future__ import annotations

import hashlib

import torch

from pykernels import backends, check

RESCALE = ("density", "l1", None)
STEPS = 65536
"""A draw has 16 bits: densities are multiples of 1 / STEPS."""


def drop_rescale(
    delta: torch.Tensor,
    density: float,
    *,
    seed: int,
    name: str = "",
    rescale: str | None = "density",
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Keep every entry with probability ``density`` and rescale what is kept.

    Language Models are Super Mario (Yu et al., 2023), section 3. The mask is that of model 0 of ``dare_merge``.

    Args:
        delta: contiguous tensor [*S]: float32, bfloat16, float16 or float64.
        density: probability of keeping an entry, in [0, 1], in steps of 1/65536.
        seed: integer in [0, 2**64).
        name: the tensor's name, part of the mask's key.
        rescale: "density", "l1" or None, as in ``dare_merge``.
        out: contiguous tensor [*S] to fill; may be ``delta``.

    Returns:
        The sparsified tensor [*S] (``out`` where given); a NaN stays NaN, kept or not.

    Raises:
        ValueError, TypeError: an argument breaks a rule above; the text names it and its value.
    """
    from pykernels.ops.dare_merge import dare_pass  # dare_merge builds on this file

    op = "drop_rescale"
    check.one_tensor(op, "delta", delta)
    [fraction] = check.density(op, density, 1)
    check.seed(op, seed)
    check.choice(op, "rescale", rescale, RESCALE)
    out = backends.output(op, out, None, delta, [delta])
    threshold = draw_threshold(fraction)
    scale = rescale_factor(threshold, rescale)
    if rescale == "l1":
        run = dare_pass(
            weight=[1.0],
            density=[fraction],
            lambda_=1.0,
            normalize=False,
            rescale="l1",
            consensus=None,
            elect="weighted",
            seed=seed,
            name=name,
        )
        statistic = run.statistic(delta.numel())
        if statistic is not None:
            statistic.update(None, [delta], 0)
            [scale] = statistic.finish().values
    backends.call(op, delta)(out, delta, threshold, mask_key(seed, name), scale)
    return out


def draw_threshold(density: float) -> int:
    """An entry is kept iff its 16-bit draw is below this: round(density * 65536)."""
    return round(density * STEPS)


def rescale_factor(threshold: int, rescale: str | None) -> float:
    """What "density" multiplies by: one over the realised density; 1 for the other rules."""
    return STEPS / threshold if rescale == "density" and threshold else 1.0


def mask_key(seed: int, name: str) -> int:
    """The 64-bit Philox key of a tensor: blake2b of the seed (8 bytes, little endian) and the name (UTF-8)."""
    digest = hashlib.blake2b(seed.to_bytes(8, "little") + name.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")
