"""The common first look at a prompt in one call: which components, heads and tokens a logit comes from."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
