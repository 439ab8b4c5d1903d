"""ConvMixer on NVIDIA GPUs: Triton kernels, the operators made of them, and inference through both."""
