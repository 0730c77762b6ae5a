"""The flags of every command: a frozen dataclass each, whose fields are the flags and their comments the help."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import Positional, Suppress, arg

from dicode.config import (
    BatchSize,
    Count,
    Factor,
    Guidance,
    Items,
    LearningRate,
    Positive,
    Range,
    Seed,
    Share,
    Side,
    Steps,
    TrainingSteps,
    Unicode,
    UpTo1000,
    Whole,
)
from dicode.tokenizer.config import Joins

# The numbers that a flag takes: `cli.parse` checks them, before any work is done
Seconds = Annotated[float, Range(0, 86_400, above=True)]
Minutes = Annotated[float, Range(0, 1_000_000, above=True)]
Scaling = Annotated[int, Range(1, 64)]
KeyFrames = Annotated[int, Range(2, 4096)]
Bits = Annotated[int, Range(0, 64)]
Gpus = Annotated[tuple[Count, ...], Items(1, 64)]

# Text, not a Path: the slash at the end of "frames/" says that a folder is meant.
Output = Annotated[str, arg(aliases=("-o",))]
# Text, since a Path would take one slash off s3://…
Folder = Annotated[Positional[str], arg(metavar="FOLDER")]
Folders = Annotated[Positional[tuple[str, ...]], arg(metavar="FOLDER …")]
Input = Annotated[Positional[str], arg(metavar="INPUT")]
Model = Annotated[Positional[str], arg(metavar="MODEL")]
Dtype = Literal["float16", "bfloat16", "float32"]


@dataclass(frozen=True)
class WriteFlags:
    """Sampling of the language model; left out: the model's own, which `dicode info` shows."""

    guidance: Guidance | None = None  # above 1 follows the prompt more closely
    variance_scale: Factor | None = None  # of the next tokens' distribution; 0 takes its mean
    first_variance_scale: Factor | None = None  # of the first key frame; lower follows the prompt more reliably
    temperature: Factor | None = None  # of the choice between mixture components; 0 takes the likeliest
    flow_steps: Steps | None = None  # of a flow head
    context_key_frames: Whole | None = (
        None  # key frames of the language model's sequence, for any length; 0: all that it holds
    )


@dataclass(frozen=True)
class RenderFlags:
    """Sampling of the decoder; left out: the model's own, which `dicode info` shows."""

    steps: Steps | None = None  # denoising steps a clip
    decoder_guidance: Guidance | None = None  # above 1 follows the tokens more closely
    decoder_temperature: Factor | None = None  # of its noise; below 1 clips hold together better and move less
    guidance_rescale: Share | None = None  # 0…1: pulls the contrast of guided predictions back
    eta: Share | None = None  # 0…1: noise of DDIM, where the model has a schedule of it
    motion_scale: Factor | None = None  # above 1 frames differ more from one another, key frames stay as they are
    joins: Joins | None = None  # chained: each clip with the end of the one before as context; parallel: joins blended


Write = Annotated[WriteFlags, arg(name="")]
Render = Annotated[RenderFlags, arg(name="")]


@dataclass(frozen=True)
class Generate:
    """Write a video of a prompt. Sampling options left out are the model's own; `dicode info` shows them.

    A storyboard changes the prompt on the way: "[4s: a spark] [4s: it grows into a fireball]".
    """

    prompt: Annotated[Positional[Annotated[str, Unicode] | None], arg(metavar="PROMPT")] = None  # what the video shows
    seconds: Seconds | None = None  # how long it lasts; default: 4, or as long as the storyboard
    seed: Seed = 0  # the same seed, prompt and options give the same file
    sample: Seed = 0  # another number gives another video of the same seed
    storyboard: Path | None = None  # a YAML file in place of the prompt: a list of {seconds: 4, prompt: a spark}
    # in place of the prompt: a prompt a line, or captions.jsonl, .csv, .json; out-000.mp4 …, or into a folder name/
    prompts: Path | None = None
    image: Path | None = None  # the first frame
    last_image: Path | None = None  # the frame that the video ends on
    loop: bool = False  # end on the first frame
    continue_from: Path | None = None  # a video to go on from: the new one begins on its last frame
    reroll_from: Whole | None = None  # from this clip on (the first is 0) take another seed; those before stay
    reroll_seed: Seed | None = None  # that other seed; default: the next one
    write: Write = WriteFlags()
    render: Render = RenderFlags()
    model: str = "sprites"  # a model in the box, a checkpoint folder, or owner/name on the Hub
    revision: str | None = None  # of a model on the Hub: branch, tag or commit
    output: Output = "out.mp4"  # .mp4, .webm, .gif, or a folder name/ for PNG frames; for videos with --prompts
    scale: Scaling | None = None  # enlarge every pixel so many times along each side; default: to 256 pixels or more
    lossless: bool = False  # .mp4 and .webm keep every bit, to measure or train on; not every player shows them
    stream: bool = False  # write so that it can be watched from the first clip on; stopping early keeps what is there
    preview: bool = False  # first write out.preview.mp4, of fewer denoising steps
    sheet: Path | None = None  # also write a contact sheet, one row a clip
    device: str = "auto"  # cpu, cuda, mps
    dtype: Dtype = "float32"  # of the weights in memory; bfloat16 takes less time where the processor has it
    timings: bool = False  # also show the times of every clip, and the memory used


