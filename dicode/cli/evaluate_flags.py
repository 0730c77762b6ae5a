"""The flags of `dicode evaluate`, `tune` and `benchmark`, in the form of `dicode.cli.flags`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from dicode.cli.common import Dtype, Folder, Model, Scaling, Seconds
from dicode.config import BatchSize, Count, Factor, Guidance, Range, Seed, Side, Unicode


@dataclass(frozen=True)
class Evaluate:
    """Measure a model against its training and validation clips: one JSON a part, written from this command alone.

    The first line says how long it takes on this machine; `long`, a minute's videos, takes longest.
    """

    model: Model = "sprites"  # a model in the box, a checkpoint folder, or owner/name on the Hub
    cache: Path = Path("cache/sprites")  # real clips, from `dicode data cache`
    output: Annotated[Path, arg(aliases=("-o",))] = Path("results")  # folder of the JSON files
    sheets: Path | None = None  # folder for contact sheets; the report shows those of other parts that lie there too
    report: Path | None = None  # one HTML file of all parts that the folder of results has of this model
    parts: tuple[Literal["generation", "reconstruction", "instructions", "speed", "long"], ...] = (
        "generation",
        "reconstruction",
        "speed",
    )
    quick: bool = False  # a first look of a minute or so: few clips, without speed, instructions, long
    # FILE.py:FUNCTION, of uint8 frames f h w c, whose dict is compared with the keys of caption lines: accuracy by key
    scorer: Annotated[str | None, arg(metavar="FILE.py:FUNCTION")] = None
    # networks to measure with; EffLite0 always does. More: I3D=PATH, C3D=PATH, Inception=PATH, CLIP=ID_OR_FOLDER
    features: tuple[str, ...] = ("EffLite0", "TinyVT")
    prompts: Count = 100  # most training captions to draw, and videos of each split for a scorer
    long_prompts: Count = 8  # training captions to draw for long videos
    long_seconds: Seconds = 60.0  # how long they last
    repeats: Count = 5  # how many times seconds and memory are measured; fewer have no interval
    seed: Seed = 0
    device: str = "auto"  # cpu, cuda, mps
    dtype: Dtype = "float32"  # of the weights in memory; bfloat16 takes less time where the processor has it


@dataclass(frozen=True)
class Tune:
    """Choose a model's sampling on training captions: a table of settings, the best written into its config.json.

    Settings are compared on the same captions and noise; where none is better beyond noise, the stored ones stay.
    """

    model: Model  # a checkpoint folder; a bundled model or one on the Hub with -o
    cache: Path = Path("cache/sprites")  # real clips, from `dicode data cache`
    output: Annotated[Path | None, arg(aliases=("-o",))] = None  # a new folder for the tuned model; default: in place
    # FILE.py:FUNCTION, as of `dicode evaluate`: its accuracy decides; default: the rank of captions by TinyVT
    scorer: Annotated[str | None, arg(metavar="FILE.py:FUNCTION")] = None
    prompts: Annotated[int, Range(8, 10_000)] = 32  # training captions
    guidance: tuple[Guidance, ...] = (1.0, 2.0, 3.0)  # of the language model
    variance_scale: tuple[Factor, ...] = (0.1, 0.3, 1.0)  # of the next tokens' distribution, each with each guidance
    decoder_guidance: tuple[Guidance, ...] = (1.0, 2.0)  # tried with the best of these pairs
    seed: Seed = 0
    device: str = "auto"  # cpu, cuda, mps
    dtype: Dtype = "float32"  # of the weights in memory
    json: Annotated[Path | None, arg(metavar="FILE")] = None  # result file of the table


@dataclass(frozen=True)
class Ucf101:
    """Zero-shot UCF-101: FVD (I3D) and Inception Score (C3D) of videos made for its class names.

    The same command goes on where it was stopped; torchrun, or the flag shard, shares the work among processes.
    """

    folder: Folder  # with UCF-101/<ClassName>/v_*.avi and, where wanted, ucfTrainTestlist/
    output: Annotated[Path, arg(aliases=("-o",))]  # the JSON file of the figures
    i3d: Path | None = None  # i3d_torchscript.pt of StyleGAN-V
    c3d: Path | None = None  # c3d_ucf101.pt of StyleGAN-V
    confirm: tuple[str, ...] = ()  # SHA-256 of such files that you know to be the published ones
    model: str = "sprites"  # a model in the box, a checkpoint folder, or owner/name on the Hub
    revision: str | None = None  # of a model on the Hub: branch, tag or commit
    samples: Count = 10_000  # videos to make, classes as often as among the real ones
    fvd_clips: Count = 2048  # on either side of the FVD
    split: Literal["all", "train", "test"] = "all"  # of the real videos; train and test: the first of the three lists
    template: Annotated[str, Unicode] = "{}"  # of a prompt: {} is the class in words, such as apply eye makeup
    prompts: Path | None = None  # a JSON file in place of the template: {"ApplyEyeMakeup": "a sentence", …}
    size: Side = 256  # side of the real clips, scaled to cover it and cropped at the centre
    seed: Seed = 0
    batch_size: BatchSize = 10  # samples made at once
    shard: str | None = None  # this process's share: 2/4 is the second of four
    work_folder: Path | None = None  # of what is kept meanwhile; default: OUTPUT.work, and it can be deleted afterwards
    device: str = "auto"  # cpu, cuda, mps


@dataclass(frozen=True)
class Msrvtt:
    """Zero-shot MSR-VTT: FVD (I3D) and CLIPSIM (CLIP ViT-B/32) of videos made for captions of its test videos.

    The same command goes on where it was stopped; torchrun, or the flag shard, shares the work among processes.
    """

    folder: Folder  # with TestVideo/ or videos/all/, and test_videodatainfo.json or videodatainfo.json
    output: Annotated[Path, arg(aliases=("-o",))]  # the JSON file of the figures
    i3d: Path | None = None  # i3d_torchscript.pt of StyleGAN-V
    clip: str = "openai/clip-vit-base-patch32"  # a folder, or owner/name on the Hub
    confirm: tuple[str, ...] = ()  # SHA-256 of such files that you know to be the published ones
    model: str = "sprites"  # a model in the box, a checkpoint folder, or owner/name on the Hub
    revision: str | None = None  # of a model on the Hub: branch, tag or commit
    samples: Count | None = None  # videos to make; default: one for every caption that is taken
    all_captions: bool = False  # every caption of a test video, not one drawn by the seed
    fvd_clips: Count = 2990  # on either side of the FVD
    size: Side = 256  # side of the real clips, scaled to cover it and cropped at the centre
    seed: Seed = 0
    batch_size: BatchSize = 10  # samples made at once
    shard: str | None = None  # this process's share: 2/4 is the second of four
    work_folder: Path | None = None  # of what is kept meanwhile; default: OUTPUT.work, and it can be deleted afterwards
    device: str = "auto"  # cpu, cuda, mps


@dataclass(frozen=True)
class Vbench:
    """Write the videos that VBench's own tool measures: FOLDER/<prompt>-<index>.mp4, beside it FOLDER.json.

    The same command goes on where it was stopped; torchrun, or the flag shard, shares the work among processes.
    """

    prompts: Annotated[Positional[Path], arg(metavar="PROMPTS")]  # a .txt, a prompt a line, or VBench_full_info.json
    output: Annotated[Path, arg(aliases=("-o",))]  # the folder to write
    model: str = "sprites"  # a model in the box, a checkpoint folder, or owner/name on the Hub
    revision: str | None = None  # of a model on the Hub: branch, tag or commit
    samples: Count = 5  # videos a prompt; VBench asks for 25 where temporal flickering is measured
    seconds: Seconds = 2.0  # how long a video lasts
    scale: Scaling = 1  # enlarge every pixel this many times along each side
    seed: Seed = 0
    batch_size: BatchSize = 10  # videos made at once
    shard: str | None = None  # this process's share: 2/4 is the second of four
    device: str = "auto"  # cpu, cuda, mps
