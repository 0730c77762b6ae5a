"""The pipeline of `diffusers`: the videos of `DiCoDe`, in that library's call, output and callbacks."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers.utils import export_to_video
from PIL import Image

from dicode.diffusers_pipeline import LARGEST_SEED, DiCoDePipeline
from dicode.pipeline import DiCoDe
from dicode.video.read import read_video

README = Path(__file__).parents[1] / "integrations/diffusers/README.md"
PROMPT = "a red square moves right"


@pytest.fixture(scope="module")
def pipeline(tiny_model: Path) -> DiCoDePipeline:
    loaded = DiCoDePipeline.from_pretrained(tiny_model)
    loaded.set_progress_bar_config(disable=True)
    return loaded


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def drawn_by(seed: int) -> int:
    return int(torch.randint(LARGEST_SEED, (), generator=seeded(seed)))


def frames_of(pipeline: DiCoDePipeline, prompt: str, seed: int, **options: object) -> np.ndarray:
    """The same video from `DiCoDe` itself, uint8."""
    return np.concatenate(list(pipeline.model.generate(prompt, seed=seed, **options)))


def test_frames_are_those_of_the_model(pipeline):
    video = pipeline(PROMPT, num_frames=20, guidance_scale=2.0, num_inference_steps=2, generator=seeded(3)).frames
    assert video.shape == (1, 20, 32, 32, 3) and video.dtype == np.float32
    expected = frames_of(pipeline, PROMPT, drawn_by(3), seconds=20 / 8, guidance=2.0, steps=2)
    assert np.array_equal((video[0] * 255).round(), expected)
    assert np.array_equal(video[0], pipeline(PROMPT, seconds=2.5, guidance_scale=2.0, num_inference_steps=2,
                                             generator=seeded(3), return_dict=False)[0][0])  # fmt: skip


def test_the_types_of_output_hold_the_same_frames(pipeline):
    arrays, tensors, pictures = (
        pipeline(PROMPT, num_frames=5, generator=seeded(0), output_type=kind).frames for kind in ("np", "pt", "pil")
    )
    assert tensors.shape == (1, 5, 3, 32, 32) and np.array_equal(tensors[0].permute(0, 2, 3, 1).numpy(), arrays[0])
    assert np.array_equal(np.stack([np.asarray(picture) for picture in pictures[0]]), (arrays[0] * 255).round())


@pytest.mark.parametrize("kind", ["np", "pil"])
def test_frames_can_be_exported_as_they_are(pipeline, tmp_path, kind):
    video = pipeline(PROMPT, num_frames=18, generator=seeded(0), output_type=kind).frames[0]
    written = read_video(export_to_video(video, str(tmp_path / "a.mp4"), fps=int(pipeline.fps)), fps=8.0)
    assert written.frames.shape == (18, 32, 32, 3)


def test_one_generator_gives_other_videos_each_time_and_a_list_one_seed_a_video(pipeline):
    generator = seeded(5)
    first, second = (pipeline(PROMPT, num_frames=4, generator=generator).frames for _ in range(2))
    assert not np.array_equal(first, second)
    prompts = [PROMPT, "a blue circle moves up"]
    pair = pipeline(prompts, num_frames=4, generator=[seeded(1), seeded(5)]).frames
    assert np.array_equal(pair[1], pipeline(prompts[1], num_frames=4, generator=seeded(5)).frames[0])
    several = pipeline(prompts, num_frames=4, num_videos_per_prompt=2, generator=seeded(5)).frames
    assert len(several) == 4 and np.allclose(several[0], first[0], atol=1 / 255)
    expected = frames_of(pipeline, prompts[1], drawn_by(5), seconds=0.5, sample_index=3)
    assert np.allclose(several[3] * 255, expected, atol=1)
    with pytest.raises(ValueError, match="one for each of 2 videos, not 3"):
        pipeline(prompts, num_frames=4, generator=[seeded(0)] * 3)


def test_callbacks_run_after_every_clip_and_change_or_end_the_video(pipeline):
    calls = []

    def brighten(pipe, step, frames, held):
        calls.append((pipe, step, frames, tuple(held["frames"].shape)))
        return {"frames": torch.full_like(held["frames"], 255)} if step == 1 else {}

    options = {"num_frames": 40, "generator": seeded(0)}
    video = pipeline(PROMPT, callback_on_step_end=brighten, **options).frames[0]
    assert [call[1:] for call in calls] == [(0, 16, (1, 16, 32, 32, 3)), (1, 32, (1, 16, 32, 32, 3)),
                                            (2, 40, (1, 8, 32, 32, 3))]  # fmt: skip
    assert calls[0][0] is pipeline and (video[16:32] == 1).all() and not (video[:16] == 1).all()

    def stop(pipe, step, frames, held):
        pipe._interrupt = step == 1
        assert not held

    stopped = pipeline(PROMPT, callback_on_step_end=stop, callback_on_step_end_tensor_inputs=[], **options).frames
    assert stopped.shape[1] == 32
    assert pipeline(PROMPT, **options).frames.shape[1] == 40  # the next call is whole again


def test_an_image_is_the_first_frame(pipeline):
    wide = np.random.default_rng(0).integers(256, size=(32, 48, 3), dtype=np.uint8)
    given = pipeline.model.given(image=wide[None, :, 8:40])
    expected = frames_of(pipeline, PROMPT, drawn_by(2), seconds=1.0, given=given)
    images = Image.fromarray(wide), wide.astype(np.float32) / 255, torch.from_numpy(wide).permute(2, 0, 1) / 255
    for image in images:
        made = pipeline(PROMPT, image=image, num_frames=8, generator=seeded(2)).frames[0]
        assert np.array_equal((made * 255).round(), expected)
    assert not np.array_equal(expected, frames_of(pipeline, PROMPT, drawn_by(2), seconds=1.0))
    assert pipeline(PROMPT, image=images[0], num_frames=4, num_videos_per_prompt=2).frames.shape[:2] == (2, 4)


def test_a_storyboard_has_lengths_of_its_own(pipeline):
    assert pipeline("[2s: a red square] [2s: a blue circle]").frames.shape[1] == 32
    with pytest.raises(ValueError, match="shots have their own"):
        pipeline("[2s: a red square] [2s: a blue circle]", num_frames=8)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_frames": 8, "seconds": 1.0}, "got both: 8 and 1.0"),
        ({"negative_prompt": "noise"}, r"unknown options \['negative_prompt'\]"),
        ({"seed": 1}, r"unknown options \['seed'\]"),
        ({"callback_on_step_end_tensor_inputs": ["latents"]}, r"expected 'frames', got \['latents'\]"),
        ({"num_frames": 0}, "expected a positive number"),
    ],
)
def test_what_a_call_cannot_do_is_refused(pipeline, options, message):
    with pytest.raises(ValueError, match=message):
        pipeline(PROMPT, **options)


def test_saved_pipelines_are_checkpoints_and_load_again(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path / "saved")
    assert np.array_equal(
        *(
            pipe(PROMPT, num_frames=4, generator=seeded(1)).frames
            for pipe in (pipeline, DiCoDePipeline.from_pretrained(tmp_path / "saved"))
        )
    )
    assert DiCoDe.from_pretrained(tmp_path / "saved").lm.config == pipeline.lm.config


def test_a_dtype_is_that_of_the_parameters_alone(tiny_model):
    pipe = DiCoDePipeline.from_pretrained(tiny_model, torch_dtype=torch.float64)
    assert pipe.dtype == torch.float64 and pipe.device == torch.device("cpu")
    assert pipe.to("cpu").to(torch.float32).dtype == torch.float32
    pipe.to("cpu", torch.bfloat16)
    assert {parameter.dtype for part in (pipe.tokenizer, pipe.lm) for parameter in part.parameters()} == {
        torch.bfloat16
    }
    assert {b.dtype for b in pipe.tokenizer.buffers() if b.is_floating_point()} == {torch.float32}


def test_the_examples_of_the_readme_run(tmp_path):
    blocks = re.findall(r"^```python\n(.*?)^```", README.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    assert len(blocks) >= 2
    script = tmp_path / "example.py"
    script.write_text("\n\n".join(blocks), encoding="utf-8")
    done = subprocess.run([sys.executable, script], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert read_video(tmp_path / "ball.mp4", fps=8.0).frames.shape == (48, 64, 64, 3)
