"""What a client may ask for, checked before it is queued, against the model's configuration alone."""

import json
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, get_args

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from dicode.checkpoint import read_section, resolve
from dicode.config import CheckpointError, nearest
from dicode.lm.config import DeepLMConfig
from dicode.storyboard import Shot, key_frames_of
from dicode.tokenizer.config import Joins, SamplingConfig, TokenizerConfig

SAMPLING = {own.name for own in fields(SamplingConfig)}
WHOLE = ("flow_steps", "context_key_frames", "steps", "motion_tokens")  # of these fields
MOST_SHOTS, MOST_CHARACTERS = 200, 4000
MOST_LIVE_S = 3600.0  # of an endless video
MOST_SIDE = 1024  # of a picture that is enlarged, in pixels
LARGEST_SEED = 2**63 - 1
MOST_CLIPS = 100_000
JOB_ID = r"^video_[0-9a-f]{32}$"
OWN = (
    "extends",
    "given",
    "remixed_from_video_id",
    "reconstructs",
)  # fields that the server sets, by the endpoint that is called


class RequestError(ValueError):
    """A request that no job can be made of; `param` names the field."""

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


def _text(prompt: str) -> str:
    """Without space around it. Raises `ValueError` for a NUL; lone surrogates are refused by pydantic."""
    if "\0" in prompt:
        raise ValueError("holds characters that are no text")
    return prompt.strip()


def _words(prompt: str) -> str:
    """A text that is not empty. Raises `ValueError`."""
    if not (found := _text(prompt)):
        raise ValueError("expected a text of at least one word")
    return found


class ShotRequest(BaseModel):
    """One shot of a storyboard."""

    model_config = ConfigDict(extra="forbid")
    prompt: Annotated[str, AfterValidator(_words)] = Field(max_length=MOST_CHARACTERS)
    seconds: float = Field(gt=0, le=86_400)


class VideoRequest(BaseModel):
    """A video to make. What is left out is the model's own; fields of `dicode generate` have its flags' names."""

    model_config = ConfigDict(extra="allow", protected_namespaces=())  # extra: fields of `SamplingConfig` alone
    prompt: Annotated[str, AfterValidator(_text)] = Field(
        default="", max_length=MOST_CHARACTERS, description="What the video shows, in order"
    )
    model: str | None = Field(default=None, description="A name of /v1/models")
    seconds: float = Field(default=4.0, gt=0, le=86_400, description="Its length; a storyboard's shots have their own")
    size: str | None = Field(default=None, pattern=r"^\d{2,4}x\d{2,4}$", description="WxH, the model's or a multiple")
    seed: int = Field(default=0, ge=0, le=LARGEST_SEED)
    shots: list[ShotRequest] | None = Field(default=None, min_length=1, max_length=MOST_SHOTS)
    loop: bool = Field(default=False, description="Ends on its first frame")
    reroll_from: int | None = Field(default=None, ge=0, le=MOST_CLIPS, description="The first clip with another seed")
    reroll_seed: int | None = Field(default=None, ge=0, le=LARGEST_SEED)
    reroll_clips: int | None = Field(
        default=None, ge=1, le=MOST_CLIPS, description="How many have it; or all that follow"
    )
    live: bool = Field(default=False, description="Goes on, in real time, until it is ended; its prompt may change")
    reconstructs: bool = Field(default=False, description="Renders a given video from its own deep tokens")
    given: list[str] = Field(default=[], description="Files that came with it")
    remixed_from_video_id: str | None = Field(default=None, pattern=JOB_ID)
    extends: str | None = Field(default=None, pattern=JOB_ID, description="The video that this one goes on from")

    @model_validator(mode="after")
    def _whole(self) -> "VideoRequest":
        if unknown := sorted(set(self.model_extra or {}) - SAMPLING):
            known = [*type(self).model_fields, *SAMPLING]
            raise ValueError(f"{unknown[0][:80]}: unknown field{nearest(unknown[0][:80], known)}")
        if not self.prompt and not self.shots and not self.reconstructs:
            raise ValueError("prompt: expected a text of at least one word")
        return self

    @property
    def storyboard(self) -> list[Shot] | None:
        """The shots, where it has some."""
        return [Shot(own.prompt, own.seconds) for own in self.shots] if self.shots else None

    @property
    def length_s(self) -> float:
        """Seconds of the whole video."""
        return sum(own.seconds for own in self.shots) if self.shots else self.seconds

    @property
    def sampling(self) -> dict[str, Any]:
        """The fields of `SamplingConfig` that it changes."""
        return dict(self.model_extra or {})


