"""A run of two steps that dies in the second, and goes on from the first when torchrun starts it again."""

import os
import sys
from pathlib import Path

from tokenkit import parallel

folder = Path(sys.argv[1])
world = parallel.start(backend="gloo", timeout=30)
attempt = os.environ["TORCHELASTIC_RESTART_COUNT"]
(folder / f"begun-{attempt}-{world.rank}").touch()
done = parallel.broadcast_json((folder / "step").exists(), world)
if not done:
    parallel.barrier(world)
    if world.is_main:
        (folder / "step").touch()
    parallel.barrier(world)
    if world.rank == 1:
        os._exit(9)
    parallel.barrier(world)
(folder / f"ended-{attempt}-{world.rank}").write_text(str(sum(parallel.gather_json(world.rank, world))))
parallel.stop(world)
