"""Fits the classifier of silhouettes by which `evaluate --parts events` names shapes, on training clips of `blocks`.

    python tools/blocks_shapes.py --scripts 3000

Frames in which everything is at rest, as drawn and blurred (a decoder's pictures are softer), multinomial logistic
regression on the 68 numbers of `silhouette_of`. Writes dicode/features/events/shapes.json, and prints the accuracy on
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
from dicode.data.blocks.world import states, there
from dicode.features.events.see import KINDS, SHAPES_FILE, patches_of
from dicode.files import put_text

BLURS = (0.0, 0.6, 0.9)  # pixels
PENALTY = 2e-5  # on squared weights


def samples(name: str, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Silhouettes and kinds of the things at rest between the clauses of scripts."""
    silhouettes, kinds = [], []
    for index in range(count):
        script = script_of(0, name, index)
        camera, poses = camera_of(script, 0, name, index), poses_of(script)
        places = [start * CLIP_FRAMES for start in [*script.starts, script.clips]]
        for number, (place, state) in enumerate(zip(places, states(script), strict=True)):
            if any(body.away == 1 for body in state.values()):
                continue
            truth = {COLOURS.index(b.colour): f"{b.shape}{' lying' if b.lying else ''}" for b in there(state).values()}
            blur = BLURS[(index + number) % len(BLURS)]
            soft = gaussian_filter(camera.frame(poses, place).astype(float), (blur, blur, 0)).round().astype(np.uint8)
            for patch in patches_of(soft):
                if patch.colour in truth:
                    silhouettes.append(patch.silhouette)
                    kinds.append(KINDS.index(truth[patch.colour]))
    return np.array(silhouettes), np.array(kinds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scripts", type=int, default=3000)
    silhouettes, kinds = samples("training", parser.parse_args().scripts)
    mean = silhouettes.mean(0)
    inputs, targets = silhouettes - mean, np.eye(len(KINDS))[kinds]
    shape = (inputs.shape[1] + 1, len(KINDS))
    share = (1 / np.bincount(kinds)[kinds] / len(KINDS))[:, None]  # every kind counts as much
    with_one = np.concatenate([inputs, np.ones((len(inputs), 1))], axis=1)

    def loss(flat: np.ndarray) -> tuple[float, np.ndarray]:
        weights = flat.reshape(shape)
        logs = log_softmax(with_one @ weights, axis=1)
        gradient = with_one.T @ (share * (np.exp(logs) - targets)) + 2 * PENALTY * weights
        return float(-(share * targets * logs).sum() + PENALTY * (weights**2).sum()), gradient.ravel()

    fitted = minimize(loss, np.zeros(shape).ravel(), jac=True, method="L-BFGS-B", options={"maxiter": 1000})
    weights = fitted.x.reshape(shape)
    values = {"mean": mean.round(4).tolist(), "weights": weights[:-1].round(3).tolist()}
    put_text(SHAPES_FILE, json.dumps({**values, "bias": weights[-1].round(3).tolist()}) + "\n")
    others, truth = samples("seen", 200)
    found = ((others - mean) @ weights[:-1] + weights[-1]).argmax(1)
    print(f"{len(kinds)} silhouettes; right of {len(truth)} others: {(found == truth).mean():.2%}")
    for number, kind in enumerate(KINDS):
        print(f"  {kind:<14}{(found == truth)[truth == number].mean():.2%} of {(truth == number).sum()}")


if __name__ == "__main__":
    main()
