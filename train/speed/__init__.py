"""What makes training fast: the memory format, our kernels, the C library's memory."""
