"""Launchable recipes, their settings and their data; installed as `soul_recipes`."""
