"""What a run will need, before there is a machine to run it on: memory, time, money, and what may go wrong.

    hardware.toml  what devices and links do, each figure with its source
    work.py        what a step computes, and how
    memory.py      bytes of a rank, by kind              compute.py      operations and bytes read, and their time
    collectives.py bytes sent, and their time            step.py         all of it as the time of a step, and MFU
    layouts.py     the search for a layout               calibrate.py    speeds of the machine at hand
    plan.py        a wish -> size, tokens, layout, time, cost, risk
    policies/      what to do about faults: the trainer's own objects

Formulas only: nothing here imports PyTorch, and a plan takes a second.
"""
