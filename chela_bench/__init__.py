"""Triton kernels around the CHELA layer (arXiv 2406.08128), and the bench that measures them.

Importing this package imports nothing else: no torch, no CUDA start, no environment change.
"""

__version__ = "0.1.0"
