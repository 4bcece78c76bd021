"""Prompt pairs: clean and corrupted prompts that align token by token, with a right and a wrong answer."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
