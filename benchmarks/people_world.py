"""Images per second of the people world on one core, and what its pictures contain.

    OMP_NUM_THREADS=1 python benchmarks/people_world.py                 # speed at 64, 128 and 256 px
    OMP_NUM_THREADS=1 python benchmarks/people_world.py --content 600   # sizes of hands and faces at 64 px

CPU time of one process; keep BLAS to one thread, or two processes on two cores slow each other down.
"""

from __future__ import annotations

import argparse
import time
from collections import defaultdict

import numpy as np

from fairhuman_jax.data.people import PeoplePack, render, sample_spec

SIZES = (64, 128, 256)


def speed(count: int) -> None:
    """Print images per CPU second at every size, specification included."""
    pack = PeoplePack.load()
    render(pack, sample_spec(0, 0), 64)
    print("size  images/s per core  ms/image")
    for size in SIZES:
        began = time.process_time()
        for i in range(count):
            render(pack, sample_spec(1, i), size)
        each = (time.process_time() - began) / count
        print(f"{size:4d}  {1 / each:17.1f}  {1000 * each:8.1f}")


def longest_side(box: list[int] | None) -> int:
    """Pixels of the longer side of a box, 0 for none."""
    return 0 if box is None else max(box[2] - box[0], box[3] - box[1])


def content(count: int, size: int = 64) -> None:
    """Print, by framing, the share of pictures, sizes of hands and faces in pixels, and their area."""
    pack = PeoplePack.load()
    rows = defaultdict(list)
    hits = points = 0
    captions, words = set(), set()
    for i in range(count):
        spec = sample_spec(2, i)
        s = render(pack, spec, size)
        hand = max(longest_side(s["boxes"]["hand_left"]), longest_side(s["boxes"]["hand_right"]))
        row = (hand, s["hand_mask"].mean(), longest_side(s["boxes"]["face"]), s["face_mask"].mean())
        for key in (spec["camera"]["framing"], "all"):
            rows[key].append(row)
        captions.add(s["caption"])
        words |= set(s["caption"].replace(",", "").split())
        for side in ("left", "right"):
            mask = np.pad(s[f"hand_mask_{side}"][..., 0], 1)
            for x, y, visible in s["keypoints"][f"hand_{side}"]:
                if visible:
                    points += 1
                    hits += mask[int(y) : int(y) + 3, int(x) : int(x) + 3].any()
    print(f"{'framing':32s} share  hand px  >=8  >=16  none  hand %  face px  face %")
    for name, values in rows.items():
        hand, hand_area, face, face_area = np.array(values).T
        print(
            f"{name:32s} {len(values) / count:5.2f}  {np.median(hand):7.0f}  {(hand >= 8).mean():.2f}"
            f"  {(hand >= 16).mean():4.2f}  {(hand == 0).mean():.2f}  {100 * hand_area.mean():6.1f}"
            f"  {np.median(face):7.0f}  {100 * face_area.mean():6.1f}"
        )
    print(f"{len(captions)} captions of {count}, {len(words)} words")
    print(f"visible hand points in the hand mask widened by a pixel: {hits / max(points, 1):.4f} of {points}")


def main() -> None:
    """Parse the command line and run one of the two."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=60, help="pictures per size")
    parser.add_argument("--content", type=int, default=0, help="describe this many pictures instead")
    arguments = parser.parse_args()
    if arguments.content:
        content(arguments.content)
    else:
        speed(arguments.count)


if __name__ == "__main__":
    main()
