"""The page in a real browser: headless Chromium through Playwright, against the command as it is typed."""

import base64
import io
import json
import re
import shlex
import shutil
import signal
from pathlib import Path
from urllib.parse import parse_qs, quote, urlsplit

import numpy as np
import pytest
from PIL import Image

from ditmoe import pipeline
from ditmoe.generate import pictures
from ditmoe.report import maps
from ditmoe.report import page as report_page
from tests.ditmoe.pipeline.test_pipeline import make
from tests.doors import command as typed
from tests.faults.test_security import REPORT
from tests.processes import door, start

playwright = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed: pip install playwright")
ROOT = Path(__file__).parents[2]
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no browser: chromium, chromium-browser or google-chrome")
MODEL = "models/digits"


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    """Where `ditmoe play` serves the model, in a process of its own."""
    served = start(door, "ditmoe", ["play", MODEL, "--port", "0"], folder=tmp_path_factory.mktemp("served"))
    served.until(lambda: "Ctrl-C" in served.out(), timeout=240)
    yield next(word for word in served.out().split() if word.startswith("http://127.0.0.1:"))
    served.kill(signal.SIGTERM)
    assert served.wait(20) == [143]


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as started:
        chromium = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture
def visit(browser, address):
    """Opens the page with these words in its address; no console may have an error at the end."""
    said, contexts = [], []

    def go(words="", **options):
        contexts.append(browser.new_context(**options))
        contexts[-1].grant_permissions(["clipboard-read", "clipboard-write"], origin=address)
        page = contexts[-1].new_page()
        page.set_default_timeout(30_000)
        page.on("console", lambda message: said.append(message.text) if message.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: said.append(str(error)))
        page.goto(f"{address}/{words}")
        drawn(page)
        return page

    yield go
    for context in contexts:
        context.close()
    assert said == []


def drawn(page):
    page.wait_for_selector("body[aria-busy=false]")


def images(page, side=1):
    """What a side shows, uint8 arrays."""
    found = page.locator(f"section:nth-of-type({side}) .images img").evaluate_all("all => all.map(one => one.src)")
    return [np.asarray(Image.open(io.BytesIO(base64.b64decode(src.partition(",")[2]))).convert("L")) for src in found]


def error(page):
    return page.locator(".error").first


def copied(page, text):
    """What the button copies, of the command line or Python."""
    page.locator("summary").first.click()
    page.locator(f"[data-text={text}]").first.click()
    page.locator(".copy").first.click()
    return page.evaluate("() => navigator.clipboard.readText()")


def test_choose_draw_and_run_the_copied_command(visit, tmp_path, monkeypatch):
    page = visit()
    assert page.locator(".images button").count() == 4
    for chip in ("0", "1", "2"):
        page.locator(f".chips button[value='{chip}']").click()
    page.locator(".chips button[value='8']").click()
    page.fill("#each", "2")
    page.fill("#seed", "5")
    page.select_option("[data-name=sampler]", "ddim")
    page.fill("[data-name=steps]", "7")
    page.fill("[data-name=cfg]", "2")
    page.fill("[data-name=from]", "100")
    page.click("#draw")
    drawn(page)
    assert page.locator(".images small").all_inner_texts() == ["3", "3", "8", "8"]
    assert "ms an image, 7 network calls" in page.locator(".facts").inner_text()
    command = copied(page, "command")
    assert command == (
        f"python -m ditmoe sample {MODEL} --classes 3 3 8 8 --seed 5 --sampler ddim --steps 7 --cfg 2 "
        "--guidance-interval 100 1000 --precision fp32 --out drawn.png"
    )
    shown = np.stack(images(page))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").symlink_to(ROOT / "models")
    assert typed("sample", *shlex.split(command)[4:]) == 0
    pictures.write_grid(shown[..., None], [3, 3, 8, 8], {n: str(n) for n in range(10)}, tmp_path / "shown.png")
    assert (tmp_path / "drawn.png").read_bytes() == (tmp_path / "shown.png").read_bytes()
    page.locator("[data-text=python]").click()
    page.locator(".copy").click()
    scope = {}
    exec(page.evaluate("() => navigator.clipboard.readText()"), scope)
    assert np.array_equal(np.stack([np.asarray(image) for image in scope["images"]]), shown)


