"""Answering with a model: sequences share a cache and a batch; the engine is what the outside sees.

docs/engine.md walks one request through it. In the order in which things happen:

    engine         requests in, answers out; `_step` is the whole in five lines
    sequence text  one request: its tokens, its text so far
    turns          which thread steps
    scheduler      who reads what next; who is admitted, preempted, retired
    blocks         which blocks of keys and values are whose
    speculation    guesses
    spans runner   the seam to what computes, and which computes
    native intake  our C++ kernels on a CPU, and a checkpoint straight into their form; no PyTorch
    torch_runner   the reference: any Llama in plain PyTorch; its cache's memory in pool
    adapters room  LoRA; how large a cache is
    drawing        logits to tokens: shaping and structure change single logits, sampler cuts and picks
    scoring        how likely a given text is
"""
