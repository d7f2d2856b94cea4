"""What the page asks of a model: streamed answers, and drawings of its layers. Users wait for one another's turn."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import StoppingCriteriaList, TextIteratorStreamer

from visper.common.errors import ConfigError
from visper.config import load_run
from visper.data.images import open_image
from visper.evaluation import load_to_ask
from visper.evaluation.ask import as_conversation, row_inputs
from visper.evaluation.predictions import PreTrained, load_pre_trained
from visper.evaluation.visualize import PROMPT, look, needs_gallery, run_gallery

MOST_TURNS = 64
"""Texts of a conversation that are kept: older ones would fill the model's context."""


class Session:
    """A loaded model, and the predictors that PT left, if any.

    Args:
        model: a stage's output, a LLaVA folder or a hub id.
        predictors: the output of the PT that kept them; default: ``model`` where it keeps its own.
        overrides: changes to PT's run, such as a teacher's place.

    Attributes:
        predictors: None where there are none to draw.
        examples: files of PT's images, where these are still here.
    """

    def __init__(self, model: str, predictors: Path | None = None, overrides: Sequence[str] = ()) -> None:
        own = next((f for f in (Path(model), Path(model).parent) if (f / "distillation").is_dir()), None)
        self.predictors = predictors or own
        self.borrowed = predictors is not None and (own is None or own.resolve() != predictors.resolve())
        if predictors is not None and not (predictors / "distillation").is_dir():
            raise ConfigError(f"'{predictors}' keeps no predictors: give --look the output of a finished PT")
        self.name = model
        self._overrides = list(overrides)
        self._turn = threading.Lock()
        self._found: PreTrained | None = None
        self._gallery: list[Image.Image] = []
        self.student = load_to_ask(model)

    @property
    def note(self) -> str:
        """What has to be known of the drawings: whose predictors they come from."""
        if self.predictors is None:
            return "This model keeps no predictors: start with `--look` and the output of its PT to draw its layers."
        if not self.borrowed:
            return f"Predictors of {self.predictors}, over the weights they were trained with."
        return (
            f"Predictors of {self.predictors}, over the weights of {self.name}, which were trained further: a worse "
            "drawing may come from predictors that no longer fit, not from what the layers hold."
        )

    def example_images(self, count: int = 3) -> list[Image.Image]:
        """The first images that PT was trained on; none where they are gone."""
        if self.predictors is None:
            return []
        return run_gallery(load_run(self.predictors / "distillation" / "run.yaml"), count)

    def reply(self, texts: Sequence[str], image: str | None, temperature: float, length: int) -> Iterator[str]:
        """The answer to the last of ``texts`` (questions and answers in turn), growing.

        Args:
            image: a file, shown before the first question.
            temperature: 0 is greedy.
            length: tokens at most.

        Raises:
            DataError: the image cannot be read, or the text is no conversation.
        """
        images = [] if image is None else [open_image(Path(image))]
        record = as_conversation(list(texts)[-MOST_TURNS + 1 :], ["image"] * len(images))
        model, processor = self.student.model, self.student.processor
        inputs = row_inputs(processor, [record], [images]).to(model.device, model.dtype)
        streamer = TextIteratorStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
        sampling: dict[str, Any] = {"do_sample": False}
        if temperature > 0:
            sampling = {"do_sample": True, "temperature": temperature, "top_p": 0.7}
        failed: list[Exception] = []
        left = threading.Event()

        def stop(ids: Tensor, scores: Any, **others: Any) -> Tensor:
            return torch.full((len(ids),), left.is_set(), device=ids.device)

        def generate() -> None:
            try:
                with self._turn, torch.inference_mode():
                    model.generate(
                        **inputs,
                        **sampling,
                        max_new_tokens=length,
                        streamer=streamer,
                        stopping_criteria=StoppingCriteriaList([stop]),
                    )
            except Exception as error:  # noqa: BLE001 - raised again where the text is read
                failed.append(error)
                streamer.end()

        thread = threading.Thread(target=generate, daemon=True)
        thread.start()
        said = ""
        try:
            for piece in streamer:
                said += piece
                yield said.strip()
        finally:
            left.set()  # the visitor may have gone
        thread.join()
        if failed:
            raise failed[0]

    def draw(self, image: str | None, question: str = "") -> Image.Image:
        """Every tapped layer's prediction beside its teacher's own; teachers are loaded at the first call.

        Raises:
            ConfigError: there are no predictors, or a teacher cannot be loaded.
            DataError: no image, or one that cannot be read.
        """
        if self.predictors is None:
            raise ConfigError(self.note)
        if image is None:
            raise ConfigError("choose an image first")
        shown = open_image(Path(image))
        with self._turn:
            if self._found is None:
                self._found = load_pre_trained(self.predictors, self._overrides, self.student)
                self._gallery = run_gallery(self._found.run) if needs_gallery(self._found) else []
            return look(self._found, shown, question or PROMPT, self._gallery)
