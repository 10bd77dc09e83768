"""Sample sources, joint transforms, batches, export and preview: numpy, Pillow and grain, no device work."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fairhuman_jax.lazy import lazy_names

if TYPE_CHECKING:
    from fairhuman_jax.data.buckets import assign_buckets, bucket_shapes, nearest_bucket
    from fairhuman_jax.data.export import export_folder
    from fairhuman_jax.data.folder import FolderDataset
    from fairhuman_jax.data.keypoint_transforms import PoseTransform
    from fairhuman_jax.data.loader import BatchIterator, Source, Transform, make_loader
    from fairhuman_jax.data.pictures import BadSample
    from fairhuman_jax.data.preview import overlay
    from fairhuman_jax.data.shards import ShardedDataset, ShardWriter
    from fairhuman_jax.data.subject_folder import Segment, SubjectDataset
    from fairhuman_jax.data.subject_transforms import SubjectConfig, SubjectTransform
    from fairhuman_jax.data.tfds_folder import TFDSDataset, build_tfds
    from fairhuman_jax.data.transforms import Geometry, JointTransform, dilate_mask

__all__ = [
    "BadSample",
    "BatchIterator",
    "FolderDataset",
    "Geometry",
    "JointTransform",
    "PoseTransform",
    "Segment",
    "ShardWriter",
    "ShardedDataset",
    "Source",
    "SubjectConfig",
    "SubjectDataset",
    "SubjectTransform",
    "TFDSDataset",
    "Transform",
    "assign_buckets",
    "bucket_shapes",
    "build_tfds",
    "dilate_mask",
    "export_folder",
    "make_loader",
    "nearest_bucket",
    "overlay",
]

__getattr__ = lazy_names(
    __name__,
    {
        "buckets": "assign_buckets bucket_shapes nearest_bucket",
        "export": "export_folder",
        "folder": "FolderDataset",
        "keypoint_transforms": "PoseTransform",
        "loader": "BatchIterator Source Transform make_loader",
        "pictures": "BadSample",
        "preview": "overlay",
        "shards": "ShardedDataset ShardWriter",
        "subject_folder": "Segment SubjectDataset",
        "subject_transforms": "SubjectConfig SubjectTransform",
        "tfds_folder": "TFDSDataset build_tfds",
        "transforms": "Geometry JointTransform dilate_mask",
    },
)
