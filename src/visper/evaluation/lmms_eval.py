"""The model ``visper`` for lmms-eval, which finds it through the entry point of the group ``lmms_eval.models``.

Nothing else in this package imports this file: without lmms-eval the entry point has no effect. Checked with lmms-eval
0.7.3.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from accelerate import Accelerator
from lmms_eval.api.model import lmms
from lmms_eval.models.registry_v2 import ModelManifest
from PIL import Image

from visper.common.console import track
from visper.common.errors import ConfigError
from visper.data.rows.formats import IMAGE_TAG
from visper.evaluation.ask import answer, load_to_ask

MAX_NEW_TOKENS = 1024
"""Used if a task sets no length; lmms-eval's own default."""


def manifest() -> ModelManifest:
    """The entry that lmms-eval registers, for ``--model visper --model_args pretrained=MODEL``."""
    return ModelManifest(model_id="visper", chat_class_path=f"{__name__}.VisperModel")


class VisperModel(lmms):
    """A student that answers greedily and in batches, as it does in ``visper evaluate`` for the same prompts.

    Args:
        device: ignored, as lmms-eval always passes one; a GPU is used if there is one.
    """

    is_simple = False

    def __init__(self, pretrained: str, batch_size: int | str = 1, device: str | None = None, **unknown: Any) -> None:
        super().__init__()
        if unknown:
            raise ConfigError(f"--model_args of 'visper' are pretrained and batch_size; found {', '.join(unknown)}")
        self.student = load_to_ask(pretrained)
        self.batch_size = int(batch_size)
        self.accelerator = Accelerator()
        self.device = self.student.model.device
        self._rank = self.accelerator.process_index
        self._world_size = self.accelerator.num_processes

    def generate_until(self, requests: list[Any]) -> list[str]:
        """Answers in the order of the requests, each cut before the first stop text of its task.

        A question that is longer than the LLM's positions gets a warning and an empty answer, so that it counts as
        wrong and does not end the evaluation.

        Raises:
            ConfigError: a task asks for sampling or beams, or for a conversation of several turns.
            DataError: a question does not have as many image tags as images.
        """
        groups: dict[tuple[int, tuple[str, ...]], list[int]] = defaultdict(list)
        for number, request in enumerate(requests):
            groups[_settings(request.args[2])].append(number)
        # Sorted by length, so that batches have little padding.
        batches = [
            (settings, members[start : start + self.batch_size])
            for settings, numbers in groups.items()
            for members in [sorted(numbers, key=lambda number: len(requests[number].args[0]))]
            for start in range(0, len(members), self.batch_size)
        ]
        answers = [""] * len(requests)
        for (max_new_tokens, stops), batch in track(batches, description="asking", quiet=self.rank != 0):
            texts, images = zip(*(self._question(requests[number].args) for number in batch), strict=True)
            for number, text in zip(batch, answer(self.student, texts, images, max_new_tokens), strict=True):
                answers[number] = _cut(text or "", stops)
                context, _, options = requests[number].args[:3]
                self.cache_hook.add_partial("generate_until", (context, options), answers[number])
        return answers

    def _question(self, arguments: tuple[Any, ...]) -> tuple[str, list[Image.Image]]:
        _, to_messages, _, document, task, split = arguments
        messages = to_messages(self.task_dict[task][split][document])
        if [message["role"] for message in messages] != ["user"]:
            roles = ", ".join(message["role"] for message in messages)
            raise ConfigError(f"task '{task}' sends the turns {roles}: the model 'visper' answers one user turn")
        return as_question(messages[0]["content"], task)

    def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
        """Not supported: only tasks of output type ``generate_until`` are."""
        raise NotImplementedError("the model 'visper' answers tasks of output type generate_until, not loglikelihood")

    def generate_until_multi_round(self, requests: list[Any]) -> list[str]:
        """Not supported: only tasks of output type ``generate_until`` are."""
        raise NotImplementedError("the model 'visper' answers tasks of output type generate_until, not multi-round")


def as_question(parts: Sequence[dict[str, Any]], task: str) -> tuple[str, list[Image.Image]]:
    """Text and images of a user turn. A tag marks the place of each of several images, unless the text has the tags."""
    other = {part["type"] for part in parts} - {"text", "image"}
    if other:
        raise ConfigError(f"task '{task}' sends {', '.join(sorted(other))}: the model 'visper' reads text and images")
    images = [part["url"] for part in parts if part["type"] == "image"]
    texts = [part["text"] for part in parts if part["type"] == "text"]
    if len(images) > 1 and sum(text.count(IMAGE_TAG) for text in texts) != len(images):
        texts = [IMAGE_TAG if part["type"] == "image" else part["text"] for part in parts]
    return "\n".join(texts), images


def _settings(options: dict[str, Any]) -> tuple[int, tuple[str, ...]]:
    if options.get("do_sample") or (options.get("temperature") or 0) > 0 or (options.get("num_beams") or 1) > 1:
        raise ConfigError(
            f"the task asks for {options}: the model 'visper' answers greedily; add --gen_kwargs "
            "temperature=0,do_sample=False,num_beams=1"
        )
    until = options.get("until") or []
    stops = (until,) if isinstance(until, str) else tuple(until)
    return int(options.get("max_new_tokens") or MAX_NEW_TOKENS), stops


def _cut(text: str, stops: Sequence[str]) -> str:
    for stop in stops:
        text = text.split(stop, 1)[0] if stop else text
    return text.strip()
