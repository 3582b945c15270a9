"""Dated reports: where and with what something was measured, and tables."""

import datetime
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parent.parent
REPORTS = ROOT / "docs" / "reports"

# Variables with which torchrun would tell a child that it is a member.
LAUNCHED = (
    *("RANK", "WORLD_SIZE", "LOCAL_", "MASTER_", "GROUP_", "TORCHELASTIC"),
)


def measured(module: str, backend: str, devices: int, *arguments: str) -> list:
    """Run `python -m module *arguments` on so many simulated devices.

    Args:
        module: prints one line of JSON at its end.
        backend: what Keras runs on there.
        devices: of one process (JAX, TensorFlow), or processes (PyTorch).
        arguments: of the command.

    Returns:
        What the (first) process printed in its last line.
    """
    environment = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(LAUNCHED)
    }
    environment |= {
        "KERAS_BACKEND": backend,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        "TF_CPP_MIN_LOG_LEVEL": "3",
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m"]
    if backend == "torch":
        launch = ["torch.distributed.run", "--standalone"]
        command += [*launch, f"--nproc-per-node={devices}", "-m"]
    done = subprocess.run(
        [*command, module, *arguments],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return json.loads(done.stdout.strip().splitlines()[-1])


def simulate_devices(devices: int) -> None:
    """In a child on TensorFlow: split the CPU. The others were told."""
    if os.environ["KERAS_BACKEND"] == "tensorflow":
        import tensorflow as tf

        tf.config.set_logical_device_configuration(
            tf.config.list_physical_devices("CPU")[0],
            [tf.config.LogicalDeviceConfiguration()] * devices,
        )


def answer(value: list) -> None:
    """In a child: give the parent the result, once."""
    if os.environ.get("RANK", "0") == "0":
        print(json.dumps(value), flush=True)


def surroundings(command: str) -> str:
    """Date, kind of machine, versions and command, as Markdown."""
    packages = ("keras", "jax", "tensorflow", "torch", "numpy")
    versions = ", ".join(
        f"{name} {importlib.metadata.version(name)}" for name in packages
    )
    return "\n".join(
        [
            f"- Date: {datetime.date.today().isoformat()}",
            f"- Machine: {os.cpu_count()} cores of a {platform.machine()} CPU, "
            f"{platform.system()}; devices are simulated on it",
            f"- Versions: Python {platform.python_version()}, {versions}",
            f"- Command: `{command}`",
        ]
    )


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; numbers to the right of the first column."""
    lines = [header, ["---", *("---:" for _ in header[1:])], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def write(name: str, text: str) -> Path:
    """Write `docs/reports/<date>-<name>.md`; return the file."""
    REPORTS.mkdir(parents=True, exist_ok=True)
    path = REPORTS / f"{datetime.date.today().isoformat()}-{name}.md"
    path.write_text(text.strip() + "\n", encoding="utf-8")
    return path
