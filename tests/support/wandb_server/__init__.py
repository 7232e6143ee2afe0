"""A W&B server for tests: a real HTTP server in a process of its own, that speaks as wandb-core 0.31 does.

What is not known of the real backend is refused and written down as a breach, never guessed at.
"""

from tests.support.wandb_server.client import KEY, StandIn

__all__ = ["KEY", "StandIn"]
