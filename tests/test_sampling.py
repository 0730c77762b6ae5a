"""One sampling configuration: its ranges, and that every way through the library takes the model's own."""

import dataclasses
import math
import re
from pathlib import Path

import pytest
import torch

from dicode.checkpoint import read_config
from dicode.config import config_from_dict, config_to_dict
from dicode.pipeline import DiCoDe
from dicode.tokenizer.config import SamplingConfig
from dicode.train.chain import assemble


@pytest.mark.parametrize("name", [name for name in SamplingConfig.__dataclass_fields__ if name != "joins"])
def test_values_out_of_range_name_their_field(name: str) -> None:
    kind = int if name in ("steps", "flow_steps", "context_key_frames", "motion_tokens") else float
    least = int(name == "flow_steps")
    for wrong in (least - 1, 10**18, *([] if kind is int else [math.nan, math.inf])):
        with pytest.raises(
            ValueError,
            match=f"^{name}: expected .* got {re.escape(repr(wrong) if kind is int else format(kind(wrong), 'g'))}",
        ):
            SamplingConfig(**{name: kind(wrong)})  # type: ignore[arg-type]
    assert getattr(SamplingConfig(**{name: kind(least)}), name) == least  # type: ignore[arg-type]


def test_a_change_keeps_what_is_left_out_and_refuses_what_does_not_exist() -> None:
    own = SamplingConfig(steps=50, decoder_guidance=7.5, first_variance_scale=0.2)
    assert own.changed(steps=4, guidance=None, first_variance_scale=None) == dataclasses.replace(own, steps=4)
    with pytest.raises(ValueError, match=r"unknown options \['decode_guidance'\]; known: .*decoder_guidance"):
        own.changed(decode_guidance=2.0)
    assert config_from_dict(SamplingConfig, config_to_dict(own)) == own


def test_it_is_stored_once_and_kept_by_all_that_writes_a_model(tiny_model: Path, tmp_path: Path) -> None:
    sampling = SamplingConfig(
        guidance=3.5, variance_scale=0.01, steps=3, decoder_guidance=7.5, motion_scale=1.2, joins="independent"
    )
    model = DiCoDe.from_pretrained(tiny_model)
    model.tokenizer.config = dataclasses.replace(model.tokenizer.config, sampling=sampling)
    model.save_pretrained(tmp_path / "own")
    assert read_config(tmp_path / "own").keys() == {"tokenizer", "lm", "deep_tokens"}
    assert (tmp_path / "own/config.json").read_text().count("decoder_guidance") == 1
    assert DiCoDe.from_pretrained(tmp_path / "own").sampling == sampling
    joined = assemble(tmp_path / "own", tmp_path / "own", tmp_path / "joined", dtype=torch.float32)
    assert joined.sampling == sampling
    frames = torch.randint(256, (33, 32, 32, 3), dtype=torch.uint8).numpy()
    named = {name: value for name, value in dataclasses.asdict(sampling).items() if value is not None}
    for own, asked in zip(joined.reconstruct(frames), model.reconstruct(frames, **named), strict=True):
        assert (own == asked).all()
    assert (next(joined.reconstruct(frames)) != next(joined.reconstruct(frames, decoder_guidance=1.0))).any()
