"""Drop entries of one task vector at random and rescale the rest."""

from __future__ import annotations

import torch

from pykernels import backends, check
from pykernels.ops.draws import RESCALE, L1Statistic, draw_threshold, mask_key, rescale_factor


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

    Language Models are Super Mario (Yu et al., 2023), section 3. The mask is that of model 0 of
    ``dare_merge``.

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
    op = "drop_rescale"
    check.one_tensor(op, "delta", delta)
    [fraction] = check.density(op, density, 1)
    check.seed(op, seed)
    check.choice(op, "rescale", rescale, RESCALE)
    out = backends.output(op, out, None, delta, [delta])
    threshold, key = draw_threshold(fraction), mask_key(seed, name)
    scale = rescale_factor(threshold, rescale)
    if rescale == "l1":
        norms = L1Statistic([0], [threshold], key)
        norms.update(None, [delta], 0)
        [scale] = norms.finish().values
    backends.call(op, delta)(out, delta, threshold, key, scale)
    return out
