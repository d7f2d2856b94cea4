"""A stage, start to end, on tiny random models: what learns, what is logged, what is kept, what continues."""

import json
import shutil
import signal
from pathlib import Path

import datasets
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, CLIPVisionModel, LlavaForConditionalGeneration, TrainerCallback

from tests import tiny
from tests.checkpoints import tensors_of
from visper.common.console import Console
from visper.common.errors import ConfigError, DataError, StoppedError, TrainingError
from visper.common.lock import HOLDER, LOCK, locked
from visper.common.manifest import write_manifest
from visper.config import Run, load_run
from visper.data.rows.parquet import write_parquet
from visper.data.rows.records import Drop, DropList
from visper.data.rows.sources import open_records
from visper.model import load_student
from visper.training import NonFiniteLossError, run_pipeline, run_stage
from visper.training.checkpoint import STATE
from visper.training.checkpoint_writer import ShardWriter
from visper.training.stopping import StopRequest
from visper.training.trainer import StageTrainer


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    return tiny.write_rows(tmp_path_factory.mktemp("rows"))


@pytest.fixture
def make(tiny_llm, tiny_encoder, rows, tmp_path):
    """Builds a run: ``make("pt", optimization={...})``."""

    def build(stage, name=None, start=None, **changes):
        name = name or stage
        settings = {
            "name": name,
            "stage": stage,
            "output": str(tmp_path / name),
            "data": {"sources": [{"json": str(rows / "rows.json"), "images": str(rows / "images")}], "workers": 0},
            "optimization": {"global_batch": 4, "micro_batch": 2, "lr": 1e-3, "max_steps": 4, "precision": "float32"},
            "logging": {"every": 1, "save_every": 2},
        }
        if start is None:
            settings["student"] = {"llm": str(tiny_llm), "encoder": str(tiny_encoder)}
            if stage == "pt":
                settings["distillation"] = tiny.distillation()
        else:
            settings["start_from"] = str(tmp_path / start)
        for key, value in changes.items():
            both = isinstance(value, dict) and isinstance(settings.get(key), dict)
            settings[key] = {**settings[key], **value} if both else value
        return Run.model_validate(settings)

    return build


def logs_of(run):
    return [json.loads(line) for line in (Path(run.output) / "log.jsonl").read_text().splitlines()]


def weights_of(folder):
    return load_file(folder / "model.safetensors")


TERMS = {
    f"{task}/{layer}/{kind}"
    for task, layers in (("depth", (1, 3)), ("seg", (2, 4)), ("gen", (3,)))
    for layer in layers
    for kind in ("smooth_l1", "info_nce")
}


def test_pt_vpt_ift_in_order_each_learning_exactly_its_parts(make, tmp_path, tiny_llm, tiny_encoder):
    run_pipeline([make("pt"), make("vpt", start="pt"), make("ift", start="vpt")])
    llm = weights_of(tiny_llm)["model.layers.0.mlp.up_proj.weight"]
    encoder = {name: value for name, value in weights_of(tiny_encoder).items() if "layers.0.mlp.fc1.weight" in name}
    folders = [weights_of(tmp_path / stage / "model") for stage in ("pt", "vpt", "ift")]

    def places(part):
        return [next(value for name, value in folder.items() if part in name) for folder in folders]

    up = places("layers.0.mlp.up_proj")
    assert torch.equal(up[0], llm) and not torch.equal(up[1], llm) and not torch.equal(up[2], up[1])
    fc1 = places("layers.0.mlp.fc1.weight")
    assert torch.equal(fc1[0], next(iter(encoder.values())))
    assert not torch.equal(fc1[1], fc1[0]) and torch.equal(fc1[2], fc1[1])
    projector = places("multi_modal_projector.linear_1.weight")
    assert not torch.equal(projector[1], projector[0]) and not torch.equal(projector[2], projector[1])
    tokens = [t for ids in load_student(tmp_path / "pt").task_token_ids.values() for t in ids]
    table = places("embed_tokens.weight")
    assert torch.equal(table[0][tokens], table[2][tokens]), "task tokens are held still after PT"
    assert not torch.equal(table[0], table[2])


def test_a_pt_after_another_says_which_task_tokens_are_new(make, capsys):
    run_stage(make("pt", "first"))
    seg = {"tasks": {"seg": tiny.distillation()["tasks"]["seg"]}}
    capsys.readouterr()
    run_stage(make("pt", "second", start="first", optimization={"max_steps": 1}, distillation=seg))
    assert "new for depth, gen: this stage does not keep those of the start" in capsys.readouterr().out


def test_every_term_is_logged_and_embedding_losses_are_alive(make):
    run = make("pt")
    run_stage(run)
    first = logs_of(run)[0]
    assert first.keys() >= TERMS | {"ntp", "loss", "learning_rate"}
    assert all(first[name] > 0 for name in TERMS if "smooth_l1" in name), "the published losses are zero"
    weighted = sum(0.5 * (0.3 if "info_nce" in name else 1.0) * first[name] for name in TERMS)
    assert first["loss"] == pytest.approx(first["ntp"] + weighted, rel=1e-5)


@pytest.mark.parametrize("stage", ["pt", "ift"])
def test_micro_batches_of_one_times_eight_equal_one_of_eight(make, stage):
    results = []
    for micro in (1, 8):
        split = {"global_batch": 8, "micro_batch": micro, "max_steps": 2}
        run = make(stage, name=f"micro-{micro}", optimization=split, data={"group_by_length": stage == "ift"})
        results.append((logs_of(run) if run_stage(run) else None, weights_of(run_folder(run))))
    (logs_1, weights_1), (logs_8, weights_8) = results
    for one, eight in zip(logs_1[:2], logs_8[:2], strict=True):
        for name in one.keys() & (TERMS | {"loss", "ntp", "grad_norm"}):
            # float32 sums in another order; largest relative difference seen 4e-6
            assert one[name] == pytest.approx(eight[name], rel=5e-5, abs=1e-6), name
    for name, value in weights_1.items():
        torch.testing.assert_close(value, weights_8[name], rtol=0, atol=2e-4)


