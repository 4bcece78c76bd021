"""Types and shapes in the package's signatures, checked by beartype while tests run.

jaxtyping's own import hook does the same at a multiple of the time: it checks each parameter twice, and decorates
functions within functions anew at each call. No shape stands in the signature of such a one.
"""

import ast
import dataclasses
import functools
import inspect
import sys
from contextlib import nullcontext
from importlib.abc import MetaPathFinder
from importlib.machinery import PathFinder, SourceFileLoader
from typing import get_args

from beartype import beartype
from jaxtyping import config, jaxtyped

# Within it, a name in a shape stands for one number.
ONE_CALL, NO_NAMES = jaxtyped("context"), nullcontext()


def install(package):
    """Have all functions and dataclasses checked of the modules of a package that are imported from now on."""
    sys.meta_path.insert(0, _Finder(package))


class _Finder(MetaPathFinder):
    def __init__(self, package):
        self.package = package

    def find_spec(self, name, path=None, target=None):
        spec = PathFinder.find_spec(name, path, target) if name.split(".")[0] == self.package else None
        if spec is not None and isinstance(spec.loader, SourceFileLoader):
            spec.loader = _Loader(spec.loader.name, spec.loader.path)
        return spec


class _Loader(SourceFileLoader):
    def get_code(self, fullname):
        """From the source: what Python keeps of it in its cache is unchecked."""
        tree = _Decorate().visit(ast.parse(self.get_data(self.path)))
        return compile(ast.fix_missing_locations(tree), self.path, "exec", dont_inherit=True)


class _Decorate(ast.NodeTransformer):
    """Functions innermost, where annotations are theirs; classes outermost, where they are dataclasses already."""

    def visit_FunctionDef(self, node):
        node.decorator_list.append(self._decorator("checked"))
        return node

    def visit_ClassDef(self, node):
        self.generic_visit(node)
        node.decorator_list.insert(0, self._decorator("checked_fields"))
        return node

    def _decorator(self, name):
        return ast.parse(f"__import__({__name__!r}).{name}", mode="eval").body


def checked(function):
    """A function whose parameters and result are checked at each call."""
    if inspect.isgeneratorfunction(function):  # beartype would check it later, when names stand for other numbers
        return jaxtyped(function, typechecker=beartype)
    written, known = function.__annotations__, {}
    for name, hint in written.items():
        try:
            known[name] = eval(hint, function.__globals__) if isinstance(hint, str) else hint
        except (NameError, AttributeError):
            continue  # a name for type checkers alone, or of the class that is being made
    function.__annotations__ = known
    typed = beartype(function)
    typed.__annotations__ = function.__annotations__ = written
    if typed is function:
        return function
    scope = ONE_CALL if any(map(_has_shape, known.values())) else NO_NAMES

    @functools.wraps(function)
    def call(*args, **kwargs):
        if config.jaxtyping_disable:
            return function(*args, **kwargs)
        with scope:
            return typed(*args, **kwargs)

    return call


def checked_fields(cls):
    """A class; if it is a dataclass, its fields are checked when one is made."""
    if "__dataclass_fields__" in vars(cls) and dataclasses.is_dataclass(cls):
        cls.__init__ = checked(cls.__init__)
    return cls


def _has_shape(hint):
    return hasattr(hint, "dim_str") or any(map(_has_shape, get_args(hint)))


def once_per_type(protocol):
    """Let isinstance of a protocol look at the first object of a type alone.

    Each look asks for all parts, and of a TransformerBridge the hooks' names are a property that walks the model.
    """
    known = set()

    class OncePerType(type(protocol)):
        def __instancecheck__(cls, instance):
            found = type(instance) in known or super().__instancecheck__(instance)
            if found:
                known.add(type(instance))
            return found

    protocol.__class__ = OncePerType
