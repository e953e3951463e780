"""What size to train, on how many tokens, and what to expect of it.

    points    what was measured: parameters, tokens, FLOPs, loss of each run
    law       a fitted law as a value: asked for a loss, an optimum, an accuracy, each with an interval (numpy alone)
    public    laws and results that were published, with their sources
    isoflop, envelope, parametric    three ways from points to a law; bootstrap gives all of them intervals
    extrapolation    what a law does not know where no run has been
    grid      which runs to make under a compute cap; sizes by the family's rules
    downstream    from compute to the likelihood of the right answer to accuracy
    serving   the size that is cheapest to train *and* serve at a wanted quality
    mixtures  from small runs on mixtures of data to the weights of a large one
    stage, page    the fit as an artifact, and as a page to read

`law` and `public` need numpy alone; what fits uses SciPy and scikit-learn (`pip install "puna[scaling]"`).
"""
