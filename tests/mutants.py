"""Mutation testing of the library by mutmut, of all its mutants or of a sample: what `make mutants` runs.

    python tests/mutants.py [SAMPLE [SEED]]

A sample is spread over the rooms by their numbers of mutants. Its score by room and its survivors go to stdout, as rows for
docs/mutants.md. The configuration is in pyproject.toml. Mutants lie in mutants/, which may be deleted.
"""

import contextlib
import io
import json
import os
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

import mutmut.__main__ as mutmut
from mutmut.mutation.diff_apply import get_diff_for_mutant
from mutmut.stats import status_by_exit_code

ROOT = Path(__file__).resolve().parent.parent
MUTANTS = Path("mutants")
KILLED = ("killed", "timeout", "segfault")


def main() -> None:
    sample, seed = (int(word) for word in (*sys.argv[1:3], *["0", "1"][len(sys.argv[1:3]) :]))
    os.chdir(ROOT)
    generate()
    names = sorted(verdicts())
    chosen = spread(names, sample, random.Random(seed)) if sample else names
    # One thread of each library: a fork has none of its parent's. PYTHONPATH: other processes of a test find mutants too.
    environment = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONPATH": str(MUTANTS.resolve())}
    subprocess.run(["mutmut", "run", "--max-children", "1", *chosen], env=os.environ | environment, check=True)
    report(chosen, len(names), seed)


def generate() -> None:
    """Write every mutant, as the first step of `mutmut run` does, which then finds them there."""
    MUTANTS.mkdir(exist_ok=True)
    mutmut.set_mutant_under_test("mutant_generation")
    with contextlib.redirect_stdout(io.StringIO()):
        mutmut.copy_src_dir()
        mutmut.copy_also_copy_files()
        mutmut.setup_source_paths()
        mutmut.create_mutants(1)


def verdicts() -> dict[str, str]:
    """What became of each mutant, by its name."""
    found: dict[str, str] = {}
    for file in MUTANTS.glob("gptoss_nf4/**/*.meta"):
        codes = json.loads(file.read_text())["exit_code_by_key"]
        found |= {name: status_by_exit_code[code] for name, code in codes.items()}
    return found


def room_of(name: str) -> str:
    """The room of a mutant such as `gptoss_nf4.format.codec.x_dequantize__mutmut_3`."""
    return name.split(".")[1]


def spread(names: list[str], sample: int, rng: random.Random) -> list[str]:
    """`sample` of `names`, of each room its share, rounded; at least one."""
    chosen = []
    for room, count in sorted(Counter(map(room_of, names)).items()):
        chosen += rng.sample([name for name in names if room_of(name) == room], max(1, round(sample * count / len(names))))
    return chosen


def report(chosen: list[str], total: int, seed: int) -> None:
    found = verdicts()
    print(f"{len(chosen)} of {total} mutants, seed {seed}\n\n| room | mutants | killed | score |\n|---|---|---|---|")
    rooms = sorted(set(map(room_of, chosen)))
    for room, names in [*((room, [n for n in chosen if room_of(n) == room]) for room in rooms), ("all", chosen)]:
        killed = sum(found[name] in KILLED for name in names)
        print(f"| {room} | {len(names)} | {killed} | {killed / len(names):.0%} |")
    for name in chosen:
        if found[name] not in KILLED:
            path = Path(mutmut.find_mutant(name).path)
            changed = [line for line in get_diff_for_mutant(name, path=path).splitlines() if line[:1] in "+-"]
            print(f"\n{found[name]}: {name}\n" + "\n".join(line for line in changed if line[:3] not in ("+++", "---")))


if __name__ == "__main__":
    main()
