import pytest
from foresight import Known, wish
from hypothesis import given, settings
from hypothesis import strategies as st

from puna.errors import ConfigError
from puna.model.sizes import SIZES
from puna.planner import sheet
from puna.planner.choice import OURS, batch_rows, in_use
from puna.planner.hardware import device
from puna.planner.plan import plan
from puna.planner.recipe import recipe
from puna.planner.serving import fitting_bits, least_bytes, serving
from puna.planner.wish import DAY_S, MOST_TOKENS, Wish

KNOWN = Known()
SMALL = SIZES["llama-3.1-8b"]


@pytest.fixture(scope="module")
def usual():
    return plan(wish(serve_tokens=2e12, fits_bytes=24e9), KNOWN)


def test_the_days_are_used_and_the_devices_too(usual):
    choice = usual.choice
    assert usual.granted
    assert choice.found.best.layout.world == 64
    assert choice.train_seconds == pytest.approx(14 * DAY_S)
    assert choice.train_hours == pytest.approx(64 * 14 * 24)
    assert choice.tokens == pytest.approx(choice.found.best.step.tokens_per_s * 14 * DAY_S * choice.risk.effective)


def test_what_is_served_fits_and_is_the_cheapest_near_the_best(usual):
    choice = usual.choice
    assert choice.serving.bytes <= 24e9
    assert choice.total_loss <= usual.best.total_loss * 1.01
    assert choice.hours <= usual.best.hours


def test_nothing_to_serve_takes_the_lowest_loss():
    made = plan(wish(), KNOWN)
    assert made.choice.config == made.best.config
    assert made.choice.total_loss <= 1.001 * min(c.total_loss for c in made.ladder)


def test_who_serves_more_trains_no_larger_model():
    sizes = [plan(wish(serve_tokens=served), KNOWN).choice.config.parameters for served in (0, 1e12, 1e14)]
    assert sizes == sorted(sizes, reverse=True)


def test_more_days_lower_the_loss():
    losses = [plan(wish(days=days), KNOWN).choice.total_loss for days in (1, 10, 100)]
    assert losses == sorted(losses, reverse=True) and len(set(losses)) == 3


def test_less_room_means_a_smaller_model_or_fewer_bits():
    tight = plan(wish(fits_bytes=4e9), KNOWN)
    assert tight.granted
    assert tight.choice.serving.bytes <= 4e9
    assert tight.choice.config.parameters < plan(wish(), KNOWN).choice.config.parameters


