"""Any number of random cases: `python -m tests.fuzz --cases 10000`.

Draws programs and cases (see `tests/differential.py`) on the backend that
`KERAS_BACKEND` names and compares each with the oracle. The seed of a run
is printed; a failure prints the command that repeats it and ends the run
with exit code 1. `make fuzz N=10000 BACKEND=jax SEED=1` calls this.
"""

import argparse
import contextlib
import secrets
import sys
import time

# First: it provides the devices, before any framework is imported.
import tests.conftest  # noqa: F401  # isort: skip
import keras

from tests import differential, worlds

# Cases of each program: compiling takes longer than many cases.
EACH = 50
# Cases of one call on PyTorch, where a call must end within a limit. The
# others compile anew at each call.
AT_ONCE = 10 if keras.backend.backend() == "torch" else 10**6
# Programs after which compiled ones are dropped.
KEEP = 20


def forget():
    """Drop compiled programs, or a long run fills the memory."""
    keras.backend.clear_session()
    if keras.backend.backend() == "jax":
        import jax

        jax.clear_caches()


def fuzz(cases, seed, each):
    """Run `cases` cases; returns whether all were right."""
    name = keras.backend.backend()
    print(f"{name}: {cases} cases, seed {seed}", flush=True)
    start, done, number, used = time.monotonic(), 0, 0, {}
    with contextlib.closing(worlds.Worlds()) as pool:
        while done < cases:
            count = min(each, cases - done)
            program = differential.draw_program(seed, number)
            for first in range(0, count, AT_ONCE):
                last = min(first + AT_ONCE, count)
                try:
                    shares = pool.call(
                        program.devices,
                        differential.check_cases,
                        *(seed, number, range(first, last)),
                    )
                except AssertionError as error:
                    print(f"\nFAILED: {error}", flush=True)
                    return False
                for result, share in shares.items():
                    used[result] = max(used.get(result, 0.0), share)
            done, number = done + count, number + 1
            if number % KEEP == 0:
                forget()
            seconds = time.monotonic() - start
            print(
                f"{name}: {done} of {cases} cases, {number} programs, "
                f"{done / seconds:.1f} cases/s",
                flush=True,
            )
    print("Largest error of each result, as a share of its bound:")
    for result, share in sorted(used.items()):
        print(f"  {result:12} {share:.3f}")
    print(f"{name}: {done} cases, none wrong. Seed {seed}.")
    return True


def repeat(seed, number, case):
    """Run one case again."""
    program = differential.draw_program(seed, number)
    print(program, flush=True)
    with contextlib.closing(worlds.Worlds()) as pool:
        used = pool.call(
            program.devices,
            differential.check_cases,
            *(seed, number, [case]),
        )
    for result, share in used.items():
        print(f"  {result:12} {share:.3f} of its bound")


def main():
    """Read the command line and run; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz")
    parser.add_argument("--cases", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("--each", type=int, default=EACH, help="per program")
    parser.add_argument("--program", type=int, help="repeat a case of this")
    parser.add_argument("--case", type=int, default=0)
    options = parser.parse_args()
    worlds.simulate_devices()
    seed = options.seed
    if options.program is not None:
        if seed is None:
            parser.error("--program needs --seed")
        repeat(seed, options.program, options.case)
        return 0
    if seed is None:
        seed = secrets.randbelow(10**9)
    return 0 if fuzz(options.cases, seed, options.each) else 1


if __name__ == "__main__":
    sys.exit(main())
