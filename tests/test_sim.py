"""The simulated host (sim.py): many seeds hold, the same seed repeats itself, and broken code is found out.

`python -m tests.sim --mutants` breaks the code in every known way; here are those that fail within a few seeds.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests import sim

ROOT = Path(__file__).resolve().parent.parent


def test_invariants_hold_for_every_seed() -> None:
    failures = sim.run_seeds(0, sim.SEEDS)
    assert not failures, "\n".join(f"{sim.replay(seed, sim.STEPS)}  # {what}" for seed, what in failures[:20])


def test_a_seed_repeats_itself() -> None:
    # In processes of their own: nothing may depend on addresses or on the hash seed of strings.
    command = [sys.executable, "-m", "tests.sim", "--seed", "7", "--steps", "200"]
    said = {subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout for _ in range(3)}
    assert len(said) == 1
    assert "seed 7: good" in said.pop()


@pytest.mark.parametrize(
    "mutant",
    [
        "grant-before-commit",
        "retract-a-used-slot",
        "no-end-of-grace",
        "no-release-on-hello",
        "no-unmark",
        "coming-not-cleared",
        "wait-for-no-consumer",
        "release-before-let-go",
        "detach-ignored",
    ],
)
def test_broken_code_is_found_out(mutant: str) -> None:
    assert sim.run_seeds(0, 100, workers=1, mutant=mutant, stop=True)


def test_a_failure_says_how_to_repeat_it() -> None:
    command = [sys.executable, "-m", "tests.sim", "--seed", "1", "--mutant", "retract-a-used-slot", "--verbose"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "seed 1: I2" in done.stdout
    assert "deliver" in done.stdout
    assert sim.replay(0, 50) == "python -m tests.sim --seed 0 --steps 50 --verbose"
