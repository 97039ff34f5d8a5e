"""Drop entries of one task vector at random and rescale the rest."""

from __future__ import annotations

import torch

from pykernels import backends, check, library
from pykernels.ops.coefficients import narrow
from pykernels.ops.draws import RESCALE, L1Statistic, draw_threshold, mask_key, rescale_factor

OP = "drop_rescale"


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
    if library.needed():
        [fraction] = check.density(OP, density, 1)
        drawn = {"seed": library.signed(check.seed(OP, seed)), "name": name, "rescale": rescale}
        library.no_tangent(OP, [delta])
        return library.call(OP, out, library.constant(delta), fraction, **drawn)
    return _drop(delta, density, seed, name, rescale, out)


def _drop(
    delta: torch.Tensor,
    density: float,
    seed: int,
    name: str,
    rescale: str | None,
    out: torch.Tensor | None,
) -> torch.Tensor:
    check.one_tensor(OP, "delta", delta)
    [fraction] = check.density(OP, density, 1)
    check.seed(OP, seed)
    check.choice(OP, "rescale", rescale, RESCALE)
    out = backends.output(OP, out, None, delta, [delta])
    threshold, key = draw_threshold(fraction), mask_key(seed, name)
    if rescale != "l1":
        backends.call(OP, delta)(out, delta, threshold, key, rescale_factor(threshold, rescale))
        return out
    norms = L1Statistic([0], [threshold], key)
    norms.update(None, [delta], 0)
    scale = norms.finish().values
    if isinstance(scale, torch.Tensor):  # a merge of one model, whose weight may stand on the device
        one = backends.call("dare_merge", delta)
        one(out, None, [delta], [threshold], [0], key, narrow(scale), None, None, 1.0, None)
    else:
        backends.call(OP, delta)(out, delta, threshold, key, scale[0])
    return out


def _run(
    delta: torch.Tensor,
    density: float,
    *,
    seed: int,
    name: str,
    rescale: str | None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    return _drop(delta, density, library.unsigned(seed), name, rescale, out)


def _fake(
    delta: torch.Tensor,
    density: float,
    *,
    seed: int,
    name: str,
    rescale: str | None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    check.one_tensor(OP, "delta", delta)
    check.density(OP, density, 1)
    check.choice(OP, "rescale", rescale, RESCALE)
    return library.empty(OP, delta, None, out)


library.define(
    OP, "Tensor delta, float density, *, SymInt seed, str name, str? rescale", _run, _fake, out=True
)
