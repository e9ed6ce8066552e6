from .preflight import check_hub as check_hub
from .runner import SMOKE as SMOKE
from .runner import run_recipe as run_recipe
from .runner import shown as shown
from .scales import ScaleSetup as ScaleSetup
from .schema import Recipe as Recipe
from .schema import recipe_named as recipe_named
from .schema import recipes as recipes
