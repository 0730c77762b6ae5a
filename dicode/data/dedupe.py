"""What frames look like: where one scene ends and the next begins, and which video is a copy of another."""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from PIL import Image

from dicode.config import missing_extra
from dicode.video.timed import Video

SIXTHS = (1, 3, 5)  # of a video, where its frames are compared: its ends are often blank, and the same in many
THUMBNAIL = 4  # side; for colours, which a perceptual hash does not have
# Levels of 255 within which the colours of copies lie. Of 1,798 spells and emoji, hashes alone at 4 bits call 199
# copies, hearts of other colours and hands of other skin among them; with the colours, at 4 to 12 levels, one.
COLOUR_LEVELS = 8


def scenes(frames: Video) -> list[tuple[int, int]]:
    """First frame of every scene and the one after its last, by PySceneDetect's `AdaptiveDetector`.

    It compares a change with those around it, so that fast motion, and a low rate, make no cuts.
    """
    try:
        from scenedetect import AdaptiveDetector, FrameTimecode
    except ModuleNotFoundError as error:
        raise missing_extra(error, "data") from error
    detector, cuts = AdaptiveDetector(min_scene_len=1), []
    for i, frame in enumerate(frames):
        bgr = np.ascontiguousarray(frame[..., ::-1])
        cuts += [at.frame_num for at in detector.process_frame(FrameTimecode(i, fps=1.0), bgr)]
    return list(pairwise([0, *cuts, len(frames)]))


def look_of(frames: Video) -> str:
    """Perceptual hashes (64 bits) and thumbnails of three frames, as hexadecimal digits."""
    try:
        from imagehash import phash
    except ModuleNotFoundError as error:
        raise missing_extra(error, "data") from error
    images = [Image.fromarray(frames[len(frames) * sixths // 6]) for sixths in SIXTHS]
    bits = np.concatenate([np.packbits(phash(image).hash) for image in images])
    small = [np.asarray(image.resize((THUMBNAIL, THUMBNAIL), Image.Resampling.BOX)) for image in images]
    return (bits.tobytes() + np.stack(small).tobytes()).hex()


def repeats(looks: Sequence[str], most_bits: int) -> dict[int, int]:
    """Of looks that repeat an earlier one, which one: hashes differ in at most so many of 64 bits, in each frame.

    What repeats another is not itself compared with, so the first of several alike is kept whatever their number. Takes
    time with the square of their number: 2 minutes for 100,000.
    """
    if not looks:
        return {}
    raw = np.frombuffer(bytes.fromhex("".join(looks)), dtype=np.uint8).reshape(len(looks), -1)
    split = 8 * len(SIXTHS)
    hashes, colours = raw[:, :split].copy().view(np.uint64), raw[:, split:].astype(np.int16)
    is_kept, found = np.zeros(len(looks), dtype=bool), {}
    for i in range(len(looks)):
        alike = np.flatnonzero(is_kept[:i])
        alike = alike[(np.bitwise_count(hashes[alike] ^ hashes[i]) <= most_bits).all(axis=1)]
        alike = alike[(np.abs(colours[alike] - colours[i]) <= COLOUR_LEVELS).all(axis=1)]
        is_kept[i] = not len(alike)
        if len(alike):
            found[i] = int(alike[0])
    return found
