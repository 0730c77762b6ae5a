"""The language model's input sequences: padded text, then blocks of `n` deep tokens, a key frame each.

`token` order (published): every block begins with a begin-of-image token, all is causal, and the hidden state at a
position predicts the deep token at the next one.

`keyframe` order: a block attends to all of itself and of what came before it, and its hidden states predict the next
block's tokens, place by place; the first block, which predicts the first key frame, is begin-of-image embeddings alone.

A *goal* is a later key frame given beforehand. Its block stands right after the first key frame's and predicts nothing
of itself; in `keyframe` order the second key frame is predicted from it.
"""

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor, nn

from dicode.lm.presets import DeepLMConfig
from dicode.shapes import DeepTokens, Hidden, KeyFrameTokens

KeyFrameHidden = Float[Tensor, "b k n width"]
BeginHidden = Float[Tensor, "b 1 width"]
LongerHidden = Float[Tensor, "b _ width"]


class DeepTokenEmbedding(nn.Module):
    """Deep tokens as inputs of the transformer: an MLP, plus learned embeddings of key frame and place in it."""

    def __init__(self, config: DeepLMConfig) -> None:
        super().__init__()
        width = config.body.width
        self.mlp = nn.Sequential(nn.Linear(config.token_width, width), nn.GELU(), nn.Linear(width, width))
        self.keyframe = nn.Parameter(torch.empty(config.max_keyframes, width))
        self.place = nn.Parameter(torch.empty(config.tokens_per_keyframe, width))
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


def arrange(text: Hidden, begin: BeginHidden, blocks: KeyFrameHidden) -> LongerHidden:
    """The sequence of `token` order: text, then one begin and n deep tokens a block."""
    begins = begin.unsqueeze(1).expand(-1, blocks.shape[1], -1, -1)
    return appended(text, torch.cat([begins, blocks.to(begins.dtype)], dim=2))


def appended(text: Hidden, blocks: Float[Tensor, "b k _ width"]) -> LongerHidden:
    """Text, then blocks as they are."""
    return torch.cat([text, rearrange(blocks.to(text.dtype), "b k n width -> b (k n) width")], dim=1)


def predicting(hidden: Hidden, text_length: int, tokens_per_keyframe: int) -> KeyFrameHidden:
    """The hidden states of `token` order that predict deep tokens: each one position before its token."""
    video = rearrange(hidden[:, text_length:], "b (k n) width -> b k n width", n=tokens_per_keyframe + 1)
    return video[:, :, :-1]


def attention_mask(
    text_length: int, blocks: int, tokens_per_keyframe: int, device: torch.device
) -> Bool[Tensor, "s s"]:
    """Which position (row) attends to which (column) in `keyframe` order: text is causal, a block is not."""
    block = torch.arange(blocks, device=device).repeat_interleave(tokens_per_keyframe) + text_length
    group = torch.cat([torch.arange(text_length, device=device), block])
    return group[:, None] >= group
