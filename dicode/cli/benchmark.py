"""`dicode benchmark …`: UCF-101, MSR-VTT and VBench.

Where the literature differs, the docstring of a command names the usage that it follows.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import Positional, arg

from dicode.cli import common
from dicode.config import DEFAULT_MODEL, BatchSize, Range, Seed, Side, Unicode
from dicode.stopwatch import Stopwatch

FvdClips = Annotated[int, Range(2, 2**31 - 1), arg(help="clips on either side of the FVD")]


@dataclass(frozen=True)
class RunFlags:
    """What UCF-101 and MSR-VTT have in common."""

    i3d: Path | None = None  # i3d_torchscript.pt of StyleGAN-V
    confirm: tuple[str, ...] = ()  # SHA-256 of network files that you know to be the published ones
    model: common.ModelName = DEFAULT_MODEL
    revision: common.Revision = None
    size: Side = 256  # side of the real clips in pixels, scaled to cover it and cropped at the centre
    seed: Seed = 0  # random seed
    batch_size: BatchSize = 10  # samples generated at once
    shard: str | None = None  # this process's share of the work: 2/4 is the second of four
    work_folder: Path | None = None  # folder of finished parts; default: OUTPUT.work, which may be deleted afterwards
    device: common.Device = "auto"


Run = Annotated[RunFlags, arg(name="")]
RUN = RunFlags()


@dataclass(frozen=True)
class Ucf101:
    """Zero-shot UCF-101: FVD (I3D) and Inception Score (C3D) of videos generated from its class names.

    The same command continues; torchrun, or the flag shard, shares the work among processes.
    """

    folder: common.Folder  # folder with UCF-101/<ClassName>/v_*.avi and, for --split, ucfTrainTestlist/
    output: common.OutputPath  # JSON file of the figures
    c3d: Path | None = None  # c3d_ucf101.pt of StyleGAN-V
    samples: Annotated[int, Range(10, 2**31 - 1)] = 10_000  # videos to generate, classes as often as among real ones
    fvd_clips: FvdClips = 2048
    split: Literal["all", "train", "test"] = "all"  # split of the real videos; train and test: the first of three lists
    template: Annotated[str, Unicode] = "{}"  # prompt; {} is the class in words, such as apply eye makeup
    prompts: Path | None = None  # JSON file in place of the template: {"ApplyEyeMakeup": "a sentence", …}
    run: Run = RUN


@dataclass(frozen=True)
class Msrvtt:
    """Zero-shot MSR-VTT: FVD (I3D) and CLIPSIM (CLIP ViT-B/32) of videos generated from captions of its test videos.

    The same command continues; torchrun, or the flag shard, shares the work among processes.
    """

    folder: common.Folder  # folder with TestVideo/ or videos/all/, and test_videodatainfo.json or videodatainfo.json
    output: common.OutputPath  # JSON file of the figures
    clip: str = "openai/clip-vit-base-patch32"  # CLIP: a folder, or owner/name on the Hub
    samples: Annotated[int, Range(2, 2**31 - 1)] | None = None  # videos to generate; default: one for every caption
    all_captions: bool = False  # every caption of a test video, in place of a random one
    fvd_clips: FvdClips = 2990
    run: Run = RUN


@dataclass(frozen=True)
class Vbench:
    """Write the videos that VBench's own tool measures: FOLDER/<prompt>-<index>.mp4, beside it FOLDER.json.

    The same command continues; torchrun, or the flag shard, shares the work among processes.
    """

    prompts: Annotated[Positional[Path], arg(metavar="PROMPTS")]  # a .txt, a prompt a line, or VBench_full_info.json
    output: common.OutputPath  # folder to write
    model: common.ModelName = DEFAULT_MODEL
    revision: common.Revision = None
    samples: Annotated[int, Range(1, 1000)] = 5  # videos a prompt; VBench asks for 25 to measure temporal flickering
    seconds: common.Seconds = 2.0  # length in seconds
    scale: common.Scaling = 1  # enlargement of every pixel along each side, 1 to 64
    seed: Seed = 0  # random seed
    batch_size: BatchSize = 10  # samples generated at once
    shard: str | None = None  # this process's share of the work: 2/4 is the second of four
    device: common.Device = "auto"


def ucf101(command: Ucf101, watch: Stopwatch) -> None:
    """Zero-shot UCF-101.

    Samples: 10,000, classes as often as in the data set (Make-A-Video, arXiv 2209.14792, which wrote one sentence a
    class and published none: give yours with --prompts). Prompts: the class name in words (LaVie, arXiv 2309.15103).
    FVD: 2,048 generated clips, the first of the samples in shuffled order, against 2,048 real ones of 16 frames
    (StyleGAN-V, arXiv 2112.14683; DynamiCrafter, arXiv 2310.12190). Inception Score: of all samples, over 10 splits. A
    real clip begins at a random place of a video of its own, at the model's frame rate (8 a second is DynamiCrafter's
    every third frame), 256×256.
    """
    import numpy as np
    import torch

    from dicode.benchmarks import protocols
    from dicode.benchmarks.sets import class_prompts, share_out, shuffled, ucf101_videos
    from dicode.evaluate.scores import class_score, inception_scores
    from dicode.features.networks import ClipNetwork, NetworkFile, checked_file

    run = command.run
    classes = ucf101_videos(Path(command.folder), command.split)
    sentences = class_prompts(list(classes), command.template, command.prompts)
    shares = share_out(command.samples, {name: len(videos) for name, videos in classes.items()})
    prompts = shuffled([sentences[name] for name, n in shares.items() for _ in range(n)], run.seed, "samples")

    def c3d(device: torch.device) -> tuple[protocols.Measure, NetworkFile]:
        path, file = checked_file("C3D", command.c3d, run.confirm)
        network = ClipNetwork("C3D", path, device)
        return lambda clip, _: network.clip_vector(clip), file

    def figures(rows: np.ndarray, file: NetworkFile) -> dict[str, Any]:
        score, name = class_score(rows, run.seed, protocols.SPLITS), file.figure("Inception Score")
        deviation = inception_scores(rows, protocols.SPLITS).std()
        return {
            name: {"value": score.value, "interval": score.interval, "deviation": deviation, "splits": protocols.SPLITS}
            | protocols.counted(name, len(rows), protocols.UCF101_SAMPLES),
            **protocols.counted("UCF-101", len(classes), protocols.UCF101_CLASSES, "classes"),
            "split": command.split,
        }

    videos, clips = [video for files in classes.values() for video in files], protocols.UCF101_CLIPS
    benchmark = protocols.Benchmark("ucf101", prompts, videos, command.fvd_clips, clips, "c3d", c3d, figures)
    protocols.measure(benchmark, run, command.output, watch)


def msrvtt(command: Msrvtt, watch: Stopwatch) -> None:
    """Zero-shot MSR-VTT.

    One caption a test video, drawn by the seed: 2,990 samples (VideoLDM, arXiv 2304.08818, and most since).
    --all-captions is GODIVA's and Make-A-Video's usage: all 59,794. CLIPSIM is the mean over a clip's 16 frames, then
    over samples (GODIVA, arXiv 2104.14806), not times 100. FVD: as of UCF-101, of one clip a test video (DynamiCrafter
    takes 2,048 of them: --fvd-clips).
    """
    import numpy as np
    import torch

    from dicode.benchmarks import protocols
    from dicode.benchmarks.sets import drawn_captions, msrvtt_videos, shuffled
    from dicode.features.metrics import bootstrap_interval
    from dicode.features.networks import Clip, NetworkFile, clip_file, clip_similarity

    run = command.run
    captioned = msrvtt_videos(Path(command.folder))
    captions = shuffled(drawn_captions(captioned, run.seed, command.all_captions), run.seed, "samples")
    samples = len(captions) if command.samples is None else command.samples
    if samples > len(captions):
        raise ValueError(f"--samples: expected at most the {len(captions)} captions, got {samples}")
    protocol = protocols.MSRVTT_CAPTIONS if command.all_captions else protocols.MSRVTT_VIDEOS

    def clip(device: torch.device) -> tuple[protocols.Measure, NetworkFile]:
        path, file = clip_file(command.clip, run.confirm)
        network = Clip(path, device)
        return lambda clip, prompt: np.array(clip_similarity(network, clip, prompt)), file

    def figures(rows: np.ndarray, file: NetworkFile) -> dict[str, Any]:
        name, interval = file.figure("CLIPSIM"), bootstrap_interval(np.mean, rows, seed=run.seed)
        return {
            name: {"value": rows.mean(), "interval": interval} | protocols.counted(name, len(rows), protocol),
            "captions": "all" if command.all_captions else "one a video",
        }

    videos, clips = [video.path for video in captioned], protocols.MSRVTT_VIDEOS
    prompts = captions[:samples]
    benchmark = protocols.Benchmark("msrvtt", prompts, videos, command.fvd_clips, clips, "clipsim", clip, figures)
    protocols.measure(benchmark, run, command.output, watch)


def vbench(command: Vbench, watch: Stopwatch) -> None:
    """Videos under the names that VBench (arXiv 2311.17982) looks for, five a prompt, nothing else in their folder."""
    from dicode.benchmarks import protocols

    protocols.vbench(command, watch)
