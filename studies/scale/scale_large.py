"""The same study from 55 M to 1.3 B parameters, on the same samples in the same order, for one GPU.

    python studies/scale CACHE … --family studies/scale/scale_large.py --seeds 1

19 M comes first once more, to tell machines apart. Muon's updates have the same size in every number at every width, so
their largest singular value grows as its square root; the learning rate falls as much (arXiv 2310.17813). What has been
run of it: README.md.
"""

from dataclasses import replace
from pathlib import Path

from dicode.train.runs import LanguageRun, load_run

BASE = f"{Path(__file__).with_name('scale.py')}:llama_19m"


def llama_19m() -> LanguageRun:
    """As in studies/scale/scale.py."""
    return _language_model(width=448, depth=7, heads=7)


def llama_55m() -> LanguageRun:
    """55 M parameters."""
    return _language_model(width=640, depth=10, heads=10)


def llama_180m() -> LanguageRun:
    """180 M."""
    return _language_model(width=1024, depth=13, heads=16)


def llama_560m() -> LanguageRun:
    """560 M."""
    return _language_model(width=1536, depth=18, heads=24)


def llama_1b() -> LanguageRun:
    """1.3 B."""
    return _language_model(width=2048, depth=24, heads=32)


def _language_model(width: int, depth: int, heads: int) -> LanguageRun:
    base = load_run(BASE)
    lr = base.loop.optim.lr * (base.model.body.width / width) ** 0.5
    body = replace(base.model.body, width=width, depth=depth, heads=heads)
    loop = replace(base.loop, prefetch=True, optim=replace(base.loop.optim, lr=lr))
    return replace(base, model=replace(base.model, body=body), loop=loop)
