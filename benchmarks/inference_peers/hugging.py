"""transformers, in bfloat16; and torchao on top of it: 8-bit weights times 8-bit activations, compiled."""

import torch
import transformers
from transformers import AutoModelForCausalLM, DynamicCache

from inference_peers.exchange import prompt


class Transformers:
    """A Hugging Face folder with PyTorch's attention and a cache that grows."""

    name = "transformers"
    compiled = False

    def __init__(self, path: str, threads: int):
        self.path = path
        torch.set_num_threads(threads)

    def load(self) -> dict:
        self.model = AutoModelForCausalLM.from_pretrained(
            self.path, dtype=torch.bfloat16, attn_implementation="sdpa", local_files_only=True
        ).eval()
        embedding, output = self.model.get_input_embeddings().weight, self.model.get_output_embeddings().weight
        read = sum(w.numel() * w.element_size() for w in self.model.parameters() if w.ndim > 1)
        if embedding is not output:
            read -= embedding.numel() * embedding.element_size()
        return {"read per token": read, "settings": "sdpa, DynamicCache", "version": transformers.__version__}

    @torch.inference_mode()
    def prefill(self, tokens: int) -> int:
        ids = torch.tensor([prompt(tokens)])
        out = self.model(ids, past_key_values=DynamicCache(config=self.model.config), logits_to_keep=1)
        return int(out.logits[0, -1].argmax())

    @torch.inference_mode()
    def start(self, contexts: list[int], room: int) -> None:
        """Fill the cache with random keys and values, padded on the left to the longest."""
        config, longest = self.model.config, max(contexts)
        self.contexts = torch.tensor(contexts)
        self.last = torch.tensor([[prompt(1, i)[0]] for i in range(len(contexts))])
        self.mask = torch.arange(longest) >= longest - self.contexts[:, None]
        self.cache = DynamicCache(config=config)
        size = (len(contexts), config.num_key_value_heads, longest, config.head_dim)
        for layer in range(config.num_hidden_layers if longest else 0):
            noise = torch.randn(size, dtype=torch.bfloat16)
            self.cache.update(noise, noise.clone(), layer)

    @torch.inference_mode()
    def decode(self, steps: int) -> list[int]:
        said = []
        # One sequence has nothing to mask, and PyTorch is faster without a mask.
        alone = len(self.contexts) == 1
        for _ in range(steps):
            self.mask = torch.cat([self.mask, torch.ones(len(self.mask), 1, dtype=torch.bool)], 1)
            out = self.model(
                self.last, past_key_values=self.cache, position_ids=self.contexts[:, None],
                attention_mask=None if alone else self.mask.long(), logits_to_keep=1,
            )  # fmt: skip
            self.last = out.logits[:, -1].argmax(-1, keepdim=True)
            self.contexts = self.contexts + 1
            said.append(int(self.last[0]))
        return said

    def rest(self) -> None:
        self.cache = None


class TorchAo(Transformers):
    """The same with torchao's integers, compiled; compiling is done while loading, and takes most of that time.

    `scheme`: int8 (dynamic activations, a scale per row of weights and per token) or int4 (weights only, groups of 32).
    """

    def __init__(self, path: str, threads: int, scheme: str = "int8"):
        super().__init__(path, threads)
        self.scheme = scheme

    def load(self) -> dict:
        import torchao
        from torchao import quantization

        super().load()
        output = self.model.get_output_embeddings()
        if output.weight is self.model.get_input_embeddings().weight:  # the rows looked up stay bfloat16
            output.weight = torch.nn.Parameter(output.weight.detach().clone(), requires_grad=False)
            self.model.config.tie_word_embeddings = False
        chosen = {
            "int8": lambda: quantization.Int8DynamicActivationInt8WeightConfig(),
            "int4": lambda: quantization.Int4WeightOnlyConfig(group_size=32),
        }[self.scheme]()
        quantization.quantize_(self.model, chosen)
        torch._inductor.config.freezing = True
        self.model.forward = torch.compile(self.model.forward, dynamic=None)
        linears = [m for m in self.model.modules() if isinstance(m, torch.nn.Linear)]
        read = sum(m.in_features * m.out_features for m in linears)
        read = read if self.scheme == "int8" else int(read * 4.5 / 8)
        for tokens in (32, 512):  # what is compiled now is not compiled later
            self.prefill(tokens)
        self.start([0], 8)
        self.decode(4)
        return {"read per token": read, "settings": f"torchao {torchao.__version__}, {self.scheme}, compiled"}
