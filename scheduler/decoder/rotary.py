"""Tables of the rotary embedding: cosine and sine of every position and pair."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from ..model.hyper import Rotation

F32 = npt.NDArray[np.float32]


def nbytes(r: Rotation, context: int) -> int:
    """Return the bytes of both tables of `tables`."""
    return 2 * 4 * context * (r.dims // 2)


def tables(r: Rotation, context: int, factors: F32 | None = None) -> tuple[F32, F32]:
    """Return cosine and sine, float32 (context, dims / 2), of p * base^(-2i/dims) for position p, pair i.

    factors: what the angle of each pair is divided by (`rope_freqs`), float32 (dims / 2,). The angle of
    pair i is that of pair i - 1 times base^(-2/dims), in float32: llama.cpp's recurrence, so that the same
    file gives the same logits there. YaRN mixes angles of the short and the long context
    (arXiv:2309.00071, section 3.2).
    """
    half = r.dims // 2
    rate = np.float32(r.base) ** np.float32(-2.0 / r.dims)
    angles = np.empty((context, half), np.float32)
    angles[:, 0] = np.arange(context)
    for i in range(1, half):
        angles[:, i] = angles[:, i - 1] * rate
    if factors is not None:
        angles /= factors
    if r.factor != 1.0:
        slowed = angles * np.float32(1.0 / r.factor)
        kept = _kept(r) if r.yarn else np.zeros(half, np.float32)
        slowed *= np.float32(1.0) - kept
        angles *= kept
        angles += slowed
        del slowed
    # In place: at no time there is more than the two tables, which a long context makes large.
    cosine = np.cos(angles)
    sine = np.sin(angles, out=angles)
    cosine *= np.float32(r.magnitude)
    sine *= np.float32(r.magnitude)
    return cosine, sine


def _kept(r: Rotation) -> F32:
    """Return how much of its speed each pair keeps, float32 (dims / 2,).

    1 for more than beta_fast turns in the old context, 0 for less than beta_slow, linear between.
    """

    def pair(turns: float) -> float:
        return r.dims * math.log(r.original_context / (turns * 2 * math.pi)) / (2 * math.log(r.base))

    first, last = pair(r.beta_fast), pair(r.beta_slow)
    if r.whole:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(0.0, first), min(r.dims - 1.0, last)
    ramp = (np.arange(r.dims // 2, dtype=np.float32) - np.float32(first)) / np.float32(
        max(0.001, last - first)
    )
    return np.asarray(1.0 - np.clip(ramp, 0.0, 1.0), np.float32)
