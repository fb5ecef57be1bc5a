from tools.check_links import ROOT, anchors, broken_links


def test_links_of_the_repository_lead_somewhere():
    assert list(broken_links(ROOT)) == []


def test_link_to_a_missing_file_or_heading_is_found(tmp_path):
    (tmp_path / "other.md").write_text("# There is this\n")
    (tmp_path / "page.md").write_text(
        "[a](other.md) [b](other.md#there-is-this) [c](https://example.org/x) [d](#own)\n"
        "# Own\n`[not a link](nowhere.md)`\n[e](lost.md) [f](other.md#no-such)\n"
    )

    assert list(broken_links(tmp_path)) == [
        "page.md: link=lost.md must lead to a file of the repository; correct it",
        "page.md: link=other.md#no-such must lead to a heading of other.md; correct it",
    ]


def test_anchors_are_made_as_on_github():
    text = (
        "# `modules.NAME.share`\n## What's new, today\n## Data\n## Data\n```\n# no heading\n```\n"
    )

    assert anchors(text) == {"modulesnameshare", "whats-new-today", "data", "data-1"}
