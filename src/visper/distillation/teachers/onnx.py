"""Any ONNX model's output as target: segmentation logits, depth, features.

Shape suffixes: B = samples, C = channels, H x W = the output's map.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnxruntime
import torch
from onnxruntime.capi.onnxruntime_pybind11_state import (
    Fail,
    InvalidArgument,
    InvalidGraph,
    InvalidProtobuf,
    NotImplemented,
    RuntimeException,
)
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from visper.distillation.teachers.base import SquashedImage, TargetSpec, Teacher
from visper.distillation.teachers.segment_maps import class_colors


class OnnxTeacher(Teacher):
    """Runs an ONNX model on the CPU and pools its output to a grid of tokens.

    An output ``[B, C, H, W]`` (or ``[B, H, W, C]``) becomes ``rows * columns`` tokens of width C, and ``[B, H, W]`` of
    the image's size tokens of width 1; any other ``[B, N, C]`` is taken as it is; ``[B, C]`` is one token.

    Args:
        model: the ``.onnx`` file.
        size: side in pixels, or [height, width]; default: the size that the model's input declares.
        layout: channel order of the input, and of the output unless ``output_layout`` says otherwise.
        mean, std: pixels are ``(rgb / 255 - mean) / std``; 0.5 and 0.5 mean rgb / 127.5 - 1.
        input: name of the input; default: the first.
        output: name of an output, or of any tensor inside the graph (needs the package ``onnx``); default: the first
            output.
        output_layout: channel order of the output, if it is a map.
        grid: side, or [rows, columns], of the grid to which a map is averaged; default: the map's own.
        softmax: turn class logits into probabilities before they are averaged.
        draw: "classes" draws the strongest channel in its own color, "components" principal components; default:
            "classes" with softmax.
        threads: number of threads of the runtime; default: torch's.

    Raises:
        ValueError: the file cannot be loaded, a name, size or layout does not fit the model, or the output is integers.
    """

    def __init__(
        self,
        model: str | Path,
        size: int | Sequence[int] | None = None,
        layout: Literal["NCHW", "NHWC"] = "NCHW",
        mean: float | Sequence[float] = 0.0,
        std: float | Sequence[float] = 1.0,
        input: str | None = None,
        output: str | None = None,
        output_layout: Literal["NCHW", "NHWC"] | None = None,
        grid: int | Sequence[int] | None = None,
        softmax: bool = False,
        draw: Literal["classes", "components"] | None = None,
        threads: int | None = None,
    ) -> None:
        super().__init__()
        for name, value in (("layout", layout), ("output_layout", output_layout or layout)):
            if value not in ("NCHW", "NHWC"):
                raise ValueError(f"'{name}' is {value!r}: set it to NCHW or NHWC")
        self.channels_last, self.map_last = layout == "NHWC", (output_layout or layout) == "NHWC"
        self.session = _session(Path(model), output, threads)
        self.output = output or self.session.get_outputs()[0].name
        taken = _named_input(self.session, input)
        self.input, shape = taken.name, list(taken.shape)
        self.batch = shape[0] if isinstance(shape[0], int) else None
        self.softmax, self.grid = softmax, None if grid is None else _pair(grid)
        self.draw = draw or ("classes" if softmax else "components")
        height, width = _size(size, shape[1:3] if self.channels_last else shape[2:4])
        self.preprocess = SquashedImage((height, width), _triple(mean), _triple(std))
        # One run gives the shape of the output; wrong names and sizes fail here, before the first step.
        tokens, embedding_width, self.grid = self._tokens(torch.zeros(1, 3, height, width))
        self.spec = TargetSpec(tokens.shape[1], embedding_width, self.grid)
        self.freeze()

    def encode(self, pixels: Tensor) -> Tensor:
        """``[B, tokens, width]`` float32, computed in batches of the model's size if that is fixed."""
        step = self.batch or len(pixels)
        parts = []
        for chunk in pixels.split(step):
            missing = step - len(chunk)
            padded = torch.cat((chunk, chunk[-1:].expand(missing, -1, -1, -1))) if missing else chunk
            parts.append(self._tokens(padded)[0][: len(chunk)])
        return torch.cat(parts)

    def decode(self, embedding: Tensor, pixels: Tensor | None = None, reference: Tensor | None = None) -> Tensor:
        """Images ``[B, 3, rows, columns]``: a color per class, or principal components."""
        if self.draw == "components" or self.spec.grid is None:
            return super().decode(embedding, reference=reference)
        colors = class_colors(self.spec.width).to(embedding.device)
        return colors[embedding.argmax(-1)].transpose(1, 2).unflatten(2, self.spec.grid).contiguous()

    def _tokens(self, pixels: Tensor) -> tuple[Tensor, int, tuple[int, int] | None]:
        given = pixels.float().cpu()
        given = given.permute(0, 2, 3, 1) if self.channels_last else given
        given = given.expand(self.batch, -1, -1, -1) if self.batch and len(given) == 1 else given
        values = torch.from_numpy(self._run(given.contiguous().numpy()))[: len(pixels)]
        if not values.is_floating_point():
            raise ValueError(
                f"output '{self.output}' has values of type {values.dtype}, such as class numbers, which cannot be "
                "averaged: set 'output' to the tensor before, with a number for each class"
            )
        values, grid = values.float(), None
        if values.dim() == 3 and values.shape[1:] == pixels.shape[2:]:  # a map of one channel, such as depth
            values = values.unsqueeze(3 if self.map_last else 1)
        if values.dim() == 4:
            self._require_layout(values.shape, pixels.shape)
            values = values.permute(0, 3, 1, 2) if self.map_last else values
            values = values.softmax(1) if self.softmax else values
            grid = self.grid or (values.shape[2], values.shape[3])
            values = adaptive_avg_pool2d(values, grid).flatten(2).transpose(1, 2)
        elif values.dim() in (2, 3) and self.grid is None:
            values = values.softmax(-1) if self.softmax else values
            values = values[:, None] if values.dim() == 2 else values
        else:
            raise ValueError(
                f"output '{self.output}' has shape {tuple(values.shape)}, of which no target"
                f"{' on a grid' if self.grid else ''} can be made: set 'output' to a tensor [B, C, H, W]"
                f"{'; or leave out grid for [B, C] or [B, N, C]' if self.grid else ', [B, N, C] or [B, C]'}"
            )
        return values, values.shape[2], grid

    def _require_layout(self, found: torch.Size, given: torch.Size) -> None:
        """Refuses a map that has the image's shape only if its channels are elsewhere than ``output_layout`` says."""
        last, first = found[1] * given[3] == found[2] * given[2], found[2] * given[3] == found[3] * given[2]
        if (first, last) == ((True, False) if self.map_last else (False, True)):
            raise ValueError(
                f"output '{self.output}' has shape {tuple(found)}, of which output_layout "
                f"{'NHWC' if self.map_last else 'NCHW'} makes a map of another shape than the image's: set "
                f"'output_layout' to {'NCHW' if self.map_last else 'NHWC'}"
            )

    def _run(self, given: np.ndarray) -> np.ndarray:
        try:
            return np.asarray(self.session.run([self.output], {self.input: given})[0])
        except (Fail, InvalidArgument, RuntimeException, ValueError) as error:
            raise ValueError(
                f"the ONNX model rejects input '{self.input}' of shape {given.shape}: set 'size' and 'layout' to what "
                f"it expects. Its error: {error}"
            ) from error


