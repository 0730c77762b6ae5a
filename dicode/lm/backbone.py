"""The transformer, a Llama or the GPT-2 of `transformers`, and its input: padded text, then blocks of `n` deep tokens.

`token` order (published): every block begins with a begin-of-image token, all is causal, and the hidden state at a
position predicts the deep token at the next one.

`keyframe` order: a block attends to all of itself and of what came before it, and its hidden states predict the next
block's tokens, place by place; the first block, which predicts the first key frame, is begin-of-image embeddings alone.

A *goal* is a later key frame given beforehand. Its block stands right after the first key frame's and predicts nothing
of itself; in `keyframe` order the second key frame is predicted from it.

A key frame's motion tokens are the last of its block, zeros in the first one. In `token` order blocks may hold fewer.
"""

from types import ModuleType
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from dicode.lm.config import DeepLMConfig, Order
from dicode.lm.llama import KeyValueCache, Llama
from dicode.shapes import DeepTokens, Hidden, KeyFrameTokens, TextIds

KeyFrameHidden = Float[Tensor, "b k n width"]
BeginHidden = Float[Tensor, "b 1 width"]


class DeepTokenEmbedding(nn.Module):
    """Deep tokens as inputs of the transformer: an MLP, plus learned embeddings of key frame and place in it."""

    def __init__(self, config: DeepLMConfig) -> None:
        super().__init__()
        width = config.body.width
        self.mlp = nn.Sequential(nn.Linear(config.token_width, width), nn.GELU(), nn.Linear(width, width))
        self.keyframe = nn.Parameter(torch.empty(config.max_keyframes, width))
        self.place = nn.Parameter(torch.empty(config.block_tokens, width))
        self.goal = nn.Parameter(torch.empty(width)) if config.end_frame_conditioning else None

    def forward(self, tokens: DeepTokens, first_keyframe: int = 0, first_place: int = 0) -> KeyFrameHidden:
        """Embed tokens that begin at the given key frame and place; a single token is `b 1 1 d`."""
        _, k, n, _ = tokens.shape
        keyframe = rearrange(self.keyframe[first_keyframe : first_keyframe + k], "k width -> k 1 width")
        place = self.place[first_place : first_place + n]
        return self.mlp(tokens.to(keyframe.dtype)) + keyframe + place

    def of_goal(self, tokens: KeyFrameTokens, keyframe: int) -> KeyFrameHidden:
        """Embed a goal's tokens, one block; a goal beyond the last key frame embedding takes the last one."""
        assert self.goal is not None, "the model was built without end_frame_conditioning"
        return self(tokens.unsqueeze(1), min(keyframe, len(self.keyframe) - 1)) + self.goal

    def start(self, begin: BeginHidden) -> KeyFrameHidden:
        """The block that predicts the first key frame in `keyframe` order."""
        return (begin + self.place).unsqueeze(1)


class Backbone(nn.Module):
    """A causal transformer over embeddings, with one text embedding and a key/value cache."""

    def __init__(self, config: DeepLMConfig) -> None:
        super().__init__()
        self.config = config
        self.as_on_a_gpu = False  # for plans, which are computed with CPU tensors
        self.body: Any = _library().new_gpt2(config) if self.is_gpt2 else Llama(config)

    @property
    def is_gpt2(self) -> bool:
        """Whether the body is the GPT-2 of `transformers`."""
        return self.config.body.kind == "gpt2"

    @property
    def text_embedding(self) -> nn.Embedding:
        """Of the vocabulary."""
        return self.body.get_input_embeddings()

    def embed_text(self, text_ids: TextIds) -> Hidden:
        """Look text ids up; the begin-of-image token is one of them."""
        return self.text_embedding(text_ids)

    def new_cache(self) -> Any:
        """An empty key/value cache for `forward`; None: there is none."""
        return _library().DynamicCache(config=self.body.config) if self.is_gpt2 else KeyValueCache()

    def forward(
        self,
        embeddings: Hidden,
        cache: Any = None,
        mask: Bool[Tensor, "*b s all"] | None = None,
        positions: Int[Tensor, "s"] | None = None,
    ) -> Hidden:
        """Hidden states after the last norm. With a cache, `embeddings` continue the cached sequence, and join it.

        `mask` is True where a position (row) attends to another, cached ones included, in all sequences or in each; the
        default is causal. `positions` are the embeddings' places, by default one after the other.
        """
        # Measured, bfloat16, 32 × 114 × 256: the backward of torch's fused CPU attention takes 6-8 times as long as
        # that of the plain one, and decides how long a training step takes. Everywhere else the fused one is faster.
        trains_on_cpu = embeddings.device.type == "cpu" and torch.is_grad_enabled()
        fused = self.as_on_a_gpu or not trains_on_cpu
        if self.is_gpt2:
            return _library().gpt2_hidden(self.body, embeddings, cache, mask, positions, fused)
        return self.body(embeddings, cache, mask, positions, fused)


def _library() -> ModuleType:
    """What needs `transformers`, whose import takes seconds."""
    from dicode.lm import library

    return library


def without_padding(
    mask: Bool[Tensor, "rows all_positions"] | None, attended: Bool[Tensor, "b length"], rows: int, all_positions: int
) -> Bool[Tensor, "b rows all_positions"]:
    """A mask (default: causal) of a sequence's last `rows` positions that leaves out the padding of its texts."""
    if mask is None:
        number = torch.arange(all_positions, device=attended.device)
        mask = number[-rows:, None] >= number
    return mask & nn.functional.pad(attended, (0, all_positions - attended.shape[1]), value=True)[:, None]


class CachedSequence:
    """A sequence as it grows: appended positions pass the transformer once, with a key/value cache.

    In `keyframe` order what is appended at once attends to all of itself (after the text, with which it begins).
    """

    def __init__(
        self, backbone: Backbone, text: Hidden, order: Order, attended: Bool[Tensor, "b length"] | None = None
    ) -> None:
        self.backbone, self.batch, self.order = backbone, len(text), order
        self.attended = attended  # False where text is padding that is masked
        self.cache = backbone.new_cache()
        self.waiting = text  # positions that are not in the cache yet
        self.blocks = torch.arange(text.shape[1])  # the block of every position, the number of its last one

    def append(self, embeddings: Hidden) -> None:
        """Append embeddings, computed when `last` is called."""
        self.waiting = torch.cat([self.waiting, embeddings.to(self.waiting.dtype)], dim=1)
        number = torch.full((embeddings.shape[1],), len(self.blocks) + embeddings.shape[1] - 1)
        self.blocks = torch.cat([self.blocks, number])

    def last(self, count: int) -> Hidden:
        """Hidden states of the last `count` positions; call it once for each position."""
        mask = None
        if self.order == "keyframe":
            mask = (self.blocks[-self.waiting.shape[1] :, None] >= self.blocks).to(self.waiting.device)
        if self.attended is not None:
            mask = without_padding(mask, self.attended, self.waiting.shape[1], len(self.blocks))
        hidden = self.backbone(self.waiting, self.cache, mask)
        if self.cache is not None:  # None: all of the sequence again for every token, to compare with
            self.waiting = self.waiting[:, :0]
        return hidden[:, -count:]
