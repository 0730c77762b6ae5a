"""The configuration of a language model, and the sizes that have a name."""

from dataclasses import dataclass, field
from typing import Annotated, Literal

from dicode.config import Depth, Factor, Range, Share, Width

GPT2_VOCABULARY = 50_257 + 66  # published: `</img>`, `<img>` and 64 `<img_000NN>` follow GPT-2's own entries
LLAMA_VOCABULARY = 128_256 + 66

Entries = Annotated[int, Range(1, 2**20)]
Entry = Annotated[int, Range(0, 2**20)]
Stretch = Annotated[float, Range(1, 1e12)]
BodyName = Literal["gpt2", "llama"]
HeadName = Literal["mixture", "gaussian", "regression", "flow"]  # the keys of `heads.HEADS`
Order = Literal["token", "keyframe"]


@dataclass(frozen=True)
class BodyConfig:
    """The transformer: GPT-2 or Llama of `transformers`."""

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
    positions: Entries  # longest sequence: text_length + max_keyframes * (1 + tokens_per_keyframe) or more
    vocab_size: Entries
    token_width: Width
    max_keyframes: Width
    text_length: Width = 80
    tokens_per_keyframe: Width = 16
    pad_id: Entry = 0
    begin_id: Entry = 1  # the begin-of-image token, an entry of the text vocabulary
    head: HeadConfig = field(default_factory=HeadConfig)
    order: Order = "token"  # what is predicted at once (see sequence.py); published: a token
    predict_residual: bool = False  # predict each later key frame as a residual to the previous one
    residual_anchor: Share = 0.0  # share of the first key frame in what a residual is added to, so that errors fade
    end_frame_conditioning: bool = False  # whether a later key frame may be given: loops, a last image
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
    def block_length(self) -> int:
        """Positions that a key frame takes."""
        return self.tokens_per_keyframe + (self.order == "token")  # the begin-of-image token


def _gpt2(width: int, depth: int, heads: int) -> DeepLMConfig:
    return DeepLMConfig(
        BodyConfig("gpt2", width, depth, heads, dropout=0.1),
        positions=1024,
        vocab_size=GPT2_VOCABULARY,
        token_width=1024,
        max_keyframes=32,  # published: 512 // 16 rows, of which 31 fill a minute
        pad_id=50_256,
        begin_id=50_258,
    )


def _llama(width: int, depth: int, heads: int) -> DeepLMConfig:
    body = BodyConfig(
        "llama", width, depth, heads, key_value_heads=8, feed_forward=8192, rope_base=500_000.0, rope_factor=32.0
    )
    return DeepLMConfig(
        body,
        positions=1024,
        vocab_size=LLAMA_VOCABULARY,
        token_width=1024,
        max_keyframes=32,
        pad_id=128_001,  # <|end_of_text|>
        begin_id=128_257,
    )


# The published family, the bundled model, and smaller ones. GPT-2 shapes: Radford et al. 2019 (distilgpt2: Sanh
# et al. 2019); Llama 3.2 shapes: its model cards.
SIZES: dict[str, DeepLMConfig] = {
    "sprites": DeepLMConfig(
        # 8 heads of 32 train 1.6 times slower on a CPU, whose time goes into softmax, not products
        BodyConfig("llama", width=256, depth=6, heads=4),
        positions=80 + 17 * 33,
        vocab_size=3072,
        token_width=32,
        max_keyframes=33,  # a minute is 31; two more continue it
        head=HeadConfig(token_variance=0.03),
    ),
    "gpt2-mini": _gpt2(512, 8, 8),
    "distilgpt2": _gpt2(768, 6, 12),
    "gpt2": _gpt2(768, 12, 12),
    "gpt2-medium": _gpt2(1024, 24, 16),
    "gpt2-large": _gpt2(1280, 36, 20),
    "llama-1b": _llama(2048, 16, 32),
    "llama-3b": _llama(3072, 28, 24),
}
