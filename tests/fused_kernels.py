"""PyTorch's fused kernels for GPUs, by name."""

from keras_ring.backends.torch.kernels import cuda, fused

OPERATIONS = {
    "cudnn": cuda.CuDnn,
    "cuda_flash": cuda.CudaFlash,
    "efficient": cuda.Efficient,
}
DTYPES = {
    "cudnn": ("bfloat16", "float16"),
    "cuda_flash": ("bfloat16", "float16"),
    "efficient": ("float32", "bfloat16", "float16"),
}
# Three roundings of numbers of order one, and of sums of them.
TOLERANCE = {"float32": 5e-5, "float16": 4e-3, "bfloat16": 3e-2}


def kernel_of(name, fallback):
    return fused.FusedKernel(
        name, fallback, OPERATIONS[name](), cuda.Efficient()
    )
