"""A whole tiny model against the published code (golden g4): same weights, same inputs, same numbers.

Where the published code is wrong, the method is matched instead and the test says so: its predictors attend padding, so
only rows without padding are compared; with a text-only sample in the batch it divides smooth-L1 by all samples and
scales the contrastive term as a whole (`hole` fault), so its per-layer values are reproduced from per-sample losses by
that faulty formula, and ours are checked against the method's.
"""

import pytest
import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from tests.published.names import from_published
from tests.tiny import published_predictors
from visper.distillation import (
    DistilledTask,
    EmbeddingDistillation,
    HiddenStateTap,
    Targets,
    TargetSpec,
    TokenLayout,
)
from visper.distillation.losses import info_nce, smooth_l1
from visper.model import Student, TaskTokens
from visper.training import TrainingModel

IMAGE = -200
"""The published code's mark of an image among the ids."""

TOLERANCE = 2e-5
"""Largest difference seen: 4e-6 of the largest value (float32, another order of summation; SDPA against eager)."""


class Published:
    """The fixture as our objects: the training model, our expanded inputs, and the published tensors."""

    def __init__(self, config, tensors, part):
        self.config, self.tensors = config, tensors
        state = part(tensors, "state/")
        self.order = config["token_order"]
        vocabulary = config["llm"]["vocab_size"]
        per_task = config["num_task_tokens"]
        self.image_id = vocabulary
        starts = {task: vocabulary + 1 + i * per_task for i, task in enumerate(self.order)}
        self.task_ids = {task: list(range(start, start + per_task)) for task, start in starts.items()}
        self.llava = llava_of(config, state, vocabulary + 1 + per_task * len(self.order), self.image_id)
        student = Student(self.llava, None, self.task_ids)
        queries = {task: state[f"model.special_{task}_tokens"] for task in self.order}
        self.model = TrainingModel(student, TaskTokens(self.task_ids, queries), objective_of(config, state)).eval()
        self.ids, self.labels, self.attention = self.expand()
        self.image_rows = self.tensors["in/mask"].nonzero()[:, 0]
        self.whole_rows = [r for r in self.image_rows.tolist() if self.attention[r].all()]
        assert self.whole_rows, "the fixture has no image row without padding"

    def expand(self):
        """The published splice, spelt out: the image's place becomes its tokens and the task tokens."""
        block = [self.image_id] * self.tensors["splice/projected"].shape[1]
        block += [token for ids in self.task_ids.values() for token in ids]
        ids, labels = [], []
        for row, target, mask in zip(
            self.tensors["in/input_ids"], self.tensors["in/labels"], self.tensors["in/attention_mask"], strict=True
        ):
            row_ids, row_labels = [], []
            for token, label in zip(row[mask].tolist(), target[mask].tolist(), strict=True):
                row_ids += block if token == IMAGE else [token]
                row_labels += [-100] * len(block) if token == IMAGE else [label]
            ids.append(torch.tensor(row_ids))
            labels.append(torch.tensor(row_labels))
        attention = pad_sequence([torch.ones_like(row) for row in ids], batch_first=True)
        return pad_sequence(ids, True, 0), pad_sequence(labels, True, -100), attention

    def hidden(self, objective):
        """Decoder output and tapped states of our student on the fixture's batch."""
        with torch.no_grad(), HiddenStateTap(self.llava.model.language_model, objective.layers) as caught:
            output = self.llava.model(
                input_ids=self.ids,
                attention_mask=self.attention,
                pixel_values=self.tensors["in/images"][self.image_rows],
            )
            return output.last_hidden_state, dict(caught)

    def target(self, task):
        """The fixed targets of the image rows as ``[R, N, E]``; the published seg target is a map."""
        target = self.tensors[f"target/{task}"]
        return (target.flatten(2).transpose(1, 2) if target.ndim == 4 else target)[self.image_rows]

    def published_prediction(self, task, index):
        """What the loss reads: of depth's four outputs the first."""
        name = f"out/{task}_emb/{index}/0" if task == "depth" else f"out/{task}_emb/{index}"
        value = self.tensors[name]
        return value.flatten(2).transpose(1, 2) if value.ndim == 4 else value


def layers_of(config, task):
    return tuple(int(layer) for layer in config["heads"][f"image_{task}"][layer_key(task)].split("-"))


def layer_key(task):
    return {"gen": "img_layer_indices", "seg": "seg_layer_indices", "depth": "depth_layer_indices"}[task]


