"""The demo in a real browser, on the quickstart's parts: what a visitor does, and what is shown when it goes wrong."""

import importlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import requests
import torch
from PIL import Image
from playwright.sync_api import TimeoutError as PlaywrightTimeout
from playwright.sync_api import sync_playwright
from typer.testing import CliRunner

from visper.cli import app
from visper.common.console import Console
from visper.common.errors import ConfigError, DataError
from visper.demo.page import serve
from visper.demo.session import Session
from visper.evaluation import answer, load_to_ask
from visper.evaluation.predictions import load_pre_trained
from visper.quickstart.run import Budget, copy_bases, prepare_world, stage_runs
from visper.training import run_stage

pytestmark = pytest.mark.slow

CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)
QUESTION = "How many are there , 0 , 1 , 2 or 3 : the boxes ?"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A few steps of the quickstart's PT and IFT: the folder with both."""
    out = tmp_path_factory.mktemp("demo")
    budget = Budget(scenes=40, held_out=10, per_kind=2, pt_steps=2, ift_steps=2, judged=2)
    world = prepare_world(out / "world", 0, budget, Console(quiet=True))
    copy_bases(out / "bases")
    for run in stage_runs(out, world, 0, budget).values():
        run_stage(run)
    return out


@pytest.fixture(scope="module")
def session(trained):
    return Session(str(trained / "ift"), trained / "pt")


@pytest.fixture(scope="module")
def image(trained):
    return str(sorted((trained / "world" / "images").glob("train*"))[0])


@pytest.fixture(scope="module")
def address(session):
    """Where the page is served while the tests of this file run."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return serve(session, "127.0.0.1", port, wait=False)


@pytest.fixture
def page(address):
    """The page as a visitor without a network beyond this machine sees it."""
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine: apt-get install chromium")
    with (
        sync_playwright() as browsers,
        browsers.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"]) as one,
    ):
        visit = one.new_page()
        asked = []
        visit.on("request", lambda request: asked.append(request.url))
        visit.goto(address)
        visit.set_default_timeout(120_000)
        visit.wait_for_selector("#question textarea")
        yield visit
        assert [url for url in asked if not url.startswith((address, "data:", "blob:"))] == []


def ask(visit, text, answers):
    visit.fill("#question textarea", text)
    shown = f"document.querySelectorAll('#chat .user.message').length >= {answers}"
    for _ in range(20):  # a click is not taken while the page still ends its last answer
        visit.click("#send")
        try:
            visit.wait_for_function(shown, timeout=6_000)
            break
        except PlaywrightTimeout:
            continue
    visit.wait_for_function(f"document.querySelectorAll('#chat .bot.message').length >= {answers}")
    visit.wait_for_function("document.querySelectorAll('#chat .generating').length == 0")


def warning(visit):
    return visit.wait_for_selector(".toast-body").inner_text()


def test_an_answer_is_that_of_evaluation(session, trained, image):
    expected = answer(load_to_ask(trained / "ift"), [QUESTION], [[Image.open(image).convert("RGB")]], 8)[0]
    assert list(session.reply([QUESTION], image, 0.0, 8))[-1:] == ([expected] if expected else [""])


def test_two_at_once_get_their_own_answers(session, image):
    alone = {text: list(session.reply([text], image, 0.0, 12))[-1] for text in (QUESTION, "Describe the picture .")}
    together = {}

    def visitor(text):
        together[text] = list(session.reply([text], image, 0.0, 12))[-1]

    threads = [threading.Thread(target=visitor, args=(text,)) for text in alone]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert together == alone


def test_a_conversation_shows_the_turns_before(session, image):
    second = list(session.reply([QUESTION, "2", "And the spheres ?"], image, 0.0, 4))
    assert second
    with pytest.raises(Exception, match="image"):
        list(session.reply(["<image> and <image> ?"], image, 0.0, 4))


def test_predictors_of_pt_read_the_later_weights(session, trained, image):
    """The drawing is over the model that is asked, not over PT's, and the page says so."""
    session.draw(image)
    assert session._found.model.student is session.student.model
    assert "which they were not trained with" in session.note
    other = load_pre_trained(trained / "pt").model.student.state_dict()
    ours = session.student.model.state_dict()
    assert any(not torch.equal(ours[name], other[name]) for name in ours)


