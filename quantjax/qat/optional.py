"""Where does optax come from? It is an extra, wanted only by what wraps an optimizer."""

from typing import Any


def need_optax(who: str) -> Any:
    """The module; ImportError that says how to get it, where it is not there."""
    try:
        import optax
    except ImportError as error:
        raise ImportError(f"{who} needs optax: install quantjax[qat].") from error
    return optax
