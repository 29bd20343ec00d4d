"""Predicts the peak memory of QLoRA in each of several processes from the sizes of a model."""

from __future__ import annotations

from lowmem.errors import short_repr


def bytes_per_rank(
    parameters: int,
    adapters: int,
    blocks: int,
    rest: int,
    ranks: int,
    *,
    activations: int = 0,
    in_blocks: int | None = None,
    bits: float = 4.5,
    rest_bits: float | None = None,
) -> int:
    """Return the peak bytes of a QLoRA step in each of the R processes that ``shard`` a model.

    With ``w = bits / 8``, ``v = rest_bits / 8``, N parameters (E of them outside of the L blocks), A numbers in
    adapters, and a block of ``B = (w (N - E) + 4 A) / L`` bytes::

        (w (N - E) + v E + 16 A) / R              weights; adapters, their gradients and AdamW's moments in float32
        + activations                             if R = 1; else the activations, and the weights gathered meanwhile:
        + v E + max(activations + B, in_blocks + 3 B + 8 A / L)

    Gathered are the weights outside of blocks; the last block while the output layer computes; later the block that
    computes, the next block and its receive buffer, and the gradients of a block's adapters, before and while sent.

    Args:
        parameters: of the dense model.
        adapters: numbers in all adapters, which are in the blocks.
        blocks: their number; all have one size.
        rest: parameters outside of the blocks: embeddings and output layers.
        ranks: number of processes; with 1 nothing is sharded.
        activations: bytes of a step beside weights, gradients and optimizer, for the batch of one process:
            ``lowmem.measure.backward_bytes`` less the gradients, or ``lowmem.plan``.
        in_blocks: the same without output layer and loss, thus without logits and without the output layer's weight,
            which is dequantized for more than 8 rows if it is in 8 bits. None takes ``activations``: an upper bound.
        bits: per weight in blocks: 4.5 for nf4 in blocks of 64 with float32 scales, 16 for ``Half``.
        rest_bits: per weight outside of blocks; None takes 8.125 if ``bits`` is below 8, since ``FourBit`` stores
            embeddings and output layers in 8 bits, else ``bits``.

    Raises:
        ValueError: a negative number, or a part that is larger than the whole.
    """
    outside = rest_bits if rest_bits is not None else 8.125 if bits < 8 else bits
    positive_arguments = {
        "parameters": parameters,
        "blocks": blocks,
        "ranks": ranks,
        "bits": bits,
        "rest_bits": outside,
    }
    for name, value in positive_arguments.items():
        if not value > 0:
            raise ValueError(f"{name}={short_repr(value)} must be above 0")
    if not 0 <= rest <= parameters or adapters < 0:
        raise ValueError(
            f"rest={short_repr(rest)} must be part of parameters={short_repr(parameters)}, and "
            f"adapters={short_repr(adapters)} at "
            "least 0"
        )
    computing = activations if in_blocks is None else in_blocks
    if not 0 <= computing <= activations:
        raise ValueError(
            f"activations={short_repr(activations)} must be at least 0, and in_blocks={short_repr(in_blocks)} a part "
            "of them"
        )
    inside, outside = bits / 8 * (parameters - rest), outside / 8 * rest
    persistent = (inside + outside + 16 * adapters) / ranks
    block = (inside + 4 * adapters) / blocks
    if ranks == 1:
        return round(persistent + activations)
    return round(persistent + outside + max(activations + block, computing + 3 * block + 8 * adapters / blocks))
