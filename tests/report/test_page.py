"""The whole report from a run directory: complete, safe, self-contained, and the same every time."""

import json
import re
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from html.parser import HTMLParser

import matplotlib
import pytest

from gaintune.config import EvaluateConfig
from gaintune.errors import ConfigError, RunDirectoryError
from gaintune.report import write_report
from gaintune.results import Matrix, build_matrix
from gaintune.storage import Run, read_json, write_json, write_text
from support import refused
from support.drawing import unrendered
from support.synthetic_run import forgets, keeps, make_matrix, make_runs, write_run

VOID = {"meta", "br", "hr", "img", "link", "input"}
FILES = {f"figures/{name}.{kind}" for name in ("matrix", "curves", "summary") for kind in ("png", "svg")}
ODD = ("<script>alert(1)</script>", "a&b $x$", "c'd\"e")


class Page(HTMLParser):
    """Tags in order, ids, references, text, and the cells of matrix tables; fails on tags that do not nest."""

    def __init__(self, html):
        super().__init__(convert_charrefs=True)
        self.open, self.tags, self.ids, self.links, self.words, self.cells = [], [], [], [], [], []
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        self.tags.append(tag)
        if tag not in VOID:
            self.open.append(tag)
        if "id" in values:
            self.ids.append(values["id"])
        self.links += [values[key] for key in ("href", "src", "xlink:href") if key in values]
        assert not [key for key in values if key.startswith("on")]
        if tag == "td" and "shade" in (values.get("class") or ""):
            self.cells.append([values["class"], ""])

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        self.open.pop() if tag not in VOID else None

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)
        if self.open and self.open[-1] == "td" and self.cells and not self.cells[-1][1]:
            self.cells[-1][1] = data

    @property
    def text(self):
        return " ".join(" ".join(self.words).split())


def read(run):
    html = (run / "report.html").read_text(encoding="utf-8")
    page = Page(html)
    assert len(set(page.ids)) == len(page.ids), "ids repeat"
    assert "script" not in page.tags and "link" not in page.tags and "img" not in page.tags
    assert all(link.startswith("#") and link[1:] in page.ids for link in page.links)
    assert set(re.findall(r"url\(#([^)]+)\)", html)) <= set(page.ids)
    assert not re.findall(r"url\((?!#)|@import|<iframe", html)
    names = {f"http://www.w3.org/{name}" for name in ("2000/svg", "1999/xlink")}
    assert set(re.findall(r"https?://[^\"' <]+", html)) <= names
    return page


@pytest.fixture(scope="module")
def odd_run(tmp_path_factory):
    """Names as a hostile or careless person would choose them, everywhere a name can come from."""
    matrix = make_matrix(ODD, {"<img src=x onerror=alert(2)>": keeps, "lora & co": forgets})
    plan = {"model": {"name": "<b>model</b>"}, "data": {"domains": ["d0", "d1", "d2"]}}
    environment = {"device": "</dl><script>alert(3)</script>", "packages": {"gaintune": "0.1.0", "torch": "2.13.0"}}
    run = write_run(tmp_path_factory.mktemp("odd") / "run <1>", matrix, plan=plan, environment=environment)
    assert write_report(run) == run / "report.html"
    return run


def test_a_report_has_all_its_files_and_its_page_stands_alone(odd_run):
    page = read(odd_run)
    assert FILES | {"matrix.csv", "matrix.md"} <= {p.relative_to(odd_run).as_posix() for p in odd_run.rglob("*")}
    for name in (*ODD, "<img src=x onerror=alert(2)>", "lora & co", "<b>model</b>", "run <1>", "</dl><script>alert(3)"):
        assert name in page.text, name
    phrases = """gaintune sequence THIS-FOLDER/plan.yaml|It ran with gaintune 0.1.0|packages.torch|2.13.0|Read with care
        63,360
        backward transfer|forward interference|train_tokens: 8192|Bits per byte"""
    for phrase in re.split(r"\||\n *", phrases):
        assert phrase in page.text, phrase


def test_heatmaps_show_the_matrix_with_its_places(odd_run):
    page = read(odd_run)
    places = ["learning", "later", "later", "earlier", "learning", "later", "earlier", "earlier", "learning"]
    assert [classes.split()[-1] for classes, _ in page.cells] == places * 2
    matrix = make_matrix(ODD, {"<img src=x onerror=alert(2)>": keeps, "lora & co": forgets})
    values = [f"{row.cells[n].change:+.1f}".replace("-", "−") for m in matrix.methods for row in m.stages for n in ODD]
    assert [text.strip() for _, text in page.cells] == values
    shades = [int(re.search(r"shade-(-?\d+)", classes)[1]) for classes, _ in page.cells]
    assert all((shade < 0) == text.strip().startswith("−") for shade, (_, text) in zip(shades, page.cells, strict=True))


def test_figures_are_valid_files_without_dates(odd_run):
    for name in FILES:
        content = (odd_run / name).read_bytes()
        if name.endswith("png"):
            assert content.startswith(b"\x89PNG") and int.from_bytes(content[16:20], "big") > 400
        else:
            ElementTree.fromstring(content)
            assert b"<dc:date>" not in content


