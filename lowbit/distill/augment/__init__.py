"""More text to distil on: a data set in, a larger one out.

augment        the function; its methods:
substitution   words replaced by a masked language model's, or by near ones (TinyBERT)
rules          words masked or replaced, pieces of sentences (for students that are no transformers)
neighbours     sentences of a corpus near to each example (MiniMax-kNN)
hardest        the one of them on which student and teacher differ most, chosen in each step
cache          chunks on disk: what is interrupted goes on where it was
"""

from .apply import augment
from .hardest import CandidateCollator, HardestNeighbour, with_candidates
from .masked_lm import MaskedLM
from .neighbours import add_neighbours, embed
from .rules import Rules
from .substitution import COPIES, Substitution, load_substitution
from .vectors import WordVectors, read_vectors, vectors_of

__all__ = [
    "COPIES",
    "CandidateCollator",
    "HardestNeighbour",
    "MaskedLM",
    "Rules",
    "Substitution",
    "WordVectors",
    "add_neighbours",
    "augment",
    "embed",
    "load_substitution",
    "read_vectors",
    "vectors_of",
    "with_candidates",
]
