"""High dynamic range to the standard one: PQ and HLG video in BT.2020 becomes 8 bit BT.709.

The bundled FFmpeg has no `zscale`, which its own tone mapping needs.
"""

from functools import cache

import numpy as np
from jaxtyping import Float32, UInt8, UInt16
from numpy import ndarray

PQ, HLG = 16, 18  # transfer characteristics (ITU-T H.273, table 3)
HDR_TRANSFERS = frozenset({PQ, HLG})
WHITE_NITS = 203.0  # what graphics white is graded to (ITU-R BT.2408, table 1); it becomes the white of the picture
HLG_PEAK_NITS, HLG_GAMMA = 1000.0, 1.2  # the display that HLG is graded on (ITU-R BT.2100, table 5)
_LUMA = np.array([0.2627, 0.6780, 0.0593], dtype=np.float32)  # of BT.2020
_TO_BT709 = np.array(  # linear BT.2020 to linear BT.709 (ITU-R BT.2087)
    [[1.6605, -0.5876, -0.0728], [-0.1246, 1.1329, -0.0083], [-0.0182, -0.1006, 1.1187]], dtype=np.float32
)
# Up to here light is kept as it is; what is brighter, up to 1,000 nits and more, shares the rest: white becomes 251.
_KNEE = 0.9
_DISPLAY_GAMMA = 2.4  # ITU-R BT.1886


def tone_mapped(signal: UInt16[ndarray, "h w 3"], transfer: int) -> UInt8[ndarray, "h w 3"]:
    """R'G'B' of BT.2020 in full-range 16 bit as a BT.709 picture; each colour's light above `_KNEE` is compressed."""
    light = _light(transfer)[signal]
    if transfer == HLG:  # the table gives the light of the scene: the display's gamma acts on luminance
        light *= (HLG_PEAK_NITS / WHITE_NITS) * ((light @ _LUMA) ** (HLG_GAMMA - 1))[..., None]
    light = np.maximum(light @ _TO_BT709.T, 0)
    rest = 1 - _KNEE
    light = np.where(light > _KNEE, 1 - rest * np.exp((_KNEE - light) / rest), light)
    return (255 * light ** np.float32(1 / _DISPLAY_GAMMA) + np.float32(0.5)).astype(np.uint8)


@cache
def _light(transfer: int) -> Float32[ndarray, "65536"]:
    """Linear light of every 16-bit code: of the display in units of `WHITE_NITS` (PQ), of the scene in 0…1 (HLG)."""
    code = np.arange(2**16) / (2**16 - 1)
    if transfer == PQ:  # SMPTE ST 2084
        root = code ** (32 / 2523)
        nits = 10_000 * (np.maximum(root - 3424 / 4096, 0) / (2413 / 128 - 2392 / 128 * root)) ** (16384 / 2610)
        return (nits / WHITE_NITS).astype(np.float32)
    a, b, c = 0.17883277, 0.28466892, 0.55991073  # ITU-R BT.2100, table 5
    return np.where(code <= 0.5, code**2 / 3, (np.exp((code - c) / a) + b) / 12).astype(np.float32)
