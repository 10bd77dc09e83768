"""Files of key points in every layout, and what is refused."""

from __future__ import annotations

import datetime
import json
import os
import pickle
import zipfile

import numpy as np
import pytest

from fairhuman_jax.keypoints.poses import make_pose
from fairhuman_jax.keypoints.readers import read_poses, write_poses

PERSON = np.random.default_rng(0).uniform((10, 20, 0.5), (450, 470, 1.0), (17, 3)).astype(np.float32)
SCORE = np.float32(0.5)
# Names of the points as OpenPose's and MediaPipe's documentation lists them.
BODY25 = [
    "nose", "neck", "r_shoulder", "r_elbow", "r_wrist", "l_shoulder", "l_elbow", "l_wrist", "mid_hip", "r_hip",
    "r_knee", "r_ankle", "l_hip", "l_knee", "l_ankle", "r_eye", "l_eye", "r_ear", "l_ear", "l_big_toe", "l_small_toe",
    "l_heel", "r_big_toe", "r_small_toe", "r_heel",
]  # fmt: skip
BODY18 = [
    "nose", "neck", "r_shoulder", "r_elbow", "r_wrist", "l_shoulder", "l_elbow", "l_wrist", "r_hip", "r_knee",
    "r_ankle", "l_hip", "l_knee", "l_ankle", "r_eye", "l_eye", "r_ear", "l_ear",
]  # fmt: skip
MEDIAPIPE = [
    "nose", "l_eye_inner", "l_eye", "l_eye_outer", "r_eye_inner", "r_eye", "r_eye_outer", "l_ear", "r_ear", "l_mouth",
    "r_mouth", "l_shoulder", "r_shoulder", "l_elbow", "r_elbow", "l_wrist", "r_wrist", "l_pinky", "r_pinky",
    "l_index", "r_index", "l_thumb", "r_thumb", "l_hip", "r_hip", "l_knee", "r_knee", "l_ankle", "r_ankle", "l_heel",
    "r_heel", "l_foot", "r_foot",
]  # fmt: skip
PARTS = ("eye", "ear", "shoulder", "elbow", "wrist", "hip", "knee", "ankle")
COCO = ["nose"] + [f"{side}_{part}" for part in PARTS for side in "lr"]


def laid_out(names, person=PERSON):
    """A person [17, 3] in another layout; points that COCO lacks lie at (7, 7)."""
    return [person[COCO.index(name)].tolist() if name in COCO else [7.0, 7.0, 0.5] for name in names]


def people(count=2):
    return [PERSON + np.float32([40 * i, 3 * i, -0.01 * i]) for i in range(count)]


def published(path, rows, protocol=4):
    """A file as HumanSD writes it: `arr_0`, an array of objects."""
    array = np.empty(len(rows), object)
    array[:] = rows
    body = pickle.dumps(array, protocol)
    header = b"{'descr': '|O', 'fortran_order': False, 'shape': (%d,), }" % len(rows)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("arr_0.npy", b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + body)
    return path


def row(points=PERSON, score=SCORE):
    return {"keypoints": points, "score": score, "area": np.float32(80000)}


def saved(path, content):
    path.write_text(json.dumps(content))
    return path


def refusal(path, **options) -> str:
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        read_poses(path, **options)
    message = str(error.value)
    assert "\n" not in message and message.startswith(str(path))
    return message


def test_published_npz_as_numpy_writes_it(tmp_path):
    rows = [row(points, np.float32(0.55 - 0.01 * i)) for i, points in enumerate(people(9))]
    np.savez(tmp_path / "demo.npz", np.array(rows, object))
    np.savez_compressed(tmp_path / "packed.npz", np.array(rows, object))
    for name in ("demo.npz", "packed.npz"):
        found = read_poses(tmp_path / name)
        assert found.size is None and len(found.poses) == 9
        for pose, points in zip(found.poses, people(9), strict=True):
            np.testing.assert_array_equal(pose.keypoints, points)
            assert pose.keypoints.dtype == np.float32 and pose.area == 80000
        assert [pose.score for pose in found.poses[:2]] == [np.float32(0.55), np.float32(0.54)]


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
def test_published_npz_of_every_pickle_protocol(tmp_path, protocol):
    (pose,) = read_poses(published(tmp_path / "a.npz", [row()], protocol)).poses
    np.testing.assert_array_equal(pose.keypoints, PERSON)
    assert pose.score == 0.5


