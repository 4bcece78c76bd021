"""Activation patching, exact and fast, and its gradient approximations, with one type of result."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
