from .requirements import paper_memory as paper_memory
from .runner import SMOKE as SMOKE
from .runner import run_recipe as run_recipe
from .runner import shown as shown
from .schema import Recipe as Recipe
from .schema import recipe_named as recipe_named
from .schema import recipes as recipes