@dataclass(frozen=True)
class Tokenize:
    """Turn a video into deep tokens: a tensor `tokens`, float32 k × n × d for k key frames of n tokens."""

    input: Input  # video, animated image, or folder of frames
    output: Output = "tokens.safetensors"
    model: str = "sprites"  # a model in the box, a checkpoint folder, or owner/name on the Hub
    revision: str | None = None  # of a model on the Hub: branch, tag or commit
    device: str = "auto"  # cpu, cuda, mps


@dataclass(frozen=True)
class Reconstruct:
    """Send a video through deep tokens and back, or render tokens that `dicode tokenize` saved.

    Of 16·N + 1 frames the last is only the last clip's tail key frame: 16·N come back.
    """

    input: Input  # video, animated image, folder of frames, or tokens.safetensors
    output: Output = "out.mp4"  # .mp4, .webm, .gif, or a folder name/ for PNG frames
    side_by_side: bool = False  # the video at the left, what its tokens give at the right
    seed: Seed = 0  # of the decoder
    render: Render = RenderFlags()
    model: str = "sprites"  # a model in the box, a checkpoint folder, or owner/name on the Hub
    revision: str | None = None  # of a model on the Hub: branch, tag or commit
    scale: Scaling | None = None  # enlarge every pixel so many times along each side; default: to 256 pixels or more
    device: str = "auto"  # cpu, cuda, mps
    dtype: Dtype = "float32"  # of the weights in memory; bfloat16 takes less time where the processor has it


@dataclass(frozen=True)
class Train:
    """Train a run of a recipe; the same command continues it. FILE.py:RUN --help lists the flags of the run itself."""

    recipe: Annotated[Positional[str], arg(metavar="FILE.py:RUN")]  # a function of that file which returns a run
    run_folder: Path | None = None  # default: runs/FILE-RUN
    minutes: Minutes | None = None  # in place of steps: as many as this machine does in that time
    run: Suppress[Any] = None  # what the function returned, changed by flags


@dataclass(frozen=True)
class TrainAll:
    """Train all stages of a recipe file in order and join them into a model; the same command continues.

    What is finished is not trained again. One stage alone: FILE.py:RUN.
    """

    recipe: Annotated[Positional[str], arg(metavar="FILE.py")]  # with STAGES, as recipes/small.py has them
    output: Annotated[Path, arg(aliases=("-o",))]  # the checkpoint folder to write
    cache: str | None = None  # from `dicode data cache`; default: what the recipe names
    minutes: Minutes | None = None  # for all stages together, in place of their steps, shared out as the file says
    first_stage: str | None = None  # of a model in the box or a folder, in place of training one
    runs: Path = Path("runs")  # where the run folders lie, FILE-STAGE each
    dtype: Dtype | Literal["int8"] = "float16"  # of the weights on disk


@dataclass(frozen=True)
class Finetune:
    """Teach a model your own clips: low-rank adapters, merged into a new model. The same command continues it.

    Clips whose line says "validation": true are kept for validation, else every 15th of a folder, from the first on.
    """

    folders: Folders  # with captions.jsonl, captions.csv, .tar archives, or a .txt beside each clip
    output: Annotated[Path, arg(aliases=("-o",))]  # the checkpoint folder to write
    model: str = "sprites"  # to begin from: a model in the box, a checkpoint folder, or owner/name on the Hub
    revision: str | None = None  # of a model on the Hub: branch, tag or commit
    parts: tuple[Literal["denoiser", "lm"], ...] = ("denoiser", "lm")  # how it moves; what a caption means
    steps: TrainingSteps = 500  # of each part
    minutes: Minutes | None = None  # for all parts together, in place of steps: as many as this machine does in them
    rank: Annotated[int, Range(1, 4096)] = 16  # of the adapters: higher learns more, and takes more clips
    alpha: Positive = 16.0  # what an adapter adds counts alpha/rank
    dropout: Share = 0.0  # share of an adapter that is left out of a training step
    targets: tuple[str, ...] = ()  # layers to adapt, by the ends of their names; none named: every layer
    lr: LearningRate = 1e-3
    batch_size: BatchSize = 16
    key_frames: KeyFrames = 3  # that the language model learns to write of a clip, one every two seconds
    loops: bool = False  # the clips repeat without a seam
    work_folder: Path | None = None  # of cache and runs; default: OUTPUT.work, and it can be deleted afterwards
    seed: Seed = 0
    device: str = "auto"  # cpu, cuda, mps
    dtype: Dtype = "float16"  # of the weights on disk
    json: Annotated[Path | None, arg(metavar="FILE")] = None  # keep the figures in a result file


