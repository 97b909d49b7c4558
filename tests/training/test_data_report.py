"""The report page: counts as in the audit, examples on both sides of a limit, nothing that it would have to load."""

import base64
import json
import re
import shutil
from html.parser import HTMLParser

import pyarrow.parquet as pq
import pytest
from data_pictures import encoded, photo_record, photos
from PIL import Image
from typer.testing import CliRunner

from qwen_image_fast.cli import app
from qwen_image_fast.training.data import records_page
from qwen_image_fast.training.data.record import Record
from qwen_image_fast.training.data.records_page import write_records
from qwen_image_fast.training.data.report import summarise, write_report
from qwen_image_fast.training.data.shards import write_shards
from qwen_image_fast.training.data.timeline import Timeline, read_timeline


class Page(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.open, self.images, self.outside = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        if tag == "img":
            self.images.append(attrs)
        self.outside += [v for k, v in attrs.items() if k in ("src", "href") and not v.startswith("data:")]


@pytest.fixture(scope="module")
def filtered(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    cat = Image.fromarray(photos()["chelsea.png"])
    records = [photo_record(name, category=("Nature", "People")[n % 2]) for n, name in enumerate(sorted(photos()))]
    dark = encoded(cat.rotate(180).point(lambda v: v // 20))
    wild = "<script>alert('x')</script>"
    records += [
        Record(dark, {"raw": "a dark picture here"}, origin="dark"), Record(b"no picture at all", {}, origin=wild),
        Record(records[0].image, {"raw": "the same once more"}, origin="again", category="Nature"),
    ]  # fmt: skip
    write_shards(records, folder / "in")
    recipe = folder / "recipe.yaml"
    recipe.write_text(
        f"sources: [{{path: {folder / 'in'}, source: {json.dumps(wild)}}}]\nstages: [1, 2, 3, 7]\nwithout: [nsfw]\n"
    )
    for command in (["filter", str(recipe), "--out", str(folder / "out")], ["report", str(folder / "out")]):
        assert CliRunner().invoke(app, ["data", *command], catch_exceptions=False).exit_code == 0
    return folder / "out"


def test_the_page_needs_nothing_beside_it_and_shows_both_sides(filtered):
    text = (filtered / "report.html").read_text()
    page = Page(text)
    assert page.outside == ["records.html"] and "<script" not in text and "@BODY@" not in text
    assert "<b>12</b> records seen, <b>9</b> kept (75.0%), <b>3</b> rejected" in text
    plots = [image for image in page.images if image.get("class") == "plot"]
    assert any("limits: 0.06 and 0.93" in image["alt"] for image in plots)
    assert {"Shares by category, before and after", "Shares by aspect, before and after"} <= {i["alt"] for i in plots}
    for image in page.images:
        assert re.match(rb"\xff\xd8\xff|<\?xml", base64.b64decode(image["src"].partition(",")[2]))
    luma = text.partition("<h3>luma")[2].partition("</section>")[0]
    assert "the picture is too dark" in luma.partition("rejected, nearest")[2]
    assert luma.partition("rejected, nearest")[0].count("<figure") == 5
    assert "</b> shard-00000.tar:000000009<br>the picture is too dark" in luma
    losses = text.partition("By filter")[2].partition("</table>")[0]
    assert re.findall(r"<td>(\w+)<td>[\d,]+<td>0<td>not measured", losses) == ["alignment"]
    pair = text.partition("<h2>Duplicates</h2>")[2]
    assert "1 exact duplicates" in pair and pair.count("data:image/jpeg") == 2  # the copy beside what it repeats


def test_counts_are_those_of_the_audit(filtered):
    found = summarise(filtered / "audit.parquet")
    rows = pq.read_table(filtered / "audit.parquet").to_pylist()
    assert (found.seen, found.kept) == (12, sum(row["kept"] for row in rows))
    for name, (_, passed, gone) in found.histograms.items():
        assert passed.sum() + gone.sum() == sum(row[name] is not None for row in rows), name
        assert gone.sum() == sum(row["filter"] == name and row[name] is not None for row in rows), name
    before, after = found.balance["category"]
    assert (before["Nature"], after["Nature"], before["unknown"]) == (6, 5, 2)


def rows_in(folder):
    pages = sorted((folder / "records").iterdir())
    texts = [page.read_text(encoding="utf-8") for page in pages]
    assert all(text.startswith("records([") and text.endswith("]);\n") for text in texts)
    return [row for text in texts for row in json.loads(text[len("records(") : -3])]


def test_the_records_are_those_of_the_audit(filtered, monkeypatch):
    monkeypatch.setattr(records_page, "ROWS", 5)
    write_records(filtered)
    audit = pq.read_table(filtered / "audit.parquet").to_pylist()
    assert [row[:6] for row in rows_in(filtered)] == [[row[name] for name in records_page._SHOWN] for row in audit]
    assert len(list((filtered / "records").iterdir())) == 3
    assert "<script>alert" not in (filtered / "records.html").read_text()


@pytest.fixture
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed (extra dev)")
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if chromium is None:
        pytest.skip("there is no Chromium on this machine")
    playwright.expect.set_options(timeout=120_000)
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(
            executable_path=chromium, args=["--headless", "--no-sandbox", "--disable-gpu"]
        )
        yield browser, playwright.expect
        browser.close()


def opened(browser, path):
    """A page, and what goes wrong on it."""
    page, errors = browser.new_page(), []
    page.on("pageerror", lambda error: errors.append(error))
    page.on("dialog", lambda dialog: errors.append(dialog))
    page.goto(path.as_uri())
    return page, errors


def test_the_records_are_searched_in_a_browser(filtered, monkeypatch, browser):
    monkeypatch.setattr(records_page, "ROWS", 5)
    write_records(filtered)
    browser, expect = browser
    page, errors = opened(browser, filtered / "records.html")
    state = page.locator("#state")
    expect(state).to_have_text("12 of 12, page 1 of 1")
    page.fill("#text", "too dark")
    expect(state).to_have_text("1 of 12, page 1 of 1")
    assert "the picture is too dark" in page.inner_text("#rows")
    page.fill("#text", "")
    page.select_option("#by", "broken_file")
    expect(state).to_have_text("1 of 12, page 1 of 1")
    assert "shard-00000.tar:000000010" in page.inner_text("#rows")
    page.select_option("#by", "")
    page.select_option("#category", "People")
    expect(state).to_have_text("4 of 12, page 1 of 1")
    assert errors == []


def a_timeline(workers=2):
    made = Timeline()
    for part in range(2000):
        worker = part % workers
        made.add(f"node {worker % 2}", f"actor {worker}", 100.0 + part, 100.9 + part, 128)
    made.add("", "exact duplicates", 2100.0, 2160.0, 256_000)
    return made


def test_a_timeline_joins_what_cannot_be_told_apart():
    rows = a_timeline().rows()
    assert [row["name"] for row in rows] == ["worker 1, machine 1", "worker 2, machine 2", "exact duplicates"]
    assert [sum(span[2] for span in row["spans"]) for row in rows] == [128_000, 128_000, 256_000]
    assert rows[0]["spans"] == [[0.0, 1998.9, 128_000]] and rows[2]["spans"] == [[2000.0, 2060.0, 256_000]]
    paused = Timeline()
    for start in (0.0, 5.0, 5.001, 9.0):
        paused.add("a", "b", start, start + 1, 1)
    assert [span[2] for span in paused.rows()[0]["spans"]] == [1, 2, 1]
    assert Timeline().rows() == []


@pytest.mark.parametrize("content", [None, "{", "[]", '{"rows": []}', '{"rows": [{"name": "a", "spans": []}]}',
                                     '{"rows": [{"name": "a", "spans": [[1]]}]}'])  # fmt: skip
def test_without_a_timeline_the_page_says_nothing_of_it(filtered, content):
    assert read_timeline(filtered) == []
    if content is not None:
        (filtered / "timeline.json").write_text(content)
    assert "timeline" not in write_report(filtered).read_text().lower()
    (filtered / "timeline.json").unlink(missing_ok=True)


@pytest.mark.parametrize("workers", [2, 90])
def test_the_timeline_is_seen_in_a_browser(filtered, browser, workers):
    a_timeline(workers).write(filtered)
    page, errors = opened(browser[0], write_report(filtered))
    (filtered / "timeline.json").unlink()
    plot = page.get_by_alt_text("Timeline of the workers")
    plot.scroll_into_view_if_needed()
    browser[1](plot).to_be_visible()
    drawn = plot.evaluate("image => [image.complete, image.naturalWidth, image.naturalHeight]")
    assert drawn[0] and drawn[1] > 500 and 100 < drawn[2] < 1500, drawn
    browser[1](page.get_by_role("heading", name="Timeline")).to_have_count(1)
    assert errors == []


def test_another_folder_is_refused(tmp_path):
    result = CliRunner().invoke(app, ["data", "report", str(tmp_path)])
    assert result.exit_code == 2 and "it has no audit.parquet" in " ".join(result.output.split())
