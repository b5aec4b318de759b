"""Who acts in a module's place: one chain per module, whose links come and go in any order.

    link = push(module, lambda forward, *args, **kwargs: 2 * forward(*args, **kwargs))
    ...
    remove(link)

The chain is the module's ``forward`` while it has links. Other packages replace forwards too, and put back what they
once found: a chain that has lost its place to them passes calls on to what was there before it, and links that are
still wanted move to a new one (`renew`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import nn

Function = Callable[..., Any]  # (forward, *args, **kwargs) -> what the module returns

_PLACE = "_loha_forwards"  # where a module keeps its chain, wherever its forward has gone


class Link:
    """One function in a module's place, from `push` to `remove`."""

    def __init__(self, module: nn.Module, function: Function) -> None:
        self.module, self.function = module, function


class _Chain:
    def __init__(self, module: nn.Module) -> None:
        self.inner = module.forward
        self.is_own = "forward" not in vars(module)  # the class's own forward is beneath
        self.links: tuple[Link, ...] = ()  # the outermost last

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._run(self.links, *args, **kwargs)

    def _run(self, links: tuple[Link, ...], *args: Any, **kwargs: Any) -> Any:
        if not links:
            return self.inner(*args, **kwargs)
        return links[-1].function(partial(self._run, links[:-1]), *args, **kwargs)


def push(module: nn.Module, function: Function, *, innermost: bool = False) -> Link:
    """Let ``function(forward, *args, **kwargs)`` run in the module's place; ``forward`` is what it stands for.

    Args:
        innermost: beneath the other links, next to the module's own forward, instead of around them.
    """
    link, chain = Link(module, function), _standing(module)
    chain.links = (link, *chain.links) if innermost else (*chain.links, link)
    return link


def remove(link: Link) -> None:
    """Take a link out, whatever came after it; nothing happens if it is out already.

    With its last link the module's forward is again what it was, unless somebody else has replaced it since.
    """
    module = link.module
    chain = _chain(module)
    if chain is None or link not in chain.links:
        return
    chain.links = tuple(other for other in chain.links if other is not link)
    if chain.links:
        return
    delattr(module, _PLACE)
    if not _is_forward(module, chain):
        return
    if chain.is_own:
        del module.forward
    else:
        module.forward = chain.inner  # type: ignore[method-assign]


def renew(link: Link) -> None:
    """See to it that a link acts, also where another package has put back a forward that it found before."""
    chain = _chain(link.module)
    if chain is not None and link in chain.links:
        _standing(link.module)


def is_own(module: nn.Module, link: Link | None = None) -> bool:
    """Whether the class's forward alone acts beneath ``link``, or, without one, at all."""
    chain = vars(module).get("forward")
    if not isinstance(chain, _Chain):
        return chain is None
    return chain.is_own and chain.links[:1] == (() if link is None else (link,))


def is_plain(module: nn.Module, kind: type[nn.Module], link: Link | None = None) -> bool:
    """Whether the module does just what ``kind`` does beneath ``link``: no subclass, no other forward, no hooks."""
    watched = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks
    return type(module) is kind and is_own(module, link) and not watched


def has_links(module: nn.Module) -> bool:
    """Whether any link acts in the module's place."""
    return _PLACE in vars(module)


@contextmanager
def acting_as(module: nn.Module, function: Function) -> Iterator[None]:
    """`push`, and `remove` at the end."""
    link = push(module, function)
    try:
        yield
    finally:
        remove(link)


def first(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A layer's input, also where it is passed by torch's name for it."""
    return args[0] if args else kwargs["input"]


def _chain(module: nn.Module) -> _Chain | None:
    found: _Chain | None = vars(module).get(_PLACE)
    return found


def _is_forward(module: nn.Module, chain: _Chain) -> bool:
    return vars(module).get("forward") is chain


def _standing(module: nn.Module) -> _Chain:
    """The module's chain, which is its forward; made if there is none, anew if it is so no longer."""
    chain = _chain(module)
    if chain is not None and _is_forward(module, chain):
        return chain
    current = vars(module).get("forward")
    # One that lost its last link while somebody stood around it is taken up again rather than buried.
    new = current if isinstance(current, _Chain) else _Chain(module)
    if chain is not None:
        new.links, chain.links = chain.links, ()
    # Not by nn.Module's own __setattr__, which would look for parameters.
    vars(module)[_PLACE] = new
    module.forward = new  # type: ignore[method-assign, assignment]
    return new
