"""The one `torch.library.Library` that all ops of this program are defined in, under the namespace `halfbyte`."""

import torch

LIBRARY = torch.library.Library("halfbyte", "DEF")
