"""The Gradio page: image and settings on the left, the conversation on the right, drawings below."""

from __future__ import annotations

import html
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from PIL import Image

from visper.common.errors import ConfigError, VisperError
from visper.data.images import open_image
from visper.demo.session import Session

try:
    import gradio as gr
except ImportError as error:
    raise ConfigError("the demo needs gradio: pip install 'visper-lm[demo]'") from error

Messages = list[dict[str, Any]]
CSS = """footer {display: none !important}
.note {font-size: 0.9em; opacity: 0.8}
#shown img {width: 100%; height: 100%; object-fit: contain}"""
DAY = 24 * 60 * 60


class Events:
    """Handlers of the page's events. Errors are shown on the page."""

    def __init__(self, session: Session) -> None:
        self.session = session

    def answer(
        self, asked: str, before: list[str], file: str | None, temperature: float, length: float
    ) -> Iterator[tuple[Any, ...]]:
        """Yields chat, conversation and question box, again for each piece of the answer."""
        if not asked.strip():
            gr.Warning("Type a question first.")
            yield gr.skip(), gr.skip(), gr.skip()
            return
        yield _messages([*before, asked]), gr.skip(), ""  # cleared only now: the visitor may type the next question
        said = ""
        try:
            for said in self.session.reply([*before, asked], file, float(temperature), int(length)):
                yield _messages([*before, asked, said]), gr.skip(), gr.skip()
        except (VisperError, ValueError, OSError) as error:
            warn(error)
            yield _messages(before), gr.skip(), asked
            return
        yield _messages([*before, asked, said or "(an empty answer)"]), [*before, asked, said], gr.skip()

    def begin(self, file: str | None) -> tuple[Image.Image | None, Messages, list[str], None]:
        """Returns the new image, an empty conversation and no drawing."""
        shown = None
        if file is not None:
            try:
                shown = open_image(Path(file))
            except VisperError as error:
                warn(error)
        return shown, [], [], None

    def chosen(self, event: gr.SelectData) -> str:
        """The file of the chosen example."""
        return str(self.session.examples[event.index])

    def draw(self, file: str | None, asked: str) -> Image.Image | None:
        """Draws the layers' predictions beside the teachers' output."""
        try:
            return self.session.draw(file, asked.strip())
        except (VisperError, ValueError, OSError) as error:
            warn(error)
            return None


def warn(error: Exception) -> None:
    """Shows an error on the page. Gradio renders messages as HTML, so an unescaped ``<image>`` would vanish."""
    gr.Warning(html.escape(str(error)))


def build_page(session: Session) -> gr.Blocks:
    """Builds the page for one loaded model. Each visitor has a separate conversation."""
    with gr.Blocks(title="VisPer", analytics_enabled=False, delete_cache=(DAY, DAY)) as page:
        gr.Markdown(f"## VisPer\n{session.name}")
        texts, events, examples = gr.State([]), Events(session), session.examples
        with gr.Row():
            with gr.Column(scale=1):
                image = gr.File(label="Image file", file_types=["image"], type="filepath", elem_id="upload", height=120)
                shown = gr.Image(label="Image", interactive=False, height=280, elem_id="shown", buttons=[])
                if examples:
                    gr.Markdown("Example images", elem_classes="note")
                    shelf = gr.Gallery(
                        [str(file) for file in examples],
                        show_label=False,
                        columns=len(examples),
                        height=130,
                        allow_preview=False,
                        elem_id="examples",
                        buttons=[],
                    )
                temperature = gr.Slider(
                    0, 1.5, 0.2, step=0.05, label="Temperature (0: greedy decoding)", elem_id="temperature"
                )
                length = gr.Slider(
                    1, 1024, 256, step=1, label="Maximum length of the answer, in tokens", elem_id="length"
                )
            with gr.Column(scale=2):
                chat = gr.Chatbot(label="Chat", height=430, render_markdown=False, elem_id="chat", buttons=[])
                question = gr.Textbox(label="Question", placeholder="Ask about the image", elem_id="question")
                with gr.Row():
                    send = gr.Button("Send", variant="primary", elem_id="send")
                    clear = gr.Button("New conversation", elem_id="clear")
        with gr.Group():
            see = gr.Button("What do the layers see?", elem_id="see", interactive=session.predictors is not None)
            gr.Markdown(session.note, elem_classes="note", elem_id="note", padding=True)
            sheet = gr.Image(
                show_label=False, interactive=False, format="png", elem_id="sheet", buttons=["fullscreen", "download"]
            )

        wanted, result = [question, texts, image, temperature, length], [chat, texts, question]
        asking = gr.on([question.submit, send.click], events.answer, wanted, result, concurrency_limit=8)
        drawing = see.click(events.draw, [image, question], sheet)
        # Running events belong to the previous image and conversation.
        image.change(events.begin, image, [shown, chat, texts, sheet], cancels=[asking, drawing])
        if examples:
            shelf.select(events.chosen, None, image)
        gr.on([clear.click, chat.clear], lambda: ([], []), None, [chat, texts], cancels=[asking])
    return page


def serve(session: Session, host: str, port: int, wait: bool = True) -> str:
    """Serves the page until it is stopped. It never opens a public link.

    Args:
        host, port: the address to listen on.
        wait: block until Ctrl-C, SIGTERM or SIGHUP, then delete the uploads.

    Returns:
        The page's address.

    Raises:
        ConfigError: the port is in use.
    """
    page = build_page(session).queue()
    try:
        _, address, _ = page.launch(
            server_name=host,
            server_port=port,
            share=False,
            quiet=True,
            show_error=True,
            css=CSS,
            prevent_thread_lock=True,
            allowed_paths=[str(session.examples_folder)],
            max_file_size="50mb",
            ssr_mode=False,
            enable_monitoring=False,
            footer_links=[],
        )
    except OSError as error:
        raise ConfigError(f"port {port} of {host} is in use or not permitted: choose another with --port") from error
    if wait:
        with _ends_like_ctrl_c():
            print(f"serving {session.name} at {address} (Ctrl-C to stop)", flush=True)
            page.block_thread()
    return str(address)


@contextmanager
def _ends_like_ctrl_c() -> Iterator[None]:
    """Turns SIGTERM and a closed terminal into Ctrl-C, after which Gradio deletes the uploads."""

    def end(*_: object) -> None:
        for number in ending:
            signal.signal(number, signal.SIG_IGN)  # a second one would interrupt the deletion
        raise KeyboardInterrupt

    numbers = (signal.SIGTERM, signal.SIGHUP)
    ending = [number for number in numbers if signal.getsignal(number) is not signal.SIG_IGN]  # as nohup ignores SIGHUP
    before = {number: signal.signal(number, end) for number in ending}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _messages(texts: list[str]) -> Messages:
    """The chat's messages. Texts are escaped, because Gradio renders them as HTML."""
    roles = ("user", "assistant")
    return [{"role": roles[number % 2], "content": html.escape(text)} for number, text in enumerate(texts)]
