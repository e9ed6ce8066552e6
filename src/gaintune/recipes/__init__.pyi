from .catalogue import recipe_named as recipe_named
from .catalogue import recipes as recipes
from .runner import run_recipe as run_recipe
from .schema import Recipe as Recipe
from .writing import SMOKE as SMOKE
from .writing import shown as shown
