"""Runs the loop of the guide; in the first start the second process is killed in its third step."""

import os
import runpy
import signal
import sys

import torch

step = torch.optim.AdamW.step
calls = []


def step_or_die(self, *arguments, **named):
    calls.append(None)
    if len(calls) == 3 and os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        os.kill(os.getpid(), signal.SIGKILL)
    return step(self, *arguments, **named)


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.optim.AdamW.step = step_or_die
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")
