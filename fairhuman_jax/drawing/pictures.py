"""The pictures that options of `sample.py` name: read, fitted to one size, skeletons drawn."""

from __future__ import annotations

import argparse
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageOps

from fairhuman_jax.annotate.detector import open_detector
from fairhuman_jax.bases.latent_diffusion import LatentDiffusion
from fairhuman_jax.data.pictures import read_image, read_mask
from fairhuman_jax.keypoints.drawing import draw_poses
from fairhuman_jax.keypoints.poses import Pose, place_poses
from fairhuman_jax.keypoints.readers import read_poses

Size = tuple[int, int]
KEY_POINTS = (".npz", ".json")


@dataclass(frozen=True)
class Pictures:
    """What the options name, as uint8 arrays of one size (height, width).

    pose: the skeleton for HumanSD; openpose: the same people in the style that ControlNets and T2I-Adapters read.
    """

    size: Size
    image: np.ndarray | None = None
    mask: np.ndarray | None = None
    conditions: tuple[np.ndarray, ...] = ()
    pose: np.ndarray | None = None
    openpose: np.ndarray | None = None


def read_pictures(options: argparse.Namespace, system: LatentDiffusion) -> Pictures:
    """Reads the pictures; without --size the first one gives it, rounded down to what the networks halve."""
    image = read_image(options.init_image) if options.init_image else None
    conditions = [read_image(path) for path in options.condition]
    drawn = read_image(options.pose) if options.pose and options.pose.suffix.lower() not in KEY_POINTS else None
    given = [picture.shape[:2] for picture in (image, *conditions, drawn) if picture is not None]
    size = checked_size(options.size, given[0] if given else None, system)
    mask = None
    if options.mask and image is not None:
        mask = read_mask(options.mask)
        if mask.shape[:2] != image.shape[:2]:
            raise ValueError(
                f"--mask {options.mask} is {mask.shape[0]}x{mask.shape[1]}, but --init-image is "
                f"{image.shape[0]}x{image.shape[1]}"
            )
        mask = _fitted(mask[..., 0], size, Image.Resampling.NEAREST)[..., None]
    pose, openpose = (None, None) if drawn is None else (_fitted(drawn, size, Image.Resampling.NEAREST), None)
    if drawn is None and (options.pose or options.pose_of):
        people, found_in = _people(options)
        placed = place_poses(people, size, found_in, compat=options.compat)
        pose, openpose = draw_poses(placed, size, compat=options.compat), draw_poses(placed, size, "openpose")
    return Pictures(
        size,
        None if image is None else _fitted(image, size),
        mask,
        tuple(_fitted(condition, size) for condition in conditions),
        pose,
        openpose,
    )


def _people(options: argparse.Namespace) -> tuple[list[Pose], Size | None]:
    """The people of a file of key points, or those that a detector finds on a photograph, and the size of the picture
    that their points belong to, if it is known."""
    points, photo, size = options.pose, options.pose_of, options.pose_size
    if photo is None:
        assert points is not None, "one of the two is given"
        found = read_poses(points, size)
        return list(found.poses), found.size or size
    picture = read_image(photo)
    people = open_detector(options.pose_network, compat=bool(options.compat)).detect(picture)
    if not people:
        raise ValueError(f"--pose-of {photo}: nobody is found on it; give key points by --pose")
    return people, (picture.shape[0], picture.shape[1])


def _fitted(pixels: np.ndarray, size: Size, method: Image.Resampling = Image.Resampling.LANCZOS) -> np.ndarray:
    """Resized, and cropped at the middle where the proportions differ."""
    return np.asarray(ImageOps.fit(Image.fromarray(pixels), (size[1], size[0]), method))


def checked_size(asked: Size | None, given: Size | None, system: LatentDiffusion) -> Size:
    """The asked size, that of the picture to draw from, or the base's own."""
    unet, factor = system.pipeline.unet, system.pipeline.vae.downscale
    if asked is not None:
        if asked[0] % factor or asked[1] % factor or min(asked) < factor:
            raise ValueError(f"--size {asked[0]}x{asked[1]}: both sides must be multiples of {factor}")
        return asked
    if given is not None:
        multiple = factor * 2 ** (len(unet.block_out_channels) - 1)
        return max(given[0] // multiple, 1) * multiple, max(given[1] // multiple, 1) * multiple
    side = unet.sample_size or 64
    height, width = (side, side) if isinstance(side, int) else side
    return height * factor, width * factor
