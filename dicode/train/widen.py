"""Going on with wider deep tokens: what was trained on narrower ones is kept, the further numbers begin at zero."""

from collections.abc import Collection, Mapping

from torch import Tensor, nn


def widened(state: Mapping[str, Tensor], module: nn.Module, names: Collection[str]) -> dict[str, Tensor]:
    """The tensors of a model of narrower tokens, these `names` filled up with zeros to the shapes of `module`.

    The model says what it said before (Net2WiderNet, arXiv 1511.05641, with zeros): zeros read nothing of the further
    numbers and write zero into them, until they are trained. Tensors that are no smaller stay as they are.
    """
    ours, grown = module.state_dict(), dict(state)
    for name in names:
        if name not in state or name not in ours or state[name].dim() != ours[name].dim():
            continue
        narrow, wide = state[name].shape, ours[name].shape
        if narrow != wide and all(a <= b for a, b in zip(narrow, wide, strict=True)):
            grown[name] = state[name].new_zeros(wide)
            grown[name][tuple(slice(size) for size in narrow)] = state[name]
            print(f"{name}: {tuple(narrow)} → {tuple(wide)}, with zeros", flush=True)
    return grown
