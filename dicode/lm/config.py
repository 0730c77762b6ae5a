"""The configuration of a language model, as plain values without torch."""

from dataclasses import dataclass, field
from typing import Annotated, Literal

from dicode.config import Depth, Factor, Range, Share, Width

Entries = Annotated[int, Range(1, 2**20)]
Entry = Annotated[int, Range(0, 2**20)]
Stretch = Annotated[float, Range(1, 1e12)]
BodyName = Literal["gpt2", "llama"]
HeadName = Literal["mixture", "gaussian", "regression", "flow"]  # the keys of `heads.HEADS`
Order = Literal["token", "keyframe"]


@dataclass(frozen=True)
class BodyConfig:
    """The transformer: GPT-2, or Llama."""

    kind: BodyName
    width: Width
    depth: Depth
    heads: Width
    key_value_heads: Width | None = None  # Llama only; default: as many as heads
    feed_forward: Width | None = None  # default: 4 × width (GPT-2) or 3 × width (Llama)
    rope_base: Stretch = 10_000.0  # Llama only
    rope_factor: Stretch = 1.0  # Llama only; above 1: Llama 3's stretching of an 8,192-position base
    dropout: Share = 0.0


@dataclass(frozen=True)
class HeadConfig:
    """What predicts deep tokens from hidden states; a head reads only the fields that name it."""

    kind: HeadName = "mixture"
    components: Width = 16  # mixture
    token_variance: Factor = 0.0  # mixture and Gaussian: added to every variance; published: 0
    width: Width = 256  # flow: of its network
    depth: Depth = 3  # flow: blocks of its network


@dataclass(frozen=True)
class DeepLMConfig:
    """Everything that decides the shape and the training-time noise of a `DeepTokenLM`, as plain JSON values."""

    body: BodyConfig
    positions: Entries  # longest sequence: text_length + max_keyframes * block_length or more
    vocab_size: Entries
    token_width: Width
    max_keyframes: Width
    text_length: Width = 80
    tokens_per_keyframe: Width = 16
    motion_tokens: Annotated[int, Range(0, 256)] = 0  # of the clip that a key frame ends, written after its own tokens
    pad_id: Entry = 0
    begin_id: Entry = 1  # the begin-of-image token, an entry of the text vocabulary
    head: HeadConfig = field(default_factory=HeadConfig)
    order: Order = "token"  # what is predicted at once (see backbone.py); published: a token
    # predict each later key frame as a residual to the previous one, by this share to the first, so that errors fade
    residual_anchor: Share | None = None  # None: each key frame whole
    end_frame_conditioning: bool = False  # whether a later key frame may be given: loops, a last image
    attend_padding: bool = True  # published; False: padding of texts is masked, and need not be there in training
    input_noise: Share = 0.0  # largest share (0…1) of noise in the deep tokens that are inputs in training

    @property
    def keyframe_limit(self) -> int:
        """The most key frames that a sequence can hold, given positions and learned key frame embeddings."""
        return self.most_keyframes()

    def most_keyframes(self, beside: int = 0) -> int:
        """As `keyframe_limit` where the sequence holds `beside` further blocks: a goal."""
        room = (self.positions - self.text_length) // self.block_length
        return min(self.max_keyframes, room - beside)

    @property
    def block_tokens(self) -> int:
        """Tokens of a key frame, motion tokens included."""
        return self.tokens_per_keyframe + self.motion_tokens

    @property
    def nearest_goal(self) -> int:
        """How many key frames after the first of a sequence a goal has to lie to be a condition.

        Nothing lies before a nearer one but its motion, which in token order follows the goal's own tokens.
        """
        return 1 if self.motion_tokens and self.order == "keyframe" else 2

    @property
    def block_length(self) -> int:
        """Positions that a key frame takes."""
        return self.block_tokens + (self.order == "token")  # the begin-of-image token
