"""The swarm as a member sees it: who is there, what they announce, and how to reach them."""

import os

import torch.multiprocessing

# hivemind sets how every process that imports it shares tensors, the user's own included. What is set stays.
_STRATEGY = torch.multiprocessing.get_sharing_strategy()  # type: ignore[no-untyped-call]
os.environ.setdefault("HIVEMIND_MEMORY_SHARING_STRATEGY", _STRATEGY)
