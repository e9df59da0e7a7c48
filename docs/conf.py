"""The site of these pages: `make docs` writes build/docs/index.html."""

project = "DSMD"
author = copyright = "the DSMD authors"
extensions = ["myst_parser"]
html_theme = "furo"
html_title = "DSMD"
myst_heading_anchors = 3  # headings are anchors, as on code hosts
suppress_warnings = ["myst.header"]  # a page may start with a table's heading
html_static_path = ["static"]
html_css_files = ["site.css"]
