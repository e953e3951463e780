"""OpenVINO: a Hugging Face folder converted by optimum-intel, once, and run as a compiled graph that keeps its own cache.

This needs `openvino` alone to run, and `optimum-intel` with `nncf` to convert, which may well live in an environment of their
own. The graph computes logits for every token; as OpenVINO's own pipeline does, it is cut so that only the last token of a
prompt gets them.
"""

import subprocess
import sys
from pathlib import Path

import numpy as np
import openvino
from openvino import opset13 as ops

from inference_peers.exchange import prompt

_WEIGHTS = {
    "bf16": ["--weight-format", "fp16"],
    "int8": ["--weight-format", "int8"],
    "int4": ["--weight-format", "int4", "--group-size", "32", "--ratio", "1.0", "--sym"],
}


class OpenVino:
    """The compiled graph; `scheme` is bf16, int8 (a scale per row) or int4 (groups of 32)."""

    def __init__(self, path: str, threads: int, scheme: str):
        self.path, self.threads, self.scheme = Path(path), threads, scheme

    def load(self) -> dict:
        folder = self._converted()
        core = openvino.Core()
        graph = core.read_model(folder / "openvino_model.xml")
        _only_last(graph)
        settings = {"INFERENCE_NUM_THREADS": self.threads, "PERFORMANCE_HINT": "LATENCY", "NUM_STREAMS": 1}
        compiled = core.compile_model(graph, "CPU", settings)
        self.inputs = {name for port in graph.inputs for name in port.get_names()}
        self.request = compiled.create_infer_request()
        precision = compiled.get_property("INFERENCE_PRECISION_HINT"), compiled.get_property("KV_CACHE_PRECISION")
        how = f"{self.scheme}, computes in {precision[0]}, cache in {precision[1]}"
        size = (folder / "openvino_model.bin").stat().st_size  # tied: one matrix is embedding and output
        return {"read per token": size, "settings": how, "version": openvino.__version__}

    def prefill(self, tokens: int) -> int:
        self.request.reset_state()
        return int(self._run(np.array([prompt(tokens)]), np.ones((1, tokens), np.int64))[0])

    def start(self, contexts: list[int], room: int) -> None:
        """Read prompts, padded on the left to the longest."""
        longest = max(contexts)
        self.request.reset_state()
        self.last = np.array([[prompt(1, i)[0]] for i in range(len(contexts))])
        self.mask = (np.arange(longest) >= longest - np.array(contexts)[:, None]).astype(np.int64)
        if longest:
            self._run(np.array([prompt(longest, i) for i in range(len(contexts))]), self.mask)

    def decode(self, steps: int) -> list[int]:
        said = []
        for _ in range(steps):
            self.mask = np.concatenate([self.mask, np.ones((len(self.mask), 1), np.int64)], 1)
            self.last = self._run(self.last, self.mask)[:, None]
            said.append(int(self.last[0, 0]))
        return said

    def rest(self) -> None:
        self.request.reset_state()

    def _run(self, tokens: np.ndarray, mask: np.ndarray) -> np.ndarray:
        """The most likely next token of each sequence."""
        positions = (mask.cumsum(1) - 1).clip(0)[:, -tokens.shape[1] :]
        given = {"input_ids": tokens, "attention_mask": mask, "position_ids": positions}
        given["beam_idx"] = np.arange(len(tokens), dtype=np.int32)
        self.request.infer({name: value for name, value in given.items() if name in self.inputs}, share_inputs=True)
        return self.request.get_tensor("logits").data[:, -1].argmax(-1)

    def _converted(self) -> Path:
        out = self.path.with_name(f"openvino-{self.scheme}")
        if not out.is_dir():
            partial = out.with_name(f".{out.name}.partial")
            tool = str(Path(sys.executable).with_name("optimum-cli"))
            task = ["--task", "text-generation-with-past", "--library", "transformers"]
            command = [
                tool,
                "export",
                "openvino",
                "--model",
                str(self.path),
                *task,
                *_WEIGHTS[self.scheme],
                str(partial),
            ]
            subprocess.run(command, check=True, stdin=subprocess.DEVNULL)
            partial.rename(out)
        return out


def _only_last(graph: openvino.Model) -> None:
    """Keep the last position of what the output matrix is multiplied with, (B, T, D)."""
    node = graph.output("logits").get_node()
    while node.get_type_name() != "MatMul":
        node = node.input_value(0).get_node()
    last = ops.slice(node.input_value(0), [-1], [np.iinfo(np.int64).max], [1], [1])
    node.input(0).replace_source_output(last.output(0))
    graph.validate_nodes_and_infer_types()