def test_a_link_draws_the_same_and_the_keyboard_is_enough(visit):
    page = visit("?classes=7&steps=5")
    page.focus("#seed")
    page.keyboard.press("Control+A")
    page.keyboard.type("11")
    page.keyboard.press("Enter")
    page.wait_for_url(lambda url: url.endswith("/?classes=7&seed=11&steps=5"))
    drawn(page)
    page.click("#link")
    again = visit("?" + urlsplit(page.evaluate("() => navigator.clipboard.readText()")).query)
    assert np.array_equal(images(page), images(again))
    assert again.input_value("#seed") == "11"
    again.focus("input[type=range]")
    for _ in range(3):
        again.keyboard.press("ArrowLeft")
    assert again.locator(".when").inner_text().startswith("step 3 of 5, t = ")
    assert not np.array_equal(images(page), images(again))
    again.locator("[data-view=noisy]").press("Space")
    assert again.locator("[data-view=noisy]").get_attribute("aria-pressed") == "true"


def test_two_settings_from_the_same_noise(visit):
    page = visit("?classes=3&classes=8&steps=5")
    page.click("#compare")
    drawn(page)
    assert np.array_equal(images(page, 1), images(page, 2))
    page.locator("section:nth-of-type(2) [data-name=cfg]").fill("4")
    page.click("#draw")
    drawn(page)
    assert not np.array_equal(images(page, 1), images(page, 2))
    assert parse_qs(urlsplit(page.url).query)["b.cfg"] == ["4"]
    again = visit("?" + urlsplit(page.url).query)
    assert np.array_equal(images(again, 2), images(page, 2))
    first, second = (np.stack(images(page, side)).astype(int) for side in (1, 2))
    page.locator("section:nth-of-type(2) [data-view=change]").click()
    assert np.abs(np.stack(images(page, 2)) - (128 + (second - first) / 2)).max() <= 0.5
    mean = np.abs(second - first).mean()
    assert f"{mean:.1f} of 255 levels from A" in page.locator(".facts").last.inner_text()
    sliders = page.locator("input[type=range]")
    sliders.first.fill("1")
    assert sliders.last.input_value() == "1"
    assert np.abs(first - second).max() > 8


def test_a_suppressed_expert(visit):
    page = visit("?classes=8&classes=3&steps=5")
    tile = page.locator("[data-layer='1'][data-expert='4']")
    tile.click()
    drawn(page)
    assert page.locator("section").count() == 2
    assert page.locator(".images small").all_inner_texts() == ["8", "3", "8", "3"]  # the order of the link
    assert "expert 4 of block 1 suppressed" in page.locator("section:nth-of-type(2) h2").inner_text()
    assert not np.array_equal(images(page, 1), images(page, 2))
    policy = {"rules": [{"layer": 1, "expert": 4, "action": "suppress"}]}
    expected = pipeline.load(ROOT / MODEL)([8, 3], num_inference_steps=5, policy=policy).images
    assert np.array_equal(np.stack([np.asarray(image) for image in expected]), np.stack(images(page, 2)))
    page.locator("section:nth-of-type(2) [data-layer='1'][data-expert='4']").click()
    drawn(page)
    assert "expert 4 of block 1 forced" in page.locator("section:nth-of-type(2) h2").inner_text()
    assert "%22force%22" in page.url
    page.fill("#seed", "9")
    page.locator("section:nth-of-type(2) .reset").click()  # and the other side follows the seed
    drawn(page)
    assert np.array_equal(images(page, 1), images(page, 2))


def test_a_rule_of_some_steps(visit):
    rules = [
        {"layer": 1, "expert": 4, "action": "suppress", "steps": [0, 1]},
        {"layer": 1, "expert": 4, "action": "force", "steps": [4, 4]},
    ]
    page = visit(f"?classes=8&steps=6&policy={quote(json.dumps({'rules': rules}))}")
    told = "Expert 4 of block 1 suppressed (steps 1–2), expert 4 of block 1 forced (step 5)"
    assert page.locator("h2").inner_text().lower() == told.lower()
    marked = []
    for k in range(6):
        page.locator("input[type=range]").fill(str(k))
        marked.append(page.locator("[data-layer='1'][data-expert='4']").get_attribute("class"))
    assert marked == ["suppress", "suppress", "", "", "force", ""]
    page.locator("input[type=range]").fill("2")
    page.locator("[data-layer='1'][data-expert='4']").click()
    drawn(page)
    query = parse_qs(urlsplit(page.url).query)
    assert json.loads(query["policy"][0])["rules"] == rules
    more = {"layer": 1, "expert": 4, "action": "suppress", "steps": [2, 3]}
    assert json.loads(query["b.policy"][0])["rules"] == [*rules, more]
    assert not error(page).is_visible()