def test_npz_without_people(tmp_path):
    np.savez(tmp_path / "none.npz", [])
    assert read_poses(tmp_path / "none.npz").poses == ()
    write_poses(tmp_path / "plain.npz", [])
    assert read_poses(tmp_path / "plain.npz").poses == ()


def test_what_is_written_is_read_and_is_no_pickle(tmp_path):
    poses = [make_pose(points, 0.25 + 0.5 * i, 12.5) for i, points in enumerate(people())]
    write_poses(tmp_path / "plain.npz", poses, (600, 800))
    with np.load(tmp_path / "plain.npz", allow_pickle=False) as file:
        assert {name: file[name].shape for name in file} == {
            "keypoints": (2, 17, 3), "score": (2,), "area": (2,), "size": (2,),
        }  # fmt: skip
    back = read_poses(tmp_path / "plain.npz")
    assert back.size == (600, 800) and [path.name for path in tmp_path.iterdir()] == ["plain.npz"]
    for ours, theirs in zip(poses, back.poses, strict=True):
        np.testing.assert_array_equal(ours.keypoints, theirs.keypoints)
        assert (ours.score, ours.area) == (theirs.score, theirs.area)
    np.savez(tmp_path / "bare.npz", keypoints=np.asfortranarray(people()))
    first = read_poses(tmp_path / "bare.npz").poses[0]
    assert first.score == pytest.approx(PERSON[:, 2].mean())
    assert first.area == pytest.approx(np.ptp(PERSON[:, :2], axis=0).prod())
    np.testing.assert_array_equal(first.keypoints, PERSON)
    with pytest.raises(ValueError, match="npz files"):
        write_poses(tmp_path / "a.json", poses)


