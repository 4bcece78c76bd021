"""Direct logit attribution, the true direct effect, and the error of the one against the other."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