def test_the_steps_of_a_rule_are_set_on_the_page(visit, tmp_path, monkeypatch):
    page = visit("?classes=8&steps=6")
    assert not page.locator(".rules").is_visible()
    page.locator("[data-layer='1'][data-expert='4']").click()
    drawn(page)
    side = page.locator("section:nth-of-type(2)")
    first, last = (side.get_by_label(f"{word} step of expert 4 of block 1") for word in ("first", "last"))
    assert (first.input_value(), last.input_value()) == ("1", "6")

    def steps(field=None, value=None):
        if field is not None:
            field.fill(value)
            field.press("Enter" if field is first else "Tab")
            drawn(page)
        (rule,) = json.loads(parse_qs(urlsplit(page.url).query)["b.policy"][0])["rules"]
        return rule.pop("steps", None), rule == {"layer": 1, "expert": 4, "action": "suppress"}

    assert steps() == (None, True)
    assert steps(last, "2") == ([0, 1], True)
    assert steps(first, "5") == ([4, 4], True)  # the other end goes along
    assert last.input_value() == "5"
    assert steps(last, "99") == ([4, 5], True)
    assert steps(first, "1") == (None, True)
    assert steps(first, "3") == ([2, 5], True)
    assert "suppressed (steps 3\u20136)" in side.locator("h2").inner_text()
    policy = {"rules": [{"layer": 1, "expert": 4, "action": "suppress", "steps": [2, 5]}]}
    expected = pipeline.load(ROOT / MODEL)([8], num_inference_steps=6, policy=policy).images[0]
    assert np.array_equal(images(page, 2)[0], np.asarray(expected))
    side.locator("summary").click()
    side.locator(".copy").click()
    write, draw = page.evaluate("() => navigator.clipboard.readText()").splitlines()
    assert json.loads(shlex.split(write)[1]) == policy
    assert re.search(r"--policy policy-[0-9a-f]{8}\.json ", draw)
    again = visit("?" + urlsplit(page.url).query)
    assert np.array_equal(images(again, 2), images(page, 2))
    assert again.get_by_label("first step of expert 4 of block 1").input_value() == "3"
    again.locator(".rule button").click()
    drawn(again)
    assert "policy" not in again.url
    assert not again.locator("section:nth-of-type(2) .rules").is_visible()
    assert np.array_equal(images(again, 2), images(again, 1))


def test_two_rules_for_one_expert_share_no_step(visit):
    rules = [{"layer": 1, "expert": 4, "action": action, "steps": steps}
             for action, steps in (("suppress", [0, 1]), ("force", [4, 4]))]  # fmt: skip
    page = visit(f"?classes=8&steps=6&policy={quote(json.dumps({'rules': rules}))}")
    page.get_by_label("last step of expert 4 of block 1").first.fill("6")
    page.get_by_label("last step of expert 4 of block 1").first.press("Tab")
    drawn(page)
    assert json.loads(parse_qs(urlsplit(page.url).query)["policy"][0])["rules"] == [
        {**rules[0], "steps": [0, 3]},
        rules[1],
    ]
    assert not error(page).is_visible()


def test_a_side_is_drawn_anew_where_its_words_are_others(visit):
    page = visit("?classes=3&steps=4")
    page.fill("[data-name=steps]", "9")
    page.locator("[data-layer='1'][data-expert='4']").click()
    drawn(page)
    assert ["9 network calls" in facts for facts in page.locator(".facts").all_inner_texts()] == [True, True]
    first = page.evaluate("() => sides[0].final")
    page.locator("section:nth-of-type(2) [data-layer='1'][data-expert='4']").click()
    drawn(page)
    assert page.evaluate("first => sides[0].final[0] === first[0]", first)
    expected = pipeline.load(ROOT / MODEL)([3], num_inference_steps=9).images[0]
    assert np.array_equal(images(page)[0], np.asarray(expected))


def test_words_of_a_link_without_a_field_are_kept_and_shown(visit):
    page = visit("?classes=3&steps=4&sampler=ddim&eta=1")
    before = images(page)
    assert page.locator(".also span").inner_text() == "also: --eta 1"
    page.click("#draw")
    drawn(page)
    assert parse_qs(urlsplit(page.url).query)["eta"] == ["1"]
    assert "--eta 1" in copied(page, "command")
    assert np.array_equal(images(page), before)
    page.click(".also button")
    drawn(page)
    assert "eta" not in page.url
    assert not page.locator(".also").is_visible()
    assert not np.array_equal(images(page), before)


