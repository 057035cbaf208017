"""InstructPix2Pix (Brooks, Holynski, Efros 2022, arXiv:2211.09800) from scratch in plain PyTorch."""

__all__ = ["InstructPix2Pix"]


def __getattr__(name):
    """`ip2p.InstructPix2Pix`, imported when it is asked for: it needs torch, and what is here for the command line does not."""
    if name == "InstructPix2Pix":
        from .pipeline import InstructPix2Pix
        return InstructPix2Pix
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
