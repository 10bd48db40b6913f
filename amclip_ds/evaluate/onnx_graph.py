"""A foreign ONNX graph, checked and opened: known operators without loops, weights in the folder, memory bounded."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from amclip_ds.errors import UserError, in_one_line
from amclip_ds.files import not_read, read_bytes
from amclip_ds.model.weight_files import inside

MAX_GRAPH = 1 << 30  # bytes; a graph with its weights inside ends at 2 GB in any case
WORK_MEMORY = 1 << 30  # bytes that a graph may use beside four times its weights
OPERATORS = """
Abs Add And ArgMax ArgMin AveragePool BatchNormalization Cast CastLike Clip Concat Constant ConstantOfShape Conv Cos
CumSum DequantizeLinear Div Dropout Einsum Equal Erf Exp Expand Flatten Floor Gather GatherElements GatherND Gelu Gemm
GlobalAveragePool Greater GreaterOrEqual GroupNormalization HardSigmoid HardSwish Identity InstanceNormalization IsNaN
LayerNormalization Less LessOrEqual Log LogSoftmax MatMul Max MaxPool Mean Min Mod Mul Neg Not OneHot Or PRelu Pad Pow
QuantizeLinear Range Reciprocal ReduceL2 ReduceMax ReduceMean ReduceMin ReduceProd ReduceSum ReduceSumSquare Relu
Reshape Resize Round RMSNormalization ScatterElements ScatterND Shape Sigmoid Sign SimplifiedLayerNormalization Sin
Size Slice Softmax Softplus Split Sqrt Squeeze Sub Sum Swish Tanh Tile TopK Transpose Trilu Unsqueeze Where Xor
"""
DOMAINS = ("", "ai.onnx")


def open_graph(path: Path, providers: list[str]) -> Any:
    """An onnxruntime.InferenceSession. Raises UserError for a graph that is not only arithmetic on its own weights."""
    try:
        import onnx
        import onnxruntime
    except ImportError as error:
        raise UserError(f"{path}: needs {error.name}; pip install 'amclip_ds[onnx]'") from None
    try:
        content = read_bytes(inside(path.parent, path), MAX_GRAPH)
    except OSError as error:
        raise not_read(str(path), error) from None
    try:
        model = onnx.load_model_from_string(content)
    except Exception as error:  # of protobuf
        raise UserError(f"{path}: not an ONNX graph: {in_one_line(error, 200)}") from None
    _check(path, model)
    weights = sum({file: file.stat().st_size for file in _external_files(path, model)}.values())
    memory = onnxruntime.OrtMemoryInfo(
        "Cpu", onnxruntime.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, onnxruntime.OrtMemType.DEFAULT
    )
    limit = WORK_MEMORY + 4 * (weights + len(content))
    onnxruntime.create_and_register_allocator(memory, onnxruntime.OrtArenaCfg({"max_mem": limit}))
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # what it says, its exception says too
    options.add_session_config_entry("session.use_env_allocators", "1")
    return onnxruntime.InferenceSession(str(path), options, providers=providers)


def _check(path: Path, model: Any) -> None:
    if model.functions:
        raise UserError(f"{path}: has functions of its own, which are not read here")
    for node in model.graph.node:
        if node.domain not in DOMAINS or node.op_type not in OPERATORS.split():
            name = f"{node.domain}.{node.op_type}".lstrip(".")[:60]
            raise UserError(f"{path}: has the operator {name!r}, which is none of an image or text tower's")
        if any(attribute.HasField("g") or attribute.graphs for attribute in node.attribute):
            raise UserError(f"{path}: its operator {node.op_type} has a graph of its own")
    for tensor in _tensors(model):
        if tensor.data_location == tensor.EXTERNAL:
            _check_external(path, tensor)
        elif tensor.HasField("raw_data") and len(tensor.raw_data) != _bytes_of(tensor):
            raise UserError(f"{path}: the weights {tensor.name[:60]!r} are not of the size that their shape needs")


def _tensors(model: Any) -> Iterator[Any]:
    graph = model.graph
    yield from graph.initializer
    for sparse in graph.sparse_initializer:
        yield from (sparse.values, sparse.indices)
    for node in graph.node:
        for attribute in node.attribute:
            sparse = [attribute.sparse_tensor, *attribute.sparse_tensors]
            yield from (attribute.t, *attribute.tensors, *(part for t in sparse for part in (t.values, t.indices)))


def _check_external(path: Path, tensor: Any) -> None:
    """Raises UserError for weights that are not in a file of the folder."""
    facts = {entry.key: entry.value for entry in tensor.external_data}
    location, offset, length = facts.get("location", ""), facts.get("offset", "0"), facts.get("length", "0")
    file = path.parent / location
    if not location or Path(location).name != location or location in (".", ".."):
        raise UserError(f"{path}: the weights {tensor.name[:60]!r} are at {location[:60]!r}, not beside it")
    inside(path.parent, file)
    if not file.is_file():
        raise UserError(f"{file}: missing, or no ordinary file; {path.name} has its weights there")
    if not (offset.isascii() and offset.isdigit() and len(offset) <= 18 and int(offset) >= 0):
        raise UserError(f"{path}: the weights {tensor.name[:60]!r} have no place in {file.name}")
    needed = _bytes_of(tensor)
    if length != str(needed) or int(offset) + needed > file.stat().st_size:
        raise UserError(f"{path}: the weights {tensor.name[:60]!r} of {needed} bytes are not whole in {file.name}")


def _bytes_of(tensor: Any) -> int:
    """What a tensor of that shape and type takes; -1 for a type that is none."""
    import onnx

    try:
        size = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
    except (KeyError, ValueError, TypeError):
        return -1
    return math.prod(tensor.dims) * size if all(side >= 0 for side in tensor.dims) else -1


def _external_files(path: Path, model: Any) -> set[Path]:
    return {
        path.parent / entry.value
        for tensor in _tensors(model)
        if tensor.data_location == tensor.EXTERNAL
        for entry in tensor.external_data
        if entry.key == "location"
    }