def test_a_link_names_classes_by_label_too(browser, tmp_path):
    pipeline.save(make(), tmp_path / "model")
    served = start(door, "ditmoe", ["play", str(tmp_path / "model"), "--port", "0"], folder=tmp_path / "served")
    served.until(lambda: "Ctrl-C" in served.out())
    page = browser.new_page()
    try:
        page.goto(next(word for word in served.out().split() if word.startswith("http://")) + "/?classes=3&classes=1")
        drawn(page)
        assert page.locator(".chips [aria-pressed=true]").all_inner_texts() == ["class 1", "class 3"]
        page.locator(".chips button").first.click()
        page.click("#draw")
        drawn(page)
        assert page.locator(".images small").all_inner_texts() == ["class 3", "class 1", "class 0"]
    finally:
        page.close()
        served.kill(signal.SIGTERM)
        served.wait(20)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("?classes=3&stepz=4", "there is no setting 'stepz'; did you mean 'steps'?"),
        ("?classes=threee", "there is no class 'threee'"),
        ("?classes=3&steps=4&guidance-interval=5&guidance-interval=1", "guidance_interval (5.0, 1.0) must be"),
        ("?classes=3&policy=%7B", "policy is '{'; give one JSON object"),
        ("?classes=3&policy=" + quote('{"rules": [null]}'), "rule None must have layer"),
        ("?classes=3&policy=" + quote('{"rules": {"x": 1}}'), "it must be {"),
    ],
)
def test_a_bad_link_is_a_sentence_on_the_page(visit, words, sentence):
    page = visit(words)
    assert sentence in error(page).inner_text()
    assert "Traceback" not in page.content()


def test_a_long_drawing_is_stopped_and_holds_nobody_up(visit):
    busy = visit("?classes=3&steps=2")
    busy.fill("[data-name=steps]", "1000")
    busy.fill("#each", "16")
    busy.click("#draw")
    busy.wait_for_selector("body[aria-busy=true]")
    other = visit("?classes=8&steps=4")  # another browser's context; drawn while the first one goes on
    assert busy.locator("body[aria-busy=true]").count() == 1
    assert len(images(other)) == 1
    busy.keyboard.press("Escape")
    drawn(busy)
    assert busy.locator("#draw").inner_text() == "Draw"


def test_two_browsers_at_once(visit):
    first, second = visit("?classes=1&steps=3"), visit("?classes=2&steps=3")
    for page, seed in ((first, "21"), (second, "22")):
        page.fill("#seed", seed)
        page.fill("[data-name=steps]", "12")
        page.click("#draw")
    drawn(first)
    drawn(second)
    pipe = pipeline.load(ROOT / MODEL)
    for page, label, seed in ((first, 1, 21), (second, 2, 22)):
        expected = pipe([label], seed=seed, num_inference_steps=12).images[0]
        assert np.array_equal(images(page)[0], np.asarray(expected))


def test_a_narrow_screen_has_nothing_beside_it(visit):
    page = visit("?classes=3&steps=3&b.steps=4", viewport={"width": 360, "height": 700})
    page.locator("[data-layer='1'][data-expert='4']").first.click()
    drawn(page)
    for summary in page.locator("summary").all():
        summary.click()
    assert page.evaluate("() => document.documentElement.scrollWidth") <= 360


def test_the_page_of_a_run_moves_too(browser, tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (2, 3, 8, 8, 1)).astype(np.uint8)
    film = pictures.film_strip(noise, noise, [999.0, 500.0, 1.0], tmp_path / "film.png", names=["<b>", "1"])
    counts = np.ones((1, 2, 2, 4, 4), int)
    counts[:, :, :, 0, 3] = 9
    known = {"class_names": ["<i>", "1"], "timesteps": [250, 750], "grid": (2, 2), "layer_names": ["block 1"]}
    maps.expert_maps(counts, tmp_path / "experts.png", **known)
    drawings = {name: (tmp_path / name).read_bytes() for name in ("film.png", "experts.png")}
    live = {"film": film, "loads": maps.expert_loads(counts, **known) | {"octaves": 1}}
    (tmp_path / "index.html").write_text(report_page.render(REPORT, drawings, {}, live))
    said, page = [], browser.new_page()
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.goto(f"file://{tmp_path}/index.html")
    shown = page.locator("#film .way canvas").first
    page.locator("#film input").fill("0")
    before = shown.evaluate("one => one.toDataURL()")
    page.locator("#film input").press("ArrowRight")
    assert page.locator("#film label span").inner_text() == "t = 500"
    assert shown.evaluate("one => one.toDataURL()") != before
    page.locator("#loads button").nth(3).hover()
    told = page.locator("#loads .one").inner_text()
    assert "block 1, expert 3: 2.00 \u00d7" in told
    assert page.locator("#loads button").nth(3).get_attribute("style") == "background: rgb(214, 96, 77);"  # 1 octave
    assert "<i>" in told
    page.close()
    assert said == []
