"""Fits the classifier of silhouettes by which `evaluate --parts events` names shapes, on training clips of `blocks`.

    python tools/blocks_shapes.py --scripts 3000

Frames in which everything is at rest, as drawn and blurred (a decoder's pictures are softer), a network of one hidden
layer on the 68 numbers of `silhouette_of`. Writes dicode/features/events/shapes.json, and prints the accuracy on
clips of `seen`, which it does not fit.
"""

import argparse
import json

import numpy as np
from scipy.ndimage import gaussian_filter
from scipy.optimize import minimize
from scipy.special import log_softmax

from dicode.data.blocks.clips import camera_of
from dicode.data.blocks.motion import poses_of
from dicode.data.blocks.plan import script_of
from dicode.data.blocks.script import CLIP_FRAMES, COLOURS
from dicode.data.blocks.world import Body, states, there
from dicode.features.events.tracks import KINDS, SHAPES_FILE, patches_of, shape_scores
from dicode.files import put_text

BLURS = (0.0, 0.6, 0.9)  # pixels
PENALTY = 2e-5  # on squared weights
HIDDEN = 20


def kind_of(body: Body) -> int:
    """The number of what its silhouette is to be taken for."""
    if body.lying and body.shape == "cone":
        return KINDS.index(f"cone to the {'left' if body.lying < 0 else 'right'}")
    return KINDS.index(f"{body.shape} lying" if body.lying else body.shape)


def samples(name: str, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Silhouettes and kinds of the objects at rest between the clauses of scripts."""
    silhouettes, kinds = [], []
    for index in range(count):
        script = script_of(0, name, index)
        camera, poses = camera_of(script, 0, name, index), poses_of(script)
        places = [start * CLIP_FRAMES for start in [*script.starts, script.clips]]
        for number, (place, state) in enumerate(zip(places, states(script), strict=True)):
            if any(body.away == 1 for body in state.values()):
                continue
            truth = {COLOURS.index(body.colour): kind_of(body) for body in there(state).values()}
            blur = BLURS[(index + number) % len(BLURS)]
            soft = gaussian_filter(camera.frame(poses, place).astype(float), (blur, blur, 0)).round().astype(np.uint8)
            for patch in patches_of(soft):
                if patch.colour in truth:
                    silhouettes.append(patch.silhouette)
                    kinds.append(truth[patch.colour])
    return np.array(silhouettes), np.array(kinds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scripts", type=int, default=3000)
    silhouettes, kinds = samples("training", parser.parse_args().scripts)
    mean, targets = silhouettes.mean(0), np.eye(len(KINDS))[kinds]
    inputs = silhouettes - mean
    share = np.sqrt(1 / np.bincount(kinds)[kinds])[:, None]  # rare kinds count for more
    share /= share.sum()
    random = np.random.default_rng(0)
    shapes = [(inputs.shape[1], HIDDEN), (HIDDEN,), (HIDDEN, len(KINDS)), (len(KINDS),)]
    sizes = np.cumsum([0, *(int(np.prod(shape)) for shape in shapes)])

    def parts(flat: np.ndarray) -> list[np.ndarray]:
        return [flat[a:b].reshape(shape) for a, b, shape in zip(sizes[:-1], sizes[1:], shapes, strict=True)]

    def loss(flat: np.ndarray) -> tuple[float, np.ndarray]:
        first, first_bias, second, second_bias = parts(flat)
        hidden = np.tanh(inputs @ first + first_bias)
        logs = log_softmax(hidden @ second + second_bias, axis=1)
        error = share * (np.exp(logs) - targets)
        back = (error @ second.T) * (1 - hidden**2)
        gradients = [inputs.T @ back, back.sum(0), hidden.T @ error, error.sum(0)]
        gradient = np.concatenate([part.ravel() for part in gradients]) + 2 * PENALTY * flat
        return float(-(share * targets * logs).sum() + PENALTY * (flat**2).sum()), gradient

    fitted = minimize(loss, random.normal(0, 0.15, sizes[-1]), jac=True, method="L-BFGS-B", options={"maxiter": 600})
    names = ("first", "first_bias", "second", "second_bias")
    values = {name: part.round(3).tolist() for name, part in zip(names, parts(fitted.x), strict=True)}
    put_text(SHAPES_FILE, json.dumps({"mean": mean.round(4).tolist(), **values}) + "\n")
    others, truth = samples("seen", 400)
    found = shape_scores(others).argmax(1)
    print(f"{len(kinds)} silhouettes; right of {len(truth)} others: {(found == truth).mean():.2%}")
    for number, kind in enumerate(KINDS):
        print(f"  {kind:<14}{(found == truth)[truth == number].mean():.2%} of {(truth == number).sum()}")


if __name__ == "__main__":
    main()
