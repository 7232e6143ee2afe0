"""Intake: answer workers, and put what they say on disk. It does nothing else, so that it always answers.

    socket ─▶ front ─▶ runs: which run is meant? ─▶ run: roster ─▶ group commit ─▶ spool ─▶ ACK

- one process and one socket, for one run or for the runs that its workers name; each run has a spool, a roster
  and a delivery of its own
- it never imports wandb: delivery, which does, is a process of its own
- when the process that started it is gone, it serves until its sessions left, then closes its runs itself
"""

from sidestepd.intake.run import Intake

__all__ = ["Intake"]
