from .checking import check_model as check_model
from .result import Law as Law, ModelCheck as ModelCheck, Way as Way
