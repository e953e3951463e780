import numpy as np
import pytest

from puna.errors import ArtifactError, ConfigError
from puna.scaling import public
from puna.scaling.serving import PRECISIONS, Device, Precision, Wish, cheapest, measured

LAW = public.chinchilla()
QUALITY = LAW.loss(8.03e9, 15e12).value


def test_with_nothing_served_the_compute_optimal_size_is_the_cheapest():
    found = cheapest(LAW, Wish(loss=2.1))
    assert found.best.tokens == pytest.approx(LAW.optimal_tokens(found.best.parameters).value, rel=0.1)
    assert found.best.precision.loss == 0
    assert found.saved == pytest.approx(0, abs=0.01)


def test_the_more_is_served_the_smaller_and_longer_trained_the_model():
    wishes = [Wish(loss=2.1, read_tokens=t, written_tokens=t) for t in (1e10, 1e12, 1e14)]
    found = [cheapest(LAW, w) for w in wishes]
    sizes = [f.best.parameters for f in found]
    assert sizes == sorted(sizes, reverse=True) and sizes[0] > 1.5 * sizes[-1]
    assert found[-1].saved > found[0].saved
    for f in found:
        assert LAW.loss(f.best.parameters, f.best.tokens).value * (1 + f.best.precision.loss) == pytest.approx(
            2.1, rel=1e-4
        )
        assert f.parameters.low <= f.best.parameters <= f.parameters.high
    assert any("tokens per parameter" in w for w in found[-1].warnings)


def test_priced_in_flops_alone_the_minimum_is_sardana_s():
    """6 N D + 2 N T at a fixed loss (arXiv 2401.00448, section 2), found by brute force."""
    loss, served = LAW.loss(13e9, LAW.optimal_tokens(13e9).value).value, 2e12
    sizes = np.geomspace(3e9, 2e10, 4000)
    tokens = np.array([LAW.tokens_for(n, loss).value for n in sizes])
    cheapest_size = sizes[int(np.argmin(6 * sizes * tokens + 2 * sizes * served))]
    wish = Wish(loss=loss, read_tokens=served)
    found = cheapest(LAW, wish, Device(flops=wish.train_flops_per_s), PRECISIONS[:1])
    assert found.best.parameters == pytest.approx(cheapest_size, rel=0.03)
    assert cheapest_size < 10e9  # instead of 13B
    assert 0.1 < found.saved < 0.4


def test_fewer_bits_win_where_writing_waits_for_memory_and_lose_where_they_cost_too_much_quality():
    lone = Wish(loss=2.2, written_tokens=1e13, batch=1)
    harmless = Precision(name="int4", bits=4.5, loss=0.0005)
    harmful = Precision(name="int4", bits=4.5, loss=0.15)
    assert cheapest(LAW, lone, precisions=(PRECISIONS[0], harmless)).best.precision is harmless
    assert cheapest(LAW, lone, precisions=(PRECISIONS[0], harmful)).best.precision.name == "bf16"


def test_a_limit_of_memory_holds_with_weights_and_cache():
    """Meta's numbers: 8B needs about 8 GB at 8 bits and half of that at 4."""
    for precision, gigabytes in (("int8", 8.0), ("int4", 4.0)):
        p = next(x for x in PRECISIONS if x.name == precision)
        assert 8.03e9 * p.bits / 8 / 1e9 == pytest.approx(gigabytes, rel=0.13)
    found = cheapest(LAW, Wish(loss=QUALITY * 1.03, written_tokens=1e12, fits_bytes=8e9, batch=1))
    for choices in found.curve.values():
        for c in choices:
            assert c.memory_bytes <= 0.9 * 8e9
            assert c.memory_bytes > c.parameters * c.precision.bits / 8
    free = cheapest(LAW, Wish(loss=QUALITY * 1.03, written_tokens=1e12, batch=1))
    assert found.best.cost >= free.best.cost


def test_the_impossible_is_refused_with_the_nearest_possible():
    with pytest.raises(ConfigError, match="fits 8 GB") as refused:
        cheapest(LAW, Wish(loss=1.95, fits_bytes=8e9, batch=1))
    nearest = float(refused.value.hint.split("losses from ")[1].split()[0])
    assert cheapest(LAW, Wish(loss=nearest, fits_bytes=8e9, batch=1)).best.memory_bytes <= 8e9
    with pytest.raises(ConfigError, match="cannot be reached"):
        cheapest(LAW, Wish(loss=1.8))


def test_a_quantised_checkpoint_s_own_loss_is_used():
    quality = {
        "perplexity_ratio": {"value": 1.05, "low": 1.04, "high": 1.06},
        "perplexity": {"original": 10.0, "quantised": 10.5},
        "tokens": 4096,
    }
    told = measured({"quality": quality, "bits_per_weight": 4.8}, "mine")
    assert told.bits == 4.8
    assert told.loss == pytest.approx(0.04879 / 2.302585, rel=1e-3)
    assert 0 < told.loss_error < told.loss
    with pytest.raises(ArtifactError, match="no measured quality"):
        measured({"quality": None, "bits_per_weight": 4.8}, "mine")