def test_packing_changes_no_loss_and_no_weight(make):
    results = []
    for packing in (False, True):
        split = {"global_batch": 8, "micro_batch": 4, "max_steps": 2, "packing": packing}
        run = make("ift", name=f"packing-{packing}", optimization=split)
        results.append((logs_of(run) if run_stage(run) else None, weights_of(run_folder(run))))
    assert "visper" not in (run_folder(run) / "config.json").read_text(), "a plain LLaVA folder, whatever trained it"
    (logs, weights), (packed_logs, packed_weights) = results
    for padded, packed in zip(logs[:2], packed_logs[:2], strict=True):
        for name in ("loss", "ntp", "grad_norm"):
            assert packed[name] == pytest.approx(padded[name], rel=5e-5), name
    for name, value in weights.items():
        torch.testing.assert_close(packed_weights[name], value, rtol=0, atol=2e-4)


def run_folder(run):
    return Path(run.output) / "model"


def test_finished_folder_is_plain_llava(make, tmp_path):
    run_stage(make("pt"))
    folder = tmp_path / "pt" / "model"
    model = LlavaForConditionalGeneration.from_pretrained(folder)
    silent = load_student(folder).silent_ids
    assert model.generation_config.suppress_tokens == sorted(silent)
    assert {"run.yaml", "config.json", "generation_config.json", "tokenizer.json"} <= {p.name for p in folder.iterdir()}
    kept = load_file(tmp_path / "pt" / "distillation" / "weights.safetensors")
    assert kept["task_tokens.queries.depth"].shape == (16, 32)
    assert any(name.startswith("objective.predictors.gen_3.") for name in kept)


def test_pt_checkpoints_hold_only_what_learns(make, tmp_path):
    run_stage(make("pt"))
    saved = tensors_of(tmp_path / "pt" / "checkpoints" / "checkpoint-4", "weights")
    heads = ("student.model.multi_modal_projector", "task_tokens", "objective.predictors", "objective.logit_scales")
    assert saved and all(name.startswith(heads) for name in saved)


def test_teachers_are_in_no_model_optimizer_or_checkpoint(make, monkeypatch, tmp_path):
    seen = []
    train = StageTrainer.train

    def look(self, *args, **kwargs):
        result = train(self, *args, **kwargs)
        held = {id(p) for group in self.optimizer.param_groups for p in group["params"]}
        held |= {id(t) for t in (*self.model.parameters(), *self.model.buffers())}
        seen.extend(id(tensor) in held for t in self.teachers.values() for tensor in (*t.parameters(), *t.buffers()))
        return result

    monkeypatch.setattr(StageTrainer, "train", look)
    run_stage(make("pt"))
    assert seen and not any(seen)
    files = (tmp_path / "pt").rglob("*.safetensors")
    assert not any("mix" in name for file in files for name in load_file(file))