def test_the_drawn_model_goes_on_answering_with_its_own_task_tokens(trained):
    """A later stage may have trained them: PT's queries are for its predictors alone."""
    student = load_to_ask(trained / "ift")
    embedding = student.model.get_input_embeddings()
    ids = torch.tensor([token for tokens in student.task_token_ids.values() for token in tokens])
    with torch.no_grad():
        embedding.weight[ids] += 1
    load_pre_trained(trained / "pt", student=student)
    assert torch.equal(embedding(ids), embedding.weight[ids])


def test_a_sheet_of_other_weights_says_so_itself(session, image):
    """So that it still does where it is downloaded or shown alone."""
    own = Session(str(session.predictors))
    assert "the weights they were trained with" in own.note
    own.student = session.student  # loaded once
    assert session.draw(image).height > own.draw(image).height


def test_a_model_of_other_layers_is_refused(trained):
    student = load_to_ask(trained / "ift")
    student.model.config.get_text_config().num_hidden_layers = 7
    with pytest.raises(ConfigError, match=r"read an LLM of 4 layers, width 128, .*; the model has 7 layers, width 128"):
        load_pre_trained(trained / "pt", student=student)


@pytest.mark.parametrize("temperature", [0.0, 0.2])
def test_a_model_that_was_made_to_search_with_beams_is_streamed(session, image, monkeypatch, temperature):
    monkeypatch.setattr(session.student.model.generation_config, "num_beams", 3)
    assert list(session.reply(["What is this?"], image, temperature, 4))


def test_a_conversation_longer_than_the_context_is_refused(session, image):
    with pytest.raises(DataError, match="fills the model's 1024 positions: start a new one"):
        list(session.reply(["many " * 1100], image, 0.0, 4))


def test_without_gradio_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    monkeypatch.delitem(sys.modules, "visper.demo.page")
    with pytest.raises(ConfigError, match=r"pip install 'visper-lm.demo.'"):
        importlib.import_module("visper.demo.page")


def test_a_model_of_other_tokens_is_refused(trained, tmp_path):
    run = stage_runs(trained, trained / "world", 0, Budget(40, 10, 2, 1, 1, 2), {"distillation": None})["pt"]
    plain = run.model_copy(
        update={"output": str(tmp_path / "plain"), "student": run.student.model_copy(update={"task_tokens": None})}
    )
    run_stage(plain)
    with pytest.raises(ConfigError, match="give the PT run that it was fine-tuned from"):
        load_pre_trained(trained / "pt", student=load_to_ask(tmp_path / "plain"))


def test_look_draws_a_later_stage_with_a_line_that_says_so(trained, image, tmp_path):
    arguments = ["look", str(trained / "ift"), "--predictors", str(trained / "pt"), "--image", image]
    found = CliRunner().invoke(app, [*arguments, "-o", str(tmp_path / "seen.png")])
    assert found.exit_code == 0, found.output
    assert "not trained with" in found.output.replace("\n", " ")
    assert Image.open(tmp_path / "seen.png").size[0] > 384


def test_a_port_in_use_is_said(session):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=rf"port {port} of 127.0.0.1 is in use.*--port"):
            serve(session, "127.0.0.1", port, wait=False)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_uploads_are_deleted_however_the_demo_is_stopped(trained, image, tmp_path, number):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "visper", "demo", str(trained / "ift"), "--port", str(port)]
    settings = {**os.environ, "GRADIO_TEMP_DIR": str(tmp_path)}
    # A test that runs in the background ignores Ctrl-C, and so would its children.
    before = signal.signal(number, signal.SIG_DFL)
    try:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=settings)
    finally:
        signal.signal(number, before)
    try:
        assert any("serving" in line for line in process.stdout)
        content = {"files": ("a.png", Path(image).read_bytes())}
        requests.post(f"http://127.0.0.1:{port}/gradio_api/upload", files=content).raise_for_status()
        there = [path for path in tmp_path.rglob("*") if path.is_file()]
        process.send_signal(number)
        assert process.wait(60) == 0 and len(there) == 1 and not there[0].exists()
    finally:
        process.kill()
        process.stdout.close()


