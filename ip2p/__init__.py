"""InstructPix2Pix (Brooks, Holynski, Efros 2022, arXiv:2211.09800) from scratch in plain PyTorch."""
from .pipeline import InstructPix2Pix

__all__ = ["InstructPix2Pix"]
