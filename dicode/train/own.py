"""What the model itself writes, to go on from in training: errors as in use, and the truth that mends them."""

import torch

from dicode.lm.deep_lm import DeepTokenLM
from dicode.shapes import DeepTokens, KeyFrameMask, TextIds

FLOW_STEPS = 4  # of a draw; half as many as in use


@torch.no_grad()
def with_own(
    model: DeepTokenLM, text_ids: TextIds, tokens: DeepTokens, mask: KeyFrameMask, generator: torch.Generator
) -> DeepTokens:
    """The tokens with every key frame between the first and the batch's last real one as the model writes it.

    That is in eval mode, without guidance, one after the other from the true first one; `generator` alone draws. It is
    what `DeepTokenLM.forward` may `read`: a roll-out to train on (scheduled sampling, arXiv 1506.03099, there token by
    token and mixed with the truth).
    """
    real = mask.any(0).nonzero()
    count = int(real[-1]) - 1 if len(real) else 0  # the last real one is only predicted
    if count < 1:
        return tokens
    seed = int(torch.randint(2**62, (), generator=generator))
    trains = model.training
    model.eval()
    try:
        drawn = list(model.generate(text_ids, count, prefix=tokens[:, :1], seed=seed, flow_steps=FLOW_STEPS))
    finally:
        model.train(trains)
    torch.clear_autocast_cache()  # else the step would compute with weights cast in here, which carry no gradient
    return torch.cat([tokens[:, :1], *(own[:, None].to(tokens) for own in drawn), tokens[:, count + 1 :]], dim=1)
