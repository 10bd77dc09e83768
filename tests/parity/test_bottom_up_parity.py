"""Bottom-up parsing against torch: stages and mirror image merged, peaks by max pooling."""

from __future__ import annotations

import numpy as np
import torch
from torch.nn import functional

from fairhuman_jax.annotate.bottom_up import BottomUpSettings, find_peaks, read_maps
from fairhuman_jax.keypoints.poses import MIRROR

SWAP = list(MIRROR["coco17"])


def test_merged_maps_and_their_peaks():
    rng = np.random.default_rng(0)
    y0, y1 = rng.normal(size=(2, 12, 16, 34)).astype(np.float32), rng.normal(size=(2, 24, 32, 17)).astype(np.float32)
    heat, tags = read_maps(y0, y1)

    coarse, fine = (torch.from_numpy(maps).permute(0, 3, 1, 2) for maps in (y0, y1))
    coarse = functional.interpolate(coarse, size=(24, 32), mode="bilinear", align_corners=True)
    mean = (coarse[:, :17] + fine) / 2
    merged = (mean[:1] + mean[1:].flip(3)[:, SWAP]) / 2
    stacked = torch.stack([coarse[0, 17:], coarse[1, 17:].flip(2)[SWAP]], dim=-1)
    np.testing.assert_allclose(heat, merged[0].permute(1, 2, 0), rtol=0, atol=1e-5)
    np.testing.assert_allclose(tags, stacked.permute(1, 2, 0, 3), rtol=0, atol=1e-5)

    exact = torch.from_numpy(heat).permute(2, 0, 1)
    kept = exact * (functional.max_pool2d(exact, 5, 1, 2) == exact)
    values, places = kept.flatten(1).topk(30, dim=1)
    for joint, peaks in enumerate(find_peaks(heat, tags, BottomUpSettings())):
        chosen = places[joint][values[joint] > 0.1].numpy()
        np.testing.assert_array_equal(peaks[:, 0] + 32 * peaks[:, 1], chosen)
        np.testing.assert_array_equal(peaks[:, 3:], tags.reshape(-1, 17, 2)[chosen, joint])
