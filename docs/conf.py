"""Sphinx: `make docs` builds these pages into docs/_build/html, warnings being errors."""

import jaxrl_llm

project = "jaxrl_llm"
release = jaxrl_llm.__version__
extensions = ["myst_parser"]
myst_enable_extensions = ["amsmath", "colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"jaxrl_llm {release}"
