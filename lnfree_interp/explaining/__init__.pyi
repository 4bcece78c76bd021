from .first_look import explain as explain
from .result import Explanation as Explanation
