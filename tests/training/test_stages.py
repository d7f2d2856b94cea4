"""The optimizer's parameter groups: which parameters decay."""

import pytest
from transformers import TrainerCallback

from tests import tiny
from visper.config import load_run
from visper.training import run_stage


class Decays(TrainerCallback):
    """Keeps each trained parameter's weight decay, by name."""

    def on_train_begin(self, args, state, control, model=None, optimizer=None, **kwargs):
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        self.found = {names[id(p)]: group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
        self.trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize("rates", [{}, {"projector": 5e-3}])
def test_weights_and_queries_decay_and_logit_scales_biases_and_norms_do_not(rates, tiny_llm, tiny_encoder, tmp_path):
    recipe = tiny.write_recipe(tmp_path, "pt", tiny_llm, tiny_encoder, max_steps=1)
    changes = {"distillation": tiny.distillation(), "optimization": {"weight_decay": 0.1, "lr_overrides": rates}}
    decays = Decays()
    run_stage(load_run(recipe, changes=[changes]), callbacks=[decays])
    found = decays.found
    assert found.keys() == decays.trained
    assert set(found.values()) == {0.0, 0.1}
    scales = {f"objective.logit_scales.{task}" for task in ("depth", "seg", "gen")}
    queries = {f"task_tokens.queries.{task}" for task in ("depth", "seg", "gen")}
    assert {name: found[name] for name in scales | queries} == dict.fromkeys(scales, 0.0) | dict.fromkeys(queries, 0.1)
    for name, decay in found.items():
        if name not in scales:
            assert (decay == 0.0) is (name.endswith("bias") or "norm" in name), name
