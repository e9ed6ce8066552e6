"""One adaptation: it equals a plain loop, resumes bit for bit, and stops before a broken update."""

import math
import random
import shutil

import pytest
import torch
from torch.nn import functional as F

from gaintune.config import MethodConfig, TrainConfig
from gaintune.data import Examples
from gaintune.errors import ConfigError, DivergedError
from gaintune.methods import METHODS, Precision, PreparedMethod, StagePosition, attach
from gaintune.models import NextTokenLoss
from gaintune.storage import MANIFEST, damage
from gaintune.training import TrainedStage, train_stage
from gaintune.training.loop import newest_checkpoint, schedule_factor
from support import refused, tiny_base

GAIN_FFN = MethodConfig(name="gain-ffn", label="gain-ffn")
LORA = MethodConfig(name="lora", label="lora", rank=2)
DISEL = MethodConfig(name="disel", rank=2)


def gains(model):
    return {name: value.detach().clone() for name, value in model.named_parameters() if value.requires_grad}


def adapted(method=GAIN_FFN):
    return attach(tiny_base.model(), method, seed=0)


def train(model, blocks, checkpoints, *, lr=0.05, seed=0, mixed_precision=None, **options) -> TrainedStage:
    """One adaptation with no rule or rate of a method's own."""
    precision = Precision("float32", torch.float32, mixed_precision)
    method = PreparedMethod(MethodConfig(name="ia3"), METHODS["ia3"], lr, precision)
    rows, plan = Examples.of_blocks(blocks), TrainConfig(seed=seed, **options)
    return train_stage(model, method, rows, plan, StagePosition(), checkpoints=checkpoints)


def test_training_equals_a_plain_loop(tmp_path):
    blocks = tiny_base.blocks(8, 16)
    plan = {"batch_size": 2, "gradient_accumulation": 2, "schedule": "cosine", "warmup_ratio": 0.5, "epochs": 2}
    model = adapted()
    result = train(model, blocks, tmp_path / "a", seed=3, clip=0.1, **plan)
    assert (result.steps, result.tokens) == (4, 256)
    twin, order = adapted(), _order_of(tmp_path, blocks, plan)
    trained = [p for p in twin.parameters() if p.requires_grad]
    optimizer, losses = torch.optim.AdamW(trained, lr=0.05, weight_decay=0.0), []
    for step in range(4):
        for group in optimizer.param_groups:
            group["lr"] = 0.05 * schedule_factor(step, steps=4, warmup=2, cosine=True)
        rows = torch.cat(order[2 * step : 2 * step + 2])
        loss = F.cross_entropy(twin(rows).logits[:, :-1].flatten(0, 1), rows[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 0.1)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert result.losses == pytest.approx(losses, abs=1e-4)
    for name, value in gains(twin).items():
        torch.testing.assert_close(gains(model)[name], value, rtol=1e-4, atol=1e-6, msg=name)


def test_an_effective_batch_is_that_many_forward_passes_added_up(tmp_path):
    blocks, results = tiny_base.blocks(24, 16), []
    for n, plan in enumerate(({"effective_batch": 8}, {"gradient_accumulation": 4})):
        model = adapted(LORA)
        stage = train(model, blocks, tmp_path / str(n), batch_size=2, **plan)
        results.append((stage.steps, stage.losses, gains(model)))
    assert results[0][:2] == results[1][:2] and results[0][0] == 3
    assert all(torch.equal(results[0][2][name], value) for name, value in results[1][2].items())


def _order_of(folder, blocks, plan):
    """The batches a run with the same seed sees, recorded by a model that cannot learn."""
    seen, model = [], adapted()
    model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["input_ids"]) if len(kwargs["input_ids"]) == 2 else None,
        with_kwargs=True,
    )
    train(model, blocks, folder / "b", lr=1e-30, seed=3, clip=1e-30, **plan)
    return seen


@pytest.mark.parametrize("method", [GAIN_FFN, LORA, DISEL], ids=lambda method: method.name)
def test_a_run_stopped_between_checkpoints_ends_as_if_it_had_not(tmp_path, method):
    blocks = tiny_base.blocks(32, 16)
    plan = {"batch_size": 4, "checkpoint_steps": 3}
    whole = adapted(method)
    expected = train(whole, blocks, tmp_path / "whole", **plan)

    class Stop(Exception):
        pass

    stopped, calls = adapted(method), []

    def stop(module, args, kwargs):
        calls.append(1)
        if len(calls) > 7:
            raise Stop

    handle = stopped.register_forward_pre_hook(stop, with_kwargs=True)
    with pytest.raises(Stop):
        train(stopped, blocks, tmp_path / "stopped", **plan)
    handle.remove()
    assert newest_checkpoint(tmp_path / "stopped").name == "checkpoint-3"
    again = adapted(method)
    assert train(again, blocks, tmp_path / "stopped", **plan).losses == expected.losses
    for name, value in gains(whole).items():
        assert torch.equal(gains(again)[name], value), name


