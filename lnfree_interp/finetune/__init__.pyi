from .callbacks import (
    Diverged as Diverged,
    LossGuard as LossGuard,
    RemovalCallback as RemovalCallback,
    StatusLine as StatusLine,
    last_checkpoint as last_checkpoint,
)
from .trainable import load_trainable as load_trainable
from .training import (
    RemovalTrainer as RemovalTrainer,
    checkpoint_to_resume as checkpoint_to_resume,
    remove_layernorm as remove_layernorm,
    save_checkpoint as save_checkpoint,
)
