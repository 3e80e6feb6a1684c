"""A figure of matplotlib as an SVG element that stands in a page of HTML."""

from __future__ import annotations

import io
import re
from xml.etree import ElementTree

import matplotlib
from matplotlib.figure import Figure

from jax_lora.study.plotting import STYLE

_FONT = re.compile(r"(?:(italic|oblique) )?(?:(bold|\d00) )?([\d.]+px) .*")
_REFERENCE = re.compile(r"#([\w.-]+)")
_METADATA = ("Creator", "Date", "Format", "Type")


def element(figure: Figure, name: str) -> str:
    """A figure as an `svg` element, the same letters for the same picture.

    Text stays text. Styles become attributes, which a page's policy need not allow; ids begin with
    the name, so that the figures of a page share none; nothing is left that names an address.

    Args:
      figure: laid out already.
      name: of letters, digits, "_" and "-", no two figures of a page the same.

    Returns:
      HTML, with a viewBox and without a size.
    """
    file = io.BytesIO()
    with matplotlib.rc_context({**STYLE, "svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(file, format="svg", metadata=dict.fromkeys(_METADATA))
    root = ElementTree.fromstring(file.getvalue())
    for parent in [*root.iter()]:
        for child in [*parent]:
            if _local(child.tag) in ("metadata", "style"):  # the style would be the page's, too
                parent.remove(child)
            child.tail = None  # line ends between elements
        parent.text = (parent.text or "").strip() or None
    targets = {
        target
        for one in root.iter()
        for key, value in one.attrib.items()
        if _local(key) in ("href", "clip-path", "style")
        for target in _REFERENCE.findall(value)
    }
    for one in root.iter():
        one.tag = _local(one.tag)
        one.attrib = _attributes(one.attrib, name, targets)
    root.attrib = {"viewBox": root.attrib["viewBox"]}
    return ElementTree.tostring(root, encoding="unicode")


def _local(name: str) -> str:
    return name.rpartition("}")[2]


def _attributes(given: dict[str, str], name: str, targets: set[str]) -> dict[str, str]:
    found = {_local(key): value for key, value in given.items()}
    for style in filter(None, map(str.strip, found.pop("style", "").split(";"))):
        key, _, value = style.partition(":")
        found[key.strip()] = value.strip()
    found.pop("font-family", None)  # the page's
    if font := _FONT.fullmatch(found.pop("font", "")):
        kinds = dict(zip(("font-style", "font-weight", "font-size"), font.groups(), strict=True))
        found |= {key: value for key, value in kinds.items() if value}
    if found.get("id") not in targets:
        found.pop("id", None)
    else:
        found["id"] = f"{name}-{found['id']}"
    if "d" in found:  # a hundredth of a point is no difference to the eye
        found["d"] = " ".join(re.sub(r"(\.\d\d)\d+", r"\1", found["d"]).split())
    for key in ("href", "clip-path"):
        if not found.get(key, "data:").startswith("data:"):
            found[key] = _REFERENCE.sub(rf"#{name}-\1", found[key])
    return found
