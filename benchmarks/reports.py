"""Dated reports: where and with what something was measured, and tables."""

import contextlib
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


def environment(
    backend: str, devices: int, *, threads: int = 1, simulated: bool = True
) -> dict[str, str]:
    """The variables of a child process.

    Args:
        backend: what Keras runs on there.
        devices: that a CPU is split into, if they are simulated.
        threads: of OpenMP.
        simulated: False to leave the devices to the framework.
    """
    variables = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(LAUNCHED)
    }
    variables |= {
        "KERAS_BACKEND": backend,
        "TF_CPP_MIN_LOG_LEVEL": "3",
        "OMP_NUM_THREADS": str(threads),
        # Several processes share an accelerator.
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        "TF_FORCE_GPU_ALLOW_GROWTH": "true",
    }
    if simulated:
        # XLA gives up on a collective early where a machine is busy.
        wait = "--xla_cpu_collective_call"
        variables |= {
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices} "
            f"{wait}_warn_stuck_timeout_seconds=600 "
            f"{wait}_terminate_timeout_seconds=3600",
            "CUDA_VISIBLE_DEVICES": "",
        }
    return variables


def measured(
    module: str,
    backend: str,
    devices: int,
    *arguments: str,
    threads: int = 1,
    simulated: bool = True,
    variables: dict[str, str] | None = None,
) -> list:
    """Run `python -m module *arguments` on so many devices.

    Args:
        module: prints one line of JSON at its end.
        backend: what Keras runs on there.
        devices: of one process (JAX, TensorFlow), or processes (PyTorch).
        arguments: of the command.
        threads: of OpenMP, in each process.
        simulated: False to leave the devices to the framework.
        variables: of the environment, in addition.

    Returns:
        What the (first) process printed in its last line.
    """
    command = [sys.executable, "-m"]
    if backend == "torch" and devices > 1:
        launch = ["torch.distributed.run", "--standalone"]
        command += [*launch, f"--nproc-per-node={devices}", "-m"]
    child = environment(backend, devices, threads=threads, simulated=simulated)
    done = subprocess.run(
        [*command, module, *arguments],
        cwd=ROOT,
        env=child | (variables or {}),
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


def surroundings(command: str, devices: str = "") -> str:
    """Date, kind of machine, versions and command, as Markdown.

    Args:
        command: with which the report is made again.
        devices: what was measured on; simulated ones if empty.
    """
    packages = ("keras", "jax", "tensorflow", "torch", "numpy")
    versions = []
    for name in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions.append(f"{name} {importlib.metadata.version(name)}")
    return "\n".join(
        [
            f"- Date: {datetime.date.today().isoformat()}",
            f"- Machine: {os.cpu_count()} cores of a {platform.machine()} CPU "
            f"({processor()}), {platform.system()}; "
            + (devices or "devices are simulated on it"),
            f"- Versions: Python {platform.python_version()}, "
            + ", ".join(versions),
            f"- Command: `{command}`",
        ]
    )


def processor() -> str:
    """The name of this machine's processor, if it is known."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
        return text.split("model name")[1].split(":")[1].split("\n")[0].strip()
    except (OSError, IndexError):
        return platform.processor() or "unknown"


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


def image(name: str) -> Path:
    """Where the plot of a report belongs."""
    REPORTS.mkdir(parents=True, exist_ok=True)
    return REPORTS / f"{datetime.date.today().isoformat()}-{name}.png"
