"""Makes the plans of the recipes anew: ``python -m tools.regenerate_recipes [--check] [NAME ...]``.

With ``--check`` nothing is written, and the exit status is 1 where a plan is not what the planner
gives now. Write the plans anew after a change of the planner, the cost model, a model or a cluster.
"""

import argparse
import sys
from collections.abc import Sequence

from megatron_mosaic.errors import PlanError
from megatron_mosaic.recipes.catalog import RECIPES, Recipe, find_recipe


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0; 1 if a plan is out of date; 2 if there is no such recipe."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help="recipes; default: all")
    parser.add_argument("--check", action="store_true", help="compare, and write nothing")
    args = parser.parse_args(argv)
    try:
        recipes = [find_recipe(name) for name in args.names or RECIPES]
        stale = [recipe.name for recipe in recipes if _regenerate(recipe, write=not args.check)]
    except PlanError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 1 if args.check and stale else 0


def _regenerate(recipe: Recipe, *, write: bool) -> bool:
    """Makes one plan. Returns whether it is another than the one that lies there."""
    made = recipe.made_plan().to_yaml()
    path = recipe.plan_path
    changed = not path.exists() or path.read_text(encoding="utf-8") != made
    if changed and write:
        path.write_text(made, encoding="utf-8")
    print(f"{recipe.name}: {'changed' if changed else 'as it was'}", flush=True)
    return changed


if __name__ == "__main__":
    sys.exit(main())
