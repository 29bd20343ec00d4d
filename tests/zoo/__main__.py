"""Prints what share of each architecture's numbers `convert` stores, embeddings in 8 bits and the rest in 4.

``python -m tests.zoo [NAME ...]``
"""

import logging
import sys
import warnings

import lowmem
from tests.zoo.architectures import ARCHITECTURES
from tests.zoo.stored import numbers

LARGEST = 5  # kinds of dense parameters that a row names


def row(name: str) -> str:
    architecture = ARCHITECTURES[name]
    dense = architecture.make()
    try:
        stored, kept = numbers(dense, lowmem.convert(architecture.make(), lowmem.FourBit("nf4")))
    except (TypeError, ValueError) as reason:
        return f"| {name} | {sum(p.numel() for p in dense.parameters()):,} | - | {reason} |"
    total = stored + kept.total()
    largest = ", ".join(f"{kind} {count / total:.1%}" for kind, count in kept.most_common(LARGEST))
    return f"| {name} | {total:,} | {stored / total:.1%} | {largest} |"


def main() -> None:
    print("| architecture | numbers | stored | what stays dense, and its share |\n|---|---|---|---|")
    for name in sys.argv[1:] or ARCHITECTURES:
        print(row(name), flush=True)


if __name__ == "__main__":
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    main()
