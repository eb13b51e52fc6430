"""train.py as a test of elastic runs starts it: every rank notes which images its optimizer steps really get.

The images are of one grey each, and no two of the same: a pixel tells which image it is. `NOTES` names the folder for
the notes; `STOP_AT`, as "rank:step", the rank that gets SIGTERM during a step.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

from dsyolo import train
from dsyolo.engine.engine import Engine


def main() -> int:
    """Runs train.py's command line."""
    plain = Engine.train_step
    rank, size = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
    notes = Path(os.environ["NOTES"], f"rank{rank}.jsonl")

    def noting(self, batches, step):
        if os.environ.get("STOP_AT") == f"{rank}:{step}":
            os.kill(os.getpid(), signal.SIGTERM)
        result = plain(self, batches, step)
        images = [image for batch in batches for image in batch.images.flatten(1)]
        greys = [image.unique().item() for image in images]
        with notes.open("a") as file:
            file.write(json.dumps({"step": step, "ranks": int(size), "greys": greys}) + "\n")
        return result

    Engine.train_step = noting
    return train.main()


if __name__ == "__main__":
    sys.exit(main())
