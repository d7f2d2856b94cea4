"""What a plan says of checkpoints and host memory, beside what training writes and copies."""

import pytest
from safetensors.torch import load_file

from tests.planning.test_plan import tiny_run, with_optimization
from visper.config import Engine
from visper.planning.host import LIBRARIES
from visper.planning.memory import Machine
from visper.planning.plan import Plan
from visper.training import run_stage
from visper.training.checkpoint import STATE, checkpoints
from visper.training.checkpoint_writer import ShardWriter


@pytest.mark.parametrize("stage", ["pt", "vpt"])
def test_a_checkpoint_holds_on_disk_and_copies_to_the_host_what_is_planned(
    stage, tmp_path, tiny_llm, tiny_encoder, monkeypatch
):
    copied, write = [], ShardWriter.write_data

    def counted(self, parts, planner):
        copied.append(sum(tensor.nbytes for tensor in planner.state_dict.values()))
        return write(self, parts, planner)

    monkeypatch.setattr(ShardWriter, "write_data", counted)
    run = tiny_run(tmp_path, tiny_llm, tiny_encoder, stage=stage, output=str(tmp_path / "out"))
    run = run.model_copy(update={"optimization": run.optimization.model_copy(update={"max_steps": 1})})
    run_stage(run)
    (folder,) = checkpoints(tmp_path / "out")
    written = [tensor for file in (folder / STATE).glob("*.safetensors") for tensor in load_file(file).values()]
    found = Plan(run, Machine(0, None))
    planned = found.disk["a checkpoint, trainable weights"] + found.disk["a checkpoint, optimizer"]
    assert planned == sum(tensor.nbytes for tensor in written) == copied[0]
    assert planned == found.memory.parts["copy of a checkpoint that is being written"]
    on_disk = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    assert planned < on_disk < planned + 400 * len(written) + 60_000  # names and shapes; random states, log, manifest


def test_host_memory_of_each_engine_by_hand(tmp_path, tiny_llm, tiny_encoder):
    run = with_optimization(tiny_run(tmp_path, tiny_llm, tiny_encoder, distillation=None), global_batch=64)

    def planned(gpus, **launch):
        changed = run.model_copy(update={"launch": run.launch.model_copy(update=launch)})
        return Plan(changed, Machine(gpus, 80e9, per_node=4))

    ddp, fsdp = planned(8), planned(8, engine=Engine.FSDP)
    copies = planned(8, engine=Engine.FSDP, replicas=2)
    read = 4 * sum(part.total for part in ddp.parts)
    saved = ddp.disk["a checkpoint, trainable weights"] + ddp.disk["a checkpoint, optimizer"]
    start, writing = "start or resume", "a checkpoint is written"
    assert (ddp.host[start].first, ddp.host[start].other) == (LIBRARIES + read, LIBRARIES + read)
    for sharded in (fsdp, copies):  # the first process alone reads
        assert (sharded.host[start].first, sharded.host[start].other) == (LIBRARIES + read, LIBRARIES)
        assert sharded.host[start].node == 4 * LIBRARIES + read
    held = [found.host[writing].first - LIBRARIES for found in (ddp, fsdp, copies)]
    assert held == pytest.approx([saved, saved / 8, saved / 4])
    assert ddp.host[writing].node == pytest.approx(4 * (LIBRARIES + saved))
    assert planned(1, engine=Engine.FSDP).host[writing].node == pytest.approx(LIBRARIES + saved)
