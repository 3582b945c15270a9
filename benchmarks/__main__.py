"""Run the suite: `python -m benchmarks [backends]`, as `make bench` does.

Each benchmark writes a dated report; one that fails does not stop the rest.
Not part of it are `kernels` and `soak`, which take long, and `peers`, which
needs an environment of its own.
"""

import subprocess
import sys

from benchmarks import options, reports

# For every backend.
SUITE = (
    *("single_device", "ring", "ways", "chunking", "balance", "growth"),
    "train_step",
)
# Of one framework, or of all together.
JAX_ONLY = ("context_table", "tpu_aot")
TORCH_ONLY = ("overlap",)
OF_ALL = ("memory", "precision")


def commands(backends: list[str]) -> list[list[str]]:
    """What is run for these backends."""
    found = [[name, "--backends", ",".join(backends)] for name in SUITE]
    if "jax" in backends:
        found += [[name] for name in JAX_ONLY]
    if "torch" in backends:
        found += [[name] for name in TORCH_ONLY]
    if set(backends) == set(options.BACKENDS):
        found += [[name] for name in OF_ALL]
    return found


def main() -> int:
    """Run everything; the number of failures is the status."""
    backends = sys.argv[1:] or list(options.BACKENDS)
    failed = []
    for name, *arguments in commands(backends):
        print(f"== {name}", flush=True)
        command = [sys.executable, "-m", f"benchmarks.{name}", *arguments]
        if subprocess.run(command, cwd=reports.ROOT, check=False).returncode:
            failed.append(name)
    print("Failed: " + ", ".join(failed) if failed else "All have run.")
    return len(failed)


if __name__ == "__main__":
    sys.exit(main())
