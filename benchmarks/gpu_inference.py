"""Llama on one GPU, in one call of under nine minutes:  python benchmarks/gpu_inference.py --into FOLDER

    copy        what the memory does: the bandwidth of a large copy, which decoding is measured against
    tiles       the product of narrow weights with one token, at each shape of the model and several program sizes
    attention   decode attention alone, by context and batch
    decode      the model at batch 1 (and more), in bf16, int8, int4 and fp8: tokens per second, and what is read per
                token (weights, and keys and values) as a share of the copy's bandwidth
    prefill     tokens per second of one long prompt, and the time to the first token of a short one
    grid        answers per second for the input/output lengths of TensorRT-LLM's published table

Weights are random, made on the device: speed does not depend on them. The part `decode` drives the runner itself, with
greedy tokens taken on the device, so it says what the kernels do; `grid` adds a plain loop that admits prompts in
pieces as the engine's scheduler does, without its text handling. Each part writes gpu_inference.json again; one that
fails leaves its error there and the next goes on. `--size` takes any name of `puna.model.sizes`, `--seconds` the whole
time, `--parts` a part of the list.
"""

import argparse
import gc
import json
import statistics
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import machine
import torch

from puna.inference.cuda_runner import CudaRunner, cache_bytes_of
from puna.inference.room import bytes_per_token
from puna.inference.spans import BLOCK_TOKENS, Span
from puna.inference.step_inputs import Buffers, step_of
from puna.kernels.paged_attention import paged_attention
from puna.model.llama import Llama
from puna.model.sizes import SIZES, LlamaConfig
from puna.quant.forms import packed_shapes
from puna.quant.groups import Packed
from puna.quant.modules import QuantLinear, QuantMatrix

GROUP = 64
FORMS = ("bf16", "int8", "int4", "fp8")
GRID = [(128, 128), (128, 2048), (500, 2000), (1000, 1000), (2048, 128), (2048, 2048), (5000, 500), (20000, 2000)]
TILES = [(rows, wide, warps) for wide in (512, 1024) for rows in (4, 8, 16) for warps in (4, 8)]
TILES_SECONDS = 100  # each of them must be compiled
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def random_model(config: LlamaConfig, form: str) -> Llama:
    """A model with weights as `form` says, made where they will lie."""
    with torch.device("meta"):
        model = Llama(config).to(torch.bfloat16)
    model = model.to_empty(device=DEVICE).eval().requires_grad_(False)
    for weight in model.parameters():
        weight.normal_(0, 0.02) if weight.ndim == 2 else weight.fill_(1)
    if form in ("int8", "int4"):
        for layer in model.layers:
            for owner, names in ((layer.attention, ("wq", "wk", "wv", "wo")), (layer.feed_forward, ("w1", "w2", "w3"))):
                for name in names:
                    setattr(owner, name, random_integers(*getattr(owner, name).weight.shape, int(form[3:])))
        model.output = random_integers(*model.output.weight.shape, 8)  # as the stage `quantise` does by default
    return model


def random_integers(rows: int, columns: int, bits: int) -> QuantLinear:
    (shape, scales) = packed_shapes(rows, columns, bits, GROUP)
    codes = torch.randint(0, 256, shape, dtype=torch.uint8, device=DEVICE)
    scale = torch.full(scales, 0.02 / (1 << (bits - 2)), dtype=torch.float16, device=DEVICE)
    codes = codes.view(torch.int8) if bits == 8 else codes
    return QuantLinear(QuantMatrix(Packed(codes, scale, columns, bits, GROUP), torch.bfloat16))


def bytes_read(runner: CudaRunner) -> int:
    """Of weights, for a token: all but the embedding."""
    llama = runner._llama
    parts = [m.matrix for layer in llama.layers for m in (layer.qkv, layer.out, layer.gate_up, layer.down)]
    tensors = [t for matrix in (*parts, llama.output) for t in tensors_of(matrix)]
    return sum(t.numel() * t.element_size() for t in tensors)


def tensors_of(matrix) -> Iterator[torch.Tensor]:
    for value in vars(matrix).values():
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, dict):
            yield from value.values()
        elif isinstance(value, list):
            yield from (t for m in value for t in tensors_of(m))


