"""Selective activation checkpointing: keeps the results of matrix products and recomputes the rest, which is cheap
(Korthikanti et al., arXiv 2205.05198, section 5)."""

from __future__ import annotations

from typing import Any

from torch.utils import checkpoint

_PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "linear", "convolution")
"""``aten`` operators that multiply matrices; names of attention operators begin with ``_scaled_dot_product``."""


def keep_products() -> Any:
    """Return the contexts of a checkpoint that keeps the results of matrix products, convolutions and attention::

        checkpoint(block, x, use_reentrant=False, context_fn=lowmem.keep_products)
        model.gradient_checkpointing_enable(  # of Hugging Face transformers
            gradient_checkpointing_kwargs={"use_reentrant": False, "context_fn": lowmem.keep_products}
        )

    Norms, activations, dropout and elementwise functions are recomputed in backward. In such a checkpoint a layer and
    its adapter are two separate products, each of which rounds its result.
    """
    policies = checkpoint.CheckpointPolicy

    def save_or_recompute_policy(_: Any, operator: Any, *args: Any, **kwargs: Any) -> Any:
        namespace, _, name = operator._schema.name.partition("::")
        is_saved = namespace == "lowmem" or (
            namespace == "aten" and (name in _PRODUCTS or name.startswith("_scaled_dot_product"))
        )
        return policies.MUST_SAVE if is_saved else policies.PREFER_RECOMPUTE

    return checkpoint.create_selective_checkpoint_contexts(save_or_recompute_policy)
