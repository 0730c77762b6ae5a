"""DiCoDe: text to video with a language model, at 16 deep tokens per two seconds."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.3.0"

if TYPE_CHECKING:
    from dicode.diffusers_pipeline import DiCoDePipeline as DiCoDePipeline
    from dicode.lm.deep_lm import DeepTokenLM as DeepTokenLM
    from dicode.pipeline import DiCoDe as DiCoDe
    from dicode.tokenizer.video_tokenizer import VideoTokenizer as VideoTokenizer
    from dicode.video.read import VideoReadError as VideoReadError
    from dicode.video.read import read_video as read_video
    from dicode.video.write import VideoWriter as VideoWriter

_HOME = {
    "DiCoDe": "dicode.pipeline",
    "DiCoDePipeline": "dicode.diffusers_pipeline",
    "DeepTokenLM": "dicode.lm.deep_lm",
    "VideoTokenizer": "dicode.tokenizer.video_tokenizer",
    "VideoReadError": "dicode.video.read",
    "VideoWriter": "dicode.video.write",
    "read_video": "dicode.video.read",
}
__all__ = ["__version__", *_HOME]


def __getattr__(name: str) -> Any:
    """Import public names on first use, so that `import dicode` costs no torch import."""
    if name not in _HOME:
        raise AttributeError(f"module 'dicode' has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(import_module(_HOME[name]), name)