@dataclass(frozen=True)
class Assemble:
    """Join the best weights of a tokenizer run and a language model run into one checkpoint folder."""

    tokenizer: Annotated[Positional[Path], arg(metavar="TOKENIZER")]  # runs/FILE-NAME/best of a tokenizer run
    lm: Annotated[Positional[Path], arg(metavar="LM")]  # runs/FILE-NAME/best of a language model run
    output: Annotated[Path, arg(aliases=("-o",))]  # the folder to write
    first_stage: Path | None = None  # a later run of the same first stage, whose decoder to take
    last: bool = False  # in place of each run's best weights, RUN/best, the average that it ended with, RUN/last
    dtype: Dtype | Literal["int8"] = "float16"  # of the weights on disk; int8: of matrices, with a scale a row
    write: Write = WriteFlags()  # kept as the model's own sampling; left out: the tokenizer's
    render: Render = RenderFlags()


@dataclass(frozen=True)
class Index:
    """Read every file of data sets to its end; list the bad ones, and exit with their count (at most 125)."""

    folders: Folders  # with captions.jsonl, captions.csv, .tar archives, or a .txt beside each clip
    validation_by: Annotated[str | None, arg(metavar="KEY=VALUE")] = None  # as `dicode data cache` has it


@dataclass(frozen=True)
class Cache:
    """Keep all frames of data sets, with their times, in shards to train from; exits with the count of bad files.

    The same command goes on where it was stopped. Equal files and options give equal bytes, whoever does the work.
    Folders and output may be URLs of object stores: s3://bucket/folder.
    """

    folders: Folders  # with captions.jsonl, captions.csv, .tar archives, or a .txt beside each clip
    output: Annotated[str, arg(aliases=("-o",))]  # a folder such as cache/sprites
    size: Side = 64  # side of the frames, scaled to cover it and cropped at the centre
    max_fps: UpTo1000 = 12.5  # frames a second that are enough: of more, some are left out, to no fewer than this
    loops: bool = False  # the clips repeat without a seam
    scenes: Seconds | None = None  # cut videos where the scene changes, and leave out scenes of fewer seconds than this
    # which clips are for validation where their lines have KEY, such as lab=f147f077; elsewhere every 15th video is
    validation_by: Annotated[str | None, arg(metavar="KEY=VALUE")] = None
    dedupe: Bits | None = None  # leave out copies: perceptual hashes differ in at most so many of 64 bits; 4 is usual
    files_per_shard: Annotated[int, Range(1, 65536)] = 64  # a worker holds the frames of that many files in memory
    workers: Annotated[int, Range(1, 1024)] = 1  # processes
    ray: str | None = None  # spread the work by Ray Data: the address of a cluster, auto, or local for one started here
    # then compute latents and deep tokens of this model too, as `dicode data encode` does
    encode: Annotated[str | None, arg(metavar="MODEL")] = None
    device: str = "auto"  # for --encode: cpu, cuda, mps


@dataclass(frozen=True)
class Verify:
    """Read all shards of a cache and compare their hashes with its index; exits with the count of bad ones."""

    cache: Annotated[Positional[str], arg(metavar="CACHE")]  # from `dicode data cache`


@dataclass(frozen=True)
class Check:
    """Say what the clips of a cache are like, and which settings follow: lengths, captions, motion, first stages."""

    cache: Annotated[Positional[str], arg(metavar="CACHE")]  # from `dicode data cache`
    json: Annotated[Path | None, arg(metavar="FILE")] = None  # keep the findings in a file


