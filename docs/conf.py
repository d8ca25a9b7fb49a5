"""How Sphinx makes pages of these Markdown files: `make docs`."""

import hf_adaptive_batch


project = "hf_adaptive_batch"
author = "The hf_adaptive_batch developers"
version = release = hf_adaptive_batch.__version__

extensions = [
    "myst_parser",  # pages in Markdown
    "sphinx.ext.autodoc",  # the reference, from docstrings
    "sphinx.ext.napoleon",  # … in Google's form
]
html_theme = "furo"
# Small enough that a line of Python, of up to 98 characters, fits beside the menu.
_variables = {"code-font-size": "72%"}
html_theme_options = {"light_css_variables": _variables, "dark_css_variables": _variables}
html_title = f"hf_adaptive_batch {release}"
html_show_sphinx = False
html_show_copyright = False
exclude_patterns = ["images"]
myst_heading_anchors = 3  # links to headings, as on the web view of a repository
myst_enable_extensions = ["colon_fence"]
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
napoleon_use_ivar = True  # attributes are listed once
napoleon_use_rtype = False  # types stand in the signature
suppress_warnings = [
    "myst.xref_missing",  # links to files of the repository that are no pages
    "ref.python",  # a name that is exported under two paths
]


def mark_code(app, what, name, obj, options, lines):
    """An indented block of a docstring, before its sections, is code."""
    place = 0
    while place < len(lines) and not lines[place].endswith(SECTIONS):
        begins = lines[place].startswith("    ") and place and not lines[place - 1]
        if begins and not lines[max(place - 2, 0)].startswith("    "):
            lines[place:place] = ["::", ""]
            place += 2
        place += 1


SECTIONS = ("Args:", "Attributes:", "Raises:", "Returns:", "Yields:")


def setup(app):
    """Sphinx calls this."""
    app.connect("autodoc-process-docstring", mark_code, priority=100)  # before napoleon
