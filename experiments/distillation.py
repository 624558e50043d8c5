"""How does a network learn from the answers of another beside the labels?
Hinton, Vinyals and Dean, "Distilling the Knowledge in a Neural Network", 2015, arXiv:1503.02531."""

from collections.abc import Callable

from jaxtyping import Array, Float

from quantjax.qat import distill_loss


def distillation_loss(
    forward: Callable, teacher: Callable, *, temperature: float = 4.0, alpha: float = 0.9
) -> Callable:
    """Returns (params, x, y) -> (loss, updates), as `classification_loss` does, of `distill_loss`
    against the logits `teacher(x)`."""

    def loss_fn(params: object, x: Array, y: Array) -> tuple[Float[Array, ""], dict]:
        logits, updates = forward(params, x)
        return distill_loss(logits, teacher(x), y, temperature, alpha), updates

    return loss_fn
