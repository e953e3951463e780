"""What `benchmarks/inference.py` is made of: the weights that all engines get, the engines, and who asks them.

weights.py      one set of random weights, written in every format
exchange.py     a child process that has one engine, and how it is asked
ours.py  llamacpp.py  hugging.py  intel.py      the engines
probe.py        how fast memory can be read just now
measures.py     what is measured, and what is said of it
"""
