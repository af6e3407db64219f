"""The report: complete, escaped, self-contained, and drawn from whatever is there."""

from __future__ import annotations

import html
import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from timings import measured, one_run

from obc_deploy.benchmarks.measurement import Measurement, with_speedups
from obc_deploy.benchmarks.report import manifest_of, render_report, write_report
from obc_deploy.errors import ArtifactError

MANIFEST = {
    "model": {"source": "torchvision:resnet18", "weights": None},
    "calibration": {"source": "digits", "samples": 512, "sha256": "ab" * 32},
    "scheme": "block4@0.9+w8a8",
    "layers": [
        {
            "name": "layer1.0.conv1",
            "kind": "conv2d",
            "scheme": "block4@0.9+w8a8",
            "shape": [64, 64, 3, 3],
            "macs": 115_605_504,
            "density": 0.1,
            "error": 0.0321,
            "weight_bits": 8,
            "activation_bits": 8,
            "note": "",
        },
        {"name": "fc", "density": float("nan"), "note": "left dense"},
    ],
    "accuracy": {"dense": 0.991, "compressed": 0.978, "samples": 360},
    "versions": {"torch": "2.11.0"},
    "machine": {"cpu": "a fine processor", "cores": 2, "flags": ["avx2", "avx512_vnni"]},
    "command": ["obc-deploy", "run", "a model"],
    "created": "2026-01-02T03:04:05Z",
}
VOID = {"meta", "br", "hr", "img", "input", "link"}


class _Page(HTMLParser):
    """Text, tags and attributes of a page; fails on tags that do not match."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.attributes, self.words = [], [], [], []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes.extend(attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes.extend(attrs)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.words).split())


def _rows():
    failed = Measurement(variant="w4", scheme="w4", runtime="deepsparse", error="worker died")
    return with_speedups([*one_run("onnxruntime", 2.0), *one_run("deepsparse", 1.0), failed])


def test_report_holds_what_it_promises(tmp_path):
    path = write_report(tmp_path / "report.html", MANIFEST, _rows())
    assert list(tmp_path.iterdir()) == [path]
    page = _Page(path.read_text(encoding="utf-8"))
    for expected in (
        "torchvision:resnet18", "block4@0.9+w8a8 in deepsparse runs at",
        "Predicted against measured",
        "Accuracy against speed", "layer1.0.conv1", "64 × 64 × 3 × 3", "116M", "3.21e-02",
        "left dense", "slower than dense", "worker died", "a fine processor", "avx2, avx512_vnni",
        "2.11.0", "obc-deploy run 'a model'", "2026-01-02T03:04:05Z", "ab" * 32, "512",
        "measured speedup over dense fp32", "predicted speedup by BOPs", "as promised",
    ):  # fmt: skip
        assert expected in page.text, expected
    assert page.tags.count("svg") == 2
    # Two tables of results, one for the failed worker's conditions, layers, and the method.
    assert page.tags.count("table") == 5


def test_every_measured_figure_stands_in_the_report():
    page = _Page(render_report(MANIFEST, _rows()))
    for row in _rows():
        if row.latency_ms is not None:
            assert f"{row.speedup_vs_dense_fp32:.2f}x" in page.text
            assert f"{row.latency_ms.p50:.2f}"[:4] in page.text
            assert str(len(row.latency_ms.samples)) in page.text


def test_report_loads_nothing():
    text = render_report(MANIFEST, _rows())
    page = _Page(text)
    assert not {"script", "link", "iframe", "object", "embed", "base"} & set(page.tags)
    for name, value in page.attributes:
        if name in ("src", "href", "xlink:href", "srcset", "action", "data"):
            assert value.startswith(("#", "data:")), (name, value)
        assert not name.startswith("on")
    assert not re.search(r"@import|url\((?!#)", text)


def test_plots_follow_the_page_and_are_whole():
    text = render_report(MANIFEST, _rows())
    drawings = re.findall(r"<svg.*?</svg>", text, flags=re.DOTALL)
    assert len(drawings) == 2
    for drawing in drawings:
        root = ElementTree.fromstring(drawing)
        used = set(re.findall(r'(?:xlink:href="|url\()#([^")]+)', drawing))
        assert used <= {element.get("id") for element in root.iter()}
        assert "currentColor" in drawing
        assert "#000000" not in drawing
    assert "prefers-color-scheme: dark" in text
    assert "@media print" in text


def test_the_same_input_gives_the_same_report():
    assert render_report(MANIFEST, _rows()) == render_report(MANIFEST, _rows())


@pytest.mark.parametrize(
    "evil", ["<script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "$x^{2$ & </svg>", "名"]
)
def test_everything_from_outside_is_escaped(evil):
    dense, int8, *_ = one_run(evil)
    rows = with_speedups(
        [dense, int8, measured(evil, "w8a8", "compressed", 2.0, runtime=evil, warnings=[evil])]
    )
    manifest = {
        "model": {"source": evil, evil: evil},
        "calibration": {"source": evil},
        "scheme": evil,
        "layers": [dict.fromkeys(MANIFEST["layers"][0], evil)],
        "accuracy": {evil: evil},
        "versions": {evil: evil},
        "machine": {evil: [evil]},
        "command": evil,
        "created": evil,
    }
    text = render_report(manifest, rows)
    page = _Page(text)
    assert not {"script", "img"} & set(page.tags)
    assert page.tags.count("svg") == 2
    assert page.words.count(evil) + text.count(html.escape(evil)) > 5


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=6,
)


@settings(max_examples=40, deadline=None)
@given(
    st.dictionaries(st.sampled_from(sorted(MANIFEST)), VALUES),
    st.lists(st.dictionaries(st.sampled_from(sorted(MANIFEST["layers"][0])), VALUES), max_size=2),
)
def test_any_manifest_will_do(manifest, layers):
    _Page(render_report({**manifest, "layers": layers}, []))
    _Page(render_report(manifest, []))


@pytest.mark.parametrize(
    "rows",
    [
        pytest.param([], id="none"),
        pytest.param([Measurement(variant="v", scheme="w4", runtime="r")], id="bare"),
        pytest.param(with_speedups(one_run()[:1]), id="only dense"),
        pytest.param(one_run(), id="without speedups"),
        pytest.param([measured("v", "w4", "compressed", 1.0, accuracy=None)], id="no accuracy"),
    ],
)
def test_a_report_of_little_is_still_one(rows):
    page = _Page(render_report({}, rows))
    assert "Predicted against measured" in page.text
    assert "svg" not in page.tags


def test_files_that_cannot_be_used(tmp_path):
    with pytest.raises(ArtifactError, match="choose a writable place"):
        write_report(tmp_path / "missing" / "report.html", {}, [])
    with pytest.raises(ArtifactError, match="No such file"):
        manifest_of(tmp_path / "manifest.json")
    path = tmp_path / "manifest.json"
    for text, says in (("{", "is not JSON"), ("[]", "no JSON object")):
        path.write_text(text)
        with pytest.raises(ArtifactError, match=says):
            manifest_of(path)
    path.write_text('{"scheme": "w4"}')
    assert manifest_of(path) == {"scheme": "w4"}
