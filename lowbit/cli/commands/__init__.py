"""One function a command: its arguments, what it does by calling the package, and what it prints."""

from .checkpoints import doctor, info, quantize, split
from .measuring import bench, evaluate
from .recipes import recipes
from .training import distill, search_length

COMMANDS = (quantize, distill, recipes, split, evaluate, bench, search_length, info, doctor)
