"""The gallery's page as an HTML parser reads it, its thumbnails beside the images they are of, and hostile names."""

import base64
import io
import re
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from PIL import Image

from evaluation import gallery
from images import ArrayImages, open_folder
from pictures import picture, write
from utils import UserError


class Parser(HTMLParser):
    """Collects start tags with their attributes, and text."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.text = [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.text.append(data)

    def all(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]


def gray_images(num=40, num_classes=4):
    """Image i is of the gray level 5 i, and of class i % num_classes."""
    pixels = torch.arange(num, dtype=torch.uint8).mul(5)[:, None, None, None].expand(-1, 1, 10, 10)
    names = [f"class {label}" for label in range(num_classes)]
    return ArrayImages("gray", pixels, np.arange(num) % num_classes, names)


def decoded(tag):
    kind, _, content = tag["src"].partition(";base64,")
    image = Image.open(io.BytesIO(base64.b64decode(content)))
    assert kind == f"data:image/{image.format.lower()}"
    return image


def test_thumbnails_are_of_the_images_that_they_name(tmp_path):
    images, codes = gray_images(), np.arange(40) // 8
    page, _ = written(tmp_path, images, codes)
    tags = page.all("img")
    assert len(tags) == 5 * 8
    assert all(tag["src"].startswith("data:image/png") for tag in tags)  # small ones are exact
    seen = [(int(tag["alt"].split("[")[1][:-1]), np.array(decoded(tag)), tag["alt"].split(",")[0]) for tag in tags]
    assert sorted(index for index, _, _ in seen) == list(range(40))
    for index, pixels, label in seen:
        assert (pixels == 5 * index).all()
        assert label == f"class {index % 4}"
    facts = [text for text in page.text if "of all" in text]
    assert facts == ["8 images, 20 % of all; 25 % class 0"] * 5


def written(tmp_path, images, codes, **options):
    figure, page = gallery.write_gallery(tmp_path / "gallery_a", "a title", images, codes, **options)
    assert (figure.name, page.name) == ("gallery_a.png", "gallery_a.html")
    return Parser(page.read_text(encoding="utf-8")), figure


def test_fullest_codes_first_then_others_at_random():
    codes = np.repeat([50, 3, 8, 70, 2, 1, 9, 4], [9, 30, 9, 20, 1, 1, 2, 3])
    assert gallery.choose_codes(codes, 6)[:3] == [3, 70, 8]
    others = [frozenset(gallery.choose_codes(codes, 6, seed)[3:]) for seed in range(60)]
    assert set().union(*others) == {50, 2, 1, 9, 4}
    assert all(len(drawn) == 3 for drawn in others)
    assert len(set(others)) == 10  # all that are possible, (5 choose 3)
    assert gallery.choose_codes(codes, 6, 4) == gallery.choose_codes(codes, 6, 4)
    assert sorted(gallery.choose_codes(codes, 100)) == [1, 2, 3, 4, 8, 9, 50, 70]
    assert gallery.choose_codes(codes, 1) == [3]


def test_images_of_a_code_are_drawn_at_random_not_the_first():
    images = gray_images(40, 2)
    images.labels = np.repeat([0, 1], [20, 20])  # sorted by class, as folders are
    group = gallery.describe(images, np.zeros(40), 0)
    assert len(set(group["indices"])) == gallery.SHOWN
    assert {"class 0", "class 1"} == set(group["classes"])
    assert (group["size"], group["share"], group["purity"]) == (40, 1, 0.5)
    assert group["indices"] != gallery.describe(images, np.zeros(40), 0, seed=1)["indices"]


def test_nothing_leads_out_of_the_page_and_links_lead_to_codes(tmp_path):
    page, _ = written(tmp_path, gray_images(), np.arange(40) // 8)
    allowed = {"html", "head", "meta", "title", "style", "body", "header", "nav", "main", "section", "figure"}
    allowed |= {"figcaption", "img", "ul", "li", "a", "h1", "h2", "p", "span"}
    assert {tag for tag, _ in page.tags} == allowed
    assert not any("url(" in text or "@import" in text for text in page.text)
    assert "default-src 'none'" in page.all("meta")[1]["content"]
    ids = [section["id"] for section in page.all("section")]
    assert [link["href"] for link in page.all("a")] == [f"#{name}" for name in ids]
    assert all(tag["src"].startswith("data:image/") for tag in page.all("img"))


HOSTILE = [
    "<script>alert(1)",
    '" onerror="alert(1)',
    "'&amp;<b>",
    "$\\frac{$",
    "x" * 200,
    b"\xff\n".decode(errors="surrogateescape"),
]


def test_hostile_names_stay_text(tmp_path):
    for name in HOSTILE:
        write(tmp_path / "images" / name / f"{name}.png", picture(20, 20))
    images = open_folder(tmp_path / "images", "train")
    assert images.classes == sorted(HOSTILE, key=lambda name: name.encode(errors="surrogateescape"))
    title = " ".join(HOSTILE)
    paths = gallery.write_gallery(tmp_path / "g", title, images, np.arange(len(images)))
    page = Parser(paths[1].read_text(encoding="utf-8"))
    assert not page.all("script") and not page.all("b")
    assert {frozenset(tag) for tag in page.all("img")} == {frozenset(("class", "alt", "src"))}
    said = {tag["alt"] for tag in page.all("img")}
    assert {name.rsplit(", ", 1)[0] for name in said} == set(map(gallery.printable, HOSTILE))
    assert page.text.count(gallery.printable(title)) == 2  # as title and as heading


def test_large_photographs_become_small(tmp_path):
    for i in range(14):  # noise is the worst for JPEG
        noise = np.random.default_rng(i).integers(0, 256, (96, 96, 3)).repeat(2 if i == 3 else 1, axis=0)
        write(tmp_path / "images" / f"{i}.png", noise.astype(np.uint8))
    images = open_folder(tmp_path / "images", "train")
    page, figure = written(tmp_path, images, np.zeros(14, int))
    sizes = {tag["alt"]: decoded(tag).size for tag in page.all("img")}
    assert len(sizes) == gallery.SHOWN
    assert sizes.pop("3.png") == (48, 96)
    assert set(sizes.values()) == {(96, 96)}
    assert (tmp_path / "gallery_a.html").stat().st_size < 14_000 * gallery.SHOWN + 5000
    assert "14 images, 100 % of all" in page.text  # no labels, no majority
    assert Image.open(figure).size[0] > 1000


def test_the_figure_shows_each_image_in_its_place():
    square = np.full((102, 102, 3), 255, np.uint8)
    gallery.put(square, Image.fromarray(np.full((10, 20), 7, np.uint8)))
    rows, columns = np.nonzero((square == 7).all(axis=2))
    assert (np.ptp(rows) + 1, np.ptp(columns) + 1) == (40, 80)  # enlarged by 96 // 20
    assert abs(rows.min() + rows.max() - 101) <= 1  # in the middle
    assert abs(columns.min() + columns.max() - 101) <= 1


def test_what_cannot_be_read_or_written_is_one_line(tmp_path):
    write(tmp_path / "images" / "a.png", picture(20, 20))
    images = open_folder(tmp_path / "images", "train")
    with pytest.raises(UserError, match=r"g\.png: cannot be written"):
        gallery.write_gallery(tmp_path / "nowhere" / "g", "t", images, [0])
    (tmp_path / "images" / "a.png").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"cannot read .*a\.png"):
        gallery.write_gallery(tmp_path / "g", "t", images, [0])


def test_no_row_of_the_page_is_ragged():
    """Whatever the width, a whole code fills its last row."""
    columns = [int(count) for count in re.findall(r"repeat\((\d+),", gallery.STYLE)]
    assert len(columns) >= 3 and all(gallery.SHOWN % count == 0 for count in columns)
    assert "auto-fill" not in gallery.STYLE
