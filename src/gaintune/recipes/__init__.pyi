from .report import SMOKE as SMOKE
from .report import shown as shown
from .runner import run_recipe as run_recipe
from .schema import Recipe as Recipe
from .schema import recipe_named as recipe_named
from .schema import recipes as recipes