def test_images_embedded_in_parquet_train_like_files(make, rows, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    tiny.write_parquet(rows, tmp_path / "rows.parquet")
    source = {"parquet": str(tmp_path / "*.parquet")}
    run_stage(make("pt", name="files", data={"group_by_length": True}))
    run_stage(make("pt", name="parquet", data={"sources": [source], "workers": 2, "group_by_length": True}))
    files, parquet = (weights_of(tmp_path / name / "model") for name in ("files", "parquet"))
    assert all(torch.equal(value, parquet[name]) for name, value in files.items())


class Stop(Exception):  # noqa: N818 (stands for a kill)
    pass


def cut_behind(monkeypatch, step):
    steps = StageTrainer.training_step

    def cut(self, *args, **kwargs):
        if self.state.global_step == step:
            raise Stop
        return steps(self, *args, **kwargs)

    monkeypatch.setattr(StageTrainer, "training_step", cut)


@pytest.fixture
def parquet(rows, tmp_path):
    """The same rows as Parquet files."""
    records = open_records([(rows / "rows.json", rows / "images")], DropList())
    write_parquet(records, tmp_path / "parquet", DropList(), 2000)
    return {"sources": [{"parquet": f"{tmp_path}/parquet/*.parquet"}], "workers": 2, "group_by_length": True}


@pytest.mark.parametrize(
    ("stage", "kind"),
    [
        ("pt", "json"),
        pytest.param("ift", "json", marks=pytest.mark.slow),
        pytest.param("pt", "parquet", marks=pytest.mark.slow),
    ],
)
def test_resume_continues_bit_for_bit(make, monkeypatch, tmp_path, stage, kind, parquet):
    data = parquet if kind == "parquet" else {}
    run_stage(make(stage, name="whole", data=data))
    run = make(stage, name="cut", data=data)
    cut_behind(monkeypatch, 3)
    with pytest.raises(Stop):
        run_stage(run)
    monkeypatch.undo()
    with pytest.raises(ConfigError, match="--resume"):
        run_stage(run)
    run_stage(run, resume=True)
    whole, cut = weights_of(tmp_path / "whole" / "model"), weights_of(tmp_path / "cut" / "model")
    assert all(torch.equal(value, cut[name]) for name, value in whole.items())
    steps_logged = [entry["step"] for entry in logs_of(run) if "loss" in entry]
    assert steps_logged == [1, 2, 3, 4]
    whole_log, cut_log = logs_of(make(stage, name="whole", data=data)), logs_of(run)
    named = [name for name in whole_log[0] if name == "loss" or name == "ntp" or "/" in name]
    assert len(named) == (12 if stage == "pt" else 2)
    for name in named:
        assert [e[name] for e in cut_log if name in e] == [e[name] for e in whole_log if name in e], name


@pytest.mark.slow
def test_resume_in_a_later_epoch_meets_that_epochs_order(make, monkeypatch, tmp_path):
    longer = {"max_steps": 7}  # four steps are an epoch
    run_stage(make("ift", name="whole", optimization=longer))
    cut_behind(monkeypatch, 6)
    with pytest.raises(Stop):
        run_stage(make("ift", name="cut", optimization=longer))
    monkeypatch.undo()
    run_stage(make("ift", name="cut", optimization=longer), resume=True)
    whole, cut = weights_of(tmp_path / "whole" / "model"), weights_of(tmp_path / "cut" / "model")
    assert all(torch.equal(value, cut[name]) for name, value in whole.items())


@pytest.mark.slow
def test_a_mixture_by_weight_is_resumed_bit_for_bit(make, monkeypatch, tmp_path, capsys):
    pictures = tiny.write_rows(tmp_path / "pictures", images=8, text_rows=0, seed=1)
    text = tiny.write_rows(tmp_path / "words", images=0, text_rows=8)
    sources = [
        {"json": str(folder / "rows.json"), "images": str(folder / "images"), "weight": weight}
        for folder, weight in ((pictures, 1.5), (text, 0.5))
    ]
    changes = {"data": {"sources": sources, "group_by_length": True}, "optimization": {"max_steps": 7}}
    run_stage(make("ift", name="whole", **changes))
    assert "8 rows x 1.5 = 12, 8 rows x 0.5 = 4: 16 rows an epoch" in capsys.readouterr().out
    cut_behind(monkeypatch, 6)
    with pytest.raises(Stop):
        run_stage(make("ift", name="cut", **changes))
    monkeypatch.undo()
    run_stage(make("ift", name="cut", **changes), resume=True)
    whole, cut = weights_of(tmp_path / "whole" / "model"), weights_of(tmp_path / "cut" / "model")
    assert all(torch.equal(value, cut[name]) for name, value in whole.items())


@pytest.mark.slow
def test_resume_may_split_the_batch_anew(make, monkeypatch, tmp_path):
    run_stage(make("pt", name="whole"))
    cut_behind(monkeypatch, 3)
    with pytest.raises(Stop):
        run_stage(make("pt", name="cut"))
    monkeypatch.undo()
    run_stage(make("pt", name="cut", optimization={"micro_batch": 1, "gradient_checkpointing": False}), resume=True)
    whole, cut = weights_of(tmp_path / "whole" / "model"), weights_of(tmp_path / "cut" / "model")
    for name, value in whole.items():
        torch.testing.assert_close(cut[name], value, rtol=0, atol=1e-4)


@pytest.mark.slow
def test_a_run_killed_while_it_finishes_takes_no_step_more(make, monkeypatch, tmp_path):
    settings = {
        "optimization": {"max_steps": 3, "schedule": "constant_with_warmup"},
        "logging": {"save_every": 1},
    }
    run_stage(make("pt", name="whole", **settings))

    def killed(*_):
        raise Stop

    monkeypatch.setattr("visper.training.run.finish", killed)
    with pytest.raises(Stop):
        run_stage(make("pt", name="cut", **settings))
    monkeypatch.undo()
    run_stage(make("pt", name="cut", **settings), resume=True)
    whole, cut = weights_of(tmp_path / "whole" / "model"), weights_of(tmp_path / "cut" / "model")
    assert all(torch.equal(value, cut[name]) for name, value in whole.items())


def test_a_disk_that_fills_while_the_results_are_written_loses_no_step(make, monkeypatch, tmp_path):
    run = make("pt")

    def full(student, folder):
        folder.mkdir()
        raise OSError(28, "No space left on device", str(folder))

    monkeypatch.setattr("visper.training.run.save_student", full)
    with pytest.raises(TrainingError, match=r"No space left on device.*The last checkpoint in.*with --resume"):
        run_stage(run)
    assert not (tmp_path / "pt" / "model").exists()
    monkeypatch.undo()
    monkeypatch.setattr(StageTrainer, "train", None)  # not called
    run_stage(run, resume=True)
    assert (tmp_path / "pt" / "model" / "run.yaml").exists()


BFLOAT16 = {"precision": "bfloat16", "max_steps": 2}


@pytest.mark.parametrize(
    "stage", ["pt", pytest.param("vpt", marks=pytest.mark.slow), pytest.param("ift", marks=pytest.mark.slow)]
)
def test_stages_train_in_bfloat16(make, stage, tmp_path):
    run = make(stage, optimization=BFLOAT16)
    run_stage(run)
    assert all(entry["ntp"] == entry["ntp"] for entry in logs_of(run) if "ntp" in entry)
    assert {value.dtype for value in weights_of(tmp_path / stage / "model").values()} == {torch.bfloat16}


@pytest.mark.parametrize("part", ["llm", "vision", "llm.layers.0"])
def test_what_pt_trains_besides_its_parts_is_trained_in_float32(make, tmp_path, tiny_llm, tiny_encoder, part):
    """Even if it is stored in bfloat16, in which a PT reads a frozen LLM."""
    parts = {"llm": (tiny_llm, AutoModelForCausalLM), "encoder": (tiny_encoder, CLIPVisionModel)}
    for name, (folder, kind) in parts.items():
        shutil.copytree(folder, tmp_path / name)
        kind.from_pretrained(folder, dtype=torch.bfloat16).save_pretrained(tmp_path / name)
    seen = {}

    class Precisions(TrainerCallback):
        def on_train_begin(self, *args, model=None, **kwargs):
            seen.update({name: p.dtype for name, p in model.named_parameters() if p.requires_grad})

    student = {name: str(tmp_path / name) for name in parts}
    run_stage(make("pt", student=student, optimization={**BFLOAT16, "train": [part]}), callbacks=[Precisions()])
    place = "vision_tower" if part == "vision" else "language_model"
    assert any(place in name for name in seen) and set(seen.values()) == {torch.float32}


def test_a_cnn_encoder_keeps_its_batch_statistics_in_bfloat16(make, tmp_path, tiny_llm):
    tiny.save_cnn(tmp_path / "cnn")
    student = {"llm": str(tiny_llm), "encoder": str(tmp_path / "cnn"), "image_size": 64}
    run_stage(make("pt", student=student, optimization=BFLOAT16))
    saved = weights_of(tmp_path / "pt" / "model")
    statistics = [value for name, value in saved.items() if "running_" in name]
    assert statistics and all(value.dtype == torch.float32 for value in statistics)


def test_a_disk_that_fills_while_saving_loses_nothing(make, monkeypatch, tmp_path):
    run = make("pt")
    write = ShardWriter.write_data

    def full_at_step_four(self, *args):
        if "checkpoint-4" in str(self.path):
            raise OSError(28, "No space left on device")
        return write(self, *args)

    monkeypatch.setattr(ShardWriter, "write_data", full_at_step_four)
    with pytest.raises(TrainingError, match=r"'checkpoint-4' could not be written .*No space left on device"):
        run_stage(run)
    monkeypatch.undo()
    places = sorted(p.name for p in (tmp_path / "pt" / "checkpoints").glob("checkpoint-*"))
    assert places == ["checkpoint-2"], "the half-written checkpoint must not be there"
    assert not (tmp_path / "pt" / "model").exists()
    run_stage(run, resume=True)
    assert (tmp_path / "pt" / "model" / "run.yaml").exists()


def test_a_full_gpu_is_one_line_that_says_what_to_change(make, monkeypatch):
    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has 1.00 GiB free.")

    monkeypatch.setattr(StageTrainer, "train", full)
    with pytest.raises(TrainingError, match=r"memory is full \(.*Tried to allocate 2.00 GiB\): lower .*micro_batch"):
        run_stage(make("pt"))


def test_an_output_with_another_run_is_refused_and_untouched(make, tmp_path):
    run_stage(make("pt"))
    before, other = weights_of(tmp_path / "pt" / "model"), tmp_path / "a.json"
    other.write_text("[]")
    with pytest.raises(ConfigError, match="holds another run: seed is 0 there, 7 here"):
        run_stage(make("pt", seed=7))
    with pytest.raises(ConfigError, match=r"data\.sources is \[\{json: .*rows\.json, .* here\. Choose") as error:
        run_stage(make("pt", data={"sources": [{"json": str(other), "images": "b"}], "workers": 0}))
    assert f"there, [{{json: {other}, images: b, weight: 1.0}}] here" in str(error.value)
    with pytest.raises(ConfigError, match="finished"):
        run_stage(make("pt"))
    assert all(torch.equal(value, before[name]) for name, value in weights_of(tmp_path / "pt" / "model").items())


def test_a_foreign_folder_is_refused(make, tmp_path):
    (tmp_path / "pt").mkdir()
    (tmp_path / "pt" / "thesis.tex").write_text("mine")
    with pytest.raises(ConfigError, match="not empty"):
        run_stage(make("pt"))
    assert (tmp_path / "pt" / "thesis.tex").read_text() == "mine"


@pytest.mark.parametrize("output", ["link", "link/pt"])
def test_an_output_that_is_a_link_to_nowhere_is_refused(make, tmp_path, output):
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match=r"link' is a link to '.*nowhere', which does not exist"):
        run_stage(make("pt", name=output))


