"""torch.compile: no network's training pass breaks into several graphs."""

import subprocess
import sys
from pathlib import Path

PROGRAM = Path(__file__).parent / "graph_breaks.py"


def test_every_network_is_one_graph() -> None:
    done = subprocess.run([sys.executable, PROGRAM], capture_output=True, text=True, check=True)
    counts = dict(line.rsplit(" ", 1) for line in done.stdout.splitlines())
    assert len(counts) == 2 + 4 and set(counts.values()) == {"1"}, counts
