"""Sphinx configuration."""

import contextlib
import io
import sys
import tempfile
from pathlib import Path

from sphinx.application import Sphinx
from sphinx.errors import SphinxError

import free_adv

project = "free-adv"
author = "The free-adv authors"
copyright = author
version = release = free_adv.__version__
extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = "free-adv"
pygments_style, pygments_dark_style = "friendly", "github-dark"
html_theme_options = {
    "light_css_variables": {"code-font-size": "0.8rem"},
    "dark_css_variables": {"code-font-size": "0.8rem"},
}
html_extra_path = ["CITATION.cff"]
myst_heading_anchors = 3
autodoc_typehints = "description"
autodoc_member_order = "bysource"
napoleon_use_ivar = True
default_role = "code"


def every_public_name(app: Sphinx, env) -> None:
    """Stop the build if a public name, or a method of `FreeAdversarial`, is not in the API page."""
    names = [f"free_adv.{name}" for name in free_adv.__all__]
    for name, value in vars(free_adv.FreeAdversarial).items():
        if not name.startswith("_") and (callable(value) or isinstance(value, property)):
            names.append(f"free_adv.FreeAdversarial.{name}")
    missing = sorted(set(names) - set(env.get_domain("py").objects))
    if missing:
        raise SphinxError(f"public, and not in docs/api.md: {', '.join(missing)}")


def pictures_of_the_tutorial(app: Sphinx, error: Exception | None) -> None:
    """Run the tutorial, and put the pictures of this run in the place of the committed ones."""
    if error or app.builder.format != "html":
        return
    if "tutorial/gradients.png" not in app.builder.images:
        return  # built before, and the page has not changed
    sys.path.insert(0, str(Path(app.srcdir).parent / "examples" / "experiments"))
    import tutorial

    quiet = contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO())
    with tempfile.TemporaryDirectory() as folder, quiet[0], quiet[1]:
        tutorial.draw(tutorial.run(), Path(folder))
        for picture in Path(folder).iterdir():
            shown = app.builder.images[f"tutorial/{picture.name}"]
            picture.replace(Path(app.outdir) / "_images" / shown)


def setup(app: Sphinx) -> None:
    """Register both."""
    app.connect("env-check-consistency", every_public_name)
    app.connect("build-finished", pictures_of_the_tutorial)
