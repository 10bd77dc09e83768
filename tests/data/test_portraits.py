from __future__ import annotations

import numpy as np
import pytest

from fairhuman_jax.data import FolderDataset
from fairhuman_jax.data.portraits import PORTRAITS, box_mask, main, write_portraits


def test_boxes_lie_inside_their_photos_and_apart():
    for portrait in PORTRAITS:
        width, height = portrait.size
        for left, top, right, bottom in (*portrait.faces, *portrait.hands):
            assert 0 <= left < right < width and 0 <= top < bottom < height
        faces, hands = (box_mask(portrait.size, boxes) for boxes in (portrait.faces, portrait.hands))
        assert faces.shape == (height, width, 1) and not (faces & hands).any()
        assert 0.02 < faces.mean() < 0.25 and hands.mean() < 0.06


def test_box_mask_is_filled_and_dilated():
    plain, grown = (box_mask((40, 60), ((10, 20, 12, 25),), dilation) for dilation in (1, 16))
    assert plain.sum() == 3 * 6 and plain[20:26, 10:13].all()
    assert grown.sum() == (3 + 15) * (6 + 15) and grown[13:34, 3:21].all()


def test_other_bytes_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"sha256 is .* expected 5e5efdd1"):
        write_portraits(tmp_path, b"something else")
    assert not list(tmp_path.iterdir())


@pytest.mark.network
def test_command_fetches_four_portraits(tmp_path):
    main([str(tmp_path / "portraits")])
    data = FolderDataset(tmp_path / "portraits", on_error="stop")
    assert len(data) == len(PORTRAITS)
    for index, portrait in enumerate(PORTRAITS):
        sample = data[index]
        assert sample["image"].shape == (*portrait.size[::-1], 3) and sample["caption"] == portrait.caption
        skin = sample["image"][sample["face_mask"][..., 0] == 1].astype(np.float64).mean(0)
        assert skin[0] > skin[1] > skin[2], "a face box should be skin-coloured on average"
    with pytest.raises(SystemExit, match="exists"):
        main([str(tmp_path / "portraits")])
