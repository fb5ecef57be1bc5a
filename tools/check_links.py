"""Checks the links of every Markdown file: files, folders and headings of the repository.

    python -m tools.check_links

Addresses of the web are left alone: whether they answer today says nothing of the repository.
"""

import re
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

_LINK = re.compile(r"\[[^\]]*\]\(([^()\s]+)\)")
_CODE = re.compile(r"^```.*?^```|`[^`\n]*`", re.MULTILINE | re.DOTALL)
_HEADING = re.compile(r"^#{1,6} (.+)$", re.MULTILINE)


def broken_links(root: Path) -> Iterator[str]:
    """Yields a line for each link that leads nowhere."""
    for path in sorted(documents(root)):
        for link in _LINK.findall(_CODE.sub("", path.read_text(encoding="utf-8"))):
            if (fault := _fault(path, link)) is not None:
                yield f"{path.relative_to(root)}: link={link} must lead to {fault}; correct it"


def documents(root: Path) -> Iterator[Path]:
    """Yields the Markdown files of the repository, not those of environments and caches."""
    for path in root.rglob("*.md"):
        inside = path.relative_to(root).parts
        if not any(part.startswith(".") or part in ("out", "build") for part in inside):
            yield path


def anchors(text: str) -> set[str]:
    """Names of a file's headings, as GitHub makes them: the second of a name has -1 behind it."""
    found: dict[str, int] = {}
    names = set()
    for heading in _HEADING.findall(re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)):
        kept = re.sub(r"[^\w\- ]", "", re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower())
        name = kept.strip().replace(" ", "-")
        times = found.get(name, 0)
        names.add(f"{name}-{times}" if times else name)
        found[name] = times + 1
    return names


def _fault(path: Path, link: str) -> str | None:
    """What a link lacks; None if it is sound."""
    if re.match(r"[a-z]+:", link):
        return None
    target, _, anchor = link.partition("#")
    file = (path.parent / target).resolve() if target else path
    if not file.exists():
        return "a file of the repository"
    if anchor and anchor not in anchors(file.read_text(encoding="utf-8")):
        return f"a heading of {file.name}"
    return None


def main() -> int:
    """Prints what is broken. Returns 1 if anything is."""
    faults = list(broken_links(ROOT))
    print("\n".join(faults), file=sys.stderr, end="\n" if faults else "")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
