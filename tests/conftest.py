"""One thread for all tests: small matrices lose time on more, and bits may depend on the number."""

import torch

torch.set_num_threads(1)
