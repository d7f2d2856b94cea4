import numpy as np
import pytest
import torch
from PIL import Image

from visper.distillation.teachers import build_teacher

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
from onnx import TensorProto, helper, numpy_helper  # noqa: E402

from visper.distillation.teachers.onnx import class_colors  # noqa: E402

WEIGHT = torch.arange(12.0).view(4, 3) / 10 - 0.5


def save(path, batch=None, layout="NCHW", size=8, pooled=False):
    """A 1 x 1 convolution of 3 to 4 channels, then the double of it; ``pooled`` averages over the map."""
    nodes = [helper.make_node("Conv", ["x", "w"], ["features"]), helper.make_node("Add", ["features"] * 2, ["doubled"])]
    count = "n" if batch is None else batch
    taken, given = [count, 3, size, size], [count, 4, size, size]
    name = "doubled"
    if layout == "NHWC":
        taken, given = [taken[i] for i in (0, 2, 3, 1)], [given[i] for i in (0, 2, 3, 1)]
        nodes.insert(0, helper.make_node("Transpose", ["image"], ["x"], perm=[0, 3, 1, 2]))
        nodes.append(helper.make_node("Transpose", ["doubled"], ["map"], perm=[0, 2, 3, 1]))
        name = "map"
    if pooled:
        nodes.append(helper.make_node("ReduceMean", ["doubled"], ["vector"], axes=[2, 3], keepdims=0))
        name, given = "vector", given[:2]
    first = "image" if layout == "NHWC" else "x"
    graph = helper.make_graph(
        nodes,
        "tiny",
        [helper.make_tensor_value_info(first, TensorProto.FLOAT, taken)],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, given)],
        [numpy_helper.from_array(WEIGHT[:, :, None, None].numpy(), "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=9)
    onnx.save(model, path)
    return path


def expected(pixels, factor=2.0):
    return factor * torch.einsum("oc,bchw->bohw", WEIGHT, pixels)


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
@pytest.mark.parametrize("batch", [None, 1, 2])
def test_the_output_map_becomes_tokens_whatever_layout_and_batch(tmp_path, layout, batch):
    teacher = build_teacher("onnx", save(tmp_path / "m.onnx", batch, layout), layout=layout)
    assert (teacher.spec.tokens, teacher.spec.width, teacher.spec.grid) == (64, 4, (8, 8))
    pixels = torch.rand(3, 3, 8, 8)
    torch.testing.assert_close(teacher(pixels), expected(pixels).flatten(2).transpose(1, 2))


def test_the_map_is_averaged_down_to_the_grid(tmp_path):
    teacher = build_teacher("onnx", save(tmp_path / "m.onnx"), grid=[2, 4])
    pixels = torch.rand(1, 3, 8, 8)
    tokens = teacher(pixels)
    assert teacher.spec.grid == (2, 4)
    torch.testing.assert_close(tokens[0, 5], expected(pixels)[0, :, 4:, 2:4].mean((1, 2)))


def test_softmax_comes_before_averaging(tmp_path):
    teacher = build_teacher("onnx", save(tmp_path / "m.onnx"), grid=1, softmax=True)
    pixels = 20 * torch.rand(1, 3, 8, 8)
    torch.testing.assert_close(teacher(pixels)[0, 0], expected(pixels).softmax(1).mean((2, 3))[0])


def test_any_tensor_of_the_graph_can_be_the_target(tmp_path):
    teacher = build_teacher("onnx", save(tmp_path / "m.onnx"), output="features")
    pixels = torch.rand(2, 3, 8, 8)
    torch.testing.assert_close(teacher(pixels), expected(pixels, 1.0).flatten(2).transpose(1, 2))


def test_a_vector_is_one_token(tmp_path):
    teacher = build_teacher("onnx", save(tmp_path / "m.onnx", pooled=True))
    assert (teacher.spec.tokens, teacher.spec.width, teacher.spec.grid) == (1, 4, None)
    pixels = torch.rand(2, 3, 8, 8)
    torch.testing.assert_close(teacher(pixels)[:, 0], expected(pixels).mean((2, 3)))
    assert not teacher.draws_images
    with pytest.raises(ValueError, match=r"\(1, 4\), of which no target on a grid can be made"):
        build_teacher("onnx", tmp_path / "m.onnx", grid=2)


def test_classes_are_drawn_in_their_colors(tmp_path):
    teacher = build_teacher("onnx", save(tmp_path / "m.onnx"), grid=2, draw="classes")
    embedding = torch.zeros(1, 4, 4)
    embedding[0, 1, 3] = 1
    picture = teacher.decode(embedding)
    assert picture.shape == (1, 3, 2, 2)
    torch.testing.assert_close(picture[0, :, 0, 1], class_colors(4)[3])
    assert picture[0, :, 1, 1].tolist() == [0, 0, 0]


def test_class_colors_are_all_different():
    colors = class_colors(21)
    assert len({tuple(color) for color in colors.tolist()}) == 21
    assert (colors[15] * 255).round().tolist() == [192, 128, 128]  # VOC's person


def test_pixels_are_scaled_as_told(tmp_path):
    teacher = build_teacher("onnx", save(tmp_path / "m.onnx"), mean=0.5, std=0.5)
    (pixels,) = teacher.see([Image.fromarray(np.full((4, 6, 3), (255, 0, 102), np.uint8))])
    torch.testing.assert_close(pixels[:, 0, 0], torch.tensor([255, 0, 102]) / 127.5 - 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"output": "nowhere"}, "no tensor 'nowhere'"),
        ({"input": "nowhere"}, "no image input 'nowhere'"),
        ({"size": 9}, "rejects input 'x' of shape"),
        ({"layout": "CHWN"}, "'layout' is 'CHWN'"),
    ],
)
def test_what_does_not_fit_the_model_is_named(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        build_teacher("onnx", save(tmp_path / "m.onnx"), **options)


def changed(path, node, shape, kind=TensorProto.FLOAT):
    """The model of ``save`` with another output, made by ``node`` from its map."""
    model = onnx.load(save(path))
    model.graph.node.append(node)
    model.graph.output.pop()
    model.graph.output.append(helper.make_tensor_value_info(node.output[0], kind, shape))
    onnx.save(model, path)
    return path


def test_a_map_of_one_channel_may_lack_the_axis_of_channels(tmp_path):
    mean = helper.make_node("ReduceMean", ["doubled"], ["depth"], axes=[1], keepdims=0)
    path, pixels = changed(tmp_path / "m.onnx", mean, ["n", 8, 8]), torch.rand(2, 3, 8, 8)
    teacher = build_teacher("onnx", path, grid=4)
    assert (teacher.spec.tokens, teacher.spec.width, teacher.spec.grid) == (16, 1, (4, 4))
    depth = torch.nn.functional.avg_pool2d(expected(pixels).mean(1, keepdim=True), 2)
    torch.testing.assert_close(teacher(pixels), depth.flatten(2).transpose(1, 2))


def test_class_numbers_and_maps_of_another_layout_are_refused(tmp_path):
    numbers = helper.make_node("ArgMax", ["doubled"], ["classes"], axis=1)
    path = changed(tmp_path / "numbers.onnx", numbers, ["n", 1, 8, 8], TensorProto.INT64)
    with pytest.raises(ValueError, match="class numbers, which cannot be averaged"):
        build_teacher("onnx", path)
    small = helper.make_node("Cast", ["doubled"], ["small"], to=TensorProto.UINT8)
    with pytest.raises(ValueError, match="class numbers, which cannot be averaged"):
        build_teacher("onnx", changed(tmp_path / "small.onnx", small, ["n", 4, 8, 8], TensorProto.UINT8))
    last = helper.make_node("Transpose", ["doubled"], ["map"], perm=[0, 2, 3, 1])
    path = changed(tmp_path / "last.onnx", last, ["n", 8, 8, 4])
    with pytest.raises(ValueError, match="set 'output_layout' to NHWC"):
        build_teacher("onnx", path)
    assert build_teacher("onnx", path, output_layout="NHWC").spec.width == 4


def test_a_model_of_any_size_wants_one(tmp_path):
    path = save(tmp_path / "m.onnx", size="side")
    with pytest.raises(ValueError, match="set 'size' in pixels"):
        build_teacher("onnx", path)
    assert build_teacher("onnx", path, size=[2, 3]).spec.grid == (2, 3)


def test_a_missing_or_broken_file_is_named(tmp_path):
    with pytest.raises(ValueError, match="no ONNX model at"):
        build_teacher("onnx", tmp_path / "absent.onnx")
    for content in (b"not a model", b""):
        (tmp_path / "broken.onnx").write_bytes(content)
        with pytest.raises(ValueError, match="cannot be loaded as an ONNX model"):
            build_teacher("onnx", tmp_path / "broken.onnx")


def test_a_published_segmentation_network_is_a_teacher(beside_project):
    """DeepLabV3 finds people in a picture full of them: the class map has its class, the targets are probabilities."""
    path = beside_project("models", "deeplabv3-mnv2-voc")
    teacher = build_teacher("onnx", next(path.glob("*.onnx")), layout="NHWC", mean=0.5, std=0.5, grid=16, softmax=True)
    assert (teacher.spec.tokens, teacher.spec.width) == (256, 21)
    images = [Image.effect_noise((40, 30), 60).convert("RGB"), Image.new("RGB", (50, 70), (90, 120, 200))]
    targets = teacher(teacher.see(images))
    torch.testing.assert_close(targets.sum(-1), torch.ones(2, 256), rtol=0, atol=1e-4)
    assert teacher.decode(targets).shape == (2, 3, 16, 16)
