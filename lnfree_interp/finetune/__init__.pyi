from .callbacks import LossGuard as LossGuard, RemovalCallback as RemovalCallback, StatusLine as StatusLine
from .guard import Diverged as Diverged
from .progress import Guard as Guard
from .saving import (
    checkpoint_to_resume as checkpoint_to_resume,
    finished as finished,
    last_checkpoint as last_checkpoint,
    save_checkpoint as save_checkpoint,
)
from .trainable import load_trainable as load_trainable
from .training import RemovalTrainer as RemovalTrainer, remove_layernorm as remove_layernorm
