"""Curation (section 3.1 of the Llama 3 paper): pages in, documents worth training on out.

Read `curate.py` first: it is the order of the steps. Every document that is read gets one row in the ledger.
"""
