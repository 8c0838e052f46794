"""A run of two steps that dies in the second, and goes on from the first when torchrun starts it again."""

import os
import sys
from pathlib import Path

from tokenkit import parallel

folder = Path(sys.argv[1])
world = parallel.start(backend="gloo", timeout=30)
attempt = os.environ["TORCHELASTIC_RESTART_COUNT"]
(folder / f"begun-{attempt}-{world.rank}").touch()
done = world.broadcast((folder / "step").exists())
if not done:
    world.barrier()
    if world.is_main:
        (folder / "step").touch()
    world.barrier()
    if world.rank == 1:
        os._exit(9)
    world.barrier()
(folder / f"ended-{attempt}-{world.rank}").write_text(str(sum(world.gather(world.rank))))
parallel.stop(world)