def llava_of(config, state, vocabulary, image_id):
    llm, clip = config["llm"], config["clip"]
    llava = LlavaForConditionalGeneration(
        LlavaConfig(
            text_config=LlamaConfig(**{**llm, "vocab_size": vocabulary}),
            vision_config=CLIPVisionConfig(**clip),
            image_token_index=image_id,
            vision_feature_layer=config["mm_vision_select_layer"],
        )
    )
    renamed = {}
    for name, value in state.items():
        if name.startswith("model.vision_tower.vision_tower.vision_model."):
            renamed["vision_tower." + name.rsplit("vision_model.", 1)[1]] = value
        elif name.startswith("model.mm_projector."):
            number, kind = name.split(".")[2:]
            renamed[f"multi_modal_projector.linear_{1 if number == '0' else 2}.{kind}"] = value
        elif name.startswith(("model.layers.", "model.norm.", "model.embed_tokens.")):
            renamed["language_model." + name.removeprefix("model.")] = value
    rows = llm["vocab_size"]
    ours = llava.model.state_dict()
    wrapper = "vision_model." if any(n.startswith("vision_tower.vision_model.") for n in ours) else ""
    with torch.no_grad():
        for name, value in renamed.items():
            name = name.replace("vision_tower.", f"vision_tower.{wrapper}") if name.startswith("vision") else name
            ours.pop(name)[: len(value)].copy_(value)
        llava.lm_head.weight[:rows].copy_(state["lm_head.weight"])
    assert all("position_ids" in name for name in ours), f"not in the fixture: {list(ours)}"
    return llava


def objective_of(config, state):
    tasks = {}
    for task in config["token_order"]:
        head = config["heads"][f"image_{task}"]
        side = round(head["num_tokens"] ** 0.5)
        grid = (side, side) if head["num_tokens"] > 1 else None
        changes = {"heads": head["num_heads"], "head_width": head["dim_head"], "ff_mult": head["ff_mult"]}
        target = TargetSpec(head["num_tokens"], head["output_dim"], grid)
        weight = next(value for key, value in head.items() if key.endswith("loss_weight"))
        predictor = published_predictors()[task].model_copy(update=changes)
        loss = {"smooth_l1": 1.0, "info_nce": config["contrastive_loss_weight"]}
        tasks[task] = DistilledTask(target, layers_of(config, task), predictor, weight, loss=loss)
    llm = config["llm"]
    objective = EmbeddingDistillation(tasks, llm["hidden_size"], llm["num_hidden_layers"])
    for task, settings in tasks.items():
        for index, layer in enumerate(settings.layers):
            prefix = f"image_{task}_heads.{index}."
            head = {n.removeprefix(prefix): value for n, value in state.items() if n.startswith(prefix)}
            objective.predictors[f"{task}_{layer}"].load_state_dict(from_published(head))
        with torch.no_grad():
            objective.logit_scales[task].copy_(state[f"{task}_logit_scale"])
    return objective


@pytest.fixture(scope="module")
def published(golden):
    config, tensors = golden("g4_ola_llama")
    return Published(config, tensors, golden.part)


@pytest.fixture(scope="module")
def states(published):
    return published.hidden(published.model.objective)


def test_splice_puts_image_and_task_tokens_where_the_published_code_does(published, golden):
    seen = {}
    handle = published.llava.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.update(kwargs), with_kwargs=True
    )
    published.hidden(published.model.objective)
    handle.remove()
    real = published.attention.bool()
    assert torch.equal(real, published.tensors["splice/attention_mask"])
    assert torch.equal(published.labels, published.tensors["splice/labels"])
    ours, theirs = seen["inputs_embeds"][real], published.tensors["splice/inputs_embeds"][real]
    assert golden.distance(ours, theirs) < TOLERANCE


def test_hidden_states_of_every_layer(published, golden):
    everything = tuple(range(1, published.config["llm"]["num_hidden_layers"] + 1))
    with torch.no_grad(), HiddenStateTap(published.llava.model.language_model, everything) as caught:
        published.llava.model(
            input_ids=published.ids,
            attention_mask=published.attention,
            pixel_values=published.tensors["in/images"][published.image_rows],
        )
        real = published.attention.bool()
        for layer in everything:
            theirs = published.tensors[f"out/hidden_states/{layer}"][real]
            assert golden.distance(caught[layer][real], theirs) < TOLERANCE, f"layer {layer}"


