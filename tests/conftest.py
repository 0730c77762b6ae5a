"""What several test files share. `dicode` is imported inside: the shape checks hook its import after this file's."""

from pathlib import Path

import pytest

CAPTIONS = ["a swirling ice vortex", "a red square moves right", "a blue circle moves down"]


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint folder of a whole model with random weights: 32×32 pixels, 4 tokens of 6, up to 16 s."""
    return write_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


def write_tiny_model(folder: Path, **changes: object) -> Path:
    """Such a folder, with changes of the tokenizer's configuration."""
    import torch
    from test_tokenizer import tiny_tokenizer

    from dicode.generate import DiCoDe
    from dicode.lm.deep_lm import DeepTokenLM
    from dicode.lm.sizes import DeepLMConfig
    from dicode.lm.text import TextTokenizer
    from dicode.sampling import SamplingConfig

    tokenizer = tiny_tokenizer(sampling=SamplingConfig(steps=2, variance_scale=0.5), **changes)
    config = DeepLMConfig(
        body="llama",
        width=24,
        depth=1,
        heads=2,
        positions=12 + 10 * 5,
        vocab_size=300,
        token_width=tokenizer.config.resampler.token_width,
        max_keyframes=9,
        text_length=12,
        tokens_per_keyframe=tokenizer.config.resampler.queries,
        components=2,
        reads_goal=True,
    )
    torch.manual_seed(1)
    lm = DeepTokenLM(config, TextTokenizer.train(CAPTIONS, 300))
    with torch.no_grad():
        for parameter in lm.parameters():  # so that every input matters
            parameter.add_(0.2 * torch.randn_like(parameter))
    DiCoDe(tokenizer, lm).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def drawn_clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set of six drawn clips of 20 frames at 8 fps, mp4 and gif, with captions; for reading only."""
    from dicode.video.synthetic import write_dataset

    return write_dataset(tmp_path_factory.mktemp("drawn"), count=6, num_frames=20, size=40)
