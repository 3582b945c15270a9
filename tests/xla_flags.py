"""What XLA is told when tests run on JAX."""

import importlib.util
import mmap
import pathlib

DEVICES = 8
FLAGS = (
    f"--xla_force_host_platform_device_count={DEVICES}",
    # More devices than cores: on a busy machine some wait long.
    "--xla_cpu_collective_call_warn_stuck_timeout_seconds=120",
    "--xla_cpu_collective_call_terminate_timeout_seconds=600",
    # Tests compile thousands of small programs, each run a few times. The
    # last two save more than half of the time.
    "--xla_backend_optimization_level=0",
    "--xla_llvm_disable_expensive_passes=true",
    "--xla_cpu_use_fusion_emitters=false",
    "--xla_cpu_parallel_codegen_split_count=1",
)


def known() -> str:
    """The flags that the installed jaxlib has; it ends at any other one."""
    found = importlib.util.find_spec("jaxlib")
    folders = (found.submodule_search_locations or ()) if found else ()
    libraries = [
        library
        for folder in folders
        for library in pathlib.Path(folder).glob("*.so")
    ]
    wanted = {flag: flag.partition("=")[0].lstrip("-") for flag in FLAGS}
    for library in libraries:
        with library.open("rb") as file:
            content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            with content:
                wanted = {
                    flag: name
                    for flag, name in wanted.items()
                    if content.find(name.encode()) < 0
                }
    return " ".join(flag for flag in FLAGS if flag not in wanted)