def test_a_failed_start_leaves_nothing_and_its_run_may_be_changed(make, tmp_path):
    student = {"llm": str(tmp_path / "no such model"), "encoder": "x"}
    with pytest.raises(ConfigError, match="no such model"):
        run_stage(make("pt", student=student))
    assert not (tmp_path / "pt").exists()
    run_stage(make("pt"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"loss": {"nowhere:loss": 1.0}}, "loss 'nowhere:loss' cannot be loaded: no module 'nowhere'"),
        ({"layers": [9]}, "the model has layers 1 to 4"),
    ],
)
def test_an_objective_that_cannot_be_built_is_refused_before_the_rows_are_read(make, monkeypatch, changes, message):
    monkeypatch.setattr("visper.training.run.build_data", None)
    tasks = tiny.distillation()["tasks"]
    with pytest.raises(ConfigError, match=message):
        run_stage(make("pt", distillation={"tasks": {**tasks, "depth": {**tasks["depth"], **changes}}}))


def test_one_run_at_a_time_is_in_an_output_and_leaves_no_lock(make, tmp_path):
    with locked(tmp_path / "pt", Console(quiet=True)):
        before = {path.name for path in (tmp_path / "pt").iterdir()}
        with pytest.raises(ConfigError, match=r"pt' is in use by process \d+ on host '.*' since 20"):
            run_stage(make("pt"))
        assert {path.name for path in (tmp_path / "pt").iterdir()} == before == {LOCK, HOLDER}
    for name in (LOCK, HOLDER):  # of a process that was killed
        (tmp_path / "pt").mkdir(exist_ok=True)
        (tmp_path / "pt" / name).touch()
    run_stage(make("pt"))
    assert not [path for path in (tmp_path / "pt").rglob(".*") if path.name.startswith(LOCK)]


def test_a_run_that_took_no_step_locks_nothing_and_one_that_did_is_kept(make, monkeypatch, tmp_path):
    cut_behind(monkeypatch, 0)
    with pytest.raises(Stop):
        run_stage(make("pt"))
    monkeypatch.undo()
    cut_behind(monkeypatch, 1)  # before the first checkpoint
    with pytest.raises(Stop):
        run_stage(make("pt", seed=7))
    monkeypatch.undo()
    assert load_run(tmp_path / "pt" / "run.yaml").seed == 7
    with pytest.raises(ConfigError, match="holds another run: seed is 7 there, 0 here"):
        run_stage(make("pt"))
    run_stage(make("pt", seed=7))
    assert [log["step"] for log in logs_of(make("pt")) if "loss" in log] == [1, 2, 3, 4]


def test_a_log_redirected_into_the_output_is_no_foreign_content(make, tmp_path):
    (tmp_path / "pt").mkdir()
    (tmp_path / "pt" / "train.log").write_text("the shell's")
    run_stage(make("pt"))
    assert (tmp_path / "pt" / "train.log").read_text() == "the shell's"


def test_what_may_differ_is_a_matter_of_keys(make, monkeypatch, tmp_path):
    cut_behind(monkeypatch, 3)
    with pytest.raises(Stop):
        run_stage(make("pt"))
    monkeypatch.undo()
    with pytest.raises(ConfigError, match=r"optimization\.lr is .* there, 0\.5 here.*as in its run\.yaml"):
        run_stage(make("pt", optimization={"lr": 0.5}), resume=True)
    run_stage(make("pt", logging={"every": 2}, data={"workers": 1}), resume=True)


