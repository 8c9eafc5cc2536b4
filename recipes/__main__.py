"""`python -m soul_recipes COMMAND` is `soul COMMAND`."""

import sys

from soul_recipes.command import main


if __name__ == "__main__":
    sys.exit(main())
