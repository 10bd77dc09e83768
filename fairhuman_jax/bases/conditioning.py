"""What a denoiser is told besides latents and time."""

from __future__ import annotations

import flax.struct
import jax


@flax.struct.dataclass
class Conditioning:
    """Arrays with a leading batch axis, so that guidance can put two of these one after the other.

    hidden [B, L, D] and pooled [B, P]: encoded text. time_ids [B, 5 or 6]: SDXL's sizes and crop. extra [B, h, w, k]:
    channels after the noisy latents (inpainting, HumanSD). conditions: one picture [B, H, W, 3] in [0, 1] a ControlNet,
    with their strengths, [B] each, in scales. features: of all T2I-Adapters, summed, one [B, h', w', c] a resolution.
    """

    hidden: jax.Array
    pooled: jax.Array
    time_ids: jax.Array | None = None
    extra: jax.Array | None = None
    conditions: tuple[jax.Array, ...] = ()
    scales: tuple[jax.Array, ...] = ()
    features: tuple[jax.Array, ...] = ()
