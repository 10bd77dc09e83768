"""Shards of latents and text: what the encoders give, found again by content."""

from __future__ import annotations

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from tiny_models import SIZE, write_folder

from fairhuman_jax.contract import System
from fairhuman_jax.data.folder import FolderDataset
from fairhuman_jax.data.pictures import BadSample
from fairhuman_jax.data.shards import ShardedDataset
from fairhuman_jax.data.transforms import JointTransform
from fairhuman_jax.doors import encode_door
from fairhuman_jax.training.datasets import open_data, training_batches
from fairhuman_jax.training.encoded_folder import encode_folder
from fairhuman_jax.training.latents import encode_samples
from fairhuman_jax.training.run_config import DataConfig, TrainConfig


class Encoders(System):
    """Images to scaled means of 2 x 2 pixels, letters to numbers; both scaled by a parameter."""

    encodes = ("image", "text")

    def encode_image(self, params, image):
        count, height, width, _ = image.shape
        blocks = image.astype(jnp.float32).reshape(count, height // 2, 2, width // 2, 2, 3)
        mean = params["vae"]["scale"] * blocks.mean((2, 4)) / 255.0
        return mean, jnp.full_like(mean, -3.0)

    def encode_text(self, params, ids):
        hidden = params["text_encoder"]["scale"] * ids["input_ids"][..., None].astype(jnp.float32)
        return jnp.repeat(hidden, 4, -1), hidden[:, 0]

    def tokenize(self, captions):
        letters = [[len(text), *map(ord, text[:2].ljust(2))] for text in captions]
        return {"input_ids": np.asarray(letters, np.int32)}


PARAMS = {"vae": {"scale": np.float32(1.0)}, "text_encoder": {"scale": np.float32(0.5)}, "unet": {"w": np.zeros(3)}}


@pytest.fixture
def data(tmp_path):
    return DataConfig(
        folder=str(write_folder(tmp_path / "folder")), resolution=SIZE, held_out=3, crop="random", flip=0.5
    )


def encode(data, folder, params=PARAMS, **options):
    return encode_folder(data, Encoders(), params, folder, **options)


def caption_list(data) -> None:
    """Gives the second line of the folder two captions."""
    path = FolderDataset(data.folder).metadata
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    lines[1]["text_english"] = ["one caption", "another caption"]
    path.write_text("\n".join(map(json.dumps, lines)))


def test_records_hold_what_the_encoders_and_the_centre_crop_give(data, tmp_path):
    caption_list(data)
    done = encode(data, tmp_path / "shards")
    assert (done.written, done.kept, done.bad) == (12, 0, 0)
    shards, folder = ShardedDataset(tmp_path / "shards"), FolderDataset(data.folder)
    assert len(shards) == len(folder) == 12
    for index in range(12):
        sample, plain = shards[index], folder[index]
        fixed = JointTransform(SIZE)(plain, np.random.default_rng(0))
        mean, logvar = Encoders().encode_image(PARAMS, fixed["image"][None])
        np.testing.assert_array_equal(sample["latent_mean"], np.asarray(mean[0], np.float16))
        np.testing.assert_array_equal(sample["latent_logvar"], np.asarray(logvar[0], np.float16))
        for name in ("face_mask", "hand_mask", "time_ids"):
            np.testing.assert_array_equal(sample[name], fixed[name])
        captions = plain.get("captions", (plain["caption"],))
        assert sample["captions"] == tuple(captions) and len(sample["texts"]) == len(captions)
        hidden, pooled = Encoders().encode_text(PARAMS, Encoders().tokenize(captions))
        for i, text in enumerate(sample["texts"]):
            np.testing.assert_array_equal(text["text_hidden"], np.asarray(hidden[i], np.float16))
            np.testing.assert_array_equal(text["text_pooled"], np.asarray(pooled[i], np.float16))
    empty = Encoders().encode_text(PARAMS, Encoders().tokenize([""]))
    np.testing.assert_array_equal(shards[0]["empty_text"]["text_hidden"], empty[0][0])


def test_only_what_changed_is_encoded_again(data, tmp_path):
    target = tmp_path / "shards"
    encode(data, target)
    assert encode(data, target).written == 0
    before = [ShardedDataset(target)[i]["latent_mean"] for i in range(12)]
    path = FolderDataset(data.folder).files(4)["image"]
    with Image.open(path) as picture:
        Image.fromarray(255 - np.asarray(picture)).save(path)
    done = encode(data, target)
    assert (done.written, done.kept) == (1, 11)
    after = [ShardedDataset(target)[i]["latent_mean"] for i in range(12)]
    changed = [i for i in range(12) if not np.array_equal(before[i], after[i])]
    assert len(after) == 12 and changed == [4]
    mask = FolderDataset(data.folder).files(5)["face_mask"]
    Image.fromarray(np.zeros((SIZE, SIZE + 4), np.uint8)).save(mask)
    assert encode(data, target).written == 1 and not ShardedDataset(target)[5]["face_mask"].any()


@pytest.mark.parametrize("change", ["vae", "text_encoder", "resolution", "caption", "buckets", "unet"])
def test_keys_cover_encoders_geometry_and_captions(data, tmp_path, change):
    target, params, config = tmp_path / "shards", dict(PARAMS), data
    encode(data, target)
    if change in params:
        params[change] = jax.tree.map(lambda leaf: leaf + 1, params[change])
    elif change == "resolution":
        config = dataclasses.replace(data, resolution=SIZE // 2)
    elif change == "buckets":
        config = dataclasses.replace(data, buckets=True, bucket_step=4)
    else:
        caption_list(data)
    expected = {"unet": 0, "caption": 1}.get(change, 12)
    assert encode(config, target, params).written == expected
    assert len(ShardedDataset(target)) == 12


def test_batches_carry_embeddings_and_lose_captions_by_the_step(data, tmp_path):
    encode(data, tmp_path / "shards")
    config = dataclasses.replace(data, folder=str(tmp_path / "shards"), caption_dropout=0.5)
    with training_batches(open_data(config)[0], Encoders(), config, TrainConfig(batch_size=3), {}) as batches:
        seen = [next(batches) for _ in range(20)]
    shapes = {"text_hidden": (3, 3, 4), "text_pooled": (3, 1), "latent_mean": (3, SIZE // 2, SIZE // 2, 3)}
    for batch in seen:
        assert "input_ids" not in batch and "image" not in batch
        assert {name: batch[name].shape for name in shapes} == shapes
        assert all(batch[name].dtype == np.float16 for name in shapes)
    dropped = np.concatenate([batch["text_hidden"][:, 0, 0] == 0 for batch in seen])
    assert 0.3 < dropped.mean() < 0.7


def test_unreadable_samples_are_left_out_or_stop_the_encoding(data, tmp_path):
    files = FolderDataset(data.folder)
    files.files(2)["image"].unlink()
    files.files(6)["image"].write_bytes(b"no picture")
    done = encode(data, tmp_path / "shards")
    assert (done.written, done.bad) == (10, 2)
    shards, expected = ShardedDataset(tmp_path / "shards"), [i for i in range(12) if i not in (2, 6)]
    assert len(shards) == 10 and shards.absent == 1
    assert [shards[i]["caption"] for i in range(10)] == [files[i]["caption"] for i in expected]
    again = encode(data, tmp_path / "shards")
    assert (again.written, again.kept, again.bad) == (0, 10, 2)
    with pytest.raises(BadSample, match=r"no such file|not a picture"):
        encode(dataclasses.replace(data, on_error="stop"), tmp_path / "stopped")


def test_values_beyond_float16_are_refused(data):
    params = PARAMS | {"vae": {"scale": np.float32(1e6)}}
    with pytest.raises(ValueError, match="sample 0: latent_mean is not finite in float16"):
        next(encode_samples(FolderDataset(data.folder), [0], Encoders(), params, [JointTransform(SIZE)]))


CONFIG = """
from dataclasses import dataclass, field
from test_encoded_folder import PARAMS, Encoders
from fairhuman_jax.contract import SystemConfig
from fairhuman_jax.training.run_config import DataConfig, TrainConfig

class Constant(Encoders):
    def init(self, key):
        return {}, PARAMS

@dataclass(frozen=True)
class ConstantConfig(SystemConfig):
    def build(self, shapes=False):
        return Constant()

@dataclass(frozen=True)
class Config:
    system: ConstantConfig = ConstantConfig()
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)

CONFIG = Config()
"""


def test_the_command_encodes_and_refuses_in_one_line(tmp_path, data, capsys):
    (tmp_path / "config.py").write_text(CONFIG)
    options = ["--set", f"data.folder={data.folder}", "--set", "data.resolution=16", "--no-text"]
    encode_door([str(tmp_path / "config.py"), str(tmp_path / "shards"), *options])
    assert "12 samples encoded, 0 kept, 0 could not be read" in capsys.readouterr().out
    sample = ShardedDataset(tmp_path / "shards")[0]
    assert sample["latent_mean"].shape == (8, 8, 3) and "texts" not in sample
    with pytest.raises(SystemExit) as exit_code:
        encode_door([str(tmp_path / "config.py"), str(data.folder), *options])
    output = capsys.readouterr().err
    assert exit_code.value.code == 2 and "write shards into an empty folder" in output.splitlines()[-1]
