from .compare import ModelComparison as ModelComparison, compare_models as compare_models
from .hellaswag import HellaSwag as HellaSwag, hellaswag as hellaswag, hellaswag_items as hellaswag_items
from .loss import LossEvaluation as LossEvaluation, WorstSequence as WorstSequence, evaluate_loss as evaluate_loss
from .samples import Samples as Samples, generate_samples as generate_samples
from .table import LossTable as LossTable, loss_table as loss_table
from .tokens import TokenLosses as TokenLosses, token_losses as token_losses
