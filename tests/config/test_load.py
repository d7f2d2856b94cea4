"""Recipes: everything is validated without torch, and every fault names file, key and remedy."""

import subprocess
import sys

import pytest
import yaml

from visper.common.errors import ConfigError
from visper.config import Stage, load_run, parse_overrides, recipe_names, run_text, save_run

RECIPE = "llama3-8b-vit-l/pt"


@pytest.mark.parametrize("name", recipe_names())
def test_every_shipped_recipe_is_valid(name):
    assert load_run(name).name


def test_published_bases_are_shipped_for_every_stage():
    bases = ("llama3-8b-vit-l", "llama3-8b-convnext-xxl", "phi3-mini-vit-l", "phi3-mini-convnext-xxl")
    expected = {
        f"{base}/{stage}" for base in bases for stage in ("pt", "pt-script-layers", "vpt", "ift", "ift-after-vpt")
    }
    assert expected <= set(recipe_names())


def test_published_settings_of_pre_training():
    run = load_run(RECIPE)
    assert run.stage is Stage.PT
    assert (run.optimization.global_batch, run.optimization.lr) == (256, 1e-3)
    assert {task: settings.layers for task, settings in run.distillation.tasks.items()} == {
        "depth": (8, 20),
        "seg": (10, 18),
        "gen": (12, 20),
    }


@pytest.mark.parametrize("encoder", ["vit-l", "convnext-xxl"])
def test_system_prompts_are_those_of_the_published_conversation_templates(encoder):
    """``llava_llama_3`` and ``llava_phi_3`` of the published code, which differ."""
    llama, phi3 = (load_run(f"{llm}-{encoder}/pt").student.system_prompt for llm in ("llama3-8b", "phi3-mini"))
    assert llama.startswith("A chat between a curious user and an artificial intelligence assistant. ")
    assert phi3 == "You are a helpful AI assistant."


def test_a_recipe_is_read_without_torch():
    code = f"import sys; from visper.config import load_run; load_run('{RECIPE}'); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_overrides_win_and_numbers_are_numbers():
    run = load_run(RECIPE, ["optimization.lr=1e-4"])
    assert run.optimization.lr == 1e-4


@pytest.mark.parametrize(("written", "share"), [("true", 1), ("false", 0), ("0.5", 0.5), ("auto", "auto")])
def test_checkpointing_is_all_nothing_a_share_of_the_layers_or_automatic(written, share):
    run = load_run(RECIPE, [f"optimization.gradient_checkpointing={written}"])
    assert run.optimization.gradient_checkpointing == share


def test_text_of_digits_stays_text():
    assert load_run(RECIPE, ["name='123'", "optimization.lr=2E-5"]).name == "123"


def test_a_null_takes_a_task_or_an_option_away():
    run = load_run(RECIPE, ["distillation.tasks.seg=", "distillation.tasks.depth.target.size="])
    assert list(run.distillation.tasks) == ["depth", "gen"]
    assert run.distillation.tasks["depth"].target.options == {}


def test_teachers_of_ones_own_take_any_option():
    changes = ["distillation.tasks.depth.target={kind: 'my.module:Edges', model: x, blur: 2, size: null}"]
    assert load_run(RECIPE, changes).distillation.tasks["depth"].target.options == {"blur": 2}


def test_an_override_needs_an_equals_sign():
    with pytest.raises(ConfigError, match="key=value"):
        parse_overrides(["optimization.lr"])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optimization.lrr=1", "unknown key 'optimization.lrr': did you mean 'lr'"),
        ("optimisation={}", "did you mean 'optimization'"),
        ("distillation.tasks.depth.layrs=[1]", "did you mean 'layers'"),
        ("data.geometry=round", "'data.geometry'.*squash.*found 'round'"),
        ("optimization.global_batch=many", "optimization.global_batch.*found 'many'"),
        ("optimization.betas=[0.9, 1.0]", "optimization.betas.*less than 1, found 1.0"),
        ("seed=-1", "'seed'.*greater than or equal to 0, found -1"),
        ("seed=4294967296", "'seed'.*less than 4294967296, found 4294967296"),
        ("optimization.gradient_checkpointing=1.5", "gradient_checkpointing': .*less than or equal to 1, found 1.5"),
        ("optimization.gradient_checkpointing=most", "gradient_checkpointing': .*'auto' or a number, found 'most'"),
        ("distillation.tasks.depth.layers=[0]", "greater than 0"),
        ("distillation.tasks.depth.head={kind: mlp}", "head 'mlp' has no option 'inner'"),
        ("distillation.tasks.depth.head.kind=resample", "unknown head 'resample': did you mean 'resampler'"),
        ("distillation.tasks.depth.loss={cosin: 1}", "unknown loss 'cosin': did you mean 'cosine'"),
        ("distillation.tasks.depth.at=projector", "at 'projector' has no layers: remove 'layers'"),
        (
            "distillation.tasks.depth.at=image",
            "'task_tokens', 'image_tokens', 'projector' or 'sequence', found 'image'",
        ),
        ("distillation.tasks.depth.schedule={end: 0}", "greater than 0, found 0"),
        ("distillation.tasks.depth.target={kind: encoder, model: null, size: null}", "set 'at' to image_tokens"),
        ("distillation.tasks.depth.target={kind: encoder}", "comes from the student itself: remove 'model'"),
        ("distillation.tasks.depth.head={head: 3}", "did you mean 'heads'"),
        ("distillation.tasks.depth.head={queries: rows}", "'matrix' or 'states', found 'rows'"),
        ("distillation.tasks.depth.head={depth: 0}", "option 'depth': .*greater than or equal to 1, found 0"),
        ("distillation.tasks.depth.target.kind=depth_anythin", "'depth_anythin': did you mean 'depth_anything'"),
        ("distillation.tasks.depth.target.kind=qqq", "expected one of onnx, depth_anything, .*module:Class"),
        ("distillation.tasks.depth.target.kind=my teacher:Class", "unknown target 'my teacher:Class'"),
        ("distillation.tasks.depth.target.sise=3", "'depth_anything' has no option 'sise': did you mean 'size'"),
        ("optimization.lr=.inf", "expected a finite number, found inf"),
        ("optimization.lr_overrides={projector: .nan}", "lr_overrides.projector': expected a finite number, found nan"),
        ("start_from=x", "found both of 'student'"),
        ("student.task_tokens.order=[seg, gen]", "have no task tokens"),
    ],
)
def test_faults_name_file_key_and_remedy(override, message):
    with pytest.raises(ConfigError, match=message) as error:
        load_run(RECIPE, [override])
    assert str(error.value).startswith(RECIPE)