@dataclass(frozen=True)
class Encode:
    """Compute the latents and deep tokens of a cache now, which training would compute when it first needs them."""

    cache: Annotated[Positional[Path], arg(metavar="CACHE")]  # from `dicode data cache`
    model: str = "sprites"  # whose first stage and tokenizer: a model in the box, or a folder: runs/FILE-NAME/best
    device: str = "auto"  # cpu, cuda, mps
    mirror: bool = False  # latents of mirror images too, for a tokenizer's training with --mirror


@dataclass(frozen=True)
class Export:
    """Write a cache as WebDataset archives: a tar a shard, H.264 videos with .txt and .json beside them."""

    cache: Annotated[Positional[Path], arg(metavar="CACHE")]  # from `dicode data cache`
    output: Annotated[str, arg(aliases=("-o",))]  # a folder


@dataclass(frozen=True)
class Sheet:
    """Draw a contact sheet of a data set: clips picked by the seed, one a row, with their captions."""

    folder: Folder  # with captions.jsonl, captions.csv, .tar archives, or a .txt beside each clip
    output: Annotated[Path, arg(aliases=("-o",))] = Path("sheet.png")
    count: Annotated[int, Range(1, 1000)] = 16  # clips
    seed: Seed = 0  # which clips
    size: Side = 64  # side of a frame


@dataclass(frozen=True)
class Official:
    """Convert the published DiCoDe weights into a checkpoint folder. Every tensor is used, or named and why not."""

    output: Annotated[Path, arg(aliases=("-o",))]  # the folder to write
    tokenizer: Path | None = None  # models/pytorch_model.bin
    lm: Path | None = None  # models/gpt2_large.bin
    clip: Path | None = None  # OpenCLIP ViT-H/14, file or folder, where the tokenizer's file lacks a tower
    vocabulary: str = "openai-community/gpt2"  # of GPT-2: a folder with vocab.json and merges.txt, or a Hub id
    dtype: Dtype = "float16"  # of the weights on disk


@dataclass(frozen=True)
class Dynamicrafter:
    """Convert DynamiCrafter into a checkpoint folder from which to train a tokenizer (recipes/paper.py)."""

    checkpoint: Annotated[Positional[Path], arg(metavar="CHECKPOINT")]  # model.ckpt
    output: Annotated[Path, arg(aliases=("-o",))]  # the folder to write
    clip: Path | None = None  # OpenCLIP ViT-H/14, file or folder, where the checkpoint lacks a tower
    objective: Literal["epsilon", "v_prediction"] | None = None  # that it predicts; default: as its betas tell
    dtype: Dtype = "float16"  # of the weights on disk


@dataclass(frozen=True)
class Clip:
    """Convert OpenCLIP's weights into a folder of transformers, or those of transformers into a file of OpenCLIP."""

    weights: Annotated[Positional[Path], arg(metavar="WEIGHTS")]  # a file, or a folder with one
    output: Annotated[Path, arg(aliases=("-o",))]  # the folder to write
    dtype: Dtype = "float32"  # of the weights on disk


@dataclass(frozen=True)
class Vae:
    """Convert CompVis' autoencoder, alone or within a larger checkpoint, into a folder of diffusers."""

    weights: Annotated[Positional[Path], arg(metavar="WEIGHTS")]  # a torch or safetensors file
    output: Annotated[Path, arg(aliases=("-o",))]  # the folder to write
    dtype: Dtype = "float32"  # of the weights on disk


@dataclass(frozen=True)
class Info:
    """Show what a model, a preset or a recipe takes: parameters, FLOPs, memory, a second of video in tokens and bits.

    Of a recipe (recipes/paper.py:gpt2, or all of recipes/paper.py) it plans the training, as the recipe says or as the
    flags change it.
    """

    model: Model = "sprites"  # in the box, a checkpoint folder, owner/name on the Hub, a preset, FILE.py:RUN or FILE.py
    revision: str | None = None  # of a model on the Hub: branch, tag or commit
    here: bool = False  # of a recipe file with STAGES: how long each stage takes on this machine, measured
    gpus: Gpus | None = None  # to train on; default: 1 for a recipe, 1 and 8 for all else
    batch_size: Count | None = None  # samples on each of them (default 1); of a recipe: on all together
    gpu: str = "a100-80gb"  # this and the following for recipes: which GPUs
    mfu: Annotated[float, Range(0, 1, above=True)] = 0.4  # the share of their peak that is assumed to be reached
    strategy: Literal["ddp", "fsdp"] | None = None  # each GPU with all weights, or with its share
    micro_batches: Count | None = None  # to cut a batch into
    checkpoint_activations: bool = False  # computes blocks twice instead of keeping what they computed
    json: Annotated[Path | None, arg(metavar="FILE")] = None  # keep the figures in a result file
