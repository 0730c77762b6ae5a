"""Pictures of poses: rays in parallel from a camera that looks down at the floor, at 128×128, halved to 64×64.

The camera's axes are x to the right and `w` up in the picture, which sees y and z: w = y sin(pitch) + z cos(pitch).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32, Float64, UInt8
from numpy import ndarray

from dicode.data.blocks.motion import Poses
from dicode.data.blocks.world import HEIGHT, RADIUS
from dicode.video.timed import Video

SIZE, DRAWN = 64, 128  # side of a frame, and of what is drawn
UNIT = DRAWN / 8  # drawn pixels
CENTRE_DOWN = 92  # drawn pixels from the top to the middle of the floor
FLOORS = ("grey", "wooden", "chequered")
SPOT, SPOT_COLOUR = 0.19, (0.96, 0.95, 0.92)  # radius of the pale spot on the front of objects, of their side
AMBIENT, DIFFUSE, GLOSS = 0.56, 0.5, 0.3
SHADE = 0.45  # darkness of a shadow under an object


# Half the side of a square around each shape, however it is turned, of its side
BOUND = {s: float(np.hypot(RADIUS[s] * (1.42 if s == "cube" else 1), HEIGHT[s] / 2)) for s in HEIGHT}
Sprite = tuple[slice, slice, ndarray, ndarray]  # rows, columns, distances `h w` (or inf), colours `h w 3`


@dataclass(frozen=True)
class Look:
    """What differs between videos beside their scripts."""

    floor: str
    pitch: float  # radians that the camera looks down
    shift: tuple[float, float]  # of the picture, in drawn pixels
    light: tuple[float, float, float]  # towards the light, of length 1
    brightness: float
    yaws: tuple[float, ...]  # of the objects, radians
    grain: int  # seed of the floor's pattern


def look_of(random: np.random.Generator, objects: int) -> Look:
    """A look at random."""
    azimuth = random.uniform(-0.9, 0.9)
    light = np.array([np.sin(azimuth) * 0.55, -np.cos(azimuth) * 0.5, 0.8])
    light /= np.linalg.norm(light)
    return Look(
        floor=FLOORS[int(random.integers(len(FLOORS)))],
        pitch=float(np.radians(random.uniform(26.5, 29.5))),
        shift=(float(random.uniform(-2, 2)), float(random.uniform(-2, 2))),
        light=(float(light[0]), float(light[1]), float(light[2])),
        brightness=float(random.uniform(0.94, 1.04)),
        yaws=tuple(float(yaw) for yaw in random.uniform(-0.14, 0.14, objects)),
        grain=int(random.integers(2**31)),
    )


class Camera:
    """Draws frames of one look."""

    def __init__(self, look: Look) -> None:
        self.look = look
        self.sin, self.cos = np.sin(look.pitch), np.cos(look.pitch)
        columns, rows = np.arange(DRAWN) + 0.5, np.arange(DRAWN) + 0.5
        self.u = (columns - DRAWN / 2 - look.shift[0]) / UNIT
        self.w = (CENTRE_DOWN + look.shift[1] - rows) / UNIT
        self.floor = self._floor()
        self.sprites: dict[int, tuple[bytes, Sprite]] = {}  # the last one of each object, and its pose

    def _floor(self) -> Float32[ndarray, "h w 3"]:
        """The floor, lit, 0…1."""
        random = np.random.default_rng(self.look.grain)
        x, y = self.u[None, :], self.w[:, None] / self.sin
        tint = np.array([1.0, 1.0, 1.0])
        if self.look.floor == "grey":
            value = random.uniform(0.58, 0.70) + 0.035 * _noise(random, 5, 7)
        elif self.look.floor == "wooden":
            tint = np.array([1.06, 0.985, 0.89])
            plank = (y + random.uniform(0, 2)) / 1.7
            number = np.floor(plank).astype(int)
            shades = random.uniform(-0.045, 0.045, 64)[number % 64]
            seam = np.clip(1 - np.abs(plank - np.round(plank)) / 0.05, 0, 1)
            value = 0.62 + shades - 0.11 * seam + 0.03 * _noise(random, 40, 5)
        else:
            place = random.uniform(0, 2, 2)
            even = (np.floor((x + place[0]) / 2.2) + np.floor((y + place[1]) / 2.2)) % 2
            value = 0.57 + 0.13 * even + 0.015 * _noise(random, 6, 6)
        light = 1 + 0.05 * self.look.light[0] * x / 4 + 0.03 * (y / 8)
        lit = np.broadcast_to(value, (DRAWN, DRAWN)) * light * self.look.brightness
        return np.clip(lit[:, :, None] * tint, 0, 1).astype(np.float32)

    def video(self, poses: Sequence[Poses], every: int = 1) -> Video:
        """Frames of some objects: all, or frame 0 and each one so many later."""
        frames: list[ndarray] = []
        for f in range(0, len(poses[0].yaw), every):
            if f and all(own.at(f) == own.at(f - every) for own in poses):
                frames.append(frames[-1])
            else:
                frames.append(self.frame(poses, f))
        return np.stack(frames)

    def frame(self, poses: Sequence[Poses], f: int) -> UInt8[ndarray, "h w 3"]:
        """One frame."""
        canvas = self.drawn(poses, f)[0]
        columns = canvas[:, ::2] + canvas[:, 1::2]  # four times as fast as the mean over both axes
        return ((columns[::2] + columns[1::2]) * (255 / 4)).round().astype(np.uint8)

    def drawn(self, poses: Sequence[Poses], f: int) -> tuple[Float32[ndarray, "h w 3"], ndarray]:
        """One frame before it is halved, 0…1, and the number of the object at each pixel, −1 for the floor."""
        canvas, numbers = self.floor.copy(), np.full((DRAWN, DRAWN), -1)
        depth = np.full((DRAWN, DRAWN), np.inf)
        for own in poses:
            if own.there[f]:
                self._shadow(canvas, own, f)
        for i, own in enumerate(poses):
            if not own.there[f]:
                continue
            pose = own.at(f)
            if i not in self.sprites or self.sprites[i][0] != pose:
                self.sprites[i] = pose, self._sprite(own, f, self.look.yaws[i])
            rows, columns, distance, colour = self.sprites[i][1]
            nearer = distance < depth[rows, columns]
            depth[rows, columns][nearer] = distance[nearer]
            numbers[rows, columns][nearer] = i
            canvas[rows, columns][nearer] = colour[nearer]
        return canvas, numbers

    def _window(self, x: float, w: float, half_x: float, half_w: float) -> tuple[slice, slice]:
        """Rows and columns of the picture around a place."""
        column = x * UNIT + DRAWN / 2 + self.look.shift[0]
        row = CENTRE_DOWN + self.look.shift[1] - w * UNIT
        columns = slice(*np.clip([column - half_x * UNIT - 1, column + half_x * UNIT + 2], 0, DRAWN).astype(int))
        return slice(*np.clip([row - half_w * UNIT - 1, row + half_w * UNIT + 2], 0, DRAWN).astype(int)), columns

    def _shadow(self, canvas: ndarray, poses: Poses, f: int) -> None:
        """A soft ellipse on the floor: fainter, wider and further from the light the higher an object is."""
        x, y, z = poses.place[f]
        side, (tall, wide) = poses.side[f], (HEIGHT[poses.shape], RADIUS[poses.shape])
        lying = abs(np.sin(poses.tilt[f]))
        bottom = max(0.0, z - side * (tall / 2 * (1 - lying) + wide * lying))
        radii = side * np.array([wide + (tall / 2 - wide) * lying, wide]) * (1.12 + 0.1 * bottom)
        away = 0.3 * side + 0.45 * bottom
        centre = np.array([x, y]) - np.array(self.look.light[:2]) * away
        soft = 1.45
        rows, columns = self._window(centre[0], centre[1] * self.sin, radii[0] * soft, radii[1] * soft * self.sin)
        across = ((self.u[columns] - centre[0]) / radii[0])[None, :]
        along = ((self.w[rows] / self.sin - centre[1]) / radii[1])[:, None]
        edge = np.clip((soft - np.hypot(across, along)) / (soft - 0.45), 0, 1)
        dark = SHADE * np.exp(-bottom / 2.5) * edge**2 * (3 - 2 * edge)
        canvas[rows, columns] *= (1 - dark[:, :, None]).astype(np.float32)

    def _sprite(self, poses: Poses, f: int, yaw: float) -> Sprite:
        """An object by itself."""
        (x, y, z), side = poses.place[f], poses.side[f]
        up = y * self.sin + z * self.cos
        rows, columns = self._window(x, up, BOUND[poses.shape] * side, BOUND[poses.shape] * side)
        right, above = np.meshgrid(self.u[columns] - x, self.w[rows] - up)
        turned = _rotation(poses.yaw[f] + yaw, poses.tilt[f])  # from the object's axes to the world's
        axes = np.array([[1, 0, 0], [0, self.sin, self.cos], [0, self.cos, -self.sin]]) @ turned
        origin = right[..., None] * axes[0] + above[..., None] * axes[1]
        distance, normal, hit = HITS[poses.shape](origin.reshape(-1, 3), axes[2], side)
        shown = np.isfinite(distance)
        colour = np.zeros((*right.shape, 3), np.float32)
        shaded = self._shaded(poses.colour[f], normal[shown] @ turned.T, hit[shown] / side, poses.shape)
        colour.reshape(-1, 3)[shown] = shaded
        return rows, columns, distance.reshape(right.shape) + (y * self.cos - z * self.sin), colour

    def _shaded(self, colour: ndarray, normal: ndarray, hit: ndarray, shape: str) -> Float32[ndarray, "n 3"]:
        """Colours of places with these normals (world) on an object (its own axes, in sides)."""
        lit = np.clip(normal @ np.array(self.look.light), -1, 1)
        half = np.array(self.look.light) + np.array([0, -self.cos, self.sin])
        shine = np.clip(normal @ (half / np.linalg.norm(half)), 0, 1) ** 24 * (GLOSS if shape == "ball" else GLOSS / 3)
        level = -0.16 if shape == "cone" else 0.0
        from_spot = np.hypot(hit[:, 0], hit[:, 2] - level)
        spot = np.clip((SPOT - from_spot) / 0.03, 0, 1) * (hit[:, 1] < 0)
        base = colour + spot[:, None] * (np.array(SPOT_COLOUR) - colour)
        shaded = base * (AMBIENT + DIFFUSE * (0.5 + 0.5 * lit) ** 1.3)[:, None] * self.look.brightness
        return np.clip(shaded + shine[:, None] * (1 - shaded), 0, 1).astype(np.float32)


def _noise(random: np.random.Generator, rows: int, columns: int) -> Float64[ndarray, "h w"]:
    """Smooth noise of about −1…1, of so many hills down and across."""
    hills = random.uniform(-1, 1, (rows + 1, columns + 1))
    place, wanted = np.linspace(0, 1, rows + 1), np.linspace(0, 1, DRAWN)
    down = np.stack([np.interp(wanted, place, column) for column in hills.T], axis=1)
    place = np.linspace(0, 1, columns + 1)
    return np.stack([np.interp(wanted, place, row) for row in down])


def _rotation(yaw: float, tilt: float) -> Float64[ndarray, "3 3"]:
    """Turned about the upright axis, then tipped towards +x."""
    about_z = np.array([[np.cos(yaw), -np.sin(yaw), 0], [np.sin(yaw), np.cos(yaw), 0], [0, 0, 1]])
    about_y = np.array([[np.cos(tilt), 0, np.sin(tilt)], [0, 1, 0], [-np.sin(tilt), 0, np.cos(tilt)]])
    return about_y @ about_z


Hits = tuple[Float64[ndarray, "n"], Float64[ndarray, "n 3"], Float64[ndarray, "n 3"]]


def _ball(origin: ndarray, ray: ndarray, side: float) -> Hits:
    """Distances along a ray to a shape (infinite: past it), normals and places there, of many origins."""
    radius = RADIUS["ball"] * side
    along = origin @ ray
    root = along**2 - _squared(origin) + radius**2
    distance = np.where(root >= 0, -along - np.sqrt(np.clip(root, 0, None)), np.inf)
    hit = origin + np.where(root >= 0, distance, 0)[:, None] * ray
    return distance, hit / radius, hit


def _cube(origin: ndarray, ray: ndarray, side: float) -> Hits:
    half = RADIUS["cube"] * side
    safe = np.where(np.abs(ray) < 1e-9, 1e-9, ray)
    near = (-half * np.sign(safe) - origin) / safe
    far = (half * np.sign(safe) - origin) / safe
    distance, axis = near.max(1), near.argmax(1)
    misses = distance > far.min(1)
    normal = np.zeros_like(origin)
    normal[np.arange(len(origin)), axis] = -np.sign(safe)[axis]
    return np.where(misses, np.inf, distance), normal, origin + np.where(misses, 0, distance)[:, None] * ray


def _cylinder(origin: ndarray, ray: ndarray, side: float) -> Hits:
    radius, half = RADIUS["cylinder"] * side, HEIGHT["cylinder"] * side / 2
    return _turned(origin, ray, half, (-(radius**2), 0.0, 0.0), (-half, half))


def _cone(origin: ndarray, ray: ndarray, side: float) -> Hits:
    radius, half = RADIUS["cone"] * side, HEIGHT["cone"] * side / 2
    slope = radius / (2 * half)  # x² + y² = slope² (half − z)²
    form = (-((slope * half) ** 2), 2 * slope**2 * half, -(slope**2))
    return _turned(origin, ray, half, form, (-half,))


Form = tuple[float, float, float]


def _turned(origin: ndarray, ray: ndarray, half: float, form: Form, caps: tuple[float, ...]) -> Hits:
    """A solid of revolution x² + y² + c + b z + a z² = 0 (`form` is c, b, a) between −half and half, and its caps."""
    c, b, a = form
    flat = np.array([1, 1, 0])
    square = (ray**2 * flat).sum() + a * ray[2] ** 2
    mixed = origin @ (ray * (1, 1, a)) + b * ray[2] / 2
    constant = _squared(origin[:, :2]) + c + b * origin[:, 2] + a * origin[:, 2] ** 2
    root = mixed**2 - square * constant
    sqrt = np.sqrt(np.clip(root, 0, None))
    best = np.full(len(origin), np.inf)
    normal = np.zeros_like(origin)
    square = square if abs(square) > 1e-9 else 1e-9
    for sign in (-1, 1):
        distance = (-mixed + sign * sqrt) / square
        height = origin[:, 2] + distance * ray[2]
        taken = (root >= 0) & (np.abs(height) <= half) & (distance < best)
        hit = origin[taken] + distance[taken, None] * ray
        outward = hit * flat + np.array([0, 0, b / 2]) + a * hit * np.array([0, 0, 1])
        normal[taken] = outward / np.linalg.norm(outward, axis=1, keepdims=True).clip(1e-9)
        best[taken] = distance[taken]
    for cap in caps:
        if abs(ray[2]) < 1e-9:
            continue
        distance = (cap - origin[:, 2]) / ray[2]
        hit = origin + distance[:, None] * ray
        inside = _squared(hit[:, :2]) <= _squared_radius(form, cap)
        taken = inside & (distance < best)
        normal[taken] = np.array([0, 0, np.sign(cap)])
        best[taken] = distance[taken]
    return best, normal, origin + np.where(np.isfinite(best), best, 0)[:, None] * ray


def _squared(vectors: ndarray) -> ndarray:
    """Their squared lengths."""
    return np.einsum("ij,ij->i", vectors, vectors)


def _squared_radius(form: Form, z: float) -> float:
    return -(form[0] + form[1] * z + form[2] * z**2)


HITS = {"ball": _ball, "cube": _cube, "cylinder": _cylinder, "cone": _cone}
