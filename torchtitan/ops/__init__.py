"""Operators: the arithmetic of layers, on CPUs in plain PyTorch, on GPUs in Triton where that is faster."""