def test_pipeline_skips_what_is_finished(make, capsys):
    run = make("ift")
    run_pipeline([run])
    capsys.readouterr()
    run_pipeline([run])
    assert "finished" in capsys.readouterr().out


def test_a_pipeline_told_to_stop_in_the_last_step_of_a_stage_ends_after_that_stage(make, tmp_path, monkeypatch):
    def told(self, args, state, control, **_):
        if state.global_step == state.max_steps:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(StopRequest, "on_step_end", told)
    stages = [make("pt"), make("ift", start="pt")]
    with pytest.raises(StoppedError, match=r"pt' is finished; to go on, repeat the command"):
        run_pipeline(stages)
    assert not (tmp_path / "ift").exists()
    run_pipeline(stages)
    assert (tmp_path / "ift" / "model").exists(), "nothing follows the last stage, so it just ends"


def test_a_pipeline_of_no_stages_is_refused():
    with pytest.raises(ConfigError, match="a pipeline of no stages"):
        run_pipeline([])


def test_stages_of_one_output_are_refused_before_the_first_trains(make, tmp_path):
    with pytest.raises(ConfigError, match=r"'pt' and 'ift' have the same output"):
        run_pipeline([make("pt"), make("ift").model_copy(update={"output": str(tmp_path / "ift" / ".." / "pt")})])
    assert not (tmp_path / "pt").exists()


def test_a_later_stage_that_cannot_start_is_refused_before_the_first_trains(make, rows, tmp_path):
    run_pipeline([make("ift")])
    gone = {"sources": [{"json": str(tmp_path / "gone.json"), "images": str(rows / "images")}]}
    for message, last in {
        r"no folder '.*nowhere'": make("ift", "new", start="nowhere"),
        r"no such file: '.*gone\.json'": make("ift", "new", data=gone),
        r"optimization\.lr is .* there": make("ift", optimization={"lr": 0.5}),
    }.items():
        with pytest.raises((ConfigError, DataError), match=message):
            run_pipeline([make("pt"), last])
    assert not (tmp_path / "pt").exists()


def test_a_finished_stage_is_compared_again_when_the_one_before_it_has_trained(make, tmp_path):
    second = make("ift", start="pt")
    run_pipeline([make("pt"), second])
    shutil.rmtree(tmp_path / "pt")
    with pytest.raises(ConfigError, match=r"changed since it began: start_from"):
        run_pipeline([make("pt", seed=1), second])


def test_a_finished_stage_is_kept_only_if_it_is_undamaged(make, tmp_path):
    run = make("ift")
    run_pipeline([run])
    weights = tmp_path / "ift" / "model" / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(DataError, match=r"model.safetensors.*train again"):
        run_pipeline([run])
    weights.unlink()
    with pytest.raises(DataError, match=r"model.safetensors"):
        run_pipeline([run])
    weights.write_bytes(whole)
    run_pipeline([run])


def test_a_finished_stage_is_kept_only_with_the_weights_that_are_asked_for(make, rows, tmp_path):
    held_out = {"every": 2, "loss_on": [{"json": str(rows / "rows.json"), "images": str(rows / "images")}], "limit": 8}
    run_pipeline([make("ift", evaluation=held_out)])
    run_pipeline([make("ift", evaluation={**held_out, "every": 1})])
    with pytest.raises(ConfigError, match=r"finished with the last ones .* asks for the best by eval/ntp: remove"):
        run_pipeline([make("ift", evaluation={**held_out, "use_best": True, "best": "ntp"})])


def test_a_finished_stage_is_kept_only_with_its_drop_list(make, tmp_path):
    file = tmp_path / "drop.jsonl"
    DropList([Drop("rows/1/1", "not wanted", "")]).write(file)
    run = make("ift", data={"drop_list": [str(file)]})
    run_pipeline([run])
    run_pipeline([run])
    DropList([Drop("rows/2/2", "not wanted", "")]).write(file)
    with pytest.raises(ConfigError, match=r"changed since it began: data.drop_list '.*drop.jsonl'"):
        run_pipeline([run])


