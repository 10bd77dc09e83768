"""Read and write a TFDS data set of FairHuman's columns in ArrayRecord files; TensorFlow is not needed for either."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from fairhuman_jax.data.folder import COLUMNS, read_layer
from fairhuman_jax.data.pictures import BadSample, read_image, read_size

INFO = "dataset_info.json"


class TFDSDataset:
    """Random access to the samples of a TFDS version folder (`OUT/fair_human/1.0.0`), as FolderDataset gives them.

    The order and the arrays are the folder's that it was built from. Picklable. Raises: FileNotFoundError, ValueError:
    no such data set, another file format than ArrayRecord, no image or caption in it, files cut short.
    """

    def __init__(self, root: str | os.PathLike[str], split: str = "train") -> None:
        import tensorflow_datasets as tfds  # a second to import, for those only who have such a folder

        self.root, self.split = Path(root), split
        if not (self.root / INFO).is_file():
            raise FileNotFoundError(f"{self.root / INFO}: not found; a TFDS data set has it in its version folder")
        builder: Any = tfds.builder_from_directory(self.root)
        features, layout = builder.info.features, builder.info.file_format.value
        if layout != "array_record":
            raise ValueError(f"{self.root}: its files are {layout}; build it with file_format=array_record")
        there = [*features, *builder.info.splits]
        for name in ("image", "text_english", split):
            if name not in there:
                raise ValueError(f"{self.root}: no {name!r}; it has {', '.join(there)}")
        self.layers = tuple(name for name, column in COLUMNS.items() if column in features)
        skipped: Any = tfds.decode.SkipDecoding
        skip = {COLUMNS[name]: skipped() for name in self.layers}
        try:
            self._records = builder.as_data_source(split, decoders=skip)
            self._records[len(self._records) - 1]
        except (RuntimeError, IndexError, ValueError) as error:
            raise ValueError(f"{self.root}: its ArrayRecord files are damaged or cut short ({error})") from None

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)} in {self.root}")
        record = self._record(index)
        try:
            image = read_image(record["image"])
            text = record["text_english"]
            captions = [text] if isinstance(text, bytes) else text
            sample: dict[str, Any] = {"image": image, "caption": captions[0].decode()}
            if not isinstance(text, bytes):
                sample["captions"] = tuple(caption.decode() for caption in captions)
            for name in self.layers[1:]:
                sample[name] = read_layer(name, record[COLUMNS[name]], image.shape[:2], "image")
        except BadSample as error:
            raise BadSample(f"{self.root}: sample {index}: {error}") from None
        return sample

    def size(self, index: int) -> tuple[int, int]:
        """(height, width) of the image of sample `index`, read from its header."""
        return read_size(self._record(index)["image"])

    def __reduce__(self):
        return TFDSDataset, (self.root, self.split)

    def _record(self, index: int) -> dict[str, Any]:
        try:
            return self._records[index]
        except RuntimeError as error:
            raise BadSample(f"{self.root}: sample {index}: damaged ArrayRecord file ({error})") from None


def build_tfds(folder: str | os.PathLike[str], out: str | os.PathLike[str], on_error: str = "stop") -> tuple[Path, int]:
    """Write the `metadata.jsonl` folder as TFDS data set `fair_human` under `out`; needs no TensorFlow.

    `on_error`: "stop" raises BadSample at the first sample that cannot be read, "skip" leaves it out. Returns the
    version folder, which appears whole or not at all, and the number of samples left out. Raises: FileExistsError.
    """
    from fairhuman_jax.data.tfds_builder import FairHuman  # imports TFDS, which takes a second

    builder = FairHuman(folder=folder, on_error=on_error, data_dir=str(out), file_format="array_record")
    target = Path(builder.data_dir)
    if target.exists():
        raise FileExistsError(f"{target}: exists; build into another folder")
    builder.download_and_prepare()
    return target, builder.bad
