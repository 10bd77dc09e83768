"""FairHuman's `metadata.jsonl` folder as a TFDS data set, all five columns declared, in ArrayRecord files.

`python -m fairhuman_jax.data tfds FOLDER OUT` builds it anywhere: images are handed over encoded, which TFDS writes and
reads without TensorFlow. TFDS's own command line asks for TensorFlow; with it, `tfds build
fairhuman_jax/data/tfds_builder.py --manual_dir FOLDER --file_format array_record` does the same.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from etils import epath
from PIL import ExifTags, Image

from fairhuman_jax.data.folder import COLUMNS, FolderDataset
from fairhuman_jax.data.pictures import BadSample


class FairHuman(tfds.core.GeneratorBasedBuilder):
    """One split, train, in the folder's order: image, conditioning_image, text_english, mask_hand, mask_face.

    Pictures keep their files' bytes where these decode to the same pixels anywhere (RGB in PNG or JPEG, upright);
    others become PNG, and so do masks, black and white at the image's size.
    """

    VERSION = tfds.core.Version("1.0.0")
    # Found by TFDS through importlib_resources otherwise, a package that it does not declare.
    code_path = epath.Path(__file__)
    MANUAL_DOWNLOAD_INSTRUCTIONS = "The folder that holds metadata.jsonl."

    def __init__(self, *, folder: str | os.PathLike[str] | None = None, on_error: str = "stop", **options: Any):
        """`folder`: its layers are the data set's; None: `manual_dir`, all layers, empty where it lacks them."""
        self._data = None if folder is None else FolderDataset(folder, on_error=on_error)
        data, self._on_error = self._data, on_error
        self._layers = tuple(COLUMNS) if data is None else data.layers
        self._several = data is not None and any(data.has_list(index) for index in range(len(data)))
        self.bad = 0
        super().__init__(**options)

    def _info(self) -> tfds.core.DatasetInfo:
        text = tfds.features.Text()
        features = {"text_english": tfds.features.Sequence(text) if self._several else text} | {
            COLUMNS[name]: tfds.features.Image(shape=(None, None, 1 if name.endswith("mask") else 3))
            for name in self._layers
        }
        return tfds.core.DatasetInfo(
            builder=self,
            description="Photographs of people with captions, control images and masks of faces and hands.",
            features=tfds.features.FeaturesDict(features),
            homepage="https://github.com/PRIS-CV/FairHuman",
            # Integer keys in order: the samples that are held out are then the folder's.
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Any]:
        data = self._data or FolderDataset(dl_manager.manual_dir, on_error=self._on_error)
        return {"train": self._generate_examples(data)}

    def _generate_examples(self, data: FolderDataset) -> Iterator[tuple[int, dict[str, Any]]]:
        for index in range(len(data)):
            try:
                example = self._example(data, index)
            except BadSample as error:
                if self._on_error == "stop":
                    raise BadSample(f"{data.metadata}:{data.line(index)}: {error}") from None
                self.bad += 1
                continue
            yield index, example

    def _example(self, data: FolderDataset, index: int) -> dict[str, Any]:
        files, sample = data.files(index), data.load(index)
        image, captions = sample["image"], data.captions(index)
        encoded = {}
        for name in self._layers:
            channels = 1 if name.endswith("mask") else 3
            layer = sample.get(name, np.zeros((*image.shape[:2], channels), np.uint8))
            encoded[COLUMNS[name]] = _encoded(files.get(name), layer)
        return encoded | {"text_english": list(captions) if self._several else captions[0]}


def _encoded(file: Path | None, layer: np.ndarray) -> bytes:
    """The file's bytes where every decoder makes `layer` of them, else a PNG of it; masks as 0 / 255."""
    is_mask = layer.shape[-1] == 1
    if file is not None and not is_mask:
        with Image.open(file) as picture:
            turned = picture.getexif().get(ExifTags.Base.Orientation, 1) != 1
            plain = picture.mode == "RGB" and not picture.has_transparency_data and not turned
            same = plain and picture.format in ("PNG", "JPEG") and picture.size == layer.shape[1::-1]
        if same:
            return file.read_bytes()
    buffer = io.BytesIO()
    Image.fromarray(layer[..., 0] * np.uint8(255) if is_mask else layer).save(buffer, "png")
    return buffer.getvalue()
