"""What of the README goes on a package page; the build backend runs this."""

import re
from pathlib import Path

from hatchling.metadata.plugin.interface import MetadataHookInterface

# A package page has no files beside it: pictures of the repository are left out there,
# and of links to its files the words stay.
PICTURE = re.compile(r"!\[[^\]]*\]\((?!https?:)[^)]*\)\n+")
LINK = re.compile(r"\[([^\]]+)\]\((?!https?:|#)[^)]*\)")


class PackagePage(MetadataHookInterface):
    """Fills in the `readme` of the project's metadata."""

    def update(self, metadata: dict) -> None:
        """Add the README without what doesn't work elsewhere."""
        text = (Path(self.root) / "README.md").read_text(encoding="utf-8")
        text = LINK.sub(r"\1", PICTURE.sub("", text))
        metadata["readme"] = {"content-type": "text/markdown", "text": text}
