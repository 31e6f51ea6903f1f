"""Early exit: ramps behind the layers of a classifier, and when a sentence leaves by one of them.

add_exits, freeze_backbone      ramps; all else frozen
set_exit                        by entropy, patience or a learned certainty
exit_losses                     objectives that train ramps
front                           speed beside accuracy of a criterion's thresholds
"""

from __future__ import annotations

from .criteria import Certainty, Entropy, NormalizedEntropy, Patience
from .front import ExitFront, ExitPoint, exit_front, exit_scores
from .objectives import ExitCertaintyLoss, ExitLogitsLoss, ExitTaskLoss
from .verbs import add_exits, freeze_backbone, set_exit

__all__ = [
    "Certainty",
    "Entropy",
    "ExitCertaintyLoss",
    "ExitFront",
    "ExitLogitsLoss",
    "ExitPoint",
    "ExitTaskLoss",
    "NormalizedEntropy",
    "Patience",
    "add_exits",
    "exit_front",
    "exit_scores",
    "freeze_backbone",
    "set_exit",
]
