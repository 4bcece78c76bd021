"""Estimates of activation patching from gradients: a frozen dataclass each, whose fields are its options."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
