"""Pages and figures, read for their tags and texts."""

from html.parser import HTMLParser
from xml.etree import ElementTree


class Reader(HTMLParser):
    """Every tag with its attributes, and the text outside of scripts and styles."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.text, self.open, self.scripts = [], "", [], []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.open.append(tag)

    def handle_endtag(self, tag):
        while self.open and self.open.pop() != tag:
            pass

    def handle_data(self, data):
        if "script" in self.open[-1:]:
            self.scripts.append(data)
        elif "style" not in self.open[-1:]:
            self.text += data


def svg_texts(svg):
    return [node.text for node in ElementTree.fromstring(svg).iter() if node.tag.endswith("}text")]
