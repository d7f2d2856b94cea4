"""Rows of several images train as one would have it: nothing depends on how a batch is split, padded or packed."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests import tiny
from tests.logs import computed
from visper.config import Geometry, Run
from visper.config import Student as StudentConfig
from visper.data.chat import ConversationEncoder
from visper.data.collator import Collator
from visper.data.dataset import ConversationDataset
from visper.data.images import normalized_pixels
from visper.data.packing import PackingCollator
from visper.data.rows.records import DropList
from visper.data.rows.sources import open_records
from visper.distillation import DistilledTask, EmbeddingDistillation, Targets, TargetSpec
from visper.model import TaskTokens, build_student, initial_queries
from visper.training import TrainingModel, run_stage
from visper.training.attention import separate_samples
from visper.training.module import FORWARD_KEYS


@pytest.fixture
def train(tiny_llm, tiny_encoder, tmp_path):
    """Two steps of eight rows of none to three images: ``train("ift", "name", packing=True)``."""
    rows = tiny.write_several(tmp_path / "rows")

    def run(stage, name, join_conversations=False, **optimization):
        split = {"global_batch": 8, "micro_batch": 4, "lr": 1e-3, "max_steps": 2, "precision": "float32"}
        settings = {
            "name": name,
            "stage": stage,
            "output": str(tmp_path / name),
            "student": {"llm": str(tiny_llm), "encoder": str(tiny_encoder)},
            "data": {"sources": [{"json": str(rows / "rows.json"), "images": str(rows / "images")}]},
            "optimization": {**split, **optimization},
            "logging": {"every": 1},
        }
        settings["data"] |= {"workers": 0, "join_conversations": join_conversations}
        if stage == "pt":
            settings["distillation"] = tiny.distillation()
        run_stage(Run.model_validate(settings))
        return computed(tmp_path / name), load_file(Path(tmp_path / name / "model" / "model.safetensors"))

    return run


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["pt", "vpt", "ift"])
def test_any_split_gives_the_losses_and_weights_of_any_other_packed_or_padded(train, stage):
    (first_logs, first), *others = [
        train(stage, "one", micro_batch=8),
        train(stage, "split", micro_batch=1),
        train(stage, "packed", packing=True),
    ]
    assert len(first_logs) == 2
    for logs, weights in others:
        for one, other in zip(first_logs, logs, strict=True):
            # float32 sums in another order, as in tests/training/test_run.py
            assert other == pytest.approx(one, rel=5e-5, abs=1e-6)
        for name, value in first.items():
            torch.testing.assert_close(weights[name], value, rtol=0, atol=2e-4)


def test_conversations_about_the_same_images_can_be_joined(train, capsys):
    whole = {"global_batch": 16, "micro_batch": 16}
    (apart, weights), (joined, joined_weights) = (
        train("ift", "apart", **whole),
        train("ift", "joined", join_conversations=True, **whole),
    )
    assert "12 conversations about an image share 6 images" in capsys.readouterr().out
    for one, other in zip(apart, joined, strict=True):
        assert other == pytest.approx(one, rel=5e-5, abs=1e-6)
    for name, value in weights.items():
        torch.testing.assert_close(joined_weights[name], value, rtol=0, atol=2e-4)


@pytest.mark.parametrize("text_keys", [True, False])
@pytest.mark.parametrize("packed", [False, True])
def test_embedding_losses_are_those_of_each_image_alone(tiny_llm, tiny_encoder, tmp_path, text_keys, packed):
    """Each image's term, computed by hand from the states of its own tokens, its own task tokens and its row's text."""
    student = build_student(StudentConfig(llm=str(tiny_llm), encoder=str(tiny_encoder)), Geometry.SQUASH)
    queries = initial_queries(student, {"depth": 16}, torch.Generator().manual_seed(0))
    task = DistilledTask(TargetSpec(16, 8, (4, 4)), (2,), tiny.published_predictors()["depth"])
    objective = EmbeddingDistillation({"depth": task}, student.hidden_size, student.num_layers, text_keys=text_keys)
    model = TrainingModel(student, TaskTokens(student.task_token_ids, queries), objective).eval()
    rows = tiny.write_several(tmp_path, rows=4)
    dataset = ConversationDataset(
        open_records([(rows / "rows.json", rows / "images")], DropList()), ConversationEncoder(student.processor)
    )
    collator = Collator(student.processor.tokenizer.pad_token_id)
    batch = collator([dataset[i] for i in range(4)])
    assert batch["image_rows"].tolist() == [0, 0, 1, 3, 3, 3]
    own = torch.randn(6, 16, 8, generator=torch.Generator().manual_seed(1))
    targets = {"depth": Targets(own, own, torch.arange(6))}
    given = PackingCollator(collator)([dataset[i] for i in range(4)]) if packed else batch
    if packed:
        separate_samples(student.model.get_decoder())
    seen = normalized_pixels(student.processor.image_processor, batch["pixel_values"])
    with torch.no_grad():
        terms = model(**{k: given[k] for k in FORWARD_KEYS if k in given}, num_tokens=1, num_images=6, targets=targets)
        states = model.student.model(
            input_ids=batch["input_ids"], pixel_values=seen, output_hidden_states=True
        ).hidden_states[2]
    distances = []
    for row in range(4):
        ids = batch["input_ids"][row, : int(batch["attention_mask"][row].sum())].tolist()
        for image in range(batch["image_rows"].tolist().count(row)):
            read = positions_of(ids, image, student, text_keys)
            query = model.task_tokens.queries["depth"][None]
            with torch.no_grad():
                predicted = objective.predictors["depth_2"](states[row : row + 1, read], query, None)
            target = own[len(distances) : len(distances) + 1]
            distances.append(float(torch.nn.functional.smooth_l1_loss(predicted, target)))
    assert len(set(distances)) == 6
    # float32 sums in another order: largest relative difference seen 1.5e-7
    assert float(terms["depth/2/smooth_l1"]) == pytest.approx(sum(distances) / 6, rel=5e-6)


def positions_of(ids, image, student, text_keys):
    """What the depth head reads of one of a row's images, each of which has 16 image tokens."""
    kinds = [None] * len(ids)
    seen = {}
    for at, token in enumerate(ids):
        names = [name for name, own in student.task_token_ids.items() if token in own]
        if token == student.image_token_id:
            kinds[at] = ("image", seen.get("image", 0) // 16)
            seen["image"] = seen.get("image", 0) + 1
        elif names:
            kinds[at] = (names[0], seen["image"] // 16 - 1)
    end = max(at for at, kind in enumerate(kinds) if kind is not None and kind[1] == image)
    wanted = {("image", image), ("depth", image)} | {None}
    return [at for at, kind in enumerate(kinds) if kind in wanted and (text_keys or at <= end)]
