"""The engines that need no PyTorch: a C++ kernel, and the same arithmetic in NumPy."""
