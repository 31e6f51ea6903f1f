"""More text to distil on: a data set in, a larger one out.

augment        the function; its methods:
substitution   words replaced by a masked language model's, or by near ones (TinyBERT)
rules          words masked or replaced, pieces of sentences (for students that are no transformers)
neighbours     sentences of a corpus near to each example, and the hardest of them for the student (MiniMax-kNN)
cache          chunks on disk: what is interrupted goes on where it was
"""

from .apply import augment
from .masked_lm import MaskedLM
from .substitution import COPIES, Substitution
from .vectors import WordVectors, read_vectors, vectors_of

__all__ = ["COPIES", "MaskedLM", "Substitution", "WordVectors", "augment", "read_vectors", "vectors_of"]