def test_bad_rows_and_images_are_skipped_counted_and_named(make, rows, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(rows, broken)
    whole = (broken / "images" / "1.png").read_bytes()
    (broken / "images" / "1.png").write_bytes(whole[: len(whole) // 2])
    (broken / "images" / "2.png").unlink()
    source = {"json": str(broken / "rows.json"), "images": str(broken / "images")}
    data = {"sources": [source], "workers": 0, "drop_limit": 0.2}
    run_stage(make("pt", data=data, optimization={"global_batch": 16, "micro_batch": 8, "max_steps": 2}))
    dropped = [json.loads(line) for line in (tmp_path / "pt" / "dropped.jsonl").read_text().splitlines()]
    assert len(dropped) == 2 and len({row["reason"] for row in dropped}) == 2


def test_rows_found_bad_before_the_checkpoint_are_still_named_after_a_resume(make, monkeypatch, tmp_path):
    """Those found bad later are read again: they may be good by now, as after a failure of the disk."""
    cut_behind(monkeypatch, 3)
    run = make("ift", data={"drop_limit": 0.1})
    with pytest.raises(Stop):
        run_stage(run)
    monkeypatch.undo()
    found = DropList([Drop("rows/1/1", "unreadable image", "while loading")])
    checkpoint = tmp_path / "ift" / "checkpoints" / "checkpoint-2"
    found.write(checkpoint / "dropped.jsonl")
    write_manifest(checkpoint)
    later = [Drop(f"rows/{row}/{row}", "missing image", "while loading") for row in range(2, 9)]
    DropList([*found, *later]).write(tmp_path / "ift" / "dropped.jsonl")
    run_stage(run, resume=True)
    assert DropList.read(tmp_path / "ift" / "dropped.jsonl") == list(found)


def test_a_checkpoint_of_another_model_is_refused(make, monkeypatch, tmp_path):
    cut_behind(monkeypatch, 3)
    with pytest.raises(Stop):
        run_stage(make("ift"))
    monkeypatch.undo()
    checkpoint = tmp_path / "ift" / "checkpoints" / "checkpoint-2"
    weights = tensors_of(checkpoint, "weights")
    shutil.rmtree(checkpoint / STATE)
    cut = {f"weights.{name}": value[:-1] if "up_proj" in name else value for name, value in weights.items()}
    (checkpoint / STATE).mkdir()
    save_file(cut, checkpoint / STATE / "cut.safetensors")
    write_manifest(checkpoint)
    with pytest.raises(ConfigError, match="belongs to another model or stage: 4 parameters differ"):
        run_stage(make("ift"), resume=True)


def test_rows_of_a_drop_list_are_left_out_and_no_limit_counts_them(make, tmp_path, capsys):
    listed = tmp_path / "listed.jsonl"
    DropList([Drop(f"rows/{i}/{i}", "blurred") for i in range(5)]).write(listed)
    run_stage(make("pt", data={"drop_list": [str(listed)], "drop_limit": 0.0}))
    assert "11 of 11 rows, 5 by drop list" in " ".join(capsys.readouterr().out.split())
    assert (tmp_path / "pt" / "dropped.jsonl").read_text() == listed.read_text()


def test_too_many_bad_rows_are_refused_before_the_first_step(make, rows, tmp_path):
    data = {"sources": [{"json": str(rows / "rows.json"), "images": str(tmp_path / "empty")}], "workers": 0}
    with pytest.raises(DataError, match="drop_limit"):
        run_stage(make("pt", data=data))
    assert not (tmp_path / "pt" / "log.jsonl").exists()


def test_text_only_batches_train_in_pt(make, tmp_path):
    mixed = tiny.write_rows(tmp_path / "mixed", images=1, text_rows=11)
    source = {"json": str(mixed / "rows.json"), "images": str(mixed / "images")}
    run = make("pt", data={"sources": [source], "workers": 0})
    run_stage(run)
    text_only = [log for log in logs_of(run) if all(log.get(name) == 0 for name in TERMS)]
    assert text_only and all(log["ntp"] > 0 for log in text_only)


def test_a_run_says_how_many_rows_have_images_and_which_look_as_if_they_had(make, tmp_path, capsys):
    mixed = tiny.write_rows(tmp_path / "mixed", images=4, text_rows=3)
    read = json.loads((mixed / "rows.json").read_text())
    for misspelled in [row for row in read if "image" in row][:2]:
        misspelled["img"] = misspelled.pop("image")
        for turn in misspelled["conversations"]:
            turn["value"] = turn["value"].replace("<image>", "").strip()
    (mixed / "rows.json").write_text(json.dumps(read))
    source = {"json": str(mixed / "rows.json"), "images": str(mixed / "images")}
    run_stage(make("ift", data={"sources": [source], "workers": 0}, optimization={"max_steps": 1}))
    shown = " ".join(capsys.readouterr().out.split())
    assert "7 of 7 rows; 2 with images, 5 without" in shown
    assert "warning 2 rows of 'rows' without 'image', whose 'img' looks like one and is not read" in shown


def test_pt_refuses_rows_of_which_none_shows_an_image(make, tmp_path):
    text = tiny.write_rows(tmp_path / "text", images=0, text_rows=6)
    source = {"json": str(text / "rows.json"), "images": str(text / "images")}
    with pytest.raises(DataError, match="none of the 6 rows has an image"):
        run_stage(make("pt", data={"sources": [source]}))


@pytest.mark.parametrize(
    ("data", "optimization"),
    [
        pytest.param({}, {"micro_batch": 16}, id="padded", marks=pytest.mark.slow),
        pytest.param({}, {"micro_batch": 2}, id="accumulated", marks=pytest.mark.slow),
        pytest.param({}, {"micro_batch": 4, "packing": True}, id="packed"),
        pytest.param(
            {"join_conversations": True}, {"micro_batch": 16, "packing": True}, id="joined", marks=pytest.mark.slow
        ),
    ],
)
def test_the_loss_of_each_source_is_what_a_run_of_it_alone_begins_with(make, tmp_path, data, optimization):
    sources = []
    for name, images, text_rows in (("photos", 9, 0), ("texts", 2, 5)):
        folder = tiny.write_rows(tmp_path / name, images, text_rows)
        rows = folder / "rows.json"
        rows.rename(folder / f"{name}.json")
        sources.append({"json": str(folder / f"{name}.json"), "images": str(folder / "images")})

    def first_log(name, used, rows):
        micro_batch = optimization["micro_batch"] if name == "both" else 1
        steps = {**optimization, "max_steps": 1, "global_batch": rows, "micro_batch": micro_batch}
        run = make("ift", name, data={"sources": used, **data}, optimization=steps)
        run_stage(run)
        return logs_of(run)[0]

    both = first_log("both", sources, 16)
    alone = [first_log("one", sources[:1], 9), first_log("other", sources[1:], 7)]
    assert both["ntp/photos"] == pytest.approx(alone[0]["ntp"], rel=1e-5)
    assert both["ntp/texts"] == pytest.approx(alone[1]["ntp"], rel=1e-5)
    assert not any(name.startswith("ntp/") for log in alone for name in log)


def test_a_loss_that_is_not_finite_stops_and_names_the_rows(make, monkeypatch):
    from visper.training.module import TrainingModel

    original = TrainingModel.next_token_loss
    monkeypatch.setattr(TrainingModel, "next_token_loss", lambda *a, **k: original(*a, **k) * float("nan"))
    with pytest.raises(NonFiniteLossError, match=r"rows/\d+/"):
        run_stage(make("ift"))


def damage_gradients(monkeypatch, steps):
    """A gradient that is NaN at these steps, behind a finite loss."""
    original = StageTrainer.training_step

    def damaged(self, model, *args, **kwargs):
        loss = original(self, model, *args, **kwargs)
        if self.accelerator.sync_gradients and self.state.global_step + 1 in steps:
            next(p for p in model.parameters() if p.grad is not None).grad.fill_(float("nan"))
        return loss

    monkeypatch.setattr(StageTrainer, "training_step", damaged)


def test_a_nan_gradient_stops_the_run_before_the_optimizer_moves_and_resume_recovers(make, monkeypatch, tmp_path):
    run_stage(make("ift", name="sound"))
    damage_gradients(monkeypatch, {3})
    with pytest.raises(NonFiniteLossError, match=r"the gradient norm is nan at step 3.*rows/"):
        run_stage(make("ift", name="cut"))
    assert not (tmp_path / "cut" / "model").exists()
    monkeypatch.undo()
    run_stage(make("ift", name="cut"), resume=True)
    sound, cut = weights_of(tmp_path / "sound" / "model"), weights_of(tmp_path / "cut" / "model")
    assert all(torch.equal(value, cut[name]) for name, value in sound.items())


def test_a_step_with_a_nan_gradient_is_left_out(make, monkeypatch, tmp_path):
    damage_gradients(monkeypatch, {2, 4})  # the last one too
    skip = {"every": 1, "monitor": {"non_finite": "skip"}}
    run_stage(make("ift", logging=skip))
    assert all(value.isfinite().all() for value in weights_of(tmp_path / "ift" / "model").values())
    norms = [log["grad_norm"] for log in logs_of(make("ift")) if "grad_norm" in log]
    assert norms[1] == norms[3] == 0 < norms[0]


@pytest.mark.parametrize("skipped", [(2,), (2, 4), (3, 4)])
def test_logged_values_are_means_over_the_steps_that_were_not_skipped(make, monkeypatch, tmp_path, skipped):
    """With a step per log, the same steps are skipped and the others have their own values."""
    damage_gradients(monkeypatch, set(skipped))
    rules = {"monitor": {"non_finite": "skip"}}
    for name, every in (("each", 1), ("pairs", 2)):
        run_stage(make("ift", name=name, logging={"every": every, **rules}))
    (*each, summary), (*pairs, _) = (logs_of(make("ift", name=name)) for name in ("each", "pairs"))
    assert "train_loss" not in summary  # the Trainer's mean, to which a skipped step adds 0
    assert [log.get("skipped", 0) for log in each] == [int(step in skipped) for step in (1, 2, 3, 4)]
    for before, log in zip([{"step": 0}, *pairs], pairs, strict=False):
        steps = range(before["step"] + 1, log["step"] + 1)
        sound = [each[step - 1] for step in steps if step not in skipped]
        assert log.get("skipped", 0) == len(steps) - len(sound)
        for value in ("loss", "ntp"):
            assert (value in log) == bool(sound)
            if sound:
                assert log[value] == pytest.approx(sum(one[value] for one in sound) / len(sound), abs=1e-4)


def test_more_than_a_few_steps_left_out_in_a_row_stop_the_run(make, monkeypatch, tmp_path):
    damage_gradients(monkeypatch, set(range(3, 20)))
    skip = {"save_every": 2, "monitor": {"non_finite": "skip"}}
    with pytest.raises(NonFiniteLossError, match=r"6 steps in a row were skipped.*--resume"):
        run_stage(make("ift", logging=skip, optimization={"max_steps": 12}))
    assert not (tmp_path / "ift" / "model").exists()


@pytest.mark.parametrize(("steps", "saved"), [(1, []), (4, ["checkpoint-2"])])
def test_weights_that_are_not_finite_are_never_saved(make, monkeypatch, tmp_path, steps, saved):
    """A step may overflow the weights with a finite loss and gradient; at the last step nothing comes after it."""
    end = StageTrainer._get_grad_norm

    def overflow(self, model, *args, **kwargs):
        if self.state.global_step + 1 == steps:
            for group in self._optimizer().param_groups:
                group["lr"] = torch.tensor(1e39) if isinstance(group["lr"], torch.Tensor) else 1e39
        return end(self, model, *args, **kwargs)

    monkeypatch.setattr(StageTrainer, "_get_grad_norm", overflow)
    logging = {"save_every": 2, "keep_checkpoints": 1}
    with pytest.raises(TrainingError, match=r"trainable parameters are NaN or infinite.*nothing was saved"):
        run_stage(make("ift", logging=logging, optimization={"max_steps": steps, "schedule": "constant_with_warmup"}))
    assert [path.name for path in (tmp_path / "ift" / "checkpoints").glob("checkpoint-*")] == saved
    assert not (tmp_path / "ift" / "model").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {
                "distillation": tiny.distillation(
                    tasks={
                        **tiny.distillation()["tasks"],
                        "depth": {**tiny.distillation()["tasks"]["depth"], "layers": [9]},
                    }
                )
            },
            "layers 1 to 4",
        ),
        (
            {
                "distillation": tiny.distillation(
                    tasks={"gen": {**tiny.distillation()["tasks"]["depth"], "head": {"queries": "states"}}}
                )
            },
            "queries.*matrix",
        ),
        (
            {
                "distillation": tiny.distillation(
                    tasks={"depth": {**tiny.distillation()["tasks"]["depth"], "head": {"num_queries": 12}}}
                )
            },
            "num_queries",
        ),
        ({"optimization": {"global_batch": 6, "micro_batch": 4}}, "not a multiple of micro_batch 4"),
        ({"optimization": {"freeze": ["vision"]}}, "freeze names 'vision'"),
        ({"data": {"max_tokens": 4097}}, r"data.max_tokens is 4097.*4096 positions.*set data.max_tokens=4096 or less"),
        ({"optimization": {"attention": "flash_attention_3"}}, "optimization.attention=flash_attention_3"),
        ({"optimization": {"attention": "flex_attention"}}, "flex_attention trains on GPUs only.*sdpa or eager"),
    ],
)
def test_runs_that_cannot_be_are_refused_before_training(make, changes, message, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(ValueError, match=message):
        run_stage(make("pt", **changes))


def test_a_run_none_of_whose_rows_can_be_loaded_says_why(make, tmp_path):
    only = tiny.write_rows(tmp_path / "only", images=2, text_rows=0)
    source = {"json": str(only / "rows.json"), "images": str(only / "images")}
    with pytest.raises(DataError, match=r"not one could be loaded.*huge image.*raise data\.max_pixels"):
        run_stage(make("pt", data={"sources": [source], "max_pixels": 1, "workers": 0}))


def test_pt_without_distillation_is_llavas_with_learning_task_tokens(make):
    run = make("pt", distillation=None)
    run_stage(run)
    assert not TERMS & logs_of(run)[0].keys()


def test_an_encoder_can_be_left_frozen_in_vpt(make, tmp_path, tiny_encoder):
    run_stage(make("vpt", optimization={"freeze": ["vision"]}))
    ours = next(v for n, v in weights_of(tmp_path / "vpt" / "model").items() if "layers.0.mlp.fc1.weight" in n)
    theirs = next(v for n, v in weights_of(tiny_encoder).items() if "layers.0.mlp.fc1.weight" in n)
    assert torch.equal(ours, theirs)


def test_tensorboard_is_a_key(make, tmp_path):
    run_stage(make("pt", logging={"report_to": ["tensorboard"]}))
    events = list((tmp_path / "pt" / "tensorboard").glob("events*"))
    assert events and b"depth/1/smooth_l1" in events[0].read_bytes()


def test_relative_paths_of_a_recipe_are_relative_to_the_current_folder(
    rows, tmp_path, tiny_llm, tiny_encoder, monkeypatch
):
    (tmp_path / "recipes").mkdir()
    for name, place in {"llm": tiny_llm, "encoder": tiny_encoder, "rows": rows}.items():
        shutil.copytree(place, tmp_path / name)
    (tmp_path / "words.txt").write_text("zebra\n")
    DropList([Drop("rows/0/0", "blurred")]).write(tmp_path / "drop.jsonl")
    base = {
        "name": "relative",
        "stage": "pt",
        "output": "out",
        "student": {"llm": "llm", "encoder": "encoder", "task_tokens": None, "add_words": "words.txt"},
        "data": {
            "sources": [{"json": "rows/rows.json", "images": "rows/images"}],
            "drop_list": ["drop.jsonl"],
            "workers": 0,
        },
        "optimization": {"global_batch": 2, "micro_batch": 2, "lr": 1e-3, "max_steps": 1, "precision": "float32"},
    }
    (tmp_path / "recipes" / "base.yaml").write_text(json.dumps(base))  # JSON is YAML
    (tmp_path / "recipes" / "mine.yaml").write_text("extends: base.yaml\nseed: 3\n")
    monkeypatch.chdir(tmp_path)
    run = load_run("recipes/mine.yaml")
    run_stage(run)
    assert run.seed == 3 and run.student is not None and run.student.add_words == ("zebra",)
    assert (tmp_path / "out" / "model" / "run.yaml").is_file() and not (tmp_path / "recipes" / "out").exists()
    assert (tmp_path / "out" / "dropped.jsonl").read_text() == (tmp_path / "drop.jsonl").read_text()


@pytest.mark.parametrize("steps", [{"max_steps": 1}, {"max_steps": None, "global_batch": 16, "micro_batch": 8}])
def test_a_run_of_one_step_trains(make, tmp_path, tiny_llm, steps):
    run = make("ift", optimization=steps)
    run_stage(run)
    assert logs_of(run)[0]["learning_rate"] == run.optimization.lr
    name = "model.layers.0.mlp.up_proj.weight"
    saved = next(value for key, value in weights_of(run_folder(run)).items() if "layers.0.mlp.up_proj" in key)
    assert not torch.equal(saved, weights_of(tiny_llm)[name])


def test_a_source_that_keeps_no_row_is_refused_though_the_limit_is_kept(make, tmp_path):
    lost = tiny.write_rows(tmp_path / "lost", images=1, text_rows=0)
    (lost / "rows.json").rename(lost / "lost.json")
    run = make("ift")
    sources = [*run.model_dump(mode="json")["data"]["sources"], {"json": str(lost / "lost.json"), "images": "nowhere"}]
    with pytest.raises(DataError, match=r"none of the 1 rows of .*lost.* can be used: see `visper data check`"):
        run_stage(make("ift", data={"sources": sources, "drop_limit": 0.2}))


def test_a_resumed_run_logs_and_saves_as_often_as_it_says_now(make, monkeypatch):
    run = make("ift", logging={"every": 4, "save_every": 2}, optimization={"max_steps": 8})
    cut_behind(monkeypatch, 3)
    with pytest.raises(Stop):
        run_stage(run)
    monkeypatch.undo()
    logging = {"every": 1, "save_every": 1, "keep_checkpoints": 9}
    run_stage(make("ift", logging=logging, optimization={"max_steps": 8}, data={"drop_limit": 0.5}), resume=True)
    assert [line["step"] for line in logs_of(run) if "ntp" in line] == [1, 3, 4, 5, 6, 7, 8]
    saved = sorted(path.name for path in (Path(run.output) / "checkpoints").glob("checkpoint-*"))
    assert saved == [f"checkpoint-{step}" for step in range(2, 9)]


def test_the_last_step_is_logged_whatever_the_interval(make):
    run = make("ift", logging={"every": 3}, optimization={"max_steps": 5})
    run_stage(run)
    logs = [line for line in logs_of(run) if "ntp" in line]
    assert [line["step"] for line in logs] == [1, 3, 5] and all("grad_norm_llm" in line for line in logs)
    each = make("ift", name="each", optimization={"max_steps": 5})
    run_stage(each)
    single = {line["step"]: line["ntp"] for line in logs_of(each) if "ntp" in line}
    assert logs[-1]["ntp"] == pytest.approx((single[4] + single[5]) / 2, rel=1e-6)


@pytest.mark.parametrize("compiler", [None, pytest.param("aot_eager", marks=pytest.mark.slow)])
def test_mfu_is_logged_where_the_peak_is_known(make, monkeypatch, compiler):
    monkeypatch.setattr("visper.training.trainer.known_peak", lambda device: 1e12)
    run = make("pt", optimization={"gradient_checkpointing": 1.0, "compile": compiler})
    run_stage(run)
    logs = [line for line in logs_of(run) if "loss" in line]
    done = [line["mfu"] * line["step_s"] for line in logs]
    assert all(0 < line["mfu"] < 1 and 0 <= line["data_wait"] <= 1 for line in logs)
    assert max(done) < 1.5 * min(done)  # FLOPs a step, up to the rows' lengths
