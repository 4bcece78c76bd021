from .atp_star import AtPStar as AtPStar
from .estimate import Estimate as Estimate
from .gradient import Gradient as Gradient
from .integrated import Integrated as Integrated
from .relp import RelP as RelP
from .second_order import SecondOrder as SecondOrder