class Model:
    """A model of the server, by its configuration: nothing of it is loaded here."""

    def __init__(self, name: str) -> None:
        self.name, self.folder = name, resolve(name)
        self.tokenizer = read_section(self.folder, "tokenizer", TokenizerConfig)
        self.lm = read_section(self.folder, "lm", DeepLMConfig)

    def scale(self, size: str | None, least_side: int) -> int:
        """How many times frames are enlarged. Raises `RequestError`."""
        own = self.tokenizer.size
        if size is None:
            return -(-least_side // own)
        width, height = map(int, size.split("x"))
        if width != height or width % own or not own <= width <= MOST_SIDE:
            raise RequestError(f"size: expected {own}x{own} or a multiple up to {MOST_SIDE}, got {size}", "size")
        return width // own

    def check(self, request: VideoRequest, has_last_image: bool, most_s: float) -> SamplingConfig:
        """The sampling of a request; raises `RequestError` where this model cannot do what it asks for."""
        try:
            sampling = self.tokenizer.sampling.changed(**numbers(request.sampling))
        except ValueError as error:
            raise RequestError(str(error), str(error).partition(":")[0]) from error
        most_s = MOST_LIVE_S if request.live else most_s
        if request.length_s > most_s:
            raise RequestError(f"seconds: expected at most {most_s:g}, got {request.length_s:g}", "seconds")
        if (has_last_image or request.loop) and not self.lm.end_frame_conditioning:
            param = "loop" if request.loop else "last_image"
            raise RequestError(f"{param}: {self.name} was not trained with last images; leave it out", param)
        if has_last_image and request.loop:
            raise RequestError("loop: ends on the first frame; it cannot end on another image", "loop")
        if request.live and (request.shots or request.loop or has_last_image or request.reroll_from is not None):
            raise RequestError("live: has one prompt at a time, and no end; leave shots, loop and the like out", "live")
        for name in ("reroll_seed", "reroll_clips"):
            if request.reroll_from is None and getattr(request, name) is not None:
                raise RequestError(f"{name}: needs reroll_from, the first clip with another seed", name)
        if request.reroll_from is not None and request.reroll_seed == request.seed:
            raise RequestError("reroll_seed: expected another seed than the video's", "reroll_seed")
        if request.reconstructs:
            if request.live or request.shots or request.loop or has_last_image or request.reroll_from is not None:
                message = "video: a reconstruction takes a model, size, seed and sampling fields alone"
                raise RequestError(message, "video")
            return sampling
        config = self.tokenizer
        key_frames = config.num_clips(max(1, round(request.length_s * config.fps))) + 1
        if request.storyboard:
            try:
                key_frames = max(key_frames, sum(key_frames_of(request.storyboard, config.clip_s)))
            except ValueError as error:  # a shot that ends between two key frames
                raise RequestError(f"shots: {error}", "shots") from error
        window, limit = sampling.context_key_frames, self.lm.most_keyframes()
        if not request.live and not window and key_frames > limit:
            most = (limit - 1) * config.clip_s
            message = f"seconds: {self.name} holds {most:g}; for more give context_key_frames, 2 to {limit}"
            raise RequestError(message, "seconds")
        return sampling


def schema_of_requests() -> dict[str, Any]:
    """The JSON schema of a request: fields of `SamplingConfig` named, definitions in their places."""
    schema = VideoRequest.model_json_schema()
    text = json.dumps({name: value for name, value in schema.items() if name != "$defs"})
    for name, own in schema.get("$defs", {}).items():
        text = text.replace(json.dumps({"$ref": f"#/$defs/{name}"}), json.dumps(own))
    whole = json.loads(text)
    whole["properties"] |= {name: {"type": "integer" if name in WHOLE else "number", "minimum": 0} for name in SAMPLING}
    whole["properties"]["joins"] = {"enum": list(get_args(Joins))}
    for name in OWN:
        del whole["properties"][name]
    return {**whole, "additionalProperties": False}


def numbers(values: dict[str, Any]) -> dict[str, Any]:
    """Sampling fields as JSON or a form has them, in the types that `SamplingConfig` expects."""
    found = {}
    for name, value in values.items():
        if name != "joins":
            if isinstance(value, bool) or not isinstance(value, int | float | str):
                raise RequestError(f"{name}: expected a number", name)
            try:
                number = float(value)
            except (ValueError, OverflowError) as error:
                raise RequestError(f"{name}: expected a number, got {str(value)[:40]!r}", name) from error
            if name in WHOLE and not number.is_integer():
                raise RequestError(f"{name}: expected a whole number, got {number:g}", name)
            value = int(number) if name in WHOLE else number
        elif value not in get_args(Joins):
            raise RequestError(f"joins: expected one of {', '.join(get_args(Joins))}", name)
        found[name] = value
    return found


def parse(values: dict[str, Any]) -> VideoRequest:
    """A request of JSON or form values. Raises `RequestError` that names the first field that is wrong."""
    try:
        return VideoRequest.model_validate(values)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        name = ".".join(map(str, first["loc"]))
        text = first["msg"].removeprefix("Value error, ")
        if name:
            text = f"{name}: {text}"
        raise RequestError(text, text.partition(": ")[0] if ": " in text else None) from error


def models_of(names: list[str]) -> dict[str, Model]:
    """By name, the default first. Raises `CheckpointError`."""
    found = [Model(name) for name in names]
    if not found:
        raise CheckpointError("serve: expected a model")
    return {Path(own.name).name: own for own in found}