def synchronise() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def seconds_of(work: Callable[[], object], repeat: int, warm: int = 3) -> float:
    """The median time of `work`, by the wall clock, the device having finished."""
    for _ in range(warm):
        work()
    times = []
    for _ in range(repeat):
        synchronise()
        begin = time.perf_counter()
        work()
        synchronise()
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


def replayed(work: Callable[[], object], count: int) -> float:
    """Seconds of one `work` when `count` of them are one CUDA graph: without the time to start a kernel."""
    if DEVICE.type != "cuda":
        return seconds_of(work, 3, 1)
    work()
    synchronise()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(count):
            work()
    return seconds_of(graph.replay, 5, 2) / count


class Bench:
    def __init__(self, config: LlamaConfig, into: Path, seconds: float):
        self.config, self.into = config, into
        self.end = time.perf_counter() + seconds
        self.result: dict = {
            "environment": environment(),
            "config": vars(config) | {"rope_scaling": None},
            "errors": {},
        }
        self.runner: CudaRunner | None = None
        self.form = ""

    def left(self) -> float:
        return self.end - time.perf_counter()

    def part(self, name: str, work: Callable[[], object], needs: float) -> None:
        """Do `work` if there are `needs` seconds left; what it returns, or its error, is written at once."""
        begin = time.perf_counter()
        try:
            if self.left() < needs:
                raise TimeoutError(f"{self.left():.0f} s were left, {needs:.0f} are needed")
            self.result[name] = work()
        except Exception as error:
            self.result["errors"][name] = (
                f"{type(error).__name__}: {error}"[:2000] + "\n" + traceback.format_exc()[-2000:]
            )
        self.result.setdefault("seconds", {})[name] = round(time.perf_counter() - begin, 1)
        self.into.mkdir(parents=True, exist_ok=True)
        path = self.into / "gpu_inference.json"
        path.with_suffix(".part").write_text(json.dumps(self.result, indent=1, default=str))
        path.with_suffix(".part").replace(path)
        print(name, json.dumps(self.result.get(name, self.result["errors"].get(name)), default=str)[:600], flush=True)

    def copy(self) -> dict:
        size = (4 << 30) if DEVICE.type == "cuda" else (1 << 26)
        source = torch.empty(size, dtype=torch.uint8, device=DEVICE)
        target = torch.empty_like(source)
        copied = 2 * size / replayed(lambda: target.copy_(source), 4) / 1e9
        words = source.view(torch.int64)
        return {"copy_gb_per_s": copied, "read_gb_per_s": size / replayed(lambda: words.sum(), 4) / 1e9}

    def tiles(self) -> dict:
        """The best program sizes are used from here on."""
        from puna.kernels.triton import quant_linear

        c = self.config
        heads = (c.n_heads + 2 * c.n_kv_heads) * c.head_dim
        shapes = [(heads, c.dim), (c.dim, c.n_heads * c.head_dim), (2 * c.ffn_dim, c.dim), (c.dim, c.ffn_dim)]
        found: dict = {}
        end = time.perf_counter() + TILES_SECONDS
        for form, bits in (("4", 4), ("8", 8), ("plain", 16)):
            rates: dict[str, list[float]] = {}
            for rows, columns in shapes:
                copies = max(1, (256 << 20) // (rows * columns * bits // 8))  # more than the cache of the GPU holds
                parts = [self._weights(bits, rows, columns) for _ in range(copies)]
                size = sum(t.numel() * t.element_size() for t in parts[0] if t is not None) * copies
                x = torch.randn(1, columns, device=DEVICE).bfloat16()

                def rate(size=size, parts=parts, x=x, group=GROUP if bits < 16 else 128, **how) -> float:
                    work = lambda: [quant_linear.product(x, *part, None, group, **how) for part in parts]  # noqa: E731
                    return size / replayed(work, 2) / 1e9

                for tile in TILES if time.perf_counter() < end else TILES[::6]:
                    rates.setdefault(str(tile), []).append(rate(tile=tile))
                if bits < 16:
                    rates.setdefault("tensor cores", []).append(rate(tensor_cores=True))
                else:
                    library = lambda parts=parts, x=x: [torch.nn.functional.linear(x, p[0]) for p in parts]  # noqa: E731
                    rates.setdefault("library", []).append(size / replayed(library, 2) / 1e9)
            tried = {name: min(r) for name, r in rates.items() if name.startswith("(") and len(r) == len(shapes)}
            best = max(tried, key=tried.get)
            quant_linear.ONE_TILES[form] = tuple(int(n) for n in best.strip("()").split(","))
            if form == "8":
                quant_linear.ONE_TILES["e4m3"] = quant_linear.ONE_TILES["8"]
            found[form] = {"shapes": shapes, "gb_per_s": rates, "chosen": best}
        return found

    def _weights(self, bits: int, rows: int, columns: int) -> tuple:
        if bits == 16:
            return torch.randn(rows, columns, device=DEVICE).bfloat16(), None
        matrix = random_integers(rows, columns, bits).matrix
        return matrix.codes, matrix.scales

    def load(self, form: str) -> CudaRunner:
        """The runner with weights of this form; the one before is given up first."""
        if self.form != form:
            self.runner = None
            gc.collect()  # a captured step knows its runner
            if DEVICE.type == "cuda":
                torch.cuda.empty_cache()
            model = random_model(self.config, form)
            free = torch.cuda.mem_get_info()[0] if DEVICE.type == "cuda" else 1 << 30
            blocks = cache_bytes_of(free, self.config, torch.bfloat16) // (BLOCK_TOKENS * self._kv_bytes())
            begin = time.perf_counter()
            self.runner, self.form = CudaRunner(model, blocks=blocks, fp8=form == "fp8"), form
            self.runner.forward([Span([1], 0, [0])])
            self.first_step = time.perf_counter() - begin
            if form == "fp8":  # nothing needs the dense weights of the layers any more
                for layer in model.layers:
                    for module in (*layer.attention.children(), *layer.feed_forward.children()):
                        module.weight = None
        return self.runner

    def _kv_bytes(self) -> int:
        return bytes_per_token(self.config, 2)

    def attention(self) -> list[dict]:
        runner, c, found = self.load(self.form or "bf16"), self.config, []
        for batch, context in ((1, 1024), (1, 16_000), (1, 100_000), (16, 2048), (64, 2048), (256, 1024)):
            spans = self._decodes(batch, context, runner)
            if not spans:
                continue
            step = step_of(spans, BLOCK_TOKENS, c.n_heads // c.n_kv_heads)
            buffers = Buffers(batch, batch, step.arrays["table"].shape[1], DEVICE)
            buffers.send(step)
            ragged = buffers.ragged(short=1, most_chunks=step.most_chunks, most_tiles=0)
            q = torch.randn(batch, c.n_heads, c.head_dim, device=DEVICE).bfloat16()

            def work(q=q, ragged=ragged) -> None:
                for k, v in zip(runner._keys, runner._values):
                    paged_attention(q, k, v, ragged)

            size = batch * context * self._kv_bytes()
            found.append({"batch": batch, "context": context, "gb_per_s": size / replayed(work, 1) / 1e9})
        return found

    def _decodes(self, batch: int, context: int, runner: CudaRunner) -> list[Span]:
        """Decodes of sequences of `context` tokens; none if they do not fit."""
        each = -(-(context + 600) // BLOCK_TOKENS)
        if context + 600 > self.config.context or each * batch > runner.blocks:
            return []
        return [Span([5], context, list(range(b * each, (b + 1) * each))) for b in range(batch)]

    def decode(self, form: str) -> dict:
        runner = self.load(form)
        weights, copy = bytes_read(runner), self.result.get("copy", {}).get("copy_gb_per_s")
        found: dict = {"weight_bytes_per_step": weights, "first_step_s": self.first_step, "runs": []}
        for batch, context in (
            (1, 128),
            (1, 4096),
            (1, 32_000),
            (1, 120_000),
            (4, 1024),
            (16, 1024),
            (64, 1024),
            (256, 512),
        ):
            spans = self._decodes(batch, context, runner)
            if not spans or self.left() < 20:
                continue

            def step(spans=spans) -> None:
                logits = runner.forward(spans)
                for span, token in zip(spans, logits.argmax(-1).tolist()):
                    span.tokens, span.start = [token], span.start + 1

            steps = 200 if batch == 1 and DEVICE.type == "cuda" else 40
            seconds = seconds_of(step, steps, 3)
            read = weights + batch * context * self._kv_bytes()
            run = {"batch": batch, "context": context, "tokens_per_s": batch / seconds, "ms_per_step": 1e3 * seconds}
            run |= {"gb_per_s": read / seconds / 1e9, "share_of_copy": read / seconds / 1e9 / copy if copy else None}
            found["runs"].append(run)
        return found

    def prefill(self, form: str) -> dict:
        runner, found = self.load(form), {}
        for length in (32, 512, 2048, 8192):
            blocks = list(range(-(-length // BLOCK_TOKENS)))
            if length < self.config.context and len(blocks) <= runner.blocks:
                seconds = seconds_of(lambda n=length, b=blocks: runner.forward([Span([7] * n, 0, b)]), 5, 2)
                found[length] = {"ms": 1e3 * seconds, "tokens_per_s": length / seconds}
        return found

    def grid(self, form: str, given: int, made: int, seconds: float) -> dict:
        """Answers of `made` tokens to prompts of `given`, as many at once as fit, until the time is over."""
        runner = self.load(form)
        each = -(-(given + made) // BLOCK_TOKENS)
        slots = min(256, runner.blocks // each)
        rows = [list(range(s * each, (s + 1) * each)) for s in range(slots)]
        # Full speed from the start: sequences are met at different ages, as in a service that has run for a while.
        ages = [s * made // slots for s in range(slots)]
        reading: list[tuple[int, int]] = []  # slot, tokens of its prompt that were read
        end, begin = time.perf_counter() + seconds, time.perf_counter()
        tokens = finished = steps = 0
        last = dict.fromkeys(range(slots), 5)
        for slot in range(slots):
            if ages[slot] == 0:
                reading.append((slot, 0))
                del last[slot]
        while time.perf_counter() < end:
            room = 8192 - len(last)
            spans, slot_of = [Span([t], given + ages[s], rows[s]) for s, t in last.items()], list(last)
            still = []
            for slot, read in reading:
                piece = min(room, given - read)
                room -= piece
                if piece:
                    done = read + piece == given
                    spans.append(Span([7] * piece, read, rows[slot], wanted=int(done)))
                    if done:
                        slot_of.append(slot)
                if not piece or read + piece < given:
                    still.append((slot, read + piece))
            logits = runner.forward(spans)
            reading, steps = still, steps + 1
            for slot, token in zip(slot_of, logits.argmax(-1).tolist()):
                ages[slot] = ages[slot] + 1 if slot in last else 1
                last[slot] = token
                tokens += 1
                if ages[slot] >= made:
                    finished += 1
                    ages[slot] = 0
                    del last[slot]
                    reading.append((slot, 0))
        took = time.perf_counter() - begin
        return {"given": given, "made": made, "slots": slots, "tokens_per_s": tokens / took, "finished": finished,
                "steps": steps, "seconds": took}  # fmt: skip


def environment() -> dict:
    found = {"torch": torch.__version__, "processor": machine.processor(), "revision": machine.revision()}
    try:
        import triton

        found["triton"] = triton.__version__
    except ImportError:
        pass
    if DEVICE.type == "cuda":
        found |= {
            "device": torch.cuda.get_device_name(),
            "memory": torch.cuda.mem_get_info()[1],
            "cuda": torch.version.cuda,
        }
    return found


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--into", type=Path, required=True)
    parser.add_argument("--size", choices=SIZES, default="llama-3.1-8b")
    parser.add_argument("--seconds", type=float, default=500)
    parser.add_argument("--parts", nargs="*", default=["copy", "tiles", "decode", "attention", "prefill", "grid"])
    asked = parser.parse_args()
    bench = Bench(SIZES[asked.size], asked.into, asked.seconds)
    if "copy" in asked.parts:
        bench.part("copy", bench.copy, 5)
    if "tiles" in asked.parts:
        bench.part("tiles", bench.tiles, 60)
    for form in FORMS:
        if "decode" in asked.parts:
            bench.part(f"decode {form}", lambda f=form: bench.decode(f), 30)
        if "attention" in asked.parts and form == "bf16":
            bench.part("attention", bench.attention, 20)
        if "prefill" in asked.parts:
            bench.part(f"prefill {form}", lambda f=form: bench.prefill(f), 20)
    if "grid" in asked.parts:
        cells = [(form, *cell) for form in ("fp8", "bf16") for cell in GRID]
        for i, (form, given, made) in enumerate(cells):
            share = max(4.0, min(20.0, (bench.left() - 25) / (len(cells) - i) - 1))
            bench.part(
                f"grid {form} {given}/{made}", lambda f=form, g=given, m=made, s=share: bench.grid(f, g, m, s), 8
            )


if __name__ == "__main__":
    main()
