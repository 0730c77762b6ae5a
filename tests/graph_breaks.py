"""Prints how many graphs torch.compile makes of every network's training pass; one is whole. In a process of its own:
checks of types, which tests put around every function, would break them."""

import torch
from test_lm_deep_lm import CONFIG, PROMPTS, build
from test_tokenizer import DENOISERS, conditioning, tiny_tokenizer


def graphs(module: torch.nn.Module, *inputs: object) -> int:
    torch._dynamo.reset()
    module(*inputs)  # transformers looks its own signatures up once
    return torch._dynamo.explain(module)(*inputs).graph_count


for kind in ("hourglass", "unet3d"):
    tokenizer = tiny_tokenizer(denoiser=DENOISERS[kind]).train()
    noisy = torch.randn(2, 16, 5, 8, 8)
    print("denoiser", kind, graphs(tokenizer.denoiser, noisy, torch.tensor([0.5, 0.2]), conditioning(2)))
for body, order, head in (
    ("gpt2", "token", "mixture"),
    ("gpt2", "keyframe", "flow"),
    ("llama", "token", "flow"),
    ("llama", "keyframe", "mixture"),
):
    model = build(body=body, order=order, head=head).train()
    tokens = torch.randn(len(PROMPTS), 3, CONFIG.block_tokens, CONFIG.token_width)
    print("language model", body, order, head, graphs(model, PROMPTS, tokens))