def test_the_same_run_gives_the_same_bytes_and_leaves_matplotlib_as_it_was(odd_run):
    def everything():
        return {path.name: path.read_bytes() for path in odd_run.rglob("*") if path.is_file()}

    files, settings = everything(), dict(matplotlib.rcParams)
    write_report(odd_run)
    assert everything() == files and dict(matplotlib.rcParams) == settings


def test_the_smallest_run_one_method_one_domain_no_environment(tmp_path):
    plan = {"data": {"domains": ["law"]}, "methods": ["gain"]}
    run = write_run(tmp_path / "small", make_matrix(("law",), {"gain": keeps}), plan=plan)
    (run / "environment.json").unlink()
    write_report(run)
    page = read(run)
    assert "What gain learned and kept" in page.text and "After one stage, law has" in page.text
    assert "Not recorded." in page.text and "Paired differences" not in page.text and "pip install" not in page.text
    assert "This run is not finished" not in page.text and "earlier domains have" not in page.text
    assert len(page.cells) == 1


def test_a_partial_run_is_called_one_and_shows_what_is_there(tmp_path):
    methods, domains = {"gain": keeps, "lora": forgets, "ia3": keeps}, ("d0", "d1", "d2")
    matrix = make_matrix(domains, methods, extra=("wiki",), finished={"gain": 2, "lora": 1, "ia3": 0})
    plan = {"data": {"domains": list(domains)}, "methods": ["gain", "lora", "ia3", "full"]}
    run = write_run(tmp_path / "partial", matrix, plan=plan)
    write_report(run)
    page = read(run)
    assert "gain: 2 of 3 stages; lora: 1 of 3 stages; ia3: 0 of 3 stages; full: 0 of 3 stages" in page.text
    assert len(page.cells) == (2 + 1) * 4 and "So far, after 1 stage:" in page.text
    assert "No stage is finished yet." in page.text and "wiki (never trained)" in page.text


def test_a_run_with_exploded_losses_still_has_a_page(tmp_path):
    matrix = make_matrix(("d0", "d1"), {"gain": keeps, "hot": lambda s, p: 10.0**9 if p < s else -5.0})
    run = write_run(tmp_path / "hot", matrix)
    write_report(run)
    assert "+1e+09" in read(run).text


def test_what_is_missing_is_named(tmp_path, two_methods):
    refused(RunDirectoryError, "no such run directory: /", write_report, tmp_path / "nowhere")
    neither = r"is not a run directory, it has neither plan\.yaml nor matrix\.json"
    refused(RunDirectoryError, neither, write_report, tmp_path)
    write_text(tmp_path / "plan.yaml", "{}")
    refused(RunDirectoryError, r"matrix\.json: nothing measured yet; run `gaintune sequence`", write_report, tmp_path)
    run = write_run(tmp_path / "run", two_methods)
    (run / "plan.yaml").unlink()
    refused(ConfigError, "no such plan file", write_report, run)
    values, domain = two_methods.to_dict(), two_methods.domains[0]
    values["methods"][0]["base"]["other"] = values["methods"][0]["base"].pop(domain)
    for text, message in (
        ("{ not json", "1: not valid JSON"),
        ("[]", " not a matrix of format 1"),
        (json.dumps(values), rf" a matrix with a part .*the base on {domain}"),
    ):
        write_text(run / "matrix.json", text)
        refused(RunDirectoryError, rf"matrix\.json:{message}", write_report, run)


def test_intervals_are_made_anew_from_stored_losses(tmp_path, caplog):
    """A run whose matrix.json has other intervals than its losses give, as one of an earlier version may."""
    domains = ("d0", "d1", "d2")
    runs = [replace(one, info={**one.info, "numbers": "bfloat16"}) for one in make_runs(domains, {"gain": keeps})]
    stored = build_matrix(runs, EvaluateConfig(bootstrap_samples=20), planned=domains)
    folder = write_run(tmp_path / "run", stored)
    kept = (folder / "matrix.json").read_bytes()
    with unrendered():
        write_report(folder)
    assert (folder / "matrix.json").read_bytes() == kept and "is not there: intervals stay" in caplog.text
    caplog.clear()
    run, (one,) = Run(folder), runs
    for name, loss in one.base.items():
        write_json(run.base("bfloat16", name), loss.to_dict())
    for index, stage in enumerate(one.stages):
        for name, loss in stage.losses.items():
            write_json(run.stage("gain", index, stage.domain) / "evaluations" / f"{name}.json", loss.to_dict())
    with unrendered():
        write_report(folder)
    anew = Matrix.from_dict(read_json(folder / "matrix.json"))
    assert anew == build_matrix(runs, EvaluateConfig(), planned=domains) != stored
    cell = anew.methods[0].stages[0].cells["d0"]
    assert not caplog.text and repr(cell.low) in (folder / "matrix.csv").read_text()