def test_a_given_size_and_tokens_say_the_time():
    made = plan(wish(2048, days=None, size=SMALL, tokens=15e12), KNOWN)
    assert made.choice.tokens == 15e12
    assert made.choice.config is SMALL
    assert made.choice.train_seconds == pytest.approx(
        15e12 / made.choice.found.best.step.tokens_per_s / made.choice.risk.effective
    )
    # Meta's model card: 1.46M hours of H100 for 8B; ours, without their restarts and evaluations, is the same order.
    assert 0.3e6 < made.choice.train_hours < 1.5e6


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (wish(days=2.0, size=SIZES["llama-3.1-70b"], tokens=2e12), "days, not 2; planned for that long"),
        (wish(8, days=None, size=SIZES["llama-3.1-405b"], tokens=1e12), "planned with"),
        (wish(fits_bytes=1e6), "nothing fits 1 MB"),
        (wish(size=SIZES["llama-3.1-70b"], fits_bytes=24e9), "do not fit 24 GB"),
        (wish(name="A100", precision="fp8"), "A100 has no fp8 products"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_an_impossible_wish_gets_the_nearest_possible_plan_and_the_reason(asked, said):
    made = plan(asked, KNOWN)
    assert not made.granted
    assert any(said in line for line in made.refused), made.refused
    best = made.choice.found.best
    assert best.memory.total <= made.wish.device.memory_bytes
    assert made.choice.tokens > 0


def test_a_wish_without_a_length_is_told_what_to_say():
    with pytest.raises(ConfigError, match="--days"):
        wish(days=None)


@settings(max_examples=6, deadline=None, derandomize=True)
@given(
    devices=st.integers(1, 5000),
    name=st.sampled_from(["H100", "H200", "A100", "B200", "CPU"]),
    days=st.floats(1e-3, 1e4),
    served=st.sampled_from([0.0, 1e9, 1e15]),
    fits=st.sampled_from([None, 1e5, 1e9, 1e11]),
    length=st.sampled_from([512, 8192, 131_072]),
)
def test_any_wish_has_a_plan_on_its_devices(devices, name, days, served, fits, length):
    asked = Wish(
        devices=devices, device=device(name), days=days, serve_tokens=served, fits_bytes=fits, sequence_length=length
    )  # fmt: skip
    made = plan(asked, KNOWN)
    assert made.choice.found.best.layout.world == in_use(devices, length) <= devices
    assert made.choice.train_seconds == pytest.approx(days * DAY_S, rel=1e-6)
    if fits is not None:
        assert made.choice.serving.bytes <= made.wish.fits_bytes


@pytest.mark.parametrize("world", [1, 7, 12, 64, 96, 1000])
def test_a_batch_can_be_shared_out(world):
    rows = batch_rows(SMALL, world, 8192)
    assert rows % (world // (world & -world)) == 0
    assert 0.5e6 < rows * 8192 < 16.8e6 or world > 500


def test_fewer_bits_serve_faster_and_lose_more():
    eight, four = (serving(SMALL, bits, device("H100"), 8192) for bits in (8, 4))
    assert four.tokens_per_s_per_device > eight.tokens_per_s_per_device
    assert four.loss > eight.loss > 0
    assert fitting_bits(SMALL, 8192, least_bytes(SMALL, 8, 8192)) == [8, 4]
    assert fitting_bits(SMALL, 8192, 1e9) == []


def test_a_number_of_devices_that_no_batch_can_share_leaves_a_few_waiting():
    for devices in (1, 7, 64, 96, 1000, 16_384):
        assert in_use(devices, 8192) == devices
    for devices in (4999, 100_000, 99_991):
        used = in_use(devices, 8192)
        assert 0.98 * devices < used < devices
        assert used // (used & -used) <= 256
    made = plan(wish(100_000, days=60.0, software="tuned"), KNOWN)
    assert made.choice.config.parameters > 0.5 * made.optimal_parameters  # and not whatever could be laid out
    assert made.choice.devices == 100_000  # the others are paid for too


def test_more_tokens_than_there_are_become_as_many_as_are_planned():
    made = plan(wish(days=None, size=SMALL, tokens=1e30), KNOWN)
    assert "never be" in made.refused[0]
    assert made.choice.tokens == MOST_TOKENS
    assert "all public text" in sheet.text(sheet.sections(made, KNOWN))


def test_a_size_that_memory_forced_is_said_to_be_forced():
    text = sheet.text(sheet.sections(plan(wish(8, days=3650.0), KNOWN), KNOWN))
    assert "limit" in text and "nothing larger fits" in text
    assert "nothing larger fits" not in sheet.text(sheet.sections(plan(wish(), KNOWN), KNOWN))


def test_one_process_plans_what_our_trainer_recomputes():
    """speed.recompute is for one process: there a size that keeping everything is too large for fits."""
    small = SIZES["llama-3.2-3b"]
    made = plan(wish(1, days=1.0, size=small), KNOWN)
    best = made.choice.found.best
    assert made.granted and best.work.recompute in ("products", "full")
    assert recipe(made, KNOWN)["speed"] == {"recompute": OURS[best.work.recompute], "float8": False}
    assert f"speed.recompute={OURS[best.work.recompute]}" in sheet.text(sheet.sections(made, KNOWN))


def test_several_processes_of_our_trainer_recompute_nothing():
    """A size that was asked for may need a trainer that does, and is told so."""
    made = plan(wish(), KNOWN)
    assert {c.found.best.work.recompute for c in (made.choice, *made.ladder)} == {"none"}
    tuned = plan(wish(software="tuned"), KNOWN)
    assert tuned.choice.found.best.step.mfu() > made.choice.found.best.step.mfu()
