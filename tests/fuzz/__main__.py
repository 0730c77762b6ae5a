"""`python -m tests.fuzz videos=2000 checkpoints=500 commands=1000 captions=500 --seed 0 -o results/faults.json`."""

import argparse
import os
import shlex
import shutil
import sys
import tempfile
from collections import Counter
from importlib import import_module
from pathlib import Path

TESTS = Path(__file__).parents[1]
sys.path[:0] = [str(TESTS)]  # where the modules' own helpers lie, as under pytest


def main() -> int:
    """Run what is asked for, print and write how it went; exits with 1 where there was a fault."""
    from dicode.provenance import write_result
    from tests.fuzz import is_fault

    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("kinds", nargs="+", metavar="MODULE=COUNT", help="videos=2000, checkpoints=500, …")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("-o", "--output", type=Path, help="result file")
    asked = parser.parse_args()
    values: dict[str, object] = {}
    total = faults = 0
    for kind in asked.kinds:
        name, _, count = kind.partition("=")
        module = import_module(f"tests.fuzz.{name}")
        outcomes: Counter[str] = Counter()
        found: list[str] = []
        began_s = sum(os.times()[:4])  # of the forked children too
        with tempfile.TemporaryDirectory(prefix="dicode-fuzz-") as folder:
            for number, case in enumerate(module.cases(asked.seed, int(count))):
                place = Path(folder) / f"{number}"
                place.mkdir()
                outcome = module.run(case, place)
                shutil.rmtree(place, ignore_errors=True)
                outcomes[outcome.partition(":")[0]] += 1
                if is_fault(outcome):
                    found.append(f"{case}: {outcome}")
                    print(f"{name} {number}: {found[-1]}", flush=True)
        n = sum(outcomes.values())
        values[name] = {"n": n, **outcomes, "faults": found}
        total, faults = total + n, faults + len(found)
        print(f"{name}: {n} cases, {dict(outcomes)}, {sum(os.times()[:4]) - began_s:.0f} s of processor", flush=True)
    if asked.output is not None:
        command = "python -m tests.fuzz " + shlex.join(sys.argv[1:])
        write_result(asked.output, "fuzz: damaged and random input", values, total, asked.seed, command)
    return int(faults > 0)


if __name__ == "__main__":
    sys.exit(main())
