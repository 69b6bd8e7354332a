"""The documentation as a site: ``make docs`` writes it to build/docs, and any warning is an error."""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from hcot_lmeval import __version__  # noqa: E402

project, author, release = "hcot_lmeval", "the authors of hcot_lmeval", __version__
copyright = "Apache-2.0"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
source_suffix = {".md": "markdown"}
exclude_patterns = ["results/cells"]
html_theme = "furo"
html_title = f"hcot_lmeval {release}"
html_theme_options = {"navigation_with_keys": True}
html_copy_source = False

myst_heading_anchors = 3
myst_enable_extensions = ["colon_fence", "fieldlist"]

default_role = "literal"
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_default_options = {"members": True, "show-inheritance": False}
autoclass_content = "class"
napoleon_google_docstring, napoleon_numpy_docstring = True, False
napoleon_use_ivar = True
python_use_unqualified_type_names = True

LINK = re.compile(r"\[([^\]]*)\]\((\.\./[^)#\s]+)(#[^)]*)?\)")


def point_outside(app: object, name: str, source: list[str]) -> None:
    """Links to files of the repository lead to copies of them, those to its folders and other pages to nothing."""

    def changed(match: re.Match[str]) -> str:
        path = (ROOT / "docs" / name).parent.joinpath(match[2]).resolve()
        if not path.exists():
            raise FileNotFoundError(f"{name}: {match[2]} does not exist")
        stays = path.is_relative_to(ROOT / "docs") or (path.is_file() and path.suffix != ".md")
        return match[0] if stays else "[README](index.md)" if path == ROOT / "README.md" else match[1]

    if name == "index":  # the README, as it reads from here
        readme = (ROOT / "README.md").read_text(encoding="utf-8").partition("\n")[2]
        readme = re.sub(r"\]\((?!https?:|#)(?:docs/)?", lambda m: "](" if "docs/" in m[0] else "](../", readme)
        source[0] = source[0].replace("<!-- README -->", readme)
    source[0] = LINK.sub(changed, source[0])


def setup(app: object) -> None:
    """Registers what stands above; Sphinx calls it."""
    app.connect("source-read", point_outside)  # type: ignore[attr-defined]
    sys.path.insert(0, str(ROOT / "docs"))
    import settings_tables

    app.connect("builder-inited", lambda _: settings_tables.write(ROOT / "docs" / "reference"))  # type: ignore[attr-defined]
