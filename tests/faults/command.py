"""What the two commands share: a number in their arguments, and how they end on bad input."""

from __future__ import annotations

import argparse
import sys


def natural(text: str) -> int:
    """Parse a whole number above 0."""
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number above 0")
    return int(text)


def refuse(command: str, reason: str) -> int:
    """Say in one line why a command cannot run, and return its exit code."""
    print(f"{command}: {' '.join(reason.split())[:280]}", file=sys.stderr)
    return 2
