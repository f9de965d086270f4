"""One profile from several ranks', and progress."""

import io
from dataclasses import replace

import pytest

from hybridpar.errors import ProfileError
from hybridpar.profiling.combine import combine
from hybridpar.profiling.record import LayerProfile, Profile
from hybridpar.report.progress import Progress


def of_rank(time, speed=1.0, **changes):
    """A rank's profile with one layer."""
    rows = LayerProfile("fc", ((time, 2 * time),), ((time, 2 * time),))
    layer = LayerProfile(
        "fc",
        ((time, 2 * time),),
        ((time, 4 * time),),
        forward_spread=((0.1, 0.1),),
        accumulate_s=time,
        saved_bytes=((10.0 * time, 20.0 * time),),
        by_rows=rows,
    )
    made = Profile(
        "c",
        "measured",
        "cpu",
        "float32",
        (1, 2),
        (1.0,),
        (layer,),
        speed,
        speed,
        speed,
        notes=("a",),
        core_share=1.0,
    )
    return replace(made, **changes)


def test_every_figure_is_the_median_of_the_ranks_and_bytes_are_the_most():
    found = combine([of_rank(1.0), of_rank(3.0, 5.0), of_rank(2.0, loader_samples_per_s=4.0)])
    (layer,) = found.layers
    assert (layer.forward_s, layer.backward_s) == (((2.0, 4.0),), ((2.0, 8.0),))
    assert (layer.accumulate_s, layer.saved_bytes) == (2.0, ((30.0, 60.0),))
    assert layer.by_rows.forward_s == ((2.0, 4.0),)
    assert layer.rank_spread == 1.0
    assert found.rank_speeds == (2.0, 0.6667, 1.0)
    assert (found.update_s_per_byte, found.loader_samples_per_s) == (1.0, None)
    assert found.notes == ("a", "rank 0 was 3.00 times as fast as rank 1")


def test_equal_ranks_are_combined_without_a_word():
    found = combine([of_rank(1.0, device="x"), of_rank(1.1, device="y")])
    assert found.notes == ("a",)
    assert found.device == "x / y"
    assert found.rank_speeds == (1.05, 0.9545)


def test_a_step_waits_for_the_slowest_of_equal_ranks():
    """Medians over ranks of 1.0, 1.0 and 1.1, which are 1.0, as much longer as the third took."""
    (layer,) = combine([of_rank(1.0), of_rank(1.1), of_rank(1.0)]).layers
    assert layer.forward_s[0] == pytest.approx((1.1, 2.2), rel=1e-4)
    assert layer.backward_s[0] == pytest.approx((1.1, 4.4), rel=1e-4)
    assert layer.by_rows.forward_s[0] == pytest.approx((1.1, 2.2), rel=1e-4)
    assert layer.accumulate_s == pytest.approx(1.1, rel=1e-4)
    assert layer.forward_spread == ((0.1, 0.1),)


def test_one_rank_is_its_own_profile():
    one = of_rank(1.0)
    assert combine([one]) == replace(one, rank_speeds=(1.0,))


def test_ranks_that_timed_something_else_are_refused():
    with pytest.raises(ProfileError, match=r"differ in dtype: .*float32.*float64"):
        combine([of_rank(1.0), of_rank(1.0, dtype="float64")])


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize(
    ("stream", "text"),
    [(io.StringIO(), "one\ntwo\nthree\nfour\n"), (Terminal(), "one\r\x1b[2Ktwo\r\x1b[2Kthree\nfour")],
)
def test_progress_takes_one_line_of_a_terminal_and_plain_lines_elsewhere(stream, text):
    shown = Progress(stream)
    shown.update("one")
    shown.update("two")
    shown.note("three")
    shown.update("four")
    assert stream.getvalue() == text
    Progress(stream, quiet=True).note("five")
    assert stream.getvalue() == text
