"""``lowmem fit`` in several processes, of which the second is killed in step 5 of its first life."""

import os
import signal

from lowmem.__main__ import main
from lowmem.distributed.torchrun_processes import ReplicatedProcessGroup, ShardedProcessGroup

clips = {kind: kind.clip_grad_norm for kind in (ShardedProcessGroup, ReplicatedProcessGroup)}
calls = []


def clip_or_die(self, parameters, most):
    calls.append(None)
    if self.rank == 1 and len(calls) == 5 and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        os.kill(os.getpid(), signal.SIGKILL)
    return clips[type(self)](self, parameters, most)


if __name__ == "__main__":
    ShardedProcessGroup.clip_grad_norm = ReplicatedProcessGroup.clip_grad_norm = clip_or_die
    raise SystemExit(main())
