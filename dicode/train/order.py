"""The order of samples: each once an epoch, every epoch in another order.

A step's samples are computed from its number alone, in the same time and memory for ten samples as for ten million.
"""

import numpy as np
import torch
from numpy import ndarray
from torch import Tensor

from dicode.seeds import generator_for

ROUNDS = 8
LEAST_BITS = 3  # of half a number: among fewer than 64 places the rounds would mix too little


def sample_indices(num_samples: int, batch_size: int, seed: int, step: int) -> Tensor:
    """Sample numbers of one step: consecutive parts of one permutation an epoch."""
    epochs, places = np.divmod(np.arange(step * batch_size, (step + 1) * batch_size), num_samples)
    picked = np.empty(batch_size, dtype=np.int64)
    for epoch in np.unique(epochs).tolist():
        keys = torch.randint(2**62, (ROUNDS,), generator=generator_for(seed, "epoch", epoch)).numpy().astype(np.uint64)
        own = epochs == epoch
        picked[own] = permuted(places[own], num_samples, keys)
    return torch.from_numpy(picked)


def permuted(places: ndarray, count: int, keys: ndarray) -> ndarray:
    """Entries of a permutation of `count` numbers at some places: a Feistel network, applied until in range."""
    half = np.uint64(max(LEAST_BITS, ((count - 1).bit_length() + 1) // 2))
    mask = (np.uint64(1) << half) - np.uint64(1)

    def network(numbers: ndarray) -> ndarray:
        left, right = numbers >> half, numbers & mask
        for key in keys:
            left, right = right, left ^ (_mixed(right ^ key) & mask)
        return (left << half) | right

    found = network(places.astype(np.uint64))
    while (beyond := found >= count).any():
        found[beyond] = network(found[beyond])
    return found.astype(np.int64)


def _mixed(numbers: ndarray) -> ndarray:
    """SplitMix64's finaliser: every output bit depends on every input bit."""
    numbers = (numbers ^ (numbers >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    numbers = (numbers ^ (numbers >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return numbers ^ (numbers >> np.uint64(31))
