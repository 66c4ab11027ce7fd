"""How OpenVINO runs a convolution."""

import functools
from collections.abc import Mapping, Sequence

import numpy as np

from convdispatch.problem import Problem
from convdispatch.tuning.engine_onnx import onnx_inputs, onnx_model
from convdispatch.tuning.engines import Build, Case, Deployment, Pass, load, nhwc, only


class OpenVino:
    """OpenVINO: a compiled model with constant weights, held to float32, its input NCHW or NHWC."""

    def __init__(self, threads: int) -> None:
        self._ov, self._threads = load("openvino"), threads
        self.version = self._ov.__version__

    def rejects(self, problem: Problem) -> str | None:
        """Take float32."""
        return only(problem, "float32")

    def deployments(self, case: Case) -> Mapping[str, Build]:
        """Return both layouts."""
        return {
            f"{layout}{how}": functools.partial(self._compiled, case, passes, layout)
            for how, passes in case.ways.items()
            for layout in ("NCHW", "NHWC")
        }

    def _compiled(self, case: Case, passes: Sequence[Pass], layout: str) -> Deployment:
        ov, io = self._ov, load("io")
        model = ov.Core().read_model(io.BytesIO(onnx_model(case, passes)))
        if layout == "NHWC":
            steps = load("openvino.preprocess").PrePostProcessor(model)
            for port in [steps.input(i) for i in range(len(model.inputs))] + [steps.output()]:
                port.tensor().set_layout(ov.Layout("NHWC"))
                port.model().set_layout(ov.Layout("NCHW"))
            model = steps.build()
        hints = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": self._threads}
        hints |= {"PERFORMANCE_HINT": "LATENCY", "NUM_STREAMS": 1}
        request = ov.compile_model(model, "CPU", hints).create_infer_request()
        given = [case.x, case.residual] if layout == "NHWC" else list(onnx_inputs(case).values())
        held = [np.ascontiguousarray(array) for array in given if array is not None]
        for number, array in enumerate(held):
            request.set_input_tensor(number, ov.Tensor(array, shared_memory=True))
        back = np.asarray if layout == "NHWC" else nhwc
        return Deployment(request.infer, lambda _: back(request.get_output_tensor(0).data), held)