def _session(path: Path, output: str | None, threads: int | None) -> Any:
    if not path.is_file():
        raise ValueError(f"no ONNX model at '{path}': set the teacher's 'model' to an .onnx file")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or torch.get_num_threads()
    options.log_severity_level = 3  # errors only: models often have warnings, such as unused initializers
    providers = ["CPUExecutionProvider"]
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers)
    except (Fail, InvalidArgument, InvalidGraph, InvalidProtobuf, NotImplemented) as error:
        raise ValueError(f"'{path}' cannot be loaded as an ONNX model: {error}") from error
    if output is None or output in [known.name for known in session.get_outputs()]:
        return session
    return onnxruntime.InferenceSession(_with_output(path, output), options, providers)


def _with_output(path: Path, name: str) -> bytes:
    """The model with one more output: the tensor ``name`` inside its graph."""
    import onnx

    model = onnx.load(str(path))
    names = [produced for node in model.graph.node for produced in node.output]
    if name not in names:
        known = ", ".join([output.name for output in model.graph.output] + names[-8:])
        raise ValueError(f"the ONNX model at '{path}' has no tensor '{name}'; its outputs and last tensors: {known}")
    model.graph.output.append(onnx.helper.make_empty_tensor_value_info(name))
    return bytes(model.SerializeToString())


def _named_input(session: Any, name: str | None) -> Any:
    inputs = session.get_inputs()
    found = [taken for taken in inputs if name in (None, taken.name)]
    if not found or len(found[0].shape) != 4:
        raise ValueError(
            f"the ONNX model has no image input '{name or inputs[0].name}' with four dimensions; its inputs: "
            + ", ".join(f"{taken.name} {taken.shape}" for taken in inputs)
        )
    return found[0]


def _size(size: int | Sequence[int] | None, declared: Sequence[Any]) -> tuple[int, int]:
    if size is not None:
        return _pair(size)
    if not all(isinstance(side, int) for side in declared):
        raise ValueError(f"the ONNX model takes images of any size {list(declared)}: set 'size' in pixels")
    return _pair(declared)


def _pair(value: int | Sequence[int]) -> tuple[int, int]:
    if isinstance(value, int):
        return value, value
    rows, columns = value
    return int(rows), int(columns)


def _triple(value: float | Sequence[float]) -> tuple[float, float, float]:
    if isinstance(value, (int, float)):
        return float(value), float(value), float(value)
    red, green, blue = value
    return float(red), float(green), float(blue)