def test_a_model_without_predictors_chats_and_says_what_to_give(trained, image):
    plain = Session(str(trained / "ift"))
    assert plain.predictors is None and "--look" in plain.note
    with pytest.raises(ConfigError, match="has no predictors"):
        plain.draw(image)
    with pytest.raises(ConfigError, match="give the output of the PT run before it"):
        Session(str(trained / "ift"), trained / "ift")


def test_a_visitor_chats_and_sees_the_layers(page, image):
    page.set_input_files("#upload input[type=file]", image)
    page.wait_for_selector("#shown img")
    page.fill("#length input[type=number]", "4")
    ask(page, "<b>Text</b> is shown & read as text .", 1)
    assert page.locator("#chat .user.message").inner_text() == "<b>Text</b> is shown & read as text ."
    ask(page, "How many are there , 0 , 1 , 2 or 3 : the spheres ?", 2)
    page.click("#see")
    page.wait_for_selector("#sheet img", timeout=60_000)
    assert "not trained with" in page.inner_text("#note")
    page.click("#clear")
    page.wait_for_function("document.querySelectorAll('#chat .message').length == 0")
    page.fill("#question textarea", "<image> and <image> ?")
    page.click("#send")
    assert "<image>" in warning(page)


def test_what_goes_wrong_is_shown(page, tmp_path):
    page.click("#send")
    assert "Type a question first" in warning(page)
    page.click(".toast-close")
    page.wait_for_selector(".toast-body", state="detached")
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"\x89PNG\r\n\x1a\n" + b"nothing")
    page.set_input_files("#upload input[type=file]", broken)
    assert "broken.png" in warning(page)


def test_two_visitors_at_once_get_their_own_answers(page, session, image):
    questions = ("Describe the picture .", QUESTION)
    pages = (page, page.context.browser.new_page())
    pages[1].goto(page.url)
    for visit, question in zip(pages, questions, strict=True):
        visit.wait_for_selector("#question textarea")
        visit.set_input_files("#upload input[type=file]", image)
        visit.wait_for_selector("#shown img")
        visit.fill("#temperature input[type=number]", "0")
        visit.fill("#length input[type=number]", "24")
        visit.fill("#question textarea", question)
    for visit in pages:
        visit.click("#send")
    for visit, question in zip(pages, questions, strict=True):
        expected = list(session.reply([question], image, 0.0, 24))[-1]
        visit.wait_for_function("said => document.querySelector('#chat .bot.message')?.innerText == said", arg=expected)
        assert visit.locator("#chat .user.message").all_inner_texts() == [question]
    pages[1].close()


def test_an_answer_about_the_image_before_does_not_reach_the_new_conversation(page, session, image):
    page.set_input_files("#upload input[type=file]", image)
    page.wait_for_selector("#shown img")
    page.fill("#question textarea", "Describe the picture .")
    with session._turn:  # the answer waits
        page.click("#send")
        page.wait_for_selector("#chat .user.message")
        page.locator("#examples button").nth(1).click()
        page.wait_for_function("document.querySelectorAll('#chat .message').length == 0")
    page.wait_for_timeout(1000)
    assert page.locator("#chat .message").count() == 0
    page.fill("#length input[type=number]", "4")
    ask(page, QUESTION, 1)
    assert page.locator("#chat .user.message").all_inner_texts() == [QUESTION]


def test_examples_are_images_of_pt(session, image):
    assert len(session.examples) == 3
    assert Image.open(session.examples[0]).tobytes() == Image.open(image).convert("RGB").tobytes()
