"""Low-rank adapters: a quantized tree is frozen, and thin float factors beside it are trained."""

from quantjax.lora.adapters import Adapter, init
from quantjax.lora.attach import attach, merge, unmerge

__all__ = ["Adapter", "attach", "init", "merge", "unmerge"]
