"""Optimizers and the order of samples: what a step does to the weights, and to which of them."""

import tracemalloc
from pathlib import Path

import pytest
import torch
from test_device import Products
from torch import nn

from dicode.lm.deep_lm import DeepTokenLM
from dicode.tokenizer.encoder import FirstStage
from dicode.tokenizer.video_tokenizer import VideoTokenizer
from dicode.train.lm import LanguageRun
from dicode.train.lora import LoRAConfig, add_adapters
from dicode.train.optim import COEFFICIENTS, Muon, OptimConfig, decayed, make_optimizers, orthogonalised
from dicode.train.order import sample_indices
from dicode.train.runs import FirstStageRun, load_run
from dicode.train.tokenizer import TokenizerRun

SHAPES = [(6, 6), (4, 9), (9, 4), (6, 6), (4, 9)]
RECIPES = Path(__file__).parents[1] / "recipes"


def weights(seed: int = 0) -> list[nn.Parameter]:
    torch.manual_seed(seed)
    return [nn.Parameter(torch.randn(shape)) for shape in SHAPES]


def test_muon_takes_the_steps_of_torchs() -> None:
    ours, theirs = weights(), weights()
    mine = Muon(ours, 0.01, 0.1, 0.9, torch.bfloat16)
    reference = torch.optim.Muon(theirs, 0.01, 0.1, 0.9, adjust_lr_fn="match_rms_adamw")
    torch.manual_seed(1)
    for _ in range(4):
        for a, b in zip(ours, theirs, strict=True):
            a.grad = torch.randn_like(a)
            b.grad = a.grad.clone()
        mine.step()
        reference.step()
    for a, b, start in zip(ours, theirs, weights(), strict=True):
        torch.testing.assert_close(mine.state[a]["momentum_buffer"], reference.state[b]["momentum_buffer"])
        moved = (b - start).detach()
        assert moved.norm() > 0.01
        assert ((a - b).norm() / moved.norm()).item() < 0.02  # bfloat16 has three digits


@pytest.mark.parametrize("shape", [(5, 5), (4, 9), (9, 4)])
def test_in_float32_it_maps_singular_values_by_its_polynomial(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    matrices = torch.randn(3, *shape)
    found = orthogonalised(matrices)
    a, b, c = COEFFICIENTS
    for matrix, result in zip(matrices.double(), found, strict=True):
        u, s, v = torch.linalg.svd(matrix / matrix.norm(), full_matrices=False)
        for _ in range(5):
            s = a * s + b * s**3 + c * s**5
        torch.testing.assert_close(result.double(), u @ s.diag() @ v, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_muon_multiplies_in_the_dtype_given(dtype: torch.dtype) -> None:
    ours = weights()
    optimizer = Muon(ours, 0.01, 0.0, 0.9, dtype)
    for p in ours:
        p.grad = torch.ones_like(p)
    with Products() as products:
        optimizer.step()
    assert products.dtypes == {dtype}
    assert all(p.dtype == torch.float32 for p in ours)


def modules() -> dict[str, nn.Module]:
    """A module of every kind that the bundled recipes train, its tensors without memory."""
    made: dict[str, nn.Module] = {}
    for name in ("sprites:first_stage", "sprites:denoiser", "sprites:lm", "world:lm", "paper:paper_tokenizer_256",
                 "paper:gpt2_mini"):  # fmt: skip
        file, _, function = name.partition(":")
        run = load_run(f"{RECIPES / file}.py:{function}")
        with torch.device("meta"):
            if isinstance(run, TokenizerRun):
                made[name] = VideoTokenizer(run.model)
            elif isinstance(run, LanguageRun):
                made[name] = DeepTokenLM(run.model)
            else:
                assert isinstance(run, FirstStageRun)
                made[name] = nn.ModuleDict({"first_stage": FirstStage(run.model)})
    return made


def test_norms_biases_and_embeddings_do_not_decay() -> None:
    tables = ("positions", "latents", "queries", "places", "moments", "keyframe", "place", "goal", "class_embedding")
    for recipe, module in modules().items():
        decays = decayed(module)
        for prefix, layer in module.named_modules():
            for name, p in layer.named_parameters(recurse=False):
                plain = p.ndim < 2 or isinstance(layer, nn.Embedding) or name.endswith(tables)
                assert (p in decays) != plain, f"{recipe}: {prefix}.{name} {tuple(p.shape)}"
        assert sum(p.numel() for p in decays) / sum(p.numel() for p in module.parameters()) > 0.5


def test_parameter_groups_are_all_trained_parameters_once() -> None:
    module = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Embedding(5, 4), nn.Conv1d(4, 4, 1))
    module[3].bias.requires_grad_(False)
    for name in ("adamw", "muon"):
        optimizers = make_optimizers(module, OptimConfig(optimizer=name, weight_decay=0.3))
        groups = [group for optimizer in optimizers for group in optimizer.param_groups]
        held = [p for group in groups for p in group["params"]]
        assert len(held) == len(set(held)) and set(held) == {p for p in module.parameters() if p.requires_grad}
        falling = {p for group in groups if group["weight_decay"] for p in group["params"]}
        assert falling == {module[0].weight, module[3].weight}
        assert {group["weight_decay"] for group in groups} == {0.3, 0.0}
    adapted = nn.Sequential(nn.Linear(4, 4))
    add_adapters(adapted, LoRAConfig(rank=2), seed=0)
    assert {p for p in decayed(adapted) if p.requires_grad} == {p for p in adapted.parameters() if p.requires_grad}


def test_a_step_without_gradient_leaves_what_does_not_decay() -> None:
    module = nn.LayerNorm(4)
    (optimizer,) = make_optimizers(module, OptimConfig(weight_decay=0.5))
    for p in module.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert torch.equal(module.weight, torch.ones(4))


@pytest.mark.parametrize("count", [1, 2, 7, 64, 65, 1000])
def test_every_sample_comes_once_an_epoch(count: int) -> None:
    orders = [sample_indices(count, count, seed=3, step=epoch).tolist() for epoch in range(3)]
    assert all(sorted(order) == list(range(count)) for order in orders)
    assert count < 7 or orders[0] != orders[1] != orders[2]
    assert torch.cat([sample_indices(count, 5, 3, step) for step in range(count)])[:count].tolist() == orders[0]


def test_orders_are_drawn_evenly() -> None:
    """Which sample comes first, which after sample 0, and pairs of places, over many seeds."""
    count, seeds = 12, 400
    orders = torch.stack([sample_indices(count, count, seed, 0) for seed in range(seeds)])
    for place in (0, 5, count - 1):
        found = orders[:, place].bincount(minlength=count)
        assert ((found - seeds / count).square() / (seeds / count)).sum() < 31.3  # χ² of 11, p = 0.001
    after = torch.stack([order[(int((order == 0).nonzero()) + 1) % count] for order in orders]).bincount()[1:]
    expected = seeds / (count - 1)
    assert ((after - expected).square() / expected).sum() < 29.6  # χ² of 10


def test_a_step_of_ten_million_samples_takes_the_memory_of_one_of_a_thousand() -> None:
    peaks = {}
    for count in (1000, 10_000_000):
        sample_indices(count, 64, 0, 3)
        tracemalloc.start()
        picked = sample_indices(count, 64, 0, 3)
        peaks[count] = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert len(picked.unique()) == 64 and int(picked.max()) < count
    assert int(picked.max()) > 5_000_000
    assert peaks[10_000_000] < 2 * peaks[1000] < 200_000
