"""What QLoRA takes in each of several processes, from the sizes of a model."""

from __future__ import annotations

from lowmem.errors import show

__all__ = ["bytes_per_rank"]


def bytes_per_rank(
    parameters: int,
    adapters: int,
    blocks: int,
    rest: int,
    ranks: int,
    *,
    activations: int = 0,
    bits: float = 4.5,
    rest_bits: float | None = None,
) -> int:
    """Return the peak bytes of a step in each of the processes that share a model (``shard``) and train adapters.

    With ``w = bits / 8`` and ``v = rest_bits / 8``, N parameters, of which E are outside of the L blocks, and A
    numbers in adapters::

        (w (N - E) + v E + 16 A) / R + activations           weights; A, its gradient and AdamW's moments in float32
        + v E + 3 (w (N - E) + 4 A) / L + 8 A / L, if R > 1  what is whole for a while

    What is whole: the weights outside of blocks; of blocks the one that computes, the next one, and the buffer that
    it comes in; the gradients of a block's adapters, once as they are made and once as they are sent.

    Args:
        parameters: of the dense model.
        adapters: numbers in all adapters, which lie in the blocks.
        blocks: how many there are, of one size.
        rest: parameters outside of the blocks: embeddings and output layers.
        ranks: how many processes; 1: one that does not share.
        activations: bytes that a step takes beside weights, gradients and optimizer, for the batch of one process:
            ``lowmem.measure.backward_bytes`` less the gradients, or ``lowmem.plan``.
        bits: of a stored weight: 4.5 for nf4 in blocks of 64 with float32 scales, 16 for ``Half``.
        rest_bits: of one outside of the blocks; None: 8.5 where ``bits`` is below 8, as ``FourBit`` keeps embeddings
            and output layers in 8 bits, else ``bits``.

    Raises:
        ValueError: a number that cannot be.
    """
    outside = rest_bits if rest_bits is not None else 8.5 if bits < 8 else bits
    given = {"parameters": parameters, "blocks": blocks, "ranks": ranks, "bits": bits, "rest_bits": outside}
    for name, value in given.items():
        if not value > 0:
            raise ValueError(f"{name}={show(value)} must be above 0")
    if not 0 <= rest <= parameters or adapters < 0 or activations < 0:
        raise ValueError(
            f"rest={show(rest)} must be part of parameters={show(parameters)}, and adapters={show(adapters)} and "
            f"activations={show(activations)} at least 0"
        )
    inside, outside = bits / 8 * (parameters - rest), outside / 8 * rest
    kept = (inside + outside + 16 * adapters) / ranks
    block = (inside + 4 * adapters) / blocks
    whole = outside + 3 * block + 8 * adapters / blocks if ranks > 1 else 0.0
    return round(kept + whole + activations)
