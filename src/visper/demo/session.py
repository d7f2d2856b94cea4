"""The model behind the page: streamed answers and drawings of its layers, for one user at a time."""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import StoppingCriteriaList, TextIteratorStreamer

from visper.common.errors import ConfigError, DataError
from visper.config import load_run
from visper.data.images import open_image
from visper.evaluation import load_to_ask
from visper.evaluation.ask import GREEDY, as_conversation, room_for_answers, row_inputs
from visper.evaluation.contact_sheet import with_note
from visper.evaluation.predictions import PreTrained, load_pre_trained, other_weights_note, predictors_folder
from visper.evaluation.visualize import PROMPT, first_images, look, needs_gallery

EXAMPLES = 3
"""Number of example images on the page."""


class Session:
    """A loaded model and, if there are any, the predictors that PT saved.

    Args:
        model: a stage's output, a LLaVA folder or a hub id.
        predictors: the output of the PT that saved them; default: ``model``, if it has predictors.
        overrides: changes to PT's run, such as the path of a teacher.

    Attributes:
        predictors: None if there are no predictors.
        examples: files of PT's first images; empty if those no longer exist.
        warning: shown beside drawings if the predictors were trained with other weights than the model's.
    """

    def __init__(self, model: str, predictors: Path | None = None, overrides: Sequence[str] = ()) -> None:
        if predictors is None and any((f / "distillation").is_dir() for f in (Path(model), Path(model).parent)):
            predictors = Path(model)
        if predictors is None and overrides:
            raise ConfigError("--set changes the run of the predictors, and this model has none: name it with --look")
        self.predictors = None if predictors is None else predictors_folder(predictors)
        self.warning = None if self.predictors is None else other_weights_note(self.predictors, model)
        self.name = model
        self._overrides = list(overrides)
        self._turn = threading.Lock()
        self._found: PreTrained | None = None
        self._gallery: list[Image.Image] = []
        self.student = load_to_ask(model)
        self._folder = tempfile.TemporaryDirectory(prefix="visper-demo-")
        self.examples_folder = Path(self._folder.name)
        self.examples: list[Path] = []
        if self.predictors is not None:
            run = load_run(self.predictors / "distillation" / "run.yaml")
            for number, image in enumerate(first_images(run.data, EXAMPLES), start=1):
                self.examples.append(self.examples_folder / f"example-{number}.png")
                image.save(self.examples[-1])

    @property
    def note(self) -> str:
        """A note on which predictors the drawings come from."""
        if self.predictors is None:
            return "This model has no predictors: to draw its layers, start with `--look` and the output of its PT."
        return self.warning or f"Predictors of {self.predictors}, on the weights they were trained with."

    def reply(self, texts: Sequence[str], image: str | None, temperature: float, length: int) -> Iterator[str]:
        """Yields the growing answer to the last of ``texts``.

        Args:
            texts: questions and answers in turn, ending with a question.
            image: a file, shown before the first question.
            temperature: 0 for greedy decoding.
            length: maximum length of the answer in tokens.

        Raises:
            DataError: the image cannot be read, or the text does not fit it or the model's context.
        """
        images = [] if image is None else [open_image(Path(image))]
        record = as_conversation(texts, ["image"] * len(images))
        model, processor = self.student.model, self.student.processor
        inputs = row_inputs(processor, [record], [images]).to(model.device, model.dtype)
        (room,) = room_for_answers(self.student, inputs)
        if room < 1:
            said = f"the conversation fills the model's {self.student.positions} positions: start a new one"
            raise DataError("too long", said)
        streamer = TextIteratorStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
        sampling = GREEDY
        if temperature > 0:
            sampling = {**GREEDY, "do_sample": True, "temperature": temperature, "top_p": 0.7}
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
                        max_new_tokens=min(length, room),
                        streamer=streamer,
                        stopping_criteria=StoppingCriteriaList([stop]),
                    )
            except Exception as error:  # noqa: BLE001 - raised again below, in the thread that reads the text
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
            left.set()  # stop generating if the visitor has left
        thread.join()
        if failed:
            raise failed[0]

    def draw(self, image: str | None, question: str = "") -> Image.Image:
        """Draws every tapped layer's prediction beside its teacher's output. Teachers are loaded on the first call.

        Raises:
            ConfigError: there are no predictors or no image, or a teacher cannot be loaded.
            DataError: the image cannot be read.
        """
        if self.predictors is None:
            raise ConfigError(self.note)
        if image is None:
            raise ConfigError("choose an image first")
        shown = open_image(Path(image))
        with self._turn:
            if self._found is None:
                self._found = load_pre_trained(self.predictors, self._overrides, self.student)
                self._gallery = first_images(self._found.run.data) if needs_gallery(self._found) else []
            sheet = look(self._found, shown, question or PROMPT, self._gallery)
        return sheet if self.warning is None else with_note(sheet, self.warning)