def test_whatever_bit_is_flipped_in_the_newest_checkpoint_the_older_one_is_found(tmp_path, caplog):
    kept, used, rng = tmp_path / "kept", tmp_path / "used", random.Random(0)
    train(adapted(), tiny_base.blocks(8, 16), kept, batch_size=4, checkpoint_steps=1)
    newest = newest_checkpoint(kept)
    assert (newest.name, damage(newest)) == ("checkpoint-2", None)
    files = sorted(file.name for file in newest.iterdir() if file.name != MANIFEST)
    for number in range(200):
        name = MANIFEST if number % 2 else rng.choice(files)
        damaged = bytearray((newest / name).read_bytes())
        bit = rng.randrange(8 * len(damaged))
        damaged[bit // 8] ^= 1 << bit % 8
        shutil.copytree(kept, used)
        (used / newest.name / name).write_bytes(damaged)
        caplog.clear()
        assert newest_checkpoint(used) == used / "checkpoint-1", (name, bit)
        messages = [record.getMessage() for record in caplog.records]
        assert [message.count("continues from checkpoint-1") for message in messages] == [1], (name, bit)
        assert not (used / newest.name).exists()
        shutil.rmtree(used)


def test_with_no_whole_checkpoint_training_starts_again_and_other_folders_stay(tmp_path, caplog):
    for name in ("checkpoint-1", "checkpoint-2", "checkpoint-2 of mine"):
        (tmp_path / name).mkdir()
    assert newest_checkpoint(tmp_path) is None
    (record,) = caplog.records
    assert record.getMessage().count("never finished") == 2 and "training starts again" in record.getMessage()
    assert [entry.name for entry in tmp_path.iterdir()] == ["checkpoint-2 of mine"]


@pytest.mark.parametrize("part", ["loss", "gradient"])
def test_a_loss_or_gradient_that_is_not_finite_stops_before_the_update(tmp_path, part):
    model = adapted()
    before = gains(model)
    if part == "loss":
        with torch.no_grad():
            model.get_base_model().model.norm.weight[0] = float("inf")
    else:
        next(p for p in model.parameters() if p.requires_grad).register_hook(lambda grad: grad * float("inf"))
    with pytest.raises(DivergedError, match=rf"the {part} is (nan|inf) at step 1 of 1; stopped before the update"):
        train(model, tiny_base.blocks(4, 16), tmp_path)
    assert all(torch.equal(value, before[name]) for name, value in gains(model).items())


def test_decay_leaves_gains_and_gradient_checkpointing_leaves_results_alone(tmp_path):
    blocks = tiny_base.blocks(8, 16)
    plain, decayed, sparing = adapted(), adapted(), adapted()
    train(plain, blocks, tmp_path / "a")
    assert not list(tmp_path.rglob("training_args.bin")), "a pickle of settings"
    train(decayed, blocks, tmp_path / "b", weight_decay=0.5)
    train(sparing, blocks, tmp_path / "c", gradient_checkpointing=True)
    for name, value in gains(plain).items():
        assert torch.equal(value, gains(decayed)[name])
        torch.testing.assert_close(gains(sparing)[name], value, msg=name)


def test_the_first_update_of_a_warm_up_moves_and_cosine_ends_near_zero():
    factors = [schedule_factor(step, steps=10, warmup=2, cosine=True) for step in range(10)]
    assert factors[:3] == [1 / 3, 2 / 3, 1.0]
    assert factors[-1] == pytest.approx(0.5 * (1 + math.cos(math.pi * 7 / 8)))
    assert [schedule_factor(step, steps=4, warmup=1, cosine=False) for step in range(4)] == [0.5, 1.0, 1.0, 1.0]


def test_an_unknown_tracker_and_nothing_to_train_are_refused(tmp_path):
    blocks = tiny_base.blocks(4, 16)
    refused(ConfigError, r"train\.trackers", train, adapted(), blocks, tmp_path, trackers=("tensorbord",))
    refused(ConfigError, "nothing to train", train, tiny_base.model().requires_grad_(False), blocks, tmp_path)


def test_what_was_trained_under_autocast_computes_in_its_own_numbers_afterwards(tmp_path):
    blocks, model = tiny_base.blocks(4, 16), tiny_base.model()
    train(model, blocks, tmp_path, lr=0.01, batch_size=2, mixed_precision=torch.bfloat16)
    twin = tiny_base.model()
    twin.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert torch.equal(model.eval()(blocks).logits, twin.eval()(blocks).logits)
    assert NextTokenLoss(model).chunked
