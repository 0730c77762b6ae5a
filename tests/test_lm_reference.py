"""The published arrangement: outputs agree with vectors that the public code computed with random weights."""

import pytest
import torch
from published import REFERENCE, reference_lm_config
from safetensors.torch import load_file
from torch import Tensor

from dicode.checkpoint import load_state
from dicode.convert.official import Report, language_state
from dicode.lm.deep_lm import DeepTokenLM
from dicode.lm.heads import MixtureHead, mixture_mean, mixture_nll, split_mixture
from dicode.tokenizer.config import SamplingConfig


def assert_agrees(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.fixture(scope="module")
def vectors() -> dict[str, Tensor]:
    return load_file(REFERENCE / "lm.io.safetensors")


@pytest.fixture(scope="module")
def model() -> DeepTokenLM:
    model = DeepTokenLM(reference_lm_config()).eval()
    weights = REFERENCE / "lm.weights.safetensors"
    load_state(model, language_state(weights, None, Report()), "lm.weights")
    return model


def test_mixture_is_the_published_one(vectors: dict[str, Tensor]) -> None:
    means, variances, logits = split_mixture(vectors["mixture_params"].unsqueeze(-2), 3)
    log_weights = logits.squeeze(-2).log_softmax(-1)
    nll = mixture_nll(means, variances, log_weights, vectors["mixture_target"].unsqueeze(-2)).mean() / 16
    assert_agrees(nll, vectors["mixture_nll"].squeeze())
    assert_agrees(mixture_mean(means, log_weights).squeeze(-2), vectors["mixture_mean"])


def test_loss_and_head_output_are_the_published_ones(model: DeepTokenLM, vectors: dict[str, Tensor]) -> None:
    with torch.no_grad():
        output = model(vectors["text_ids"], vectors["deep_tokens"])
        assert isinstance(model.head, MixtureHead)
        assert_agrees(model.head.mlp(output.hidden), vectors["head_output"])
    assert_agrees(output.loss, vectors["loss"].squeeze())


@pytest.mark.parametrize(("guidance", "name"), [(1.0, "generated_cfg1"), (2.0, "generated_cfg2")])
def test_generated_tokens_are_the_published_ones(
    model: DeepTokenLM, vectors: dict[str, Tensor], guidance: float, name: str
) -> None:
    expected = vectors[name]
    sampling = SamplingConfig(guidance=guidance, variance_scale=0.0)
    keyframes = model.generate(vectors["text_ids"], expected.shape[1], sampling=sampling)
    assert_agrees(torch.stack(list(keyframes), dim=1), expected)
