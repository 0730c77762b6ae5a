"""The sequence that the language model reads: padded text, then for every key frame a begin-of-image token and its deep
tokens. The hidden state at a position predicts the deep token at the next one."""

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from dicode.shapes import DeepTokens, Hidden

KeyFrameHidden = Float[Tensor, "b k n width"]
BeginHidden = Float[Tensor, "b 1 width"]
LongerHidden = Float[Tensor, "b _ width"]


class DeepTokenEmbedding(nn.Module):
    """Deep tokens as the transformer reads them: an MLP, plus learned embeddings of key frame and place in it."""

    def __init__(self, token_width: int, width: int, max_keyframes: int, tokens_per_keyframe: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(token_width, width), nn.GELU(), nn.Linear(width, width))
        self.keyframe = nn.Parameter(torch.empty(max_keyframes, width))
        self.place = nn.Parameter(torch.empty(tokens_per_keyframe, width))

    def forward(self, tokens: DeepTokens, first_keyframe: int = 0, first_place: int = 0) -> KeyFrameHidden:
        """Embed tokens that begin at the given key frame and place; a single token is `b 1 1 d`."""
        _, k, n, _ = tokens.shape
        keyframe = rearrange(self.keyframe[first_keyframe : first_keyframe + k], "k width -> k 1 width")
        place = self.place[first_place : first_place + n]
        return self.mlp(tokens.to(keyframe.dtype)) + keyframe + place


def arrange(text: Hidden, begin: BeginHidden, keyframes: KeyFrameHidden) -> LongerHidden:
    """Put embeddings in the sequence's order: text, then one begin and n deep tokens a key frame."""
    begins = begin.unsqueeze(1).expand(-1, keyframes.shape[1], -1, -1)
    video = torch.cat([begins, keyframes.to(begins.dtype)], dim=2)
    return torch.cat([text, rearrange(video, "b k n width -> b (k n) width")], dim=1)


def predicting(hidden: Hidden, text_length: int, tokens_per_keyframe: int) -> KeyFrameHidden:
    """The hidden states that predict deep tokens: each one position before its token."""
    video = rearrange(hidden[:, text_length:], "b (k n) width -> b k n width", n=tokens_per_keyframe + 1)
    return video[:, :, :-1]
