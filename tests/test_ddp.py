"""Two ranks that draw different gates: DDP needs no search for unused parameters, and the ranks stay equal."""

import os
import socket
import subprocess
import sys

RANK = """
import os, sys
import timm, torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
import sdzoo

rank, port = int(sys.argv[1]), sys.argv[2]
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
torch.manual_seed(0)
model = timm.create_model("sd_resnet20", drop_path_rate=0.6)
ddp = DistributedDataParallel(model)
optimizer = torch.optim.SGD(ddp.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
torch.manual_seed(100 + rank)
seen = []
for _ in range(4):
    optimizer.zero_grad()
    ddp(torch.randn(4, 3, 32, 32)).square().mean().backward()
    optimizer.step()
    seen.append(sdzoo.live_blocks(model))
flat = torch.cat([p.detach().flatten() for p in model.parameters()])
others = [torch.empty_like(flat) for _ in range(2)]
dist.all_gather(others, flat)
assert torch.isfinite(flat).all()
assert torch.equal(others[0], others[1]), "the ranks drifted apart"
draws = [None, None]
dist.all_gather_object(draws, seen)
assert draws[0] != draws[1], "the ranks drew the same gates: nothing was tested"
assert not all(map(all, seen)), "nothing was skipped"
print("equal", flush=True)
dist.barrier()
os._exit(0)  # now and then gloo's threads end the interpreter's own exit with SIGABRT
"""


def test_ranks_with_different_gates_stay_equal() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, str(rank), port],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"GLOO_SOCKET_IFNAME": "lo"},
        )
        for rank in range(2)
    ]
    try:
        for process in ranks:
            out, errors = process.communicate(timeout=240)
            assert process.returncode == 0, errors
            assert out == "equal\n"
    finally:
        for process in ranks:
            process.kill()
            process.communicate()
