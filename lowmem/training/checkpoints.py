"""Checkpoints that keep what products return, and compute the rest again: it costs little time.

Korthikanti et al., Reducing Activation Recomputation in Large Transformer Models, arXiv 2205.05198, section 5; the
work is done by torch's ``create_selective_checkpoint_contexts``.
"""

from __future__ import annotations

from typing import Any

from torch.utils import checkpoint

__all__ = ["keep_products"]

_PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "linear", "convolution")
"""Operators of ``aten`` that multiply matrices; those of attention begin with ``_scaled_dot_product``."""


def keep_products() -> Any:
    """Return the contexts of a checkpoint that keeps what products, convolutions and attention return::

        checkpoint(block, x, use_reentrant=False, context_fn=lowmem.keep_products)
        model.gradient_checkpointing_enable(  # of Hugging Face transformers
            gradient_checkpointing_kwargs={"use_reentrant": False, "context_fn": lowmem.keep_products}
        )

    Norms, activations, dropout and elementwise functions are computed again in backward. A layer and its adapter are
    two products there, each with its own rounding.

    Raises:
        RuntimeError: torch before 2.5, whose checkpoints have no policies.
    """
    if not hasattr(checkpoint, "CheckpointPolicy"):
        raise RuntimeError("torch before 2.5 has no policies of checkpoints: leave context_fn out")
    policies = checkpoint.CheckpointPolicy

    def policy(_: Any, operator: Any, *args: Any, **kwargs: Any) -> Any:
        own, _, name = operator._schema.name.partition("::")
        kept = own == "lowmem" or (own == "aten" and (name in _PRODUCTS or name.startswith("_scaled_dot_product")))
        return policies.MUST_SAVE if kept else policies.PREFER_RECOMPUTE

    return checkpoint.create_selective_checkpoint_contexts(policy)
