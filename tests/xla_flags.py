"""The flags of XLA for tests on JAX."""

import importlib.util
import mmap
import pathlib

FLAGS = (
    "--xla_force_host_platform_device_count=8",
    # More devices than cores: on a busy machine some wait long.
    "--xla_cpu_collective_call_warn_stuck_timeout_seconds=120",
    "--xla_cpu_collective_call_terminate_timeout_seconds=600",
    # Tests compile thousands of small programs, each run a few times.
    "--xla_backend_optimization_level=0",
    "--xla_llvm_disable_expensive_passes=true",
)
# These save half of the time, and a release may lack them: XLA ends the
# process at a flag that it does not know.
FURTHER = (
    "--xla_cpu_use_fusion_emitters=false",
    "--xla_cpu_parallel_codegen_split_count=1",
)


def flags() -> list[str]:
    """All flags, of the further ones those that jaxlib's libraries name."""
    found = importlib.util.find_spec("jaxlib")
    folders = (found.submodule_search_locations or ()) if found else ()
    libraries = [
        library
        for folder in folders
        for library in pathlib.Path(folder).glob("*.so")
    ]
    return [*FLAGS, *(flag for flag in FURTHER if _named(flag, libraries))]


def _named(flag: str, libraries: list[pathlib.Path]) -> bool:
    name = flag.partition("=")[0].lstrip("-").encode()
    for library in libraries:
        with (
            library.open("rb") as file,
            mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content,
        ):
            if content.find(name) >= 0:
                return True
    return False
