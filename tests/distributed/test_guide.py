"""The loop of docs/guides/many-machines.md trains under torchrun as in one process, and goes on after a kill."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn import functional

import lowmem
from tests.distributed.ranks import needs_ranks

pytestmark = needs_ranks

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "guides" / "many-machines.md").read_text(encoding="utf8")
(CODE,) = [one for one in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL) if "def main(folder" in one]


def losses_of_one_process():
    own = {"__name__": "page"}
    exec(compile(CODE, "train.py", "exec"), own)
    model = own["make"]()
    optimizer = torch.optim.AdamW([one for one in model.parameters() if one.requires_grad], lr=1e-2)
    losses = []
    for step in range(4):
        batch = torch.randint(64, (5, 9), generator=torch.Generator().manual_seed(step))
        loss = functional.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, own["make"]


@pytest.mark.distributed
def test_torchrun_starts_it_again_after_a_process_was_killed(tmp_path):
    (tmp_path / "train.py").write_text(CODE)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["--max-restarts", "1", ROOT / "tests" / "distributed" / "killed.py", "train.py", tmp_path]
    named = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        command, cwd=tmp_path, env={**os.environ, **named}, capture_output=True, text=True, timeout=1800
    )
    assert done.returncode == 0, done.stderr
    assert "exitcode: -9" in done.stderr  # which the agent says of the one that was killed
    told = [(int(step), float(loss)) for step, loss in re.findall(r"step (\d): loss (.*)", done.stdout)]
    numbers = [step for step, _ in told]
    assert numbers in ([1, 2, 3, 4], [1, 2, 2, 3, 4])  # the state of the second step may not be whole yet
    expected, make = losses_of_one_process()
    for step, loss in told:
        assert loss == pytest.approx(expected[step - 1], abs=1e-5, rel=0)
    base = lowmem.load_adapter(make(), tmp_path / "adapter.safetensors")
    assert not torch.equal(base(torch.tensor([[3, 1]])), make()(torch.tensor([[3, 1]])))


def test_the_table_is_what_the_formula_says():
    rows = re.findall(r"^\| (\d+B) \| (.*) \|$", PAGE, re.MULTILINE)
    assert [name for name, _ in rows] == ["1B", "8B", "70B"]
    for _, cells in rows:
        sizes = [int(one.replace(",", "")) for one in cells.split(" | ")[:4]]
        figures = cells.split(" | ")[4:]
        n, rest, blocks, adapters = sizes
        found = [lowmem.bytes_per_rank(n, adapters, blocks, rest, ranks) / 2**30 for ranks in (1, 2, 4, 8)]
        assert figures == [f"{one:.2f}" for one in found]
