"""The laws this package stands on, tried on a model: what holds, what is fast, what is slow and why."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
