"""Published weights, converted and loaded from disk, give the published numbers (golden g4).

The published predictors attend padding, ours do not: their outputs are compared on rows without padding.
"""

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.utils.rnn import pad_sequence

from tests.published.checkpoints import save_clip, save_published
from visper.config import load_run
from visper.distillation import EmbeddingDistillation, HiddenStateTap, TokenLayout
from visper.model import TaskTokens, load_student
from visper.published import convert_published, load_probes
from visper.published.config import read_published

TOLERANCE = 2e-5
"""Largest difference seen: 4e-6 of the largest value (float32, another order of summation; SDPA against eager)."""

IMAGE, IGNORED = -200, -100
"""The published code's marks among the ids and the labels."""


class Converted:
    """A variant of the fixture, written as published, converted, loaded back."""

    def __init__(self, golden, folder, variant="", **changes):
        sizes, tensors = golden("g4_ola_llama")
        _, variants = golden("g4_variants")
        self.sizes, self.tensors = sizes, tensors
        state = golden.part(tensors, "state/") | golden.part(variants, f"{variant}/state/")
        config = {
            **sizes["config"],
            **changes,
            "mm_vision_tower": str(save_clip(folder / "clip", sizes["clip"], False)),
        }
        state = only_needed(state, config)
        self.source = save_published(folder / "published", config, state, shards=3)
        self.folder = folder / "ours"
        self.report = convert_published(str(self.source), self.folder)
        self.published = read_published(self.source, state)
        self.student = load_student(self.folder)
        self.state = state
        self.ids = variants.get(f"{variant}/input_ids", tensors["in/input_ids"])
        self.mask = variants.get(f"{variant}/attention_mask", tensors["in/attention_mask"])
        self.vocabulary = sizes["llm"]["vocab_size"]
        self.image_rows = tensors["in/mask"].nonzero()[:, 0]
        self.inputs = self.expanded()
        self.whole = [row for row in self.image_rows.tolist() if self.inputs["attention_mask"][row].all()]
        assert self.whole, "no image row without padding"

    def expanded(self):
        """The published splice, spelt out by the vocabulary of the converted student."""
        places = (self.sizes["clip"]["image_size"] // self.sizes["clip"]["patch_size"]) ** 2
        block = [self.student.image_token_id] * places
        block += [token for ids in self.student.task_token_ids.values() for token in ids]
        rows = []
        for row, mask in zip(self.ids, self.mask, strict=True):
            tokens = [t for token in row[mask].tolist() for t in (block if token == IMAGE else [token])]
            rows.append(torch.tensor(tokens))
        attention = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
        pixels = self.tensors["in/images"][self.image_rows]
        return {"input_ids": pad_sequence(rows, True, 0), "attention_mask": attention, "pixel_values": pixels}

    def states(self, layers=None):
        """Tapped states of our student; default every layer."""
        layers = layers or range(1, self.student.num_layers + 1)
        with torch.no_grad(), HiddenStateTap(self.student.model.model.language_model, layers) as caught:
            output = self.student.model(**self.inputs)
            return dict(caught), output.logits

    def objective(self):
        """Predictors and task tokens from the distillation folder, as a run that looks at them would build them."""
        run = load_run(self.folder / "distillation" / "run.yaml")
        weights = load_file(self.folder / "distillation" / "weights.safetensors")
        specs = {task: head.target for task, head in self.published.heads.items()}
        objective = EmbeddingDistillation.from_config(
            run.distillation, specs, self.student.hidden_size, self.student.num_layers
        )
        objective.load_state_dict({n[10:]: v for n, v in weights.items() if n.startswith("objective.")})
        queries = {n[20:]: v for n, v in weights.items() if n.startswith("task_tokens.queries.")}
        return objective.eval(), TaskTokens(self.student.task_token_ids, queries)


def only_needed(state, config):
    """The fixture's weights are those of the full variant: leave out what the configuration does not call for."""
    every = {"depth", "seg", "gen"}
    tasks = set(config["aux_mode"].split("-"))
    without_heads = every if config["model_type"].startswith("llava") else every - tasks
    without = [f"model.special_{task}_tokens" for task in (every - tasks if config["num_task_tokens"] else every)]
    without += [part for task in without_heads for part in (f"image_{task}_heads.", f"{task}_logit_scale")]
    fused = [f"self_attn.{p}_proj." for p in "qkv"] + ["mlp.gate_proj.", "mlp.up_proj."]
    phi3 = config["model_type"].endswith("phi3")
    return {
        name: value
        for name, value in state.items()
        if not any(part in name for part in without)
        and not (phi3 and name.startswith("model.layers.") and any(part in name for part in fused))
    }


def published_outputs(tensors, variant, task, index):
    """What the loss reads of the published heads."""
    if variant:
        name = f"{variant}/depth_emb0/{index}" if task == "depth" else f"{variant}/{task}_emb/{index}"
    else:
        name = f"out/depth_emb/{index}/0" if task == "depth" else f"out/{task}_emb/{index}"
    value = tensors[name]
    return value.flatten(2).transpose(1, 2) if value.ndim == 4 else value


def kept_tokens(ours, theirs):
    """Of ``[B, N, E]`` the tokens that the fixture keeps: all, or (of depth, in the variants) every n-th."""
    step, rest = divmod(ours.shape[1], theirs.shape[1])
    assert step >= 1 and rest == 0
    return ours[:, ::step]


@pytest.fixture(scope="module")
def pt(golden, tmp_path_factory):
    return Converted(golden, tmp_path_factory.mktemp("pt"))


def test_logits_and_every_layers_hidden_states(pt, golden):
    caught, logits = pt.states()
    real = pt.inputs["attention_mask"].bool()
    assert golden.distance(logits[real][:, : pt.vocabulary], pt.tensors["out/logits"][real]) < TOLERANCE
    for layer, states in caught.items():
        theirs = pt.tensors[f"out/hidden_states/{layer}"][real]
        assert golden.distance(states[real], theirs) < TOLERANCE, f"layer {layer}"


def compare_predictors(converted, golden, variant):
    _, variants = golden("g4_variants")
    objective, tokens = converted.objective()
    caught, _ = converted.states(objective.layers)
    layout = TokenLayout.from_ids(
        converted.inputs["input_ids"],
        converted.inputs["attention_mask"],
        converted.student.image_token_id,
        converted.student.task_token_ids,
        rows := torch.tensor(converted.whole),
    )
    for task, settings in objective.tasks.items():
        ours = objective.predict(task, caught, layout, dict(tokens.queries))
        for index, layer in enumerate(settings.layers):
            theirs = published_outputs(variants if variant else converted.tensors, variant, task, index)[rows]
            assert golden.distance(kept_tokens(ours[layer], theirs), theirs) < TOLERANCE, f"{task}, layer {layer}"


def test_predictors_outputs(pt, golden):
    compare_predictors(pt, golden, "")


VARIANTS = {
    "pass_text_false": {"pass_text_to_aux": False},
    "order_depth_seg_gen": {"aux_mode": "depth-seg-gen"},
    "depth_only": {"aux_mode": "depth"},
    "phi3": {"model_type": "ola_phi3"},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants(golden, tmp_path, variant):
    converted = Converted(golden, tmp_path, variant, **VARIANTS[variant])
    compare_predictors(converted, golden, variant)
    _, variants = golden("g4_variants")
    caught, _ = converted.states([converted.student.num_layers])
    real = converted.inputs["attention_mask"].bool()
    ours = caught[converted.student.num_layers].mean(-1)[real]
    assert golden.distance(ours, variants[f"{variant}/last_hidden_mean"][real]) < TOLERANCE


@pytest.mark.parametrize(
    ("llm", "prompt"), [("llama", "A chat between a curious user"), ("phi3", "You are a helpful AI assistant.")]
)
def test_system_prompt_is_that_of_the_llms_published_template(golden, tmp_path, llm, prompt):
    converted = Converted(golden, tmp_path, "phi3" if llm == "phi3" else "", model_type=f"ola_{llm}")
    said = converted.student.processor.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
    assert prompt in said


@pytest.mark.parametrize("text", [True, False])
def test_pt_without_task_tokens_keeps_its_heads_as_probes(golden, tmp_path, text):
    variant = "no_task_tokens" if text else "no_task_tokens_pass_text_false"
    converted = Converted(golden, tmp_path, variant, num_task_tokens=0, pass_text_to_aux=text, aux_mode="depth-seg-gen")
    assert not converted.student.task_token_ids and not (converted.folder / "distillation").exists()
    probes = load_probes(converted.folder)
    _, variants = golden("g4_variants")
    caught, _ = converted.states()
    ids = converted.inputs["input_ids"]
    for task, head in converted.published.heads.items():
        for index, layer in enumerate(head.layers):
            for row in converted.whole:
                last = int((ids[row] == converted.student.image_token_id).nonzero().max())
                states = caught[layer][row : row + 1] if text else caught[layer][row : row + 1, : last + 1]
                with torch.no_grad():
                    ours = probes[f"{task}_{layer}"](states)
                theirs = published_outputs(variants, variant, task, index)[row : row + 1]
                assert golden.distance(kept_tokens(ours, theirs), theirs) < TOLERANCE, f"{task}, layer {layer}"


@pytest.mark.parametrize("said", [True, False])
def test_ift_keeps_eight_tokens_a_task(golden, tmp_path, said):
    """``expand_emb`` where the configuration does not say; the splice is PT's, and so is the loss."""
    converted = Converted(golden, tmp_path, model_type="llava_llama")
    if not said:
        config = {k: v for k, v in converted.sizes["config"].items() if k != "task_token_format"}
        config |= {"model_type": "llava_llama", "mm_vision_tower": str(tmp_path / "clip")}
        source = save_published(tmp_path / "silent", config, converted.state)
        convert_published(str(source), tmp_path / "other")
        converted.student = load_student(tmp_path / "other")
        converted.inputs = converted.expanded()
    _, variants = golden("g4_variants")
    assert converted.inputs["input_ids"].shape[1] == variants["ift_expand_emb/labels"].shape[1]
    assert not (converted.folder / "distillation").exists()
    _, logits = converted.states()
    shifted = variants["ift_expand_emb/labels"][:, 1:]
    learned = shifted != IGNORED
    loss = torch.nn.functional.cross_entropy(logits[:, :-1, : converted.vocabulary][learned], shifted[learned])
    torch.testing.assert_close(loss, variants["ift_expand_emb/loss"][0], rtol=1e-5, atol=0)
    real = converted.inputs["attention_mask"].bool()
    ours, theirs = logits[real][:, : converted.vocabulary], converted.tensors["out/logits"][real]
    assert golden.distance(ours, theirs) < TOLERANCE
