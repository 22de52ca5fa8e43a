"""Bundled worlds: what their protocols draw and compare with. A module offers PROMPTS, functions by the name of a set."""
