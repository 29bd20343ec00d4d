"""Ends what a test runs as a kill does: in the middle, and nothing is done after it."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

ACTIONS = ("open", "fsync", "replace", "rename", "unlink", "mkdir", "rmdir", "scandir", "listdir")
"""Functions of ``os`` through which files are opened, made whole, renamed and removed."""


class Killed(BaseException):
    """No handler of errors sees it, and what handlers do to files on its way raises it again."""


@contextmanager
def killed_at(number: int) -> Iterator[list[str]]:
    """Let the n-th action on files in the block, and all after it, not happen; yield the actions that did not."""
    left, missed = number - 1, []

    def dying(name, action):
        def run(*args, **named):
            nonlocal left
            left -= 1
            if left < 0:
                missed.append(name)
                raise Killed(name)
            return action(*args, **named)

        return run

    with mock.patch.multiple(os, **{name: dying(name, getattr(os, name)) for name in ACTIONS}):
        yield missed
