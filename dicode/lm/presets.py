"""Sizes of language models that have a name."""

from dicode.lm.config import BodyConfig, DeepLMConfig, HeadConfig

GPT2_VOCABULARY = 50_257 + 66  # published: `</img>`, `<img>` and 64 `<img_000NN>` follow GPT-2's own entries
LLAMA_VOCABULARY = 128_256 + 66


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