def test_logits_over_the_published_vocabulary(published, states, golden):
    real = published.attention.bool()
    rows = published.config["llm"]["vocab_size"]
    ours = published.llava.lm_head(states[0])[real][:, :rows]
    assert golden.distance(ours, published.tensors["out/logits"][real]) < TOLERANCE


def test_next_token_loss(published, states):
    with torch.no_grad():
        ours = published.model.next_token_loss(states[0], published.labels)
    count = (published.labels[:, 1:] != -100).sum()
    torch.testing.assert_close(ours / count, published.tensors["published/text_loss"][0], rtol=1e-5, atol=0)


def test_predictors_of_rows_without_padding(published, states, golden):
    rows = torch.tensor(published.whole_rows)
    layout = TokenLayout.from_ids(published.ids, published.attention, published.image_id, published.task_ids, rows)
    queries = dict(published.model.task_tokens.queries)
    for task in published.order:
        ours = published.model.objective.predict(task, states[1], layout, queries)
        for index, layer in enumerate(layers_of(published.config, task)):
            theirs = published.published_prediction(task, index)[rows]
            assert golden.distance(ours[layer], theirs) < TOLERANCE, f"{task}, layer {layer}"


def test_per_layer_losses_by_the_published_formula(published):
    """Its values follow from our per-sample losses on its own predictions, with its `hole` fault put back."""
    mask = published.tensors["in/mask"].float()
    for task in published.order:
        target = published.tensors[f"target/{task}"]
        pool = target.flatten(2).transpose(1, 2) if target.ndim == 4 else target
        scale = published.model.objective.logit_scales[task]
        for index in range(len(layers_of(published.config, task))):
            predicted = published.published_prediction(task, index)
            regression = (smooth_l1(predicted, pool) * mask).mean()
            contrast = info_nce(predicted, pool, torch.arange(len(pool)), scale)
            contrastive = published.config["contrastive_loss_weight"] * contrast.mean() * mask.mean()
            ours = torch.stack([regression + contrastive, regression, contrastive])
            theirs = published.tensors[f"nozero/per_layer/{task}/{index}"]
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_per_layer_losses_where_the_published_code_is_right(published):
    """A batch of whole image rows alone: no mask, no padding. Ours end to end, theirs from their predictions."""
    rows = torch.tensor(published.whole_rows)
    place = [published.image_rows.tolist().index(row) for row in published.whole_rows]
    targets = {}
    for task in published.order:
        own = published.target(task)[place]
        targets[task] = Targets(own, own, torch.arange(len(own)))
    with torch.no_grad():
        terms = published.model(
            published.ids[rows],
            published.attention[rows],
            published.labels[rows],
            num_tokens=1,
            num_images=len(rows),
            pixel_values=published.tensors["in/images"][rows],
            image_rows=torch.arange(len(rows)),
            targets=targets,
        )
    for task in published.order:
        for index, layer in enumerate(layers_of(published.config, task)):
            theirs = published.published_prediction(task, index)[rows]
            expected = smooth_l1(theirs, targets[task].own).mean()
            torch.testing.assert_close(terms[f"{task}/{layer}/smooth_l1"], expected, rtol=2e-5, atol=0)
            scale = published.model.objective.logit_scales[task]
            expected = info_nce(theirs, targets[task].pool, targets[task].labels, scale).mean()
            torch.testing.assert_close(terms[f"{task}/{layer}/info_nce"], expected, rtol=2e-5, atol=1e-6)


def test_a_rows_losses_do_not_depend_on_its_neighbors_length(published):
    """In the published code they do: its predictors attend the padding."""
    row = next(r for r in published.image_rows.tolist() if r not in published.whole_rows)
    place = published.image_rows.tolist().index(row)
    length = int(published.attention[row].sum())
    targets = {}
    for task in published.order:
        own = published.target(task)[place : place + 1]
        targets[task] = Targets(own, own, torch.arange(1))

    def terms(width):
        with torch.no_grad():
            return published.model(
                published.ids[row : row + 1, :width],
                published.attention[row : row + 1, :width],
                published.labels[row : row + 1, :width],
                num_tokens=1,
                pixel_values=published.tensors["in/images"][row : row + 1],
                image_rows=torch.tensor([0]),
                targets=targets,
            )

    alone, padded = terms(length), terms(published.ids.shape[1])
    assert published.ids.shape[1] > length
    for name, value in alone.items():
        torch.testing.assert_close(padded[name], value, rtol=1e-5, atol=1e-6)
