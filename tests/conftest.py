"""Settings of every test."""

import torch

# Tiny models lose far more to the hand-over between threads than they gain, the more so on a shared machine.
torch.set_num_threads(1)