@pytest.mark.parametrize(("key", "value"), [("reduce_once", "true"), ("replicas", "2")])
def test_how_shards_are_held_and_reduced_is_refused_where_nothing_is_sharded(key, value):
    with pytest.raises(ConfigError, match=f"{key} belongs to engine fsdp, this is 'ddp'"):
        load_run("llama3-8b-vit-l/ift", [f"launch.{key}={value}"])
    load_run("llama3-8b-vit-l/ift", [f"launch.{key}={value}", "launch.engine=fsdp"])


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("logging.monitor.non_finite=skip", "not supported with launch.engine=zero2.*launch.engine=fsdp"),
        ("lora={quantize: 4bit}", "not supported with launch.engine=zero2.*use launch.engine=ddp"),
    ],
)
def test_what_deepspeed_cannot_do_is_refused(setting, message):
    with pytest.raises(ConfigError, match=message):
        load_run("llama3-8b-vit-l/ift", ["launch.engine=zero2", setting])
    load_run("llama3-8b-vit-l/ift", [setting])


def test_all_faults_are_reported_at_once():
    with pytest.raises(ConfigError) as error:
        load_run(RECIPE, ["optimization.lrr=1", "data.geometri=pad"])
    assert "lrr" in str(error.value) and "geometri" in str(error.value)


def test_an_unknown_recipe_suggests_the_nearest():
    with pytest.raises(ConfigError, match="llama3-8b-vit-l/pt"):
        load_run("lama3-8b-vit-l/pt")


def test_recipes_extend_files_beside_them_and_null_removes_a_section(tmp_path):
    (tmp_path / "base.yaml").write_text(run_text(load_run(RECIPE)))
    (tmp_path / "mine.yaml").write_text("extends: base.yaml\nname: mine\ndistillation: null\n")
    run = load_run(tmp_path / "mine.yaml")
    assert run.name == "mine" and run.distillation is None


def test_a_folder_is_no_recipe_but_may_hold_one(tmp_path):
    with pytest.raises(ConfigError, match="is a folder: name a recipe's YAML file"):
        load_run(tmp_path)
    (tmp_path / "run.yaml").write_text(run_text(load_run(RECIPE)))
    with pytest.raises(ConfigError, match=r"is a folder: name the file in it, '.*run\.yaml'"):
        load_run(tmp_path)


def test_recipes_in_a_circle_are_refused(tmp_path):
    (tmp_path / "a.yaml").write_text("extends: b.yaml\n")
    (tmp_path / "b.yaml").write_text("extends: a.yaml\n")
    with pytest.raises(ConfigError, match="circle"):
        load_run(tmp_path / "a.yaml")


def test_broken_yaml_names_the_file(tmp_path):
    (tmp_path / "broken.yaml").write_text("name: [")
    with pytest.raises(ConfigError, match=r"broken\.yaml: not valid YAML"):
        load_run(tmp_path / "broken.yaml")


@pytest.mark.parametrize("name", recipe_names())
def test_every_resolved_recipe_reads_back_equal(name, tmp_path):
    save_run(load_run(name), tmp_path / "run.yaml")
    assert load_run(tmp_path / "run.yaml") == load_run(name)


def test_a_null_that_differs_from_the_default_is_kept(tmp_path):
    run = load_run(RECIPE, ["seed=3", "distillation=", "student.task_tokens="])
    save_run(run, tmp_path / "run.yaml")
    assert load_run(tmp_path / "run.yaml") == run and run.student.task_tokens is None
    assert yaml.safe_load((tmp_path / "run.yaml").read_text())["data"]["sources"][0]["set"] == "llava-pretrain"
