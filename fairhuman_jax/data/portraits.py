"""Four public-domain portraits with face and hand masks: `python -m fairhuman_jax.data.portraits FOLDER`.

The photos are official portraits by the United States government (public domain, 17 U.S.C. 105). They are
fetched from the source package of face_recognition 1.3.0 on PyPI with pip, checked against its sha256, and
written as a `metadata.jsonl` folder. The boxes below were drawn by eye; masks are the filled boxes (ends
included), each dilated by a 16 x 16 rectangle as FairHuman's mask preparation does. Four photos serve to try
the door, not to train a model.
"""

from __future__ import annotations

import argparse
import io
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from fairhuman_jax.data.export import METADATA, write_metadata, write_sample
from fairhuman_jax.data.transforms import dilate_mask
from fairhuman_jax.packages import Package, digest, download

PACKAGE = Package("face_recognition", "1.3.0", "5e5efdd1686aa566af0d3cc1313b131e4b197657a8ffd03669e6d3fad92705ec")
DILATION = 16

Box = tuple[int, int, int, int]


@dataclass(frozen=True)
class Portrait:
    """A photo: size (width, height), boxes (left, top, right, bottom) in pixels, ends included."""

    name: str
    size: tuple[int, int]
    caption: str
    faces: tuple[Box, ...]
    hands: tuple[Box, ...] = ()


PORTRAITS = (
    Portrait(
        "obama",
        (910, 1137),
        "a portrait photo of a smiling man in a dark suit and a blue tie with his arms crossed",
        faces=((366, 80, 624, 436),),
        hands=((189, 857, 312, 978), (562, 769, 737, 913)),
    ),
    Portrait(
        "obama2",
        (626, 1200),
        "a photo of a man in a dark suit and a red tie speaking into a microphone, a flag behind him",
        faces=((196, 220, 486, 642),),
    ),
    Portrait(
        "obama3",
        (1434, 2333),
        "a photo of a man in a dark suit and a purple tie standing with his arms crossed under a chandelier",
        faces=((618, 240, 920, 632),),
        hands=((450, 1142, 600, 1246), (942, 1024, 1108, 1146), (826, 1342, 938, 1402)),
    ),
    Portrait(
        "biden",
        (970, 2204),
        "a photo of a white-haired man in a dark suit and a striped tie standing with his arms crossed",
        faces=((400, 170, 726, 572),),
        hands=((284, 964, 456, 1098), (802, 936, 912, 984), (690, 1186, 812, 1262)),
    ),
)


def box_mask(size: tuple[int, int], boxes: tuple[Box, ...], dilation: int = DILATION) -> np.ndarray:
    """Filled boxes (ends included) of a photo of `size` (width, height), dilated: uint8 [H, W, 1]."""
    width, height = size
    mask = np.zeros((height, width, 1), np.uint8)
    for left, top, right, bottom in boxes:
        mask[top : bottom + 1, left : right + 1] = 1
    return dilate_mask(mask, dilation)


def write_portraits(folder: Path, package: bytes) -> Path:
    """Photos and masks from the package's bytes into `folder`; returns the path of `metadata.jsonl`.

    Raises: ValueError when the bytes are not those of PACKAGE, FileExistsError when the folder holds metadata
    already.
    """
    if digest(package) != PACKAGE.sha256:
        raise ValueError(f"{PACKAGE}: sha256 is {digest(package)}, expected {PACKAGE.sha256}; nothing was written")
    if (folder / METADATA).exists():
        raise FileExistsError(f"{folder / METADATA}: exists; choose an empty folder")
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    with tarfile.open(fileobj=io.BytesIO(package)) as archive:
        members = {Path(member.name).name: member for member in archive.getmembers() if member.isfile()}
        for portrait in PORTRAITS:
            photo = archive.extractfile(members[f"{portrait.name}.jpg"])
            assert photo is not None, "only regular files are listed"
            image = np.array(Image.open(photo).convert("RGB"))
            if image.shape[1::-1] != portrait.size:
                raise ValueError(
                    f"{portrait.name}.jpg is {image.shape[1::-1]} pixels, its boxes are for {portrait.size}"
                )
            sample = {
                "image": image,
                "caption": portrait.caption,
                "face_mask": box_mask(portrait.size, portrait.faces),
                "hand_mask": box_mask(portrait.size, portrait.hands),
            }
            lines.append(write_sample(folder, portrait.name, sample))
    return write_metadata(folder, lines)


def main(arguments: list[str] | None = None) -> None:
    """Command line: fetch the portraits and write the folder."""
    parser = argparse.ArgumentParser(prog="python -m fairhuman_jax.data.portraits", description=__doc__)
    parser.add_argument("folder", type=Path, help="where images/, masks_face/, masks_hand/ and metadata.jsonl go")
    folder = parser.parse_args(arguments).folder
    try:
        with tempfile.TemporaryDirectory() as scratch:
            path = write_portraits(folder, download(PACKAGE, Path(scratch)).read_bytes())
    except (OSError, ValueError) as error:
        raise SystemExit(f"error: {error}") from None
    print(f"wrote {len(PORTRAITS)} portraits: {path}")


if __name__ == "__main__":
    main()
