"""Find, replace and freeze submodules by name: the only editor of module trees.

Everything is done on the instance; no class of another library is touched.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import nn


def modules_of(model: nn.Module, wanted: Callable[[str, nn.Module], bool]) -> Iterator[tuple[str, nn.Module]]:
    """Yield (name, module) for which `wanted(name, module)` holds, in definition order; the list is taken before the first yield."""
    yield from [(name, module) for name, module in model.named_modules() if wanted(name, module)]


def replace(model: nn.Module, name: str, new: nn.Module) -> nn.Module:
    """Put `new` where the submodule `name` was; return the old module.  `name` must exist and not be the root."""
    old = model.get_submodule(name)
    model.set_submodule(name, new)
    new.train(old.training)
    return old


@contextmanager
def undone_on_error(model: nn.Module) -> Iterator[None]:
    """Where the block raises, every submodule stands again where it stood, and what asked for a gradient asks for it again.

    Modules that the block takes out are held until it ends.  Values are not looked after: what the block writes into a tensor stays.
    """
    places = list(model.named_modules(remove_duplicate=False))
    asking = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield
    except BaseException:
        for name, module in places:  # a parent comes before its children
            if model.get_submodule(name) is not module:
                model.set_submodule(name, module)
        for parameter, asked in asking:
            parameter.requires_grad_(asked)
        raise


def freeze(module: nn.Module) -> None:
    """No parameter of `module` asks for a gradient any more."""
    for parameter in module.parameters():
        parameter.requires_grad_(False)


def trainable(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """(name, parameter) of all that train, each parameter once, in definition order."""
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            yield name, parameter
