"""Targets as bytes: what comes back, and how far off it may be."""

import pytest
import torch

from visper.common.errors import ConfigError
from visper.distillation import TargetSpec
from visper.target_store.quantize import DTYPES, TargetCodec

SPEC = TargetSpec(20, 7)


def there_and_back(codec, targets):
    values, scales = codec.encode(targets)
    rows = [codec.join(value, None if scales is None else scales[i]) for i, value in enumerate(values)]
    assert all(row.dtype == torch.uint8 and len(row) == codec.target_bytes for row in rows)
    return codec.decode(torch.stack(rows))


def test_float32_and_values_that_float16_has_come_back_exactly():
    targets = torch.randn(3, 20, 7)
    assert torch.equal(there_and_back(TargetCodec(SPEC, "float32"), targets), targets)
    targets = targets.half().float()
    assert torch.equal(there_and_back(TargetCodec(SPEC, "float16"), targets), targets)


@pytest.mark.parametrize("spec", [SPEC, TargetSpec(1, 9), TargetSpec(3, 1)])
def test_eight_bits_err_by_half_a_step_of_their_own_scale(spec):
    targets = torch.randn(4, spec.tokens, spec.width) * torch.logspace(-3, 3, spec.width)
    targets[0] = 0
    over = 1 if spec.tokens > 16 else 2
    largest = targets.abs().amax(over, keepdim=True)
    error = (there_and_back(TargetCodec(spec, "int8"), targets) - targets).abs()
    assert (error <= largest / 127 / 2 * 1.001).all()
    error = (there_and_back(TargetCodec(spec, "fp8"), targets) - targets).abs()
    # Three bits behind the point: half a sixteenth of the value, or of the smallest step.
    assert (error <= torch.maximum(targets.abs() / 16 * 1.001, largest * 2**-10 / 448 * 1.001)).all()


def test_a_channel_that_is_always_large_costs_the_others_nothing():
    targets = torch.randn(2, 20, 7)
    plain = there_and_back(TargetCodec(SPEC, "int8"), targets)
    targets[..., 3] *= 1000
    assert torch.equal(there_and_back(TargetCodec(SPEC, "int8"), targets)[..., :3], plain[..., :3])


def test_a_target_does_not_depend_on_its_neighbors():
    targets = torch.randn(5, 20, 7)
    for dtype in DTYPES:
        codec = TargetCodec(SPEC, dtype)
        assert torch.equal(there_and_back(codec, targets)[2:3], there_and_back(codec, targets[2:3]))


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_target_decodes_wherever_its_bytes_begin(dtype):
    codec, targets = TargetCodec(TargetSpec(1, 3), dtype), torch.tensor([[[1.0, -2.0, 0.5]], [[3.0, 0.0, 1.0]]])
    values, scales = codec.encode(targets)
    rows = [codec.join(values[i], None if scales is None else scales[i]) for i in range(2)]
    held = torch.cat((torch.zeros(1, dtype=torch.uint8), *rows))
    last = held[1 + codec.target_bytes :][None]
    assert torch.allclose(codec.decode(last), targets[1:], rtol=0.04, atol=0.02)


def test_published_sizes_in_bytes():
    shapes = {"depth": TargetSpec(576, 1024), "seg": TargetSpec(576, 1536), "gen": TargetSpec(1, 1024)}
    sizes = {dtype: sum(TargetCodec(spec, dtype).target_bytes for spec in shapes.values()) for dtype in DTYPES}
    assert sizes == {"float32": 5_902_336, "float16": 2_951_168, "int8": 1_485_828, "fp8": 1_485_828}


def test_what_cannot_be_kept_is_refused():
    with pytest.raises(ConfigError, match=r"beyond float16's 65504.*float32 or fp8"):
        TargetCodec(SPEC, "float16").encode(torch.full((1, 20, 7), 1e5))
    with pytest.raises(ConfigError, match="not finite"):
        TargetCodec(SPEC, "int8").encode(torch.full((1, 20, 7), float("nan")))
    with pytest.raises(ValueError, match="choose one of float32, float16, int8, fp8"):
        TargetCodec(SPEC, "int4")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("spec", [SPEC, TargetSpec(1, 7)])
def test_packed_on_the_device_batch_by_batch_they_are_the_bytes_of_all_at_once(dtype, spec):
    codec, targets = TargetCodec(spec, dtype), torch.randn(5, spec.tokens, spec.width)
    packed = torch.cat([codec.pack(part) for part in targets.split(2)])
    assert packed.shape == (5, codec.target_bytes) and packed.dtype == torch.uint8
    values, scales = codec.encode(targets)
    again = codec.unpack(packed)
    assert torch.equal(again[0].view(torch.uint8), values.view(torch.uint8))
    assert (scales is None) == (again[1] is None) and (scales is None or torch.equal(scales, again[1]))
    rows = [codec.join(value, None if scales is None else scales[i]) for i, value in enumerate(values)]
    assert torch.equal(packed, torch.stack(rows))