class Command:
    """Asks its unpickler to run a command that leaves a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def test_a_pickle_that_would_run_a_command_is_refused_and_not_run(tmp_path):
    mark = tmp_path / "was run"
    for index, rows in enumerate(([Command(mark)], [row(score=Command(mark))])):
        message = refusal(published(tmp_path / f"{index}.npz", rows))
        assert "would build posix.system" in message or "would build nt.system" in message
        assert "not loaded" in message
    assert not mark.exists()


def test_members_that_are_no_arrays(tmp_path):
    header = b"{'descr': '|O', 'fortran_order': False, 'shape': (1,), }"
    head = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header
    mark = tmp_path / "was run"
    for value, message in ((Command(mark), "system"), ({"keypoints": 1}, "holds an object of type dict")):
        assert message in refusal(member(tmp_path / "a.npz", "arr_0.npy", head + pickle.dumps(value)))
    assert not mark.exists()


def test_harmless_objects_are_refused_as_well(tmp_path):
    assert "would build builtins.complex" in refusal(published(tmp_path / "a.npz", [row(score=1j)]))
    assert "would build datetime.date" in refusal(published(tmp_path / "b.npz", [row(score=datetime.date(2020, 1, 1))]))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            [row(), {"points": PERSON, "score": 1.0}],
            "person 2: keys points, score; expected a dict of keypoints [17, 3]",
        ),
        ([3.0], "person 1: float; expected a dict"),
        (["text"], "person 1: str; expected a dict"),
        ([row(points=PERSON[:16])], "person 1: key points [16, 3]; expected [17, 3]"),
        ([row(), row(points=PERSON * np.float32(np.nan))], "person 2: key points, score or area that are not finite"),
        ([row(score=np.float32(np.inf))], "person 1: key points, score or area that are not finite"),
        ([row(points="many")], "person 1: could not convert string"),
        ([row(score={})], "person 1: float() argument must be"),
        ([row(points=[[1, 2, 3], [4, 5]])], "person 1: setting an array element"),
    ],
)
def test_other_contents_of_a_published_file(tmp_path, rows, message):
    assert message in refusal(published(tmp_path / "a.npz", rows))


def test_damaged_npz_files(tmp_path):
    whole = published(tmp_path / "a.npz", [row()]).read_bytes()
    for length in (0, 3, 50, len(whole) // 2, len(whole) - 1):
        (tmp_path / "cut.npz").write_bytes(whole[:length])
        assert "truncated or no npz file" in refusal(tmp_path / "cut.npz")
    with zipfile.ZipFile(tmp_path / "inner.npz", "w") as archive, zipfile.ZipFile(tmp_path / "a.npz") as source:
        archive.writestr("arr_0.npy", source.read("arr_0.npy")[:-40])
    assert "truncated or no npz file" in refusal(tmp_path / "inner.npz")
    (tmp_path / "pickle.npz").write_bytes(pickle.dumps([row()]))
    assert "truncated or no npz file" in refusal(tmp_path / "pickle.npz")


def member(path, name, content):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(name, content)
    return path


def test_npz_files_that_promise_too_much(tmp_path):
    assert "unpacks to 65 MiB" in refusal(member(tmp_path / "bomb.npz", "keypoints.npy", b"\0" * (65 << 20)))
    header = b"{'descr': '<f4', 'fortran_order': False, 'shape': (1099511627776, 17, 3), }"
    head = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header
    assert "in 16 bytes" in refusal(member(tmp_path / "shape.npz", "keypoints.npy", head + b"\0" * 16))
    with open(tmp_path / "large.npz", "wb") as file:
        file.truncate(65 << 20)
    assert "has 65 MiB; a file of key points has less than 64" in refusal(tmp_path / "large.npz")


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"poses": np.zeros(3)}, "holds poses; expected arr_0, or keypoints [P, 17, 3] and score [P]"),
        ({"keypoints": np.zeros((2, 18, 3))}, "keypoints [2, 18, 3]; expected [P, 17, 3]"),
        ({"keypoints": np.zeros((2, 17, 3)), "score": np.zeros(3)}, "score [3] beside 2 people"),
        ({"keypoints": np.full((2, 17, 3), np.nan)}, "person 1: key points, score or area that are not finite"),
        ({"keypoints": np.zeros((1, 17, 3)), "size": np.zeros(2)}, "size [0.0, 0.0]; expected height and width"),
        ({"keypoints": np.zeros((1, 17, 3), complex)}, "person 1: key points are complex numbers"),
    ],
)
def test_other_plain_npz_files(tmp_path, arrays, message):
    np.savez(tmp_path / "a.npz", **arrays)
    assert message in refusal(tmp_path / "a.npz")


def test_coco_results_and_annotations(tmp_path):
    results = [
        {"image_id": 7, "category_id": 1, "keypoints": points.ravel().tolist(), "score": 0.25} for points in people()
    ]
    found = read_poses(saved(tmp_path / "results.json", results))
    np.testing.assert_allclose([pose.keypoints for pose in found.poses], people(), rtol=1e-6)
    assert found.poses[0].score == 0.25 and found.size is None

    points = PERSON.copy()
    points[:, 2] = 2
    points[3], points[4, 2] = 0, 1
    annotated = {
        "images": [{"id": 7, "height": 480, "width": 640}, {"id": 9, "height": 5, "width": 5}],
        "annotations": [
            {"image_id": 7, "keypoints": points.ravel().tolist(), "area": 5.0, "num_keypoints": 16},
            {"image_id": 7, "bbox": [0, 0, 1, 1]},  # a crowd without points
        ],
    }
    found = read_poses(saved(tmp_path / "annotations.json", annotated))
    assert found.size == (480, 640) and len(found.poses) == 1
    assert found.poses[0].keypoints[:, 2].tolist() == [1, 1, 1, 0] + [1] * 13


def test_coco_files_of_several_pictures(tmp_path):
    rows = [{"image_id": i, "keypoints": people(3)[i % 3].ravel().tolist(), "score": 1} for i in (4, 5, 5)]
    path = saved(tmp_path / "many.json", rows)
    assert "people of 2 pictures (image_id 4, 5, ...); say which one" in refusal(path)
    assert len(read_poses(path, image_id=5).poses) == 2 and len(read_poses(path, image_id="4").poses) == 1
    assert "nobody in the picture with image_id 6; there are 4, 5" in refusal(path, image_id=6)


@pytest.mark.parametrize("names", [BODY18, BODY25])
def test_openpose(tmp_path, names):
    frame = {"version": 1.3, "people": [{"pose_keypoints_2d": np.ravel(laid_out(names, p)).tolist()} for p in people()]}
    found = read_poses(saved(tmp_path / "pixels.json", frame))
    np.testing.assert_allclose([pose.keypoints for pose in found.poses], people(), rtol=1e-6)
    assert found.size is None and found.poses[0].score == pytest.approx(PERSON[:, 2].mean())
    for person in frame["people"]:
        shares = np.array(person["pose_keypoints_2d"]).reshape(-1, 3) / (640, 480, 1)
        person["pose_keypoints_2d"] = shares.ravel().tolist()
    path = saved(tmp_path / "shares.json", frame)
    assert "person 1 is given in shares of a picture whose size is not in the file; give it" in refusal(path)
    found = read_poses(path, size=(480, 640))
    np.testing.assert_allclose([pose.keypoints for pose in found.poses], people(), rtol=1e-5)
    # As editors write it: a list of one frame that knows its canvas.
    found = read_poses(saved(tmp_path / "frames.json", [frame | {"canvas_width": 640, "canvas_height": 480}]))
    np.testing.assert_allclose(found.poses[1].keypoints, people()[1], rtol=1e-5)
    assert found.size == (480, 640)
    assert read_poses(saved(tmp_path / "nobody.json", {"people": []})).poses == ()


def test_mediapipe_in_all_its_shapes(tmp_path):
    points = [
        {"x": x / 640, "y": y / 480, "z": -0.1, "visibility": visibility, "presence": 1.0}
        for x, y, visibility in laid_out(MEDIAPIPE)
    ]
    for index, content in enumerate(
        (
            points,
            {"pose_landmarks": [points]},
            {"pose_landmarks": {"landmark": points}},
            {"poseLandmarks": points, "image_height": 480, "image_width": 640},
            {"landmarks": [{"landmark": points}]},
            [[p["x"], p["y"], p["z"], p["visibility"]] for p in points],
        )
    ):
        found = read_poses(saved(tmp_path / f"{index}.json", content), size=(480, 640))
        assert len(found.poses) == 1, index
        np.testing.assert_allclose(found.poses[0].keypoints, PERSON, rtol=1e-5)
    assert read_poses(tmp_path / "3.json").size == (480, 640)
    two = [[[x, y, 0, c] for x, y, c in laid_out(MEDIAPIPE, person)] for person in people()]
    found = read_poses(saved(tmp_path / "pixels.json", {"landmarks": two}))
    np.testing.assert_allclose([pose.keypoints for pose in found.poses], people(), rtol=1e-6)
    assert read_poses(saved(tmp_path / "nobody.json", {"pose_landmarks": []})).poses == ()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"people": [{"face": []}]}, "person 1 has no pose_keypoints_2d"),
        ({"people": [{"pose_keypoints_2d": [1.0] * 51}]}, "person 1: 51 values in place of 54 or 75 numbers"),
        ({"people": [{"pose_keypoints_2d": ["1"] * 54}]}, "person 1: 54 values in place of 54 or 75 numbers"),
        ([{"keypoints": [1.0] * 50}], "person 1: 50 values in place of 51 numbers"),
        ([{"keypoints": [10**400] * 51, "score": 1}], "int too large"),
        ([{"keypoints": [1e300] * 51, "score": 1}], "person 1: key points, score or area that are not finite"),
        ({"landmarks": [[0.5, 0.5, 0, 1]] * 21}, "person 1 has 21 points; expected COCO"),
        ({"landmarks": [[0.5, 0.5]] * 33}, "person 1: no points of x, y, z and visibility"),
        ({"hands": 3}, "no key points of a known layout; expected COCO"),
        (5, "no key points of a known layout"),
        ({"annotations": 5}, "annotations are not a list of objects"),
        ({"people": [], "height": -4, "width": 4}, "size [-4, 4]; expected height and width"),
    ],
)
def test_other_json_files(tmp_path, content, message):
    assert message in refusal(saved(tmp_path / "a.json", content))


def test_what_is_no_json_or_npz(tmp_path):
    (tmp_path / "a.json").write_text("{")
    assert "not json" in refusal(tmp_path / "a.json")
    (tmp_path / "b.json").write_text('{"people": [{"pose_keypoints_2d": [' + ", ".join(["NaN"] * 54) + "]}]}")
    assert "not finite" in refusal(tmp_path / "b.json")
    (tmp_path / "c.json").write_text("[" * 100_000)
    refusal(tmp_path / "c.json")
    (tmp_path / "d.png").write_bytes(b"")
    assert "key points are read from .npz and .json files" in refusal(tmp_path / "d.png")
    assert "does not exist" in refusal(tmp_path / "none.npz")
